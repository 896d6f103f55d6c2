"""Commands that show: tables, JSON, YAML, what is marked, and what a table may hold."""

import json
import signal
import subprocess
from typing import Any

import pytest
import yaml
from tests.unit.api.canned import (
    UNSAFE,
    FakeController,
    event,
    events,
    good,
    host,
    hosts,
    protection,
    seeding,
    stream,
    vm,
    vms,
)
from tests.unit.cli.conftest import END_SECONDS_MAX, Run, Spawn

from holdfast_api.messages import EventList, HostList, PolicyList, Preflight, VmList
from holdfast_api.records import (
    Event,
    PlacementNote,
    Policy,
    PreflightIssue,
    Protection,
    Rejection,
    StoredPolicy,
)
from holdfast_api.words import Phase, Severity

POLICIES = PolicyList(policies=(StoredPolicy(name="fast", policy=Policy(interval_ms=20)),))
MARK = "UNSAFE: output unbuffered"
SHOWING = [
    (("vms",), "/v1/vms", vms(vm())),
    (("hosts",), "/v1/hosts", hosts("h1")),
    (("status", "redis"), "/v1/vms/redis/protection", protection()),
    (("status",), "/v1/vms", vms(vm(protection()))),
    (("policies", "list"), "/v1/policies", POLICIES),
    (("policies", "show", "fast"), "/v1/policies/fast", POLICIES.policies[0]),
    (
        ("preflight", "redis"),
        "/v1/vms/redis/preflight",
        Preflight(vm="redis", protectable=True, issues=()),
    ),
]


@pytest.mark.parametrize(("arguments", "path", "shown"), SHOWING)
def test_json_and_yaml_are_the_models_of_the_api(
    controller: FakeController, holdfast: Run, arguments: tuple[str, ...], path: str, shown: Any
) -> None:
    controller.on("GET", path, good(shown))
    result = holdfast(*arguments, "-o", "json")
    assert result.code == 0
    assert type(shown).model_validate_json(result.out) == shown
    result = holdfast(*arguments, "--output", "yaml")
    assert type(shown).model_validate_json(json.dumps(yaml.safe_load(result.out))) == shown


@pytest.mark.parametrize(("arguments", "path", "shown"), SHOWING)
def test_a_table_without_a_terminal_is_plain_text(
    controller: FakeController, holdfast: Run, arguments: tuple[str, ...], path: str, shown: Any
) -> None:
    controller.on("GET", path, good(shown))
    result = holdfast(*arguments)
    assert (result.code, result.err) == (0, "")
    assert result.out.isascii()
    assert result.out.replace("\n", "").isprintable()
    assert all(text == text.rstrip() for text in result.out.splitlines())


def test_status_shows_every_protected_vm_in_one_line(
    controller: FakeController, holdfast: Run
) -> None:
    shown = vms(
        vm(protection()),
        vm(None, "alone"),
        vm(protection(Phase.RETIRED).model_copy(update={"vm": "old"}), "old"),
        vm(protection(Phase.UNPROTECTED, reason="no host left").model_copy(update={"vm": "b"})),
    )
    controller.on("GET", "/v1/vms", good(shown))
    _, first, second = holdfast("status").out.splitlines()
    assert first.split() == [
        "redis",
        "protected",
        "h1",
        "h2",
        "1234",
        "2.1",
        "/",
        "4.9",
        "-",
        "0",
        "B",
    ]
    assert second.startswith("b")
    assert second.endswith("no host left")


def test_status_of_one_vm_says_why_it_is_not_protected(
    controller: FakeController, holdfast: Run
) -> None:
    note = PlacementNote(
        chosen=None,
        rejections=(Rejection(host="h2", reason="maintenance"), Rejection(host="h3", reason="old")),
    )
    shown = protection(
        Phase.UNPROTECTED, reason="no host left", placement=note, unprotected_seconds=75.0
    )
    controller.on("GET", "/v1/vms/redis/protection", good(shown))
    out = " ".join(holdfast("status", "redis").out.split())
    assert "phase unprotected: no host left" in out
    assert "passed over h2 maintenance passed over h3 old" in out
    assert "unprotected for 1 min 15 s" in out


def test_a_note_of_a_choice_that_was_made_explains_no_missing_backup(
    controller: FakeController, holdfast: Run
) -> None:
    note = PlacementNote(chosen="h2", rejections=(Rejection(host="h1", reason="is the primary"),))
    shown = protection(Phase.UNPROTECTED, placement=note)
    controller.on("GET", "/v1/vms/redis/protection", good(shown))
    assert "passed over" not in holdfast("status", "redis").out


@pytest.mark.parametrize(
    ("arguments", "path", "shown"),
    [
        (("status",), "/v1/vms", vms(vm(protection(policy=UNSAFE)))),
        (("vms",), "/v1/vms", vms(vm(protection(policy=UNSAFE)))),
        (("status", "redis"), "/v1/vms/redis/protection", protection(policy=UNSAFE)),
        (
            ("policies", "list"),
            "/v1/policies",
            PolicyList(policies=(StoredPolicy(name="x", policy=UNSAFE),)),
        ),
        (
            ("policies", "show", "x"),
            "/v1/policies/x",
            StoredPolicy(name="x", policy=UNSAFE),
        ),
    ],
)
def test_an_unsafe_policy_is_marked_wherever_it_shows(
    controller: FakeController, holdfast: Run, arguments: tuple[str, ...], path: str, shown: Any
) -> None:
    controller.on("GET", path, good(shown))
    assert MARK in holdfast(*arguments).out


