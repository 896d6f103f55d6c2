"""Make another process run a system call: it is stopped, steered, stepped and put back as it was.

Needs ptrace rights (CAP_SYS_PTRACE or the same user); stops the target's main thread for well under
a millisecond.

Theory of operation. The thread is seized and interrupted, its registers are saved and pointed at a
`syscall` instruction of the vdso, one single step runs it, the result is read, everything is put
back. What makes that safe for a QEMU that knows nothing of it:

* A thread interrupted in a system call carries -ERESTART* in its result register, and the kernel
  acts on it only on the way out. Our steered registers say "not in a system call" (orig_rax = -1),
  so it does nothing for us; the saved ones, put back at the end, let it restart the call: ppoll,
  read, futex, nanosleep go on and never see EINTR. `epoll_*wait` and `sigtimedwait` do not restart
  by themselves: they are turned into calls that do.
* Signals are blocked in the thread while we use it (SETSIGMASK, all but SIGTRAP) and stay pending
  with all they carry. A ppoll's own temporary mask is handled by the kernel: GETSIGMASK returns
  the mask to go back to, and the restarted call applies its own again.
* A seccomp filter that kills would kill QEMU for our call. So with a filter present the tracer
  suspends it (PTRACE_O_SUSPEND_SECCOMP); where that is not allowed, nothing is tried.
* All ptrace calls are made by a thread of their own. When it ends, for whatever reason, the kernel
  detaches whatever it still held. Ctrl-C reaches the main thread, never this one.

The deadline bounds the way to the stop. Once registers are changed we wait for our one short call
to end, because letting go then would ruin the target. If this process is killed in those
some 50 microseconds, the target is lost with it.

Limits: 64-bit targets. arm64 is written by the book and has never run. A main thread stopped
inside a restartable sequence (rseq(2)) would finish that sequence without its protection; QEMU
has none of its own, and a thread inside a system call is never in one. No other thread of the
calling process may wait for `pid` meanwhile: it would take the stop away.

Source: ptrace(2); Linux arch/x86/kernel/signal.c, arch/arm64/kernel/signal.c, kernel/ptrace.c.
"""

import ctypes
import errno
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from holdfast_agent.memory import kernel
from holdfast_agent.memory.errors import InjectionFailed

Result = TypeVar("Result")

_CONT: Final = 7
_SINGLE_STEP: Final = 9
_DETACH: Final = 17
_GET_REGISTER_SET: Final = 0x4204
_SET_REGISTER_SET: Final = 0x4205
_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_GET_SIGNAL_MASK: Final = 0x420A
_SET_SIGNAL_MASK: Final = 0x420B
_OPTION_SUSPEND_SECCOMP: Final = 1 << 21
_EVENT_STOP: Final = 128

_GENERAL_REGISTERS: Final = 1  # NT_PRSTATUS
_ARM_SYSTEM_CALL: Final = 0x404  # NT_ARM_SYSTEM_CALL

_ALL_BUT_SIGTRAP: Final = (1 << 64) - 1 & ~(1 << (signal.SIGTRAP - 1))
_ERESTARTNOHAND: Final = 514
_STEPS_MAX: Final = 64
_ERRNO_MAX: Final = 4095  # linux/err.h


@dataclass(frozen=True)
class _Architecture:
    """Register positions (in 64-bit words of NT_PRSTATUS) and system call numbers."""

    word_count: int
    pointer: int
    number: int
    arguments: tuple[int, ...]
    result: int
    instruction: bytes
    step: int
    original: int | None  # position of orig_rax; arm64 keeps it in a set of its own
    close: int
    # Calls that end with EINTR on any interruption, not only by a signal handler (signal(7)).
    never_restarted: frozenset[int]


_ARCHITECTURES: Final = {
    "x86_64": _Architecture(
        word_count=27,
        pointer=16,
        number=10,
        arguments=(14, 13, 12, 7, 9, 8),
        result=10,
        instruction=b"\x0f\x05",
        step=1,
        original=15,
        close=3,
        never_restarted=frozenset({128, 208, 232, 281, 333, 441}),
    ),
    "aarch64": _Architecture(
        word_count=34,
        pointer=32,
        number=8,
        arguments=(0, 1, 2, 3, 4, 5),
        result=0,
        instruction=b"\x01\x00\x00\xd4",
        step=4,
        original=None,
        close=57,
        never_restarted=frozenset(),
    ),
}
_X86_CODE_SEGMENT: Final = 17
_X86_CODE_SEGMENT_64_BIT: Final = 0x33


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size_bytes", ctypes.c_size_t)]  # type: ignore[mutable-override]


