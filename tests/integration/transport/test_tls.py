"""TLS between hosts: who is believed, what passes the wire, and files that change meanwhile."""

import dataclasses
import fcntl
import os
import select
import shutil
import socket
import ssl
import termios
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from tests.integration.transport.certificates import (
    Authority,
    authority_in,
    cluster,
    identity_in,
    secured,
)
from tests.integration.transport.loopback import DEADLINE_SECONDS, Sockets, next_frame, over
from tests.integration.transport.relay import Relay

from holdfast_agent.core.failures import PeerLost
from holdfast_agent.core.frames import MEBIBYTE, FrameKind
from holdfast_agent.transport.identity import Identity, IdentityUnusable, host_of
from holdfast_agent.transport.tls import RECORD_BYTES, TlsStream, records_of, shake_hands
from holdfast_api import pki
from holdfast_api.words import ClaimReason, Role

Pair = Callable[..., Sockets]


def failures(
    sockets: Sockets, ours: Identity, theirs: Identity
) -> tuple[PeerLost | None, PeerLost | None]:
    """Shake hands; return what each side says of it, the client only when it begins to speak."""
    found: list[PeerLost | None] = [None, None]

    def serve() -> None:
        try:
            context = theirs.context(is_server=True)
            shake_hands(sockets[1], context, is_server=True, timeout_seconds=10).close()
        except PeerLost as error:
            found[1] = error

    server = threading.Thread(target=serve)
    server.start()
    try:
        context = ours.context(is_server=False)
        tls = shake_hands(sockets[0], context, is_server=False, timeout_seconds=10)
        with over(tls, Role.PRIMARY) as connection:
            connection.send(FrameKind.PAGES, 0, [b"x"])
            next_frame(connection)
    except PeerLost as error:
        found[0] = error
    server.join(DEADLINE_SECONDS)
    return found[0], found[1]


def expired(folder: Path, host: str) -> Identity:
    """Return the identity of a host whose certificate of `cluster` ended some days ago."""
    shutil.copytree(cluster().folder, folder)
    (authority,) = pki.read_certificates(folder / "ca.pem")
    made = pki.issue(folder, host, 1, at=authority.not_valid_before_utc - timedelta(days=5))
    return identity_in(made, host)


# --- who is believed ------------------------------------------------------------------------------


def test_each_side_learns_the_name_of_the_other(tcp_sockets: Pair) -> None:
    primary, backup = secured(*tcp_sockets())
    with primary, backup:
        assert host_of(primary.getpeercert()) == "h2"
        assert host_of(backup.getpeercert()) == "h1"
        assert {primary.version(), backup.version()} == {"TLSv1.3"}
        assert primary.session_reused is backup.session_reused is False


def test_a_host_of_another_authority_is_refused_and_both_sides_say_why(
    tcp_sockets: Pair, tmp_path: Path
) -> None:
    stranger = authority_in(tmp_path / "other").identity("h1")
    client, server = failures(tcp_sockets(), stranger, cluster().identity("h2"))
    assert server is not None
    assert server.reason == ClaimReason.PEER_FAILED
    assert client is not None
    # The client meets a server that it does not know either, and says so first.
    assert "give both hosts the same ca.pem" in server.explanation
    assert "give both hosts the same ca.pem" in client.explanation


def test_a_client_alone_of_another_authority_is_refused(tcp_sockets: Pair, tmp_path: Path) -> None:
    stranger = authority_in(tmp_path / "other").identity("h1")
    both_known = dataclasses.replace(stranger, authorities=cluster().identity("h2").authorities)
    client, server = failures(tcp_sockets(), both_known, cluster().identity("h2"))
    assert server is not None
    assert "not of our authority" in server.explanation
    assert client is not None
    assert "does not know the authority of our certificate" in client.explanation


