from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.generation import generate
from exegete.tools.interventions import Tokens, ablate, push, steer
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.scheduling import Scheduler

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of PyTorch: with more, the scheduler's threads and other work of the machine wait for each other at every step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trials(prompts: list[Tokens], dictionary: Dictionary) -> list[Trial]:
    """64 prompts, each with another latent steered or ablated."""
    made = []
    for number in range(64):
        latents = [7 * number % 1024]
        name = dictionary.fingerprint
        change = steer(name, latents, 5.0) if number % 2 else ablate(name, latents)
        made.append(Trial(prompts[number % 12], change))
    return made


@pytest.fixture
def gate(model: LiveModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Every forward pass waits for it to open."""
    made = Gate(model)
    monkeypatch.setattr(model, "logits", made.logits)
    yield made
    made.open.set()


class Gate:
    def __init__(self, model: LiveModel) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self._logits = model.logits

    def logits(self, *arguments: Any, **named: Any) -> Tensor:
        self.reached.set()
        assert self.open.wait(30)
        return self._logits(*arguments, **named)


def logits(reading: Reading) -> list[Tensor]:
    return [row.clone() for row in reading.logits]


def close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-4, rtol=0) for a, b in zip(found, wanted, strict=True))


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to get there."""
    for _ in range(30_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never happened")


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
    assert statistics.largest_batch_tokens <= scheduler.batch_tokens == 1_024


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
