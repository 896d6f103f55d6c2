"""Coverage-guided fuzzing of what parses foreign bytes: `coverage_guided.py TARGET [OPTION ...]`.

A run in passing takes `-runs=N`; a long one `-max_total_time=SECONDS` and a folder of its own for
what it finds worth keeping. A target lets nothing out but what is documented; whatever else is
raised ends the program with the input that did it. Atheris instruments the modules at import.

Source: atheris 3.0, libFuzzer's options.
"""

import contextlib
import sys

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["holdfast_agent", "holdfast_api"]):
    from holdfast_agent.core.frames import (
        DEFAULT_LIMITS,
        HEADER_SIZE_BYTES,
        FrameChecker,
        FrameHeader,
        FrameKind,
        FrameRejected,
    )
    from holdfast_agent.core.memory_map import PAGE_SIZE_BYTES, PageIndexes, PageRows
    from holdfast_agent.core.payloads import (
        CheckpointReceiver,
        Farewell,
        Hello,
        Refusal,
        Welcome,
        decode_checkpoint,
        decode_json,
        decode_pages,
    )
    from holdfast_agent.hypervisor.command_line import UnsuitableCommandLine, standby_argv
    from holdfast_agent.hypervisor.options import Parameters
    from holdfast_agent.hypervisor.qmp_message import parse_message
    from holdfast_agent.transport.page_coding import CodingCounters, PageDecoder
    from holdfast_api.words import Role

MAP_PAGES = 64
ANSWER_BYTES_MAX = 1 << 20


def header(data: bytes) -> None:
    """A header is judged, or refused."""
    for role in (Role.PRIMARY, Role.BACKUP):
        checker = FrameChecker(sender=role, generation=None, received_frames=len(data) % 2)
        try:
            judged = checker.check_header(data[:HEADER_SIZE_BYTES].ljust(HEADER_SIZE_BYTES, b"\0"))
        except FrameRejected:
            continue
        assert judged.payload_length <= 1 << 27, judged


def payload(data: bytes) -> None:
    """A payload of any kind is understood, or refused."""
    view = memoryview(data)
    kept: list[int] = []
    decoder = PageDecoder(
        CodingCounters(),
        limits=DEFAULT_LIMITS,
        read_base=_zeros,
        keep=kept.append,
        give_back=kept.remove,
        clock=lambda: 0,
    )
    try:
        pages = decode_pages(view, MAP_PAGES, decoder.decode)
    except FrameRejected:
        pass
    else:
        assert pages.page_count <= MAP_PAGES, pages
    assert sum(kept) <= MAP_PAGES * PAGE_SIZE_BYTES, kept
    with contextlib.suppress(FrameRejected):
        assert len(decode_checkpoint(view).device_state) < len(data)
    receiver = CheckpointReceiver(MAP_PAGES)
    judged = FrameHeader(FrameKind.CHECKPOINT, 1, 1, 2, 1, len(data), bytes(16))
    try:
        receiver.checkpoint(judged, view)
    except FrameRejected:
        assert receiver.completed_epoch == 0
    for decode in (
        lambda: decode_json(Hello, data),
        lambda: decode_json(Welcome, data),
        lambda: decode_json(Refusal, data),
        lambda: decode_json(Farewell, data),
    ):
        with contextlib.suppress(FrameRejected):
            decode()


def _zeros(indexes: PageIndexes, rows: PageRows) -> None:
    """Read the memory of a standby that has nothing."""
    rows[: len(indexes)] = 0


def monitor(data: bytes) -> None:
    """A line of QEMU's monitor is an event or an answer, or refused."""
    try:
        message = parse_message(data[:ANSWER_BYTES_MAX])
    except ValueError:
        return
    assert "event" in message or "return" in message or "error" in message, message


def command_line(data: bytes) -> None:
    """A standby is started from a command line, or is not."""
    argv = ["qemu", *data.decode("utf-8", "replace").replace("\0", "").split("\n")]
    for word in argv:
        Parameters.parse(word).render()
    try:
        standby_argv(argv, folder="/run/s", qmp_path="/run/s/qmp", machine_type="q35", taps={})
    except UnsuitableCommandLine:
        return


TARGETS = {one.__name__: one for one in (header, payload, monitor, command_line)}


def main() -> None:
    """Fuzz the target that the command line names."""
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
