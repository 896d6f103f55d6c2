"""Too much held output: pressed for in time, and never dropped in silence."""

from tests.property.network.course import TAPS, Course

from holdfast_agent.checkpoint.held_watch import EVENT_DISTANCE_NS, HeldWatch
from holdfast_agent.checkpoint.wants import Wants
from holdfast_agent.checkpoint.worker_messages import Happened, ToAgent, ToWorker
from holdfast_agent.network.held_output import HeldOutput
from holdfast_api.words import EventKind


class Ear:
    """Port `AgentPort`: keeps what it is told."""

    is_drained = True

    def __init__(self) -> None:
        self.told: list[ToAgent] = []

    def filenos(self) -> list[int]:
        return []

    def send(self, message: ToAgent) -> None:
        self.told.append(message)

    def flush(self) -> None:
        """There is nothing to wait for."""

    def receive(self) -> list[tuple[ToWorker, int | None]]:
        return []


def watched(limit_bytes: int) -> tuple[Course, HeldWatch, Ear]:
    course, ear = Course(), Ear()
    course.plug.change_limit(limit_bytes)
    course.hold()
    wants = Wants(ear, vm="vm", host="h1", generation=3, new_claim_name=lambda: "claim")
    return course, HeldWatch(course.plug, ear, wants, limit_bytes), ear


def send(course: Course, counts: tuple[int, int]) -> None:
    course.send(counts)
    course.kernel.now += 1.0
    course.plug.drain()


def test_from_half_of_the_limit_on_it_presses_until_that_is_released() -> None:
    course, watch, _ = watched(1000)
    send(course, (2, 2))
    assert not watch.is_pressed()
    send(course, (1, 0))
    assert watch.is_pressed()
    course.capture()
    course.acknowledge()
    course.settle()
    course.kernel.now += 1.0
    assert not watch.is_pressed()


def test_drops_are_told_with_their_number_and_not_too_often() -> None:
    course, watch, ear = watched(500)
    assert watch.tell(0) == 0
    send(course, (7, 6))
    assert watch.tell(1) == 3
    send(course, (1, 0))
    assert watch.tell(2) == 4
    (told,) = ear.told
    assert isinstance(told, Happened)
    assert told.event.kind is EventKind.OUTPUT_DROPPED
    assert told.event.evidence == {"dropped_packets": 3, "held_limit_bytes": 500}
    assert (told.event.generation, "held_limit_bytes" in told.event.message) == (3, True)
    assert watch.tell(1 + EVENT_DISTANCE_NS) == 4
    assert watch.tell(2 + 3 * EVENT_DISTANCE_NS) == 4
    assert [m.event.evidence["dropped_packets"] for m in ear.told if m.type == "happened"] == [3, 1]


def test_a_changed_policy_changes_what_fits() -> None:
    course, watch, _ = watched(500)
    watch.change_limit(2000)
    send(course, (9, 0))
    assert watch.tell(1) == 0
    assert {queue.limit_bytes for _, queue in course.kernel.queues.values()} == {2000}


def test_drops_are_counted_through_a_change_of_queues() -> None:
    course, watch, _ = watched(500)
    send(course, (7, 0))
    course.capture(saves=False)
    course.capture()
    send(course, (6, 0))
    assert watch.tell(1) == 3
    assert TAPS[0] in course.kernel.aimed


def test_the_filters_limit_follows_the_policy_as_well() -> None:
    held = HeldOutput(limit_bytes=8)
    frame = b"\0\0\0\4data"
    held.feed(frame)
    held.change_limit(16)
    held.feed(frame)
    held.feed(frame)
    assert (held.held_bytes, held.dropped_packets) == (16, 1)
