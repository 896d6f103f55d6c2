"""What is behind a monitor socket, as the agent reports it. Asks QMP; changes nothing."""

import re

from holdfast_agent.host.processes import start_ticks_of
from holdfast_agent.hypervisor.command_line import name_of
from holdfast_agent.hypervisor.holding import argv_of
from holdfast_agent.hypervisor.preflight import examine
from holdfast_agent.hypervisor.qmp import QmpConnection
from holdfast_agent.network.selection import FILTER_ONLY, PlugOutlook
from holdfast_api.records import VmFacts
from holdfast_api.words import NAME_PATTERN


def facts_of(
    qmp: QmpConnection, pid: int | None = None, outlook: PlugOutlook = FILTER_ONLY
) -> VmFacts | None:
    """Return the facts of the VM behind `qmp`; None for a QEMU that has no name.

    A standby in waiting is no VM yet: also None. Raises VirtualMachineFailed.
    """
    pid = qmp.peer_pid if pid is None else pid
    argv = argv_of(pid)
    name = qmp.execute("query-name").get("name") or name_of(argv)
    if not name or qmp.execute("query-status")["status"] == "inmigrate":
        return None
    facts = examine(qmp, pid, argv, outlook).facts(vm_id_of(name))
    return facts.model_copy(update={"start_ticks": start_ticks_of(pid)})


def vm_id_of(name: str) -> str:
    """Return `name` as an id: lower case, other characters than an id may have become dashes."""
    text = re.sub(r"[^a-z0-9._-]", "-", name.lower())[:63].strip("._-")
    return text if re.match(NAME_PATTERN, text) else "vm"