class StoppedProcess:
    """A process that stands still and runs the system calls we ask for; see `run_in_process`."""

    def __init__(self, pid: int, architecture: _Architecture, instruction_address: int) -> None:
        """Note how it was found and block its signals; `put_back` undoes that."""
        self.pid = pid
        self._architecture = architecture
        self._instruction_address = instruction_address
        self._saved = self._registers()
        self._mask = ctypes.c_uint64()
        self._late_signals: list[int] = []
        if platform.machine() == "x86_64":
            segment = self._saved[_X86_CODE_SEGMENT]
            if segment != _X86_CODE_SEGMENT_64_BIT:
                raise InjectionFailed(pid, "it is not a 64-bit process")
        kernel.ptrace(_GET_SIGNAL_MASK, pid, 8, ctypes.addressof(self._mask))
        kernel.ptrace(_SET_SIGNAL_MASK, pid, 8, ctypes.addressof(ctypes.c_uint64(_ALL_BUT_SIGTRAP)))

    def call(self, number: int, *arguments: int) -> int:
        """Run one system call; returns its result. Raises OSError as the kernel answered."""
        arch = self._architecture
        steered = type(self._saved).from_buffer_copy(self._saved)
        steered[arch.pointer] = self._instruction_address
        if arch.original is not None:
            steered[arch.original] = (1 << 64) - 1
        for position, value in zip(arch.arguments, arguments, strict=False):
            steered[position] = value
        steered[arch.number] = number
        self._set_registers(steered)
        if arch.original is None:
            self._forget_arm_system_call()
        done = self._step_past_instruction()
        result = ctypes.c_int64(done[arch.result]).value
        if -_ERRNO_MAX <= result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def put_back(self) -> None:
        """Restore registers and signal mask as they were found."""
        arch = self._architecture
        saved = self._saved
        if arch.original is not None:
            interrupted = ctypes.c_int64(saved[arch.result]).value == -errno.EINTR
            if interrupted and saved[arch.original] in arch.never_restarted:
                # Only our interruption ended it; if a signal is pending too, the restarted
                # call ends with EINTR for that.
                saved[arch.result] = (1 << 64) - _ERESTARTNOHAND
        self._set_registers(saved)
        kernel.ptrace(_SET_SIGNAL_MASK, self.pid, 8, ctypes.addressof(self._mask))

    def deliver_late_signals(self) -> None:
        """Send again what could not be blocked and came meanwhile (SIGSTOP); after the detach."""
        for number in self._late_signals:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _step_past_instruction(self) -> "ctypes.Array[ctypes.c_uint64]":
        behind = self._instruction_address + len(self._architecture.instruction)
        for _ in range(_STEPS_MAX):
            kernel.ptrace(_SINGLE_STEP, self.pid)
            status = _wait_for_stop(self.pid, None)
            registers = self._registers()
            if registers[self._architecture.pointer] == behind:
                return registers
            event, number = status >> 8, status & 0x7F
            if event == 0:
                # A signal that cannot be blocked arrived before the instruction ran: step again
                # without it, send it again at the end.
                self._late_signals.append(number)
        raise InjectionFailed(self.pid, f"did not run one instruction in {_STEPS_MAX} steps")

    def _registers(self) -> "ctypes.Array[ctypes.c_uint64]":
        words = (ctypes.c_uint64 * self._architecture.word_count)()
        vector = _Vector(ctypes.addressof(words), ctypes.sizeof(words))
        kernel.ptrace(_GET_REGISTER_SET, self.pid, _GENERAL_REGISTERS, ctypes.addressof(vector))
        return words

    def _set_registers(self, words: "ctypes.Array[ctypes.c_uint64]") -> None:
        vector = _Vector(ctypes.addressof(words), ctypes.sizeof(words))
        kernel.ptrace(_SET_REGISTER_SET, self.pid, _GENERAL_REGISTERS, ctypes.addressof(vector))

    def _forget_arm_system_call(self) -> None:
        none = ctypes.c_int32(-1)
        vector = _Vector(ctypes.addressof(none), ctypes.sizeof(none))
        kernel.ptrace(_SET_REGISTER_SET, self.pid, _ARM_SYSTEM_CALL, ctypes.addressof(vector))


