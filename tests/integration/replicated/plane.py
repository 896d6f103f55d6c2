"""A control plane of several members and replicas in a lab, and what tests ask of it."""

import http.client
import os
import time
from collections.abc import Callable
from typing import Any

import httpx

from holdfast_lab import namespaces, processes
from holdfast_lab.control_plane import CONTROLLER, ETCD, names_of, party_of
from holdfast_lab.lab import Lab
from holdfast_lab.paths import find_tool
from holdfast_lab.services import ETCD_PORT, address_of

DEADLINE_SECONDS = 60.0
ANSWER_SECONDS = 3.0


def eventually(what: str, probe: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """Poll until `probe` finds something, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)  # polling with a deadline
    return found


class Replica:
    """One controller, spoken to directly; `None` is an answer that did not come."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=15.0, trust_env=False)

    def get(self, path: str, **params: Any) -> httpx.Response:
        return self.http.get(path, params=params)

    def put(self, path: str, body: Any = None) -> httpx.Response:
        return self.http.put(path, json=body)

    def patch(self, path: str, body: Any) -> httpx.Response:
        return self.http.patch(path, json=body)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.http.post(path, json=body)

    def protection(self, vm: str) -> dict[str, Any]:
        answer = self.get(f"/v1/vms/{vm}/protection")
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def try_get(self, path: str) -> httpx.Response | None:
        """Ask over a connection of its own, with little patience."""
        try:
            return httpx.get(f"{self.url}{path}", timeout=ANSWER_SECONDS, trust_env=False)
        except httpx.TransportError:
            return None

    def is_ready(self) -> bool:
        answer = self.try_get("/readyz")
        return answer is not None and answer.is_success

    def is_unready(self) -> bool:
        answer = self.try_get("/readyz")
        return answer is not None and answer.status_code == 503

    def leads(self) -> bool:
        return self.metric("holdfast_controller_is_leader") == 1

    def metric(self, name: str) -> float | None:
        answer = self.try_get("/metrics")
        lines = answer.text.splitlines() if answer is not None else []
        values = [line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")]
        return float(values[0]) if values else None


class Plane:
    """The etcd members and the controllers of a lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        names = names_of(lab.state, CONTROLLER)
        self.replicas = [Replica(*each) for each in zip(names, lab.urls, strict=True)]
        self.members = names_of(lab.state, ETCD)

    def close(self) -> None:
        for replica in self.replicas:
            replica.http.close()

    # --- controllers ---

    def leaders(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.leads()]

    def leader(self) -> Replica:
        """Return the controller that leads, once there is exactly one."""

        def one() -> Replica | None:
            found = self.leaders()
            return found[0] if len(found) == 1 else None

        found = eventually("exactly one controller leads", one)
        assert isinstance(found, Replica)
        return found

    def followers(self) -> list[Replica]:
        leader = self.leader()
        return [replica for replica in self.replicas if replica is not leader]

    def wait_ready(self, *replicas: Replica) -> None:
        for replica in replicas or self.replicas:
            eventually(f"{replica.name} is ready", replica.is_ready)

    # --- etcd ---

    def etcd_leader(self) -> str:
        """Return the member that leads, once one does."""

        def look() -> str | None:
            return next(filter(self._leads_etcd, self.members), None)

        found = eventually("a member of etcd leads", look)
        assert isinstance(found, str)
        return found

    def etcd_follower(self) -> str:
        leader = self.etcd_leader()
        return next(member for member in self.members if member != leader)

    def _leads_etcd(self, member: str) -> bool:
        process = self.lab.state.processes[member]
        if not processes.is_alive(process):
            return False

        def ask() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", ETCD_PORT, timeout=ANSWER_SECONDS)
            try:
                connection.request("GET", "/metrics")
                return b"\netcd_server_is_leader 1\n" in connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                return False
            finally:
                connection.close()

        return namespaces.enter(self.lab.network.namespace(party_of(member)), ask)

    def etcdctl(self, *words: str, member: str | None = None) -> str:
        """Run etcdctl as if on the machine of a member; LabError if it fails."""
        name = member or self.members[0]
        tool = [find_tool("etcdctl"), "--dial-timeout=5s", "--command-timeout=10s"]
        endpoint = f"--endpoints=http://{address_of(name)}:{ETCD_PORT}"
        return self.lab.execute(party_of(name), [*tool, endpoint, *words])

    def isolate(self, member: str, *, also: tuple[str, ...] = ()) -> None:
        """Cut a member off from the other members and from `also`."""
        for other in [*self.members, *also]:
            if other != member:
                self.lab.cut(member, other)

    # --- afterwards ---

    def mend(self) -> None:
        """Thaw, heal and start everything, and wait until it works."""
        self.lab.heal()
        state = self.lab.state
        names = [*self.members, *(replica.name for replica in self.replicas)]
        for name in names:
            if processes.is_alive(state.processes[name]):
                self.lab.thaw(name)
            else:
                self.lab.start(name)
        self.etcd_leader()
        self.wait_ready()
        self.leader()


def lab_name(kind: str, number: int = 0) -> str:
    """Return a name of this test run's own."""
    return f"{kind}{os.getpid() % 10000}{number}"
