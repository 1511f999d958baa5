"""How interventions change a running batch: what `exegete.tools.live_model` hooks into the subject.

1. Each trial's edits become steps, in order: neighbouring edits of one dictionary are one step, each `VectorEdit` is one.
   Steps at one hook point run in the order of their intervention, whatever other trials of the batch do there.
2. For a step of a dictionary, at the tokens that some edit is for: the activations z of the edited latents are computed
   from the vectors as they are, the edits change them to z', and `decode(z') − decode(z)` is added, bracketed so that no
   change means none at all. Where the decoder is linear that is `(z' − z) @ directions`, over the edited latents alone;
   a transcoder's goes to the point that it writes to.
3. What several trials do in the same step is one tensor operation. Where, is worked out on the CPU beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from exegete.tools.codes import blocks, codes
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Intervention, LatentEdit, Tokens, VectorEdit
from exegete.tools.seeds import generator

if TYPE_CHECKING:
    from exegete.tools.live_model import Batch, LiveModel, Reading

Hook = Callable[[Tensor], Tensor | None]
Sources = Mapping[LatentEdit, Tensor]
"""For edits that take activations from other texts: these, shape (token of all texts, latent of the edit)."""

_ENTRIES = 2**24
"""Of the codes of one step that are held at once: rows are taken in parts."""


@dataclass(frozen=True)
class _Step:
    """Neighbouring edits of one dictionary in one trial, or one vector edit."""

    row: int
    dictionary: str | None
    """Fingerprint; None for a vector edit."""
    edits: tuple[LatentEdit | VectorEdit, ...]


@dataclass(frozen=True)
class _Places:
    """Positions of the batch that run now: entry i is trial `rows[i]`, position `columns[i]` of those that run."""

    rows: np.ndarray
    columns: np.ndarray

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of these places in `x`, shape (trial, position, …)."""
        return torch.from_numpy(self.rows).to(x.device), torch.from_numpy(self.columns).to(x.device)


_Delta = tuple[_Places, Tensor]
"""What is added where: shape (place, width out)."""


