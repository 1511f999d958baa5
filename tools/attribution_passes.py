"""The forward and backward passes of attribution, on padded batches (see `exegete.tools.attribution`).

1. A clean pass reads the vectors x where the dictionary reads and writes, and the metric.
2. The code of x is kept sparsely: only active latents are written down, blocks of tokens at a time.
3. Each further pass puts other vectors where the dictionary writes, as a leaf of autograd, and takes the gradient of
   the metric there: nothing before that point is in the graph.
   Passes of one kind, as of the groups, run together, as many as a batch has room for.
4. Gradients are taken to the active latents along their directions, or back through a decoder that is no linear map.

An intervention of a trial stays in place, and the vectors are what it leaves at the dictionary's points: what an ablation
added after it would see. Only a change of this dictionary's own latents is refused: their activations are then no longer
what `encode` makes of the vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from exegete.tools.codes import blocks
from exegete.tools.dictionaries import Dictionary, PlainDictionary, SparseCode
from exegete.tools.errors import UserError
from exegete.tools.interventions import LatentEdit
from exegete.tools.live_model import Batch, LiveModel, Trial
from exegete.tools.metrics import Floats, LogitPositions, Metric, PromptTrial, against, measured

Added = TypeVar("Added")

_GATHERED = 2**24
"""Numbers of directions that are gathered at once: 64 megabytes in float32."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was found on one prompt."""

    clean: float
    """The metric."""
    moves: bool
    """Whether any gradient was not 0."""
    positions: np.ndarray
    """This and the next three have shape (entries,): position in the prompt, latent, activation, attribution."""
    latents: np.ndarray
    activations: Floats
    attributions: Floats
    errors: Floats
    """Attribution of the error node, shape (position,)."""
    error_lengths: Floats
    """Shape (position,)."""
    without_latents: float
    """metric(clean) − metric(the group at zero), summed over groups; with one group, that of every latent at zero."""
    without_error: float
    """metric(clean) − metric(error at zero)."""


def attributed(
    model: LiveModel,
    dictionary: Dictionary,
    trials: Sequence[PromptTrial],
    metric: Metric,
    steps: int,
    groups: Tensor,
    positions: LogitPositions,
) -> list[Found]:
    """Return what was found on each trial, in their order; `groups` says in which group each latent is, from 0 on.

    Raises:
        UserError: see `exegete.tools.attribution.attribute`.
    """
    _require_untouched(model, dictionary, trials)
    found: dict[int, Found] = {}
    order = sorted(range(len(trials)), key=lambda index: len(trials[index].tokens))

    def work(part: list[PromptTrial]) -> list[Found]:
        with torch.inference_mode(False):
            return _attributed(_Passes(model, dictionary, model.pad(part), metric, positions), steps, groups)

    for chosen in model.batches(order, lambda index: len(trials[index].tokens)):
        parts = model.shrinking([trials[index] for index in chosen], work)
        found |= dict(zip(chosen, parts, strict=True))
    return [found[index] for index in range(len(trials))]


def _require_untouched(model: LiveModel, dictionary: Dictionary, trials: Sequence[Trial]) -> None:
    for intervention in {trial.intervention for trial in trials}:
        for edit in intervention.edits:
            if isinstance(edit, LatentEdit) and model.dictionary(edit.dictionary) is dictionary:
                raise UserError(
                    f"a trial changes latents of {dictionary.name!r} ({edit.operation}), the dictionary to attribute to; "
                    "attribute without that edit, or measure it with exact_effects"
                )


def _attributed(passes: _Passes, steps: int, groups: Tensor) -> list[Found]:
    scales = [(step + 0.5) / steps for step in range(steps)] or [1.0]
    code, members = passes.code, [groups == group for group in range(int(groups.max()) + 1)]
    by_latent = torch.zeros(len(code.entries.values), device=passes.x_out.device)
    gradient = torch.zeros_like(code.error)
    pairs = [(group, scale) for group in members for scale in scales]
    changes = (code.change(group, scale) if steps else None for group, scale in pairs)
    for (group, scale), gradient in zip(pairs, passes.gradients(changes), strict=True):
        by_latent[group[code.entries.latents]] += code.to_latents(gradient, group, scale) / len(scales)
    without_latents = torch.zeros_like(passes.clean)
    for value in passes.values(code.change(group, 0.0) for group in members):
        without_latents += passes.clean - value
    if steps:
        errors = ((scale - 1) * code.error for scale in scales)
        gradient = torch.stack(list(passes.gradients(errors))).mean(0)
    (value,) = passes.values([-code.error])
    without = (without_latents, passes.clean - value)
    return list(_split(passes, by_latent * code.entries.values.float(), gradient, without))


