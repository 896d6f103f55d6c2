"""The hosts' own certificate authority: certificates made, renewed and exchanged. Touches files.

    DIR/ca.pem              the authorities that hosts trust; the one that signs among them
    DIR/ca.key              its key, for root alone; it never leaves this machine
    DIR/hosts/NAME/         all that host NAME needs: ca.pem, host.pem, host.key

The authority that signs is the certificate in `ca.pem` whose key is in `ca.key`, whatever their
order: so an exchange that is interrupted between two files leaves nothing that does not fit.
Every file is written beside its place and moved there, so nobody reads half of one.

A host is named by a URI in the subject alternative names, `holdfast://host/NAME`, and its
certificate serves for both ends of a connection. Keys are of curve P-256.

Source: RFC 5280.
"""

import os
import re
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from holdfast_api.words import NAME_PATTERN, HostId

NAME_PREFIX = "holdfast://host/"
AUTHORITY_DAYS = 3650
HOST_DAYS = 365
DAYS_MAX = 36_500
CLOCKS_APART = timedelta(hours=1)
"""A certificate is valid from so long before it was made: hosts' clocks differ."""
AUTHORITY_FILE, KEY_FILE = "ca.pem", "ca.key"
HOST_FILE, HOST_KEY_FILE = "host.pem", "host.key"
SECRET, PUBLIC = 0o600, 0o644


Validity = tuple[datetime, datetime]


