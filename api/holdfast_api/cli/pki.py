"""Commands about the hosts' certificates: `holdfast pki ...`. Talk to nobody; read and write files.

An operator runs them on one machine, which keeps the authority's key, and copies `hosts/NAME/` of
the folder to /etc/holdfast/pki of that host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509

from holdfast_api import pki
from holdfast_api.cli.options import ExitCode
from holdfast_api.cli.show import line, notice, show_table
from holdfast_api.pki import AUTHORITY_DAYS, HOST_DAYS, PkiRefused

DEFAULT_FOLDER = Path("/etc/holdfast/authority")
COPY = "copy {folder} to /etc/holdfast/pki of {host}; its agent uses it for the next connection"

app = typer.Typer(
    help="Certificates by which hosts know each other.",
    no_args_is_help=True,
    epilog="Exchange of an authority: rotate-ca, copy every host's ca.pem, issue --renew for every "
    "host and copy, retire-ca, copy every host's ca.pem.",
)

Folder = Annotated[
    Path, typer.Option("--dir", help="Folder of the authority; its key stays in there.")
]
Days = Annotated[int, typer.Option("--days", min=1, max=pki.DAYS_MAX, help="Days of validity.")]


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn a refusal into a line and an exit code."""
    try:
        yield
    except PkiRefused as error:
        notice(f"holdfast: {error}")
        raise typer.Exit(ExitCode.REFUSED) from error


@app.command()
def init(folder: Folder = DEFAULT_FOLDER, days: Days = AUTHORITY_DAYS) -> None:
    """Make the authority."""
    with _refusals():
        pki.make_authority(folder, days)
    line(f"{folder} has an authority for {days} days; keep {folder / pki.KEY_FILE} to yourself")
    line(f"next, for each host: holdfast pki issue HOST --dir {folder}")


@app.command()
def issue(
    host: Annotated[str, typer.Argument(metavar="HOST", help="The host's name.")],
    folder: Folder = DEFAULT_FOLDER,
    days: Days = HOST_DAYS,
    *,
    renew: Annotated[bool, typer.Option("--renew", help="Replace the one it has.")] = False,
) -> None:
    """Make a host's key and certificate."""
    with _refusals():
        made = pki.issue(folder, host, days, renew=renew)
    line(f"{host} has a certificate for {days} days")
    line(COPY.format(folder=made, host=host))


@app.command("rotate-ca")
def rotate_ca(folder: Folder = DEFAULT_FOLDER, days: Days = AUTHORITY_DAYS) -> None:
    """Make a new authority; the older ones stay trusted."""
    with _refusals():
        pki.rotate_authority(folder, days)
        hosts = [name for name, _ in pki.host_certificates(folder)]
    line(f"a new authority signs; first copy ca.pem to {_all_of(hosts, folder)}")
    line("then issue --renew for every host, then retire-ca")


@app.command("retire-ca")
def retire_ca(folder: Folder = DEFAULT_FOLDER) -> None:
    """Trust none but the authority that signs."""
    with _refusals():
        retired = pki.retire_authorities(folder)
        hosts = [name for name, _ in pki.host_certificates(folder)]
    line(f"{retired} retired; copy ca.pem to {_all_of(hosts, folder)}")


@app.command()
def show(folder: Folder = DEFAULT_FOLDER) -> None:
    """List authorities and hosts' certificates, and until when they are valid."""
    with _refusals():
        authorities = pki.authority_certificates(folder)
        hosts = pki.host_certificates(folder)
    signer = next(certificate for signs, certificate in authorities if signs)
    rows = [
        _row("authority, signs" if signs else "authority", made, "") for signs, made in authorities
    ]
    rows += [_row(f"host {name}", made, _complaint(name, made, signer)) for name, made in hosts]
    show_table(("WHAT", "VALID UNTIL", "DAYS LEFT", "SHA-256", "NOTE"), rows, empty="nothing")


def _row(what: str, certificate: x509.Certificate, complaint: str) -> tuple[str, ...]:
    left_days = pki.seconds_left(certificate) / 86_400
    return (
        what,
        f"{certificate.not_valid_after_utc:%Y-%m-%d}",
        f"{left_days:.0f}",
        pki.fingerprint(certificate)[:16],
        "EXPIRED" if left_days <= 0 else complaint,
    )


def _complaint(name: str, made: x509.Certificate, signer: x509.Certificate) -> str:
    if pki.host_of(made) != name:
        return f"names {pki.host_of(made) or 'no host'}"
    return "" if pki.is_of(made, signer) else "of an older authority: issue --renew"


def _all_of(hosts: list[str], folder: Path) -> str:
    return f"every host, from {folder}/hosts/NAME" + (f" ({', '.join(hosts)})" if hosts else "")
