"""Choose the host that backs a VM up, and say of every other one why not. Pure.

Each rule looks at one host and returns a plain sentence, or None when the host passes. Sentences
hold no figure that moves with every heartbeat: the same search with the same result is the same
note, and a note is stored only when it changed.

Ties are broken in this order, so that the same view always gives the same choice: most preferred
labels, fewest backups, most free memory, name.

A pass may search for thousands of VMs among a thousand hosts, so no search asks every rule of every
host. VMs that want the same (`_Wish`) get the same answer from every rule but a few; it is worked
out once in a pass and kept. What is left to one search is the hosts that its own VM has to do with
(its primary, holders, neighbours, setbacks: a handful, asked every rule) and the room that each
host has left. A note names at most `REJECTIONS_MAX` hosts, those with an objection first: it is
stored in the record, and ten thousand notes of a thousand sentences would fill the store.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice

from holdfast_api.records import PlacementNote, ProtectionRecord, Rejection, Setback, VmFacts
from holdfast_api.transitions import LIVE
from holdfast_api.words import HostId, Phase, Severity, VmId
from holdfast_controller.core.view import HeartbeatView, HostView, ProtectionView, View

MEBIBYTE = 1024 * 1024
MEMORY_RESERVE_BYTES = 64 * MEBIBYTE
"""Left free on a backup beside the VM's memory: the standby QEMU's own needs and one checkpoint."""
REJECTIONS_MAX = 32
"""Hosts that a note names; more of them tell an operator nothing new."""
WOULD_DO = "would do, but the chosen one is preferred"
RETRY_SECONDS_FIRST = 5.0
RETRY_SECONDS_MAX = 300.0

Rank = tuple[int, int, HostId]
"""Backups, free memory with its sign turned, name: the lowest is preferred."""


@dataclass
class Occupancy:
    """Who uses which host, counting what the running pass has already decided."""

    backups: dict[HostId, set[VmId]] = field(default_factory=dict)
    hosts_of: dict[VmId, set[HostId]] = field(default_factory=dict)
    """Hosts that a VM runs on or is backed up by."""
    keeps_away: dict[VmId, set[VmId]] = field(default_factory=dict)
    """Both directions of every `anti_affinity`."""
    keepers: dict[VmId, set[HostId]] = field(default_factory=dict)
    """Hosts that say they have something of a VM."""
    free_bytes: dict[HostId, int] = field(default_factory=dict)
    """Memory that a host has to spare, reservations taken off."""
    ranks: dict[HostId, Rank] = field(default_factory=dict)
    suited: "dict[_Wish, _Suited]" = field(default_factory=dict)
    """What this pass has worked out already."""
    rejections: dict[tuple[HostId, str], Rejection] = field(default_factory=dict)
    """The same sentences are said of the same hosts in many notes of a pass."""

    @classmethod
    def of(cls, view: View) -> "Occupancy":
        """Count what `view` holds."""
        occupancy = cls()
        for name, host in view.hosts.items():
            if host.heartbeat is not None:
                occupancy._hear(name, host.heartbeat)
            occupancy._rank(name)
        for known in view.protections.values():
            if known.record.phase in LIVE:
                occupancy._count(view, known.record)
        return occupancy

    def _hear(self, host: HostId, heartbeat: HeartbeatView) -> None:
        self.free_bytes[host] = heartbeat.facts.memory_available_bytes
        for vm in heartbeat.vms:
            self.hosts_of.setdefault(vm, set()).add(host)
            self.keepers.setdefault(vm, set()).add(host)
        for vm in heartbeat.held:
            self.keepers.setdefault(vm, set()).add(host)

    def _rank(self, host: HostId) -> None:
        backups = len(self.backups.get(host, ()))
        self.ranks[host] = (backups, -self.free_bytes.get(host, 0), host)

    def _count(self, view: View, record: ProtectionRecord) -> None:
        self.hosts_of.setdefault(record.vm, set()).add(record.primary)
        for other in record.policy.placement.anti_affinity:
            if other != record.vm:
                self.keeps_away.setdefault(record.vm, set()).add(other)
                self.keeps_away.setdefault(other, set()).add(record.vm)
        if record.backup is not None:
            still = _still_taken_bytes(view, record) if record.phase is Phase.SEEDING else 0
            self.assign(record.vm, record.backup, still)

    def reject(self, host: HostId, reason: str) -> Rejection:
        """Return the sentence said of a host."""
        known = self.rejections.get((host, reason))
        if known is None:
            known = self.rejections[host, reason] = Rejection(host=host, reason=reason)
        return known

    def assign(self, vm: VmId, host: HostId, memory_bytes: int) -> None:
        """Count `host` as the backup of `vm`, still to be filled with `memory_bytes`."""
        self.free_bytes[host] = self.free_bytes.get(host, 0) - memory_bytes
        self.backups.setdefault(host, set()).add(vm)
        self.hosts_of.setdefault(vm, set()).add(host)
        self._rank(host)


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


@dataclass(frozen=True)
class _Wish:
    """What a VM wants of its backup's host; VMs that want the same may have the same hosts."""

    placement_json: str
    failure_domain: str | None
    """The primary's; None when it has none or the policy asks for none."""
    qemu_version: str
    machine_type: str
    accelerator: str
    bridges: tuple[str, ...]
    plugs: tuple[str, ...]
    needs_rdma: bool


