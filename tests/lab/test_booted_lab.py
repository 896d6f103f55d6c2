"""The booted lab itself: what runs inside comes back, and nothing else does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.lab.booted import machine
from tests.lab.booted.channel import CUT, NEVER_REPORTED
from tests.lab.booted.machine import BootedHost, Machine, NotBootedError, booted_host, booted_hosts

from holdfast_lab.paths import find_tool

ROOT = Path(__file__).resolve().parents[2]
SMALL = Machine(memory_mb=768)
# Two boots of at most two minutes each, tried twice.
pytestmark = [pytest.mark.booted, pytest.mark.timeout(900)]


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def host(shared: Path) -> Iterator[BootedHost]:
    with booted_host(SMALL, shared=shared) as booted:
        yield booted


@pytest.fixture(scope="module")
def pair() -> Iterator[list[BootedHost]]:
    with booted_hosts(2, SMALL) as hosts:
        yield hosts


# --- one host ---


def test_output_and_exit_status_come_back(host: BootedHost) -> None:
    ended = host.run(["sh", "-c", "echo out; echo error >&2; exit 7"])
    assert (ended.status, ended.text) == (7, "out\nerror\n")


def test_another_kernel_runs_the_project(host: BootedHost) -> None:
    assert host.run(["uname", "-r"]).checked().startswith("6.1.")
    words = "import holdfast_api.words as words; print(words.__file__)"
    here = str(ROOT / "api/holdfast_api/words.py")
    assert host.run([sys.executable, "-c", words]).checked().strip() == here


def test_much_output_comes_back_whole(host: BootedHost) -> None:
    ended = host.run(["sh", "-c", "head -c 3000000 /dev/zero; echo end"])
    assert ended.output == bytes(3000000) + b"end\n"


def test_a_command_that_never_ends_is_cut_at_its_deadline(host: BootedHost) -> None:
    ended = host.run(["sh", "-c", "echo begun; sleep 1000 & wait"], seconds_max=2.0)
    assert (ended.status, ended.text) == (CUT, "begun\n")
    assert host.run(["sh", "-c", "ps ax | grep -c '[s]leep 1000'"]).text == "0\n"


def test_a_command_that_a_signal_killed_says_so(host: BootedHost) -> None:
    assert host.run(["sh", "-c", "kill -9 $$"]).status == 128 + signal.SIGKILL


def test_a_command_that_does_not_exist_says_so(host: BootedHost) -> None:
    ended = host.run(["no-such-command"])
    assert ended.status == 127
    assert "no-such-command" in ended.text


def test_commands_run_side_by_side_and_are_seen_to_progress(host: BootedHost) -> None:
    waiting = host.start(["sh", "-c", "echo ready; until test -e /tmp/go; do sleep 0.1; done"])
    waiting.wait_for("ready")
    assert waiting.status is None
    host.run(["touch", "/tmp/go"]).checked()
    assert waiting.wait().status == 0


def test_a_marker_that_never_comes_is_an_error(host: BootedHost) -> None:
    command = host.start(["echo", "something"])
    with pytest.raises(AssertionError, match="ended with 0:\nsomething"):
        command.wait_for("something else")


def test_what_goes_on_in_the_background_does_not_hold_the_answer_up(host: BootedHost) -> None:
    ended = host.run(["sh", "-c", "yes > /dev/null & sleep 1000 & echo $!"])
    assert ended.status == 0
    assert host.run(["kill", ended.text.strip()]).status == 0


def test_the_machines_files_are_not_changed_by_what_runs_inside(host: BootedHost) -> None:
    path = ROOT / f"a-file-of-{os.getpid()}"
    program = Path(sys.executable).resolve()
    before = program.stat()
    host.run(["sh", "-c", f"echo x > {path} && cat {path}"]).checked()
    host.run(["rm", program]).checked()
    assert not path.exists()
    assert program.stat() == before
    below = host.run(["sh", "-c", "mount | grep '^root'"]).checked()
    assert "ro," in below or "overlay" in below


def test_what_is_written_to_the_shared_folder_comes_back(host: BootedHost, shared: Path) -> None:
    (shared / "in").write_text("from outside")
    host.run(["sh", "-c", f"cat {shared}/in > {shared}/out; sync"]).checked()
    assert (shared / "out").read_text() == "from outside"


# --- several ---


def ping(host: BootedHost, address: str) -> bool:
    return host.run([find_tool("busybox"), "ping", "-c", "1", "-W", "2", address]).status == 0


# In this order: the second host of the pair does not live through the last one.


def test_two_hosts_meet_until_a_link_is_pulled(pair: list[BootedHost]) -> None:
    first, second = pair
    assert ping(first, second.address)
    assert ping(second, first.address)
    carrier = ["cat", "/sys/class/net/eth0/carrier"]
    second.set_link(up=False)
    assert eventually(lambda: second.run(carrier).text == "0\n")
    assert first.run(carrier).text == "1\n"
    assert not ping(first, second.address)
    second.set_link(up=True)
    assert eventually(lambda: ping(first, second.address))


def test_a_host_that_is_killed_takes_its_commands_with_it(pair: list[BootedHost]) -> None:
    first, second = pair
    running = second.start(["sh", "-c", "echo ready; sleep 1000"])
    running.wait_for("ready")
    second.kill()
    assert running.wait().status == NEVER_REPORTED
    assert second.run(["true"]).status == NEVER_REPORTED
    assert not second.is_alive
    assert not ping(first, second.address)
    first.run(["true"]).checked()


@pytest.mark.lab_all
def test_three_hosts_meet_by_a_switch() -> None:
    with booted_hosts(3, SMALL) as hosts:
        for host in hosts:
            assert all(ping(host, other.address) for other in hosts if other is not host)


# --- what is left ---


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def emulators() -> set[int]:
    """Return the ids of our children."""
    return {
        int(word)
        for task in Path("/proc/self/task").iterdir()
        for word in (task / "children").read_text().split()
    }


def files_open_for_writing(pid: int) -> list[str]:
    """Return what a process might leave behind: files with a name, not devices, not in memory."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        flags = int((path.parent.parent / "fdinfo" / path.name).read_text().split()[3], 8)
        target = str(path.readlink())
        if flags & os.O_ACCMODE and target.startswith("/") and not target.startswith("/dev/"):
            found.append(target)
    return [name for name in found if not name.startswith("/memfd:")]


