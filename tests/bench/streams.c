// Many streams at once, each byte compared with what the double sends; prints one JSON object.
// Usage: streams PORT PATH KEY MODEL CONNECTIONS EVENTS PACE_MS SECONDS RAMP_MS EXACT
// Each connection asks for a stream of EVENTS events, one each PACE_MS, again and again until SECONDS have passed.
// EXACT 0: only the events are counted (a peer that writes the JSON anew).
#define _GNU_SOURCE
#include "events.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct conn {
    int fd, status, header, chunk, body_at, done_headers, size_digits, in_trailer, events, active, tail;
    char line[8192], last;
    int line_len;
    double sent_at, last_at, start_at;
};
static struct conn *conns;
static char *expected, request[4096];
static int expected_len, request_len, exact, port;
static long finished, broken, wrong, refused, events_seen, bytes_seen;
static double *ttft, *gaps, *totals;
static long ttft_n, gaps_n, totals_n, cap = 1 << 22;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}
static double at(double *list, long n, double share) { return n ? list[(long)((n - 1) * share)] : -1; }

static int dial(int poll_fd, struct conn *c) {
    int one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (void *)&address, sizeof address)) return -1;
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    return epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &e);
}
static void begin(struct conn *c) {
    c->status = c->chunk = c->body_at = c->done_headers = c->line_len = c->events = c->in_trailer = c->tail = 0;
    c->last = 0;
    c->active = 1;
    c->sent_at = now();
    c->last_at = 0;
    if (send(c->fd, request, request_len, MSG_NOSIGNAL) != request_len) broken++, c->active = 0;
}
static void body(struct conn *c, const char *data, int len, double when) {
    bytes_seen += len;
    if (c->last_at == 0) {
        if (ttft_n < cap) ttft[ttft_n++] = when - c->sent_at;
    } else if (when > c->last_at && gaps_n < cap)
        gaps[gaps_n++] = when - c->last_at;
    c->last_at = when;
    if (exact) {
        if (c->body_at + len > expected_len || memcmp(expected + c->body_at, data, len)) c->tail = -1;
        c->body_at += len;
    }
    for (int i = 0; i < len; i++) {  // an empty line ends an event; it may come in a piece of its own
        if (data[i] == '\n' && c->last == '\n') c->events++, events_seen++;
        c->last = data[i];
    }
}
// Returns 1 when the answer is complete, -1 when it cannot be read.
static int feed(struct conn *c, const char *data, int len, double when) {
    int i = 0;
    while (i < len) {
        if (c->chunk > 0 && c->done_headers) {
            int take = len - i < c->chunk ? len - i : c->chunk;
            body(c, data + i, take, when);
            c->chunk -= take;
            i += take;
            if (!c->chunk) c->chunk = -2;  // its line end
            continue;
        }
        char ch = data[i++];
        if (ch != '\n') {
            if (c->line_len < 8000) c->line[c->line_len++] = ch;
            continue;
        }
        if (c->line_len && c->line[c->line_len - 1] == '\r') c->line_len--;
        c->line[c->line_len] = 0;
        int empty = c->line_len == 0;
        c->line_len = 0;
        if (!c->done_headers) {
            if (!c->status) {
                if (sscanf(c->line, "HTTP/1.%*d %d", &c->status) != 1) return -1;
            } else if (empty) {
                c->done_headers = 1;
                c->chunk = 0;
                if (c->status != 200) return -1;
            }
        } else if (c->in_trailer) {
            if (empty) return 1;
        } else if (c->chunk == -2) {
            c->chunk = 0;
        } else {
            c->chunk = strtol(c->line, NULL, 16);
            if (!c->chunk) c->in_trailer = 1;
        }
    }
    return 0;
}
int main(int argc, char **argv) {
    if (argc < 11) return fprintf(stderr, "streams: ten arguments\n"), 2;
    port = atoi(argv[1]);
    int n = atoi(argv[5]), events = atoi(argv[6]), pace = atoi(argv[7]);
    double seconds = atof(argv[8]), ramp = atof(argv[9]);
    exact = atoi(argv[10]);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    expected = malloc((size_t)(events + 4) * EVENT_MAX);
    for (int i = 0; i <= events + 1; i++) expected_len += event_text(expected + expected_len, i, events, 0);
    expected_len += sprintf(expected + expected_len, "data: [DONE]\n\n");
    char text[2048];
    int text_len = sprintf(text, "{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"What is the capital of France? Answer in one sentence.\"}],\"stream\":true,\"max_tokens\":%d,\"seed\":%d}", argv[4], events, pace);
    request_len = sprintf(request, "POST %s HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nAccept: text/event-stream\r\nContent-Length: %d\r\n\r\n%s", argv[2], argv[3], text_len, text);
    ttft = malloc(cap * sizeof(double)), gaps = malloc(cap * sizeof(double)), totals = malloc(cap * sizeof(double));
    conns = calloc(n, sizeof *conns);
    int poll_fd = epoll_create1(0), started = 0, active = 0;
    double begun = now(), over = begun + seconds * 1e3, patience = over + 30e3;
    struct epoll_event ready[512];
    while (now() < patience) {
        while (started < n && now() >= begun + ramp * started / n) {
            if (dial(poll_fd, &conns[started])) return perror("streams: connect"), 1;
            begin(&conns[started++]);
            active++;
        }
        if (started == n && !active) break;
        int count = epoll_wait(poll_fd, ready, 512, started < n ? 1 : 50);
        double when = now();
        for (int i = 0; i < count; i++) {
            struct conn *c = ready[i].data.ptr;
            static char data[262144];
            ssize_t len = recv(c->fd, data, sizeof data, MSG_DONTWAIT);
            if (len < 0 && errno == EAGAIN) continue;
            int done = len <= 0 ? -1 : feed(c, data, len, when);
            if (!done) continue;
            if (done < 0) {
                if (c->active) { if (c->status && c->status != 200) refused++; else broken++; }
            } else {
                finished++;
                if (totals_n < cap) totals[totals_n++] = when - c->sent_at;
                if (c->tail < 0 || (exact && c->body_at != expected_len) || (!exact && c->events < events)) wrong++;
            }
            if (done < 0 || when >= over) {
                if (c->active) active--;
                c->active = 0;
                close(c->fd);
                if (done < 0 && when < over && broken + refused < 1000 && dial(poll_fd, c) == 0) begin(c), active++;
            } else
                begin(c);
        }
    }
    double took = (now() - begun) / 1e3;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    qsort(ttft, ttft_n, sizeof(double), compare), qsort(gaps, gaps_n, sizeof(double), compare), qsort(totals, totals_n, sizeof(double), compare);
    printf("{\"seconds\":%.3f,\"finished\":%ld,\"unfinished\":%d,\"broken\":%ld,\"refused\":%ld,\"wrong\":%ld,\"events\":%ld,\"bytes\":%ld,"
           "\"ttft_ms\":{\"p50\":%.3f,\"p99\":%.3f,\"max\":%.3f},\"gap_ms\":{\"p50\":%.3f,\"p99\":%.3f,\"max\":%.3f},\"total_ms\":{\"p50\":%.3f,\"p99\":%.3f},\"client_cpu_seconds\":%.3f}\n",
           took, finished, active, broken, refused, wrong, events_seen, bytes_seen, at(ttft, ttft_n, .5), at(ttft, ttft_n, .99), at(ttft, ttft_n, 1),
           at(gaps, gaps_n, .5), at(gaps, gaps_n, .99), at(gaps, gaps_n, 1), at(totals, totals_n, .5), at(totals, totals_n, .99),
           used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    return 0;
}
