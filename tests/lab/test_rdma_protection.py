"""A whole protection over soft-RoCE between two booted hosts, and a pulled link."""

import re
import sys
from pathlib import Path

import pytest
from tests.lab.booted.machine import BootedHost, Machine, booted_hosts

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine(kernel="6.12", memory_mb=2048)
PLAIN_HOST = (sys.executable, "-u", "-m", "tests.lab.inside.plain_host")
SECONDS_MAX = 700.0


def logs_of(host: BootedHost) -> str:
    """What its services said, for a failed assertion."""
    command = "tail -n 40 /run/plain/*.log /run/plain/state/*.log /run/plain/run/*.log"
    return host.run(["sh", "-c", f"{command} 2>/dev/null; true"], seconds_max=60).text


@pytest.mark.booted
@pytest.mark.lab_all
@pytest.mark.timeout(1200)
def test_a_guest_protected_over_rdma_survives_a_pulled_link() -> None:
    with booted_hosts(2, MACHINE) as (first, second):
        agent = first.start([*PLAIN_HOST, "first"], folder=ROOT, seconds_max=SECONDS_MAX)
        control = second.start(
            [*PLAIN_HOST, "second"],
            folder=ROOT,
            seconds_max=SECONDS_MAX,
            environment={"TRANSPORT": "rdma"},
        )
        try:
            control.wait_for("protected", SECONDS_MAX)
            mark = first.run([*PLAIN_HOST, "say", "SET", "mark", "4711"], folder=ROOT)
            assert "OK" in mark.checked()
            first.set_link(up=False)
            control.wait_for("survived", SECONDS_MAX)
        except AssertionError as error:
            raise AssertionError(
                f"{error}\n{agent.text}\n{control.text}\n{logs_of(first)}\n{logs_of(second)}"
            ) from error
        text = control.wait().checked()
    assert re.search(r"^protected rdma ", text, re.MULTILINE)
    assert "survived ['$4', '4711'] 1" in text
    assert "TransportFellBack" not in text
