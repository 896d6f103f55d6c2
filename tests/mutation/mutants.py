"""The mutants: each breaks one line that carries one of the rules of docs/invariants.md."""

from dataclasses import dataclass

EPOCH = "agent/holdfast_agent/core/epoch.py"
BACKUP = "agent/holdfast_agent/core/backup.py"
PAYLOADS = "agent/holdfast_agent/core/payloads.py"
CONTENT = "agent/holdfast_agent/core/page_content.py"
DELTA_CACHE = "agent/holdfast_agent/core/delta_cache.py"
PAGE_CODING = "agent/holdfast_agent/transport/page_coding.py"
PEER = "agent/holdfast_agent/transport/peer.py"
PAGES = "agent/holdfast_agent/core/pages.py"
CAPTURE = "agent/holdfast_agent/checkpoint/capture.py"
BACKUP_DRIVER = "agent/holdfast_agent/checkpoint/backup.py"
PREFLIGHT = "agent/holdfast_agent/hypervisor/preflight.py"
TRANSITIONS = "api/holdfast_api/transitions.py"
EXCHANGE = "api/holdfast_api/exchange.py"
SUPERVISOR = "agent/holdfast_agent/supervisor.py"
ANSWERS_HTTP = "controller/holdfast_controller/http/answers.py"
WORLD = "controller/holdfast_controller/world.py"
CLAIMS = "controller/holdfast_controller/claims.py"
STORE = "controller/holdfast_controller/adapters/store.py"

PROTECTION = "tests/property/protection/test_two_machines_and_an_arbiter.py"
NAMED = "tests/property/protection/test_what_follows_by_name.py"
SCENARIOS = "tests/scenarios"
TABLE = "tests/property/api"
FRAMES_AND_PAGES = "tests/property/agent_core"
FRAMES_AND_PAGES_STEPS = "tests/unit/agent_core"
ANSWERS = "tests/unit/api"
DISKS = "tests/unit/hypervisor/test_preflight.py"
ENCODED_PEERS = "tests/integration/transport/test_peer_encoding.py"
SUPERVISION = "tests/unit/agent/test_supervisor.py"
SIMULATION = "tests/simulation"
"""Not asked through pytest but as `python -m tests.simulation`, from seed 0 on."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file, and the suites that are asked in turn."""

    name: str
    rule: str
    file: str
    old: str
    new: str
    suites: tuple[str, ...] = (PROTECTION, NAMED, SCENARIOS)


PRIMARY_MUTANTS = (
    Mutant(
        "captures before it holds output",
        "INV-7",
        EPOCH,
        "return [HoldOutput(), *self._capture()]  # INV-7: in this order",
        "return [*self._capture(), HoldOutput()]",
    ),
    Mutant(
        "captures with a checkpoint unacknowledged",
        "INV-2",
        EPOCH,
        "or self.captured != self.acknowledged:",
        "or False:",
    ),
    Mutant(
        "counts a capture that failed",
        "INV-8",
        EPOCH,
        "        self.captured -= 1\n",
        "        pass\n",
    ),
    Mutant(
        "follows an acknowledgement after it lost its backup",
        "INV-1",
        EPOCH,
        "        if self.state not in (PrimaryState.PROTECTING, PrimaryState.HANDING_OVER):\n"
        "            return []\n        if epoch",
        "        if self.state in (PrimaryState.OVER,):\n            return []\n        if epoch",
    ),
    Mutant(
        "follows an acknowledgement of any epoch",
        "INV-2",
        EPOCH,
        "if epoch != self.captured or epoch != self.acknowledged + 1:",
        "if False:",
    ),
    Mutant(
        "follows an acknowledgement of an epoch not captured",
        "INV-2",
        EPOCH,
        "if epoch != self.captured or epoch != self.acknowledged + 1:",
        "if epoch != self.acknowledged + 1:",
    ),
    Mutant(
        "follows the same acknowledgement twice",
        "INV-2",
        EPOCH,
        "if epoch != self.captured or epoch != self.acknowledged + 1:",
        "if epoch != self.captured:",
    ),
    Mutant(
        "goes on though another host won",
        "INV-6",
        EPOCH,
        "if not decision.is_primary:  # INV-6: before anything else",
        "if False:",
    ),
    Mutant(
        "does not destroy its VM when it lost",
        "INV-6",
        EPOCH,
        "return [DestroyVm(), Finish(self.outcome)]",
        "return [Finish(self.outcome)]",
    ),
    Mutant(
        "takes an answer of its own generation for a won claim",
        "INV-5",
        EPOCH,
        "or decision.generation <= self.generation:",
        "or decision.generation < self.generation:",
    ),
    Mutant(
        "releases everything when it loses its backup",
        "INV-1",
        EPOCH,
        "return [StopGuest(), AskClaim(reason)]",
        "return [ReleaseAll(), AskClaim(reason)]",
    ),
    Mutant(
        "releases everything when seeding fails",
        "INV-1",
        EPOCH,
        "return [ReportSeedingFailed(reason.value), Finish(self.outcome)]",
        "return [ReleaseAll(), Finish(self.outcome)]",
    ),
)

