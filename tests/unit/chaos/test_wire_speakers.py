"""R1, one speaker: broken by whoever speaks out of turn, and by no honest change of hosts."""

from tests.chaos.wire import (
    LATE_PACKETS_MAX,
    Wire,
)
from tests.unit.chaos.passing import (
    GUEST,
    VM,
    Controller,
    Link,
    Talk,
    broken,
    fail_over,
    no_violation,
    protected,
    speak,
)

# --- R1, one speaker ------------------------------------------------------------------------------


def test_the_first_speaker_of_an_address_is_wherever_it_was_started(wire: Wire) -> None:
    speak(wire, "h3")
    assert no_violation(wire)
    assert wire.summary()["guest packets"] == 1
    assert wire.summary()["speaker changes"] == 0


def test_two_hosts_that_speak_without_a_protection_break_r1(wire: Wire) -> None:
    speak(wire, "h1")
    speak(wire, "h2")
    assert broken(wire, "R1")


def test_a_failover_that_the_wire_has_shown_is_no_crime(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    talk.ask()
    link.commit()
    talk.reply()
    fail_over(wire)
    talk.ask()
    talk.reply("h2")
    assert no_violation(wire)
    summary = wire.summary()
    assert summary["speaker changes"] == 1
    assert summary["speaker changes without a claim seen"] == 0
    assert summary["claims won"] == 1
    assert summary["connections"] == 1
    assert summary["replies checked"] == 1
    assert summary["replies outside of protection"] == 1


def test_a_failover_whose_claim_was_not_seen_is_counted(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    speak(wire, "h2")
    assert no_violation(wire)
    assert wire.summary()["speaker changes without a claim seen"] == 1


def test_a_claim_that_was_learned_from_an_order_is_seen(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    Controller(wire, "h2").order(3)
    speak(wire, "h2")
    assert no_violation(wire)
    assert wire.summary()["speaker changes without a claim seen"] == 0


def test_a_backup_that_acknowledged_nothing_can_not_take_over(wire: Wire) -> None:
    speak(wire, "h1")
    link = Link(wire, "h1", "h2", 2)
    link.checkpoint(1)
    fail_over(wire)
    speak(wire, "h2")
    assert broken(wire, "R1")


def test_a_backup_that_lost_the_claim_can_not_take_over(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    fail_over(wire, "h1")
    speak(wire, "h2")
    assert broken(wire, "R1")


def test_a_backup_that_was_told_that_it_lost_can_not_take_over(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    Controller(wire, "h2").verdict("h1", 3, won=False)
    speak(wire, "h2")
    assert broken(wire, "R1")


def test_somebody_else_than_the_backup_can_not_take_over(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    fail_over(wire)
    speak(wire, "h3")
    assert broken(wire, "R1")


def test_a_former_host_can_not_come_back_without_a_protection(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    fail_over(wire)
    speak(wire, "h2")
    speak(wire, "h1")
    assert broken(wire, "R1")


def test_an_older_protection_does_not_bring_a_vm_back(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    fail_over(wire)
    speak(wire, "h2")
    protected(wire, "h2", "h1", 1)
    speak(wire, "h1")
    assert broken(wire, "R1")


def test_a_covered_packet_from_a_host_that_never_spoke_breaks_r1(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    talk.flow.send(1, port="h3")
    assert broken(wire, "R1")


def test_a_former_host_that_is_bound_no_more_has_nothing_to_say(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    fail_over(wire)
    speak(wire, "h2")
    Controller(wire, "h1").order(9)
    talk.flow.send(1, port="h1")
    assert broken(wire, "R1")


def test_a_former_host_that_is_known_to_have_won_is_not_late(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    fail_over(wire)
    speak(wire, "h2")
    protected(wire, "h2", "h1", 4)
    Controller(wire, "h2").verdict("h1", 5, won=False)
    talk.flow.send(1, port="h1")
    assert no_violation(wire)
    assert wire.summary()["speaker changes"] == 2
    assert wire.summary()["late packets"] == 0


def test_what_bound_a_host_before_does_not_bind_it_when_it_is_back(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    fail_over(wire)
    speak(wire, "h2")
    protected(wire, "h2", "h1", 4)
    talk.ask()
    talk.reply("h1")
    assert no_violation(wire)
    assert wire.summary()["speaker changes without a claim seen"] == 1
    assert wire.summary()["replies outside of protection"] == 1


def test_a_vm_goes_there_and_back_and_there_again(wire: Wire) -> None:
    speak(wire, "h1")
    hosts = ["h1", "h2"]
    for turn in range(6):
        generation = 2 + 2 * turn
        protected(wire, hosts[0], hosts[1], generation)
        fail_over(wire, hosts[1], generation + 1)
        hosts.reverse()
        speak(wire, hosts[0])
    assert no_violation(wire)
    assert wire.summary()["speaker changes"] == 6


def test_a_host_on_the_way_may_die_before_its_guest_said_a_word(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    fail_over(wire)
    protected(wire, "h2", "h3", 4)
    fail_over(wire, "h3", 5)
    speak(wire, "h3")
    assert no_violation(wire)
    assert wire.summary()["speaker changes"] == 1


def test_a_chain_with_a_claim_lost_in_it_leads_nowhere(wire: Wire) -> None:
    speak(wire, "h1")
    protected(wire)
    fail_over(wire, "h1")
    protected(wire, "h2", "h3", 4)
    fail_over(wire, "h3", 5)
    speak(wire, "h3")
    assert broken(wire, "R1")


def test_acknowledged_output_that_comes_late_is_counted(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    talk.ask()
    link.commit()
    fail_over(wire)
    speak(wire, "h2")
    talk.ask()
    talk.flow.send(1, port="h2")
    talk.flow.send(1, b":1\r\n", port="h1", heard=26)
    talk.flow.again(1, 4, b":1\r\n", "h2")
    assert no_violation(wire)
    assert wire.summary()["late packets"] == 1
    assert wire.summary()["speaker changes"] == 1


def test_late_output_that_was_not_acknowledged_breaks_r1(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    fail_over(wire)
    speak(wire, "h2")
    talk.ask()
    talk.reply("h1")
    assert broken(wire, "R1")


def test_a_former_host_that_never_ends_breaks_r1(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    link = protected(wire)
    talk.ask()
    link.commit()
    fail_over(wire)
    speak(wire, "h2")
    for _ in range(LATE_PACKETS_MAX):
        talk.flow.send(1, port="h1")
    assert no_violation(wire)
    talk.flow.send(1, port="h1")
    assert broken(wire, "R1")


def test_a_new_life_of_a_vm_begins_wherever_it_was_started(wire: Wire) -> None:
    talk = Talk(wire, "h1")
    protected(wire)
    wire.declare_lost(GUEST)
    second = "10.77.1.2"
    speak(wire, "h1", second)
    wire.name_guest(second, VM)
    talk.flow.sides[1] = ("h1", second, 6379)
    talk.ask()
    talk.reply("h1")
    assert no_violation(wire), "what bound its former life must not bind this one"
    speak(wire, "h2", second)
    assert broken(wire, "R1"), "nor may a link of its former life carry it away"
