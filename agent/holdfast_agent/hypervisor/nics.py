"""The NICs of a running QEMU with their taps and bridges. Asks QMP and rtnetlink."""

from collections.abc import Sequence

from holdfast_agent.core.vm_spec import NicSpec
from holdfast_agent.hypervisor.network_text import RunningNic, parse_network
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.network.taps import bridge_of


def nic_specs(running: Sequence[RunningNic]) -> tuple[NicSpec, ...]:
    """Return the NICs that lead to a named tap, with their bridges."""
    return tuple(
        NicSpec(netdev_id=nic.netdev_id, tap=nic.tap, bridge=bridge_of(nic.tap), mac=nic.mac)
        for nic in running
        if nic.kind == "tap" and nic.tap is not None
    )


def read_nics(qmp: QmpConnection) -> tuple[NicSpec, ...]:
    """Ask a QEMU for its NICs. Raises VirtualMachineFailed."""
    return nic_specs(parse_network(qmp.human("info network")))
