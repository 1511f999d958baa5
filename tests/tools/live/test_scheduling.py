"""Many experiments at once share the batches of one model, and each gets its own rows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from exegete.tools.errors import UserError
from exegete.tools.generation import generate
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.scheduling import Scheduler

from .scheduled import POINT, Gate, close, logits, until


def test_64_concurrent_experiments_share_few_batches(model: LiveModel, trials: list[Trial]) -> None:
    async def everyone(scheduler: Scheduler) -> list[list[Tensor]]:
        return await asyncio.gather(*(scheduler.run([trial], logits) for trial in trials))

    with Scheduler(model, waiting_s=0.5) as scheduler:
        found = asyncio.run(everyone(scheduler))
    alone = [model.run([trial], logits)[0] for trial in trials]
    assert close([rows[0] for rows in found], alone)
    statistics = scheduler.statistics
    assert statistics.trials == 64
    assert statistics.tokens == sum(len(trial.tokens) for trial in trials)
    assert statistics.batches <= 6
    assert statistics.trials_per_batch > 10
    assert 0 <= statistics.padded_share < 0.25
    assert statistics.tokens <= statistics.padded_tokens
    assert statistics.largest_batch_tokens <= scheduler.batch_tokens == 4_096


def test_calls_of_different_readings_get_their_own(model: LiveModel, trials: list[Trial]) -> None:
    def vectors(reading: Reading) -> list[Tensor]:
        assert reading.logits.numel() == 0
        return [reading.of(POINT, row) for row in range(len(reading.batch.trials))]

    def every(reading: Reading) -> list[Tensor]:
        return [reading.logits[row, -len(trial.tokens) :].clone() for row, trial in enumerate(reading.batch.trials)]

    kinds: list[tuple[Any, dict[str, Any]]] = [
        (logits, {}),
        (every, {"keep": "all"}),
        (vectors, {"keep": "none", "points": [POINT]}),
    ]
    jobs = [(kind, trials[start : start + 5]) for start in range(0, 60, 5) for kind in kinds]
    with Scheduler(model, waiting_s=0.5) as scheduler, ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: scheduler.run_blocking(job[1], job[0][0], **job[0][1]), jobs))
    assert scheduler.statistics.batches <= 18
    for ((read, options), part), rows in zip(jobs, found, strict=True):
        assert close(rows, model.run(part, read, **options))


def test_a_reading_holds_the_callers_own_rows_only(model: LiveModel, trials: list[Trial]) -> None:
    seen: list[tuple[tuple[int, ...], int]] = []

    def spoil(reading: Reading) -> list[None]:
        seen.append((tuple(reading.logits.shape), reading.batch.tokens.shape[1]))
        with torch.inference_mode():
            reading.logits.fill_(torch.nan)
        return [None] * len(reading.batch.trials)

    async def both(scheduler: Scheduler) -> tuple[list[None], list[Tensor]]:
        short = sorted(trials, key=lambda trial: len(trial.tokens))[:2]
        return await asyncio.gather(scheduler.run(short, spoil), scheduler.run(trials[:9], logits))

    with Scheduler(model, waiting_s=0.5) as scheduler:
        _, rows = asyncio.run(both(scheduler))
    assert seen == [((2, 337), sorted(len(trial.tokens) for trial in trials)[1])]
    assert close(rows, model.run(trials[:9], logits))


def test_generation_is_shared_where_the_settings_agree(model: LiveModel, trials: list[Trial]) -> None:
    settings = [(4, 1.0, 0), (4, 0.0, 0), (4, 1.0, 3)]

    async def everyone(scheduler: Scheduler) -> list[Any]:
        return await asyncio.gather(
            *(
                scheduler.generate([trial], tokens, temperature=temperature, seed=seed)
                for trial in trials[:8]
                for tokens, temperature, seed in settings
            )
        )

    with Scheduler(model, waiting_s=0.5) as scheduler:
        found = asyncio.run(everyone(scheduler))
        blocking = scheduler.generate_blocking(trials[:8], 4, temperature=0.0)
    assert scheduler.statistics.batches <= 8
    for place, (tokens, temperature, seed) in enumerate(settings):
        wanted = generate(model, trials[:8], tokens, temperature=temperature, seed=seed)
        assert [rows[0].tokens for rows in found[place::3]] == [one.tokens for one in wanted]
    assert [one.tokens for one in blocking] == [rows[0].tokens for rows in found[1::3]]


def test_a_caller_of_many_trials_does_not_keep_others_waiting(
    model: LiveModel, prompts: list[Tokens], gate: Gate
) -> None:
    done: list[str] = []

    def reader(name: str) -> Callable[[Reading], list[None]]:
        def read(reading: Reading) -> list[None]:
            done.extend([name] * len(reading.batch.trials))
            return [None] * len(reading.batch.trials)

        return read

    async def everyone(scheduler: Scheduler) -> None:
        trial = Trial(prompts[0])
        with scheduler.caller() as one:
            calls = [scheduler.run([trial] * 100, reader("many")) for _ in range(2)]
            calls += [scheduler.run([trial], reader("flood"), caller=one) for _ in range(30)]
            tasks = [asyncio.create_task(call) for call in calls]
            await asyncio.to_thread(gate.reached.wait, 30)
            single = asyncio.create_task(scheduler.run([trial], reader("single")))
            await asyncio.to_thread(until, lambda: scheduler._queue.added == 33)
            gate.open.set()
            await asyncio.gather(single, *tasks)

    with Scheduler(model, batch_tokens=4 * len(prompts[0]), most_waiting=30, waiting_s=0.2) as scheduler:
        asyncio.run(everyone(scheduler))
    assert len(done) == 231
    # A round is 16 trials. The first runs already, the second has no room for the single one before, the third holds it.
    assert 16 <= done.index("single") < 48
    before = Counter(done[16 : done.index("single")])
    # Who came first has the first round; then the calls of one caller have one turn together.
    assert 0 < before["flood"] <= before["many"] + 1
    assert scheduler.statistics.most_waiting == 30


def test_a_bounded_queue_makes_callers_wait_and_completes(model: LiveModel, trials: list[Trial]) -> None:
    async def everyone(scheduler: Scheduler) -> list[list[Tensor]]:
        return await asyncio.gather(*(scheduler.run(trials[start : start + 4], logits) for start in range(0, 64, 4)))

    with Scheduler(model, most_waiting=3) as scheduler:
        found = asyncio.run(everyone(scheduler))
    assert scheduler.statistics.most_waiting == 3
    assert scheduler.statistics.batches >= 64 / 3
    assert close([row for rows in found for row in rows], model.run(trials, logits))


def test_a_cancelled_task_takes_its_trials_along(model: LiveModel, trials: list[Trial], gate: Gate) -> None:
    async def one(scheduler: Scheduler) -> list[Tensor]:
        first = asyncio.create_task(scheduler.run(trials[:1], logits))
        await asyncio.to_thread(gate.reached.wait, 30)
        cancelled = asyncio.create_task(scheduler.run(trials, logits))
        kept = asyncio.create_task(scheduler.run(trials[2:4], logits))
        await asyncio.to_thread(until, lambda: scheduler.statistics.most_waiting == 66)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        gate.open.set()
        await first
        return await kept

    with Scheduler(model) as scheduler:
        found = asyncio.run(one(scheduler))
    assert scheduler.statistics.trials == 3
    assert close(found, model.run(trials[2:4], logits))


def test_a_closed_caller_fails_its_calls_alone(model: LiveModel, trials: list[Trial], gate: Gate) -> None:
    with Scheduler(model) as scheduler, ThreadPoolExecutor(3) as pool:
        caller = scheduler.caller()
        running = pool.submit(scheduler.run_blocking, trials[:1], logits, caller=caller)
        assert gate.reached.wait(30)
        waiting = pool.submit(scheduler.run_blocking, trials, logits, caller=caller)
        other = pool.submit(scheduler.run_blocking, trials[:2], logits)
        until(lambda: scheduler.statistics.most_waiting == 66)
        caller.close()
        gate.open.set()
        for call in (running, waiting):
            with pytest.raises(UserError, match="this caller is closed"):
                call.result()
        assert len(other.result()) == 2
        with pytest.raises(UserError, match="this caller is closed"):
            scheduler.run_blocking(trials[:1], logits, caller=caller)
    assert scheduler.statistics.trials == 3
