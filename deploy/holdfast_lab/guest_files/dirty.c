/* dirty MEGABYTES PAGES_PER_SECOND: rewrites random pages at a steady rate, for ever.
 *
 * Works in slices of 10 ms. After a pause (a checkpoint, a failover) it does not catch up: the next
 * slice is as large as any other, so that a pause does not cause a burst that lengthens the next one.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE_SIZE_BYTES 4096
#define SLICE_NS 10000000
#define SLICES_PER_SECOND (1000000000 / SLICE_NS)

static uint64_t next_random(uint64_t *state)
{
    /* Multiplier and increment of Knuth's MMIX generator; its high bits are good enough here. */
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

int main(int argc, char **argv)
{
    uint64_t state = 1, written = 0;
    char *memory;
    size_t pages;
    long pages_per_second, owed = 0;

    if (argc != 3) {
        fprintf(stderr, "usage: dirty MEGABYTES PAGES_PER_SECOND\n");
        return 2;
    }
    pages = strtoul(argv[1], NULL, 10) * (1048576 / PAGE_SIZE_BYTES);
    pages_per_second = strtol(argv[2], NULL, 10);
    if (pages == 0 || pages_per_second <= 0) {
        fprintf(stderr, "dirty: both numbers must be positive\n");
        return 2;
    }
    memory = mmap(NULL, pages * PAGE_SIZE_BYTES, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "dirty: no memory for %zu pages: %s\n", pages, strerror(errno));
        return 1;
    }
    memset(memory, 1, pages * PAGE_SIZE_BYTES);
    printf("guest: rewriting %ld of %zu pages a second\n", pages_per_second, pages);
    fflush(stdout);
    for (;;) {
        struct timespec slice = {.tv_sec = 0, .tv_nsec = SLICE_NS};

        for (owed += pages_per_second; owed >= SLICES_PER_SECOND; owed -= SLICES_PER_SECOND) {
            size_t page = next_random(&state) % pages;
            size_t word = next_random(&state) % (PAGE_SIZE_BYTES / sizeof written);

            ((uint64_t *)(memory + page * PAGE_SIZE_BYTES))[word] = ++written;
        }
        nanosleep(&slice, NULL);
    }
}
