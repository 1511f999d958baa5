"""A model that several investigations share: the same results, fewer batches, every pass counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from exegete.agent.investigation.contract import Case
from exegete.agent.investigation.passes import PassesUsedUp, counting
from exegete.agent.investigation.shared_model import Sharing
from exegete.agent.live import Live
from exegete.tools.attribution_passes import attributed
from exegete.tools.dictionaries import Dictionary
from exegete.tools.effects import continuation_logprobs
from exegete.tools.errors import UserError
from exegete.tools.generation import generate
from exegete.tools.interventions import Tokens, ablate, patch
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.metrics import LogitDifference, numbered
from exegete.tools.subject import Subject


@pytest.fixture
def live(subject: Subject, dictionary: Dictionary) -> Live:
    return Live(LiveModel(subject, [dictionary]), dictionary, None)


@pytest.fixture
def sharing(live: Live) -> Iterator[Sharing]:
    with Sharing(live) as found:
        yield found


@pytest.fixture
def prompts(live: Live, cases: tuple[Case, ...]) -> list[Tokens]:
    return live.prompts([case.prompt for case in cases])


def logits(reading: Reading) -> list[torch.Tensor]:
    return list(reading.logits.unbind())


def test_it_runs_what_a_live_model_runs_and_counts_it(live: Live, sharing: Sharing, prompts: list[Tokens]) -> None:
    trials = [Trial(prompt, ablate(live.dictionary.fingerprint, (5, 7))) for prompt in prompts]
    shared = sharing.live().model
    with counting() as count:
        found = shared.run(trials, logits)
        with counting() as inner:
            written = generate(shared, trials[:3], 4, seed=1)
    torch.testing.assert_close(torch.stack(found), torch.stack(live.model.run(trials, logits)), atol=1e-4, rtol=1e-4)
    expected = generate(live.model, trials[:3], 4, seed=1)
    assert [one.tokens for one in written] == [one.tokens for one in expected]
    assert (count.used, inner.used) == (20, sum(len(one.tokens) + one.ended for one in expected))


def test_gradients_run_on_the_model_itself_and_are_counted(live: Live, sharing: Sharing, prompts: list[Tokens]) -> None:
    metric = LogitDifference([live.token(" DESC")] * 6, [live.token(" ASC")] * 6)
    trials = numbered(live.model, prompts[:6], metric)
    groups = torch.zeros(live.dictionary.latents, dtype=torch.long, device=live.model.subject.device)
    with counting() as count:
        found = attributed(sharing.live().model, live.dictionary, trials, metric, 0, groups, "last")
    expected = attributed(live.model, live.dictionary, trials, metric, 0, groups, "last")
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.attributions, other.attributions)
    # For each prompt: the clean pass, one with gradients, one without the latents and one without the error.
    assert count.used == 4 * 6


def test_more_than_is_left_is_refused_before_it_runs(sharing: Sharing, prompts: list[Tokens]) -> None:
    shared = sharing.live().model
    trials = [Trial(prompt) for prompt in prompts]
    with counting(most=30) as count:
        shared.run(trials, logits)
        with pytest.raises(PassesUsedUp, match="20 forward passes are needed at once, 10 are left"):
            shared.run(trials, logits)
        assert count.refused and count.used == 20
        shared.run(trials[:10], logits)
        with pytest.raises(PassesUsedUp):
            generate(shared, trials[:1], 1)
    assert count.used == 30 and sharing.statistics.trials == 30
    shared.run(trials[:1], logits)  # Outside, nobody counts.


def test_a_read_function_may_run_the_model_itself(sharing: Sharing, prompts: list[Tokens]) -> None:
    shared = sharing.live().model

    def read(reading: Reading) -> list[float]:
        again = shared.run([Trial(trial.tokens) for trial in reading.batch.trials], logits)
        return [float((one - two).abs().max()) for one, two in zip(again, reading.logits, strict=True)]

    assert max(shared.run([Trial(prompt) for prompt in prompts[:4]], read)) < 1e-4


def test_edits_that_take_from_other_prompts_do_not_wait_for_themselves(
    live: Live, sharing: Sharing, prompts: list[Tokens]
) -> None:
    shared = sharing.live().model
    trials = [Trial(prompt, patch(live.dictionary.fingerprint, (5, 7), prompts[0])) for prompt in prompts[1:4]]
    continuations = [[live.token(" DESC")]] * 3
    with counting() as count:
        # This one holds the model while it reads the prompt that it takes from.
        found = continuation_logprobs(shared, trials, continuations)
    np.testing.assert_allclose(found, continuation_logprobs(live.model, trials, continuations), atol=1e-4)
    assert count.used == 3


def test_investigations_share_batches(live: Live, prompts: list[Tokens]) -> None:
    together = threading.Barrier(4)

    def work(shared: Live) -> None:
        for prompt in prompts[:5]:
            together.wait()
            shared.model.run([Trial(prompt)], logits)

    with Sharing(live, waiting_s=0.2) as sharing, ThreadPoolExecutor(4) as threads:
        list(threads.map(work, [sharing.live() for _ in range(4)]))
        assert sharing.statistics.trials == 20 and sharing.statistics.batches <= 10


def test_closing_one_caller_leaves_the_others(sharing: Sharing, prompts: list[Tokens]) -> None:
    one, other = sharing.live().model, sharing.live().model
    one.close()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="this caller is closed"):
        one.run([Trial(prompts[0])], logits)
    assert len(other.run([Trial(prompts[0])], logits)) == 1
