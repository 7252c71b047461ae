/* A wall clock that runs faster, for one process: CLOCK_REALTIME and its relatives, nothing else.
 *
 * Every process with the same three variables reads the same time, so a restart neither stops nor turns the clock.
 * Monotonic clocks, sleeps and timeouts stay real: only the date moves.
 *   SOAK_REAL_NS, SOAK_WALL_NS   one moment, in real and in told nanoseconds since 1970
 *   SOAK_FACTOR                  told seconds a real second
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long long real_ns, wall_ns, factor;

__attribute__((constructor)) static void read_moment(void) {
    const char *real = getenv("SOAK_REAL_NS"), *wall = getenv("SOAK_WALL_NS"), *speed = getenv("SOAK_FACTOR");
    if (real && wall && speed) {
        real_ns = atoll(real);
        wall_ns = atoll(wall);
        factor = atoll(speed);
    }
}

int clock_gettime(clockid_t clock, struct timespec *told) {
    int status = (int)syscall(SYS_clock_gettime, clock, told);
    if (status == 0 && factor && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        long long now = wall_ns + (told->tv_sec * 1000000000LL + told->tv_nsec - real_ns) * factor;
        told->tv_sec = now / 1000000000LL;
        told->tv_nsec = now % 1000000000LL;
    }
    return status;
}

int gettimeofday(struct timeval *restrict told, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
