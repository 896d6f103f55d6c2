"""The command `holdfast-controller`: read the options, run until told to stop.

Reads a TOML file and the environment, writes its log to standard error. Refuses to run with
assertions switched off: they guard invariants.

| exit code | means                                       |
|-----------|---------------------------------------------|
| 0         | stopped as asked                            |
| 1         | a fault of ours; the log has it             |
| 2         | the command line or the options are no good |
| 3         | the address can not be listened on          |
"""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import holdfast_api
from holdfast_controller.config import ConfigFaults, load_config
from holdfast_controller.http.app import openapi_document
from holdfast_controller.service import serve

EXIT_BAD_OPTIONS = 2
EXIT_CAN_NOT_LISTEN = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    if sys.flags.optimize:
        print(
            "holdfast-controller does not run with python -O: its checks are needed",
            file=sys.stderr,
        )
        return EXIT_BAD_OPTIONS
    options = _parser().parse_args(arguments)
    if options.command == "openapi":
        sys.stdout.write(openapi_document())
        return 0
    try:
        config = load_config(options.config, os.environ)
        _set_up_logging(config.log_level)
        asyncio.run(serve(config))
    except ConfigFaults as error:
        print(f"holdfast-controller: {error}", file=sys.stderr)
        return EXIT_BAD_OPTIONS
    except OSError as error:
        print(f"holdfast-controller: can not listen: {error}", file=sys.stderr)
        return EXIT_CAN_NOT_LISTEN
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="holdfast-controller",
        description="Holdfast's control plane: REST API, placement, claims. Needs etcd.",
    )
    parser.add_argument("--version", action="version", version=holdfast_api.__version__)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file with the options; HOLDFAST_CONTROLLER_* in the environment overrides it",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("openapi", help="print the OpenAPI document and exit")
    return parser


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


if __name__ == "__main__":
    sys.exit(main())
