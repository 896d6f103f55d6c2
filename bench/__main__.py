"""`./dev bench [NAME ...]`: run the named measurements, or all of them.

| name        | measures                                                                  |
|-------------|---------------------------------------------------------------------------|
| `memory`    | harvest and copy of guest memory against a numpy copy of as many pages     |
| `transport` | frames over loopback against raw sockets                                   |
| `pause`     | the pause of a protected guest, small and large, against its parts         |
| `latency`   | a Redis PING through a protected guest, output-triggered and at an interval |
| `idle`      | CPU of both sides for a guest that does nothing                             |
| `seeding`   | rate of filling a backup, and how long the guest ever stood for it          |
| `counting`  | 10,000 INCRs through three deaths of the host, with the failovers' times    |
| `encoding`  | checkpoints of a Redis under writes: encoded each way, fast and slow links  |
| `planning`  | one pass of the planner over 1,000 hosts and 10,000 protections             |
| `claims`    | a claim while 1,000 agents beat and poll against three controllers          |
"""

import runpy
import sys

from bench import control_plane, encoding, planning, protection

MEASUREMENTS = {
    "pause": protection.pause,
    "latency": protection.latency,
    "idle": protection.idle,
    "seeding": protection.seeding,
    "counting": protection.counting,
    "encoding": encoding.encoding,
    "planning": planning.planning,
    "claims": control_plane.claims,
}
PROGRAMS = ("memory", "transport")


def main() -> int:
    """Run what was asked for; return 2 for a name that is not known."""
    names = sys.argv[1:] or [*PROGRAMS, *MEASUREMENTS]
    unknown = [name for name in names if name not in PROGRAMS and name not in MEASUREMENTS]
    if unknown:
        print(f"unknown: {', '.join(unknown)}\n\n{__doc__}")
        return 2
    for name in names:
        print(f"== {name}", flush=True)
        if name in MEASUREMENTS:
            MEASUREMENTS[name]()
        else:
            sys.argv = [name]
            runpy.run_module(f"bench.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
