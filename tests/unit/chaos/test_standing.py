"""What may be lost in a campaign, and what a report makes of it."""

from pathlib import Path

import pytest
from tests.chaos.report import Episode, Report
from tests.chaos.standing import Standing

from holdfast_api.records import Event
from holdfast_api.words import EventKind


def protected() -> Standing:
    standing = Standing()
    standing.look(["h1", "h2"])
    return standing


@pytest.mark.parametrize("host", ["h1", "h2"])
def test_a_protected_vm_lives_on_whatever_happens_to_one_of_its_hosts(host: str) -> None:
    standing = protected()
    standing.act(host, destroys=False)
    standing.act(host, destroys=True)
    assert not standing.may_be_lost


def test_a_vm_may_be_lost_when_one_host_was_destroyed_and_the_other_disturbed() -> None:
    standing = protected()
    standing.act("h2", destroys=False)
    standing.act("h1", destroys=True)
    assert standing.may_be_lost


def test_a_vm_that_was_only_disturbed_lives_on() -> None:
    standing = protected()
    for host in ("h1", "h2", "h3"):
        standing.act(host, destroys=False)
    assert not standing.may_be_lost


def test_other_hosts_count_only_when_the_vm_may_have_moved_there() -> None:
    standing = protected()
    standing.act("h3", destroys=True)
    standing.act("h1", destroys=True)
    assert not standing.may_be_lost
    standing.act("h3", destroys=True)
    assert standing.may_be_lost


def test_a_vm_alone_may_be_lost_with_its_host_and_stays_so_if_it_is_protected_again() -> None:
    standing = protected()
    standing.look(["h1"])
    standing.act("h1", destroys=True)
    standing.look(["h1", "h3"])
    assert standing.may_be_lost


def test_a_failover_after_the_power_was_lost_excuses_nothing() -> None:
    standing = protected()
    standing.act("h1", destroys=True)
    standing.look(["h2"])
    assert not standing.may_be_lost


def event(kind: EventKind, at: float, vm: str = "redis001") -> Event:
    return Event(position=1, at=at, kind=kind, vm=vm, message="")


def test_a_window_without_protection_lasts_from_the_first_loss_to_the_next_protection() -> None:
    report = Report(1)
    report.note_windows(
        [
            event(EventKind.PROTECTED, 5),
            event(EventKind.FAILED_OVER, 10),
            event(EventKind.PROMOTED, 11),
            event(EventKind.PROTECTED, 14),
            event(EventKind.BACKUP_DROPPED, 20),
        ]
    )
    report.note_windows([event(EventKind.PROTECTED, 22), event(EventKind.CLAIM_WON, 30)])
    report.note_windows([event(EventKind.VM_LOST, 40), event(EventKind.PROTECTED, 50)])
    assert report.unprotected == [4, 2]


def test_a_report_says_what_was_violated_and_what_was_done_before(tmp_path: Path) -> None:
    episode = Episode(1, ["pair cut"], ["0.10 cut h1 and h2"], failovers=1, settled_seconds=2)
    report = Report(7, [episode], ["a reply came twice"], operations=3)
    report.note_stall(0.5, alone=True)
    report.write(tmp_path / "new" / "report.txt")
    text = (tmp_path / "new" / "report.txt").read_text()
    for words in ("seed 7", "a reply came twice", "0.10 cut h1 and h2", "p50 0.50 s", "pair cut 1"):
        assert words in text
    assert '"cut h1' not in text
    assert "0.10 cut h1 and h2" in (tmp_path / "new" / "report.json").read_text()
