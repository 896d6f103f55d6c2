"""The ledger on a real disk: what was ordered and held survives, and what is broken is said."""

import json
from pathlib import Path

import pytest

from holdfast_agent.host.ledger import Ledger, LedgerBroken
from holdfast_api.words import Role


def test_what_was_written_is_read_by_the_next_agent(tmp_path: Path) -> None:
    Ledger(tmp_path).update("vm", generation=3, content="primary:b", role=Role.PRIMARY, qemu_pid=7)
    entry = Ledger(tmp_path).entry("vm")
    assert (entry.generation, entry.content, entry.role, entry.qemu_pid) == (
        3,
        "primary:b",
        Role.PRIMARY,
        7,
    )


def test_a_generation_never_goes_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.update("vm", generation=3)
    with pytest.raises(AssertionError):
        ledger.update("vm", generation=2)
    assert Ledger(tmp_path).entry("vm").generation == 3


def test_forgetting_keeps_the_generation_and_the_worker_that_was_started(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.update("vm", generation=4, worker_generation=4, role=Role.BACKUP, qemu_pid=5)
    ledger.forget("vm")
    entry = Ledger(tmp_path).entry("vm")
    assert (entry.generation, entry.worker_generation) == (4, 4)
    assert (entry.role, entry.qemu_pid, entry.is_plugged) == (Role.NONE, 0, False)


def test_an_unknown_vm_has_an_empty_entry_and_no_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.entry("vm").role is Role.NONE
    assert ledger.entries() == []
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.update("vm", generation=1)
    before = (tmp_path / "vm.json").stat().st_ino
    ledger.update("vm", generation=1)
    assert (tmp_path / "vm.json").stat().st_ino == before
    ledger.update("vm", generation=2)
    assert (tmp_path / "vm.json").stat().st_ino != before


def test_a_crash_in_the_middle_of_writing_leaves_the_entry_of_before(tmp_path: Path) -> None:
    Ledger(tmp_path).update("vm", generation=2)
    (tmp_path / "vm.new").write_text('{"vm": "vm", "gener')
    ledger = Ledger(tmp_path)
    assert ledger.entry("vm").generation == 2
    ledger.update("vm", generation=3)
    assert Ledger(tmp_path).entry("vm").generation == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"vm": "vm", "generation": -1}', '{"vm": "vm", "colour": "red"}', "\x00" * 64],
)
def test_a_file_that_can_not_be_read_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "vm.json").write_text(text)
    with pytest.raises(LedgerBroken, match=r"vm\.json.*move it away"):
        Ledger(tmp_path)


def test_a_file_under_another_name_than_its_vm_does_not_replace_that_vm(tmp_path: Path) -> None:
    Ledger(tmp_path).update("vm", generation=5)
    (tmp_path / "zz.json").write_text(json.dumps({"vm": "vm", "generation": 1}))
    with pytest.raises(LedgerBroken):
        Ledger(tmp_path)