def test_a_safe_policy_is_not_marked(controller: FakeController, holdfast: Run) -> None:
    controller.on("GET", "/v1/vms/redis/protection", good(protection()))
    assert MARK not in holdfast("status", "redis").out


@pytest.mark.parametrize(
    ("arguments", "path", "shown", "said"),
    [
        (("vms",), "/v1/vms", VmList(vms=()), "no agent reports a VM"),
        (("status",), "/v1/vms", VmList(vms=()), "no VM is protected"),
        (("hosts",), "/v1/hosts", HostList(hosts=()), "no agent has appeared"),
        (("events",), "/v1/events", EventList(events=()), "no event"),
    ],
)
def test_nothing_to_show_is_said_and_prints_no_result(
    *,
    controller: FakeController,
    holdfast: Run,
    arguments: tuple[str, ...],
    path: str,
    shown: Any,
    said: str,
) -> None:
    controller.on("GET", path, good(shown))
    result = holdfast(*arguments)
    assert (result.code, result.out) == (0, "")
    assert said in result.err


def test_a_host_in_maintenance_and_its_labels_are_shown(
    controller: FakeController, holdfast: Run
) -> None:
    shown = HostList(hosts=(host("h1", maintenance=True, labels={"rack": "a"}),))
    controller.on("GET", "/v1/hosts", good(shown))
    assert "alive, maintenance" in holdfast("hosts").out
    assert "rack=a" in holdfast("hosts").out


def test_a_vm_that_preflight_blocks_ends_with_refused_and_every_issue(
    controller: FakeController, holdfast: Run
) -> None:
    issues = (
        PreflightIssue(code="vfio-device", severity=Severity.BLOCKING, message="take it out"),
        PreflightIssue(code="no-bridge", severity=Severity.WARNING, message="give it one"),
    )
    shown = Preflight(vm="redis", protectable=False, issues=issues)
    controller.on("GET", "/v1/vms/redis/preflight", good(shown))
    result = holdfast("preflight", "redis")
    assert result.code == 3
    assert "vfio-device  take it out" in result.out
    assert "no-bridge    give it one" in result.out
    assert holdfast("preflight", "redis", "-o", "json").code == 3


def test_control_characters_do_not_reach_the_terminal(
    controller: FakeController, holdfast: Run
) -> None:
    evil = event(1, message="\x1b[2J\x07gone\nredis  protected [red]x[/red]")
    controller.on("GET", "/v1/events", good(EventList(events=(evil,))))
    out = holdfast("events").out
    assert len(out.splitlines()) == 2
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]x[/red]" in out


# --- events ---


def test_events_can_be_limited_to_one_vm(controller: FakeController, holdfast: Run) -> None:
    shown = EventList(events=(event(1), event(2, "other"), event(3, None), event(4)))
    controller.on("GET", "/v1/events", good(shown))
    result = holdfast("events", "--vm", "redis", "-o", "json")
    assert [e.position for e in EventList.model_validate_json(result.out).events] == [1, 4]


def test_an_event_shows_when_in_utc(controller: FakeController, holdfast: Run) -> None:
    controller.on("GET", "/v1/events", good(EventList(events=events(1))))
    row = holdfast("events").out.splitlines()[1]
    assert row.split()[:4] == ["1", "2023-11-14", "22:13:21.250", "FailedOver"]


def lines_of(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


def test_followed_events_come_one_by_one_and_ctrl_c_is_no_fault(
    controller: FakeController, spawn: Spawn
) -> None:
    controller.on("GET", "/v1/events", stream(*events(5, 6), hang=True))
    process = spawn("events", "--follow", "--after", "4", "-o", "json")
    shown = [Event.model_validate_json(text) for text in lines_of(process, 2)]
    assert [e.position for e in shown] == [5, 6]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=END_SECONDS_MAX)
    assert (process.returncode, out, err) == (0, "", "")
    assert controller.requests[0].query == "after=4&follow=true"


def test_followed_events_as_yaml_are_documents(controller: FakeController, spawn: Spawn) -> None:
    controller.on("GET", "/v1/events", stream(event(5), hang=True))
    process = spawn("events", "--follow", "-o", "yaml")
    assert lines_of(process, 2) == ["---\n", "position: 5\n"]


def test_a_reader_that_has_seen_enough_is_no_fault(
    controller: FakeController, spawn: Spawn
) -> None:
    controller.on("GET", "/v1/events", *[stream(event(n)) for n in range(1, 500)])
    process = spawn("events", "--follow")
    lines_of(process, 1)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(END_SECONDS_MAX)
    assert process.returncode == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_seeding_is_told_in_percent_rate_and_time_left(
    controller: FakeController, holdfast: Run
) -> None:
    shown: Protection = seeding(128 << 20)
    controller.on("GET", "/v1/vms/redis/protection", good(shown))
    out = holdfast("status", "redis").out
    assert "seeding to h2, round 1, 50 % of 256.0 MiB, 64.0 MiB/s, 2.0 s left" in out
