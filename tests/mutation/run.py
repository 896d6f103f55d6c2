"""Break the cores on purpose, one line at a time: every mutant must be killed by its tests.

Works on a copy of the tree in a temporary folder. `python tests/mutation/run.py [WORD]` runs the
mutants whose file or text contains WORD; exits 1 if one lives or no longer applies.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EPOCH = "agent/holdfast_agent/core/epoch.py"
BACKUP = "agent/holdfast_agent/core/backup.py"
TRANSITIONS = "api/holdfast_api/transitions.py"
PROTECTION = "tests/property/protection"
SECONDS_MAX = 300


@dataclass(frozen=True)
class Mutant:
    """One change of one file, and the tests that must notice it."""

    file: str
    old: str
    new: str
    tests: str = PROTECTION


MUTANTS = (
    Mutant(
        EPOCH,
        "return [HoldOutput(), *self._capture()]  # INV-7: in this order",
        "return [*self._capture(), HoldOutput()]",
    ),
    Mutant(EPOCH, "or self.captured != self.acknowledged:", "or False:"),
    Mutant(
        EPOCH,
        "        if self.state not in (PrimaryState.PROTECTING, PrimaryState.HANDING_OVER):\n"
        "            return []\n        if epoch",
        "        if self.state in (PrimaryState.OVER,):\n            return []\n        if epoch",
    ),
    Mutant(EPOCH, "if epoch != self.captured or epoch != self.acknowledged + 1:", "if False:"),
    Mutant(EPOCH, "if not decision.is_primary:  # INV-6: before anything else", "if False:"),
    Mutant(
        EPOCH,
        "or decision.generation <= self.generation:",
        "or decision.generation < self.generation:",
    ),
    Mutant(
        EPOCH,
        "return [StopGuest(), AskClaim(reason)]",
        "return [ReleaseAll(), AskClaim(reason)]",
    ),
    Mutant(
        EPOCH,
        "return [ReportSeedingFailed(reason.value), Finish(self.outcome)]",
        "return [ReleaseAll(), Finish(self.outcome)]",
    ),
    Mutant(
        BACKUP,
        "if self.state is not BackupState.RECEIVING:  # INV-3\n            return []",
        "pass",
    ),
    Mutant(
        BACKUP,
        "if epoch != self.acknowledged + 1:\n"
        "            return self.suspect(ClaimReason.PEER_FAILED)",
        "pass",
    ),
    Mutant(BACKUP, "self.state = BackupState.CLAIMING\n", "pass\n"),
    Mutant(BACKUP, "if not (decision.is_primary and decision.is_live):  # INV-6", "if False:"),
    Mutant(BACKUP, "if decision.generation <= self.generation:\n            return []", "pass"),
    Mutant(BACKUP, "if self.acknowledged == 0:", "if False:"),
    Mutant(BACKUP, "return [DestroyVm(), Finish(outcome)]", "return [Finish(outcome)]"),
    Mutant(
        TRANSITIONS,
        "    if record.phase is not Phase.SEEDING:\n"
        '        return Refusal("wrong-phase", f"{record.vm} is {record.phase}, not seeding")\n'
        "    return record.model_copy",
        "    return record.model_copy",
    ),
    Mutant(
        TRANSITIONS,
        "if role is Role.BACKUP and record.phase is not Phase.PROTECTED:  # INV-7",
        "if False:",
    ),
    Mutant(
        TRANSITIONS,
        "    refusal = _current(record, generation)\n    if refusal:\n"
        "        return refusal\n    refusal = _may",
        "    refusal = _may",
    ),
    Mutant(TRANSITIONS, "if role is Role.NONE:", "if False:"),
    Mutant(
        TRANSITIONS,
        '"generation": record.generation + 1}',
        '"generation": record.generation}',
    ),
)


def verdict(mutant: Mutant, tree: Path) -> str:
    """Return `killed`, `LIVES` or `GONE` for one mutant; the tree is as before afterwards."""
    path = tree / mutant.file
    text = path.read_text()
    if text.count(mutant.old) < 1:
        return "GONE"
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    rooms = [str(tree / room) for room in ("api", "controller", "agent", "deploy")]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.tests],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(rooms)},
            capture_output=True,
            timeout=SECONDS_MAX,
            check=False,
        )
    finally:
        path.write_text(text)
    return "killed" if done.returncode == 1 else "LIVES"


def main() -> int:
    """Run the chosen mutants; return 1 if one lives or is gone."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("api", "controller", "agent", "deploy", "tests"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", tree)
        for mutant in MUTANTS:
            if word in mutant.file + mutant.old:
                result = verdict(mutant, tree)
                bad += result != "killed"
                line = mutant.old.strip().splitlines()[0]
                sys.stdout.write(f"{result:7} {Path(mutant.file).name:16} {line}\n")
                sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