@dataclass(frozen=True)
class _Suited:
    """The hosts, judged by `_WISH_RULES`."""

    objections: dict[HostId, str]
    names: tuple[HostId, ...]
    """Those without an objection, by name."""
    queues: tuple[list[Rank], ...]
    """The same as heaps, one for each number of preferred labels, the most first."""


def choose(view: View, occupancy: Occupancy, protection: ProtectionView) -> PlacementNote:
    """Choose the backup of `protection`; the note names hosts passed over and why."""
    record = protection.record
    facts = view.vm_facts(record.primary, record.vm)
    if facts is None:
        sentence = f"nothing is known of the VM: {record.primary} does not report it"
        return _nobody(view, occupancy, sentence)
    blocking = [i.code for i in facts.issues if i.severity is Severity.BLOCKING]
    if blocking:
        sentence = f"the VM can not be protected as it is: {', '.join(blocking)}"
        return _nobody(view, occupancy, sentence)
    return _decide(_Search(view, occupancy, record, facts, protection.since_seconds))


def retry_after_seconds(setback: Setback) -> float:
    """Return for how long a host is passed over after its seeding failed."""
    exponent = min(setback.count - 1, 16)
    return min(RETRY_SECONDS_FIRST * float(2**exponent), RETRY_SECONDS_MAX)


def _nobody(view: View, occupancy: Occupancy, sentence: str) -> PlacementNote:
    return _note(occupancy, None, dict.fromkeys(view.hosts, sentence), ())


def _decide(search: _Search) -> PlacementNote:
    suited = _suited(search)
    free_bytes, needed_bytes = search.occupancy.free_bytes, _needed_bytes(search)
    cramped = [name for name in suited.names if free_bytes[name] < needed_bytes]
    reasons = suited.objections | dict.fromkeys(cramped, _no_room(search))
    reasons |= _objections_of_its_own(search)
    best = (_best(search.occupancy, queue, reasons) for queue in suited.queues)
    chosen = next((name for name in best if name is not None), None)
    others = (name for name in suited.names if name != chosen and name not in reasons)
    return _note(search.occupancy, chosen, reasons, others)


def _best(occupancy: Occupancy, queue: list[Rank], reasons: dict[HostId, str]) -> HostId | None:
    """Return the host of the lowest rank that nothing speaks against.

    Ranks only rise in a pass: an entry that is too low is put back where it belongs.
    """
    looked_at: list[Rank] = []
    chosen = None
    while queue and chosen is None:
        rank = heappop(queue)
        name = rank[-1]
        if rank != occupancy.ranks[name]:
            heappush(queue, occupancy.ranks[name])
            continue
        looked_at.append(rank)
        chosen = None if name in reasons else name
    for rank in looked_at:
        heappush(queue, rank)
    return chosen


def _note(
    occupancy: Occupancy,
    chosen: HostId | None,
    reasons: dict[HostId, str],
    others: Iterable[HostId],
) -> PlacementNote:
    """Name hosts passed over, by name; `others`, that would do, fill what room is left."""
    named = {name: reasons[name] for name in sorted(reasons)[:REJECTIONS_MAX]}
    for name in islice(others, REJECTIONS_MAX - len(named)):
        named[name] = WOULD_DO
    rejections = tuple(occupancy.reject(name, named[name]) for name in sorted(named))
    return PlacementNote(chosen=chosen, rejections=rejections)


def _suited(search: _Search) -> _Suited:
    """Return the hosts as every VM with the same wish finds them in this pass."""
    wish = _wish(search)
    known = search.occupancy.suited.get(wish)
    if known is None:
        known = search.occupancy.suited[wish] = _judge(search)
    return known