class Editor:
    """The hooks of one batch. `offset` says how many positions of it lie in the cache already."""

    def __init__(self, model: LiveModel, batch: Batch, sources: Sources) -> None:
        self._model = model
        self._batch = batch
        self._sources = sources
        self._length = batch.tokens.shape[1]
        self._gaps = [self._length - length for length in batch.lengths]
        self._draws: dict[tuple[int, LatentEdit], np.ndarray] = {}
        self.offset = 0

    def hooks(self) -> Iterator[tuple[str, Hook]]:
        """Yield hook points and what to do there, each point once."""
        programs: dict[int, tuple[str, list[tuple[int, Hook]]]] = {}
        for number, steps in self._rounds():
            for point, hook in self._round(steps):
                # Names may be aliases of one point, where the order of steps holds all the same.
                found = programs.setdefault(id(self._model.subject.points[point]), (point, []))
                found[1].append((number, hook))
        for point, program in programs.values():
            yield point, _one_after_the_other([hook for _, hook in sorted(program, key=lambda entry: entry[0])])

    def _rounds(self) -> Iterator[tuple[int, list[_Step]]]:
        """Yield (i, the i-th steps of all trials that do the same kind of thing at the same place)."""
        rounds: dict[tuple[int, str], list[_Step]] = {}
        for row, trial in enumerate(self._batch.trials):
            for number, (dictionary, edits) in enumerate(self._steps(trial.intervention)):
                point = edits[0].hook_point if isinstance(edits[0], VectorEdit) else ""
                rounds.setdefault((number, dictionary or point), []).append(_Step(row, dictionary, tuple(edits)))
        for (number, _), steps in rounds.items():
            yield number, steps

    def _steps(self, intervention: Intervention) -> list[tuple[str | None, list[LatentEdit | VectorEdit]]]:
        steps: list[tuple[str | None, list[LatentEdit | VectorEdit]]] = []
        for edit in intervention.edits:
            name = self._model.dictionary(edit.dictionary).fingerprint if isinstance(edit, LatentEdit) else None
            if name is None or not steps or steps[-1][0] != name:
                steps.append((name, []))
            steps[-1][1].append(edit)
        return steps

    def _round(self, steps: list[_Step]) -> Iterator[tuple[str, Hook]]:
        fingerprint = steps[0].dictionary
        if fingerprint is None:
            pushed = [(step.row, edit) for step in steps for edit in step.edits if isinstance(edit, VectorEdit)]
            vectors = torch.from_numpy(np.stack([_vector(edit) for _, edit in pushed]))
            yield pushed[0][1].hook_point, lambda x: self._pushed(x, pushed, vectors)
            return
        dictionary = self._model.dictionaries[fingerprint]
        if dictionary.hook_point == dictionary.hook_point_out:
            yield dictionary.hook_point, lambda x: _added(x, self._deltas(dictionary, steps, x))
            return
        waiting: list[list[_Delta]] = []
        yield dictionary.hook_point, lambda x: waiting.append(list(self._deltas(dictionary, steps, x)))
        yield dictionary.hook_point_out, lambda x: _added(x, waiting.pop())

    def _pushed(self, x: Tensor, pushed: list[tuple[int, VectorEdit]], vectors: Tensor) -> Tensor | None:
        """Add vectors, and take directions out, in at least float32; each edit is of its own trial."""
        at = [np.asarray(self._at(row, edit, x), dtype=np.int64) for row, edit in pushed]
        counts = [len(columns) for columns in at]
        if not sum(counts):
            return None
        numbers = torch.from_numpy(np.repeat(np.arange(len(pushed)), counts)).to(x.device)
        index = _Places(np.repeat([row for row, _ in pushed], counts), np.concatenate(at)).of(x)
        exact = torch.promote_types(x.dtype, torch.float32)
        here, by = x[index].to(exact), vectors.to(x.device, exact)[numbers]
        out = torch.tensor([edit.project_out for _, edit in pushed], device=x.device)[numbers][:, None]
        by = torch.where(out, -(here * by).sum(-1, keepdim=True) * by, by)
        changed = x.clone()
        changed[index] = (here + by).to(x.dtype)
        return changed

    def _deltas(self, dictionary: Dictionary, steps: list[_Step], x: Tensor) -> Iterator[_Delta]:
        """Yield what is added where, for some rows at a time."""
        if dictionary.conditioned and self.offset:
            raise RuntimeError(f"{dictionary.name!r} reads whole contexts: run it without a cache")
        for part in self._parts(steps, x):
            places = self._places(part, x)
            if len(places.rows):
                yield places, self._delta(dictionary, part, places, x)

    def _parts(self, steps: list[_Step], x: Tensor) -> Iterator[list[_Step]]:
        """Yield the steps in parts whose codes are few enough to hold."""
        part: list[_Step] = []
        latents: set[int] = set()
        for step in steps:
            more = latents | {latent for edit in _latent_edits(step) for latent in edit.latents}
            if part and (len(part) + 1) * x.shape[1] * len(more) > _ENTRIES:
                yield part
                part, more = [], {latent for edit in _latent_edits(step) for latent in edit.latents}
            part.append(step)
            latents = more
        yield part

    def _places(self, steps: list[_Step], x: Tensor) -> _Places:
        chosen = np.zeros(x.shape[:2], dtype=bool)
        for step in steps:
            for edit in step.edits:
                chosen[step.row, self._at(step.row, edit, x)] = True
        return _Places(*np.nonzero(chosen))

    def _at(self, row: int, edit: LatentEdit | VectorEdit, x: Tensor) -> Sequence[int]:
        """Return at which of the positions that run now an edit is made, counted from the first of these."""
        gap, stop = self._gaps[row], self.offset + x.shape[1]
        if isinstance(edit.positions, str):
            start = gap if edit.positions == "all" else self._length - 1
            return range(max(start - self.offset, 0), x.shape[1])
        wanted = {self._length + p if p < 0 else gap + p for p in edit.positions}
        return [column - self.offset for column in sorted(wanted) if self.offset <= column < stop]

    def _delta(self, dictionary: Dictionary, steps: list[_Step], places: _Places, x: Tensor) -> Tensor:
        latents = np.unique([latent for step in steps for edit in _latent_edits(step) for latent in edit.latents])
        chosen = torch.from_numpy(latents).to(x.device)
        if dictionary.conditioned:
            z = torch.cat(
                [self._context_codes(dictionary, x, row, places)[:, chosen] for row in np.unique(places.rows)]
            )
        else:
            z = codes(dictionary, x[places.of(x)], chosen)
        changed = self._changed(z, latents, steps, places, x)
        directions = dictionary.decoder_directions()
        if directions is not None:
            return (changed - z).to(directions.dtype) @ directions[chosen]
        if dictionary.conditioned:
            return self._conditioned_difference(dictionary, x, places, chosen, changed)
        return _decoded_difference(dictionary, x[places.of(x)], chosen, changed)

    def _context_codes(self, dictionary: Dictionary, x: Tensor, row: int, places: _Places) -> Tensor:
        """Return the dense code at one trial's places, from its whole context, shape (place, latent)."""
        within = torch.from_numpy(places.columns[places.rows == row] - self._gaps[row]).to(x.device)
        return dictionary.encode(x[row, self._gaps[row] :][None])[0][within]

    def _conditioned_difference(
        self, dictionary: Dictionary, x: Tensor, places: _Places, latents: Tensor, changed: Tensor
    ) -> Tensor:
        """As `_decoded_difference`, one whole context after the other: a code there depends on more than its vector."""
        parts = []
        for row in np.unique(places.rows):
            given = x[row, self._gaps[row] :][None]
            within = torch.from_numpy(places.columns[places.rows == row] - self._gaps[row]).to(x.device)
            z = dictionary.encode(given)
            edited = z.clone()
            edited[0, within[:, None], latents] = changed[torch.from_numpy(places.rows == row).to(x.device)]
            parts.append((dictionary.decode(edited, given) - dictionary.decode(z, given))[0, within])
        return torch.cat(parts)

    def _changed(self, z: Tensor, latents: np.ndarray, steps: list[_Step], places: _Places, x: Tensor) -> Tensor:
        """Return z', shape (place, latent): each trial's edits applied to its own rows, in order."""
        changed = z.clone()
        place = np.full(x.shape[:2], -1)
        place[places.rows, places.columns] = np.arange(len(places.rows))
        for number in range(max(len(step.edits) for step in steps)):
            kinds: dict[tuple[str, int], list[tuple[int, LatentEdit]]] = {}
            for step in steps:
                for edit in _latent_edits(step)[number : number + 1]:
                    kinds.setdefault((edit.operation, len(edit.latents)), []).append((step.row, edit))
            for placed in kinds.values():
                self._apply(changed, latents, placed, place, x)
        return changed

    def _apply(
        self, z: Tensor, latents: np.ndarray, placed: list[tuple[int, LatentEdit]], place: np.ndarray, x: Tensor
    ) -> None:
        """Make edits of one operation, with one number of latents, in place; each is of its own trial."""
        at = [np.asarray(self._at(row, edit, x), dtype=np.int64) for row, edit in placed]
        where = torch.from_numpy(np.concatenate([place[row, a] for (row, _), a in zip(placed, at, strict=True)]))
        if not len(where):
            return
        counts = np.array([len(columns) for columns in at])
        columns = _spread([np.searchsorted(latents, edit.latents) for _, edit in placed], counts).to(z.device)
        index = (where[:, None].to(z.device), columns)
        z[index] = self._applied(z[index], placed, at, counts)

    def _applied(
        self, z: Tensor, placed: list[tuple[int, LatentEdit]], at: list[np.ndarray], counts: np.ndarray
    ) -> Tensor:
        """Return what edits make of activations, shape (place, latent of its edit)."""
        operation = placed[0][1].operation
        if operation == "zero":
            return torch.zeros_like(z)
        if operation in ("resample", "patch"):
            parts = torch.split(z, counts.tolist())
            taken = zip(placed, parts, at, strict=True)
            return torch.cat([self._taken(row, edit, part, where + self.offset) for (row, edit), part, where in taken])
        values = _spread([np.asarray(edit.values) for _, edit in placed], counts).to(z.device, z.dtype)
        if operation == "add":
            return z + values
        return z * values if operation == "scale" else values.expand_as(z)

    def _taken(self, row: int, edit: LatentEdit, z: Tensor, columns: np.ndarray) -> Tensor:
        """Return activations of other texts for the positions `columns` of the batch."""
        source = self._sources[edit].to(z)
        if edit.operation == "resample":
            draws = self._drawn(row, edit, len(source))
            # Past the context nothing is kept: a trial that has no room left only waits for its batch.
            within = (columns - self._gaps[row]).clip(max=len(draws) - 1)
            return source[torch.from_numpy(draws[within]).to(z.device)]
        taken = columns - self._length + len(source)
        there = torch.from_numpy((taken >= 0) & (columns < self._length)).to(z.device)
        found = source[torch.from_numpy(taken.clip(0, len(source) - 1)).to(z.device)]
        return torch.where(there[:, None], found, z)

    def _drawn(self, row: int, edit: LatentEdit, size: int) -> np.ndarray:
        """Return which source token each position of a trial takes: keyed by seed and prompt, so the same in any batch."""
        if (row, edit) not in self._draws:
            rng = generator(edit.seed, "resample", *self._batch.trials[row].tokens)
            self._draws[row, edit] = rng.integers(size, size=self._model.subject.max_context)
        return self._draws[row, edit]