BACKUP_MUTANTS = (
    Mutant(
        "acknowledges a checkpoint after it suspected",
        "INV-3",
        BACKUP,
        "if self.state is not BackupState.RECEIVING:  # INV-3\n            return []",
        "pass",
    ),
    Mutant(
        "acknowledges over a gap",
        "INV-2",
        BACKUP,
        "if epoch != self.acknowledged + 1:\n"
        "            return self.suspect(ClaimReason.PEER_FAILED)",
        "pass",
    ),
    Mutant(
        "goes on receiving while it claims",
        "INV-3",
        BACKUP,
        "self.state = BackupState.CLAIMING\n",
        "pass\n",
    ),
    Mutant(
        "promotes though another host won",
        "INV-4",
        BACKUP,
        "if not (decision.is_primary and decision.is_live):  # INV-6",
        "if False:",
    ),
    Mutant(
        "follows an order of its own or an older generation",
        "INV-5",
        BACKUP,
        "if decision.generation <= self.generation:\n            return []",
        "pass",
    ),
    Mutant(
        "claims with nothing to go on from",
        "INV-7",
        BACKUP,
        "if self.acknowledged == 0:",
        "if False:",
    ),
    Mutant(
        "does not destroy its standby when it gives up",
        "INV-6",
        BACKUP,
        "return [DestroyVm(), Finish(outcome)]",
        "return [Finish(outcome)]",
    ),
    Mutant(
        "claims with the connection still open",
        "INV-3",
        BACKUP_DRIVER,
        '        LOGGER.warning("the primary is suspected: %s", lost)\n        self._hang_up()\n',
        '        LOGGER.warning("the primary is suspected: %s", lost)\n',
        (SCENARIOS,),
    ),
)

