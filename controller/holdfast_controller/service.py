"""One controller process: its store, its loop, its HTTP server, from start to clean end.

Listens on TCP; talks to etcd. `serve` returns when it was told to stop (SIGTERM, SIGINT) and has
closed everything. Leadership is given back and waiting long polls and followers are answered first,
so that another controller leads and agents go to another one at once. If the loop fails, the server
ends too: a controller that no longer follows the store must not go on answering.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from holdfast_controller.adapters.etcd import EtcdClient, TlsFiles
from holdfast_controller.adapters.heartbeats import Heartbeats
from holdfast_controller.adapters.store import Store
from holdfast_controller.config import Config, ConfigFaults
from holdfast_controller.control import Control
from holdfast_controller.http.app import create_server
from holdfast_controller.leadership import Leadership
from holdfast_controller.loop import Loop
from holdfast_controller.metrics import Metrics
from holdfast_controller.signals import Signals
from holdfast_controller.world import World

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
"""For how long the planner's thread may keep the interpreter while claims wait for it."""
STOP_SECONDS_MAX = 5
BACKLOG = 1024


class _Server(uvicorn.Server):
    """A server that lets its long polls go, and its leadership, when it is told to stop."""

    def __init__(self, config: uvicorn.Config, signals: Signals, leadership: Leadership) -> None:
        super().__init__(config)
        self._signals = signals
        self._leadership = leadership

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGTERM and SIGINT while serving; uvicorn's own way would then kill us by it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begin to stop; asked a second time, stop without waiting for requests."""
        self._leadership.resign()
        self._signals.close()
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve(config: Config) -> None:
    """Run a controller until it is told to stop. Raises ConfigFaults and OSError at the start."""
    sys.setswitchinterval(SWITCH_SECONDS)
    with _listen(config) as listener:
        etcd = _connect(config)
        try:
            await _serve_on(listener, etcd, config)
        finally:
            await etcd.close()


async def _serve_on(listener: socket.socket, etcd: EtcdClient, config: Config) -> None:
    world = World()
    leadership = Leadership(
        etcd,
        name=f"{socket.gethostname()}:{listener.getsockname()[1]}, process {os.getpid()}",
        ttl_seconds=config.leader_ttl_seconds,
        fit=lambda: world.live,
    )
    control = Control(
        store=Store(etcd),
        heartbeats=Heartbeats(etcd),
        world=world,
        metrics=Metrics(),
        beats_per_second_max=config.heartbeats_per_second_max,
        silence_seconds=config.heartbeat_ttl_seconds,
        leads=leadership.leads,
    )
    loop = Loop(
        control,
        etcd,
        leadership,
        interval_seconds=config.planner_interval_seconds,
        events_kept=config.events_kept,
    )
    server = _Server(_server_config(control), world.signals, leadership)
    following = asyncio.create_task(loop.run(), name="loop")
    following.add_done_callback(lambda _: server.stop())
    try:
        logger.info("listening on %s:%d", *listener.getsockname()[:2])
        await server.serve(sockets=[listener])
    finally:
        following.cancel()
        await asyncio.wait([following])
    if not following.cancelled():
        following.result()
    logger.info("stopped")


def _listen(config: Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.listen_address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.listen_address, config.listen_port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _connect(config: Config) -> EtcdClient:
    password = None
    try:
        if config.etcd_password_file is not None:
            password = config.etcd_password_file.read_text("utf-8").split("\n", 1)[0]
        tls = None
        if config.etcd_authority_file is not None:
            tls = TlsFiles(
                authority=config.etcd_authority_file,
                certificate=config.etcd_certificate_file,
                key=config.etcd_key_file,
            )
        return EtcdClient(
            config.etcd_endpoints,
            request_timeout_seconds=config.etcd_request_timeout_seconds,
            user=config.etcd_user,
            password=password,
            tls=tls,
        )
    except (OSError, ValueError) as error:
        raise ConfigFaults([f"etcd: {error}"]) from error


def _server_config(control: Control) -> uvicorn.Config:
    return uvicorn.Config(
        create_server(control),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=STOP_SECONDS_MAX,
    )
