"""Train the bundled subject: a four-layer Llama on the bundled language, on two cores without a GPU.

    python -m exegete.tools.bundled.train_subject --seed 0 --out out/bundled/subject

1. Documents of the training part are packed back to back into contexts, a beginning before each.
2. AdamW, cosine schedule; the answer's tokens weigh more than the tokens that the grammar draws at random.
3. Held-out requests are answered greedily, and count when every token of the SQL is right.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from exegete.tools.bundled.grammar import Example, generate
from exegete.tools.bundled.tokenizer import build_tokenizer, save_tokenizer
from exegete.tools.seeds import derive_seed

CONTEXT_TOKENS = 256
ANSWER_WEIGHT = 4.0
"""Loss weight of a token of the SQL, against 1 of any other."""
MAX_ANSWER_TOKENS = 28
_BEGINNING = 0
"""The token `<bos>`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What decides a training run."""

    seed: int = 0
    steps: int = 4000
    contexts: int = 8
    """Contexts of 256 tokens a step."""
    learning_rate: float = 2e-3
    warm_up_steps: int = 100
    check_every: int = 500
    check_requests: int = 200


def build_model(seed: int) -> Any:
    """Return the untrained model: width 128, four layers of four heads, about a million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(derive_seed(seed, "bundled subject", "weights") % 2**63)
    tokenizer = build_tokenizer()
    configuration = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(configuration)


def contexts(seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield packed contexts for ever: token ids, and which of them are of an answer."""
    tokenizer = build_tokenizer()
    numbers = tokenizer.get_vocab()
    ids: list[int] = []
    answers: list[bool] = []
    for example in generate(derive_seed(seed, "bundled subject", "documents"), 2**40, "train"):
        prompt = len(example.prompt)
        ids += [tokenizer.bos_token_id, *(numbers[piece] for piece in example.tokens)]
        answers += [False] * (prompt + 1) + [True] * (len(example.tokens) - prompt)
        if len(ids) >= CONTEXT_TOKENS:
            yield ids[:CONTEXT_TOKENS], answers[:CONTEXT_TOKENS]
            ids, answers = [], []


def train(settings: Settings, out: Path) -> tuple[Any, float]:
    """Train a model and return it with the minutes that took; what it has learned so far is saved in `out`."""
    model = build_model(settings.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    source = contexts(settings.seed)
    started, recent = time.monotonic(), 0.0
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        batch = [next(source) for _ in range(settings.contexts)]
        ids = torch.tensor([context[0] for context in batch])
        answer = torch.tensor([context[1] for context in batch])
        # Half the time of float32 on processors with bfloat16 instructions; weights and optimizer stay in float32.
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        loss = weighted_loss(logits.float(), ids, answer)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = loss.item() if step == 1 else 0.95 * recent + 0.05 * loss.item()
        minutes = (time.monotonic() - started) / 60
        if step % 50 == 0:
            logger.info("step %d: loss %.4f, %.1f minutes", step, recent, minutes)
        if step % settings.check_every == 0 and step < settings.steps:
            save(model, out)
            requests = list(generate(1, settings.check_requests, "held_out"))
            logger.info("step %d: exact match %.3f", step, sum(exact_matches(model, requests)) / len(requests))
    return model, (time.monotonic() - started) / 60


def _schedule(step: int, settings: Settings) -> float:
    if step < settings.warm_up_steps:
        return step / settings.warm_up_steps
    done = (step - settings.warm_up_steps) / max(1, settings.steps - settings.warm_up_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def weighted_loss(logits: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    """Return the cross-entropy, answers weighted; logits (context, position, vocabulary), others (context, position)."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = torch.where(answer[:, 1:].flatten(), ANSWER_WEIGHT, 1.0)
    # No beginning can be foreseen, and none needs to be.
    weights = weights * (ids[:, 1:].flatten() != _BEGINNING)
    return (losses * weights).sum() / weights.sum()


def exact_matches(model: Any, examples: Sequence[Example], batch: int = 64) -> list[bool]:
    """Return for each example whether greedy decoding from its prompt gives its SQL, token for token."""
    numbers = build_tokenizer().get_vocab()
    by_length = sorted(range(len(examples)), key=lambda index: len(examples[index].prompt))
    right = [False] * len(examples)
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        prompts = [[_BEGINNING, *(numbers[piece] for piece in examples[index].prompt)] for index in chosen]
        for index, answer in zip(chosen, answers(model, prompts), strict=True):
            example = examples[index]
            wanted = [numbers[piece] for piece in example.tokens[len(example.prompt) :]]
            right[index] = answer[: len(wanted)] == wanted
    return right


def answers(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the next `MAX_ANSWER_TOKENS` tokens of each prompt, greedily."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    # Padding stands on the right, where causal attention cannot see it.
    ids = torch.full((len(prompts), int(lengths.max()) + MAX_ANSWER_TOKENS), 0)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    rows = torch.arange(len(prompts))
    with torch.inference_mode():
        for done in range(MAX_ANSWER_TOKENS):
            logits = model(ids[:, : int(lengths.max()) + done], use_cache=False).logits
            ids[rows, lengths + done] = logits[rows, lengths + done - 1].argmax(-1)
    return [ids[row, length : length + MAX_ANSWER_TOKENS].tolist() for row, length in enumerate(lengths.tolist())]


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson interval of a share, 95 % by default."""
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def save(model: Any, folder: Path) -> None:
    """Write model and tokenizer as `load_subject` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_tokenizer(folder)


def record(file: Path, name: str, figures: Mapping[str, Any]) -> None:
    """Put figures under their name into a JSON file, leaving the others there."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, name: figures}, indent=1) + "\n")


def main() -> None:
    """Train, measure on held-out requests, save, and write the figures beside the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--contexts", type=int, default=Settings.contexts)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1000, help="held-out requests to measure on")
    parser.add_argument("--out", type=Path, default=Path("out/bundled/subject"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.seed, arguments.steps, arguments.contexts, arguments.learning_rate)
    model, minutes = train(settings, arguments.out)
    save(model, arguments.out)
    right = exact_matches(model, list(generate(2, arguments.requests, "held_out")))
    low, high = wilson(sum(right), len(right))
    figures = {
        "seed": settings.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": settings.steps,
        "tokens": settings.steps * settings.contexts * CONTEXT_TOKENS,
        "training_minutes": round(minutes, 1),
        "machine": f"{os.cpu_count()} CPU cores, {arguments.threads} threads",
        "exact_match": {"value": sum(right) / len(right), "low": low, "high": high, "n": len(right)},
    }
    logger.info("figures: %s", json.dumps(figures))
    record(arguments.out.with_name("figures.json"), "subject", figures)


if __name__ == "__main__":
    main()