def _wish(search: _Search) -> _Wish:
    placement = search.record.policy.placement
    key = placement.failure_domain
    return _Wish(
        placement_json=placement.model_dump_json(),
        failure_domain=None if key is None else search.primary.settings.labels.get(key),
        qemu_version=search.facts.qemu_version,
        machine_type=search.facts.machine_type,
        accelerator=search.facts.accelerator,
        bridges=search.facts.bridges,
        plugs=search.facts.plugs,
        needs_rdma=search.record.policy.transport == "rdma",
    )


def _judge(search: _Search) -> _Suited:
    objections: dict[HostId, str] = {}
    names: list[HostId] = []
    queues: dict[int, list[Rank]] = {}
    for name in sorted(search.view.hosts):
        host = search.view.hosts[name]
        reason = _objection(_WISH_RULES, search, host)
        if reason is not None:
            objections[name] = reason
            continue
        names.append(name)
        queues.setdefault(_preferred_labels(search, host), []).append(search.occupancy.ranks[name])
    for queue in queues.values():
        heapify(queue)
    best_first = tuple(queues[count] for count in sorted(queues, reverse=True))
    return _Suited(objections, tuple(names), best_first)


def _objections_of_its_own(search: _Search) -> dict[HostId, str]:
    """Ask every rule of the hosts that this VM has to do with; all others it treats alike."""
    record, occupancy = search.record, search.occupancy
    names = {record.primary, *occupancy.keepers.get(record.vm, ())}
    names.update(setback.host for setback in record.setbacks)
    for other in occupancy.keeps_away.get(record.vm, ()):
        names |= occupancy.hosts_of.get(other, set())
    found: dict[HostId, str] = {}
    for name in names & search.view.hosts.keys():
        reason = _objection(_RULES, search, search.view.hosts[name])
        if reason is not None:
            found[name] = reason
    return found


def _objection(rules: "Iterable[_Rule]", search: _Search, host: HostView) -> str | None:
    for rule in rules:
        reason = rule(search, host)
        if reason is not None:
            return reason
    return None


def _preferred_labels(search: _Search, host: HostView) -> int:
    prefer = search.record.policy.placement.prefer_labels
    return sum(host.settings.labels.get(key) == value for key, value in prefer.items())


def _needed_bytes(search: _Search) -> int:
    return search.facts.memory_bytes + MEMORY_RESERVE_BYTES


def _no_room(search: _Search) -> str:
    return f"has less than {-(-_needed_bytes(search) // MEBIBYTE)} MiB of memory to spare"


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


def _can_hold_its_output(search: _Search, host: HostView) -> str | None:
    """A VM that came to life there must be protected again from there."""
    assert host.heartbeat is not None
    wanted, offered = search.facts.plugs, host.heartbeat.facts.plugs
    if wanted and offered and not set(wanted) & set(offered):
        return f"has no plug for its NICs ({', '.join(wanted)}): modprobe -a ifb sch_plug"
    return None


def _can_be_reached_as_wanted(search: _Search, host: HostView) -> str | None:
    assert host.heartbeat is not None
    offered = host.heartbeat.facts.transports
    if search.record.policy.transport == "rdma" and offered and "rdma" not in offered:
        return "has no RDMA: give its agent an rdma_address, a device and python3-pyverbs"
    return None


def _has_let_go(search: _Search, host: HostView) -> str | None:
    """A host that lost a claim destroys its VM first (INV-6); until then it is no backup."""
    assert host.heartbeat is not None
    if host.heartbeat.keeps(search.record.vm):
        return "still holds an older copy of the VM; it is told to destroy it"
    return None


def _has_room(search: _Search, host: HostView) -> str | None:
    if search.occupancy.free_bytes[host.host] < _needed_bytes(search):
        return _no_room(search)
    return None


def _did_not_just_fail(search: _Search, host: HostView) -> str | None:
    for setback in search.record.setbacks:
        if setback.host != host.host:
            continue
        again = search.since_seconds + retry_after_seconds(setback)
        if search.view.now_seconds < again:
            return f"could not be filled ({setback.reason}); it is tried again later"
    return None


_Rule = Callable[[_Search, HostView], str | None]

_RULES: tuple[_Rule, ...] = (
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
    _can_hold_its_output,
    _can_be_reached_as_wanted,
    _has_let_go,
    _has_room,
    _did_not_just_fail,
)
_OWN_RULES = frozenset({_is_primary, _keeps_apart, _has_let_go, _has_room, _did_not_just_fail})
"""They look at more than the wish: at what `_objections_of_its_own` covers, and at the room."""
_WISH_RULES = tuple(rule for rule in _RULES if rule not in _OWN_RULES)
"""They look at the host and at what `_Wish` holds of the VM, and at nothing else."""
