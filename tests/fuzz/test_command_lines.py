"""Command lines, as a running QEMU shows them or a peer's HELLO brings them."""

from typing import Any

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from holdfast_agent.core.vm_spec import VmSpec
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

EXAMPLES = 150
FOLDER = "/run/standby"
TAPS = {"n0": "t0", "n1": "t1"}

PIECES = st.sampled_from(
    (
        *("tap", "socket", "none", "file", "unix:", "stdio", "user", "q35", "host", "on", "off"),
        *("id=n0", "id=n1", "netdev=n0", "ifname=tap0", "fd=3", "fds=3:4", "path=/x", "queues=2"),
        *("queues=²", "queues=" + "9" * 5000, "vhost=on", "mac=AA:BB:CC:00:11:22", "type=q35"),
        *(",", ",,", "=", "{", "}", '{"driver":"x","id":"n0"}', '{"type":"tap","id":1}', "[" * 50),
        *("guest=vm", "chardev=c0", "id=c0", "logfile=/l", "/dev/fdset/3", "mem-path=/m", ""),
    )
)
VALUES = st.lists(PIECES, max_size=5).map(",".join) | st.text(max_size=30)
NAMES = st.sampled_from(
    (
        *("netdev", "nic", "device", "chardev", "mon", "machine", "M", "serial", "parallel"),
        *("object", "name", "add-fd", "qmp", "S", "nodefaults", "drive", "mem-path", "", "-"),
    )
)
WORDS = st.tuples(st.sampled_from(("-", "--", "")), NAMES).map("".join) | VALUES
ARGV = st.lists(WORDS, max_size=14).map(lambda words: ["qemu-system-x86_64", *words])
DEEP_JSON = '{"a":' * 20_000


def with_one_dash(argv: list[str]) -> list[str]:
    """Return the command line as it is written again: `--name` is `-name`."""
    return [f"-{word[2:]}" if word.startswith("--") else word for word in argv]


@given(ARGV)
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_command_line_is_written_again_as_it_was_read(argv: list[str]) -> None:
    assume(not any(word == "--" or word.startswith("---") for word in argv))  # QEMU takes none
    again = list(render(argv[0], parse(argv)))
    assert with_one_dash(again) == with_one_dash(argv)


@given(VALUES)
@example(DEEP_JSON)
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_value_is_taken_apart_and_put_together(value: str) -> None:
    parameters = Parameters.parse(value)
    again = Parameters.parse(parameters.render())
    assert again.first == parameters.first
    assert again.pairs == parameters.pairs


@given(ARGV)
@example(["qemu", "-netdev", "tap,id=n0,queues=²"])
@example(["qemu", "-netdev", DEEP_JSON])
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_command_line_can_be_asked_for_what_matters(argv: list[str]) -> None:
    for nic in nics_of(argv):
        assert nic.queues >= 0
        mac_of(argv, nic.netdev_id)
    name_of(argv)
    assert all(found.startswith("-") for found in descriptors_of(argv))
    memory_files_of(argv)


@given(ARGV)
@example(["qemu", "-chardev", DEEP_JSON])
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_standby_is_started_from_its_own_folder_or_not_at_all(argv: list[str]) -> None:
    try:
        made = standby_argv(
            argv, folder=FOLDER, qmp_path=f"{FOLDER}/qmp", machine_type="pc-q35-7.2", taps=TAPS
        )
    except UnsuitableCommandLine:
        return
    assert made[0] == argv[0]
    assert made[-2:] == ("-incoming", "defer")
    assert [made[n + 1] for n, word in enumerate(made[:-1]) if word == "-qmp"][-1].startswith(
        f"unix:{FOLDER}/qmp"
    )
    assert descriptors_of(made) == []
    taps = {nic.tap for nic in nics_of(made) if nic.kind == "tap"}
    assert taps <= set(TAPS.values())


SOUND: dict[str, Any] = {
    "vm": "web",
    "argv": ["qemu-system-x86_64"],
    "machine_type": "pc-q35-7.2",
    "qemu_version": "7.2.22",
    "accelerator": "tcg",
    "vcpus": 1,
    "memory_bytes": 1 << 20,
    "blocks": [["pc.ram", 1 << 20]],
    "nics": [],
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(SOUND, ANYTHING) | {"argv": ARGV}))
@example({"argv": ["qemu", "-name", "a\0b"]})
@example({"argv": []})
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_specification_is_refused_or_can_be_started_from(changes: dict[str, Any]) -> None:
    try:
        spec = VmSpec.model_validate(SOUND | changes)
    except ValidationError:
        return
    assert spec.memory_map.page_count > 0
    try:
        made = standby_argv(
            spec.argv,
            folder=FOLDER,
            qmp_path=f"{FOLDER}/qmp",
            machine_type=spec.machine_type,
            taps={nic.netdev_id: nic.tap for nic in spec.nics},
        )
    except UnsuitableCommandLine:
        return
    assert not any("\0" in word for word in made), "no program can be started with this"
