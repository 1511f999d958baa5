"""Activations on demand: what the latents of a dictionary do on given texts.

1. The prompts run in padded batches up to the dictionary's hook point; the vectors are reduced batch by batch.
2. A dictionary that codes each vector by itself gets the tokens of a whole batch, in blocks whose dense code fits a fixed
   amount of memory; a plain one selects sparsely. A `conditioned` dictionary gets each prompt as the context that it is.
3. `activations` are of chosen latents; `top_latents` are the strongest ones per token and per text; `pooled` is one
   sparse vector per text.

Codes may be signed. Strength is magnitude: the strongest activation is the one farthest from zero, and it keeps its sign;
of two equal magnitudes the positive one counts. Special tokens (beginning, end, padding) have activations like any other
token, but no text spells them: they are left out of whatever is said of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from exegete.tools.codes import blocks, codes
from exegete.tools.dictionaries import Dictionary, PlainDictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel, Reading, Trial
from exegete.tools.sampling import F32, I64

Pooling = Literal["max", "mean"]


class Active(NamedTuple):
    """A latent that is not zero at a token."""

    latent: int
    value: float
    """Its activation, negative where the code is signed and says so."""
    position: int
    """The token's, in its prompt."""


class TopLatents(NamedTuple):
    """The strongest latents of one prompt, strongest first; fewer where fewer are active."""

    tokens: tuple[tuple[Active, ...], ...]
    """Of each token, the special ones included."""
    text: tuple[Active, ...]
    """Of the text: each latent at the token where it is strongest, special tokens left out."""


def activations(
    model: LiveModel, dictionary: Dictionary, prompts: Sequence[Tokens], latents: Sequence[int]
) -> list[F32]:
    """Return the activations of `latents` on each prompt, shape (token, latent), in the order that they are given.

    Raises:
        UserError: no prompt or latent is given, one cannot run or is not there, the dictionary is not attached to the
            model, or an activation is not finite.
    """
    if not latents:
        raise UserError("no latent is given; name at least one")
    _require_attached(model, dictionary)
    model.require_latents(dictionary, latents)
    wanted = torch.tensor(list(latents), device=model.subject.device)

    def read(reading: Reading) -> list[F32]:
        with torch.inference_mode():
            vectors = _vectors(reading, dictionary)
            if dictionary.conditioned:
                found = [codes(dictionary, x, wanted) for x in vectors]
            else:
                found = list(torch.split(codes(dictionary, torch.cat(vectors), wanted), [len(x) for x in vectors]))
            return [_finite(values, dictionary) for values in found]

    return model.run([Trial(prompt) for prompt in prompts], read, keep="none", points=[dictionary.hook_point])


def top_latents(model: LiveModel, dictionary: Dictionary, prompts: Sequence[Tokens], top: int = 10) -> list[TopLatents]:
    """Return the `top` strongest latents of each prompt's tokens and of each prompt.

    Raises:
        UserError: there is no prompt, one cannot run, `top` is below 1, the dictionary is not attached to the model, or
            an activation is not finite.
    """
    if top < 1:
        raise UserError(f"top is {top}; ask for at least 1 latent")
    _require_attached(model, dictionary)

    def read(reading: Reading) -> list[TopLatents]:
        prompts = [trial.tokens for trial in reading.batch.trials]
        tokens: list[list[tuple[Active, ...]]] = [[()] * len(prompt) for prompt in prompts]
        best = _Pool(dictionary.latents, "max")
        for part in _parts(dictionary, _vectors(reading, dictionary)):
            for text, position, found in _top_of_tokens(part, top):
                tokens[text][position] = found
            best.add(part.where(~_special(model, prompts, part)))
        texts = [_top_of_text(best.row(row), top) for row in range(len(prompts))]
        return [TopLatents(tuple(one), text) for one, text in zip(tokens, texts, strict=True)]

    return model.run([Trial(prompt) for prompt in prompts], read, keep="none", points=[dictionary.hook_point])


