"""What the collector of cycles looks at, and what is set aside from it."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from holdfast_controller import collecting
from holdfast_controller.collecting import AGAIN_SECONDS, LOOSE_MAX, Collecting


@pytest.fixture(autouse=True)
def own_collector() -> Iterator[None]:
    """Begin with all that lives set aside, and leave the collector as it was."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


class Part:
    """May be part of a cycle."""

    other: "Part | None" = None


def cycle() -> "weakref.ref[Part]":
    part = Part()
    part.other = part
    return weakref.ref(part)


def test_what_survives_is_set_aside_and_what_does_not_is_freed() -> None:
    tidy = Collecting()
    kept = [[number] for number in range(LOOSE_MAX)]
    lost = cycle()
    before = gc.get_freeze_count()
    tidy.look()
    assert lost() is None
    assert gc.get_freeze_count() >= before + len(kept)
    assert len(gc.get_objects()) < LOOSE_MAX


def test_little_is_left_to_gather() -> None:
    lost, before = cycle(), gc.get_freeze_count()
    Collecting().look()
    assert lost() is not None
    assert gc.get_freeze_count() <= before


def test_a_cycle_that_was_set_aside_is_freed_when_twice_as_much_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(collecting, "AGAIN_MIN", 0)
    tidy = Collecting(lambda: now)
    part = Part()
    lost = weakref.ref(part)
    kept = [[number] for number in range(LOOSE_MAX)]
    tidy.look()
    part.other = part
    del part
    assert lost() is not None
    more = [[number] for number in range(LOOSE_MAX)]
    tidy.look()
    assert lost() is not None, "all is looked at again only after a while"
    now += AGAIN_SECONDS
    most = [[number] for number in range(LOOSE_MAX)]
    tidy.look()
    assert lost() is None
    assert len(kept) == len(more) == len(most)
    # Not again before there is twice as much.
    part = Part()
    lost = weakref.ref(part)
    gc.freeze()
    part.other = part
    del part
    now += AGAIN_SECONDS
    others = [[number] for number in range(LOOSE_MAX)]
    tidy.look()
    assert lost() is not None
    assert others
