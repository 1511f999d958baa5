"""The live model: a subject with dictionaries attached, on which prompts run with interventions, in padded batches.

1. A `Trial` is a prompt and what is done while the model reads it. Trials of one call may differ in everything.
2. `LiveModel.run` sorts them by length, pads to the left, and runs as many together as `batch_tokens` allows. A result
   does not depend on what else was in the batch (beyond rounding): padding is masked, positions count from each prompt's
   first token, and every random draw is keyed by the prompt.
3. What is read off a batch – logits, vectors, codes – is reduced at once by the caller's function, so nothing that grows
   with the number of trials stays in memory unless the caller keeps it.
4. Where the device runs out of memory the batch is halved, and a warning says so.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary
from exegete.tools.editing import Editor, read_source, take_sources
from exegete.tools.errors import UserError, nearest
from exegete.tools.interventions import CLEAN, Intervention, LatentEdit, Tokens, VectorEdit
from exegete.tools.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
Keep = Literal["last", "all", "none"]

_LEVELS = itertools.count(1_000)
"""What hooks are removed by: each has its own. The bridge itself counts from 0."""
_SOURCES_KEPT = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A prompt, and what is done to the model while it reads and continues it."""

    tokens: Tokens
    """As `LiveModel.tokens` makes them."""
    intervention: Intervention = CLEAN
    draw: int = 0
    """Which of several random continuations; the same prompt and draw use the same random numbers, clean or not."""


@dataclass(frozen=True)
class Batch:
    """Trials padded to the left to one length."""

    trials: Sequence[Trial]
    tokens: Tensor
    """Shape (trial, position)."""
    mask: Tensor
    """Shape (trial, position): false where it is padding."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, without padding."""
        return [len(trial.tokens) for trial in self.trials]


@dataclass(frozen=True)
class Reading:
    """What was read off one batch. Positions are of the padded batch: a prompt of n tokens has the last n."""

    batch: Batch
    logits: Tensor
    """Next-token logits in float32: shape (trial, vocabulary) with `keep="last"`, (trial, position, vocabulary) with
    "all", (0,) with "none"."""
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    """Hook point → vectors after the interventions there, shape (trial, position, width)."""

    def of(self, hook_point: str, row: int) -> Tensor:
        """Return one prompt's vectors without the padding, shape (token, width)."""
        return self.vectors[hook_point][row, -len(self.batch.trials[row].tokens) :]


