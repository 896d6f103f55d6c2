"""Every folder beside this file is a scenario; its log is compared with the one expected.

`HOLDFAST_UPDATE_SCENARIOS=1 pytest tests/scenarios` writes the logs anew: the diff is the review.
"""

import os
from pathlib import Path

import pytest
from tests.scenarios.harness import ScriptNotUnderstood, run_script

FOLDER = Path(__file__).parent
SCENARIOS = sorted(path.parent for path in FOLDER.glob("*/script"))
UPDATE = bool(os.environ.get("HOLDFAST_UPDATE_SCENARIOS"))


@pytest.mark.parametrize("folder", SCENARIOS, ids=lambda folder: folder.name)
def test_the_log_of_a_scenario_is_the_expected_one(folder: Path) -> None:
    log = run_script((folder / "script").read_text())
    expected = folder / "expected.log"
    if UPDATE:
        expected.write_text(log)
    assert log == expected.read_text()


@pytest.mark.parametrize("folder", SCENARIOS, ids=lambda folder: folder.name)
def test_a_scenario_says_what_it_shows(folder: Path) -> None:
    assert len((folder / "README.md").read_text().splitlines()) > 2


def test_all_scenarios_were_found() -> None:
    assert len(SCENARIOS) >= 12


def test_a_scenario_runs_the_same_every_time() -> None:
    script = (FOLDER / "cut-both-ways-backup-first" / "script").read_text()
    assert run_script(script) == run_script(script)


@pytest.mark.parametrize(
    "script",
    ["at 5ms guest sings\nend 10ms", "at soon kill primary\nend 10ms", "at 5ms order release"],
)
def test_a_script_that_nobody_understands_is_an_error(script: str) -> None:
    with pytest.raises(ScriptNotUnderstood):
        run_script(script)
