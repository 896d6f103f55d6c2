"""Injection and tracking on a real QEMU that waits in its main loop."""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, MemoryMap, empty_rows
from holdfast_agent.memory import BlockLocation, GuestMemory, PagemapScanTracker

RAM_BYTES = 64 << 20


class Qemu:
    def __init__(self, folder: Path, memory: list[str]) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-m", "64", "-nodefaults", "-nographic"),
                *("-S", "-chardev", f"socket,id=qmp,fd={theirs.fileno()}"),
                *("-mon", "chardev=qmp,mode=control", *memory),
            ],
            pass_fds=[theirs.fileno()],
            cwd=folder,
        )
        theirs.close()
        ours.settimeout(30)
        self.socket = ours
        self.lines = ours.makefile("r")
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = json.loads(self.lines.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def monitor(self, line: str) -> str:
        return str(self("human-monitor-command", **{"command-line": line}))

    def ram(self) -> BlockLocation:
        found = re.search(r"is (0x[0-9a-f]+)", self.monitor("gpa2hva 0"))
        assert found is not None
        address = int(found[1], 16)
        for line in Path(f"/proc/{self.process.pid}/maps").read_text().splitlines():
            fields = line.split()
            start, end = (int(part, 16) for part in fields[0].split("-"))
            if start <= address < end:
                shared = fields[1].endswith("s")
                path = f"/proc/{self.process.pid}/map_files/{fields[0]}" if shared else None
                offset = int(fields[2], 16) + address - start if shared else 0
                return BlockLocation("ram", RAM_BYTES, address, shared, path, offset)
        raise LookupError(hex(address))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.lines.close()
        self.socket.close()


@pytest.fixture(params=["shared", "private"])
def qemu(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Qemu]:
    memory = ["-machine", "q35"]
    if request.param == "shared":
        backend = "memory-backend-memfd,id=ram0,size=64M,share=on"
        memory = ["-machine", "q35,memory-backend=ram0", "-object", backend]
    started = Qemu(tmp_path, memory)
    yield started
    started.end()


@pytest.mark.qemu
def test_the_writes_of_a_real_qemu_are_tracked_and_copied(qemu: Qemu) -> None:
    pid, location = qemu.process.pid, qemu.ram()
    memory_map = MemoryMap.of_sizes([("ram", RAM_BYTES)])
    memory = GuestMemory(pid, [location], memory_map)
    tracker = PagemapScanTracker(pid, [location], memory_map)
    files = sorted(Path(f"/proc/{pid}/fd").iterdir())
    tracker.start()
    assert sorted(Path(f"/proc/{pid}/fd").iterdir()) == files
    # The firmware writes its tables and data; that is all this guest does.
    rebuilt = np.zeros((memory_map.page_count, PAGE_SIZE_BYTES), dtype=np.uint8)
    rows = empty_rows(memory_map.page_count)
    harvested = 0
    populated = memory.populated()
    memory.copy_out(populated, rows)
    rebuilt[populated] = rows[: len(populated)]
    try:
        for _ in range(20):
            qemu("cont")
            qemu.monitor("info registers")
            qemu("stop")
            indexes = tracker.harvest()
            memory.copy_out(indexes, rows)
            rebuilt[indexes] = rows[: len(indexes)]
            harvested += len(indexes)
        assert harvested > 0, "the firmware wrote nothing: nothing was tried"
        qemu("pmemsave", val=0, size=RAM_BYTES, filename="memory")
        saved = np.fromfile(f"/proc/{pid}/cwd/memory", dtype=np.uint8)
        saved = saved.reshape(-1, PAGE_SIZE_BYTES)
        # Below 1 MiB the guest sees firmware and video memory in place of RAM.
        first_page = (1 << 20) // PAGE_SIZE_BYTES
        assert np.array_equal(rebuilt[first_page:], saved[first_page:])
        assert qemu("query-status")["status"] == "paused"
    finally:
        tracker.close()
        memory.close()
    qemu("cont")
    assert qemu("query-status")["status"] == "running"
