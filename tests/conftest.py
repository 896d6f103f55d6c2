"""What holds for all tests."""

import signal

import pytest

# Started as a background job of a shell, we and all our children would ignore SIGINT; tests that
# press Ctrl-C mean what a person at a terminal gets.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what only some of the tests look at; an option must be known before they are."""
    parser.addoption(
        "--lab-all",
        action="store_true",
        help="run every case of tests/lab, not only the core ones",
    )
