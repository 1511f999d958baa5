"""How fast the activation pass will be, measured on a few micro-batches that leave nothing behind.

1. The beginning of the corpus is tokenised into a temporary folder, and streamed through the real subject and dictionary in
   micro-batches of the run's own shape. The first one is left out, since it also warms the machine up.
2. Seconds per micro-batch, with a t-interval over micro-batches, times the micro-batches of the whole corpus is the time of the
   pass. Where only the corpus' own end says how long it is, that is extrapolated from tokens per document, or not known.
3. Evidence takes at most so many windows a live latent as the configuration asks for.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate

if TYPE_CHECKING:
    from exegete.agent.config import RunConfig
    from exegete.agent.gathering import Inputs
    from exegete.tools.corpus import Corpus

MICRO_BATCHES = 16
"""Measured, at most, besides the first."""
SECONDS = 20.0
"""After which no further one is begun."""
LEAST_TOKENS = 32_768
"""Read from the corpus, so that every split has a document."""
ITEM_BYTES = 25
"""Of a latent's row about one window."""
WINDOW_BYTES = 160
"""Of a window itself: tokens, offsets, document. Random windows are shared by all latents, the others may not be."""


def pass_lines(config: RunConfig, inputs: Inputs) -> list[tuple[str, str]]:
    """Return (what, figure with interval and n) of the pass that a run would begin with.

    Raises:
        UserError: the corpus is missing, damaged or too small, or the dictionary does not fit the subject.
    """
    assert config.corpus is not None
    with tempfile.TemporaryDirectory(prefix="exegete-plan-") as scratch:
        corpus, documents = _beginning(config, inputs, Path(scratch))
        settings = config.evidence.settings(config.seed)
        micro, _ = settings.shape(inputs.subject.device)
        per_batch = estimate(seconds_of(inputs, corpus, micro), least=0.0)
    held = int(corpus.counts["tokens"])
    tokens, known_by = corpus_tokens(config, held / documents, held)
    passes = 2 if config.label.random_control else 1
    own = sum(sum(getattr(config.evidence, kind)) for kind in ("firing", "top", "hard"))
    windows = own + sum(config.evidence.random)
    most = inputs.dictionary.latents * (windows * ITEM_BYTES + own * WINDOW_BYTES)
    rate = micro * corpus.context_tokens
    rows = [
        (
            "pass",
            f"{config.subject.name if config.subject else ''}, {inputs.dictionary.name} over {config.corpus.source}",
        ),
        (
            "speed",
            f"{rate / per_batch.value:,.0f} tokens/s{_interval(per_batch, rate)} (n = {per_batch.n} micro-batches)",
        ),
    ]
    if tokens is None:
        rows.append(("time", f"of the pass not known: {known_by}"))
    else:
        rows.append(("tokens", f"{tokens:,.0f}, {known_by}" + (", read twice (random control)" if passes == 2 else "")))
        rows.append(("time", f"{_hours(per_batch, passes * tokens / rate)} for the pass"))
    rows.append(
        (
            "disk",
            f"evidence at most {most / 1e6:,.0f} MB ({windows} windows for each of {inputs.dictionary.latents:,} latents)",
        )
    )
    return rows


def seconds_of(inputs: Inputs, corpus: Corpus, micro: int, seconds: float = SECONDS) -> list[float]:
    """Return the seconds of each of a few micro-batches of `micro` contexts, without the first."""
    from exegete.tools.firing_events import EventStream

    stream = EventStream(inputs.subject, inputs.dictionary, corpus, micro)
    taken: list[float] = []
    begun = last = time.perf_counter()
    for _ in stream.over(0, min(stream.micro_batches, MICRO_BATCHES + 1), 1):
        now = time.perf_counter()
        taken.append(now - last)
        last = now
        if len(taken) > 2 and now - begun > seconds:
            break
    return taken[1:] or taken


def corpus_tokens(config: RunConfig, per_document: float, held: int) -> tuple[float | None, str]:
    """Return the tokens of a whole corpus and how they are known, by the mean of the documents at its beginning."""
    from exegete.agent.gathering import BUNDLED, BUNDLED_DOCUMENTS

    corpus = config.corpus
    assert corpus is not None
    documents = corpus.documents or (BUNDLED_DOCUMENTS if corpus.source == BUNDLED else None)
    by_documents = None if documents is None else documents * per_document
    if corpus.tokens is not None and (by_documents is None or corpus.tokens <= by_documents):
        return corpus.tokens, "at most (corpus.tokens)"
    if by_documents is not None:
        return by_documents, f"about: {documents:,} documents of {per_document:,.0f} tokens"
    return None, "how long the corpus is shows at its end; set corpus.tokens or corpus.documents"


def _beginning(config: RunConfig, inputs: Inputs, scratch: Path) -> tuple[Corpus, int]:
    """Return the beginning of the corpus, built in `scratch`, and the documents in it."""
    from exegete.agent.gathering import source_in
    from exegete.tools.corpus import build_corpus
    from exegete.tools.windows import CONTEXT_TOKENS

    wanted = config.corpus
    assert wanted is not None
    micro, _ = config.evidence.settings(config.seed).shape(inputs.subject.device)
    tokens = max(LEAST_TOKENS, (MICRO_BATCHES + 1) * micro * CONTEXT_TOKENS)
    corpus = build_corpus(
        source_in(scratch, wanted, config.seed, most=4_000),
        inputs.subject,
        scratch / "corpus",
        seed=config.seed,
        text_field=wanted.text_field,
        limit_documents=wanted.documents,
        limit_tokens=tokens if wanted.tokens is None else min(tokens, wanted.tokens),
    )
    documents = int(corpus.counts["documents"])
    if not documents:
        raise UserError(f"{wanted.source!r} holds no document")
    return corpus, documents


def _interval(per_batch: Estimate, rate: float) -> str:
    if per_batch.low is None or per_batch.high is None or per_batch.low <= 0:
        return ""
    return f" [{rate / per_batch.high:,.0f}, {rate / per_batch.low:,.0f}]"


def _hours(per_batch: Estimate, batches: float) -> str:
    unit, seconds = ("h", 3600) if batches * per_batch.value >= 3600 else ("min", 60)
    text = f"{batches * per_batch.value / seconds:,.1f} {unit}"
    if per_batch.low is None or per_batch.high is None:
        return text
    return f"{text} [{batches * per_batch.low / seconds:,.1f}, {batches * per_batch.high / seconds:,.1f}]"
