"""The live model: a subject with dictionaries attached, on which prompts run with interventions, in padded batches.

1. A `Trial` is a prompt and what is done while the model reads it. Trials of one call may differ in everything.
2. `LiveModel.run` sorts them by length, pads to the left, and runs as many together as `batch_tokens` allows. A result
   does not depend on what else was in the batch (beyond rounding): padding is masked, positions count from each prompt's
   first token, and every random draw is keyed by the prompt.
3. What is read off a batch – logits, vectors, codes – is reduced at once by the caller's function, so nothing that grows
   with the number of trials stays in memory unless the caller keeps it.
4. Where all interventions of a batch begin at the last token, and its prompts repeat, what comes before that token is read once
   for each prompt, and only the last token for each trial.
5. Where the device runs out of memory the batch is halved, and a warning says so.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary
from exegete.tools.editing import Editor, read_source, take_sources
from exegete.tools.errors import UserError
from exegete.tools.hooking import Change, comes_before, hooked, require_effective
from exegete.tools.interventions import Intervention, LatentEdit, Tokens, VectorEdit
from exegete.tools.kept_tensors import KeptTensors, normal
from exegete.tools.late_edits import begins_late, late_logits
from exegete.tools.subject import Subject
from exegete.tools.trials import Batch, Reading, Trial, padded

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
SomeTrial = TypeVar("SomeTrial", bound=Trial)
Keep = Literal["last", "all", "none"]

__all__ = ["Batch", "LiveModel", "Reading", "Trial"]

_SOURCES_KEPT = 2**26
"""Activations taken from other texts that are kept for the next batch: a quarter of a gigabyte in float32."""

log = logging.getLogger(__name__)


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
        # Of the subject: its hooks are those of every live model over it.
        self._lock = subject.lock
        self._effective: set[str] = set()
        self._sources = KeptTensors(_SOURCES_KEPT)
        self.source_vectors = KeptTensors(_SOURCES_KEPT)
        for dictionary in dictionaries:
            self._attach(dictionary)

    def _attach(self, dictionary: Dictionary) -> None:
        width = self.subject.width(dictionary.hook_point)
        if width != dictionary.width:
            raise UserError(
                f"dictionary {dictionary.name!r} takes vectors of width {dictionary.width}, but subject "
                f"{self.subject.name!r} has width {width} at {dictionary.hook_point!r}; load the model that it was made for"
            )
        if _device(dictionary.device) != _device(self.subject.device):
            raise UserError(
                f"dictionary {dictionary.name!r} is on {dictionary.device}, subject {self.subject.name!r} on "
                f"{self.subject.device}; load both on one device"
            )
        self._require_output(dictionary)
        self.dictionaries[dictionary.fingerprint] = dictionary

    def _require_output(self, dictionary: Dictionary) -> None:
        """Raise UserError unless what `decode` returns can be added at `hook_point_out`."""
        point = dictionary.hook_point_out
        width = self.subject.width(point)
        directions = dictionary.decoder_directions()
        if directions is None:
            given = torch.ones((1, 1, dictionary.width), device=self.subject.device)
            with torch.inference_mode():
                directions = dictionary.decode(dictionary.encode(given), given)
        if directions.shape[-1] != width:
            raise UserError(
                f"dictionary {dictionary.name!r} writes vectors of width {directions.shape[-1]}, but subject "
                f"{self.subject.name!r} has width {width} at {point!r}; load the model that it was made for"
            )
        self.require_effective(point)
        if point != dictionary.hook_point:
            with self._lock:
                ordered = comes_before(self.subject, dictionary.hook_point, point, self._probe)
            if not ordered:
                raise UserError(
                    f"dictionary {dictionary.name!r} writes at {point!r} before it reads at {dictionary.hook_point!r}"
                )

    def dictionary(self, wanted: str | None = None) -> Dictionary:
        """Return the attached dictionary of this fingerprint, name, or first digits of one (six or more), or the only one.

        Raises:
            UserError: none or several fit.
        """
        if wanted in self.dictionaries:
            return self.dictionaries[wanted]
        attached = list(self.dictionaries.values())
        fitting = attached
        if wanted is not None:
            start = wanted.removeprefix("sha256:")
            fitting = [d for d in attached if d.name == wanted] or [
                d for d in attached if len(start) >= 6 and d.fingerprint.removeprefix("sha256:").startswith(start)
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
        order = sorted(range(len(trials)), key=lambda index: (len(trials[index].tokens), trials[index].tokens))
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
                self._require_held(f"a value of {edit.operation}", edit.values)
                for source in edit.sources:
                    self._require_room(source)
                continue
            width = self.subject.width(edit.hook_point)
            if len(edit.vector) != width:
                raise UserError(f"the vector has length {len(edit.vector)}; at {edit.hook_point!r} it must be {width}")
            if not edit.project_out:
                self._require_held("strength times vector", [edit.strength * max(map(abs, edit.vector))])
            self.require_effective(edit.hook_point)

    def _require_held(self, what: str, values: Sequence[float]) -> None:
        most = torch.finfo(getattr(torch, self.subject.dtype)).max
        if wrong := [value for value in values if not abs(value) <= most]:
            raise UserError(f"{what} is {wrong[0]:g}; {self.subject.dtype} holds at most {most:.3g}")

    def _require_room(self, tokens: Sequence[int], text: str | None = None) -> None:
        vocabulary = int(self.subject.bridge.cfg.d_vocab)
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise UserError(f"token {wrong[0]} is not one of subject {self.subject.name!r}, which has {vocabulary}")
        most = self.subject.max_context
        if len(tokens) > most:
            shown = f"{(self.text(tokens) if text is None else text)[:40]!r}…"
            raise UserError(
                f"the prompt {shown} has {len(tokens)} tokens; subject {self.subject.name!r} takes {most}: shorten it"
            )

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

    def shrinking(
        self, trials: list[SomeTrial], work: Callable[[list[SomeTrial]], Sequence[T]], *, more: int = 0
    ) -> list[T]:
        """Return what `work` returns, in halves where the device runs out of memory.

        Args:
            trials: of one batch.
            work: takes trials, returns one result for each.
            more: tokens by which `work` makes each trial longer.

        Raises:
            UserError: one trial alone does not fit.
        """
        try:
            return list(work(trials))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(trials) == 1:
                raise UserError(
                    f"a prompt of {len(trials[0].tokens)} tokens does not fit the memory of {self.subject.device} "
                    f'({str(error).splitlines()[0]}); shorten it, or load the subject with dtype = "bfloat16"'
                ) from error
        if torch.device(self.subject.device).type == "cuda":
            torch.cuda.empty_cache()
        half = math.ceil(len(trials) / 2)
        log.warning("out of memory with %d prompts at once; going on with %d", len(trials), half)
        longest = min(self.subject.max_context, max(len(trial.tokens) for trial in trials) + more)
        self.batch_tokens = max(1, min(self.batch_tokens, half * longest))
        parts = (trials[:half], trials[half:])
        return [found for part in parts for found in self.shrinking(part, work, more=more)]

    def pad(self, trials: Sequence[Trial]) -> Batch:
        """Return the trials padded to the left."""
        return padded(trials, self.subject.device)

    def _read(self, trials: Sequence[Trial], keep: Keep, points: Sequence[str]) -> Reading:
        batch = self.pad(trials)
        kept: dict[str, Tensor] = {}
        if keep == "last" and not points and begins_late(self, batch):
            return Reading(batch, late_logits(self, batch), kept)
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
        """Return the activations that an edit takes from its sources, shape (token, latent); the last ones are kept."""
        # What is read depends neither on where it goes nor on the draws.
        key = replace(edit, dictionary=self.dictionary(edit.dictionary).fingerprint, positions="all", seed=0)
        if edit.operation == "patch":
            return normal(read_source(self, key))
        return self._sources.get(key, lambda: read_source(self, key))

    def hooked(self, hook_point: str, change: Change) -> AbstractContextManager[None]:
        """Hand `change` the vectors at a hook point, shape (trial, position, width); what it returns replaces them."""
        return hooked(self.subject, hook_point, change)

    @contextmanager
    def _keeping(self, points: Sequence[str], kept: dict[str, Tensor], stop: bool) -> Iterator[None]:
        """Keep the vectors at `points`, and end the forward pass once all are there if `stop`."""

        def keeper(point: str) -> Callable[[Tensor], None]:
            def keep(vectors: Tensor) -> None:
                kept[point] = vectors
                if stop and len(kept) == len(set(points)):
                    raise _Reached

            return keep

        with ExitStack() as hooks:
            for point in dict.fromkeys(points):
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
        with self._lock:
            if hook_point not in self._effective:
                require_effective(self.subject, hook_point, self._probe)
                self._effective.add(hook_point)

    def _probe(self) -> Tensor:
        """Return the last logits of some tokens."""
        count = min(8, int(self.subject.bridge.cfg.d_vocab), self.subject.max_context)
        batch = self.pad([Trial(tuple(range(count)))])
        with torch.inference_mode():
            return self.logits(batch.tokens, batch.mask, last=True)


def _device(name: str) -> tuple[str, int]:
    device = torch.device(name)
    return device.type, device.index or 0


def _out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device, the machine or a library of CUDA has no memory left: each says so in its own way."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(sign in text for sign in ("can't allocate memory", "backend out of memory", "STATUS_ALLOC_FAILED"))


class _Reached(Exception):
    """Everything that is read has been read."""


def _check_positions(edit: LatentEdit | VectorEdit, length: int) -> None:
    if isinstance(edit.positions, str):
        return
    if not edit.positions:
        raise UserError('an edit names no position; give some, or "all" or "last"')
    if wrong := [position for position in edit.positions if not -length <= position < length]:
        raise UserError(f"position {wrong[0]} is outside the prompt, which has {length} tokens")
