"""Clients of one VM's counter, which write down every request and every answer.

Talk TCP, each over one connection that is never made again: a guest that lives on keeps it. One
thread for each client; `RecordedVm.close` ends them.
"""

import contextlib
import socket
import threading
import time
from bisect import bisect_right
from random import Random

from tests.chaos.history import Kind, Operation, contradictions

from holdfast_lab.clients import REDIS_PORT, RedisConnection
from holdfast_lab.errors import LabError
from holdfast_lab.lab import Lab

ANSWER_SECONDS_MAX = 240.0
"""Longer than any fault and its healing: a client waits, it never gives up."""
OPERATIONS_MAX = 2_000_000
READS = 0.2
CLIENTS = 3
REST_SECONDS = 0.02


class Client:
    """One client: request, answer, a short rest."""

    def __init__(self, number: int, connected: socket.socket, random: Random) -> None:
        """Own a connected socket; `start` begins."""
        self._number = number
        self._socket = connected
        self._redis = RedisConnection(connected)
        self._random = random
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"client {number}", daemon=True)
        self.operations: list[Operation] = []
        self.fault: str | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, also in the middle of a request, which then has no answer."""
        self._stopping.set()
        with contextlib.suppress(OSError):  # it was reset before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        assert not self._thread.is_alive(), "a client does not end"
        self._redis.close()

    def _run(self) -> None:
        while not self._stopping.is_set() and len(self.operations) < OPERATIONS_MAX:
            kind = Kind.READ if self._random.random() < READS else Kind.INCREMENT
            sent = time.monotonic()
            try:
                answer = self._redis.command(kind, "count")
            except (OSError, LabError) as fault:
                self.operations.append(Operation(self._number, kind, sent))
                if not self._stopping.is_set():
                    self.fault = f"{type(fault).__name__}: {fault}"
                return
            self.operations.append(
                Operation(self._number, kind, sent, time.monotonic(), int(answer or 0))
            )
            self._stopping.wait(self._random.random() * 2 * REST_SECONDS)


class RecordedVm:
    """A VM under its clients, from its first answer to its end."""

    def __init__(self, lab: Lab, name: str, seed: int) -> None:
        """Connect all clients and begin."""
        self.name = name
        self.address = lab.state.vms[name].addresses[0]
        self._clients: list[Client] = []
        try:
            for number in range(1, CLIENTS + 1):
                connected = lab.connect(
                    self.address, REDIS_PORT, timeout_seconds=ANSWER_SECONDS_MAX
                )
                client = Client(number, connected, Random(f"{seed} {name} {number}"))
                self._clients.append(client)
                client.start()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """End all clients. Idempotent."""
        for client in self._clients:
            client.stop()

    def count(self) -> int:
        """Return how many requests were answered or failed so far."""
        return sum(len(client.operations) for client in self._clients)

    def all_answered_since(self, moment: float) -> bool:
        """Tell whether every client had an answer to something it sent after `moment`."""
        return all(
            any(o.sent > moment and not o.is_pending for o in client.operations[-5:])
            for client in self._clients
        )

    def faults(self) -> list[str]:
        """Return why connections ended, if any did by themselves."""
        return [c.fault for c in self._clients if c.fault is not None]

    def contradictions(self) -> list[str]:
        """Hold all that the clients saw against a counter. After `close`."""
        return contradictions(o for client in self._clients for o in client.operations)

    def stall_seconds(self, moment: float) -> float | None:
        """Return how long nobody got an answer around `moment`; None if none came after it."""
        answers = sorted(
            o.answered for c in self._clients for o in c.operations[-2000:] if not o.is_pending
        )
        after = bisect_right(answers, moment)
        if not 0 < after < len(answers):
            return None
        return answers[after] - answers[after - 1]
