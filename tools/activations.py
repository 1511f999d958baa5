"""The activation pass: one stream over the corpus, in slices that any worker may do in any order.

1. The pool is drawn (`window_pool`): windows that keep all their firings.
2. Each slice of the corpus streams through subject and dictionary in micro-batches of one shape (`firing_events`),
   sparsely encoded (`sparse_code`). Per latent it keeps statistics; of the events it writes those of the pool, and
   those that may still be among a latent's highest or in its uniform sample (`sampling`). Nothing in memory grows
   with the corpus.
3. When all slices are complete, the exact top and the exact sample are chosen (`selecting`), and the certificate of
   each sample is computed. Latents that fail it are redone: a pass that keeps exactly the K lowest hashes of just
   these.
4. Hard negatives that the pool cannot give are looked up in the corpus and verified by a short pass over few
   micro-batches (`verifying`).

Each slice and each later stage is renamed into place when complete, so that after a crash at any moment the same
call goes on. `prepare_pass`, `do_slice` and `finish_pass` are for workers that share the folder (`exegete slice`,
`workers`); `run_pass` is one process that does it all. `merging.merge` turns the finished folder into evidence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.tools.errors import UserError
from exegete.tools.firing_events import EventStream
from exegete.tools.parts import (
    EVENTS,
    ROW_GROUP,
    check_manifest,
    events_table,
    is_complete,
    parquet_writer,
    read_manifest,
    remove_unfinished,
    save_statistics,
    slice_folders,
    whole_folder,
)
from exegete.tools.pass_settings import PassSettings
from exegete.tools.selecting import select_firing, uncertified
from exegete.tools.slice_writing import LowestHashes, SliceWriter
from exegete.tools.verifying import verify_rare_tokens
from exegete.tools.window_pool import Pool, draw_pool

if TYPE_CHECKING:
    from exegete.tools.corpus import Corpus
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.subject import Subject

Progress = Callable[[str, int, int], None]
"""Called with the stage, the micro-batches done and their number."""

SLICE_TOKENS = 1 << 20
_LOG = logging.getLogger(__name__)


class Stopped(Exception):
    """`stop` asked for the pass to end; what was complete stays."""


@dataclass
class _Watch:
    """Counts micro-batches of one stage for `progress`, and ends it when `stop` says so."""

    stage: str
    total: int
    progress: Progress | None
    stop: Callable[[], bool] | None
    done: int = 0

    def __call__(self, micro_batches: int = 1) -> None:
        self.done += micro_batches
        if self.progress is not None:
            self.progress(self.stage, self.done, self.total)
        if self.stop is not None and self.stop():
            raise Stopped


@dataclass(frozen=True)
class Slice:
    """One piece of the corpus."""

    part: Path
    """Its folder: there and whole, or not at all."""
    start: int
    stop: int
    """Its micro-batches."""

    @property
    def micro_batches(self) -> int:
        """Their number."""
        return self.stop - self.start


@dataclass(frozen=True)
class PreparedPass:
    """A pass that has its folder and manifest. Whoever has one, in whatever process, may do any slice of it."""

    stream: EventStream
    folder: Path
    settings: PassSettings
    batch: int
    """Micro-batches read at a time."""
    pool: Pool
    slices: tuple[Slice, ...]
    threads: int
    """Of torch, with which it was begun: another number may change the last bits of what a CPU computes."""


def prepare_pass(
    subject: Subject,
    dictionary: Dictionary,
    corpus: Corpus,
    folder: Path,
    settings: PassSettings,
    *,
    begin: bool = True,
    slices_at_least: int = 1,
) -> PreparedPass:
    """Begin the pass in `folder`, or take it up there: in the slices and with the threads that it was begun with.

    Args:
        begin: False for a worker, which takes up what another process has begun.
        slices_at_least: where `settings` do not say how many.

    Raises:
        UserError: the dictionary does not fit the subject, the corpus has no usable window, `folder` holds another
            pass, or none and `begin` is False.
    """
    _check(subject, dictionary, corpus)
    micro, batch = settings.shape(subject.device)
    count, threads = slice_count(corpus, settings, micro, slices_at_least), torch_threads()
    if not begin or (folder / "manifest.json").exists():
        held = read_manifest(folder)
        count = count if settings.slices else int(held["slices"])
        threads = int(held.get("threads", threads))
    check_manifest(
        folder, _manifest(subject, dictionary, corpus, settings, micro) | {"slices": count, "threads": threads}
    )
    stream = EventStream(subject, dictionary, corpus, micro)
    pool = draw_pool(corpus, settings)
    if not len(pool.windows):
        raise UserError("the corpus has no usable window: every window is empty or recurs in another split")
    bounds = [stream.micro_batches * i // count for i in range(count + 1)]
    slices = tuple(map(Slice, slice_folders(folder, count), bounds[:-1], bounds[1:]))
    return PreparedPass(stream, folder, settings, batch // micro, pool, slices, threads)


def do_slice(prepared: PreparedPass, index: int, watch: Callable[[int], None] = lambda micro_batches: None) -> bool:
    """Do one slice unless it is complete, and return whether there was something to do.

    Any number of processes may do slices of one pass at the same time, also the same one. `watch` is called with the
    number of micro-batches just finished; what it raises ends the slice, of which nothing remains.

    Raises:
        UserError: the part is damaged, or the disk is full.
    """
    piece = prepared.slices[index]
    if is_complete(piece.part):
        watch(piece.micro_batches)
        return False
    with computing_with(prepared.threads):
        run_slice(
            prepared.stream,
            piece.part,
            piece.start,
            piece.stop,
            prepared.batch,
            prepared.pool,
            prepared.settings,
            lambda: watch(1),
        )
    return True


def do_every_slice(prepared: PreparedPass, advance: Callable[[int], None], stop: Callable[[], bool]) -> None:
    """Do the slices one after another, in this process: the `Slicer` that needs no other."""

    def watch(micro_batches: int) -> None:
        advance(micro_batches)
        if stop():
            raise Stopped

    for index in range(len(prepared.slices)):
        do_slice(prepared, index, watch)


def finish_pass(
    prepared: PreparedPass, progress: Progress | None = None, stop: Callable[[], bool] | None = None
) -> None:
    """Select, redo and verify, once every slice is complete; what is done already stays.

    Raises:
        Stopped: `stop` ended it.
        UserError: a part is missing or damaged, or the disk is full.
    """
    stream, folder, settings = prepared.stream, prepared.folder, prepared.settings
    remove_unfinished(folder)
    with computing_with(prepared.threads):
        select_firing(folder, stream.dictionary.latents, settings)
        _redo(stream, folder, prepared.batch, settings, progress, stop)
        verify_rare_tokens(
            stream, folder, prepared.pool, settings, lambda total: _Watch("verification", total, progress, stop)
        )


Slicer = Callable[[PreparedPass, Callable[[int], None], Callable[[], bool]], None]
"""Does the slices that are missing. Is given what to call with the micro-batches just finished, and what says that it is to
end, by raising `Stopped`."""


def run_pass(
    subject: Subject,
    dictionary: Dictionary,
    corpus: Corpus,
    folder: Path,
    settings: PassSettings,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    slicer: Slicer = do_every_slice,
    slices_at_least: int = 1,
) -> bool:
    """Do what is still missing of the pass in `folder`, and return whether it is finished (False: `stop` ended it).

    Raises:
        UserError: the dictionary does not fit the subject, the corpus has no usable window, `folder` holds another pass
            or a damaged part, or the disk is full.
    """
    prepared = prepare_pass(subject, dictionary, corpus, folder, settings, slices_at_least=slices_at_least)
    try:
        advance = _Watch("activations", prepared.stream.micro_batches, progress, None)
        slicer(prepared, advance, stop or (lambda: False))
        finish_pass(prepared, progress, stop)
    except Stopped:
        return False
    return True


def torch_threads() -> int:
    """Return the threads that torch computes with in this process."""
    import torch

    return torch.get_num_threads()


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Have torch compute with so many threads."""
    import torch

    former = torch.get_num_threads()
    if former == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _check(subject: Subject, dictionary: Dictionary, corpus: Corpus) -> None:
    width = subject.width(dictionary.hook_point)
    if width != dictionary.width:
        raise UserError(
            f"dictionary {dictionary.name!r} takes vectors of {dictionary.width}, but {subject.name!r} gives {width} "
            f"at {dictionary.hook_point!r}; check which subject and hook point it was trained on"
        )
    if not corpus.contexts:
        raise UserError("the corpus is empty; give one with text")