def test_nothing_is_left_of_a_host_that_ended() -> None:
    before = (descriptors(), emulators())
    with booted_host(SMALL):
        (emulator,) = emulators() - before[1]
        assert files_open_for_writing(emulator) == []
    assert (descriptors(), emulators()) == before


def test_a_host_that_never_reports_is_booted_twice_and_then_an_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "BOOT_SECONDS_MAX", 2.0)
    before = (descriptors(), emulators())
    too_small = Machine(memory_mb=64)  # the kernel finds no room for its first root
    with pytest.raises(NotBootedError, match="host 1 never reported"), booted_host(too_small):
        pytest.fail("it booted")
    assert capfd.readouterr().err.count("booting a second time") == 1
    assert (descriptors(), emulators()) == before


def has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return True
    return state == "Z"  # whoever inherited it has not looked yet


LEFT_ALONE = """
import sys
from tests.lab.booted.machine import Machine, booted_host

with booted_host(Machine(memory_mb=768)) as host:
    sys.stdout.write(f"{host._process.pid}\\n")
    sys.stdout.flush()
    host.run(["sleep", "1000"], seconds_max=1000)
"""


def test_a_host_dies_with_whoever_booted_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as booting:
        assert booting.stdout is not None
        emulator = int(booting.stdout.readline())
        assert not has_ended(emulator)
        booting.kill()
    assert eventually(lambda: has_ended(emulator))
