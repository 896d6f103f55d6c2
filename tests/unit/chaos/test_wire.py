"""R2 and R4, what is covered and who is dead: broken by the crime, and by nothing else."""

from collections.abc import Callable

import pytest
from tests.chaos.wire import (
    Wire,
)
from tests.unit.chaos.passing import (
    ACK,
    FIN,
    GUEST,
    RST,
    Controller,
    Link,
    Talk,
    broken,
    fail_over,
    no_violation,
    protected,
    speak,
)

from holdfast_api.words import Role

# --- R2, output commit ----------------------------------------------------------------------------


def test_a_reply_that_was_covered_is_no_crime(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    for _ in range(5):
        talk.ask()
        link.commit()
        talk.reply()
    assert no_violation(wire)
    assert wire.summary()["replies checked"] == 5
    assert wire.summary()["checkpoints"] == 6
    assert wire.summary()["acknowledgements"] == 6


def test_a_reply_that_nothing_covers_breaks_r2(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.ask()
    talk.reply()
    assert broken(wire, "R2")
    assert "generation 2" in wire.violations[0]
    assert "epoch 1" in wire.violations[0]


def test_a_reply_before_the_acknowledgement_breaks_r2(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    talk.ask()
    link.checkpoint(2)
    talk.reply()
    assert broken(wire, "R2")


def test_a_request_that_came_while_the_epoch_was_on_its_way_is_not_covered_by_it(
    wire: Wire,
) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    link.pages(2)
    talk.ask()
    link.checkpoint(2, pages=False)
    link.acknowledge(2)
    talk.reply()
    assert broken(wire, "R2")


def test_an_acknowledgement_without_payload_is_output_too(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.ask()
    talk.flow.send(1)
    assert broken(wire, "R2")
    assert wire.summary()["replies checked"] == 0


def test_an_acceptance_of_a_connection_is_output_too(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    Talk(wire, "h1")
    assert [each[:2] for each in wire.violations] == ["R2"]


def test_a_request_that_comes_again_does_not_count_anew(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    talk.ask()
    link.commit()
    talk.flow.again(0, 26, b"*2\r\n$4\r\nINCR\r\n$5\r\ncount\r\n")
    talk.reply()
    assert no_violation(wire)
    assert wire.summary()["replies checked"] == 1


def test_a_reply_does_not_depend_on_what_was_asked_after_it(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    talk.ask()
    link.commit()
    talk.ask()
    talk.flow.send(1, b":1\r\n", heard=26)
    assert no_violation(wire)
    talk.flow.send(1, b":2\r\n")
    assert broken(wire, "R2")


def test_what_was_asked_again_does_not_move_what_was_asked_later(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    begin = talk.flow.next[0]
    talk.ask()
    talk.ask()
    link.commit()
    wire.see("client", talk.flow.frame(0, begin, bytes(26)))
    talk.ask()
    talk.flow.send(1, b":1\r\n", heard=26)
    assert no_violation(wire)


def test_a_reset_without_acknowledgement_depends_on_nothing(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.ask()
    talk.flow.send(1, flags=RST)
    assert no_violation(wire)


def test_an_older_connection_does_not_bind_again(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    old = protected(wire)
    protected(wire, "h1", "h3", 4)
    talk.ask()
    old.commit()
    talk.reply()
    assert broken(wire, "R2")


def test_a_connection_that_is_older_than_the_orders_does_not_bind(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    Controller(wire, "h1").order(9)
    protected(wire)
    talk.ask()
    talk.reply()
    assert no_violation(wire)


def test_before_the_first_acknowledgement_output_flows(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = Link(wire, "h1", "h2", 2)
    link.pages(0)
    talk.ask()
    talk.reply()
    assert no_violation(wire)
    assert wire.summary()["replies outside of protection"] == 1


@pytest.mark.parametrize("flags", [FIN | ACK, RST])
def test_the_end_of_the_connection_ends_nothing(wire: Wire, flags: int) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    link.flow.send(1, flags=flags)
    talk.ask()
    talk.reply()
    assert broken(wire, "R2")


def test_a_primary_that_won_its_claim_goes_on_alone(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.ask()
    fail_over(wire, "h1")
    talk.reply()
    assert no_violation(wire)
    assert wire.summary()["replies outside of protection"] == 1


def test_a_primary_that_was_ordered_to_goes_on_alone(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.ask()
    Controller(wire, "h1").order(3)
    talk.reply()
    assert no_violation(wire)


@pytest.mark.parametrize("role", [Role.BACKUP, Role.NONE])
def test_another_order_does_not_let_it_go_on_alone(wire: Wire, role: Role) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.ask()
    Controller(wire, "h1").order(3, role)
    talk.reply()
    assert broken(wire, "R2")


def test_an_order_of_its_own_generation_does_not_either(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.ask()
    Controller(wire, "h1").order(2)
    talk.reply()
    assert broken(wire, "R2")


def test_a_primary_that_nobody_told_does_not_go_on_alone(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.ask()
    Controller(wire, "h2").verdict("h1", 3, won=False)
    talk.reply()
    assert broken(wire, "R2")


def test_an_acknowledgement_after_the_won_claim_does_not_bind_again(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    link.checkpoint(2)
    fail_over(wire, "h1")
    link.acknowledge(2)
    talk.ask()
    talk.reply()
    assert no_violation(wire)


@pytest.mark.parametrize("code", ["released", "guest-ended"])
def test_a_farewell_that_frees_frees(wire: Wire, code: str) -> None:
    talk = Talk(wire, "h1")
    protected(wire).farewell(code)
    talk.ask()
    talk.reply()
    assert no_violation(wire)


def test_a_farewell_of_a_vm_that_failed_frees_nobody(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire).farewell("vm-failed")
    talk.ask()
    talk.reply()
    assert broken(wire, "R2")


def test_a_promoted_backup_is_bound_by_its_own_backup(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    fail_over(wire)
    speak(wire, "h2")
    link = protected(wire, "h2", "h3", 4)
    talk.ask()
    link.commit()
    talk.reply("h2")
    assert no_violation(wire)
    talk.ask()
    talk.reply("h2")
    assert broken(wire, "R2")


def test_a_switchover_is_no_crime(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    talk.ask()
    link.commit()  # the last one, with the reply in it
    fail_over(wire)
    talk.reply("h1")
    talk.ask()
    talk.flow.send(1, b":2\r\n", port="h2")
    assert no_violation(wire)
    assert wire.summary()["speaker changes"] == 1


def test_an_acknowledgement_of_what_has_not_passed_whole_breaks_r2(wire: Wire) -> None:
    link = protected(wire)
    link.pages(2)
    link.acknowledge(2)
    assert broken(wire, "R2")
    assert "acknowledged epoch 2" in wire.violations[0]


def test_an_acknowledgement_that_leaves_one_out_breaks_r2(wire: Wire) -> None:
    link = protected(wire)
    link.checkpoint(2)
    link.checkpoint(3)
    link.acknowledge(3)
    assert broken(wire, "R2")


# --- R4, the dead are silent ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "say", [lambda w: speak(w, "h1"), lambda w: Talk(w, "h1", opens=False).reply()]
)
def test_a_lost_vm_that_speaks_breaks_r4(wire: Wire, say: Callable[[Wire], None]) -> None:
    speak(wire, "h1")
    wire.declare_lost(GUEST)
    assert no_violation(wire)
    say(wire)
    assert broken(wire, "R4")


def test_others_may_speak_when_one_is_lost(wire: Wire) -> None:
    wire.declare_lost(GUEST)
    speak(wire, "h1", "10.77.1.2")
    Talk(wire, "h1", opens=False).ask()
    assert no_violation(wire)
