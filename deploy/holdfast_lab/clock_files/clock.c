/*
 * A monotonic clock that can be stopped from outside, for a process that loads this library.
 *
 * HOLDFAST_LAB_CLOCK names a file of 8 bytes: the nanoseconds at which the clock stands, or 0 while
 * it runs. Only Python programs are meant, agents and workers; what they start inherits the
 * environment, and a QEMU has its own time to keep.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NANOSECONDS 1000000000

static const volatile int64_t *stopped_at;
static int (*ask)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("HOLDFAST_LAB_CLOCK");
    ask = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (path == NULL || strncmp(program_invocation_short_name, "python", 6) != 0)
        return;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    void *shared = mmap(NULL, sizeof *stopped_at, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (shared != MAP_FAILED)
        stopped_at = shared;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = ask != NULL ? ask(clock, now) : (int)syscall(SYS_clock_gettime, clock, now);
    int64_t at = stopped_at != NULL ? *stopped_at : 0;
    if (result == 0 && at != 0 && clock == CLOCK_MONOTONIC) {
        now->tv_sec = at / NANOSECONDS;
        now->tv_nsec = at % NANOSECONDS;
    }
    return result;
}
