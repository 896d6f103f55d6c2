"""A short campaign of the real kind, and one whose oracle has something to find."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.chaos import campaign
from tests.chaos.__main__ import run
from tests.chaos.faults import Fault, lose_power, pair_of, primary_of
from tests.chaos.standing import Standing

pytestmark = [pytest.mark.qemu, pytest.mark.netns, pytest.mark.etcd]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    """Let a campaign have one fault to choose from, and one VM."""

    def set_up(fault: Fault) -> None:
        monkeypatch.setattr(campaign, "FAULTS", (fault,))
        monkeypatch.setattr(campaign, "FAULTS_AT_ONCE", (1,))
        monkeypatch.setattr(campaign, "VMS", 1)

    return set_up


def test_a_campaign_of_power_losses_is_survived_and_reported(
    only: Callable[[Fault], None], tmp_path: Path
) -> None:
    only(Fault("power of the primary", 1, partial(lose_power, primary_of)))
    report = run(1, 1.0, tmp_path / "report.txt")
    assert report.violations == []
    assert report.failovers >= 1
    assert report.stalls_alone
    assert report.wire["replies checked"] > 0
    assert report.wire["speaker changes"] == report.failovers
    assert "violations: 0" in (tmp_path / "report.txt").read_text()
    assert not (tmp_path / "report.logs").exists()


def test_a_vm_that_is_lost_without_need_is_a_violation_and_the_logs_are_kept(
    only: Callable[[Fault], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(Fault("power of both", 1, partial(lose_power, pair_of)))
    monkeypatch.setattr(Standing, "may_be_lost", property(lambda _: False))
    report = run(1, 1.0, tmp_path / "report.txt")
    assert report.violations == ["redis001 was lost, and one of its hosts was never hurt"]
    assert report.episodes[0].lost == ["redis001"]
    assert (tmp_path / "report.logs" / "agent-h1.log").exists()
