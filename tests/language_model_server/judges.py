"""Who answers: an oracle that knows what explanations mean, recorded verdicts, a script, or nobody in particular.

The oracle sees the rendered prompt and nothing else:
1. It reads the question out of the prompt (`reading`), and looks up what the explanation means: a predicate.
2. Detection: the predicate holds somewhere in the window. Fuzzing: there are marks, and it holds on each marked token.
   Simulation: 10 where it holds, else 0. Rating: 2 or 0. Choice: the continuation or list in which it holds on more
   tokens (a draw if equal). Writing: samples with a word of the predicate's, and without.
3. Each verdict is flipped with probability `rate`; in a share `correlation` of the prompts one draw flips all of them or
   none. The draws come from the seed and the bytes of the prompt alone, so asking again gives the same answer.
4. Asked to explain, it names the words that are marked more often than not, or without windows the tokens that are
   promoted, as a predicate that it understands when it is asked to judge it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from exegete.tools.predicates import Member, Predicate, PredicateError, parse, quote, words_of

from .agents import agent_reply
from .answers import Answer, Called, Content, Said, answer, said_text
from .behaviours import Behaviour, Model, Recorded, uniform
from .questions import Question, RequestError
from .reading import Passage, Reading, Unreadable, original, read, schema_in_words

SAYS_NOTHING = "A pattern in the text."
"""The explanation that is given where there is nothing to go by; it holds nowhere."""
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_WORDS = {"simulation": ("0", "10"), "rating": ("0", "2")}


def reply(model: Model, question: Question) -> Answer:
    """Return what the model says to the question.

    Raises:
        RequestError: it has nothing to say: the script is used up, the verdict was not recorded, the explanation means
            nothing to the oracle.
    """
    kind = model.behaviour.answer
    if kind == "scripted":
        return _scripted(model, question)
    schema = question.schema or schema_in_words(question.user)
    try:
        reading = read(question.instructions, question.user)
        if "finish" in question.offered and reading.task == "explain":
            return agent_reply(reading, question.results, blind=model.behaviour.blind == "agent")
    except Unreadable:
        if kind == "replay":
            raise RequestError(400, "replay: there is no window in the prompt") from None
        return answer(Content(text=SAYS_NOTHING), schema)
    return answer(_content(model, reading, question), schema)


def _content(model: Model, reading: Reading, question: Question) -> Content:
    kind = model.behaviour.answer
    if kind == "replay":
        return Content(tuple(_recorded(model, reading, window) for window in reading.passages))
    if reading.task == "explain" and model.behaviour.blind == "writer":
        return _named("never")
    if reading.task == "explain":
        return _named(_words_of_marks(reading) if reading.passages else _among("token", reading.promoted[:10]))
    if reading.task == "merge":
        return _named(" or ".join(f"({source})" for source in reading.predicates) or "never")
    if kind == "oracle":
        return _oracle(model.behaviour, reading, question.digest)
    if reading.task == "choice":
        return Content(named={"choice": 1})
    if reading.task == "write":
        return _written(parse("never"), reading)
    count = len(reading.passages[0].tokens) if reading.task == "simulation" else len(reading.passages)
    return Content((Said(False, words=_WORDS.get(reading.task, ("0", "1"))),) * count)


def _scripted(model: Model, question: Question) -> Answer:
    if model.behaviour.by_turn:
        fit = [
            one for one in model.behaviour.replies if (isinstance(one, dict) and "json" in one) is question.structured
        ]
        rest = fit[0 if question.structured else question.turn :]
    else:
        rest = [model.script.popleft()] if model.script else []
    if not rest:
        raise RequestError(400, "the script is used up")
    line = rest[0]
    if isinstance(line, str):
        return said_text(line)
    text = json.dumps(line["json"], ensure_ascii=False) if "json" in line else line.get("text", "")
    called = tuple(Called(**call) for call in line.get("calls", ()))
    return replace(said_text(text, line.get("stop", "stop")), calls=called)


def _oracle(behaviour: Behaviour, reading: Reading, prompt: str) -> Content:
    meaning = _meaning(behaviour, reading.explanation)
    if reading.task == "choice":
        return Content(named={"choice": _chosen(behaviour, meaning, reading.passages, prompt)})
    if reading.task == "write":
        return _written(meaning, reading)
    if reading.task == "simulation":
        truth = [bool(held) for held in meaning.matches(reading.passages[0].tokens)]
    else:
        truth = [_holds(meaning, reading.task, passage) for passage in reading.passages]
    words = _WORDS.get(reading.task, ("0", "1"))
    together = uniform(behaviour.seed, "together", prompt) < behaviour.correlation
    confidence = max(0.5, 1 - max(behaviour.rate, 0.001))
    said = []
    for number, holds in enumerate(truth):
        flipped = uniform(behaviour.seed, "flip", prompt, "all" if together else str(number)) < behaviour.rate
        said.append(Said(holds != flipped, confidence, words))
    return Content(tuple(said))


def _holds(meaning: Predicate, task: str, passage: Passage) -> bool:
    mask = meaning.matches(passage.tokens)
    if task != "fuzzing":
        return bool(mask.any())
    return any(passage.marked) and all(mask[i] for i, marked in enumerate(passage.marked) if marked)


def _chosen(behaviour: Behaviour, meaning: Predicate, passages: Sequence[Passage], prompt: str) -> int:
    first, second = (int(meaning.matches(passage.tokens).sum()) for passage in passages)
    if first == second:
        return 1 + (uniform(behaviour.seed, "guess", prompt) < 0.5)
    flipped = uniform(behaviour.seed, "flip", prompt) < behaviour.rate
    return 1 + ((second > first) != flipped)


def _written(meaning: Predicate, reading: Reading) -> Content:
    """Texts on which the predicate holds and texts on which it does not, as far as its own words and the samples go."""
    samples = ["".join(passage.tokens) for passage in reading.passages] or ["A text of no importance"]
    named = [_unquoted(text).strip(" *") for text in _QUOTED.findall(str(meaning))] or ["something"]
    texts = [f"{samples[n % len(samples)]} {n + 1}" for n in range(reading.count)]
    firing = [f"{text} {named[n % len(named)]}" for n, text in enumerate(texts)]
    return Content(named={"firing": firing, "silent": texts})


def _unquoted(text: str) -> str:
    node = parse(f"token is {text}").node
    assert isinstance(node, Member)
    return node.values[0]


def _meaning(behaviour: Behaviour, explanation: str) -> Predicate:
    for known in (explanation, original(explanation)):
        if known in behaviour.meanings:
            return _parsed(behaviour.meanings[known])
    if explanation == SAYS_NOTHING:
        return _parsed("never")
    try:
        return _parsed(original(explanation))
    except PredicateError:
        if behaviour.otherwise:
            return _parsed(behaviour.otherwise)
        raise RequestError(400, f"oracle: nothing tells what this explanation means: {explanation!r}") from None


@lru_cache(maxsize=10_000)
def _parsed(source: str) -> Predicate:
    return parse(source)


def _recorded(model: Model, reading: Reading, window: Passage) -> Said:
    if model.recorded is None:
        model.recorded = _table(model.behaviour.verdicts)
    for explanation in (reading.explanation, None):
        found = model.recorded.get((reading.task, explanation, window.rendered))
        if found is not None:
            return Said(found)
    raise RequestError(400, f"replay: no {reading.task} verdict was recorded for {window.rendered!r}")


def _table(verdicts: Sequence[Mapping[str, Any]]) -> dict[Recorded, bool]:
    table: dict[Recorded, bool] = {}
    for row in verdicts:
        key = (row["task"], row.get("explanation"), row["text"])
        if table.setdefault(key, bool(row["applies"])) != bool(row["applies"]):
            raise RequestError(400, f"replay: contradictory verdicts were recorded for {key!r}")
    return table


def _named(predicate: str) -> Content:
    named: dict[str, Any] = {"explanation": predicate, "predicate": predicate, "senses": [predicate]}
    return Content(named=named, text=predicate)


def _words_of_marks(reading: Reading) -> str:
    """The predicate of the words that are marked more often than not; of all marked ones where no word is."""
    marked: Counter[str] = Counter()
    unmarked: Counter[str] = Counter()
    for passage in (*reading.passages, *reading.silent):
        for words, is_marked in zip(words_of(passage.tokens), passage.marked, strict=True):
            (marked if is_marked else unmarked).update(words)
    chosen = [word for word, count in marked.most_common(10) if count >= unmarked[word]] or list(marked)[:10]
    return _among("word", sorted(chosen))


def _among(field: str, texts: Sequence[str]) -> str:
    return f"{field} in {{{', '.join(map(quote, texts))}}}" if texts else "never"
