"""What joins the hosts of a case."""

import socket
import subprocess

from tests.lab.booted.channel import Channel

RDMA_UP = (
    "modprobe -a rdma_rxe ib_uverbs && rdma link add rxe0 type rxe netdev eth0 && "
    "until test -e /dev/infiniband/uverbs0; do sleep 0.1; done"
)
PINGPONG = ("ibv_rc_pingpong", "-d", "rxe0", "-g", "1", "-n", "100")


def test_commands_run_in_the_other_host(other_host: Channel) -> None:
    assert other_host.run(["hostname"]).checked() == "booted2\n"
    assert socket.gethostname() == "booted1"


def test_large_frames_cross_the_network(other_host: Channel) -> None:
    with socket.create_server(("10.8.0.1", 5000)) as listener:
        words = (
            "import socket; socket.create_connection(('10.8.0.1', 5000)).sendall(bytes(1 << 20))"
        )
        sender = other_host.start(["python3", "-S", "-c", words])
        connection, _ = listener.accept()
        with connection:
            received = 0
            while data := connection.recv(1 << 16):
                received += len(data)
            maximum = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    sender.wait().checked()
    assert received == 1 << 20
    assert maximum > 8000


def test_rdma_crosses_the_network(other_host: Channel) -> None:
    other_host.run(["sh", "-c", RDMA_UP]).checked()
    subprocess.run(["sh", "-c", RDMA_UP], check=True, timeout=60)
    server = other_host.start(PINGPONG, seconds_max=60)
    client = subprocess.run(
        ["sh", "-c", f"until {' '.join(PINGPONG)} 10.8.0.2; do sleep 0.2; done"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "100 iters" in client.stdout
    assert "100 iters" in server.wait().checked()
