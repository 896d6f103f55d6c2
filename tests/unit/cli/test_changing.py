"""Commands that change something, and the waiting that goes with them."""

import os
import pty
import signal
from pathlib import Path

import pytest
from tests.unit.api.canned import (
    UNSAFE,
    FakeController,
    Reply,
    good,
    host,
    problem,
    protection,
    seeding,
    vm,
)
from tests.unit.cli.conftest import END_SECONDS_MAX, Run, Spawn

from holdfast_api.messages import PolicyList
from holdfast_api.records import Policy, Protection, StoredPolicy, Vm
from holdfast_api.words import Phase

PROTECTION = "/v1/vms/redis/protection"
SWITCHOVER = "/v1/vms/redis/switchover"
ASKED = protection(Phase.UNPROTECTED, generation=1, reason="looking for a backup")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll without a pause: what is waited for comes with the next answer."""
    monkeypatch.setattr("holdfast_api.cli.waiting.POLL_SECONDS", 0.0)


# --- protect ---


def test_protect_waits_until_it_is_protected_and_says_how_far_it_is(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("PUT", PROTECTION, good(ASKED, 202))
    controller.on("GET", PROTECTION, good(ASKED), good(seeding(64 << 20)), good(protection()))
    result = holdfast("protect", "redis", "-o", "json")
    assert result.code == 0
    assert Protection.model_validate_json(result.out) == protection()
    assert "redis: unprotected: looking for a backup" in result.err
    assert "seeding to h2, round 1, 25 % of 256.0 MiB, 64.0 MiB/s, 3.0 s left" in result.err


def test_protect_without_waiting_returns_the_record_at_once(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("PUT", PROTECTION, good(ASKED, 202))
    result = holdfast("protect", "redis", "--no-wait", "-o", "json")
    assert Protection.model_validate_json(result.out) == ASKED
    assert controller.asked("GET", PROTECTION) == []


def test_an_answer_from_before_the_request_is_not_taken_for_success(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("PUT", PROTECTION, good(protection(Phase.UNPROTECTED, generation=5), 202))
    controller.on(
        "GET",
        PROTECTION,
        good(protection(generation=4)),
        good(protection(Phase.ENDED, generation=4)),
        good(protection(generation=6)),
    )
    result = holdfast("protect", "redis", "-o", "json")
    assert Protection.model_validate_json(result.out).generation == 6


def test_a_policy_file_of_either_kind_is_sent_inline(
    controller: FakeController, holdfast: Run, tmp_path: Path
) -> None:
    controller.on("PUT", PROTECTION, good(ASKED, 202))
    wanted = Policy.model_validate({"interval_ms": 20, "placement": {"hosts": ("h2",)}})
    texts = {
        "p.yaml": "interval_ms: 20\nplacement:\n  hosts: [h2]\n",
        "p.json": wanted.model_dump_json(),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        result = holdfast("protect", "redis", "--no-wait", "--policy-file", str(tmp_path / name))
        assert result.code == 0
    bodies = [r.json for r in controller.requests]
    assert bodies == [{"policy_name": None, "policy": wanted.model_dump(mode="json")}] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("intervall_ms: 20\ntransport: pigeon\n", ["intervall_ms", "transport"]),
        ("min_interval_ms: 60\ninterval_ms: 50\n", ["must not exceed"]),
        ("- 1\n", ["must hold a policy's fields"]),
        ("", ["must hold a policy's fields"]),
        ("a: [\n", ["neither YAML nor JSON"]),
        ("interval_ms: !!python/object:os.system x\n", ["neither YAML nor JSON"]),
    ],
)
def test_a_wrong_policy_file_is_a_usage_error_that_names_every_fault(
    controller: FakeController, holdfast: Run, tmp_path: Path, text: str, said: list[str]
) -> None:
    (tmp_path / "p").write_text(text)
    result = holdfast("protect", "redis", "--policy-file", str(tmp_path / "p"))
    assert result.code == 2
    assert all(words in result.err for words in said)
    assert controller.requests == []


def test_a_policy_file_that_is_not_there_is_a_usage_error(holdfast: Run, tmp_path: Path) -> None:
    result = holdfast("policies", "set", "x", "-f", str(tmp_path / "none"))
    assert result.code == 2
    assert "can not read" in result.err


def test_an_unsafe_policy_is_warned_of_when_it_is_taken(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("PUT", PROTECTION, good(protection(policy=UNSAFE), 202))
    result = holdfast("protect", "redis", "--no-wait", "-o", "json")
    assert "UNSAFE: output unbuffered" in result.err


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (good(protection(Phase.ENDED, generation=3, reason="shut down")), "shut down"),
        (good(protection(Phase.RELEASING, generation=3)), "somebody ended the protection"),
        (problem("not-protected"), "somebody ended the protection"),
    ],
)
def test_a_protection_that_ends_while_waited_for_is_a_fault(
    controller: FakeController, holdfast: Run, reply: Reply, said: str
) -> None:
    controller.on("PUT", PROTECTION, good(ASKED, 202))
    controller.on("GET", PROTECTION, good(ASKED), reply)
    result = holdfast("protect", "redis")
    assert (result.code, result.out) == (1, "")
    assert said in result.err


def test_a_passed_deadline_has_its_own_exit_code(controller: FakeController, holdfast: Run) -> None:
    controller.on("PUT", PROTECTION, good(ASKED, 202))
    controller.on("GET", PROTECTION, good(ASKED))
    result = holdfast("protect", "redis", "--deadline", "0.1")
    assert result.code == 5
    assert "the protection of redis stays on" in result.err


def test_a_controller_that_fails_meanwhile_does_not_end_the_wait(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("PUT", PROTECTION, good(ASKED, 202))
    controller.on("GET", PROTECTION, problem("store-unavailable"), good(protection()))
    result = holdfast("protect", "redis")
    assert result.code == 0
    assert "no answer, trying again" in result.err


def test_ctrl_c_leaves_the_protection_on_and_says_so(
    controller: FakeController, spawn: Spawn
) -> None:
    controller.on("PUT", PROTECTION, good(ASKED, 202))
    controller.on("GET", PROTECTION, good(ASKED))
    process = spawn("protect", "redis")
    assert process.stderr is not None
    assert "looking for a backup" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=END_SECONDS_MAX)
    assert process.returncode == 130
    assert "the protection of redis stays on; end it with: holdfast unprotect redis" in err
    assert out == ""
    assert {r.method for r in controller.requests} == {"PUT", "GET"}, "nothing was taken back"


def test_on_a_terminal_seeding_is_a_bar(controller: FakeController, spawn: Spawn) -> None:
    controller.on("PUT", PROTECTION, good(ASKED, 202))
    controller.on("GET", PROTECTION, *[good(seeding(64 << 20))] * 4, good(protection()))
    ours, theirs = pty.openpty()
    try:
        process = spawn("protect", "redis", stderr=theirs)
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part
        process.communicate(timeout=END_SECONDS_MAX)
    finally:
        os.close(ours)
    assert process.returncode == 0
    assert "\u2501".encode() in shown
    assert b"redis: to h2, round 1, 25 % of 256.0 MiB, 64.0 MiB/s, 3.0 s left" in shown


# --- the others ---


def test_unprotect_waits_until_nothing_is_left(controller: FakeController, holdfast: Run) -> None:
    controller.on("DELETE", PROTECTION, good(protection(Phase.RELEASING), 202))
    controller.on(
        "GET", PROTECTION, good(protection(Phase.RELEASING)), good(protection(Phase.RETIRED))
    )
    result = holdfast("unprotect", "redis")
    assert (result.code, result.out) == (0, "redis: not protected any more\n")


def test_unprotect_takes_a_vanished_protection_for_done(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("DELETE", PROTECTION, Reply(204))
    controller.on("GET", PROTECTION, problem("not-protected"))
    controller.on("GET", "/v1/vms/redis", good(vm()))
    result = holdfast("unprotect", "redis", "-o", "json")
    assert Vm.model_validate_json(result.out) == vm()


def test_unprotect_without_waiting_says_that_it_goes_on(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("DELETE", PROTECTION, good(protection(Phase.RELEASING), 202))
    assert holdfast("unprotect", "redis", "--no-wait").out == (
        "redis: the protection is being taken down\n"
    )


def test_switchover_waits_until_the_backup_is_the_primary(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("POST", SWITCHOVER, good(protection(), 202))
    moved = protection(Phase.UNPROTECTED, generation=3, primary="h2")
    controller.on("GET", PROTECTION, good(protection()), good(moved))
    result = holdfast("switchover", "redis", "--to", "h2")
    assert result.code == 0
    assert "redis: runs on h2 now" in result.err
    assert controller.requests[0].json == {"to": "h2"}


def test_a_switchover_that_lost_its_backup_is_a_fault(
    controller: FakeController, holdfast: Run
) -> None:
    controller.on("POST", SWITCHOVER, good(protection(), 202))
    controller.on("GET", PROTECTION, good(protection(Phase.UNPROTECTED, generation=3)))
    result = holdfast("switchover", "redis")
    assert result.code == 1
    assert "did not happen; it is unprotected on h1" in result.err


def test_change_sends_only_what_was_given(controller: FakeController, holdfast: Run) -> None:
    controller.on("PATCH", PROTECTION, good(protection()))
    assert holdfast("change", "redis", "--interval-ms", "20", "--no-output-triggered").code == 0
    assert controller.requests[0].json == {
        "interval_ms": 20,
        "min_interval_ms": None,
        "output_triggered": False,
        "reprotect": None,
        "encoding": None,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("change", "redis"),
        ("change", "redis", "--interval-ms", "4"),
        ("change", "redis", "--reprotect", "never"),
        ("change", "redis", "--encoding", "gzip"),
        ("host", "set", "h1"),
        ("host", "set", "h1", "--label", "rack"),
        ("host", "set", "h1", "--label", "=a"),
        ("protect", "redis", "--policy", "x", "--policy-file", "y"),
        ("vms", "-o", "xml"),
        ("vms", "--timeout", "0"),
        ("events", "--after", "-1"),
        ("dance",),
        ("vms", "--url", "localhost"),
        ("vms", "--url", ","),
    ],
)
def test_wrong_usage_is_told_and_sends_nothing(
    controller: FakeController, holdfast: Run, arguments: tuple[str, ...]
) -> None:
    result = holdfast(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Error:" in result.err
    assert controller.requests == []


def test_host_set_adds_and_removes_labels(controller: FakeController, holdfast: Run) -> None:
    controller.on("PATCH", "/v1/hosts/h1", good(host("h1", labels={"rack": "b"})))
    result = holdfast(
        "host", "set", "h1", "--label", "rack=b", "--label", "old=", "--no-maintenance"
    )
    assert result.out == "h1: alive, labels: rack=b\n"
    assert controller.requests[0].json == {
        "labels": {"rack": "b", "old": None},
        "maintenance": False,
    }


def test_a_policy_is_stored_and_deleted(
    controller: FakeController, holdfast: Run, tmp_path: Path
) -> None:
    stored = StoredPolicy(name="fast", policy=Policy(interval_ms=20))
    controller.on("PUT", "/v1/policies/fast", good(stored))
    controller.on("DELETE", "/v1/policies/fast", Reply(204))
    (tmp_path / "p.yaml").write_text("interval_ms: 20\n")
    result = holdfast("policies", "set", "fast", "-f", str(tmp_path / "p.yaml"))
    assert result.code == 0
    assert "interval_ms           20" in result.out
    assert holdfast("policies", "delete", "fast").code == 0
    assert [r.method for r in controller.requests] == ["PUT", "DELETE"]
    assert PolicyList(policies=(stored,)).policies[0].policy.interval_ms == 20
