"""How what carries a plug is named, so that it is found again."""

import pytest

from holdfast_agent.network.qdisc_links import Ifb, Owner, alias_of, name_base_of, read_alias

TAP = "a-tap-of-15-byt"


def test_names_fit_into_an_interfaces_and_are_the_same_every_time() -> None:
    assert len(f"{name_base_of(TAP)}7") <= 15
    assert name_base_of(TAP) == name_base_of(TAP) != name_base_of("tap0")


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_alias_says_what_its_reader_needs(*, is_ours: bool) -> None:
    alias = alias_of(TAP, Owner(1234, 5678), is_ingress_ours=is_ours)
    found = read_alias(9, f"{name_base_of(TAP)}1", alias)
    assert found == Ifb(9, f"{name_base_of(TAP)}1", TAP, Owner(1234, 5678), is_ours)
    assert len(alias) < 256


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("ifb0", None),
        ("ifb0", alias_of("tap0", Owner(1, 2), is_ingress_ours=True)),
        ("hf-0000000000", None),
        ("hf-00000000000", "somebody else's"),
        ("hf-00000000000", alias_of("tap0", Owner(1, 2), is_ingress_ours=True)),
    ],
)
def test_what_is_not_ours_is_not_taken_for_it(name: str, alias: str | None) -> None:
    assert read_alias(9, name, alias) is None


def test_one_whose_maker_died_before_the_alias_is_ours_by_its_name() -> None:
    assert read_alias(9, "hf-00000000000", None) == Ifb(9, "hf-00000000000", "")


def test_the_younger_one_is_the_greater() -> None:
    assert Ifb(3, "b", "t") < Ifb(4, "a", "t")
