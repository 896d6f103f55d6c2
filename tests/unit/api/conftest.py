"""Fixtures of the clients' tests: real servers on loopback, and ports that nobody answers at."""

import socket
from collections.abc import Callable, Iterator

import pytest
from tests.unit.api.canned import FakeController

StartController = Callable[[], FakeController]


@pytest.fixture
def start_controller() -> Iterator[StartController]:
    """Start controllers; they are stopped after the test."""
    started: list[FakeController] = []

    def start() -> FakeController:
        controller = FakeController()
        started.append(controller)
        controller.start()
        return controller

    yield start
    for controller in started:
        controller.stop()


@pytest.fixture
def controller(start_controller: StartController) -> FakeController:
    """One controller."""
    return start_controller()


@pytest.fixture
def dead_url() -> Iterator[str]:
    """The URL of a port that refuses: bound, never listening, so nobody else can take it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"
