"""The production connection and peer of `transport`, over a simulated stream.

Only the stream is replaced, and the thread that says we live while a turn takes long: here no turn
takes real time. Frames, checksums, payloads and the receiver's account are the production code.
"""

from collections.abc import Callable

from tests.scenarios.simulation import MS
from tests.simulation.kernel import Clock, Kernel, RuleBroken
from tests.simulation.network import SimulatedSocket

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import FrameKind, FrameLimits, RejectionCode
from holdfast_agent.core.memory_map import PageIndexes, PageRows
from holdfast_agent.core.page_content import ReadBase
from holdfast_agent.core.payloads import Welcome
from holdfast_agent.core.peer_messages import PeerMessage
from holdfast_agent.transport.connection import Frame, FrameConnection
from holdfast_agent.transport.peer import FramePeer
from holdfast_api.words import Epoch, Role

LIMITS = FrameLimits(slab_size_bytes=4 * 4096, index_size_bytes=4096)
GREET_NS = 3_000 * MS
DELTA_CACHE_BYTES = 40 * 4096
"""Less than a guest has: some pages share a place."""
DIFFERENCES = "page sent as a difference"
SEEDING_SILENCE_SECONDS = 3.0


class SimulatedConnection(FrameConnection):
    """A connection of frames whose socket is simulated."""

    def __init__(
        self,
        kernel: Kernel,
        clock: Clock,
        sock: SimulatedSocket,
        *,
        role: Role,
        generation: int | None,
        keepalive_ms: int = 50,
        silence_limit_ms: int = 250,
        received_frames: int = 0,
    ) -> None:
        self.kernel = kernel
        self.socket = sock
        super().__init__(
            sock,
            role=role,
            generation=generation,
            silence_limit_seconds=max(SEEDING_SILENCE_SECONDS, silence_limit_ms / 1000),
            keepalive_seconds=keepalive_ms / 1000,
            limits=LIMITS,
            received_frames=received_frames,
            clock=clock.now_ns,
        )

    def wait_frame(self, deadline_ns: int) -> Frame | None:  # noqa: ARG002 - real time means nothing
        return super().wait_frame(self._clock() + GREET_NS)

    def welcome(self) -> None:
        """Answer a HELLO, as `transport.opening.welcome` does, with an id drawn from the seed."""
        number = self.kernel.random.randrange(1, 1 << 64)
        answer = Welcome(connection=number)
        self.send(FrameKind.WELCOME, 0, [answer.model_dump_json().encode()])
        self.bind(number)


class SimulatedPeer(FramePeer):
    """The other worker; tells the rules what is sent and acknowledged."""

    def __init__(
        self,
        connection: SimulatedConnection,
        *,
        map_page_count: int,
        silence_limit_ms: int,
        read_base: ReadBase | None = None,
        on_checkpoint: Callable[[Epoch], None] = lambda _: None,
        on_acknowledge: Callable[[Epoch], None] = lambda _: None,
    ) -> None:
        super().__init__(
            connection,
            map_page_count=map_page_count,
            silence_limit_seconds=silence_limit_ms / 1000,
            limits=LIMITS,
            delta_cache_bytes=DELTA_CACHE_BYTES,
            read_base=read_base,
            clock=connection._clock,
        )
        self.connection = connection
        self._on_checkpoint = on_checkpoint
        self._on_acknowledge = on_acknowledge

    def send_pages(
        self, epoch: Epoch, indexes: PageIndexes, rows: PageRows, zero_indexes: PageIndexes
    ) -> None:
        self.connection.kernel.hesitate()
        before = self.coding.delta_pages
        super().send_pages(epoch, indexes, rows, zero_indexes)
        self.connection.socket.network.happened[DIFFERENCES] += self.coding.delta_pages - before

    def receive(self) -> PeerMessage | None:
        try:
            return super().receive()
        except PeerLost as lost:
            # Whatever the network does to a frame shows in its checksum or its number.
            if RejectionCode.BAD_PAYLOAD.value in lost.explanation:
                raise RuleBroken(f"INV-2: an undamaged frame was refused: {lost}") from lost
            raise

    def send_checkpoint(self, epoch: Epoch, device_state: bytes, *, final: bool) -> None:
        self.connection.kernel.hesitate()
        self._on_checkpoint(epoch)
        super().send_checkpoint(epoch, device_state, final=final)

    def send_acknowledgement(self, epoch: Epoch) -> None:
        self.connection.kernel.hesitate()
        self._on_acknowledge(epoch)
        super().send_acknowledgement(epoch)

    def send_farewell(self, code: str, explanation: str) -> None:
        self.connection.kernel.log(self.connection.socket.host, f"says farewell: {code}")
        super().send_farewell(code, explanation)

    def be_strict(self) -> None:
        """As in production, but for the thread that stands in during long turns."""
        self._connection.limit_silence(self._silence_limit_seconds)

    def close(self) -> None:
        if self._is_closed:
            return
        super().close()
        self.connection.socket.close()