class LiveModel:
    """A subject with dictionaries at its hook points. Safe to use from several threads, one batch at a time."""

    def __init__(self, subject: Subject, dictionaries: Sequence[Dictionary] = (), *, batch_tokens: int = 4_096) -> None:
        """Attach dictionaries.

        Args:
            subject: the model.
            dictionaries: that interventions may name. Each must fit the subject.
            batch_tokens: padded tokens in one forward pass, at most (a longer prompt runs alone).

        Raises:
            UserError: a dictionary does not fit the subject, or an edit at its hook point would change nothing.
        """
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}; a batch needs at least 1 token")
        self.subject = subject
        self.batch_tokens = batch_tokens
        self.dictionaries: dict[str, Dictionary] = {}
        self._lock = threading.RLock()
        self._effective: set[str] = set()
        self._sources: OrderedDict[LatentEdit, Tensor] = OrderedDict()
        for dictionary in dictionaries:
            self._attach(dictionary)

    def _attach(self, dictionary: Dictionary) -> None:
        width = self.subject.width(dictionary.hook_point)
        if width != dictionary.width:
            raise UserError(
                f"dictionary {dictionary.name!r} takes vectors of width {dictionary.width}, but subject "
                f"{self.subject.name!r} has width {width} at {dictionary.hook_point!r}; load the model that it was made for"
            )
        if torch.device(dictionary.device) != torch.device(self.subject.device):
            raise UserError(
                f"dictionary {dictionary.name!r} is on {dictionary.device}, subject {self.subject.name!r} on "
                f"{self.subject.device}; load both on one device"
            )
        self.require_effective(dictionary.hook_point_out)
        self.dictionaries[dictionary.fingerprint] = dictionary

    def dictionary(self, wanted: str | None = None) -> Dictionary:
        """Return the attached dictionary of this name or fingerprint (or its first digits), or the only one.

        Raises:
            UserError: none or several fit.
        """
        attached = list(self.dictionaries.values())
        fitting = attached
        if wanted is not None:
            start = wanted.removeprefix("sha256:")
            fitting = [
                d for d in attached if d.name == wanted or d.fingerprint.removeprefix("sha256:").startswith(start)
            ]
        if len(fitting) == 1:
            return fitting[0]
        names = ", ".join(repr(dictionary.name) for dictionary in attached) or "none"
        asked = "no dictionary is named" if wanted is None else f"{wanted!r} fits {len(fitting)} dictionaries"
        raise UserError(f"{asked}; attached: {names}")

    def require_latents(self, dictionary: Dictionary, latents: Sequence[int]) -> None:
        """Raise UserError unless the dictionary has these latents."""
        for latent in latents:
            if not 0 <= latent < dictionary.latents:
                raise UserError(
                    f"dictionary {dictionary.name!r} has no latent {latent}; it has 0 to {dictionary.latents - 1}"
                )

    def tokens(self, text: str) -> Tokens:
        """Return the tokens of a prompt, begun as the subject's contexts are.

        Raises:
            UserError: the text is empty, or longer than the subject's context.
        """
        begin = () if self.subject.bos is None else (self.subject.bos,)
        tokens = (*begin, *self.subject.encode([text])[0])
        if len(tokens) == len(begin):
            raise UserError(f"the prompt {text!r} is empty; give at least one token")
        self._require_room(tokens, text)
        return tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens spell, special tokens left out."""
        return "".join(self.subject.pieces[token] for token in tokens if token not in self.subject.special_tokens)

    def run(
        self,
        trials: Sequence[Trial],
        read: Callable[[Reading], Sequence[T]],
        *,
        keep: Keep = "last",
        points: Sequence[str] = (),
    ) -> list[T]:
        """Run every trial once and return what `read` returns for each, in the order of `trials`.

        Args:
            trials: prompts with their interventions.
            read: takes a `Reading`, returns one result for each of its trials. What it keeps of the tensors stays in memory.
            keep: which logits to compute.
            points: hook points whose vectors `read` needs.

        Raises:
            UserError: there is no trial, a prompt is empty or too long, an intervention names a latent, dictionary or hook
                point that is not there, or one prompt alone does not fit the device's memory.
        """
        self.check(trials)
        for point in points:
            self.subject.width(point)
        results: dict[int, T] = {}
        order = sorted(range(len(trials)), key=lambda index: len(trials[index].tokens))
        for chosen in self.batches(order, lambda index: len(trials[index].tokens)):
            batch = [trials[index] for index in chosen]
            found = self.shrinking(batch, lambda part: read(self._read(part, keep, points)))
            results |= dict(zip(chosen, found, strict=True))
        return [results[index] for index in range(len(trials))]

    def check(self, trials: Sequence[Trial]) -> None:
        """Raise UserError where a trial cannot run: see `run`."""
        if not trials:
            raise UserError("there is no prompt to run; give at least one")
        for intervention in {trial.intervention for trial in trials}:
            self._check_intervention(intervention)
        for trial in trials:
            if not trial.tokens:
                raise UserError("a prompt is empty; give at least one token")
            self._require_room(trial.tokens)
            for edit in trial.intervention.edits:
                _check_positions(edit, len(trial.tokens))

    def _check_intervention(self, intervention: Intervention) -> None:
        for edit in intervention.edits:
            if isinstance(edit, LatentEdit):
                self.require_latents(self.dictionary(edit.dictionary), edit.latents)
                for source in edit.sources:
                    self._require_room(source)
                continue
            width = self.subject.width(edit.hook_point)
            if len(edit.vector) != width:
                raise UserError(f"the vector has length {len(edit.vector)}; at {edit.hook_point!r} it must be {width}")
            self.require_effective(edit.hook_point)

    def _require_room(self, tokens: Sequence[int], text: str | None = None) -> None:
        most = self.subject.max_context
        if len(tokens) > most:
            shown = f"{(self.text(tokens) if text is None else text)[:40]!r}…"
            raise UserError(
                f"the prompt {shown} has {len(tokens)} tokens; subject {self.subject.name!r} takes {most}: shorten it"
            )
        vocabulary = int(self.subject.bridge.cfg.d_vocab)
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise UserError(f"token {wrong[0]} is not one of subject {self.subject.name!r}, which has {vocabulary}")

    def batches(self, order: Sequence[int], length: Callable[[int], int]) -> Iterator[list[int]]:
        """Yield runs of `order`, sorted by `length`, such that none is larger than `batch_tokens` once padded."""
        batch: list[int] = []
        for index in order:
            if batch and (len(batch) + 1) * length(index) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def shrinking(self, trials: list[Trial], work: Callable[[list[Trial]], Sequence[T]]) -> list[T]:
        """Return what `work` returns, in halves where the device runs out of memory.

        Raises:
            UserError: one trial alone does not fit.
        """
        try:
            return list(work(trials))
        except torch.OutOfMemoryError as error:
            if len(trials) == 1:
                raise UserError(
                    f"a prompt of {len(trials[0].tokens)} tokens does not fit the memory of {self.subject.device} "
                    f'({str(error).splitlines()[0]}); shorten it, or load the subject with dtype = "bfloat16"'
                ) from error
        if torch.device(self.subject.device).type == "cuda":
            torch.cuda.empty_cache()
        half = math.ceil(len(trials) / 2)
        log.warning("out of memory with %d prompts at once; going on with %d", len(trials), half)
        self.batch_tokens = max(1, half * max(len(trial.tokens) for trial in trials))
        return self.shrinking(trials[:half], work) + self.shrinking(trials[half:], work)

    def pad(self, trials: Sequence[Trial]) -> Batch:
        """Return the trials padded to the left."""
        longest = max(len(trial.tokens) for trial in trials)
        filling = self._padding
        rows = [[filling] * (longest - len(trial.tokens)) + list(trial.tokens) for trial in trials]
        gaps = torch.tensor([longest - len(trial.tokens) for trial in trials], device=self.subject.device)
        mask = torch.arange(longest, device=self.subject.device) >= gaps[:, None]
        return Batch(trials, torch.tensor(rows, device=self.subject.device), mask)

    @cached_property
    def _padding(self) -> int:
        token = self.subject.tokenizer.pad_token_id
        return 0 if token is None else int(token)

    def _read(self, trials: Sequence[Trial], keep: Keep, points: Sequence[str]) -> Reading:
        batch = self.pad(trials)
        kept: dict[str, Tensor] = {}
        with self.editing(batch), torch.inference_mode(), self._keeping(points, kept, stop=keep == "none"):
            try:
                logits = self.logits(batch.tokens, batch.mask, last=keep == "last")
            except _Reached:
                logits = torch.zeros(0)
        return Reading(batch, logits, kept)

    @contextmanager
    def editing(self, batch: Batch) -> Iterator[Editor]:
        """Hold the model to itself, with the interventions of `batch` in place."""
        with self._lock, ExitStack() as hooks:
            sources = take_sources(self, [trial.intervention for trial in batch.trials])
            editor = Editor(self, batch, sources)
            for point, hook in editor.hooks():
                hooks.enter_context(self.hooked(point, hook))
            yield editor

    def source_codes(self, edit: LatentEdit) -> Tensor:
        """Return the activations that an edit takes from its sources, shape (token, latent); the last few are kept."""
        with self._lock:
            if edit not in self._sources:
                self._sources[edit] = read_source(self, edit)
            self._sources.move_to_end(edit)
            while len(self._sources) > _SOURCES_KEPT:
                self._sources.popitem(last=False)
            return self._sources[edit]

    @contextmanager
    def hooked(self, hook_point: str, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Hand `change` the vectors at a hook point, shape (trial, position, width); what it returns replaces them."""
        point = self.subject.bridge.hook_dict[hook_point]
        level = next(_LEVELS)

        def hook(vectors: Tensor, hook: Any) -> Tensor | None:
            changed = change(vectors.reshape(*vectors.shape[:2], -1))
            return None if changed is None else changed.reshape(vectors.shape)

        point.add_hook(hook, level=level)
        try:
            yield
        finally:
            point.remove_hooks(dir="fwd", level=level)

    @contextmanager
    def _keeping(self, points: Sequence[str], kept: dict[str, Tensor], stop: bool) -> Iterator[None]:
        """Keep the vectors at `points`, and end the forward pass once all are there if `stop`."""

        def keeper(point: str) -> Callable[[Tensor], None]:
            def keep(vectors: Tensor) -> None:
                kept[point] = vectors
                if stop and len(kept) == len(points):
                    raise _Reached

            return keep

        with ExitStack() as hooks:
            for point in points:
                hooks.enter_context(self.hooked(point, keeper(point)))
            yield

    def logits(self, tokens: Tensor, mask: Tensor, *, last: bool, cache: Any = None) -> Tensor:
        """Run the model on padded tokens and return its next-token logits in float32.

        Args:
            tokens: shape (trial, position); with a `cache`, those that are not in it yet.
            mask: shape (trial, all positions so far): false for padding.
            last: only of the last position, shape (trial, vocabulary); else (trial, position, vocabulary).
            cache: of transformers, filled on the way.
        """
        positions = (mask.long().cumsum(1) - 1).clamp(0, self.subject.max_context - 1)[:, -tokens.shape[1] :]
        given: dict[str, Any] = {"attention_mask": mask.long(), "use_cache": cache is not None}
        if "position_ids" in self._parameters:
            given["position_ids"] = positions
        if last and "logits_to_keep" in self._parameters:
            given["logits_to_keep"] = 1
        if cache is not None:
            given["past_key_values"] = cache
        logits: Tensor = self.subject.bridge.original_model(input_ids=tokens, **given).logits
        return (logits[:, -1] if last else logits).float()

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.subject.bridge.original_model.forward).parameters)

    def require_effective(self, hook_point: str) -> None:
        """Raise UserError unless a change at `hook_point` changes what the model says: some hooks only look on."""
        if hook_point in self._effective:
            return
        self.subject.width(hook_point)
        trial = Trial(tuple(range(min(8, int(self.subject.bridge.cfg.d_vocab)))))
        batch = self.pad([trial])
        with self._lock, torch.inference_mode():
            clean = self.logits(batch.tokens, batch.mask, last=True)
            with self.hooked(hook_point, _disturbed):
                changed = self.logits(batch.tokens, batch.mask, last=True)
        if torch.equal(clean, changed):
            near = nearest(hook_point, [point for point in self.subject.hook_points if point != hook_point])
            raise UserError(f"a change at {hook_point!r} does not reach the output of {self.subject.name!r}.{near}")
        self._effective.add(hook_point)


def _disturbed(vectors: Tensor) -> Tensor:
    return vectors + (1 + vectors.abs()) * torch.arange(vectors.shape[-1], device=vectors.device).remainder(3)


class _Reached(Exception):
    """Everything that is read has been read."""


def _check_positions(edit: LatentEdit | VectorEdit, length: int) -> None:
    if isinstance(edit.positions, str):
        return
    if not edit.positions:
        raise UserError('an edit names no position; give some, or "all" or "last"')
    if wrong := [position for position in edit.positions if not -length <= position < length]:
        raise UserError(f"position {wrong[0]} is outside the prompt, which has {length} tokens")
