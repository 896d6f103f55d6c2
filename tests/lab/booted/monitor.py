"""Speaks QMP with the QEMU that emulates a host, one command after another, over a socket."""

import json
import socket
from typing import Any

ANSWER_SECONDS_MAX = 30.0


class Monitor:
    """A QMP connection. Owns the socket; close it."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over a connected socket; nothing is said until the first command."""
        connection.settimeout(ANSWER_SECONDS_MAX)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._is_open = False

    def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command and return its answer; AssertionError when QEMU refuses it.

        Raises OSError when QEMU is gone or does not answer in time.
        """
        if not self._is_open:
            self._is_open = True
            self._next_line()  # the greeting
            self.execute("qmp_capabilities")
        line = json.dumps({"execute": name, "arguments": arguments or {}}).encode()
        self._connection.sendall(line + b"\n")
        while True:
            answer = self._next_line()
            assert "error" not in answer, f"{name}: {answer['error']}"
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        """End the connection."""
        self._lines.close()
        self._connection.close()

    def _next_line(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("QEMU closed its monitor")
        found = json.loads(line)
        assert isinstance(found, dict), f"QMP answers with objects, not {found!r}"
        return found
