"""How interventions change a running batch: what `exegete.tools.live_model` hooks into the subject.

For each dictionary with edits in the batch, at the tokens that some edit is for:

1. the activations z of the edited latents are computed from the vectors as they are;
2. every prompt's edits change its own rows of z to z', in order;
3. `decode(z') − decode(z)` is added, bracketed so that no change means none at all. Where the decoder is linear that is
   `(z' − z) @ directions`, over the edited latents alone; a transcoder's goes to the point that it writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exegete.tools.codes import blocks, codes
from exegete.tools.dictionaries import Dictionary
from exegete.tools.interventions import Intervention, LatentEdit, VectorEdit
from exegete.tools.seeds import generator

if TYPE_CHECKING:
    from exegete.tools.live_model import Batch, LiveModel, Reading

Hook = Callable[[Tensor], Tensor | None]
Sources = Mapping[LatentEdit, Tensor]
"""For edits that take activations from other texts: these, shape (token of all texts, latent of the edit)."""


@dataclass(frozen=True)
class _Placed:
    """A latent edit of one trial."""

    row: int
    edit: LatentEdit


class Editor:
    """The hooks of one batch. `offset` says how many positions of it lie in the cache already."""

    def __init__(self, model: LiveModel, batch: Batch, sources: Sources) -> None:
        self._model = model
        self._batch = batch
        self._sources = sources
        self._length = batch.tokens.shape[1]
        self._gaps = [self._length - length for length in batch.lengths]
        self.offset = 0

    def hooks(self) -> Iterator[tuple[str, Hook]]:
        """Yield hook points and what to do there."""
        by_dictionary: dict[str, list[_Placed]] = {}
        by_point: dict[str, list[tuple[int, VectorEdit]]] = {}
        for row, trial in enumerate(self._batch.trials):
            for edit in trial.intervention.edits:
                if isinstance(edit, LatentEdit):
                    fingerprint = self._model.dictionary(edit.dictionary).fingerprint
                    by_dictionary.setdefault(fingerprint, []).append(_Placed(row, edit))
                else:
                    by_point.setdefault(edit.hook_point, []).append((row, edit))
        for fingerprint, placed in by_dictionary.items():
            yield from self._latent_hooks(self._model.dictionaries[fingerprint], placed)
        for point, vectors in by_point.items():
            yield point, self._vector_hook(vectors)

    def _latent_hooks(self, dictionary: Dictionary, placed: list[_Placed]) -> Iterator[tuple[str, Hook]]:
        if dictionary.hook_point == dictionary.hook_point_out:
            yield dictionary.hook_point, lambda x: _added(x, *self._delta(dictionary, placed, x))
            return
        waiting: list[tuple[Tensor, Tensor]] = []
        yield dictionary.hook_point, lambda x: waiting.append(self._delta(dictionary, placed, x))
        yield dictionary.hook_point_out, lambda x: _added(x, *waiting.pop())

    def _vector_hook(self, placed: list[tuple[int, VectorEdit]]) -> Hook:
        def change(x: Tensor) -> Tensor:
            x = x.clone()
            for row, edit in placed:
                chosen = self._chosen(row, edit, x)
                vector = torch.tensor(edit.vector, device=x.device, dtype=x.dtype)
                if edit.project_out:
                    unit = vector / vector.norm()
                    x[row, chosen] = x[row, chosen] - (x[row, chosen] @ unit)[:, None] * unit
                else:
                    x[row, chosen] = x[row, chosen] + edit.strength * vector
            return x

        return change

    def _delta(self, dictionary: Dictionary, placed: list[_Placed], x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where something changes, shape (trial, position), and what is added there, shape (place, width out)."""
        chosen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        for one in placed:
            chosen[one.row] |= self._chosen(one.row, one.edit, x)
        latents = torch.tensor(sorted({k for one in placed for k in one.edit.latents}), device=x.device)
        if dictionary.conditioned:
            return chosen, self._conditioned_delta(dictionary, placed, x, chosen, latents)
        z = codes(dictionary, x[chosen], latents)
        changed = self._changed(z, latents, placed, chosen, x)
        directions = dictionary.decoder_directions()
        if directions is not None:
            return chosen, (changed - z).to(directions.dtype) @ directions[latents]
        return chosen, _decoded_difference(dictionary, x[chosen], latents, changed)

    def _conditioned_delta(
        self, dictionary: Dictionary, placed: list[_Placed], x: Tensor, chosen: Tensor, latents: Tensor
    ) -> Tensor:
        """As `_delta`, one whole context after the other: a code there depends on more than its own vector."""
        rows = sorted({one.row for one in placed})
        contexts = {row: x[row, self._gaps[row] :] for row in rows}
        dense = {row: dictionary.encode(context[None])[0] for row, context in contexts.items()}
        within = {row: chosen[row, self._gaps[row] :] for row in rows}
        z = torch.cat([dense[row][within[row]][:, latents] for row in rows])
        changed = self._changed(z, latents, placed, chosen, x)
        parts = []
        for row, new in zip(rows, torch.split(changed, [int(within[row].sum()) for row in rows]), strict=True):
            edited = dense[row].clone()
            edited[within[row].nonzero(), latents] = new
            given = contexts[row][None]
            difference = dictionary.decode(edited[None], given) - dictionary.decode(dense[row][None], given)
            parts.append(difference[0][within[row]])
        return torch.cat(parts)

    def _changed(self, z: Tensor, latents: Tensor, placed: list[_Placed], chosen: Tensor, x: Tensor) -> Tensor:
        """Return z', shape (place, latent): each trial's edits applied to its own rows, in order."""
        changed = z.clone()
        place = torch.full(chosen.shape, -1, device=z.device)
        place[chosen] = torch.arange(len(z), device=z.device)
        for one in placed:
            columns = torch.searchsorted(latents, torch.tensor(one.edit.latents, device=z.device))
            positions = self._chosen(one.row, one.edit, x).nonzero()[:, 0]
            places = place[one.row, positions][:, None]
            changed[places, columns] = self._applied(one, changed[places, columns], positions + self.offset)
        return changed

    def _applied(self, one: _Placed, z: Tensor, columns: Tensor) -> Tensor:
        """Return what an edit makes of activations, shape (position, latent of the edit)."""
        edit = one.edit
        values = torch.tensor(edit.values, device=z.device, dtype=z.dtype)
        if edit.operation == "add":
            return z + values
        if edit.operation == "scale":
            return z * values
        if edit.operation in ("clamp", "mean"):
            return values.expand_as(z)
        if edit.operation == "zero":
            return torch.zeros_like(z)
        source = self._sources[edit].to(z)
        if edit.operation == "resample":
            tokens = self._batch.trials[one.row].tokens
            draws = generator(edit.seed, "resample", *tokens).integers(
                len(source), size=self._model.subject.max_context
            )
            drawn = torch.from_numpy(draws).to(z.device)
            return source[drawn[columns - self._gaps[one.row]]]
        taken = columns - self._length + len(source)
        there = (taken >= 0) & (columns < self._length)
        return torch.where(there[:, None], source[taken.clamp(0, len(source) - 1)], z)

    def _chosen(self, row: int, edit: LatentEdit | VectorEdit, x: Tensor) -> Tensor:
        """Return at which of the positions that run now an edit is made, shape (position,)."""
        columns = torch.arange(self.offset, self.offset + x.shape[1], device=x.device)
        if edit.positions == "all":
            return columns >= self._gaps[row]
        if edit.positions == "last":
            return columns >= self._length - 1
        wanted = [self._length + p if p < 0 else self._gaps[row] + p for p in edit.positions]
        return torch.isin(columns, torch.tensor(wanted, device=x.device))


