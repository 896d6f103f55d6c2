"""A lab without control plane, and what the tests here ask the kernel."""

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from holdfast_lab import namespaces
from holdfast_lab.lab import Lab


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Datagrams:
    """A UDP socket at each of some parties; says who hears whom."""

    def __init__(self, lab: Lab, *parties: str) -> None:
        self.sockets = {party: lab.open_socket(party, kind=socket.SOCK_DGRAM) for party in parties}
        for opened in self.sockets.values():
            opened.bind(("", 5000))
            opened.settimeout(0.5)

    def heard(self, sender: str, receiver: str, address: str) -> bool:
        """Tell whether a word of `sender` arrives; an error at the sender is raised here."""
        word = os.urandom(8)
        for _ in range(2):  # the second would carry an error that the first one caused
            self.sockets[sender].sendto(word, (address, 5000))
            try:
                while self.sockets[receiver].recv(100) != word:
                    pass
            except TimeoutError:
                continue
            return True
        return False

    def close(self) -> None:
        for opened in self.sockets.values():
            opened.close()


@pytest.fixture
def lab_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of this test run's own, of whose lab nothing may be left in the end."""
    name = f"t{os.getpid()}-{abs(hash(request.node.name)) % 1000}"
    try:
        yield name
    finally:
        Lab.remove(name)
    assert not [each for each in namespaces.names() if each.startswith(f"hf-{name}-")]


@pytest.fixture
def lab(lab_name: str) -> Iterator[Lab]:
    """Two hosts, etcd, no controller, no agents."""
    with Lab.up(2, lab_name, components=("etcd",)) as made:
        yield made
