"""The operator: protects and unprotects, switches over, boots what was lost, through the API."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tests.scenarios.simulation import MS
from tests.simulation.kernel import SECOND

from holdfast_api.errors import Refused, Unavailable
from holdfast_api.messages import PolicyPatch, ProtectRequest
from holdfast_api.records import EncodingPolicy, Policy
from holdfast_api.words import Phase
from holdfast_controller.control import Control
from holdfast_controller.http import people

if TYPE_CHECKING:
    from tests.simulation.cluster import Simulation

Route = Callable[[Control], Awaitable[Any]]
LOOK_NS = 1_500 * MS
ENCODINGS: dict[int, EncodingPolicy] = {
    50: "delta-zstd",
    100: "delta",
    200: "auto",
    600: "zstd",
}
"""By the keep-alive of a new policy, by the interval of a changed one."""


class Operator:
    """Somebody with a command line."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._kernel = simulation.kernel
        self._random = simulation.kernel.random
        self.wanted: set[str] = set()
        """VMs that are to be protected."""
        self._kernel.after(LOOK_NS, self._look)

    def act(self) -> None:
        """Do one thing to one VM."""
        self._simulation.happened["operator asked"] += 1
        vm = self._random.choice(self._simulation.vms)
        what = self._random.choice(
            ("switch over", "switch over", "unprotect", "patch", "shut down")
        )
        if what == "switch over":
            self._ask(vm, what, lambda control: people.switch_over(vm, control))
        elif what == "unprotect":
            if self._random.random() < 0.6:
                self.wanted.discard(vm)
                self._ask(vm, what, lambda control: people.unprotect(vm, control))
                self._kernel.after(self._random.randint(0, 6 * SECOND), partial(self.want, vm))
        elif what == "patch":
            interval_ms = self._random.choice((50, 200, 600))
            patch = PolicyPatch(interval_ms=interval_ms, encoding=ENCODINGS[interval_ms])
            self._ask(vm, what, lambda control: people.patch_protection(vm, patch, control))
        elif self._random.random() < 0.15:
            self._shut_down(vm)

    def want(self, vm: str) -> None:
        self.wanted.add(vm)

    def _shut_down(self, vm: str) -> None:
        for qemu in self._simulation.qemus.alive():
            if qemu.vm_name == vm and qemu.vm.is_running:
                self._kernel.log("operator", f"shuts the guest of {vm} down")
                self._simulation.happened["guest shut down"] += 1
                qemu.vm.shut_down()
                return

    # --- what it sees to --------------------------------------------------------------------------

    def _look(self) -> None:
        """Protect what is to be protected; boot again what is gone for good."""
        self._kernel.after(LOOK_NS, self._look)
        for vm in self._simulation.vms:
            record = self._simulation.rules.records.get(vm)
            phase = None if record is None else record.phase
            if phase is Phase.ENDED:
                self._ask(vm, "clear", lambda control, vm=vm: people.unprotect(vm, control))  # type: ignore[misc]
            elif phase in (None, Phase.RETIRED):
                if self._simulation.boot_again(vm):
                    continue
                if vm in self.wanted:
                    request = ProtectRequest(policy=self._policy())
                    self._ask(
                        vm,
                        "protect",
                        lambda control, vm=vm, request=request: people.protect(  # type: ignore[misc]
                            vm, control, request
                        ),
                    )

    def _policy(self) -> Policy:
        keepalive_ms = self._random.choice((50, 100, 200))
        return Policy(
            interval_ms=self._random.choice((100, 250, 600)),
            min_interval_ms=self._random.choice((5, 40)),
            output_triggered=self._random.random() < 0.7,
            keepalive_ms=keepalive_ms,
            encoding=ENCODINGS[keepalive_ms],
            keepalive_misses=self._random.choice((3, 5)),
        )

    def _ask(self, vm: str, what: str, route: Route) -> None:
        controller = self._random.choice(self._simulation.controllers)
        if not controller.answers:
            return
        self._kernel.log("operator", f"{what} {vm} at {controller.name}")

        async def ask() -> None:
            try:
                await route(controller.control)
            except (Refused, Unavailable) as error:
                self._kernel.log("operator", f"{what} {vm}: {error}")

        controller.loop.spawn(ask())
