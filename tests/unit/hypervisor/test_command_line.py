"""A standby's command line from its primary's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_agent.hypervisor.command_line import (
    UnsuitableCommandLine,
    descriptors_of,
    mac_of,
    memory_files_of,
    name_of,
    nics_of,
    standby_argv,
)
from holdfast_agent.hypervisor.options import Parameters, parse, render

PRIMARY = (
    *("qemu-system-x86_64", "-name", "guest=web,debug-threads=on", "-S", "-daemonize"),
    *("-machine", "q35,memory-backend=ram0", "-accel", "kvm", "-cpu", "host", "-m", "256"),
    *("-object", "memory-backend-memfd,id=ram0,size=256M,share=on", "-nodefaults"),
    *("-kernel", "/boot/vmlinuz", "-append", "console=ttyS0 a=b,c"),
    *("-chardev", "socket,id=mon0,path=/run/mon.sock,server=on,wait=off"),
    *("-mon", "chardev=mon0,mode=control", "-qmp", "unix:/run/a.qmp,server=on,wait=off"),
    *("-pidfile", "/run/a.pid", "-serial", "file:/var/log/a.log", "-vnc", ":1", "-D", "/tmp/log"),
    *("-netdev", "tap,id=n0,ifname=tapA,script=/etc/qemu-ifup,vhost=off"),
    *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:AA:00:02"),
    *("-device", '{"driver":"virtio-rng-pci","id":"rng0"}', "--no-reboot"),
)


def made(argv: tuple[str, ...], **taps: str) -> list[str]:
    return list(
        standby_argv(
            argv,
            folder="/state/web",
            qmp_path="/run/vms/web.qmp",
            machine_type="pc-q35-7.2",
            taps=taps,
        )
    )


def after(argv: list[str], option: str) -> list[str]:
    return [argv[i + 1] for i, word in enumerate(argv) if word == option]


def test_the_machine_is_the_same_and_the_surroundings_are_its_own() -> None:
    argv = made(PRIMARY, n0="tapB")
    assert argv == [
        *("qemu-system-x86_64", "-name", "guest=web,debug-threads=on"),
        *("-machine", "pc-q35-7.2,memory-backend=ram0", "-accel", "kvm", "-cpu", "host"),
        *("-m", "256", "-object", "memory-backend-memfd,id=ram0,size=256M,share=on"),
        *("-nodefaults", "-kernel", "/boot/vmlinuz", "-append", "console=ttyS0 a=b,c"),
        *("-serial", "file:/state/web/serial0.log"),
        *("-netdev", "tap,id=n0,vhost=off,ifname=tapB,script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=n0,mac=52:54:00:AA:00:02"),
        *("-device", '{"driver":"virtio-rng-pci","id":"rng0"}', "-no-reboot"),
        *("-display", "none", "-monitor", "none"),
        *("-qmp", "unix:/run/vms/web.qmp,server=on,wait=off", "-incoming", "defer"),
    ]


def test_a_standby_of_a_standby_is_the_same_machine() -> None:
    once = made(PRIMARY, n0="tapB")
    assert sorted(made(tuple(once), n0="tapB")) == sorted(once)


def test_without_a_machine_option_the_resolved_one_is_given() -> None:
    assert after(made(("qemu-system-x86_64", "-m", "64")), "-machine") == ["pc-q35-7.2"]


def test_a_machine_given_by_type_is_pinned_too() -> None:
    argv = made(("qemu-system-x86_64", "-machine", "accel=tcg,type=q35"))
    assert after(argv, "-machine") == ["accel=tcg,type=pc-q35-7.2"]


def test_nographic_stays_as_the_guest_can_see_it() -> None:
    argv = made(("qemu-system-x86_64", "-nographic"))
    assert "-nographic" in argv
    assert "-display" not in argv


@pytest.mark.parametrize(
    ("given_to_primary", "to_standby"),
    [
        ("file,id=con,path=/var/log/x.log,append=on", "file,id=con,append=on,path=/f/con.out"),
        (
            "socket,id=ga,path=/run/ga.sock,server=on,wait=off",
            "socket,id=ga,path=/f/ga.sock,server=on,wait=off",
        ),
        ("socket,id=t,host=127.0.0.1,port=99,server=on", "null,id=t"),
        ("stdio,id=s", "null,id=s"),
        ("pty,id=p", "pty,id=p"),
        ("null,id=n,logfile=/var/log/n", "null,id=n,logfile=/f/n.log"),
    ],
)
def test_character_devices_lead_into_the_standbys_folder(
    given_to_primary: str, to_standby: str
) -> None:
    argv = standby_argv(
        ("qemu", "-chardev", given_to_primary),
        folder="/f",
        qmp_path="/q",
        machine_type="pc-q35-7.2",
        taps={},
    )
    assert after(list(argv), "-chardev") == [to_standby]


@pytest.mark.parametrize(
    ("given_to_primary", "to_standby"),
    [
        ("stdio", "null"),
        ("mon:stdio", "null"),
        ("none", "none"),
        ("chardev:con", "chardev:con"),
        ("tcp::4444,server=on", "null"),
        ("unix:/run/s,server=on", "unix:/state/web/serial0.sock,server=on,wait=off"),
    ],
)
def test_serial_ports_are_there_but_lead_elsewhere(given_to_primary: str, to_standby: str) -> None:
    assert after(made(("qemu", "-serial", given_to_primary)), "-serial") == [to_standby]


def test_each_serial_port_has_its_own_file() -> None:
    argv = made(("qemu", "-serial", "file:a", "-serial", "file:b"))
    assert len(set(after(argv, "-serial"))) == 2


def test_a_tap_given_as_json_is_rewritten_as_json() -> None:
    netdev = json.dumps({"type": "tap", "id": "n0", "ifname": "a", "script": "/x", "vhost": False})
    (value,) = after(made(("qemu", "-netdev", netdev), n0="tapB"), "-netdev")
    assert json.loads(value) == {
        "type": "tap",
        "id": "n0",
        "ifname": "tapB",
        "script": "no",
        "downscript": "no",
        "vhost": False,
    }


@pytest.mark.parametrize(
    "options",
    [
        ("-netdev", "tap,id=n0,fd=33"),
        ("-netdev", '{"type":"tap","id":"n0","fds":"33:34"}'),
        ("-add-fd", "fd=3,set=1"),
        ("-chardev", "file,id=a,path=/dev/fdset/2"),
        ("-chardev", "socket,id=a,fd=7"),
        ("-device", "virtio-net-pci,netdev=n0,vhostfd=9"),
    ],
)
def test_inherited_descriptors_cannot_be_repeated(options: tuple[str, str]) -> None:
    assert descriptors_of(("qemu", *options))
    with pytest.raises(UnsuitableCommandLine, match="descriptors"):
        made(("qemu", *options), n0="tapB")


def test_a_monitor_that_was_passed_in_does_not_matter() -> None:
    argv = ("qemu", "-chardev", "socket,id=m,fd=33,server=on", "-mon", "chardev=m,mode=control")
    assert descriptors_of(argv) == []
    assert "-chardev" not in made(argv)


@pytest.mark.parametrize("netdev", ["user,id=n0", "tap,id=n9,ifname=a", "tap,ifname=a"])
def test_a_network_that_cannot_be_repeated_is_refused(netdev: str) -> None:
    with pytest.raises(UnsuitableCommandLine, match="only taps"):
        made(("qemu", "-netdev", netdev), n0="tapB")


def test_nics_are_read_from_netdev_and_nic() -> None:
    argv = (
        *("qemu", "-netdev", "tap,id=a,ifname=t0,vhost=on,queues=4", "-nic", "none"),
        *("-nic", "tap,id=b,ifname=t1,model=virtio-net-pci,mac=52:54:00:00:00:01"),
        *("-netdev", "user,id=c", "-device", "e1000,netdev=a,mac=52:54:00:00:00:0A"),
    )
    read = [(n.netdev_id, n.kind, n.tap, n.vhost, n.queues) for n in nics_of(argv)]
    assert read == [
        ("a", "tap", "t0", True, 4),
        ("b", "tap", "t1", False, 1),
        ("c", "user", None, False, 1),
    ]
    macs = [mac_of(argv, n) for n in "abc"]
    assert macs == ["52:54:00:00:00:0a", "52:54:00:00:00:01", None]


def test_name_and_memory_files_are_found() -> None:
    assert name_of(PRIMARY) == "web"
    assert name_of(("qemu", "-name", "db")) == "db"
    assert name_of(("qemu",)) is None
    argv = ("qemu", "-mem-path", "/huge", "-object", "memory-backend-file,id=m,mem-path=/dev/shm/x")
    assert memory_files_of(argv) == ["/huge", "/dev/shm/x"]


words = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12)
keys = st.text("abcdefgh-", min_size=1, max_size=6)


@given(
    words.filter(lambda w: "=" not in w and not w.startswith("{")), st.lists(st.tuples(keys, words))
)
def test_a_value_survives_reading_and_writing(first: str, pairs: list[tuple[str, str]]) -> None:
    parameters = Parameters(first, tuple(pairs))
    assert Parameters.parse(parameters.render()) == parameters


@given(st.lists(st.tuples(keys.filter(lambda k: k[0] != "-" and k != "h"), words)))
def test_a_command_line_survives_reading_and_writing(options: list[tuple[str, str]]) -> None:
    argv = ("qemu", *(word for name, value in options for word in (f"-{name}", value)))
    assert render("qemu", parse(argv)) == argv