def pooled(model: LiveModel, dictionary: Dictionary, prompts: Sequence[Tokens], pooling: Pooling = "max") -> csr_matrix:
    """Return one vector per prompt, sparse, shape (text, latent), float32.

    Args:
        model: with the dictionary attached.
        dictionary: whose latents.
        prompts: tokens of each text.
        pooling: a latent's "max", the activation of largest magnitude over the text's tokens, with its sign; or "mean"
            over all of these tokens, silent ones included. Special tokens are left out of both.

    Raises:
        UserError: there is no prompt, one cannot run or has special tokens only, `pooling` is unknown, the dictionary is
            not attached to the model, or an activation is not finite.
    """
    if pooling not in ("max", "mean"):
        raise UserError(f'pooling {pooling!r} is not one of "max", "mean"')
    _require_attached(model, dictionary)
    spelled = [sum(token not in model.subject.special_tokens for token in prompt) for prompt in prompts]
    if 0 in spelled:
        raise UserError(f"prompt {spelled.index(0)} has no token that a text spells; there is nothing to pool")

    def read(reading: Reading) -> list[tuple[I64, F32]]:
        prompts = [trial.tokens for trial in reading.batch.trials]
        pool = _Pool(dictionary.latents, pooling)
        for part in _parts(dictionary, _vectors(reading, dictionary)):
            pool.add(part.where(~_special(model, prompts, part)))
        return [pool.row(row)[:2] for row in range(len(prompts))]

    rows = model.run([Trial(prompt) for prompt in prompts], read, keep="none", points=[dictionary.hook_point])
    tokens = np.array(spelled, np.float32) if pooling == "mean" else np.ones(len(rows), np.float32)
    return _matrix([(latents, values / n) for (latents, values), n in zip(rows, tokens, strict=True)], dictionary)


def _matrix(rows: Sequence[tuple[I64, F32]], dictionary: Dictionary) -> csr_matrix:
    bounds = np.cumsum([0] + [len(latents) for latents, _ in rows])
    latents = np.concatenate([latents for latents, _ in rows])
    values = np.concatenate([values for _, values in rows])
    return csr_matrix((values, latents, bounds), shape=(len(rows), dictionary.latents))


class _Part(NamedTuple):
    """Entries of the codes of some tokens of a batch, sorted by text, position and latent. Each has shape (entry,)."""

    texts: I64
    positions: I64
    latents: I64
    values: F32

    def where(self, kept: NDArray[np.bool_] | I64) -> _Part:
        return _Part(self.texts[kept], self.positions[kept], self.latents[kept], self.values[kept])


