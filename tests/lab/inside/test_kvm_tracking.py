"""Trackers on the memory of a guest under real KVM: its writes come through second-level mappings.

The guest is that of `bench/kvm_faults.py`, smaller: it reads pages and writes some of them, without
end, so what an epoch wrote is known exactly.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.kvm_faults import COUNTER_PAGE, FIRST_PAGE, PF_FIXED, Guest, trackers

READS, WRITES = 1000, 25
OTHERS_MAX = 4
WRITTEN = [COUNTER_PAGE, *range(FIRST_PAGE, FIRST_PAGE + READS, READS // WRITES)]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    guest = Guest(Path(tmp_path_factory.mktemp("guest")), reads=READS, writes=WRITES)
    guest.qmp.execute("stop")
    yield guest
    guest.end()


def faults_of_epochs(guest: Guest, name: str, count: int) -> list[int]:
    """Harvest some epochs, each exactly what the guest wrote; return KVM's faults in each."""
    tracker, faults = trackers(guest)[name], []
    ram = next(block for block in guest.memory_map.blocks if block.name == "pc.ram")
    tracker.start()
    try:
        for epoch in range(count):
            before = int(PF_FIXED.read_text())
            guest.run_an_epoch()
            faults.append(int(PF_FIXED.read_text()) - before)
            found = (tracker.harvest() - ram.first_page).tolist()
            # Low memory is also the firmware's: KVM's part of it is written at every stop.
            others = [page for page in found if page < FIRST_PAGE and page != COUNTER_PAGE]
            if epoch == 0:  # huge pages are split in this one
                assert set(WRITTEN) <= set(found)
            else:
                assert sorted(set(found) - set(others)) == WRITTEN
                assert len(others) <= OTHERS_MAX
    finally:
        tracker.close()
    return faults[1:]


def test_every_tracker_sees_exactly_what_a_kvm_guest_wrote(guest: Guest) -> None:
    names = list(trackers(guest))
    assert "soft-dirty" in names
    for name in names:
        assert min(faults_of_epochs(guest, name, 4)) >= WRITES


def test_a_harvest_in_two_steps_spares_the_guest_the_faults_of_reading(guest: Guest) -> None:
    if "two-step" in trackers(guest):
        assert max(faults_of_epochs(guest, "two-step", 5)[1:]) < READS // 4
        assert min(faults_of_epochs(guest, "one-step", 4)) > READS // 2
    else:
        assert min(faults_of_epochs(guest, "soft-dirty", 4)) > READS // 2
