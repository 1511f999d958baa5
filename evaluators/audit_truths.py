"""Planted latents whose meaning is known, and the ways in which an explanation of one can be wrong.

A truth is made of senses: words, and perhaps the place where they must stand. From it come the true explanation (text and
predicate, which say the same) and its corruptions:

`too_broad`     the class that the words belong to, wherever they stand
`too_narrow`    half of the words
`sibling`       the explanation of the latent whose firing tokens overlap most
`shuffled`      the explanation of another latent, drawn by seed
`wrong_context` the right words, in another place than the true one
`missing_sense` of a latent with several senses, all but one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from exegete.evaluators.baselines import firing_tokens, shuffled_partners, token_overlap_siblings
from exegete.tools.explainers import Explanation
from exegete.tools.predicates import Member, Node, Predicate, join, parse
from exegete.tools.seeds import generator
from exegete.tools.windows import LatentEvidence

Corruption = Literal["too_broad", "too_narrow", "sibling", "shuffled", "wrong_context", "missing_sense"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)

WORDS_NAMED = 12
"""A text names so many words; of a longer list it says `such as`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where words stand, for example `before(1): token is " BY"`, in words `right after BY`."""

    predicate: str
    phrase: str


@dataclass(frozen=True, slots=True)
class Sense:
    """Words, and where they must stand for the latent to fire."""

    meaning: str
    """What the words are, for example `Names of cities`."""
    words: tuple[str, ...]
    wider_meaning: str
    wider: tuple[str, ...]
    """The class that the words belong to, themselves among it."""
    place: Place | None = None
    elsewhere: Place | None = None
    """Another place in which the same words stand."""

    @property
    def node(self) -> Node:
        """The predicate that holds on this sense."""
        words = Member("word", self.words)
        return words if self.place is None else join("and", [words, parse(self.place.predicate).node])

    @property
    def text(self) -> str:
        """The sense in words, without a full stop."""
        named = ", ".join(self.words[:WORDS_NAMED])
        listed = f"{self.meaning}: {named}" if len(self.words) <= WORDS_NAMED else f"{self.meaning}, such as {named}"
        return listed if self.place is None else f"{listed}; {self.place.phrase}"


@dataclass(frozen=True, slots=True)
class Truth:
    """What a planted latent stands for."""

    name: str
    senses: tuple[Sense, ...]

    @property
    def predicate(self) -> Predicate:
        """Holds exactly where the latent fires."""
        return Predicate(join("or", [sense.node for sense in self.senses]))

    def explanation(self, author: str = "true", begin: str = "") -> Explanation:
        """Return the explanation that says it; `begin` stands before its text, for example `Makes likelier: `."""
        said = ". Also: ".join(sense.text for sense in self.senses)
        return Explanation(f"{begin}{said}.", str(self.predicate), explainer=author)


def corrupted(
    truths: Mapping[int, Truth], evidence: Mapping[int, LatentEvidence], seed: int, begin: str = ""
) -> dict[int, dict[str, Explanation]]:
    """Return for each latent its corrupted explanations; those that a truth does not allow are left out.

    One that would mean the same as the truth is left out as well (the sibling of a latent may be its twin).

    Args:
        truths: latent → what it stands for.
        evidence: latent → its evidence, of which the explain split tells siblings.
        seed: of what is drawn.
        begin: stands before every text.
    """
    tokens = {latent: firing_tokens(found) for latent, found in evidence.items()}
    siblings = token_overlap_siblings({latent: tokens[latent] for latent in truths}, tokens.items())
    partners = shuffled_partners(sorted(truths), seed)
    found: dict[int, dict[str, Explanation]] = {}
    for latent, truth in truths.items():
        wrong: dict[Corruption, Truth | None] = {
            "too_broad": _of_each(truth, _broad),
            "too_narrow": narrow(truth, seed),
            "sibling": truths[siblings[latent]] if latent in siblings else None,
            "shuffled": truths[partners[latent]] if latent in partners else None,
            "wrong_context": misplaced(truth),
            "missing_sense": without_a_sense(truth, seed),
        }
        found[latent] = {
            name: other.explanation(name, begin)
            for name, other in wrong.items()
            if other is not None and str(other.predicate) != str(truth.predicate)
        }
    return found


def narrow(truth: Truth, seed: int) -> Truth:
    """Return the truth with half of each sense's words, drawn by seed; one at least."""

    def half(sense: Sense) -> Sense:
        order = generator(seed, "narrow", truth.name, sense.text).permutation(len(sense.words))
        kept = sorted(order[: max(1, len(sense.words) // 2)].tolist())
        return replace(sense, meaning="The words", words=tuple(sense.words[i] for i in kept))

    return Truth(truth.name, tuple(map(half, truth.senses)))


def misplaced(truth: Truth) -> Truth | None:
    """Return the truth with its words in another place; None where no sense is bound to a place."""
    if not any(sense.elsewhere for sense in truth.senses):
        return None
    senses = (replace(sense, place=sense.elsewhere or sense.place, elsewhere=sense.place) for sense in truth.senses)
    return Truth(truth.name, tuple(senses))


def without_a_sense(truth: Truth, seed: int) -> Truth | None:
    """Return the truth without one of its senses, drawn by seed; None where it has one only."""
    if len(truth.senses) < 2:
        return None
    lost = int(generator(seed, "missing sense", truth.name).integers(len(truth.senses)))
    return Truth(truth.name, tuple(sense for number, sense in enumerate(truth.senses) if number != lost))


def _broad(sense: Sense) -> Sense:
    return Sense(sense.wider_meaning, sense.wider, sense.wider_meaning, sense.wider)


def _of_each(truth: Truth, change: Callable[[Sense], Sense]) -> Truth:
    return Truth(truth.name, tuple(map(change, truth.senses)))