ARBITER_MUTANTS = (
    Mutant(
        "a VM is protected though nobody seeded it",
        "INV-7",
        TRANSITIONS,
        "    if record.phase is not Phase.SEEDING:\n"
        '        return Refusal("wrong-phase", f"{record.vm} is {record.phase}, not seeding")\n'
        "    return record.model_copy",
        "    return record.model_copy",
        (PROTECTION, NAMED, TABLE, SCENARIOS),
    ),
    Mutant(
        "a backup wins before its primary is plugged",
        "INV-7",
        TRANSITIONS,
        "if role is Role.BACKUP and record.phase is not Phase.PROTECTED:  # INV-7",
        "if False:",
        (PROTECTION, NAMED, TABLE, SCENARIOS),
    ),
    Mutant(
        "a claim of another generation wins",
        "INV-4",
        TRANSITIONS,
        "    refusal = _current(record, generation)\n    if refusal:\n"
        "        return refusal\n    refusal = _may",
        "    refusal = _may",
        (PROTECTION, NAMED, TABLE, SCENARIOS),
    ),
    Mutant(
        "a host without a role wins",
        "INV-4",
        TRANSITIONS,
        "if role is Role.NONE:",
        "if False:",
        (PROTECTION, NAMED, TABLE, SCENARIOS),
    ),
    Mutant(
        "a change of role keeps its generation",
        "INV-4",
        TRANSITIONS,
        '"generation": record.generation + 1}',
        '"generation": record.generation}',
        (PROTECTION, NAMED, TABLE, SCENARIOS),
    ),
    Mutant(
        "a protected backup is dropped without a claim",
        "INV-4",
        TRANSITIONS,
        "    if record.phase is not Phase.SEEDING:\n"
        '        return Refusal("wrong-phase", f"{record.vm} is {record.phase}, not seeding")\n'
        "    return _next",
        "    return _next",
        (PROTECTION, NAMED, TABLE, SCENARIOS),
    ),
    Mutant(
        "a verdict that its record does not bear out decides",
        "INV-5",
        EXCHANGE,
        "return verdict if borne_out else",
        "return verdict if True else",
        (ANSWERS,),
    ),
    Mutant(
        "a verdict without a record decides",
        "INV-5",
        EXCHANGE,
        'return f"a verdict without a record: {verdict.explanation}"',
        "return verdict",
        (ANSWERS,),
    ),
)

OTHER_MUTANTS = (
    Mutant(
        "a checkpoint with other content is whole",
        "INV-2",
        PAYLOADS,
        "if announced != (tally.page_count, tally.frame_count, tally.digest()):  # INV-2",
        "if announced[:2] != (tally.page_count, tally.frame_count):",
        (FRAMES_AND_PAGES, FRAMES_AND_PAGES_STEPS),
    ),
    Mutant(
        "a checkpoint is whole whatever came",
        "INV-2",
        PAYLOADS,
        "if announced != (tally.page_count, tally.frame_count, tally.digest()):  # INV-2",
        "if False:",
        (FRAMES_AND_PAGES, FRAMES_AND_PAGES_STEPS),
    ),
    Mutant(
        "the delta's base is not what the backup has",
        "INV-2",
        DELTA_CACHE,
        "        if mine.all():\n            self._remember(places, rows)\n",
        "        if all_known:\n            pass\n"
        "        elif mine.all():\n            self._remember(places, rows)\n",
        (FRAMES_AND_PAGES, FRAMES_AND_PAGES_STEPS, SIMULATION),
    ),
    Mutant(
        "a page that went another way is still a base",
        "INV-2",
        PAGE_CODING,
        "        self._cache.forget(pages.indexes)\n",
        "",
        (FRAMES_AND_PAGES, SIMULATION),
    ),
    Mutant(
        "what was decoded is not verified",
        "INV-2",
        CONTENT,
        "    if xxhash.xxh3_128(rows.data).digest() != head.digest:",
        "    if False:",
        (FRAMES_AND_PAGES, FRAMES_AND_PAGES_STEPS),
    ),
    Mutant(
        "a difference is believed while seeding",
        "INV-2",
        PAYLOADS,
        "        if head.flags & FLAG_DELTA:\n",
        "        if False:\n",
        (FRAMES_AND_PAGES,),
    ),
    Mutant(
        "a difference is sent though nothing is acknowledged",
        "INV-2",
        PEER,
        "base_is_there = epoch > 0 and epoch == self._acknowledged + 1",
        "base_is_there = epoch > 0",
        (ENCODED_PEERS,),
    ),
    Mutant(
        "pages that failed are not owed again",
        "INV-8",
        PAGES,
        "self._owed = [self._merge(self._owed + self._in_flight)]\n        self._in_flight = []\n"
        "        assert self.owed_count >= before, (self.owed_count, before)  # INV-8",
        "self._in_flight = []",
        (FRAMES_AND_PAGES, FRAMES_AND_PAGES_STEPS, SCENARIOS),
    ),
    Mutant(
        "pages that were taken are forgotten",
        "INV-8",
        PAGES,
        "            self._in_flight.append(taken)\n",
        "            pass\n",
        (FRAMES_AND_PAGES, FRAMES_AND_PAGES_STEPS, SCENARIOS),
    ),
    Mutant(
        "a capture that failed does not put its pages back",
        "INV-8",
        CAPTURE,
        "        self._owed.failed()\n",
        "        pass\n",
        (SCENARIOS,),
    ),
    Mutant(
        "a VM with a writable disk is protected",
        "INV-9",
        PREFLIGHT,
        'if "inserted" in block and not block["inserted"]["ro"]',
        "if False",
        (DISKS,),
    ),
)

