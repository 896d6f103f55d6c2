"""Leads connections from a listening socket to an address: the way from outside into a lab.

Runs in the client's namespace; the listening socket, made in the machine's own namespace, is
inherited as descriptor 3. So a client outside reaches the controller, and no interface, address or
route is made outside.
"""

import argparse
import asyncio
import contextlib
import socket

CONNECTIONS_MAX = 256
CONNECT_DEADLINE_SECONDS = 5.0
CHUNK_BYTES = 65536


class Forwarder:
    """Copies bytes both ways between every accepted connection and one of its own."""

    def __init__(self, host: str, port: int) -> None:
        """Lead to this address."""
        self._host = host
        self._port = port
        self._open = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until both sides have said all."""
        if self._open >= CONNECTIONS_MAX:
            writer.close()
            return
        self._open += 1
        try:
            there_reader, there_writer = await asyncio.wait_for(
                asyncio.open_connection(self._host, self._port), CONNECT_DEADLINE_SECONDS
            )
            try:
                await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
            finally:
                there_writer.close()
        except (OSError, TimeoutError):
            pass  # the client sees its connection close, as when a server goes away
        finally:
            self._open -= 1
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()


async def _serve(descriptor: int, host: str, port: int) -> None:
    listening = socket.socket(fileno=descriptor)
    server = await asyncio.start_server(Forwarder(host, port).handle, sock=listening)
    async with server:
        await server.serve_forever()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--descriptor", type=int, default=3)
    parser.add_argument("--to", required=True, metavar="ADDRESS:PORT")
    arguments = parser.parse_args()
    host, _, port = arguments.to.rpartition(":")
    asyncio.run(_serve(arguments.descriptor, host, int(port)))


if __name__ == "__main__":
    main()
