"""Choose the host that backs a VM up, and say of every other one why not. Pure.

Each rule looks at one host and returns a plain sentence, or None when the host passes. Sentences
hold no figure that moves with every heartbeat: the same search with the same result is the same
note, and a note is stored only when it changed.

Ties are broken in this order, so that the same view always gives the same choice: most preferred
labels, fewest backups, most free memory, name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from holdfast_api.records import PlacementNote, ProtectionRecord, Rejection, Setback, VmFacts
from holdfast_api.transitions import LIVE
from holdfast_api.words import HostId, Phase, Severity, VmId
from holdfast_controller.core.view import HostView, ProtectionView, View

MEBIBYTE = 1024 * 1024
MEMORY_RESERVE_BYTES = 64 * MEBIBYTE
"""Left free on a backup beside the VM's memory: the standby QEMU's own needs and one checkpoint."""
RETRY_SECONDS_FIRST = 5.0
RETRY_SECONDS_MAX = 300.0


@dataclass
class Occupancy:
    """Who uses which host, counting what the running pass has already decided."""

    reserved_bytes: dict[HostId, int] = field(default_factory=dict)
    """Memory that standbys being filled there will still take."""
    backups: dict[HostId, set[VmId]] = field(default_factory=dict)
    hosts_of: dict[VmId, set[HostId]] = field(default_factory=dict)
    """Hosts that a VM runs on or is backed up by."""
    keeps_away: dict[VmId, set[VmId]] = field(default_factory=dict)
    """Both directions of every `anti_affinity`."""

    @classmethod
    def of(cls, view: View) -> "Occupancy":
        """Count what `view` holds."""
        occupancy = cls()
        for name, host in view.hosts.items():
            for vm in host.heartbeat.vms if host.heartbeat is not None else ():
                occupancy.hosts_of.setdefault(vm, set()).add(name)
        for known in view.protections.values():
            if known.record.phase in LIVE:
                occupancy._count(view, known.record)
        return occupancy

    def _count(self, view: View, record: ProtectionRecord) -> None:
        self.hosts_of.setdefault(record.vm, set()).add(record.primary)
        for other in record.policy.placement.anti_affinity:
            if other != record.vm:
                self.keeps_away.setdefault(record.vm, set()).add(other)
                self.keeps_away.setdefault(other, set()).add(record.vm)
        if record.backup is not None:
            still = _still_taken_bytes(view, record) if record.phase is Phase.SEEDING else 0
            self.assign(record.vm, record.backup, still)

    def assign(self, vm: VmId, host: HostId, memory_bytes: int) -> None:
        """Count `host` as the backup of `vm`, still to be filled with `memory_bytes`."""
        self.reserved_bytes[host] = self.reserved_bytes.get(host, 0) + memory_bytes
        self.backups.setdefault(host, set()).add(vm)
        self.hosts_of.setdefault(vm, set()).add(host)


@dataclass(frozen=True)
class _Search:
    """What the rules may look at."""

    view: View
    occupancy: Occupancy
    record: ProtectionRecord
    facts: VmFacts
    since_seconds: float

    @property
    def primary(self) -> HostView:
        return self.view.hosts.get(self.record.primary, HostView(self.record.primary))


def choose(view: View, occupancy: Occupancy, protection: ProtectionView) -> PlacementNote:
    """Choose the backup of `protection`; the note names every host passed over and why."""
    record = protection.record
    facts = view.vm_facts(record.primary, record.vm)
    if facts is None:
        sentence = f"nothing is known of the VM: {record.primary} does not report it"
        return _nobody(view, sentence)
    blocking = [i.code for i in facts.issues if i.severity is Severity.BLOCKING]
    if blocking:
        return _nobody(view, f"the VM can not be protected as it is: {', '.join(blocking)}")
    search = _Search(view, occupancy, record, facts, protection.since_seconds)
    return _decide(search, sorted(view.hosts))


def retry_after_seconds(setback: Setback) -> float:
    """Return for how long a host is passed over after its seeding failed."""
    exponent = min(setback.count - 1, 16)
    return min(RETRY_SECONDS_FIRST * float(2**exponent), RETRY_SECONDS_MAX)


def _nobody(view: View, sentence: str) -> PlacementNote:
    rejections = tuple(Rejection(host=name, reason=sentence) for name in sorted(view.hosts))
    return PlacementNote(chosen=None, rejections=rejections)


def _decide(search: _Search, names: Iterable[HostId]) -> PlacementNote:
    reasons: dict[HostId, str] = {}
    candidates: list[HostView] = []
    for name in names:
        host = search.view.hosts[name]
        reason = _objection(search, host)
        if reason is None:
            candidates.append(host)
        else:
            reasons[name] = reason
    candidates.sort(key=lambda host: _rank(search, host))
    chosen = candidates[0].host if candidates else None
    for host in candidates[1:]:
        reasons[host.host] = f"would do, but {chosen} is preferred"
    rejections = tuple(Rejection(host=name, reason=reasons[name]) for name in sorted(reasons))
    return PlacementNote(chosen=chosen, rejections=rejections)


def _objection(search: _Search, host: HostView) -> str | None:
    for rule in _RULES:
        reason = rule(search, host)
        if reason is not None:
            return reason
    return None


def _rank(search: _Search, host: HostView) -> tuple[int, int, int, str]:
    prefer = search.record.policy.placement.prefer_labels
    preferred = sum(host.settings.labels.get(key) == value for key, value in prefer.items())
    backups = len(search.occupancy.backups.get(host.host, ()))
    return (-preferred, backups, -_free_bytes(search, host), host.host)


def _free_bytes(search: _Search, host: HostView) -> int:
    available = host.heartbeat.facts.memory_available_bytes if host.heartbeat is not None else 0
    return available - search.occupancy.reserved_bytes.get(host.host, 0)


def _still_taken_bytes(view: View, record: ProtectionRecord) -> int:
    """Return how much of the backup's free memory the standby being filled will still take."""
    facts = view.vm_facts(record.primary, record.vm)
    if facts is None:
        return 0
    heartbeat = view.heartbeat(record.primary)
    report = None if heartbeat is None else heartbeat.workers.get(record.vm)
    if report is None or report.generation != record.generation or report.seeding is None:
        return facts.memory_bytes
    if report.seeding.round > 1:  # the first round touched every page there is
        return 0
    return max(0, facts.memory_bytes - report.seeding.sent_bytes)