@pytest.mark.parametrize("side", ["client", "server"])
def test_an_expired_certificate_is_refused_and_both_sides_say_what_to_do(
    tcp_sockets: Pair, tmp_path: Path, side: str
) -> None:
    old = expired(tmp_path / "old", "h9")
    ours = old if side == "client" else cluster().identity("h1")
    theirs = old if side == "server" else cluster().identity("h2")
    for lost in failures(tcp_sockets(), ours, theirs):
        assert lost is not None
        assert "expired" in lost.explanation
        assert "--renew" in lost.explanation
    assert any("has expired" in warning for warning in old.check())


def test_a_client_without_a_certificate_is_refused(tcp_sockets: Pair) -> None:
    primary, backup = tcp_sockets()
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(cluster().identity("h2").authorities)
    refusals: list[PeerLost] = []

    def serve() -> None:
        context = cluster().identity("h2").context(is_server=True)
        with pytest.raises(PeerLost) as caught:
            shake_hands(backup, context, is_server=True, timeout_seconds=10)
        refusals.append(caught.value)

    server = threading.Thread(target=serve)
    server.start()
    tls = shake_hands(primary, bare, is_server=False, timeout_seconds=10)
    with over(tls, Role.PRIMARY) as connection, pytest.raises(PeerLost, match="no certificate"):
        next_frame(connection)
    server.join(DEADLINE_SECONDS)
    assert "it has no certificate" in refusals[0].explanation


def test_an_older_tls_is_refused(tcp_sockets: Pair) -> None:
    primary, backup = tcp_sockets()
    older = cluster().identity("h1").context(is_server=False)
    older.minimum_version = older.maximum_version = ssl.TLSVersion.TLSv1_2
    refusals: list[PeerLost] = []

    def serve() -> None:
        context = cluster().identity("h2").context(is_server=True)
        with pytest.raises(PeerLost) as caught:
            shake_hands(backup, context, is_server=True, timeout_seconds=10)
        refusals.append(caught.value)

    server = threading.Thread(target=serve)
    server.start()
    with pytest.raises(PeerLost):
        shake_hands(primary, older, is_server=False, timeout_seconds=10)
    server.join(DEADLINE_SECONDS)
    assert "older TLS than 1.3" in refusals[0].explanation


@pytest.mark.parametrize("is_server", [True, False])
def test_a_peer_that_says_nothing_is_given_up_in_time(
    tcp_sockets: Pair, *, is_server: bool
) -> None:
    ours, _theirs = tcp_sockets()
    context = cluster().identity("h2").context(is_server=is_server)
    with pytest.raises(PeerLost) as caught:
        shake_hands(ours, context, is_server=is_server, timeout_seconds=0.1)
    assert caught.value.reason == ClaimReason.PEER_SILENT
    assert ours.fileno() == -1, "the socket is closed"


@pytest.mark.parametrize(
    ("certificate", "host"),
    [
        ({"subjectAltName": (("URI", "holdfast://host/h1"),)}, "h1"),
        ({"subjectAltName": (("DNS", "h1"), ("URI", "https://h1/"))}, None),
        ({"subjectAltName": (("DNS", "holdfast://host/h1"),)}, None),
        ({"subjectAltName": (("URI", "holdfast://host/h1"), ("URI", "holdfast://host/h2"))}, None),
        ({"subject": ((("commonName", "h1"),),)}, None),
        ({}, None),
        (None, None),
    ],
)
def test_only_one_uri_of_ours_names_a_host(
    certificate: dict[str, object] | None, host: str | None
) -> None:
    assert host_of(certificate) == host


# --- what passes the wire -------------------------------------------------------------------------


def test_nothing_of_a_page_is_readable_on_the_wire(tcp_sockets: Pair) -> None:
    with Relay(tcp_sockets) as relay:
        primary_socket, backup_socket = secured(*relay.ends)
        primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
        secret = b"the guest's own words "
        primary.send(FrameKind.PAGES, 1, [secret * 4096])
        assert bytes(next_frame(backup).payload) == secret * 4096
        passed = relay.passed
        primary.close()
        backup.close()
    assert len(passed) > len(secret) * 4096
    assert secret not in passed
    assert b"HFFR" not in passed