class PkiRefused(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """What was asked for can not be done with these files; the message says what to do."""


# --- what an operator does ------------------------------------------------------------------------


def make_authority(folder: Path, days: int = AUTHORITY_DAYS) -> x509.Certificate:
    """Make an authority in `folder`. Raises PkiRefused if there is one, or the start of one."""
    for name in (AUTHORITY_FILE, KEY_FILE):
        if (folder / name).exists():
            raise PkiRefused(
                f"{folder / name} is there already and is not replaced: `holdfast pki rotate-ca` "
                "exchanges an authority; without the other of ca.pem and ca.key it is of no use"
            )
    _make_folder(folder)
    key, certificate = _new_authority(days)
    _write(folder / KEY_FILE, _key_text(key), SECRET)
    _write(folder / AUTHORITY_FILE, _text([certificate]), PUBLIC)
    return certificate


def issue(
    folder: Path,
    host: HostId,
    days: int = HOST_DAYS,
    *,
    renew: bool = False,
    at: datetime | None = None,
) -> Path:
    """Make key and certificate of a host; return the folder with all that the host needs.

    `days` count from `at`, which is now unless it is given.

    Raises PkiRefused, also for a host that has a certificate, unless `renew`.
    """
    if re.fullmatch(NAME_PATTERN, host) is None:
        raise PkiRefused(f"{host!r} is no name of a host: it must match {NAME_PATTERN}")
    key, authority = _signer(folder)
    made = folder / "hosts" / host
    if (made / HOST_FILE).exists() and not renew:
        raise PkiRefused(f"{made / HOST_FILE} is there already: --renew replaces it")
    host_key = ec.generate_private_key(ec.SECP256R1())
    certificate = _host_certificate(
        host, host_key.public_key(), _validity(days, at), authority, key
    )
    _make_folder(made)
    _write(made / HOST_KEY_FILE, _key_text(host_key), SECRET)
    _write(made / HOST_FILE, _text([certificate]), PUBLIC)
    _write(made / AUTHORITY_FILE, (folder / AUTHORITY_FILE).read_bytes(), PUBLIC)
    return made


def rotate_authority(folder: Path, days: int = AUTHORITY_DAYS) -> x509.Certificate:
    """Make a new authority that signs from now on; the old ones stay trusted.

    The hosts' `ca.pem` are written anew, their certificates are not. Raises PkiRefused.
    """
    _signer(folder)
    trusted = read_certificates(folder / AUTHORITY_FILE)
    key, certificate = _new_authority(days)
    _write_bundle(folder, [certificate, *trusted])
    _write(folder / KEY_FILE, _key_text(key), SECRET)
    return certificate


def retire_authorities(folder: Path) -> int:
    """Trust none but the authority that signs; return how many were retired.

    Raises PkiRefused while a host's certificate is of another one.
    """
    _, authority = _signer(folder)
    strangers = [name for name, made in host_certificates(folder) if not is_of(made, authority)]
    if strangers:
        raise PkiRefused(
            f"certificates of {', '.join(strangers)} are of an older authority: "
            "`holdfast pki issue HOST --renew` for each, copy them there, then retire it"
        )
    retired = len(read_certificates(folder / AUTHORITY_FILE)) - 1
    _write_bundle(folder, [authority])
    return retired


# --- what is there --------------------------------------------------------------------------------


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Return the certificates in a PEM file, at least one. Raises PkiRefused."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise PkiRefused(f"{path} can not be read: {error.strerror}") from error
    except ValueError as error:
        raise PkiRefused(f"{path} is no certificate: {error}") from error


def authority_certificates(folder: Path) -> list[tuple[bool, x509.Certificate]]:
    """Return the trusted authorities, each with whether it signs. Raises PkiRefused."""
    _, signer = _signer(folder)
    trusted = read_certificates(folder / AUTHORITY_FILE)
    return [(certificate == signer, certificate) for certificate in trusted]


def host_certificates(folder: Path) -> list[tuple[HostId, x509.Certificate]]:
    """Return the hosts' certificates by name. Raises PkiRefused."""
    return [
        (path.parent.name, read_certificates(path)[0])
        for path in sorted(folder.glob(f"hosts/*/{HOST_FILE}"))
    ]


def host_of(certificate: x509.Certificate) -> HostId | None:
    """Return the host that a certificate names; None if it is not exactly one."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    hosts = [uri.removeprefix(NAME_PREFIX) for uri in uris if uri.startswith(NAME_PREFIX)]
    return hosts[0] if len(hosts) == 1 else None


def is_of(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Say whether `authority` signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def seconds_left(certificate: x509.Certificate) -> float:
    """Return how long it is still valid; negative if it is not any more."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds()


def fingerprint(certificate: x509.Certificate) -> str:
    """Return its SHA-256 in hexadecimal, as `openssl x509 -fingerprint -sha256` without colons."""
    return certificate.fingerprint(hashes.SHA256()).hex()


# --- making ---------------------------------------------------------------------------------------


def _new_authority(days: int) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    # Two authorities of one cluster must not have one name: chains are built by it.
    name = _name(f"Holdfast authority {secrets.token_hex(4)}")
    usage = _key_usage(signs_certificates=True)
    certificate = (
        _begin(name, name, key.public_key(), _validity(days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _host_certificate(
    host: HostId,
    public_key: ec.EllipticCurvePublicKey,
    validity: Validity,
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    names = [x509.UniformResourceIdentifier(NAME_PREFIX + host)]
    return (
        _begin(_name(host), authority.subject, public_key, validity)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        .sign(key, hashes.SHA256())
    )


def _begin(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, validity: Validity
) -> x509.CertificateBuilder:
    begin, end = validity
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _validity(days: int, at: datetime | None = None) -> Validity:
    if not 0 < days <= DAYS_MAX:
        raise PkiRefused(f"a certificate is valid for 1 to {DAYS_MAX} days, not {days}")
    begin = at or datetime.now(UTC)
    return begin - CLOCKS_APART, begin + timedelta(days=days)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# --- files ----------------------------------------------------------------------------------------


def _signer(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Return key and certificate of the authority that signs. Raises PkiRefused."""
    path = folder / KEY_FILE
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise PkiRefused(
            f"there is no authority in {folder}: `holdfast pki init --dir {folder}` makes one"
        ) from error
    except OSError as error:
        raise PkiRefused(f"{path} can not be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise PkiRefused(f"{path} is no private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PkiRefused(f"{path} is a key of another kind than `holdfast pki init` makes")
    for certificate in read_certificates(folder / AUTHORITY_FILE):
        if certificate.public_key() == key.public_key():
            return key, certificate
    raise PkiRefused(f"{folder / AUTHORITY_FILE} has no certificate of the key in {path}")


def _write_bundle(folder: Path, trusted: list[x509.Certificate]) -> None:
    text = _text(trusted)
    _write(folder / AUTHORITY_FILE, text, PUBLIC)
    for path in sorted(folder.glob(f"hosts/*/{AUTHORITY_FILE}")):
        _write(path, text, PUBLIC)


def _text(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _key_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PkiRefused(f"{path} can not be made: {error.strerror}") from error


def _write(path: Path, text: bytes, mode: int) -> None:
    """Put a file into its place whole, or leave what was there. Raises PkiRefused."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PkiRefused(f"{path} can not be written: {error.strerror}") from error
