"""Who a host is, and who its peers are: certificates, read anew for every connection. Reads files.

A host is `holdfast://host/NAME`, a URI among the subject alternative names of its certificate
(RFC 5280, section 4.2.1.6). Names of the web are of no interest here: whoever has a certificate for
some address may not speak as a host, and a host keeps its name when its address changes. Each side
demands a certificate of an authority in its own `ca.pem`, which may name several: that is how an
authority is exchanged without a day on which two halves of a cluster do not know each other.

Nothing is kept between connections, so a file that was renewed is used for the next one, and a
connection that stands goes on. Files are replaced one by one: certificate and key that do not fit
each other (yet) are read again, a few times.
"""

import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from holdfast_agent.config import AgentConfig
from holdfast_api import pki
from holdfast_api.pki import NAME_PREFIX, PkiRefused
from holdfast_api.words import HostId

READ_TRIES = 5
READ_AGAIN_SECONDS = 0.1
EXPIRY_WARNING_DAYS = 30


class IdentityUnusable(Exception):  # noqa: N818 - reads as a sentence where it is raised
    """Our own certificate files can not be used; the message says what to do."""


@dataclass(frozen=True)
class Identity:
    """A host's own name, and where what proves it is kept."""

    host: HostId
    authorities: Path
    certificate: Path
    key: Path

    @classmethod
    def of(cls, config: AgentConfig) -> Self | None:
        """Return the identity that a host is configured with; None with TLS off."""
        if config.tls == "off":
            return None
        return cls(config.host, config.tls_ca, config.tls_certificate, config.tls_key)

    def context(self, *, is_server: bool) -> ssl.SSLContext:
        """Return a context made from the files as they are now. Raises IdentityUnusable."""
        for _ in range(READ_TRIES - 1):
            try:
                return self._context(is_server=is_server)
            except OSError:  # ssl.SSLError is one: half a file, or the pair of two ages
                time.sleep(READ_AGAIN_SECONDS)
        try:
            return self._context(is_server=is_server)
        except OSError as error:
            raise IdentityUnusable(
                f"{self.authorities}, {self.certificate} or {self.key} can not be used: {error}. "
                f"{self.advice}"
            ) from error

    def _context(self, *, is_server: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the name is in a URI, and `host_of` looks at it
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # see `tls`: the end is TCP's own
        if is_server:
            context.num_tickets = 0  # no session is ever taken up again
        context.load_verify_locations(self.authorities)
        context.load_cert_chain(self.certificate, self.key)
        return context

    @property
    def advice(self) -> str:
        """What to do when there is none."""
        return (
            f"Make them with `holdfast pki init` and `holdfast pki issue {self.host}` and copy "
            f'them here, or set tls = "off" on every host (then the peers\' network must be safe).'
        )

    def check(self) -> list[str]:
        """Return warnings about our own certificate. Raises IdentityUnusable if it can not do."""
        try:
            certificates = pki.read_certificates(self.certificate)
            name = pki.host_of(certificates[0])
        except PkiRefused as error:
            raise IdentityUnusable(f"{error}. {self.advice}") from error
        self.context(is_server=True)
        if name != self.host:
            raise IdentityUnusable(
                f"{self.certificate} is the certificate of {name or 'no host'}, and this host is "
                f"{self.host}. {self.advice}"
            )
        left_days = pki.seconds_left(certificates[0]) / 86_400
        renew = f"renew it: `holdfast pki issue {self.host} --renew`"
        if left_days <= 0:
            return [f"{self.certificate} has expired, no peer will accept it; {renew}"]
        if left_days < EXPIRY_WARNING_DAYS:
            return [f"{self.certificate} expires in {left_days:.0f} days; {renew}"]
        return []

    def seconds_left(self) -> float:
        """Return how long our certificate is still valid; not a number if it can not be read."""
        try:
            return pki.seconds_left(pki.read_certificates(self.certificate)[0])
        except PkiRefused:
            return float("nan")


def host_of(certificate: dict[str, Any] | None) -> HostId | None:
    """Return the host that a verified certificate names, as `SSLSocket.getpeercert` returns it.

    None if it names no host, or several. Pure.
    """
    names = (certificate or {}).get("subjectAltName", ())
    hosts = [
        value.removeprefix(NAME_PREFIX)
        for kind, value in names
        if kind == "URI" and value.startswith(NAME_PREFIX)
    ]
    return hosts[0] if len(hosts) == 1 else None