@pytest.mark.parametrize("offset", [0, 3, 5, 100, 16_000, 100_000])
def test_a_byte_changed_on_the_wire_ends_the_connection_and_nothing_of_it_is_taken(
    tcp_sockets: Pair, offset: int
) -> None:
    with Relay(tcp_sockets) as relay:
        primary_socket, backup_socket = secured(*relay.ends)
        primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
        primary.send(FrameKind.PAGES, 1, [b"sound"])
        assert bytes(next_frame(backup).payload) == b"sound"
        relay.damage_after(offset)
        primary.send(FrameKind.PAGES, 1, [bytes(200_000)])
        with pytest.raises(PeerLost) as caught:
            next_frame(backup)
        assert caught.value.reason == ClaimReason.STREAM_BROKEN
        with pytest.raises(PeerLost):
            next_frame(backup)
        assert backup.counters.received_frames == 1
        primary.close()
        backup.close()


def test_a_stream_that_somebody_cuts_is_a_lost_peer(tcp_sockets: Pair) -> None:
    with Relay(tcp_sockets) as relay:
        primary_socket, backup_socket = secured(*relay.ends)
        primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
        primary.send(FrameKind.PAGES, 1, [b"first"])
        next_frame(backup)
        relay.cut()
        with pytest.raises(PeerLost, match="between frames") as caught:
            next_frame(backup)
        assert caught.value.reason == ClaimReason.STREAM_BROKEN
        primary.close()
        backup.close()


def test_records_that_are_repeated_on_the_wire_end_the_connection(tcp_sockets: Pair) -> None:
    with Relay(tcp_sockets) as relay:
        primary_socket, backup_socket = secured(*relay.ends)
        primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
        before = len(relay.passed)
        primary.send(FrameKind.PAGES, 1, [b"once"])
        assert bytes(next_frame(backup).payload) == b"once"
        relay.inject(relay.passed[before:])
        with pytest.raises(PeerLost, match="damaged"):
            next_frame(backup)
        primary.close()
        backup.close()


# --- the stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [64, RECORD_BYTES], [RECORD_BYTES * 2], [64, 5, 100_000, 1, 1], [1] * 20_000],
)
def test_records_are_full_and_have_every_byte_in_order(sizes: list[int]) -> None:
    content = os.urandom(sum(sizes))
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(content)[at : at + size])
        at += size
    records = [bytes(record) for record in records_of(views)]
    assert b"".join(records) == content
    assert all(len(record) == RECORD_BYTES for record in records[:-1])
    assert all(records)


def test_what_is_left_is_cut_as_it_was_before() -> None:
    content = memoryview(os.urandom(100_000))
    whole = [bytes(record) for record in records_of([content[:64], content[64:70], content[70:]])]
    rest = [content[RECORD_BYTES:20_000], content[20_000:]]
    assert [bytes(record) for record in records_of(rest)] == whole[1:]


def test_bytes_decrypted_and_not_taken_count_as_readable(tcp_sockets: Pair) -> None:
    primary, backup = (TlsStream(sock) for sock in secured(*tcp_sockets()))
    primary.send([memoryview(b"two words")])
    assert backup.wait(readable=True, writable=False, timeout_ms=10_000).readable
    target = memoryview(bytearray(3))
    assert backup.receive_into(target) == 3
    assert not select.select([backup.fileno()], [], [], 0)[0], "the descriptor shows nothing more"
    assert backup.wait(readable=True, writable=False, timeout_ms=10_000).readable
    rest = memoryview(bytearray(100))
    assert bytes(rest[: backup.receive_into(rest)]) == b" words"
    with pytest.raises(BlockingIOError):
        backup.receive_into(rest)
    primary.close()
    backup.close()