class _Pool:
    """What is known of each (text, latent) of a batch, as parts of its codes come in: no more than the parts' union."""

    def __init__(self, latents: int, pooling: Pooling) -> None:
        self._latents = latents
        self._pooling = pooling
        self._keys: I64 = np.zeros(0, np.int64)
        self._values: F32 = np.zeros(0, np.float32)
        self._positions: I64 = np.zeros(0, np.int64)

    def add(self, part: _Part) -> None:
        keys = np.concatenate([self._keys, part.texts * self._latents + part.latents])
        values = np.concatenate([self._values, part.values])
        positions = np.concatenate([self._positions, part.positions])
        # Of one latent of one text the strongest first, then the positive one, then the earliest.
        order = np.lexsort((positions, -values, -np.abs(values), keys))
        keys, values = keys[order], values[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        summed = self._pooling == "mean" and len(starts) > 0
        self._values = np.add.reduceat(values, starts) if summed else values[starts]
        self._keys, self._positions = keys[starts], positions[order][starts]

    def row(self, text: int) -> tuple[I64, F32, I64]:
        """Return the latents of a text, sorted, their values (the sum for "mean"), and the positions of the strongest."""
        start, stop = np.searchsorted(self._keys, [text * self._latents, (text + 1) * self._latents])
        return self._keys[start:stop] - text * self._latents, self._values[start:stop], self._positions[start:stop]


def _vectors(reading: Reading, dictionary: Dictionary) -> list[Tensor]:
    return [reading.of(dictionary.hook_point, row) for row in range(len(reading.batch.trials))]


def _parts(dictionary: Dictionary, vectors: Sequence[Tensor]) -> Iterator[_Part]:
    """Yield the nonzero entries of the codes of texts, each (token, width), in blocks of bounded memory."""
    texts = np.repeat(np.arange(len(vectors)), [len(x) for x in vectors])
    positions = np.concatenate([np.arange(len(x)) for x in vectors])
    given: Iterable[Tensor] = vectors if dictionary.conditioned else blocks(torch.cat(list(vectors)), dictionary)
    start = 0
    for x in given:
        with torch.inference_mode():
            rows, latents, values = _entries(dictionary, x)
        yield _Part(texts[start + rows], positions[start + rows], latents, _finite(values, dictionary))
        start += len(x)


def _entries(dictionary: Dictionary, x: Tensor) -> tuple[I64, I64, Tensor]:
    """Return (rows, latents, values) of what is not zero in the code of `x`, shape (token, width)."""
    if not bool(torch.isfinite(x).all()):
        raise UserError(f"the subject gives values that are not finite at {dictionary.hook_point!r}")
    if isinstance(dictionary, PlainDictionary):
        code = dictionary.encode_sparse(x)
        return code.rows.cpu().numpy(), code.latents.cpu().numpy(), code.values
    dense = dictionary.encode(x[None])[0] if dictionary.conditioned else dictionary.encode(x)
    rows, latents = dense.nonzero(as_tuple=True)
    return rows.cpu().numpy(), latents.cpu().numpy(), dense[rows, latents]


def _finite(values: Tensor, dictionary: Dictionary) -> F32:
    found: F32 = values.float().cpu().numpy()
    if not np.isfinite(found).all():
        raise UserError(f"dictionary {dictionary.name!r} gives activations that are not finite")
    return found


def _special(model: LiveModel, prompts: Sequence[Tokens], part: _Part) -> NDArray[np.bool_]:
    """Return which entries of a part are at special tokens."""
    longest = max(len(prompt) for prompt in prompts)
    there = np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        there[row, : len(prompt)] = [token in model.subject.special_tokens for token in prompt]
    special: NDArray[np.bool_] = there[part.texts, part.positions]
    return special


def _top_of_tokens(part: _Part, top: int) -> Iterator[tuple[int, int, tuple[Active, ...]]]:
    """Yield (text, position, its strongest latents) for the tokens of a part that have any."""
    order = np.lexsort((part.latents, -part.values, -np.abs(part.values), part.positions, part.texts))
    part = part.where(order)
    changes = (np.diff(part.texts, prepend=-1) != 0) | (np.diff(part.positions, prepend=-1) != 0)
    starts = np.flatnonzero(changes)
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        chosen = slice(start, min(stop, start + top))
        found = _actives(part.latents[chosen], part.values[chosen], part.positions[chosen])
        yield int(part.texts[start]), int(part.positions[start]), found


def _top_of_text(row: tuple[I64, F32, I64], top: int) -> tuple[Active, ...]:
    latents, values, positions = row
    order = np.lexsort((latents, -values, -np.abs(values)))[:top]
    return _actives(latents[order], values[order], positions[order])


def _actives(latents: I64, values: F32, positions: I64) -> tuple[Active, ...]:
    return tuple(map(Active, latents.tolist(), values.tolist(), positions.tolist()))


def _require_attached(model: LiveModel, dictionary: Dictionary) -> None:
    if dictionary.fingerprint not in model.dictionaries:
        attached = ", ".join(repr(one.name) for one in model.dictionaries.values()) or "none"
        raise UserError(f"dictionary {dictionary.name!r} is not attached to the model; attached: {attached}")
