"""How long the kernel's plug takes of a pause, and of a release. Runs in a booted host, as root.

For one, two and four taps: `close_epoch`, which is all that holding output costs in a pause, and
`release_one`, with a few packets in each epoch, and the time from a release to the packet at a
station on the bridge. A short Python loop stands beside them: an emulated processor that is shared
shows there how much slower it is than a real one, and the least of many is what is least disturbed.

    python bench/plug.py [--epochs 200]

Needs Linux with sch_plug, ifb, act_mirred, cls_matchall and tun; makes taps, a bridge and IFBs in
this machine's network namespace, and removes them.
"""

import argparse
import os
import time
from collections.abc import Callable

from tests.lab.inside.plugged import IPV4, network, open_plug, sh

PACKETS = 4
GUEST = b"\2\0\0\0\xaa"
"""What the addresses of the guest's NICs begin with."""


def timed_us(action: Callable[[], object]) -> float:
    """Return how long `action` took, in microseconds."""
    began = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - began) / 1e3


def line(label: str, values_us: list[float]) -> str:
    """Return one line of the table."""
    ordered = sorted(values_us)
    median, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"{label:<28} {ordered[0]:8.1f} {median:8.1f} {p99:9.1f} {ordered[-1]:9.1f}"


def measure(tap_count: int, epochs: int) -> list[str]:
    """Return the lines for so many taps."""
    close_us, release_us, arrive_us = [], [], []
    with network(tap_count) as lan:
        plug = open_plug(lan.taps)
        plug.install()
        plug.hold()
        for _ in range(epochs):
            said = [
                each for nic in range(tap_count) for each in lan.say(*[IPV4] * PACKETS, nic=nic)
            ]
            close_us.append(timed_us(plug.close_epoch))
            began = time.perf_counter_ns()
            release_us.append(timed_us(plug.release_one))
            while lan.station.recv(2048)[6:11] != GUEST:
                pass
            arrive_us.append((time.perf_counter_ns() - began) / 1e3)
            heard = 1
            while heard < len(said):
                heard += len(lan.hear())
        plug.release_all()
        plug.remove()
    name = f"{tap_count} NIC" + "s" * (tap_count > 1)
    return [
        line(f"{name}: close_epoch", close_us),
        line(f"{name}: release_one", release_us),
        line(f"{name}: release to receiver", arrive_us),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    arguments = parser.parse_args()
    sh("modprobe -a tun bridge veth ifb sch_plug")
    print(f"{os.uname().release}, {arguments.epochs} epochs of {PACKETS} packets a NIC")
    print(f"{'microseconds':<28} {'least':>8} {'median':>8} {'p99':>9} {'max':>9}")
    passes_us = [timed_us(lambda: sum(range(1000))) for _ in range(arguments.epochs)]
    print(line("(sum(range(1000)))", passes_us), flush=True)
    for tap_count in (1, 2, 4):
        print("\n".join(measure(tap_count, arguments.epochs)), flush=True)


if __name__ == "__main__":
    main()