def test_what_came_whole_before_a_damaged_record_is_handed_out_first(tcp_sockets: Pair) -> None:
    with Relay(tcp_sockets) as relay:
        primary, backup = (TlsStream(sock) for sock in secured(*relay.ends))
        relay.damage_after(RECORD_BYTES + 100)
        primary.send([memoryview(bytes(2 * RECORD_BYTES))])
        unread, deadline = 0, time.monotonic() + DEADLINE_SECONDS
        while unread < 2 * RECORD_BYTES and time.monotonic() < deadline:
            select.select([], [], [], 0.01)
            unread = int.from_bytes(fcntl.ioctl(backup, termios.FIONREAD, bytes(4)), "little")
        target = memoryview(bytearray(4 * RECORD_BYTES))
        assert backup.receive_into(target) == RECORD_BYTES
        assert backup.wait(readable=True, writable=False, timeout_ms=10_000).readable
        for _ in range(2):
            with pytest.raises(ConnectionAbortedError, match="damaged"):
                backup.receive_into(target)
        primary.close()
        backup.close()


def test_keep_alives_of_another_thread_do_not_disturb_what_is_received(tcp_sockets: Pair) -> None:
    primary_socket, backup_socket = secured(*tcp_sockets())
    primary, backup = over(primary_socket, Role.PRIMARY), over(backup_socket, Role.BACKUP)
    ended = threading.Event()

    def keep_alive() -> None:
        while not ended.is_set():
            backup.send_keepalive()

    def send() -> None:
        for number in range(20):
            primary.send(FrameKind.PAGES, 1, [bytes([number]) * MEBIBYTE])

    threads = [threading.Thread(target=keep_alive), threading.Thread(target=send)]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            assert bytes(next_frame(backup).payload) == bytes([number]) * MEBIBYTE
    finally:
        ended.set()
        for thread in threads:
            thread.join(DEADLINE_SECONDS)
    backup.send(FrameKind.ACKNOWLEDGE, 1)
    assert next_frame(primary).kind is FrameKind.ACKNOWLEDGE
    assert backup.counters.sent_frames > 1
    primary.close()
    backup.close()


# --- files that change ----------------------------------------------------------------------------


def serial_of(sock: ssl.SSLSocket) -> int:
    certificate = sock.getpeercert(binary_form=True)
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate).serial_number


def test_a_renewed_certificate_is_used_for_the_next_connection_and_the_standing_one_goes_on(
    tcp_sockets: Pair, tmp_path: Path
) -> None:
    authority = authority_in(tmp_path / "pki")
    ours, theirs = authority.identity("h1"), authority.identity("h2")
    standing = secured(*tcp_sockets(), ours, theirs)
    primary, backup = over(standing[0], Role.PRIMARY), over(standing[1], Role.BACKUP)
    pki.issue(authority.folder, "h1", renew=True)
    pki.issue(authority.folder, "h2", renew=True)
    following = secured(*tcp_sockets(), ours, theirs)
    for before, after in zip(standing, following, strict=True):
        assert serial_of(before) != serial_of(after)
        after.close()
    primary.send(FrameKind.PAGES, 1, [b"goes on"])
    assert bytes(next_frame(backup).payload) == b"goes on"
    primary.close()
    backup.close()


def test_an_authority_is_exchanged_without_a_moment_in_which_hosts_do_not_know_each_other(
    tcp_sockets: Pair, tmp_path: Path
) -> None:
    authority = authority_in(tmp_path / "pki")
    hosts = tmp_path / "hosts"

    def copy(host: str, *names: str) -> None:
        (hosts / host).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(authority.folder / "hosts" / host / name, hosts / host / name)

    def meet(first: str, second: str) -> None:
        ours, theirs = identity_in(hosts / first, first), identity_in(hosts / second, second)
        for sock in secured(*tcp_sockets(), ours, theirs):
            sock.close()

    every = ("ca.pem", "host.pem", "host.key")
    for host in ("h1", "h2"):
        authority.identity(host)
        copy(host, *every)
    meet("h1", "h2")
    old_ca = (hosts / "h2" / "ca.pem").read_bytes()
    pki.rotate_authority(authority.folder)
    for host in ("h1", "h2"):
        copy(host, "ca.pem")
        meet("h1", "h2")
    for host in ("h1", "h2"):
        pki.issue(authority.folder, host, renew=True)
        copy(host, *every)
        meet("h1", "h2")
        meet("h2", "h1")
    assert pki.retire_authorities(authority.folder) == 1
    for host in ("h1", "h2"):
        copy(host, "ca.pem")
        meet("h1", "h2")
    (hosts / "h2" / "ca.pem").write_bytes(old_ca)
    with pytest.raises(PeerLost, match=r"same ca\.pem"):
        meet("h1", "h2")


