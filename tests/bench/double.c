// A double of vLLM that is never the bottleneck: one thread, epoll, no allocation per event.
// Usage: double PORT. Prints the port it listens on. The request's body says what it wants: `"stream":true`,
// `"max_tokens":N` events, `"seed":P` milliseconds between two events (0: one event of each stream a loop turn).
#define _GNU_SOURCE
#include "events.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FD 65536
struct conn {
    char *in;
    int in_len, in_cap;
    char *out;
    int out_len, out_cap, out_at;
    int events, sent, usage, final_usage, waiting;  // a stream under way: events > 0
    double pace, next;
    int slot;
};
static struct conn *conns[MAX_FD];
static int streaming[MAX_FD], streams;
static int poll_fd;
static char json_answer[2048];
static int json_len;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void drop(int fd) {
    struct conn *c = conns[fd];
    if (c->events) {
        streaming[c->slot] = streaming[--streams];
        conns[streaming[c->slot]]->slot = c->slot;
    }
    free(c->in), free(c->out), free(c);
    conns[fd] = NULL;
    close(fd);
}

static void put(struct conn *c, const char *data, int len) {
    if (c->out_at == c->out_len) c->out_at = c->out_len = 0;
    if (c->out_len + len > c->out_cap) {
        c->out_cap = (c->out_len + len) * 2;
        c->out = realloc(c->out, c->out_cap);
    }
    memcpy(c->out + c->out_len, data, len);
    c->out_len += len;
}

static int flush(int fd) {  // -1: the connection is gone
    struct conn *c = conns[fd];
    while (c->out_at < c->out_len) {
        ssize_t n = send(fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) return drop(fd), -1;
            break;
        }
        c->out_at += n;
    }
    int waiting = c->out_at < c->out_len;
    if (waiting != c->waiting) {
        struct epoll_event e = {.events = waiting ? EPOLLIN | EPOLLOUT : EPOLLIN, .data.fd = fd};
        epoll_ctl(poll_fd, EPOLL_CTL_MOD, fd, &e);
        c->waiting = waiting;
    }
    return 0;
}

static void put_chunk(struct conn *c, const char *text, int len) {
    char size[16];
    put(c, size, sprintf(size, "%x\r\n", len));
    put(c, text, len);
    put(c, "\r\n", 2);
}

static int next_event(int fd) {
    struct conn *c = conns[fd];
    char text[EVENT_MAX];
    put_chunk(c, text, event_text(text, c->sent, c->events, c->usage));
    c->next += c->pace;
    if (c->sent++ > c->events) {
        if (c->final_usage) put_chunk(c, text, usage_text(text, c->events));
        put_chunk(c, "data: [DONE]\n\n", 14);
        put(c, "0\r\n\r\n", 5);
        c->events = 0;
        streaming[c->slot] = streaming[--streams];
        conns[streaming[c->slot]]->slot = c->slot;
    }
    return flush(fd);
}

static long number(const char *body, const char *name, long fallback) {
    const char *at = strstr(body, name);
    if (!at) return fallback;
    for (at += strlen(name); *at == ' ' || *at == ':'; at++);
    return strtol(at, NULL, 10);
}

static int flag(const char *body, const char *name) {
    const char *at = strstr(body, name);
    if (!at) return 0;
    for (at += strlen(name); *at == ' ' || *at == ':'; at++);
    return !strncmp(at, "true", 4);
}

