"""The standby of a simulated backup; tells the rules when it is brought to life."""

from typing import TYPE_CHECKING

from tests.scenarios.guest import SimulatedStandby
from tests.simulation.kernel import Kernel
from tests.simulation.qemu import Qemu

if TYPE_CHECKING:
    from tests.simulation.worker import Worker


class TrackedStandby(SimulatedStandby):
    """Port `Standby`."""

    def __init__(self, kernel: Kernel, worker: "Worker", qemu: Qemu) -> None:
        super().__init__(kernel, worker.host.name, qemu.vm)
        self._worker = worker
        self._qemu = qemu
        self.on_promote = self._promoted

    def _promoted(self) -> None:
        self._worker.host.rules.promotes(self._worker, self._qemu)
        self._qemu.is_standby = False