class _Passes:
    """A batch that runs with other vectors at the point that the dictionary writes to."""

    def __init__(
        self, model: LiveModel, dictionary: Dictionary, batch: Batch, metric: Metric, positions: LogitPositions
    ) -> None:
        self._model = model
        self._dictionary = dictionary
        self.batch = batch
        self._positions = positions
        self._leaf: Tensor | None = None
        self._seen: dict[str, Tensor] = {}
        logits = self._run([None], with_gradient=False)
        self.x_out = self._seen[dictionary.hook_point_out]
        """Shape (trial, position, width out)."""
        self._metric = against(metric, batch, logits)
        self.clean = measured(self._metric, logits, batch)
        """The metric, shape (trial,)."""

    @cached_property
    def code(self) -> _Code:
        """The code of the clean vectors."""
        return _Code(self._dictionary, self._seen[self._dictionary.hook_point], self.x_out, self.batch)

    def values(self, added: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the metric with each of `added`, shape (token, width out), in their order, shape (trial,)."""
        for some in self._together(added):
            yield from self._measured(self._run(some, with_gradient=False))

    def gradients(self, added: Iterable[Tensor | None]) -> Iterator[Tensor]:
        """Yield the metric's gradient at the vectors plus each of `added`, in float32, shape (token, width out)."""
        for some in self._together(added):
            logits = self._run(some, with_gradient=True)
            with torch.enable_grad():
                values = torch.stack(self._measured(logits))
            if not values.requires_grad or self._leaf is None:
                raise UserError(
                    "the metric has no gradient; compute it from the logits with torch, without detaching them"
                )
            # No row of the batch depends on another.
            (gradient,) = torch.autograd.grad(values.sum(), self._leaf)
            self._leaf = None
            for part in torch.split(gradient, len(self.batch.trials)):
                chosen = part[self.batch.mask].float()
                if not bool(chosen.isfinite().all()):
                    raise UserError("the metric's gradient is not finite; load the subject with dtype = 'float32'")
                yield chosen

    def _together(self, added: Iterable[Added]) -> Iterator[list[Added]]:
        room = max(1, self._model.batch_tokens // self.batch.tokens.numel())
        iterator = iter(added)
        while some := list(itertools.islice(iterator, room)):
            yield some

    def _measured(self, logits: Tensor) -> list[Tensor]:
        """Return the metric of each copy of the batch."""
        return [measured(self._metric, part, self.batch) for part in torch.split(logits, len(self.batch.trials))]

    def _run(self, added: Sequence[Tensor | None], with_gradient: bool) -> Tensor:
        """Return the logits of as many copies of the batch as there are `added`, one after the other."""
        copies, batch = len(added), self.batch
        repeated = Batch([*batch.trials] * copies, batch.tokens.repeat(copies, 1), batch.mask.repeat(copies, 1))
        with self._replacing(repeated, added, with_gradient), torch.no_grad():
            # The hook turns gradients on from the leaf on; leaving this block turns them off again.
            return self._model.logits(repeated.tokens, repeated.mask, last=self._positions == "last")

    @contextmanager
    def _replacing(self, batch: Batch, added: Sequence[Tensor | None], with_gradient: bool) -> Iterator[None]:
        """Hold the model, with our hooks after those of the trials' interventions."""

        def look(x: Tensor) -> None:
            self._seen.setdefault(self._dictionary.hook_point, x.detach())

        def replace(x: Tensor) -> Tensor:
            self._seen.setdefault(self._dictionary.hook_point_out, x.detach())
            leaf = x.detach().clone()
            for part, one in zip(torch.split(leaf, len(self.batch.trials)), added, strict=True):
                if one is not None:
                    part[self.batch.mask] += one.to(leaf.dtype)
            if with_gradient:
                torch.set_grad_enabled(True)
                self._leaf = leaf.requires_grad_()
            return leaf

        with self._model.editing(batch), ExitStack() as hooks:
            hooks.enter_context(self._model.hooked(self._dictionary.hook_point, look))
            hooks.enter_context(self._model.hooked(self._dictionary.hook_point_out, replace))
            yield


class _Code:
    """The sparse code of a batch's tokens, padding left out, and what its decoder makes of it."""

    def __init__(self, dictionary: Dictionary, x: Tensor, x_out: Tensor, batch: Batch) -> None:
        self._dictionary = dictionary
        self._x = x[batch.mask]
        self._lengths = batch.lengths
        self._directions = dictionary.decoder_directions()
        with torch.no_grad():
            self.entries = self._encoded()
            """Rows are tokens, those of all prompts one after the other."""
            self._full = self._decoded(torch.ones((), device=x.device))
            self.error = x_out[batch.mask].float() - self._full
            """Shape (token, width out), in float32."""

    def change(self, members: Tensor, scale: float) -> Tensor:
        """Return what multiplying the activations of some latents by `scale` adds, shape (token, width out)."""
        with torch.no_grad():
            return self._decoded(_factors(members, scale)) - self._full

    def to_latents(self, gradient: Tensor, members: Tensor, scale: float) -> Tensor:
        """Return the gradient at the entries of `members`, scaled as in `change`, of that at what is decoded."""
        rows, latents, _ = self.entries
        mine = members[latents]
        if self._directions is None:
            return self._back_through(gradient, _factors(members, scale))[mine]
        places = mine.nonzero()[:, 0]
        size = max(1, _GATHERED // gradient.shape[1])
        parts = [
            (gradient[rows[some]] * self._directions[latents[some]].float()).sum(-1)
            for some in torch.split(places, size)
        ]
        return torch.cat(parts)

    def _back_through(self, gradient: Tensor, factors: Tensor) -> Tensor:
        parts = []
        for piece in self._pieces():
            rows, latents, _ = self._within(piece)
            with torch.enable_grad():
                z = (self._dense(piece) * factors).requires_grad_()
                decoded = self._decode(z, piece)
            if not decoded.requires_grad:
                raise UserError(
                    f"dictionary {self._dictionary.name!r} has a decoder that gives no gradient; write it with torch, "
                    "without no_grad, or give its directions if it is linear"
                )
            (back,) = torch.autograd.grad(decoded, z, gradient[piece].to(decoded.dtype))
            parts.append(back[rows, latents].float())
        return torch.cat(parts)

    def _encoded(self) -> SparseCode:
        dictionary, found = self._dictionary, []
        for piece in self._pieces():
            x = self._x[piece]
            if isinstance(dictionary, PlainDictionary):
                rows, latents, values = dictionary.encode_sparse(x)
            else:
                z = dictionary.encode(x[None])[0] if dictionary.conditioned else dictionary.encode(x)
                rows, latents = z.nonzero(as_tuple=True)
                values = z[rows, latents]
            found.append((rows + piece.start, latents, values))
        return SparseCode(*(torch.cat(column) for column in zip(*found, strict=True)))

    def _decoded(self, factors: Tensor) -> Tensor:
        """Return decode(factors · z) in float32, shape (token, width out)."""
        return torch.cat([self._decode(self._dense(piece) * factors, piece).float() for piece in self._pieces()])

    def _decode(self, z: Tensor, piece: slice) -> Tensor:
        given = self._x[piece]
        if self._dictionary.conditioned:
            return self._dictionary.decode(z[None], given[None])[0]
        return self._dictionary.decode(z, given)

    def _dense(self, piece: slice) -> Tensor:
        rows, latents, values = self._within(piece)
        z = values.new_zeros((piece.stop - piece.start, self._dictionary.latents))
        z[rows, latents] = values
        return z

    def _within(self, piece: slice) -> SparseCode:
        rows, latents, values = self.entries
        ends = torch.tensor([piece.start, piece.stop], device=rows.device)
        start, stop = torch.searchsorted(rows, ends).tolist()
        return SparseCode(rows[start:stop] - piece.start, latents[start:stop], values[start:stop])

    def _pieces(self) -> Iterator[slice]:
        """Yield runs of tokens whose dense code is small enough to hold; whole contexts where codes depend on them."""
        sizes = self._lengths
        if not self._dictionary.conditioned:
            sizes = [len(part) for part in blocks(self._x, self._dictionary)]
        start = 0
        for size in sizes:
            yield slice(start, start + size)
            start += size


def _factors(members: Tensor, scale: float) -> Tensor:
    return torch.where(members, scale, 1.0)


def _split(passes: _Passes, by_latent: Tensor, gradient: Tensor, without: Sequence[Tensor]) -> Iterator[Found]:
    """Yield what belongs to each prompt."""
    code = passes.code
    rows, latents = (column.cpu().numpy() for column in code.entries[:2])
    values, attributions = _numbers(code.entries.values), _numbers(by_latent)
    errors, lengths = _numbers((gradient * code.error).sum(-1)), _numbers(code.error.norm(dim=-1))
    moves, start = gradient.any(-1).cpu().numpy(), 0
    for index, length in enumerate(passes.batch.lengths):
        tokens = slice(start, start + length)
        mine = slice(*np.searchsorted(rows, [tokens.start, tokens.stop]))
        yield Found(
            clean=float(passes.clean[index]),
            moves=bool(moves[tokens].any()),
            positions=rows[mine] - start,
            latents=latents[mine],
            activations=values[mine],
            attributions=attributions[mine],
            errors=errors[tokens],
            error_lengths=lengths[tokens],
            without_latents=float(without[0][index]),
            without_error=float(without[1][index]),
        )
        start += length


def _numbers(values: Tensor) -> Floats:
    found: Floats = values.double().cpu().numpy()
    return found
