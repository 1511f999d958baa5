"""Pacing against servers made of a clock and arithmetic: no real time passes."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable

import pytest

from exegete.tools.llm.contract import MemoryJournal, Message, Reply, Request
from exegete.tools.llm.faults import Transient
from exegete.tools.llm.journaled import JournaledClient
from exegete.tools.llm.pacing import Allowance, Bucket, Limits, Pacer


class Clock:
    """An event loop's time that jumps to the next timer."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._now = 0.0
        self._tick = 0
        select = self.loop._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None) -> object:
            if timeout:
                self._now += timeout
            return select(0)

        self.loop._selector.select = jump  # type: ignore[attr-defined]
        self.loop.time = lambda: self._now  # type: ignore[method-assign]

    def __call__(self) -> float:
        return self._now


def load(
    limits: Limits, seconds: float, allowed: Callable[[float], float], latency_s: float = 0.05, refused: float = 0.0
) -> list[tuple[float, bool]]:
    """Keep 300 callers asking a server that allows `allowed(t)` requests per second; return (time, answered) by request.

    It refuses a share of `refused`, drawn by chance, whatever the pace.
    """
    clock, chance = Clock(), random.Random(0)
    pacer = Pacer(limits, clock)
    seen: list[tuple[float, bool]] = []
    level = [1e9, 0.0]

    async def caller() -> None:
        while clock() < seconds:
            slot = await pacer.slot(100)
            rate = allowed(clock())
            level[0] = min(max(1.0, rate * 0.05), level[0] + (clock() - level[1]) * rate)
            level[1] = clock()
            good = level[0] >= 1 and chance.random() >= refused
            level[0] -= good
            seen.append((clock(), good))
            await asyncio.sleep(latency_s)
            if good:
                pacer.answered(slot, 100)
            else:
                pacer.pushed_back(slot, None)
                await asyncio.sleep(0.25)

    async def all_callers() -> None:
        await asyncio.gather(*(caller() for _ in range(300)))

    clock.loop.run_until_complete(all_callers())
    clock.loop.close()
    assert pacer.in_flight == 0
    return seen


def rate(seen: list[tuple[float, bool]], begin: float, end: float, good: bool = True) -> float:
    return sum(begin <= at < end and answered is good for at, answered in seen) / (end - begin)


def test_follows_a_sudden_limit_and_leaves_it_again() -> None:
    seen = load(Limits(concurrency=64), 60, lambda t: 5.0 if 10 <= t < 30 else 1e9)
    assert rate(seen, 5, 10) > 0.9 * 64 / 0.05
    # Within five seconds of the limit: most of what is allowed is used, and little is refused.
    assert rate(seen, 15, 30) > 0.8 * 5
    assert rate(seen, 15, 30, good=False) < 3
    # Within twenty-five seconds of its end: full speed again.
    assert rate(seen, 55, 60) > 0.9 * 64 / 0.05


def test_a_server_that_refuses_some_whatever_the_pace_is_asked_at_full_speed() -> None:
    seen = load(Limits(concurrency=64), 30, lambda t: 1e9, refused=0.05)
    assert rate(seen, 0, 30) > 0.9 * 64 / 0.05
    assert rate(seen, 0, 30, good=False) / rate(seen, 0, 30) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("refused", [0.12, 0.3])
@pytest.mark.parametrize("latency_s", [0.05, 1.0])
def test_as_much_as_is_refused_whatever_the_pace_slows_nothing(refused: float, latency_s: float) -> None:
    seen = load(Limits(concurrency=64), 60, lambda t: 1e9, latency_s, refused)
    # A pace that follows every refusal ends at one answer a second.
    assert rate(seen, 30, 60) > 0.9 * (1 - refused) * 64 / latency_s


def test_slow_answers_do_not_keep_the_rate_below_the_limit() -> None:
    seen = load(Limits(concurrency=64), 30, lambda t: 5.0 if t >= 5 else 1e9, latency_s=1.0)
    # Five calls must be in flight for that; a window that is halved each time would hold two.
    assert rate(seen, 10, 30) > 0.7 * 5
    assert rate(seen, 10, 30, good=False) < 2


def test_a_server_that_takes_few_at_a_time() -> None:
    busy: deque[float] = deque()

    clock = Clock()
    pacer = Pacer(Limits(concurrency=64), clock)
    outcomes: list[tuple[float, bool]] = []

    async def caller() -> None:
        while clock() < 40:
            slot = await pacer.slot(1)
            while busy and busy[0] <= clock():
                busy.popleft()
            good = len(busy) < 8
            outcomes.append((clock(), good))
            if good:
                busy.append(clock() + 0.5)
                await asyncio.sleep(0.5)
                pacer.answered(slot, 1)
            else:
                await asyncio.sleep(0.01)
                pacer.pushed_back(slot, None)
                await asyncio.sleep(0.25)

    async def callers() -> None:
        await asyncio.gather(*(caller() for _ in range(64)))

    clock.loop.run_until_complete(callers())
    clock.loop.close()
    # Eight at a time of half a second each are sixteen per second.
    assert rate(outcomes, 20, 40) > 0.75 * 16


def test_given_limits_hold() -> None:
    for limits in (Limits(requests_per_minute=600), Limits(tokens_per_minute=60_000)):
        seen = load(limits, 30, lambda t: 1e9)
        # Ten per second, after a tenth of a minute's worth at once.
        assert sum(at < 30 for at, _ in seen) == pytest.approx(60 + 300, abs=10)


