"""Real etcd servers on free loopback ports, in a temporary folder, ended with the test.

`setpriv --pdeathsig` ends them as well when the test process itself is killed.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast_controller.adapters.etcd import EtcdClient, TlsFiles

DEADLINE_SECONDS = 60.0
"""Generous: the machine is small and shared. Nothing is asserted about how long things take."""


def free_ports(count: int) -> list[int]:
    """Return loopback ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {DEADLINE_SECONDS} s: {what}")
        time.sleep(0.02)


@dataclass(frozen=True)
class Certificates:
    """An authority, certificates it signed for etcd and for a client, and a foreign authority."""

    folder: Path

    @property
    def client(self) -> TlsFiles:
        """What a client needs."""
        return TlsFiles(
            self.folder / "ca.crt", self.folder / "client.crt", self.folder / "client.key"
        )

    @property
    def distrusting(self) -> TlsFiles:
        """A client that trusts somebody else."""
        return TlsFiles(
            self.folder / "foreign.crt", self.folder / "client.crt", self.folder / "client.key"
        )

    @property
    def anonymous(self) -> TlsFiles:
        """A client that does not say who it is."""
        return TlsFiles(self.folder / "ca.crt")

    @property
    def server_arguments(self) -> list[str]:
        """Etcd's flags for serving clients over TLS and asking for their certificate."""
        return [
            *("--cert-file", str(self.folder / "server.crt")),
            *("--key-file", str(self.folder / "server.key")),
            *("--trusted-ca-file", str(self.folder / "ca.crt")),
            "--client-cert-auth",
        ]

    @classmethod
    def make(cls, folder: Path) -> "Certificates":
        """Let openssl make them."""
        folder.mkdir()
        for name in ("ca", "foreign"):
            _openssl(
                folder,
                f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name} "
                f"-keyout {name}.key -out {name}.crt",
            )
        (folder / "names.txt").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        for name in ("server", "client"):
            _openssl(
                folder,
                f"req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr",
            )
            _openssl(
                folder,
                f"x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 "
                f"-extfile names.txt -out {name}.crt",
            )
        return cls(folder)


def _openssl(folder: Path, arguments: str) -> None:
    subprocess.run(
        ["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True, timeout=60
    )


class EtcdServer:
    """One etcd process that a test may stop, kill, freeze and start again at the same address."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "m1",
        ports: list[int] | None = None,
        cluster: str | None = None,
        certificates: Certificates | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder / name
        self.client_port, self.peer_port, self.metrics_port = ports or free_ports(3)
        self._certificates = certificates
        self._process: subprocess.Popen[bytes] | None = None
        client_url = f"{self.scheme}://127.0.0.1:{self.client_port}"
        peer_url = f"http://127.0.0.1:{self.peer_port}"
        self._command = [
            *("setpriv", "--pdeathsig", "KILL", "etcd"),
            *("--name", name),
            *("--data-dir", str(self.folder / "data")),
            *("--listen-client-urls", client_url),
            *("--advertise-client-urls", client_url),
            *("--listen-peer-urls", peer_url),
            *("--initial-advertise-peer-urls", peer_url),
            *("--initial-cluster", cluster or f"{name}={peer_url}"),
            *("--listen-metrics-urls", f"http://127.0.0.1:{self.metrics_port}"),
            *("--logger", "zap"),
            *(certificates.server_arguments if certificates else ()),
            *arguments,
        ]

    @property
    def scheme(self) -> str:
        return "https" if self._certificates else "http"

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.client_port}"

    def launch(self) -> None:
        """Start the process; does not wait for it."""
        assert self._process is None, "it runs already"
        self.folder.mkdir(exist_ok=True, parents=True)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_healthy(self) -> None:
        """Return when it has a leader and serves."""
        wait_until(self._is_healthy, f"etcd is healthy, its log is {self.folder / 'log'}")

    def _is_healthy(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"etcd ended: {(self.folder / 'log').read_text()[-2000:]}")
        try:
            return '"health":"true"' in self._http("/health")
        except OSError:
            return False

    def _http(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}{path}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=5) as answer:
            return str(answer.read().decode())

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.launch()
        self.wait_healthy()

    def metric(self, name: str) -> int:
        """Return one of etcd's own counters; `name` with its labels, as etcd prints it."""
        for line in self._http("/metrics").splitlines():
            if line.startswith(name + " "):
                return int(float(line.rpartition(" ")[2]))
        return 0

    def open_watch_streams(self) -> int:
        """Count the watch streams that clients have open."""
        labels = 'grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"'
        ended = sum(
            int(float(line.rpartition(" ")[2]))
            for line in self._http("/metrics").splitlines()
            if line.startswith("grpc_server_handled_total{") and labels in line
        )
        return self.metric(f"grpc_server_started_total{{{labels}}}") - ended

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def freeze(self) -> None:
        """Stop it in its tracks: connections stay, nobody answers."""
        assert self._process is not None
        pid = self._process.pid
        self.send(signal.SIGSTOP)
        # The signal returns before every thread stands still; this tells when they do.
        wait_until(
            lambda: os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG) is not None, "it stands"
        )

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a power loss would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.send_signal(signal.SIGCONT)
            self._process.wait(timeout=DEADLINE_SECONDS)
            self._process = None

    def restart(self) -> None:
        """Kill it and start it again on the same data."""
        self.kill()
        self.start()

    def forget_everything(self) -> None:
        """Remove the data of a server that does not run."""
        assert self._process is None
        shutil.rmtree(self.folder / "data")

    def etcdctl(self, *arguments: str, user: str | None = None) -> str:
        """Run etcdctl against this server and return what it prints."""
        command = ["etcdctl", "--endpoints", self.endpoint, "--command-timeout", "30s"]
        if self._certificates:
            files = self._certificates.client
            command += ["--cacert", str(files.authority)]
            command += ["--cert", str(files.certificate), "--key", str(files.key)]
        if user:
            command += ["--user", user]
        done = subprocess.run(
            [*command, *arguments],
            env={**os.environ, "ETCDCTL_API": "3"},
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


class EtcdCluster:
    """Three members."""

    def __init__(self, folder: Path) -> None:
        names = ("m1", "m2", "m3")
        flat = free_ports(9)
        ports = {name: flat[3 * i : 3 * i + 3] for i, name in enumerate(names)}
        cluster = ",".join(f"{name}=http://127.0.0.1:{ports[name][1]}" for name in names)
        self.members = [
            EtcdServer(folder, name=name, ports=ports[name], cluster=cluster) for name in names
        ]

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def start(self) -> None:
        for member in self.members:
            member.launch()
        for member in self.members:
            member.wait_healthy()

    def stop(self) -> None:
        for member in self.members:
            member.kill()

    def leader(self) -> EtcdServer:
        """Return the member that leads; there must be one."""
        leading = [each for each in self.members if each.metric("etcd_server_is_leader") == 1]
        assert len(leading) == 1, [each.endpoint for each in leading]
        return leading[0]


class Forwarder:
    """A TCP forwarder to an etcd, for cutting and freezing single connections.

    Its endpoint stays the same; the server behind knows nothing of it.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        (self.port,) = free_ports(1)
        self._requests_flow = asyncio.Event()
        self._answers_flow = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def heal(self) -> None:
        """Let everything through."""
        self._requests_flow.set()
        self._answers_flow.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    def freeze(self, *, answers_only: bool = False) -> None:
        """Connections stay open and are accepted, and nothing passes any more."""
        self._answers_flow.clear()
        if not answers_only:
            self._requests_flow.clear()

    async def cut(self) -> None:
        """Break every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in tuple(self._writers):
            writer.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        inner: asyncio.StreamWriter | None = None
        try:
            back, inner = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._writers.add(inner)
            await asyncio.gather(
                self._pump(reader, inner, self._requests_flow),
                self._pump(back, writer, self._answers_flow),
            )
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, inner):
                if each is not None:
                    each.transport.abort()
                    self._writers.discard(each)
            self._tasks.discard(task)

    @staticmethod
    async def _pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event
    ) -> None:
        while data := await reader.read(65536):
            await flowing.wait()
            writer.write(data)
            await writer.drain()
        writer.transport.abort()


