/* A guest that does nothing but touch memory: reads READS pages, writes WRITES of them at equal
 * distances, counts the round, and begins again. Multiboot, 32 bits, no paging, no interrupts, no
 * stack. */
#define PAGE    4096
#define FIRST   0x1000000
#define COUNTER 0x80000

    .globl _start
    .text
_start:
    jmp     round
    .align  4
    .long   0x1BADB002, 0, -0x1BADB002
round:
    movl    $FIRST, %esi
    movl    $READS, %ecx
1:  movl    (%esi), %eax
    addl    $PAGE, %esi
    loop    1b
    movl    $FIRST, %esi
    movl    $WRITES, %ecx
2:  incl    (%esi)
    addl    $(READS / WRITES * PAGE), %esi
    loop    2b
    incl    COUNTER
    jmp     round
