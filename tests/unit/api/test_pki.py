"""The hosts' own certificate authority: what is made, what is refused, and who may read it."""

import ssl
import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from holdfast_api import pki
from holdfast_api.pki import PkiRefused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pki"
    pki.make_authority(made)
    return made


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_authority_signs_for_ten_years_and_nobody_else_reads_its_key(folder: Path) -> None:
    (certificate,) = pki.read_certificates(folder / "ca.pem")
    assert pki.is_of(certificate, certificate)
    assert 3649 < pki.seconds_left(certificate) / 86_400 <= 3650
    assert pki.host_of(certificate) is None
    assert (mode_of(folder), mode_of(folder / "ca.key")) == (0o700, 0o600)


def test_an_authority_is_never_replaced(folder: Path) -> None:
    before = (folder / "ca.key").read_bytes(), (folder / "ca.pem").read_bytes()
    with pytest.raises(PkiRefused, match=r"ca\.pem is there already.*rotate-ca"):
        pki.make_authority(folder)
    (folder / "ca.pem").unlink()
    with pytest.raises(PkiRefused, match=r"ca\.key is there already"):
        pki.make_authority(folder)
    assert (folder / "ca.key").read_bytes() == before[0]


def test_a_hosts_certificate_names_it_and_serves_for_both_ends(folder: Path) -> None:
    made = pki.issue(folder, "rack-1.alpha_2")
    (certificate,) = pki.read_certificates(made / "host.pem")
    assert pki.host_of(certificate) == "rack-1.alpha_2"
    (authority,) = pki.read_certificates(folder / "ca.pem")
    assert pki.is_of(certificate, authority)
    assert 364 < pki.seconds_left(certificate) / 86_400 <= 365
    uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(uses) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not constraints.ca
    assert mode_of(made / "host.key") == 0o600
    assert (made / "ca.pem").read_bytes() == (folder / "ca.pem").read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(made / "host.pem", made / "host.key")  # they fit each other


def test_a_hosts_certificate_is_replaced_only_on_demand(folder: Path) -> None:
    made = pki.issue(folder, "h1")
    before = (made / "host.pem").read_bytes(), (made / "host.key").read_bytes()
    with pytest.raises(PkiRefused, match="--renew replaces it"):
        pki.issue(folder, "h1")
    assert (made / "host.pem").read_bytes() == before[0]
    pki.issue(folder, "h1", renew=True)
    assert (made / "host.pem").read_bytes() != before[0]
    assert (made / "host.key").read_bytes() != before[1]


@pytest.mark.parametrize("name", ["", "H1", "../h1", "h1/x", "h1\n", "x" * 64, ".", "h1 "])
def test_what_is_no_hosts_name_gets_no_certificate_and_no_folder(folder: Path, name: str) -> None:
    with pytest.raises(PkiRefused, match="no name of a host"):
        pki.issue(folder, name)
    assert not (folder / "hosts").exists()


@pytest.mark.parametrize("days", [0, -1, pki.DAYS_MAX + 1])
def test_days_that_make_no_sense_are_refused(folder: Path, tmp_path: Path, days: int) -> None:
    with pytest.raises(PkiRefused, match="is valid for 1 to"):
        pki.issue(folder, "h1", days)
    with pytest.raises(PkiRefused, match="is valid for 1 to"):
        pki.make_authority(tmp_path / "other", days)


def test_after_an_exchange_both_authorities_are_trusted_and_the_new_one_signs(
    folder: Path,
) -> None:
    (old,) = pki.read_certificates(folder / "ca.pem")
    made = pki.issue(folder, "h1")
    new = pki.rotate_authority(folder)
    assert pki.read_certificates(folder / "ca.pem") == [new, old]
    assert pki.read_certificates(made / "ca.pem") == [new, old]
    assert pki.authority_certificates(folder) == [(True, new), (False, old)]
    assert new.subject != old.subject
    assert pki.is_of(pki.host_certificates(folder)[0][1], old)
    with pytest.raises(PkiRefused, match="certificates of h1 are of an older authority"):
        pki.retire_authorities(folder)
    pki.issue(folder, "h1", renew=True)
    assert pki.is_of(pki.host_certificates(folder)[0][1], new)
    assert pki.retire_authorities(folder) == 1
    assert pki.read_certificates(made / "ca.pem") == [new]
    assert pki.retire_authorities(folder) == 0


def test_an_exchange_that_was_interrupted_leaves_the_old_authority_at_work(folder: Path) -> None:
    (old,) = pki.read_certificates(folder / "ca.pem")
    key = (folder / "ca.key").read_bytes()
    pki.rotate_authority(folder)
    (folder / "ca.key").write_bytes(key)  # as if the new key had not been written
    made = pki.issue(folder, "h1")
    assert pki.is_of(pki.read_certificates(made / "host.pem")[0], old)
    pki.rotate_authority(folder)
    assert len(pki.read_certificates(folder / "ca.pem")) == 3


def test_files_that_do_not_fit_are_refused_with_their_names(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PkiRefused, match=r"there is no authority in .*`holdfast pki init --dir"):
        pki.issue(tmp_path / "nothing", "h1")
    pki.make_authority(tmp_path / "other")
    (folder / "ca.pem").write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
    with pytest.raises(PkiRefused, match="has no certificate of the key in"):
        pki.issue(folder, "h1")
    (folder / "ca.pem").write_text("nothing of use")
    with pytest.raises(PkiRefused, match=r"ca\.pem is no certificate"):
        pki.issue(folder, "h1")
    (folder / "ca.key").write_text("nothing of use")
    with pytest.raises(PkiRefused, match=r"ca\.key is no private key"):
        pki.issue(folder, "h1")
    with pytest.raises(PkiRefused, match="can not be read: No such file"):
        pki.read_certificates(tmp_path / "none.pem")


def test_a_folder_that_can_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PkiRefused, match="can not be made"):
        pki.make_authority(tmp_path / "file" / "pki")


def test_no_half_of_a_file_is_left_and_nothing_beside_it(folder: Path) -> None:
    pki.issue(folder, "h1")
    pki.issue(folder, "h1", renew=True)
    names = {path.name for path in folder.rglob("*")}
    assert names == {"ca.pem", "ca.key", "hosts", "h1", "host.pem", "host.key"}


def test_what_has_expired_says_so(folder: Path) -> None:
    (authority,) = pki.read_certificates(folder / "ca.pem")
    made = pki.issue(folder, "h1", 1, at=authority.not_valid_before_utc - timedelta(days=2))
    left = pki.seconds_left(pki.read_certificates(made / "host.pem")[0])
    assert -3 * 86_400 < left < 0