def test_a_pair_of_files_of_two_ages_is_read_again_until_it_fits(tmp_path: Path) -> None:
    authority = authority_in(tmp_path / "pki")
    identity = authority.identity("h1")
    fitting = identity.key.read_bytes()
    pki.issue(authority.folder, "h1", renew=True)
    renewed = identity.key.read_bytes()
    identity.key.write_bytes(fitting)  # the certificate is there already, its key is not

    def arrive() -> None:
        identity.key.write_bytes(renewed)

    later = threading.Timer(0.15, arrive)
    later.start()
    assert identity.context(is_server=True).get_ca_certs()
    later.join(DEADLINE_SECONDS)


def test_files_that_never_fit_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    authority = authority_in(tmp_path / "pki")
    identity = authority.identity("h1")
    identity.key.write_bytes(authority.identity("h2").key.read_bytes())
    with pytest.raises(IdentityUnusable, match=r"host\.key can not be used.*holdfast pki issue h1"):
        identity.context(is_server=True)
    missing = Identity("h3", *(tmp_path / name for name in ("a", "b", "c")))
    with pytest.raises(IdentityUnusable, match=r'holdfast pki issue h3.*or set tls = "off"'):
        missing.check()


def test_a_certificate_of_another_host_is_noticed_at_the_start() -> None:
    made = cluster().identity("h2").certificate.parent
    with pytest.raises(IdentityUnusable, match="is the certificate of h2, and this host is h1"):
        identity_in(made, "h1").check()


def test_a_certificate_that_expires_soon_is_warned_of(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pki")
    pki.make_authority(authority.folder)
    assert "expires in 3 days" in authority.identity("h1", days=3).check()[0]
    identity = authority.identity("h2", days=300)
    assert identity.check() == []
    assert 299 < identity.seconds_left() / 86_400 <= 300
    identity.certificate.unlink()
    assert str(identity.seconds_left()) == "nan"


def test_a_handshake_that_goes_on_for_ever_ends_at_its_deadline(tcp_sockets: Pair) -> None:
    ours, theirs = tcp_sockets()
    ended = threading.Event()

    def drip() -> None:
        # The head of a long record, then one byte after the other.
        for byte in b"\x16\x03\x01\x3f\xff" + bytes(1000):
            if ended.wait(0.01):
                return
            try:
                ours.sendall(bytes([byte]))
            except OSError:
                return

    dripper = threading.Thread(target=drip)
    dripper.start()
    began = time.monotonic()
    context = cluster().identity("h2").context(is_server=True)
    try:
        with pytest.raises(PeerLost) as caught:
            shake_hands(theirs, context, is_server=True, timeout_seconds=0.3)
        assert caught.value.reason == ClaimReason.PEER_SILENT
        assert time.monotonic() - began < DEADLINE_SECONDS / 2
    finally:
        ended.set()
        dripper.join(DEADLINE_SECONDS)


def test_a_socket_that_was_never_connected_is_no_tls() -> None:
    with socket.socket() as lonely:
        context = cluster().identity("h1").context(is_server=False)
        with pytest.raises(PeerLost):
            shake_hands(lonely, context, is_server=False, timeout_seconds=0.2)
