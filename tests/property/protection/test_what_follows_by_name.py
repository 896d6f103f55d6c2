"""The ways of breaking a protection that are easy to get wrong, one by one, in the same world.

`test_two_machines_and_an_arbiter` meets most of these by chance. Here none depends on chance.
"""

from tests.property.protection.world import STRANGER, A, B, Protection

from holdfast_agent.core.backup import BackupState
from holdfast_agent.core.epoch import PrimaryState
from holdfast_api.words import ClaimReason, Phase

SILENT = ClaimReason.PEER_SILENT


def after(epochs: int) -> Protection:
    """Return a protection whose VM ran through so many epochs, protected if there was one."""
    world = Protection()
    world.begin(epochs=epochs, noted=True, misfortunes=2)
    assert world.left == list(range(1, epochs + 1))
    assert (world.record.phase is Phase.PROTECTED) == (epochs > 0)
    return world


def rules_hold(world: Protection) -> bool:
    for rule in world.invariants:
        rule.function(world)
    return True


def the_backup_wins(world: Protection) -> None:
    world.the_backup_suspects(SILENT, what_is_under_way_is_lost=False)
    world.the_arbiter_hears_a_claim(B)
    assert world.record.primary == B


def test_a_primary_that_lost_the_claim_destroys_its_vm_and_says_nothing_more() -> None:
    world = after(2)
    the_backup_wins(world)
    world.the_primary_loses_its_peer(SILENT, what_is_under_way_is_lost=True)
    world.the_arbiter_hears_a_claim(A)
    world.a_verdict_arrives(A)
    world.a_verdict_arrives(B)
    assert not world.primary_lives
    assert not world.everything_left
    assert world.promoted_from == 2
    assert rules_hold(world)


def test_a_primary_that_hears_of_its_loss_by_an_order_alone_destroys_its_vm() -> None:
    world = after(2)
    the_backup_wins(world)
    world.an_order_arrives(A)
    assert not world.primary_lives
    assert not world.everything_left
    assert rules_hold(world)


def test_a_backup_that_lost_the_claim_destroys_its_standby() -> None:
    world = after(2)
    world.the_primary_loses_its_peer(SILENT, what_is_under_way_is_lost=False)
    world.the_arbiter_hears_a_claim(A)
    world.the_backup_suspects(SILENT, what_is_under_way_is_lost=False)
    world.the_arbiter_hears_a_claim(B)
    world.a_verdict_arrives(B)
    world.a_verdict_arrives(A)
    assert not world.standby_lives
    assert world.promoted_from is None
    assert world.everything_left
    assert rules_hold(world)


def test_orders_that_change_no_role_neither_release_nor_destroy_anything() -> None:
    for has_lost_its_peer in (False, True):
        world = after(1)
        if has_lost_its_peer:
            world.the_primary_loses_its_peer(SILENT, what_is_under_way_is_lost=False)
        for host in (A, B):
            world.an_order_arrives(host)
            world.an_order_arrives_late(host, back=1)
            world.an_order_arrives_late(host, back=2)
        assert world.is_holding
        assert world.left == [1]
        assert world.primary_lives
        assert world.standby_lives


def a_wrong_acknowledgement_releases_nothing_and_costs_the_trust(ahead: int) -> bool:
    world = after(2)
    world.a_wrong_acknowledgement_arrives(ahead=ahead)
    assert world.left == [1, 2]
    assert world.primary.state is PrimaryState.CLAIMING
    return rules_hold(world)


def test_an_acknowledgement_that_comes_twice_releases_nothing_and_costs_the_trust() -> None:
    assert a_wrong_acknowledgement_releases_nothing_and_costs_the_trust(ahead=0)


def test_an_acknowledgement_of_what_was_not_captured_releases_nothing() -> None:
    assert a_wrong_acknowledgement_releases_nothing_and_costs_the_trust(ahead=1)