static void simple(struct conn *c, const char *body) {
    char head[256];
    put(c, head, sprintf(head, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", strlen(body)));
    put(c, body, strlen(body));
}

static void answer(int fd, char *head, char *body) {
    struct conn *c = conns[fd];
    if (!strncmp(head, "GET /v1/models", 14)) {
        simple(c, "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1700000000,\"owned_by\":\"vllm\",\"root\":\"bench\",\"max_model_len\":131072}]}");
    } else if (!strncmp(head, "GET /get_server_info", 20) || !strncmp(head, "GET /get_model_info", 19) || !strncmp(head, "GET /server_info", 16) || !strncmp(head, "GET /model_info", 15)) {
        simple(c, "{\"model_path\":\"bench\",\"model_id\":\"bench\",\"served_model_name\":\"bench\",\"version\":\"0.32.0\"}");
    } else if (!strncmp(head, "GET /version", 12)) {
        simple(c, "{\"version\":\"0.32.0\"}");
    } else if (!strncmp(head, "GET ", 4)) {
        simple(c, "{}");
    } else if (!flag(body, "\"stream\"")) {
        put(c, json_answer, json_len);
    } else {
        static const char stream_head[] = "HTTP/1.1 200 OK\r\ndate: Mon, 23 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
        put(c, stream_head, sizeof stream_head - 1);
        c->events = number(body, "\"max_tokens\"", 0);
        if (!c->events) c->events = number(body, "\"max_completion_tokens\"", 16);
        c->pace = number(body, "\"seed\"", 0);
        c->usage = flag(body, "\"continuous_usage_stats\"");
        c->final_usage = flag(body, "\"include_usage\"");
        c->sent = 0;
        c->next = now();
        c->slot = streams;
        streaming[streams++] = fd;
        next_event(fd);
        return;
    }
    flush(fd);
}

static void readable(int fd) {
    struct conn *c = conns[fd];
    for (;;) {
        if (c->in_cap - c->in_len < 65536) c->in = realloc(c->in, c->in_cap = c->in_len + 131072);
        ssize_t n = recv(fd, c->in + c->in_len, c->in_cap - c->in_len - 1, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN)) { drop(fd); return; }
        if (n < 0) break;
        c->in_len += n;
        if (n < 60000) break;
    }
    while (conns[fd] == c && !c->events && c->in_len) {
        c->in[c->in_len] = 0;
        char *end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
        if (!end) return;
        *end = 0;
        char *field = strcasestr(c->in, "\r\ncontent-length:");
        int length = field ? atoi(field + 17) : 0, head = end + 4 - c->in;
        if (c->in_len < head + length) { *end = '\r'; return; }
        char kept = c->in[head + length];
        c->in[head + length] = 0;
        answer(fd, c->in, c->in + head);
        if (conns[fd] != c) return;
        c->in[head + length] = kept;
        memmove(c->in, c->in + head + length, c->in_len -= head + length);
    }
}

int main(int argc, char **argv) {
    struct rlimit files = {MAX_FD - 1, MAX_FD - 1};
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max < MAX_FD ? files.rlim_max : MAX_FD - 1;
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    const char *body = "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"The capital of France is Paris. It lies on the Seine, has about two million inhabitants and is known for its museums, its kitchens and its light.\",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"tool_calls\":[],\"reasoning_content\":null},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null,\"token_ids\":null}],\"service_tier\":null,\"system_fingerprint\":null,\"usage\":{\"prompt_tokens\":20,\"total_tokens\":52,\"completion_tokens\":32,\"prompt_tokens_details\":null},\"prompt_logprobs\":null,\"prompt_token_ids\":null,\"kv_transfer_params\":null}";
    json_len = sprintf(json_answer, "HTTP/1.1 200 OK\r\ndate: Mon, 23 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %zu\r\ncontent-type: application/json\r\n\r\n%s", strlen(body), body);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 4096)) return perror("double"), 1;
    socklen_t size = sizeof address;
    getsockname(listener, (void *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    poll_fd = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, ready[1024];
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, listener, &e);
    for (;;) {
        double at = now(), next = at + 1000;
        for (int i = streams - 1; i >= 0; i--) {
            if (i >= streams) continue;
            int fd = streaming[i];
            struct conn *c = conns[fd];
            if (c->waiting) continue;  // the reader is behind; its buffer does not grow
            if (c->next <= at && next_event(fd) == 0 && conns[fd] && c->events && c->next < next) next = c->next;
            else if (conns[fd] == c && c->events && c->next < next) next = c->next;
        }
        at = now();
        int wait = next <= at ? 0 : (int)(next - at) + 1;
        int n = epoll_wait(poll_fd, ready, 1024, streams ? wait : 1000);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) {
                int new;
                while ((new = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    if (new >= MAX_FD) { close(new); continue; }
                    setsockopt(new, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    conns[new] = calloc(1, sizeof(struct conn));
                    struct epoll_event in = {.events = EPOLLIN, .data.fd = new};
                    epoll_ctl(poll_fd, EPOLL_CTL_ADD, new, &in);
                }
            } else if (conns[fd]) {
                if (ready[i].events & EPOLLOUT && flush(fd) < 0) continue;
                if (ready[i].events & ~EPOLLOUT) readable(fd);
            }
        }
    }
}