@pytest.fixture
def forwarding_to() -> Callable[[EtcdServer], contextlib.AbstractAsyncContextManager[Forwarder]]:
    """`async with forwarding_to(server) as forwarder`: forward while the block lasts."""

    @contextlib.asynccontextmanager
    async def make(server: EtcdServer) -> AsyncIterator[Forwarder]:
        forwarder = Forwarder(server.client_port)
        await forwarder.heal()
        try:
            yield forwarder
        finally:
            await forwarder.cut()

    return make


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """A single member that serves."""
    server = EtcdServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def make_etcd(tmp_path: Path) -> Iterator[Callable[..., EtcdServer]]:
    """Make single members with flags of your own; not started, ended with the test."""
    servers: list[EtcdServer] = []

    def make(name: str = "other", *arguments: str) -> EtcdServer:
        server = EtcdServer(tmp_path, name=name, arguments=arguments)
        servers.append(server)
        return server

    try:
        yield make
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EtcdCluster]:
    """Three members that serve."""
    three = EtcdCluster(tmp_path)
    try:
        three.start()
        yield three
    finally:
        three.stop()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates made once for all tests."""
    return Certificates.make(tmp_path_factory.mktemp("tls") / "files")


@pytest.fixture
def secure_etcd(tmp_path: Path, certificates: Certificates) -> Iterator[EtcdServer]:
    """A member with TLS, client certificates and users.

    `root` (password `root`) may do everything, `holdfast` (password `secret`) what begins with
    `/holdfast/`.
    """
    server = EtcdServer(tmp_path, certificates=certificates)
    try:
        server.start()
        server.etcdctl("user", "add", "root:root")
        server.etcdctl("user", "grant-role", "root", "root")
        server.etcdctl("role", "add", "controller")
        server.etcdctl(
            *("role", "grant-permission", "controller", "--prefix=true"),
            *("readwrite", "/holdfast/"),
        )
        server.etcdctl("user", "add", "holdfast:secret")
        server.etcdctl("user", "grant-role", "holdfast", "controller")
        server.etcdctl("auth", "enable")
        yield server
    finally:
        server.kill()


@pytest.fixture
def client_of() -> Callable[..., contextlib.AbstractAsyncContextManager[EtcdClient]]:
    """`async with client_of(endpoint, ...) as client`: a client that is closed with the block."""

    @contextlib.asynccontextmanager
    async def make(*endpoints: str, **options: object) -> AsyncIterator[EtcdClient]:
        client = EtcdClient(endpoints, **options)  # type: ignore[arg-type]
        try:
            yield client
        finally:
            await client.close()

    return make
