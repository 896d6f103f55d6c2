"""Windows and counters."""

import pytest

from holdfast_agent.core.statistics import Counters, Window
from holdfast_api.records import Percentiles


def test_an_empty_window_shows_zeros() -> None:
    assert Window().percentiles() == Percentiles()


def test_percentiles_are_measured_values_by_nearest_rank() -> None:
    window = Window()
    for value in range(200, 0, -1):
        window.add(value)
    assert window.percentiles() == Percentiles(p50=100, p99=198, max=200)


def test_a_single_value_is_every_percentile() -> None:
    window = Window()
    window.add(3.5)
    assert window.percentiles() == Percentiles(p50=3.5, p99=3.5, max=3.5)


def test_of_two_values_the_smaller_is_the_median() -> None:
    window = Window()
    window.add(2)
    window.add(1)
    assert window.percentiles() == Percentiles(p50=1, p99=2, max=2)


def test_the_oldest_value_falls_out_of_a_full_window() -> None:
    window = Window()
    window.add(1000)
    for _ in range(511):
        window.add(1)
    assert window.percentiles().max == 1000
    window.add(1)
    assert window.percentiles().max == 1


def test_counters_add_up_and_are_copied_out() -> None:
    counters = Counters(["pages", "pause_seconds"])
    counters.add("pages")
    counters.add("pages", 4)
    shown = counters.values()
    assert shown == {"pages": 5, "pause_seconds": 0}
    shown["pages"] = 0
    assert counters.values()["pages"] == 5


def test_a_counter_neither_falls_nor_appears() -> None:
    counters = Counters(["pages"])
    with pytest.raises(AssertionError):
        counters.add("pages", -1)
    with pytest.raises(AssertionError):
        counters.add("page")