def take_sources(model: LiveModel, interventions: Sequence[Intervention]) -> dict[LatentEdit, Tensor]:
    """Return the activations that edits take from other texts, on a clean run of these."""
    edits = {edit for one in interventions for edit in one.edits if isinstance(edit, LatentEdit) and edit.sources}
    _read_together(model, [edit for edit in edits if edit.operation == "patch"])
    return {edit: model.source_codes(edit) for edit in edits}


def read_source(model: LiveModel, edit: LatentEdit) -> Tensor:
    """Return the activations of an edit's latents on its sources, shape (token, latent); `resample` skips special tokens.

    Raises:
        UserError: `resample` has no token to draw from.
    """
    from exegete.tools.live_model import Trial

    dictionary = model.dictionary(edit.dictionary)
    latents = torch.tensor(edit.latents, device=model.subject.device)
    if edit.operation == "patch":
        # Sets of latents are patched from one prompt by turns: its vectors are kept, for all of them.
        key = (dictionary.hook_point, edit.sources[0])
        vectors = model.source_vectors.get(key, lambda: _vectors(model, dictionary.hook_point, edit.sources[0]))
        with torch.inference_mode():
            return codes(dictionary, vectors, latents)

    def read(reading: Reading) -> list[Tensor]:
        rows = range(len(reading.batch.trials))
        return [codes(dictionary, reading.of(dictionary.hook_point, row), latents) for row in rows]

    trials = [Trial(source) for source in edit.sources]
    found = model.run(trials, read, keep="none", points=[dictionary.hook_point])
    special = model.subject.special_tokens
    kept = torch.tensor([token not in special for source in edit.sources for token in source])
    if not kept.any():
        raise UserError("resample: the texts have special tokens only; give texts with words to draw from")
    return torch.cat(found)[kept.to(found[0].device)]


