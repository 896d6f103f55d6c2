"""A process whose memory the tests track: RAM blocks like QEMU's, driven by lines over a pipe.

Run as a script it is the target; imported it gives `Target`, which starts and drives one.
Also used by `bench/memory.py`.
"""

import ctypes
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

PAGE = 4096
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Block:
    """A block to make, shared (a memfd), private or private_file; `huge` asks for huge pages."""

    name: str
    page_count: int
    kind: str
    huge: bool = False


class Target:
    """The running target, seen from the test. Use as a context manager."""

    def __init__(self, blocks: Sequence[Block], extra: Sequence[str] = ()) -> None:
        arguments = json.dumps([vars(block) for block in blocks])
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, arguments, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid = self.process.pid
        self.blocks: list[dict[str, Any]] = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, **command: Any) -> None:
        """Send a command and do not wait for its end."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def finish(self) -> Any:
        """Wait for the answer of the last command."""
        return self._answer()

    def run(self, **command: Any) -> Any:
        self.begin(**command)
        return self._answer()

    def dump(self, name: str) -> bytes:
        """Return the content of a block, as the target itself sees it."""
        size_bytes = self.run(do="dump", block=name)
        assert self.process.stdout is not None
        return self.process.stdout.read(size_bytes)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        if not ready and not self.process.stdout.peek(0):  # type: ignore[attr-defined]
            raise TimeoutError("the target does not answer")
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the target ended: {self.process.wait(PATIENCE_S)}")
        return json.loads(line)


class _Served:
    """The target's own side."""

    def __init__(self, blocks: list[dict[str, Any]]) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: dict[str, mmap.mmap] = {}
        self.files: dict[str, int] = {}
        self.described = []
        self.caught: list[int] = []
        for block in blocks:
            self.described.append(self._make(block))

    def _make(self, block: dict[str, Any]) -> dict[str, Any]:
        name, size = block["name"], block["page_count"] * PAGE
        shared = block["kind"] == "shared"
        if shared:
            self.files[name] = os.memfd_create(name)
            os.ftruncate(self.files[name], size + PAGE)
            # From the second page on, so that the offset within the file counts.
            memory = mmap.mmap(self.files[name], size, offset=PAGE)
        elif block["kind"] == "private_file":
            # Data in every 16th page of a file that nobody has read through the mapping yet.
            file = os.memfd_create(name)
            os.ftruncate(file, size)
            for start in range(0, size, 16 * PAGE):
                os.pwrite(file, b"file", start)
            memory = mmap.mmap(file, size, flags=mmap.MAP_PRIVATE)
        else:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if not shared:
            memory.madvise(mmap.MADV_HUGEPAGE if block["huge"] else mmap.MADV_NOHUGEPAGE)
        self.maps[name] = memory
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return {
            "name": name,
            "size_bytes": size,
            "host_address": address,
            "shared": shared,
            "map_path": _map_path(address) if shared else None,
            "file_offset": PAGE if shared else 0,
        }

    def write(self, block: str, pages: list[int], value: int) -> int:
        for page in pages:
            self.maps[block][page * PAGE + page % PAGE] = value
        return len(pages)

    def fill(self, block: str) -> int:
        memory = self.maps[block]
        noise = os.urandom(1 << 20)
        for start in range(0, len(memory), len(noise)):
            part = noise[: len(memory) - start]
            memory[start : start + len(part)] = part
        return len(memory)

    def storm(self, block: str, seed: int) -> int:
        """Write here and there until the next command comes; returns how often."""
        chance, memory, count = random.Random(seed), self.maps[block], 0
        while not select.select([0], [], [], 0)[0]:
            for _ in range(200):
                count += 1
                memory[chance.randrange(len(memory))] = count & 0xFF
        return count

    def read(self, block: str, pages: list[int]) -> int:
        return sum(self.maps[block][page * PAGE] for page in pages)

    def drop(self, block: str, first: int, count: int) -> int:
        """Give memory back as QEMU does: punch the file, then madvise."""
        if block in self.files:
            punch_and_keep_size = 3
            result = self.libc.fallocate(
                self.files[block],
                punch_and_keep_size,
                ctypes.c_long((first + 1) * PAGE),
                ctypes.c_long(count * PAGE),
            )
            assert result == 0, os.strerror(ctypes.get_errno())
        self.maps[block].madvise(mmap.MADV_DONTNEED, first * PAGE, count * PAGE)
        return count

    def dump(self, block: str) -> int:
        return len(self.maps[block])

    def advise(self, block: str, advice: int) -> int:
        self.maps[block].madvise(advice)
        return advice

    def map_anew(self, block: str, *, shared: bool) -> int:
        """Put fresh memory in the place of a block, as QEMU does for a page that went bad."""
        memory = self.maps[block]
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.libc.mmap.restype = ctypes.c_long
        fixed, anonymous = 0x10, mmap.MAP_ANONYMOUS
        flags = fixed | anonymous | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = self.libc.mmap(
            ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), protection, flags, -1, 0
        )
        return int(mapped == address)

    def unmap(self, block: str) -> int:
        memory = self.maps[block]
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return int(self.libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(len(memory))))

    def wait(self, call: str, ms: int) -> list[int]:
        """Wait in one system call, without Python's retry; returns (result, errno)."""
        libc, none = self.libc, ctypes.c_void_p(None)
        stamp = (ctypes.c_long * 2)(ms // 1000, ms % 1000 * 1_000_000)
        mask = (ctypes.c_uint64 * 16)(1 << (signal.SIGUSR2 - 1))
        _say(None)  # the test knows that we are about to wait
        ctypes.set_errno(0)
        if call == "poll":
            result = libc.poll(none, 0, ms)
        elif call == "ppoll":
            result = libc.ppoll(none, 0, stamp, mask)
        elif call == "nanosleep":
            result = libc.nanosleep(stamp, none)
        elif call == "epoll_wait":
            epoll = select.epoll()
            events = (ctypes.c_uint64 * 4)()
            result = libc.epoll_wait(epoll.fileno(), events, 1, ms)
        elif call == "sigtimedwait":
            result = libc.sigtimedwait(mask, none, stamp)
        elif call == "read":
            result = libc.read(0, (ctypes.c_char * 1)(), 1)
        else:
            raise ValueError(call)
        return [result, ctypes.get_errno()]

    def catch(self, number: int) -> int:
        signal.signal(number, lambda *_: self.caught.append(number))
        return number

    def signals(self) -> list[int]:
        return self.caught

    def refuse_userfaultfd(self) -> int:
        """Install a seccomp filter that kills the process for calling userfaultfd (x86-64)."""
        no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
        assert self.libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
        kill, allow, userfaultfd = 0x80000000, 0x7FFF0000, 323
        program = b"".join(
            code.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little")
            for code, yes, no, value in (
                (0x20, 0, 0, 0),  # load the number
                (0x15, 0, 1, userfaultfd),
                (0x06, 0, 0, kill),
                (0x06, 0, 0, allow),
            )
        )
        held = ctypes.create_string_buffer(program)
        header = (ctypes.c_uint64 * 2)(4, ctypes.addressof(held))
        return int(self.libc.prctl(set_seccomp, filter_mode, header, 0, 0))


def _map_path(address: int) -> str:
    with open("/proc/self/maps", encoding="ascii") as maps:  # noqa: PTH123 - no pathlib: it starts slowly
        for line in maps:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= address < end:
                return f"/proc/{os.getpid()}/map_files/{start:x}-{end:x}"
    raise LookupError(hex(address))


def _say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _serve() -> None:
    served = _Served(json.loads(sys.argv[1]))
    _say(served.described)
    buffer = b""
    while True:
        while b"\n" not in buffer:
            data = os.read(0, 1 << 16)
            if not data:
                return
            buffer += data
        line, _, buffer = buffer.partition(b"\n")
        command = json.loads(line)
        do = command.pop("do")
        _say(getattr(served, do)(**command))
        if do == "dump":
            sys.stdout.buffer.write(served.maps[command["block"]])
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
