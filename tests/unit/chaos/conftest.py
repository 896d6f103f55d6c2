"""A wire with one guest on it, for all tests of what passes."""

import pytest
from tests.chaos.wire import Wire
from tests.unit.chaos.passing import GUEST, VM


@pytest.fixture
def wire() -> Wire:
    made = Wire()
    made.name_guest(GUEST, VM)
    return made
