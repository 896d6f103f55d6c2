"""`holdfast pki`: an operator's way from no authority to an exchanged one."""

from datetime import timedelta
from pathlib import Path

import pytest
from tests.unit.cli.conftest import Run

from holdfast_api import pki


@pytest.fixture
def where(tmp_path: Path) -> tuple[str, str]:
    return "--dir", str(tmp_path / "pki")


def test_from_nothing_to_an_exchanged_authority(holdfast: Run, where: tuple[str, str]) -> None:
    folder = Path(where[1])
    started = holdfast("pki", "init", *where)
    assert started.code == 0
    assert "for 3650 days" in started.out
    for host in ("h1", "h2"):
        issued = holdfast("pki", "issue", host, *where)
        assert issued.code == 0
        assert f"copy {folder}/hosts/{host} to /etc/holdfast/pki of {host}" in issued.out
    listed = holdfast("pki", "show", *where).out.splitlines()
    assert [line.split("  ")[0] for line in listed[1:]] == [
        "authority, signs",
        "host h1",
        "host h2",
    ]
    assert holdfast("pki", "rotate-ca", *where).code == 0
    assert holdfast("pki", "show", *where).out.count("of an older authority") == 2
    refused = holdfast("pki", "retire-ca", *where)
    assert refused.code == 3
    assert "certificates of h1, h2 are of an older authority" in refused.err
    for host in ("h1", "h2"):
        assert holdfast("pki", "issue", host, "--renew", *where).code == 0
    assert holdfast("pki", "retire-ca", *where).out.startswith("1 retired; copy ca.pem")
    assert "older" not in holdfast("pki", "show", *where).out


def test_what_is_refused_is_one_line_and_exit_code_3(holdfast: Run, where: tuple[str, str]) -> None:
    holdfast("pki", "init", *where)
    for arguments in (("init",), ("issue", "NO NAME")):
        result = holdfast("pki", *arguments, *where)
        assert (result.code, result.out) == (3, "")
        assert len(result.err.splitlines()) == 1


def test_an_expired_or_misplaced_certificate_is_marked(
    holdfast: Run, where: tuple[str, str]
) -> None:
    folder = Path(where[1])
    holdfast("pki", "init", *where)
    (authority,) = pki.read_certificates(folder / "ca.pem")
    pki.issue(folder, "old", 1, at=authority.not_valid_before_utc - timedelta(days=2))
    moved = pki.issue(folder, "h1")
    moved.rename(moved.with_name("h2"))
    shown = holdfast("pki", "show", *where).out
    assert "EXPIRED" in shown
    assert "names h1" in shown