def _manifest(
    subject: Subject, dictionary: Dictionary, corpus: Corpus, settings: PassSettings, micro: int
) -> dict[str, Any]:
    identity = settings.identity() | {"micro_batch": micro}
    return {
        "dictionary": dictionary.fingerprint,
        "subject": subject.fingerprint,
        "corpus": corpus.fingerprint,
        "hook_point": dictionary.hook_point,
        "latents": dictionary.latents,
        "settings": identity,
        "device": subject.device,
        "dtype": [subject.dtype, dictionary.dtype],
    }


def slice_count(corpus: Corpus, settings: PassSettings, micro: int, at_least: int = 1) -> int:
    """Return the number of slices: as asked for, or by size and `at_least` so many; but none empty."""
    by_size = max(at_least, -(-corpus.contexts * corpus.context_tokens // SLICE_TOKENS))
    return max(1, min(settings.slices or by_size, -(-corpus.contexts // micro)))


def run_slice(
    stream: EventStream,
    part: Path,
    start: int,
    stop: int,
    batch: int,
    pool: Pool,
    settings: PassSettings,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Stream the micro-batches `start` … `stop` into the folder `part`, which is there afterwards whole or not at all.

    `batch` micro-batches are read at a time; `watch` is called after each one.
    """
    with whole_folder(part) as temporary:
        writer = SliceWriter(temporary, stream.dictionary.latents, pool, settings)
        try:
            for events in stream.over(start, stop, batch):
                writer.add(events)
                watch()
            writer.flush()
        finally:
            writer.close()
        save_statistics(temporary / "statistics.npz", writer.statistics)


def _redo(
    stream: EventStream,
    folder: Path,
    batch: int,
    settings: PassSettings,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Draw the samples of uncertified latents again, exactly."""
    latents = uncertified(folder)
    part = folder / "redone"
    if not len(latents) or is_complete(part):
        return
    _LOG.info("the uniform sample of %d latents is not certified; drawing it again", len(latents))
    watch = _Watch("resampling", stream.micro_batches, progress, stop)
    lowest = LowestHashes(latents, stream.dictionary.latents, settings)
    for events in stream.over(0, stream.micro_batches, batch):
        lowest.add(events)
        watch()
    with whole_folder(part) as temporary, parquet_writer(temporary / "events.parquet", EVENTS) as writer:
        writer.write_table(events_table(lowest.reduce()), row_group_size=ROW_GROUP)
    select_firing(folder, stream.dictionary.latents, settings)
