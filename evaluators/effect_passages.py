"""What a model writes with a latent turned up, beside what it writes without (PROTOCOLS §8).

1. Prompts are windows cut just after the first token on which the latent fires; whole random windows for a latent that
   never fires. The windows' own tokens are used; where a piece of text belongs to no token or to several, the text is
   tokenised again, and that is counted.
2. Strengths are searched on prompts of other splits than the scored one, for three arms together: the latent, a random
   latent of the same firing rate, and a random direction, all to the same KL(clean ‖ steered) of the next token.
3. Every arm that reaches it continues the scored prompts, from the last prompt token on steered, with the random numbers
   of the clean continuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators.detection import evenly, sampled
from exegete.tools.errors import UserError
from exegete.tools.seeds import derive_seed
from exegete.tools.windows import LatentEvidence, Split, Window

if TYPE_CHECKING:
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.interventions import Tokens
    from exegete.tools.live_model import LiveModel
    from exegete.tools.strength import Make, Matched

Rates = NDArray[np.float64]
Kind = Literal["latent", "random_latent", "random_direction"]
KINDS: tuple[Kind, ...] = ("latent", "random_latent", "random_direction")


class Passage(NamedTuple):
    """One prompt and its two continuations, as text."""

    prompt: str
    clean: str
    steered: str


@dataclass(frozen=True)
class Arm:
    """The latent, or a control."""

    kind: Kind
    latent: int | None
    """None for a direction, and where no other latent has the firing rate."""
    matched: Matched | None
    """None where there is no such control, or nothing to match on."""
    passages: tuple[Passage, ...]
    """Empty where the KL is not reached."""

    @property
    def status(self) -> str:
        """ "ok", "no_control" or "unreachable"."""
        if self.matched is None:
            return "no_control"
        return "ok" if self.matched.status == "matched" else "unreachable"


@dataclass(frozen=True)
class Prompts:
    """The prompts of one latent."""

    scored: tuple[Tokens, ...]
    matching: tuple[Tokens, ...]
    """Of other splits."""
    cut: Literal["first_firing", "random_window"]
    tokenised_again: int
    """Prompts whose pieces are not those of one token each."""


@dataclass(frozen=True)
class Steering:
    """How strongly, how long and how often."""

    target_kl: float = 0.5
    """Mean KL(clean ‖ steered) of the next token, in nats."""
    tolerance: float = 0.1
    """Relative."""
    batches: int = 10
    """Of the search for the strength, at most."""
    tokens: int = 8
    """Length of a continuation."""
    temperature: float = 1.0
    prompts: int = 40
    """Scored, at most; and as many to find the strength on. The mean KL is often that of a few prompts, on which the
    latent can act; with 20, fewer planted latents are told from random ones."""


def select_prompts(model: LiveModel, evidence: LatentEvidence, split: Split, count: int) -> Prompts:
    """Return at most `count` prompts of `split`, and as many of the other splits to find strengths on.

    Raises:
        SealedSplitError: a split is sealed to this reader.
        UserError: a window does not fit the subject.
    """
    others: list[Split] = [one for one in ("refine", "explain", "test") if one != split]
    chosen = [evidence.select(split), [w for one in others for w in evidence.select(one)]]
    fires = any(window.fires for windows in chosen for window in windows)
    cuts = [list(_cuts(windows, fires, count)) for windows in chosen]
    seen = {tuple(pieces) for pieces in cuts[0]}
    # The same words may stand in two splits: what is scored must not have been matched on.
    cuts[1] = [pieces for pieces in cuts[1] if tuple(pieces) not in seen]
    reader = _Reader(model)
    scored, matching = (tuple(map(reader.tokens, pieces)) for pieces in cuts)
    return Prompts(scored, matching, "first_firing" if fires else "random_window", reader.again)


def arms(
    model: LiveModel, dictionary: Dictionary, latent: int, prompts: Prompts, rates: Rates, how: Steering, seed: int
) -> list[Arm]:
    """Return the latent and its two controls, in the order of `KINDS`.

    Args:
        model: with the dictionary attached.
        dictionary: of the latent.
        latent: to turn up.
        prompts: at least one of either kind.
        rates: share of tokens on which each latent fires, shape (latent,).
        how: the settings.
        seed: of the controls and of the continuations.

    Raises:
        UserError: there is no such latent, `rates` do not fit, or as `match_strengths` and `generate`.
    """
    from exegete.tools.strength import match_strengths

    model.require_latents(dictionary, [latent])
    other = _random_latent(rates, latent, dictionary.latents, derive_seed(seed, "random latent"))
    makes: dict[Kind, Make] = {"latent": _steering(dictionary, latent)}
    if other is not None:
        makes["random_latent"] = _steering(dictionary, other)
    makes["random_direction"] = _pushing(model, dictionary, derive_seed(seed, "random direction"))
    found = match_strengths(
        model,
        list(makes.values()),
        list(prompts.matching),
        target_kl=how.target_kl,
        tolerance=how.tolerance,
        batches=how.batches,
    )
    matched = dict(zip(makes, found, strict=True))
    written = _written(model, prompts.scored, {k: (makes[k], m) for k, m in matched.items()}, how, seed)
    numbers: dict[Kind, int | None] = {"latent": latent, "random_latent": other}
    return [Arm(kind, numbers.get(kind), matched.get(kind), written.get(kind, ())) for kind in KINDS]


def _random_latent(rates: Rates, latent: int, latents: int, seed: int) -> int | None:
    from exegete.tools.controls import random_latents

    if rates.shape != (latents,):
        raise UserError(f"rates have shape {rates.shape}; give one firing rate for each of the {latents} latents")
    alike = (rates > 0) == (rates[latent] > 0)
    return random_latents(rates, latent, 1, seed).latents[0] if alike.sum() > 1 else None


def _steering(dictionary: Dictionary, latent: int) -> Make:
    from exegete.tools.interventions import steer

    return partial(steer, dictionary.fingerprint, [latent], positions="last")


def _pushing(model: LiveModel, dictionary: Dictionary, seed: int) -> Make:
    from exegete.tools.controls import random_direction
    from exegete.tools.interventions import push

    point = dictionary.hook_point_out
    return partial(push, point, random_direction(model.subject.width(point), seed).tolist(), positions="last")


def _written(
    model: LiveModel, prompts: Sequence[Tokens], found: dict[Kind, tuple[Make, Matched]], how: Steering, seed: int
) -> dict[Kind, tuple[Passage, ...]]:
    """Return the passages of every arm that reaches the KL."""
    from exegete.tools.generation import generate
    from exegete.tools.interventions import CLEAN
    from exegete.tools.live_model import Trial

    edits = {kind: make(m.strength) for kind, (make, m) in found.items() if m.strength is not None}
    if not edits:
        return {}
    # A number of its own for every prompt: the same words may be scored twice, and are then continued in two ways.
    trials = [Trial(prompt, edit, draw) for edit in (CLEAN, *edits.values()) for draw, prompt in enumerate(prompts)]
    continuations = generate(model, trials, how.tokens, temperature=how.temperature, seed=derive_seed(seed, "passages"))
    texts = [model.text(one.tokens) for one in continuations]
    rows = [texts[at : at + len(prompts)] for at in range(0, len(texts), len(prompts))]
    shown = [model.text(prompt) for prompt in prompts]
    return {
        kind: tuple(map(Passage, shown, rows[0], steered)) for kind, steered in zip(edits, rows[1:], strict=True)
    }  # fmt: skip


def _cuts(windows: Sequence[Window], fires: bool, count: int) -> Iterator[Sequence[str]]:
    """Yield the pieces of at most `count` prompts."""
    if not fires:
        yield from (window.tokens for window in [w for w in windows if w.kind == "random"][:count])
        return
    known = [w for w in sampled(windows) if w.activations is not None and w.marks is None and w.fires]
    for window in evenly(known, count):
        assert window.activations is not None
        yield window.tokens[: int(np.argmax(window.activations > 0)) + 1]


class _Reader:
    """Turns pieces of text back into tokens."""

    def __init__(self, model: LiveModel) -> None:
        self._model = model
        self._numbers: dict[str, int | None] = {}
        self.again = 0
        """Prompts that had to be tokenised again."""
        for number, piece in enumerate(model.subject.pieces):
            self._numbers[piece] = None if piece in self._numbers else number

    def tokens(self, pieces: Iterable[str]) -> Tokens:
        """Return the tokens of a prompt, begun as the subject's contexts are."""
        wanted = list(pieces)
        numbers = [self._numbers.get(piece) for piece in wanted]
        if None in numbers:
            self.again += 1
            return self._model.tokens("".join(wanted))
        known = tuple(number for number in numbers if number is not None)
        bos = self._model.subject.bos
        return known if bos is None or known[:1] == (bos,) else (bos, *known)