def run_in_process(pid: int, job: Callable[[StoppedProcess], Result], timeout_s: float) -> Result:
    """Stop process `pid`, run `job` with it, put it back and let it go; returns job's result.

    Whatever happens the target is detached. Raises InjectionFailed, or what `job` raised.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(_run_stopped(pid, job, time.monotonic() + timeout_s))
        except BaseException as error:  # noqa: BLE001 - handed to the caller below, none is lost
            errors.append(error)

    thread = threading.Thread(target=run, name=f"injection-{pid}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def open_userfaultfd(pid: int, timeout_s: float = 5.0) -> int:
    """Return a userfaultfd that acts on the memory of `pid`; ours is its only descriptor.

    Closing it undoes all that was set up with it, as does the end of our process.
    """
    arch = _architecture(pid)

    def take(target: StoppedProcess) -> int:
        flags = os.O_CLOEXEC | os.O_NONBLOCK | kernel.UFFD_USER_MODE_ONLY
        try:
            inner = target.call(kernel.USERFAULTFD_NUMBERS[platform.machine()], flags)
        except OSError as error:
            raise InjectionFailed(pid, f"userfaultfd: {error.strerror}") from error
        pidfd = -1
        try:
            pidfd = os.pidfd_open(pid)
            return kernel.pidfd_getfd(pidfd, inner)
        except OSError as error:
            raise InjectionFailed(pid, f"cannot take its userfaultfd: {error}") from error
        finally:
            if pidfd >= 0:
                os.close(pidfd)
            target.call(arch.close, inner)

    return run_in_process(pid, take, timeout_s)


def _run_stopped(pid: int, job: Callable[[StoppedProcess], Result], deadline: float) -> Result:
    architecture = _architecture(pid)
    try:
        instruction_address = _find_instruction(pid, architecture)
        _seize(pid)
        _stop(pid, deadline)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT):
            raise InjectionFailed(pid, "it does not exist (any more)") from error
        raise InjectionFailed(pid, f"cannot be stopped: {error}") from error
    try:
        target = StoppedProcess(pid, architecture, instruction_address)
        try:
            return job(target)
        finally:
            with suppress(ProcessLookupError):  # it died; what job raised says so
                target.put_back()
            _detach(pid)
            target.deliver_late_signals()
    except ProcessLookupError as error:
        raise InjectionFailed(pid, "it died while it was stopped") from error
    finally:
        _detach(pid)


def _architecture(pid: int) -> _Architecture:
    found = _ARCHITECTURES.get(platform.machine())
    if found is None:
        raise InjectionFailed(pid, f"system calls of {platform.machine()} are not known here")
    return found


def _find_instruction(pid: int, architecture: _Architecture) -> int:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(start)
                code = memory.read(end - start)
            for match in re.finditer(re.escape(architecture.instruction), code):
                if match.start() % architecture.step == 0:
                    return start + match.start()
    raise InjectionFailed(pid, "no system call instruction in its vdso")


def _seize(pid: int) -> None:
    status = Path(f"/proc/{pid}/status").read_text()
    filtered = "\nSeccomp:\t2" in status
    try:
        kernel.ptrace(_SEIZE, pid, 0, _OPTION_SUSPEND_SECCOMP if filtered else 0)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.EACCES):
            raise
        raise InjectionFailed(pid, _why_not_seized(status, filtered=filtered)) from error


def _why_not_seized(status: str, *, filtered: bool) -> str:
    tracer = re.search(r"^TracerPid:\t(\d+)$", status, re.MULTILINE)
    if tracer and tracer[1] != "0":
        return f"process {tracer[1]} traces it already: end that debugger first"
    if re.search(r"^State:\t[ZX]", status, re.MULTILINE):
        return "it is dead"
    if filtered:
        return (
            "it is confined by seccomp and the filter may not be suspended: give this process "
            "CAP_SYS_PTRACE and CAP_SYS_ADMIN"
        )
    return "not permitted: give this process CAP_SYS_PTRACE (see also kernel.yama.ptrace_scope)"


def _stop(pid: int, deadline: float) -> None:
    """Bring the seized process to a stop that is not the delivery of a signal."""
    kernel.ptrace(_INTERRUPT, pid)
    while True:
        status = _wait_for_stop(pid, deadline)
        if status >> 8 == _EVENT_STOP:
            return
        # A signal was on its way: deliver it as if we were not here; our stop comes next.
        kernel.ptrace(_CONT, pid, 0, status & 0x7F)


def _wait_for_stop(pid: int, deadline: float | None) -> int:
    """Wait until the process stops; returns signal | event << 8. None waits for one short call."""
    pause_s = 0.0
    while True:
        try:
            ended_or_stopped = os.waitid(
                os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
            )
        except ChildProcessError as error:
            raise InjectionFailed(pid, "it is gone") from error
        if ended_or_stopped is not None:
            if ended_or_stopped.si_code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED):
                # Left as it is: the end of this thread passes it on to the real parent.
                raise InjectionFailed(pid, "it died")
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
            return ended_or_stopped.si_status
        if deadline is not None and time.monotonic() > deadline:
            raise InjectionFailed(pid, "did not stop in time; it is busy in the kernel")
        time.sleep(pause_s)
        pause_s = min(pause_s + 0.000_01, 0.001)


def _detach(pid: int) -> None:
    """Let go. Already gone or let go is fine; a running tracee goes when this thread ends."""
    with suppress(OSError):
        kernel.ptrace(_DETACH, pid)
