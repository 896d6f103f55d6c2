"""A worker that speaks the protocol and does nothing: `stub_worker.py -m MODULE ORDER`.

It appends its order and all it hears to `RUN_DIR/heard`, one JSON a line, says what the lines of
`RUN_DIR/says` are, and introduces the QEMU whose pid stands in `RUN_DIR/qemu`. An order of a newer
generation ends it with a last word.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from holdfast_agent.checkpoint.waiting import wait_readable
from holdfast_agent.checkpoint.worker_messages import TO_AGENT, Finished, Introduced, Ordered
from holdfast_agent.host.agent_channel import AgentChannel
from holdfast_agent.host.processes import start_ticks_of

LIFE_SECONDS = 60.0


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[3])
    run_dir = Path(order["config"]["run_dir"])
    assignment = order["assignment"]
    qemu = run_dir / "qemu"
    qemu_pid = int(qemu.read_text()) if qemu.exists() else 0
    channel = AgentChannel(
        Path(order["socket"]),
        Introduced(
            vm=assignment["vm"],
            host=order["config"]["host"],
            generation=assignment["generation"],
            role=assignment["role"],
            pid=os.getpid(),
            qemu_pid=qemu_pid,
            qemu_start_ticks=start_ticks_of(qemu_pid) if qemu_pid else 0,
        ),
    )
    note(run_dir, {"type": "started", "mode": order["mode"], "pid": os.getpid(), **assignment})
    says = run_dir / "says"
    deadline = time.monotonic() + LIFE_SECONDS
    while time.monotonic() < deadline:
        wait_readable(channel.filenos(), 100_000_000)
        for message, _ in channel.receive():
            note(run_dir, message.model_dump(mode="json"))
            newer = isinstance(message, Ordered) and message.assignment.generation
            if newer and newer > assignment["generation"]:
                channel.send(Finished(outcome="told to", vm_lives=False))
                channel.close()
                return
        if channel.is_connected and says.exists():
            for line in says.read_text().splitlines():
                channel.send(TO_AGENT.validate_json(line))
                if '"finished"' in line:
                    says.unlink()
                    channel.close()
                    return
            says.unlink()


def note(run_dir: Path, what: dict[str, Any]) -> None:
    with (run_dir / "heard").open("a") as file:
        file.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main()