# --- the rules, in the order in which a reason is given --------------------------------------


def _is_primary(search: _Search, host: HostView) -> str | None:
    if host.host == search.record.primary:
        return "is the primary"
    return None


def _is_named_by_policy(search: _Search, host: HostView) -> str | None:
    placement = search.record.policy.placement
    if host.host in placement.exclude_hosts:
        return "is excluded by the policy"
    if placement.hosts and host.host not in placement.hosts:
        return "is not among the hosts that the policy names"
    return None


def _is_alive(_search: _Search, host: HostView) -> str | None:
    return None if host.alive else "does not answer"


def _is_in_service(_search: _Search, host: HostView) -> str | None:
    return "is in maintenance" if host.settings.maintenance else None


def _has_labels(search: _Search, host: HostView) -> str | None:
    for key, value in sorted(search.record.policy.placement.require_labels.items()):
        if host.settings.labels.get(key) != value:
            return f"lacks the label {key}={value}"
    return None


def _is_in_other_failure_domain(search: _Search, host: HostView) -> str | None:
    key = search.record.policy.placement.failure_domain
    if key is None:
        return None
    mine = host.settings.labels.get(key)
    if mine is None:
        return f"has no label {key}, so its failure domain is not known"
    theirs = search.primary.settings.labels.get(key)
    if theirs is None:
        return f"the primary has no label {key}, so its failure domain is not known"
    if mine == theirs:
        return f"is in the primary's failure domain ({key}={mine})"
    return None


def _keeps_apart(search: _Search, host: HostView) -> str | None:
    others = search.occupancy.keeps_away.get(search.record.vm, set())
    for other in sorted(others):
        if host.host in search.occupancy.hosts_of.get(other, ()):
            return f"is used by {other}, which must not share a host with {search.record.vm}"
    return None


def _runs_the_same_qemu(search: _Search, host: HostView) -> str | None:
    assert host.heartbeat is not None
    theirs, ours = host.heartbeat.facts.qemu_version, search.facts.qemu_version
    if theirs != ours:
        return f"runs QEMU {theirs or '(none)'}, the VM runs {ours}"
    return None


def _knows_the_machine(search: _Search, host: HostView) -> str | None:
    assert host.heartbeat is not None
    if search.facts.machine_type not in host.heartbeat.facts.machine_types:
        return f"its QEMU has no machine type {search.facts.machine_type}"
    return None


def _has_the_accelerator(search: _Search, host: HostView) -> str | None:
    assert host.heartbeat is not None
    if search.facts.accelerator not in host.heartbeat.facts.accelerators:
        return f"has no accelerator {search.facts.accelerator}"
    return None


def _has_the_bridges(search: _Search, host: HostView) -> str | None:
    assert host.heartbeat is not None
    missing = sorted(set(search.facts.bridges) - set(host.heartbeat.facts.bridges))
    if missing:
        return f"has no bridge {', '.join(missing)}"
    return None


def _has_let_go(search: _Search, host: HostView) -> str | None:
    """A host that lost a claim destroys its VM first (INV-6); until then it is no backup."""
    assert host.heartbeat is not None
    if host.heartbeat.keeps(search.record.vm):
        return "still holds an older copy of the VM; it is told to destroy it"
    return None


def _has_room(search: _Search, host: HostView) -> str | None:
    needed = search.facts.memory_bytes + MEMORY_RESERVE_BYTES
    if _free_bytes(search, host) < needed:
        return f"has less than {-(-needed // MEBIBYTE)} MiB of memory to spare"
    return None


def _did_not_just_fail(search: _Search, host: HostView) -> str | None:
    for setback in search.record.setbacks:
        if setback.host != host.host:
            continue
        again = search.since_seconds + retry_after_seconds(setback)
        if search.view.now_seconds < again:
            return f"could not be filled ({setback.reason}); it is tried again later"
    return None


_RULES: tuple[Callable[[_Search, HostView], str | None], ...] = (
    _is_primary,
    _is_named_by_policy,
    _is_alive,
    _is_in_service,
    _has_labels,
    _is_in_other_failure_domain,
    _keeps_apart,
    _runs_the_same_qemu,
    _knows_the_machine,
    _has_the_accelerator,
    _has_the_bridges,
    _has_let_go,
    _has_room,
    _did_not_just_fail,
)
