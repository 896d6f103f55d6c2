"""Limits on how many requests are worked on at the same time."""

import asyncio

import pytest

from holdfast_api.errors import Unavailable
from holdfast_controller.control import Turns


def test_no_more_than_the_limit_are_worked_on_and_everybody_gets_a_turn() -> None:
    async def scene() -> None:
        turns, at_work, most, done = Turns(3, seconds_max=60), 0, 0, 0

        async def work() -> None:
            nonlocal at_work, most, done
            async with turns.take():
                at_work += 1
                most = max(most, at_work)
                await asyncio.sleep(0)
                at_work -= 1
                done += 1

        await asyncio.gather(*(work() for _ in range(20)))
        assert (most, done) == (3, 20)

    asyncio.run(scene())


def test_who_waits_too_long_is_sent_elsewhere_and_leaves_no_place_taken() -> None:
    async def scene() -> None:
        turns = Turns(1, seconds_max=0.01)

        async def wait() -> None:
            async with turns.take():
                pytest.fail("there was no turn")

        async with turns.take():
            for _ in range(3):
                with pytest.raises(Unavailable) as caught:
                    await wait()
                assert caught.value.code == "busy"
        async with turns.take():
            pass

    asyncio.run(scene())


def test_work_that_fails_gives_its_turn_back() -> None:
    async def scene() -> None:
        turns = Turns(1, seconds_max=60)
        with pytest.raises(ValueError, match="as asked"):
            async with turns.take():
                raise ValueError("as asked")
        async with turns.take():
            pass

    asyncio.run(scene())
