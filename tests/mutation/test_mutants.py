"""The list of mutants fits the code; whether each dies is what `run.py` finds out."""

from collections import Counter
from pathlib import Path

import pytest
from tests.mutation.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_breaks_exactly_one_place_that_is_still_there(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_shown_to_suites_that_exist(mutant: Mutant) -> None:
    assert mutant.suites
    assert all((ROOT / suite).exists() for suite in mutant.suites)


def test_every_rule_has_a_mutant_and_every_mutant_its_own_name() -> None:
    assert {mutant.rule for mutant in MUTANTS} == {f"INV-{number}" for number in range(1, 10)}
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1
