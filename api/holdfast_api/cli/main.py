"""The command `holdfast`: puts the commands together and turns errors into lines and exit codes.

Reads the entry points of group `holdfast.commands`: each is a typer app that becomes a sub-command
(the lab is one). One that is not called is loaded for `--help` only, so that a broken or slow one
disturbs no other command.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

import typer

from holdfast_api import __version__
from holdfast_api.cli import events, fleet, protections
from holdfast_api.cli.options import EXIT_CODES_HELP, ExitCode, exit_code_of, line_of
from holdfast_api.cli.show import line, notice
from holdfast_api.errors import HoldfastError

COMMANDS_GROUP = "holdfast.commands"


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """Return the command with the plugins that `arguments` (without the program's name) needs."""
    app = typer.Typer(
        name="holdfast",
        help="Fault tolerance for QEMU virtual machines by continuous checkpointing.",
        epilog=EXIT_CODES_HELP,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for commands in (protections.app, fleet.app, events.app):
        app.add_typer(commands)
    app.add_typer(fleet.host_app, name="host")
    app.add_typer(fleet.policies_app, name="policies")
    overview = not arguments or arguments[0].startswith("-")
    for plugin in entry_points(group=COMMANDS_GROUP):
        if overview or plugin.name == arguments[0]:
            _add_plugin(app, plugin)
    return app


def main() -> None:
    """Run the command line; every way it ends has an exit code of `ExitCode`."""
    try:
        build_app(sys.argv[1:])()
    except HoldfastError as error:
        notice(line_of(error))
        sys.exit(exit_code_of(error))
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def _show_version(wanted: bool) -> None:
    if wanted:
        line(f"holdfast {__version__}")
        raise typer.Exit


def _root(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    assert not version, "the callback has ended the program"


def _add_plugin(app: typer.Typer, plugin: EntryPoint) -> None:
    """Add a plugin's commands; one that can not be loaded is named, and the others stay usable."""
    try:
        commands = plugin.load()
    except (ImportError, AttributeError) as error:
        notice(f"holdfast: the commands of {plugin.name!r} can not be loaded: {error}")
        return
    app.add_typer(commands, name=plugin.name)


if __name__ == "__main__":
    main()