def take_sources(model: LiveModel, interventions: Sequence[Intervention]) -> dict[LatentEdit, Tensor]:
    """Return the activations that edits take from other texts, on a clean run of these."""
    edits = {edit for one in interventions for edit in one.edits if isinstance(edit, LatentEdit) and edit.sources}
    return {edit: model.source_codes(edit) for edit in edits}


def read_source(model: LiveModel, edit: LatentEdit) -> Tensor:
    """Return the activations of an edit's latents on its sources, shape (token, latent); `resample` skips special tokens."""
    from exegete.tools.live_model import Trial

    dictionary = model.dictionary(edit.dictionary)
    latents = torch.tensor(edit.latents, device=model.subject.device)

    def read(reading: Reading) -> list[Tensor]:
        rows = range(len(reading.batch.trials))
        return [codes(dictionary, reading.of(dictionary.hook_point, row), latents) for row in rows]

    trials = [Trial(source) for source in edit.sources]
    found = model.run(trials, read, keep="none", points=[dictionary.hook_point])
    if edit.operation == "patch":
        return found[0]
    special = model.subject.special_tokens
    kept = [
        values[torch.tensor([token not in special for token in source], device=values.device)]
        for source, values in zip(edit.sources, found, strict=True)
    ]
    return torch.cat(kept)


def _added(x: Tensor, chosen: Tensor, delta: Tensor) -> Tensor:
    changed = x.clone()
    changed[chosen] = x[chosen] + delta.to(x.dtype)
    return changed


def _decoded_difference(dictionary: Dictionary, x: Tensor, latents: Tensor, changed: Tensor) -> Tensor:
    """Return `decode(z') − decode(z)` for a decoder that is no linear map, in parts of the tokens."""
    parts, start = [], 0
    for part in blocks(x, dictionary):
        z = dictionary.encode(part)
        edited = z.clone()
        edited[:, latents] = changed[start : start + len(part)]
        parts.append(dictionary.decode(edited, part) - dictionary.decode(z, part))
        start += len(part)
    return torch.cat(parts) if parts else x
