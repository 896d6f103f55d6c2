"""Asks the lab's services whether they work yet. Talks HTTP and Redis.

Every question has a deadline.
A service that does not answer is not an error here: whoever asks waits and asks again.
"""

import http.client
from collections.abc import Callable

import httpx

from holdfast_lab import namespaces
from holdfast_lab.clients import RedisConnection
from holdfast_lab.errors import LabError
from holdfast_lab.services import ETCD_PORT

PROBE_DEADLINE_SECONDS = 2.0


def etcd_answers(namespace: str) -> bool:
    """Tell whether the etcd of a namespace says that it is healthy."""

    def ask() -> bool:
        connection = http.client.HTTPConnection(
            "127.0.0.1", ETCD_PORT, timeout=PROBE_DEADLINE_SECONDS
        )
        try:
            connection.request("GET", "/health")
            return b'"true"' in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return namespaces.enter(namespace, ask)


def controller_is_ready(url: str) -> bool:
    """Tell whether the controller can serve requests."""
    answer = _get(f"{url}/readyz")
    return answer is not None and answer.is_success


def hosts_alive(url: str) -> set[str]:
    """Return the hosts that the controller hears from; none while it does not answer."""
    answer = _get(f"{url}/v1/hosts")
    if answer is None or not answer.is_success:
        return set()
    return {entry["host"] for entry in answer.json()["hosts"] if entry["alive"]}


def redis_answers(connect: Callable[[], RedisConnection]) -> bool:
    """Tell whether a new connection to a Redis gets an answer."""
    try:
        with connect() as connection:
            return connection.command("PING") == "PONG"
    except (OSError, LabError):
        return False


def _get(url: str) -> httpx.Response | None:
    """Ask the controller, past any proxy of this machine; None when it does not answer."""
    with httpx.Client(trust_env=False, timeout=PROBE_DEADLINE_SECONDS) as client:
        try:
            return client.get(url)
        except httpx.TransportError:
            return None