def test_an_acknowledgement_that_comes_after_the_loss_of_the_backup_releases_nothing() -> None:
    world = after(1)
    world.a_checkpoint_is_due(save_fails=False)
    world.a_message_reaches_the_backup()
    world.the_primary_loses_its_peer(SILENT, what_is_under_way_is_lost=False)
    world.an_acknowledgement_arrives()
    assert world.left == [1]
    assert world.guest_stands


def test_a_checkpoint_after_a_gap_and_one_that_comes_twice_are_not_acknowledged() -> None:
    for ahead in (0, 2):
        world = after(2)
        world.a_wrong_checkpoint_arrives(ahead=ahead, final=False)
        assert not world.to_primary
        assert world.backup.state is BackupState.CLAIMING
        assert rules_hold(world)


def test_a_backup_that_suspects_acknowledges_nothing_that_is_still_under_way() -> None:
    world = after(2)
    world.a_checkpoint_is_due(save_fails=False)
    world.the_backup_suspects(SILENT, what_is_under_way_is_lost=False)
    world.a_message_reaches_the_backup()
    assert not world.to_primary
    assert world.applied == [1, 2]
    world.the_arbiter_hears_a_claim(B)
    world.a_verdict_arrives(B)
    assert world.promoted_from == 2
    assert rules_hold(world)


def test_a_standby_that_holds_nothing_asks_for_no_claim() -> None:
    world = after(0)
    world.the_backup_suspects(SILENT, what_is_under_way_is_lost=True)
    assert B not in world.asked
    assert not world.standby_lives


def test_a_primary_whose_seeding_fails_says_so_and_opens_no_plug() -> None:
    world = after(0)
    world.the_primary_loses_its_peer(SILENT, what_is_under_way_is_lost=True)
    world.the_control_plane_notes_what_the_primary_reports()
    assert not world.everything_left
    assert world.primary_lives
    assert (world.record.phase, world.record.backup) == (Phase.UNPROTECTED, None)


def test_a_standby_that_crashed_is_destroyed_and_asks_for_no_claim() -> None:
    world = after(2)
    world.the_standby_crashes()
    assert not world.standby_lives
    assert B not in world.asked


def test_a_backup_may_not_win_before_the_record_says_protected() -> None:
    world = Protection()
    world.begin(epochs=1, noted=False, misfortunes=0)
    world.the_backup_suspects(SILENT, what_is_under_way_is_lost=True)
    world.the_arbiter_hears_a_claim(B)
    assert world.record.primary == A
    assert world.record.phase is Phase.SEEDING
    world.a_verdict_arrives(B)
    assert not world.standby_lives


def test_a_vm_without_a_backup_does_not_become_protected_by_a_report() -> None:
    world = after(1)
    world.the_primary_loses_its_peer(SILENT, what_is_under_way_is_lost=False)
    world.the_arbiter_hears_a_claim(A)
    world.a_report_that_nobody_can_have_made_arrives(A)
    assert world.record.phase is Phase.UNPROTECTED


def test_a_protected_backup_is_not_dropped_without_a_claim() -> None:
    world = after(1)
    world.a_report_that_nobody_can_have_made_arrives(A)
    assert world.record.backup == B


def test_neither_a_stranger_nor_a_side_of_another_generation_wins() -> None:
    world = after(1)
    present = world.record.generation
    world.a_claim_that_nobody_can_have_made_arrives(STRANGER, present, SILENT)
    world.a_claim_that_nobody_can_have_made_arrives(B, present - 1, SILENT)
    world.a_claim_that_nobody_can_have_made_arrives(A, present + 1, SILENT)
    assert world.record.generation == present


def test_a_capture_that_failed_is_tried_again_under_the_same_number() -> None:
    world = after(1)
    world.a_checkpoint_is_due(save_fails=True)
    world.an_epoch_passes()
    assert world.left == [1, 2]
    assert rules_hold(world)


def test_no_second_checkpoint_is_captured_while_one_is_unacknowledged() -> None:
    world = after(1)
    for _ in range(2):
        world.a_checkpoint_is_due(save_fails=False)
    assert [epoch for _, epoch, _ in world.to_backup] == [2]