WHOLE_MUTANTS = (
    Mutant(
        "an epoch is released when it was captured",
        "INV-2",
        EPOCH,
        "return [Capture(self.captured, final)]",
        "return [Capture(self.captured, final), ReleaseOutput(self.captured)]",
        (PROTECTION, SCENARIOS, SIMULATION),
    ),
    Mutant(
        "a backup's worker follows another one in its generation",
        "INV-3",
        SUPERVISOR,
        "            if entry.worker_generation < assignment.generation:\n"
        '                await self._destroy(entry, "left',
        '            if True:\n                await self._destroy(entry, "left',
        (SUPERVISION,),
    ),
    Mutant(
        "a claim that was won already is not recognised",
        "INV-5",
        TRANSITIONS,
        "    if record.claimed == stamp:\n",
        "    if False:\n",
        (TABLE,),
    ),
    Mutant(
        "a write whose outcome is unknown counts as written",
        "INV-5",
        STORE,
        "            result = await self._write(\n"
        "                [compare(key, revision), *also],\n"
        "                [Put(key, encode(outcome)), self._event(describe(record, outcome))],\n"
        "            )\n",
        "            try:\n"
        "                result = await self._write(\n"
        "                    [compare(key, revision), *also],\n"
        "                    [Put(key, encode(outcome)), self._event(describe(record, outcome))],\n"
        "                )\n"
        "            except Unavailable:\n"
        "                return Changed(outcome, revision, written=True)\n",
        (SIMULATION,),
    ),
    Mutant(
        "a write that was overtaken counts as written",
        "INV-4",
        STORE,
        "            if result.succeeded:\n                return Changed(outcome",
        "            if True:\n                return Changed(outcome",
        (SIMULATION,),
    ),
    Mutant(
        "a claim is answered from what its controller believes",
        "INV-5",
        CLAIMS,
        "        guess = None\n",
        "        pass\n",
        (SIMULATION,),
    ),
    Mutant(
        "a host without a role keeps what it holds",
        "INV-6",
        SUPERVISOR,
        'await self._destroy(entry, "another host goes on with this VM")',
        "pass",
        (SUPERVISION,),
    ),
    Mutant(
        "a copy that lost is protected again",
        "INV-6",
        ANSWERS_HTTP,
        "    issues.extend(_older_copy_issue(view, vm, host))\n",
        "",
        ("tests/unit/controller/test_answers.py",),
    ),
    Mutant(
        "an old heartbeat is new evidence of loss",
        "INV-6",
        WORLD,
        "revision=min(revision, heartbeat.position + 1),",
        "revision=revision,",
        ("tests/unit/controller/test_world.py", SIMULATION),
    ),
    Mutant(
        "a win that is learned late contradicts the orders",
        "INV-6",
        SUPERVISOR,
        '{"generation": claim.generation + 1, "content"',
        '{"generation": record.generation, "content"',
        (SUPERVISION, SIMULATION),
    ),
)

MUTANTS = PRIMARY_MUTANTS + BACKUP_MUTANTS + ARBITER_MUTANTS + OTHER_MUTANTS + WHOLE_MUTANTS
