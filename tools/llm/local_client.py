"""A causal model on this machine, through transformers: `hf:PATH`.

As a wire it completes conversations (by its chat template, or as plain text where it has none) and gives log-probabilities
of what it wrote. As a `PromptScorer` it gives the log-probability of text after a prompt:

1. Prompt and continuation are tokenized as one text, so that the model sees tokens as it was trained on them. The
   continuation begins at the first token that differs from the prompt's own tokens: a token that spans the border counts
   with the continuation, whole.
2. One forward pass over right-padded rows of similar length; log p is the sum over the continuation's tokens of
   log softmax(logits) in float32.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from exegete.tools.errors import UserError
from exegete.tools.llm.contract import Message, Reply, Request, TokenLogprob, Usage
from exegete.tools.llm.faults import Declined
from exegete.tools.llm.structured import in_words
from exegete.tools.seeds import derive_seed

_ALTERNATIVES = 20
_BATCH_TOKENS = 8_192
Result = TypeVar("Result")


class LocalModel:
    """A causal model in this process. One thread runs it; calls queue for that thread."""

    takes_tools = False

    def __init__(
        self, path: str, *, device: str = "cpu", dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    ) -> None:
        """Load the model in folder `path`, or of that name on the hub, onto a torch device.

        Raises:
            UserError: there is no causal language model with a tokenizer there.
        """
        self.name = f"hf:{path}"
        try:
            with _quiet():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
                model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        except (OSError, ValueError, KeyError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"{self.name}: no causal language model can be loaded from there: {why}") from None
        self._model = model.to(device).eval()
        self._most_tokens: int = getattr(self._model.config, "max_position_embeddings", None) or 1 << 30
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="local-model")

    async def send(self, request: Request) -> Reply:
        """Return what the model writes after the conversation. Sampling is seeded by the request itself."""
        return await self._run(partial(self._complete, request))

    async def logprobs(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        """Return the natural log-probability of each continuation after `prompt`, summed over its tokens.

        Raises:
            UserError: the prompt has no tokens at all, or a text is longer than the model's context.
        """
        return await self._run(partial(self._logprobs, prompt, list(continuations)))

    async def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @torch.inference_mode()
    def _complete(self, request: Request) -> Reply:
        prompt = self._prompt(in_words(request).messages)
        if len(prompt) + request.max_tokens > self._most_tokens:
            raise Declined(
                "rejected",
                f"{len(prompt)} tokens and max_tokens={request.max_tokens} are more than the context of {self._most_tokens}",
            )
        torch.manual_seed(derive_seed(0, "local", request.id(self.name)) % (1 << 63))
        made = self._model.generate(
            torch.tensor([prompt], device=self._model.device),
            max_new_tokens=request.max_tokens,
            return_dict_in_generate=True,
            output_logits=request.logprobs,
            pad_token_id=self._pad(),
            **_sampling(request.temperature),
        )
        written = made.sequences[0, len(prompt) :].tolist()
        text = self._tokenizer.decode(written, skip_special_tokens=True)
        ended = bool(written) and written[-1] in self._ends()
        return Reply(
            "truncated" if not ended and len(written) >= request.max_tokens else "ok" if text.strip() else "empty",
            text,
            logprobs=self._token_logprobs(written, made.logits) if request.logprobs else None,
            model=self.name,
            usage=Usage(input_tokens=len(prompt), output_tokens=len(written)),
            detail="" if ended else "cut at max_tokens",
        )

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        if self._tokenizer.chat_template:
            turns = [{"role": message.role, "content": message.text} for message in messages]
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return self._ids("\n\n".join(message.text for message in messages))

    def _token_logprobs(self, written: Sequence[int], logits: Sequence[torch.Tensor]) -> tuple[TokenLogprob, ...]:
        rows = []
        for token, row in zip(written, logits, strict=True):
            logprobs = row[0].float().log_softmax(-1)
            top = logprobs.topk(min(_ALTERNATIVES, len(logprobs)))
            ranked = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            named = tuple((self._tokenizer.decode([index]), logprob) for index, logprob in ranked)
            rows.append(TokenLogprob(self._tokenizer.decode([token]), float(logprobs[token]), named))
        return tuple(rows)

    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _pad(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(pad if pad is not None else self._tokenizer.eos_token_id or 0)

    def _ids(self, text: str) -> list[int]:
        # Without the warning of transformers where a text is long: that is said in our own words.
        ids = list(self._tokenizer(text, verbose=False)["input_ids"])
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        # Not every tokenizer puts the token in front that the model was trained with; none should end the text.
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids[:-1] if eos is not None and eos != bos and ids[-1:] == [eos] else ids

    def _logprobs(self, prompt: str, continuations: list[str]) -> list[float]:
        before = self._ids(prompt)
        if not before:
            raise UserError(f"{self.name}: an empty prompt, and the tokenizer has no token to begin with")
        rows = [self._ids(prompt + continuation) for continuation in continuations]
        longest = max(map(len, rows), default=0)
        if longest > self._most_tokens:
            raise UserError(f"{self.name}: a text of {longest} tokens, but the model reads {self._most_tokens}")
        starts = [max(1, _common(before, row)) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        sums = [0.0] * len(rows)
        per_batch = max(1, _BATCH_TOKENS // max(1, longest))
        for at in range(0, len(order), per_batch):
            batch = order[at : at + per_batch]
            for i, value in zip(batch, self._sums([rows[i] for i in batch], [starts[i] for i in batch]), strict=True):
                sums[i] = value
        return sums

    @torch.inference_mode()
    def _sums(self, rows: list[list[int]], starts: list[int]) -> list[float]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._pad(), dtype=torch.long)
        mask = torch.zeros_like(ids)
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
            wanted[number, start : len(row)] = True
        ids, mask, wanted = (tensor.to(self._model.device) for tensor in (ids, mask, wanted))
        logits = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        # float64: the order of summing should not show.
        sums = each.double().where(wanted[:, 1:], 0.0).sum(-1).tolist()
        if not all(map(math.isfinite, sums)):
            raise UserError(f"{self.name}: the model gives NaN or infinite log-probabilities; try dtype float32")
        return [float(value) for value in sums]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers: a library does not print."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sampling(temperature: float | None) -> dict[str, Any]:
    if temperature is None:
        return {}
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}


def _common(before: Sequence[int], row: Sequence[int]) -> int:
    for number, (a, b) in enumerate(zip(before, row, strict=False)):
        if a != b:
            return number
    return min(len(before), len(row))
