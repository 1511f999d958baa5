"""What goes wrong in a shared batch: errors that stay with their call, memory, ends, and bad input."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import ablate, push
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.scheduling import Scheduler

from .scheduled import POINT, Gate, close, logits, until


def test_a_bad_trial_fails_before_it_joins_a_batch(
    model: LiveModel, trials: list[Trial], dictionary: Dictionary
) -> None:
    bad = Trial(trials[0].tokens, ablate(dictionary.fingerprint, [1024]))

    async def everyone(scheduler: Scheduler) -> Any:
        calls = [scheduler.run([trial], logits) for trial in [*trials[:5], bad, *trials[5:10]]]
        return await asyncio.gather(*calls, scheduler.generate([bad], 2), return_exceptions=True)

    with Scheduler(model, waiting_s=0.5) as scheduler:
        found = asyncio.run(everyone(scheduler))
    for error in (found.pop(), found.pop(5)):
        assert isinstance(error, UserError)
        assert "has no latent 1024" in str(error)
    assert close([rows[0] for rows in found], model.run(trials[:10], logits))
    assert scheduler.statistics.trials == 10


@pytest.mark.parametrize("keep", ["last", "none"])
def test_an_error_in_a_callers_read_is_its_own(model: LiveModel, trials: list[Trial], keep: Any) -> None:
    def broken(reading: Reading) -> list[None]:
        raise KeyError("mine")

    def short(reading: Reading) -> list[None]:
        return []

    def rows(reading: Reading) -> list[tuple[int, ...]]:
        return [trial.tokens for trial in reading.batch.trials]

    async def everyone(scheduler: Scheduler) -> Any:
        reads: list[Any] = [rows, broken, rows, short]
        calls = [scheduler.run(trials[n : n + 3], read, keep=keep, points=[POINT]) for n, read in enumerate(reads)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with Scheduler(model, waiting_s=0.5) as scheduler:
        found = asyncio.run(everyone(scheduler))
    assert isinstance(found[1], KeyError)
    assert isinstance(found[3], ValueError)
    for start in (0, 2):
        assert found[start] == [trial.tokens for trial in trials[start : start + 3]]
    assert scheduler.statistics.batches == 1


def test_a_batch_that_fails_is_split_until_the_guilty_call_is_alone(
    model: LiveModel, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.logits
    guilty = (5, 6, 7, 8)

    def fails(tokens: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if any(row[-4:].tolist() == list(guilty) for row in tokens):
            raise RuntimeError("an assertion on the device")
        return whole(tokens, *arguments, **named)

    monkeypatch.setattr(model, "logits", fails)
    calls = [[trial] for trial in trials[:9]]
    calls.insert(4, [trials[1], Trial(guilty), trials[2]])

    async def everyone(scheduler: Scheduler) -> list[Any]:
        return await asyncio.gather(*(scheduler.run(call, logits) for call in calls), return_exceptions=True)

    with Scheduler(model, waiting_s=0.5) as scheduler:
        found = asyncio.run(everyone(scheduler))
    error = found.pop(4)
    assert isinstance(error, RuntimeError)
    assert close([rows[0] for rows in found], model.run(trials[:9], logits))


def test_out_of_memory_halves_the_batch_for_everyone(
    model: LiveModel, trials: list[Trial], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = model.logits

    def small(tokens: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if len(tokens) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(tokens, *arguments, **named)

    wanted = model.run(trials, logits)
    monkeypatch.setattr(model, "logits", small)

    async def everyone(scheduler: Scheduler) -> list[list[Tensor]]:
        return await asyncio.gather(*(scheduler.run([trial], logits) for trial in trials))

    with Scheduler(model, waiting_s=0.5) as scheduler:
        found = asyncio.run(everyone(scheduler))
        assert len(scheduler.generate_blocking(trials[:8], 2)) == 8
    assert close([rows[0] for rows in found], wanted)
    assert "out of memory with" in caplog.text
    assert scheduler.statistics.trials == 72


def test_out_of_memory_in_a_read_halves_that_call_alone(model: LiveModel, trials: list[Trial]) -> None:
    read: list[int] = []

    def hungry(reading: Reading) -> list[Tensor]:
        if len(reading.batch.trials) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(reading)

    def counting(reading: Reading) -> list[Tensor]:
        read.append(len(reading.batch.trials))
        return logits(reading)

    def hopeless(reading: Reading) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async def everyone(scheduler: Scheduler) -> list[Any]:
        calls = [scheduler.run(trials[:6], one) for one in (hungry, counting, hopeless)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with Scheduler(model, waiting_s=0.5, batch_tokens=4_096) as scheduler:
        found = asyncio.run(everyone(scheduler))
    assert close(found[0], found[1])
    assert read == [6]
    assert isinstance(found[2], UserError)
    assert "does not fit the memory" in str(found[2])


def test_a_closed_scheduler_says_so(model: LiveModel, trials: list[Trial], gate: Gate) -> None:
    scheduler = Scheduler(model)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(scheduler.run_blocking, trials[:1], logits)
        assert gate.reached.wait(30)
        waiting = pool.submit(scheduler.run_blocking, trials, logits)
        until(lambda: scheduler.statistics.most_waiting == 64)
        closing = pool.submit(scheduler.close)
        gate.open.set()
        closing.result()
        assert close(running.result(), model.run(trials[:1], logits))
        with pytest.raises(UserError, match="this scheduler is closed"):
            waiting.result()
    with pytest.raises(UserError, match="this scheduler is closed"):
        scheduler.run_blocking(trials[:1], logits)
    with pytest.raises(UserError, match="this scheduler is closed"):
        asyncio.run(scheduler.generate(trials[:1], 2))
    scheduler.close()


def test_a_read_that_calls_its_own_scheduler_is_refused_rather_than_waiting_for_ever(
    model: LiveModel, trials: list[Trial]
) -> None:
    with Scheduler(model) as scheduler:
        with pytest.raises(RuntimeError, match="own scheduler"):
            scheduler.run_blocking(trials[:1], lambda reading: scheduler.run_blocking(trials[:1], logits))
        assert len(scheduler.run_blocking(trials[:1], logits)) == 1


def test_it_refuses_what_the_model_refuses(model: LiveModel, trials: list[Trial]) -> None:
    with Scheduler(model) as scheduler:
        with pytest.raises(UserError, match="no prompt"):
            scheduler.run_blocking([], logits)
        with pytest.raises(UserError, match="no hook point 'nowhere'"):
            scheduler.run_blocking(trials[:1], logits, points=["nowhere"])
        with pytest.raises(UserError, match="temperature"):
            scheduler.generate_blocking(trials[:1], 3, temperature=-1.0)
        with pytest.raises(UserError, match="must be 128"):
            scheduler.run_blocking([Trial(trials[0].tokens, push(POINT, [1.0], 1.0))], logits)
        assert scheduler.statistics.batches == 0
        assert scheduler.statistics.trials_per_batch == scheduler.statistics.padded_share == 0


@pytest.mark.parametrize(
    "wrong", [{"batch_tokens": 0}, {"most_waiting": 0}, {"waiting_s": -1.0}, {"waiting_s": float("nan")}]
)
def test_numbers_out_of_range_are_refused(model: LiveModel, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="give at least 1 token, 1 trial and 0 seconds"):
        Scheduler(model, **wrong)
