"""The process of one protected VM on one host, started by the agent: primary's or backup's side.

`python -m holdfast_agent.worker ORDER`, where ORDER is JSON from the supervisor. One process for
each VM: its capture shares no interpreter lock with anything else, and a fault stays in one VM.
An assertion that fails ends this process, which is a failover, never a shrug.

| mode      | role    | does                                                                  |
|-----------|---------|-----------------------------------------------------------------------|
| `protect` | primary | seed the backup, then checkpoint until the generation is over          |
| `protect` | backup  | receive, acknowledge; take over if the primary is lost, the claim won   |
| `recover` | primary | an earlier worker died: claim, then go on alone or destroy the VM      |
| `clean`   | primary | this host goes on alone for certain: let output flow, take plugs out   |

Start reading at `worker_primary.protect` or `worker_backup.protect`.
"""

import gc
import json
import logging
import sys
from pathlib import Path

from holdfast_agent import worker_backup, worker_primary
from holdfast_agent.config import AgentConfig
from holdfast_agent.worker_order import WorkerOrder
from holdfast_api.messages import Assignment
from holdfast_api.words import Role


def main() -> int:
    """Carry out the order given as the only argument."""
    assert __debug__
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s.%(msecs)03d %(levelname)s %(message)s", datefmt="%T"
    )
    text = json.loads(sys.argv[1])
    order = WorkerOrder(
        mode=text["mode"],
        socket=Path(text["socket"]),
        qmp_socket=Path(text["qmp_socket"]),
        assignment=Assignment.model_validate(text["assignment"]),
        config=AgentConfig.model_validate(text["config"]),
    )
    # No garbage collection in a pause: what exists now stays, cycles made later are few.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1000)
    if order.assignment.role is Role.BACKUP:
        worker_backup.protect(order)
    elif order.mode == "protect":
        worker_primary.protect(order)
    else:
        worker_primary.recover(order, is_certain=order.mode == "clean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
