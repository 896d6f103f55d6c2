"""The command `holdfast` as people type it, against a real lab: one VM's protected life."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast_lab.lab import Lab
from holdfast_lab.vm import VmOptions

pytestmark = [pytest.mark.qemu, pytest.mark.netns, pytest.mark.etcd]

VM = "web"
HOLDFAST = [str(Path(sys.executable).with_name("holdfast"))]
DEADLINE_SECONDS = 90.0
OK, USAGE, REFUSED, NOT_REACHABLE = 0, 2, 3, 4

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts, and a VM on the first."""
    with Lab.up(3, f"cli{os.getpid() % 100000}") as made:
        made.run_vm(VM, "h1", VmOptions(memory_mb=128, graphics=False))
        yield made


def run(lab: Lab, *words: str, code: int = OK) -> Done:
    """Run one command and demand its exit code."""
    done = subprocess.run(
        [*HOLDFAST, *words],
        env={**os.environ, "HOLDFAST_URL": lab.url},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return done


def read(lab: Lab, *words: str) -> Any:
    return json.loads(run(lab, *words, "-o", "json").stdout)


def wait_for(what: str, probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not probe():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_a_vm_is_protected_moved_and_let_go_from_the_command_line(lab: Lab, tmp_path: Path) -> None:
    said = tmp_path / "events"
    with (
        said.open("w") as file,
        subprocess.Popen(
            [*HOLDFAST, "events", "--follow", "--url", lab.url], stdout=file
        ) as follow,
    ):
        try:
            names_that_nobody_knows_are_refused(lab)
            policies_are_stored_and_removed(lab, tmp_path)
            hosts_are_changed(lab)
            a_vm_lives_under_protection(lab)
            wait_for("its release is followed", lambda: "ProtectionReleased" in said.read_text())
        finally:
            follow.terminate()
    kinds = [line.split()[3] for line in said.read_text().splitlines()]
    life = [kind for kind in kinds if kind in {"Protected", "Promoted", "ProtectionReleased"}]
    assert life[:2] == ["Protected", "Promoted"]
    assert life[-1] == "ProtectionReleased"


def names_that_nobody_knows_are_refused(lab: Lab) -> None:
    for command in ("protect", "preflight", "status", "unprotect", "switchover"):
        refused = run(lab, command, "nobody", code=REFUSED)
        assert refused.stdout == ""
        assert refused.stderr.startswith("holdfast: unknown-vm: ")
        assert "holdfast vms" in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert "unknown-host" in run(lab, "host", "set", "h9", "--maintenance", code=REFUSED).stderr
    assert "unknown-policy" in run(lab, "policies", "show", "nope", code=REFUSED).stderr
    assert "unknown-policy" in run(lab, "protect", VM, "--policy", "nope", code=REFUSED).stderr
    assert "not-protected" in run(lab, "status", VM, code=REFUSED).stderr
    unreachable = run(lab, "vms", "--url", "http://127.0.0.1:1", code=NOT_REACHABLE)
    assert "HOLDFAST_URL" in unreachable.stderr


def policies_are_stored_and_removed(lab: Lab, folder: Path) -> None:
    good, bad = folder / "good.yaml", folder / "bad.yaml"
    good.write_text("interval_ms: 30\n")
    bad.write_text("interval: 30\n")
    run(lab, "policies", "set", "quick", "-f", str(good))
    assert read(lab, "policies", "show", "quick")["policy"]["interval_ms"] == 30
    assert "interval: " in run(lab, "policies", "set", "quick", "-f", str(bad), code=USAGE).stderr
    assert {stored["name"] for stored in read(lab, "policies", "list")["policies"]} >= {"quick"}
    run(lab, "policies", "delete", "quick")
    run(lab, "policies", "show", "quick", code=REFUSED)


def hosts_are_changed(lab: Lab) -> None:
    assert "maintenance" in run(lab, "host", "set", "h2", "--maintenance").stdout
    marked = {host["host"]: host["settings"]["maintenance"] for host in read(lab, "hosts")["hosts"]}
    assert marked == {"h1": False, "h2": True, "h3": False}


def a_vm_lives_under_protection(lab: Lab) -> None:
    """Host h2 is in maintenance, so h3 must be chosen."""
    wait_for("the VM is seen", lambda: run(lab, "vms").stdout.count(f"\n{VM} ") == 1)
    assert "can be protected" in run(lab, "preflight", VM).stdout
    protected = run(lab, "protect", VM, "--wait")
    assert "seeding" in protected.stderr
    assert protected.stdout.splitlines()[1].split() == ["phase", "protected"]
    assert read(lab, "status", VM)["backup"] == "h3"
    assert run(lab, "status").stdout.splitlines()[1].split()[:4] == [VM, "protected", "h1", "h3"]
    assert "phase: protected\n" in run(lab, "status", VM, "-o", "yaml").stdout
    assert "every 40 ms" in run(lab, "change", VM, "--interval-ms", "40").stdout
    run(lab, "change", VM, code=USAGE)
    assert "h3 is" in run(lab, "switchover", VM, "--to", "h2", code=REFUSED).stderr
    moved = run(lab, "switchover", VM, "--wait")
    assert "runs on h3 now" in moved.stderr
    with lab.redis(VM) as redis:
        assert redis.command("INCR", "count") == 1
    assert "not protected any more" in run(lab, "unprotect", VM, "--wait").stdout
    assert "not-protected" in run(lab, "unprotect", VM, code=REFUSED).stderr
    assert "no VM is protected" in run(lab, "status").stderr
    (seen,) = read(lab, "vms")["vms"]
    assert seen["host"] == "h3"
