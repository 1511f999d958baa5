"""A local model: log-probabilities against a hand-made sum, and completions."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch

from exegete.tools.errors import UserError
from exegete.tools.llm import MemoryJournal, Message, Reply, Request, open_client, open_scorer
from exegete.tools.llm.local_client import LocalModel

STORIES = Path(__file__).parents[4] / "shared" / "data" / "models" / "stories260K" / "hf"
PROMPT = "Once upon a time, there was a little girl"
CONTINUATIONS = [" named Lily.", " who loved to play outside in the big park.", " zzz", ""]

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the model in {STORIES}")


@pytest.fixture(scope="module")
def local() -> LocalModel:
    scorer = open_scorer(f"hf:{STORIES}")
    assert isinstance(scorer, LocalModel)
    return scorer


def by_hand(local: LocalModel, prompt: str, continuation: str) -> float:
    """One row, no padding, a loop over tokens."""
    before, whole = local._ids(prompt), local._ids(prompt + continuation)
    start = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    with torch.inference_mode():
        logits = local._model(torch.tensor([whole])).logits[0].double()
    return sum(float(logits[at - 1].log_softmax(-1)[whole[at]]) for at in range(start, len(whole)))


def test_logprobs_are_the_sums_of_the_continuations_tokens(local: LocalModel) -> None:
    got = asyncio.run(local.logprobs(PROMPT, CONTINUATIONS))
    assert got == pytest.approx([by_hand(local, PROMPT, text) for text in CONTINUATIONS], abs=1e-3)
    assert got[3] == 0.0 and got[0] > got[2]


def test_logprobs_do_not_depend_on_company(local: LocalModel) -> None:
    together = asyncio.run(local.logprobs(PROMPT, CONTINUATIONS))
    alone = [asyncio.run(local.logprobs(PROMPT, [text]))[0] for text in CONTINUATIONS]
    assert together == pytest.approx(alone, abs=1e-4)


def test_probabilities_of_all_next_tokens_sum_to_one(local: LocalModel) -> None:
    """Over every single token that can follow, log-probabilities are those of one distribution."""
    before = local._ids(PROMPT)
    follow = [local._tokenizer.decode([*before, token])[len(local._tokenizer.decode(before)) :] for token in range(512)]
    single = [text for token, text in enumerate(follow) if text and local._ids(PROMPT + text) == [*before, token]]
    total = sum(map(math.exp, asyncio.run(local.logprobs(PROMPT, single))))
    assert len(single) > 200 and 0.5 < total <= 1 + 1e-5


def test_text_beyond_the_context(local: LocalModel) -> None:
    with pytest.raises(UserError, match="512"):
        asyncio.run(local.logprobs(PROMPT, [" and then" * 600]))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no causal language model"):
        open_scorer(f"hf:{tmp_path}")


def test_providers_give_no_logprobs_of_prompts() -> None:
    with pytest.raises(UserError, match="hf:PATH"):
        open_scorer("openai:gpt-4o")


def completed(request: Request) -> Reply:
    async def ask() -> Reply:
        client = open_client(f"hf:{STORIES}", journal=MemoryJournal())
        try:
            return await client.complete(request)
        finally:
            await client.close()

    return asyncio.run(ask())


def test_completion_with_logprobs() -> None:
    request = Request((Message("user", PROMPT),), max_tokens=12, temperature=0, logprobs=True)
    reply = completed(request)
    assert reply.status == "truncated" and reply.usage.output_tokens == 12 and reply.usd == 0
    assert reply.text.strip().startswith("named")
    assert reply.logprobs is not None and len(reply.logprobs) == 12
    for token in reply.logprobs:
        # Greedy: what was written is what was most probable.
        assert token.logprob == pytest.approx(token.top[0][1]) and len(token.top) == 20


def test_sampling_depends_on_the_request_alone() -> None:
    request = Request((Message("user", PROMPT),), max_tokens=12, temperature=1.0)
    other = Request((Message("user", PROMPT),), max_tokens=12, temperature=1.0, sample=1)
    assert completed(request).text == completed(request).text != completed(other).text


def test_a_prompt_beyond_the_context_is_one_failure() -> None:
    reply = completed(Request((Message("user", PROMPT),), max_tokens=600))
    assert reply.status == "rejected" and "512" in reply.detail