def test_bucket_by_hand() -> None:
    bucket = Bucket(60, 0.0)
    # One per second, six at once; a larger one passes and is worked off.
    assert bucket.wait_s(0.0) == 0
    bucket.take(10)
    assert bucket.wait_s(0.0) == pytest.approx(5.0, abs=1e-3)
    assert bucket.wait_s(5.1) == 0


def test_retry_after_holds_for_everybody_where_nothing_is_answered() -> None:
    clock = Clock()
    pacer = Pacer(Limits(), clock)

    async def ask() -> tuple[float, float]:
        slot = await pacer.slot(1)
        await asyncio.sleep(2)
        pacer.pushed_back(slot, 30.0)
        slot = await pacer.slot(1)
        held = clock()
        pacer.answered(slot, 1)
        slot = await pacer.slot(1)
        pacer.pushed_back(slot, 30.0)
        await pacer.slot(1)
        return held, clock()

    held, after = clock.loop.run_until_complete(ask())
    clock.loop.close()
    assert held == pytest.approx(32, abs=0.1)
    # Others are answered: only the call that got the second one waits for it.
    assert after < 34


def test_order_of_arrival_and_leaving_the_queue() -> None:
    clock = Clock()
    pacer = Pacer(Limits(concurrency=1), clock)
    order: list[int] = []

    async def caller(number: int) -> None:
        slot = await pacer.slot(1)
        order.append(number)
        await asyncio.sleep(1)
        pacer.answered(slot, 1)

    async def ask() -> None:
        tasks = [asyncio.create_task(caller(number)) for number in range(5)]
        await asyncio.sleep(0.5)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    clock.loop.run_until_complete(ask())
    clock.loop.close()
    assert order == [0, 1, 3, 4] and pacer.in_flight == 0


def shared_load(limits: Limits, seconds: float) -> tuple[list[tuple[float, int]], int]:
    """Have 20 callers each ask two models of one server; return (time, model) by request, and the most in flight at once."""
    clock = Clock()
    allowance = Allowance(limits, clock)
    pacers = [Pacer(limits, clock, allowance) for _ in range(2)]
    seen: list[tuple[float, int]] = []
    most = 0

    async def caller(model: int) -> None:
        nonlocal most
        while clock() < seconds:
            slot = await pacers[model].slot(100)
            seen.append((clock(), model))
            most = max(most, pacers[0].in_flight + pacers[1].in_flight)
            await asyncio.sleep(0.05)
            pacers[model].answered(slot, 100)

    async def callers() -> None:
        await asyncio.gather(*(caller(model) for model in (0, 1) for _ in range(20)))

    clock.loop.run_until_complete(callers())
    clock.loop.close()
    assert allowance.in_flight == 0
    return seen, most


@pytest.mark.parametrize("limits", [Limits(requests_per_minute=600), Limits(tokens_per_minute=60_000)])
def test_models_of_one_server_share_its_limits(limits: Limits) -> None:
    seen, _ = shared_load(limits, 30)
    # As many as one model alone would get, and each model its part of them.
    assert sum(at < 30 for at, _ in seen) == pytest.approx(60 + 300, abs=10)
    assert min(sum(model == own for _, model in seen) for own in (0, 1)) > 100


def test_models_of_one_server_share_its_calls_in_flight() -> None:
    seen, most = shared_load(Limits(concurrency=6), 10)
    assert most == 6
    assert [sum(model == own for _, model in seen) for own in (0, 1)] == pytest.approx([600, 600], abs=60)


class Sparing:
    """A wire to a server that takes all requests, but five a second from second 2 to second 12."""

    name = "sparing:model"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.seen: list[tuple[float, bool]] = []
        self._next = 0.0

    async def send(self, request: Request) -> Reply:
        now = self.clock()
        good = not 2 <= now < 12 or now >= self._next
        self.seen.append((now, good))
        if not good:
            raise Transient("HTTP 429", pushback=True)
        self._next = now + 0.2
        await asyncio.sleep(0.05)
        return Reply("ok", text="yes")

    async def close(self) -> None: ...


def test_a_sudden_limit_makes_no_failed_row() -> None:
    clock, journal = Clock(), MemoryJournal()
    wire = Sparing(clock)
    client = JournaledClient(wire, journal=journal, budget=None, price=None, limits=Limits(concurrency=8), clock=clock)
    replies: list[Reply] = []

    async def caller(number: int) -> None:
        while clock() < 35:
            replies.append(await client.complete(Request((Message("user", f"{number} {len(replies)}"),))))

    async def callers() -> None:
        await asyncio.gather(*map(caller, range(20)))
        await client.close()

    clock.loop.run_until_complete(callers())
    clock.loop.close()
    assert {reply.status for reply in replies} == {"ok"} and any(reply.attempts > 1 for reply in replies)
    # Whatever was refused was asked again until it was answered, once, and each answer is a row.
    assert sum(good for _, good in wire.seen) == len(replies) == len(journal.replies) == len(journal.intents)
    # This server takes no burst, and delays after pushback are drawn: 3.9 to 4.0 of five in 100 trials.
    assert 3.5 <= rate(wire.seen, 4, 12) <= 5.1 and rate(wire.seen, 4, 12, good=False) < 2
    assert rate(wire.seen, 30, 35) > 0.9 * 8 / 0.05
