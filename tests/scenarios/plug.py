"""The output plug of a simulated VM, and the world outside that hears what leaves."""

from collections.abc import Callable

from tests.scenarios.guest import Packet
from tests.scenarios.simulation import World


class Outside:
    """Everybody who talks with the guest; remembers all that was ever heard."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.heard: list[tuple[Packet, str]] = []

    def nic_of(self, host: str) -> Callable[[Packet], None]:
        def leave(packet: Packet) -> None:
            self._world.log("outside", f"hears {packet.text!r} from {host}")
            self.heard.append((packet, host))

        return leave


class SimulatedPlug:
    """Ports `OutputPlug` and `OutputSignal`."""

    name = "simulated"

    def __init__(self, world: World, host: str, leave: Callable[[Packet], None]) -> None:
        self._world = world
        self._host = host
        self._leave = leave
        self.is_holding = False
        self.is_walled = False
        """The worker that held is dead: whatever the guest sends is lost."""
        self.on_release_all: Callable[[], None] = lambda: None
        self._open: list[Packet] = []
        self._closed: list[Packet] | None = None
        self._unseen = 0
        self._descriptor = world.descriptor(lambda: self._unseen > 0)

    def nic(self, packet: Packet) -> None:
        """Take what the guest sends."""
        if self.is_walled:
            self._world.log(self._host, f"drops {packet.text!r}")
        elif self.is_holding:
            self._world.log(self._host, f"holds {packet.text!r}")
            self._open.append(packet)
            self._unseen += 1
        else:
            self._leave(packet)

    def lose_holder(self) -> None:
        """The worker was killed: what it held is gone, and nothing leaves any more."""
        self.is_walled = self.is_holding
        self._open, self._closed, self._unseen = [], None, 0

    # --- port OutputPlug --------------------------------------------------------------------------

    def install(self) -> None:
        """It is there already."""

    def hold(self) -> None:
        self._world.log(self._host, "holds its output")
        self.is_holding = True
        self.is_walled = False

    def reopen_epoch(self) -> None:
        self._open = [*(self._closed or []), *self._open]
        self._closed = None

    def close_epoch(self) -> None:
        assert self.is_holding, "captured before output was held (INV-7)"
        assert self._closed is None, "a second epoch was closed before the first was released"
        self._closed, self._open = self._open, []

    def release_one(self) -> None:
        assert self._closed is not None
        packets, self._closed = self._closed, None
        for packet in packets:
            self._leave(packet)

    def release_all(self) -> None:
        if self.is_holding:
            self.on_release_all()
            self._world.log(self._host, "lets all output go")
        self.is_holding = self.is_walled = False
        packets = [*(self._closed or []), *self._open]
        self._open, self._closed = [], None
        for packet in packets:
            self._leave(packet)

    def held_bytes(self) -> int:
        return sum(len(p.text) for p in [*(self._closed or []), *self._open])

    def dropped_packets(self) -> int:
        return 0

    def change_limit(self, limit_bytes: int) -> None:
        """There is room for all that a scenario says."""

    def discard(self) -> None:
        """Nothing is left of a plug of ours."""

    def remove(self) -> None:
        assert not self.is_holding

    # --- port OutputSignal ------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._descriptor

    def drain(self) -> int:
        unseen, self._unseen = self._unseen, 0
        return unseen