def _read_together(model: LiveModel, edits: Sequence[LatentEdit]) -> None:
    """Keep the vectors of the prompts that edits patch from, read in common batches."""
    from exegete.tools.live_model import Trial

    keys = model.source_vectors.missing((model.dictionary(one.dictionary).hook_point, one.sources[0]) for one in edits)
    for point in dict.fromkeys(point for point, _ in keys):
        own = [key for key in keys if key[0] == point]

        def keep(reading: Reading, point: str = point) -> list[None]:
            for row, trial in enumerate(reading.batch.trials):
                model.source_vectors.get((point, trial.tokens), partial(reading.of, point, row))
            return [None] * len(reading.batch.trials)

        model.run([Trial(tokens) for _, tokens in own], keep, keep="none", points=[point])


def _vectors(model: LiveModel, hook_point: str, tokens: Tokens) -> Tensor:
    """Return a prompt's vectors on a clean run, shape (token, width)."""
    from exegete.tools.live_model import Trial

    return model.run([Trial(tokens)], lambda reading: [reading.of(hook_point, 0)], keep="none", points=[hook_point])[0]


def _latent_edits(step: _Step) -> list[LatentEdit]:
    return [edit for edit in step.edits if isinstance(edit, LatentEdit)]


def _vector(edit: VectorEdit) -> np.ndarray:
    """Return what is added, or the unit vector that is taken out, in float64."""
    vector = np.asarray(edit.vector)
    if not edit.project_out:
        return edit.strength * vector
    vector = vector / np.abs(vector).max()  # First, lest the squares of very small numbers vanish.
    unit: np.ndarray = vector / np.linalg.norm(vector)
    return unit


def _spread(rows: list[np.ndarray], counts: np.ndarray) -> Tensor:
    """Return row i `counts[i]` times, shape (sum of counts, width); where all rows are equal, once: shape (1, width)."""
    stacked = np.stack(rows)
    if (stacked == stacked[0]).all():
        return torch.from_numpy(stacked[:1])
    return torch.from_numpy(stacked.repeat(counts, axis=0))


def _one_after_the_other(hooks: list[Hook]) -> Hook:
    def change(x: Tensor) -> Tensor | None:
        changed: Tensor | None = None
        for hook in hooks:
            found = hook(x if changed is None else changed)
            changed = changed if found is None else found
        return changed

    return change


def _added(x: Tensor, deltas: Iterator[_Delta] | list[_Delta]) -> Tensor | None:
    changed = None
    for places, delta in deltas:
        changed = x.clone() if changed is None else changed
        index = places.of(x)
        changed[index] = x[index] + delta.to(x.dtype)
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
    return torch.cat(parts)
