"""Who answers: an oracle that knows what explanations mean, recorded verdicts, a script, or nobody in particular.

The oracle sees the rendered prompt and nothing else:
1. It reads windows and explanation out of the prompt (`reading`), and looks up what the explanation means.
2. Detection: the predicate holds somewhere in the window. Fuzzing: there are marks, and it holds on each marked token.
3. Each verdict is flipped with probability `rate`; in a share `correlation` of the prompts one draw flips all of them or
   none. The draws come from the seed and the bytes of the prompt alone, so asking again gives the same answer.
Asked for anything else about windows (an explanation), it names the words that it saw marked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from exegete.tools.predicates import Predicate, PredicateError, parse, quote

from .answers import Answer, Content, Said, answer, said_text
from .behaviours import Behaviour, Model, Recorded, uniform
from .questions import Question, RequestError
from .reading import Reading, ReadWindow, Unreadable, original, read


def reply(model: Model, question: Question) -> Answer:
    """Return what the model says to the question.

    Raises:
        RequestError: it has nothing to say: the script is used up, the verdict was not recorded, the explanation means
            nothing to the oracle.
    """
    kind = model.behaviour.answer
    if kind == "scripted":
        return _scripted(model)
    try:
        reading = read(question.instructions, question.user)
    except Unreadable:
        if kind == "replay":
            raise RequestError(400, "replay: there is no window in the prompt") from None
        return answer(Content(), question.schema)
    if reading.task == "other":
        return answer(_explaining(reading), question.schema)
    if kind == "oracle":
        said = _oracle(model.behaviour, reading, question.digest)
    elif kind == "replay":
        said = tuple(_recorded(model, reading, window) for window in reading.windows)
    else:
        said = tuple(Said(False) for _ in reading.windows)
    return answer(Content(said), question.schema)


def _scripted(model: Model) -> Answer:
    if not model.script:
        raise RequestError(400, "the script is used up")
    line = model.script.popleft()
    if isinstance(line, str):
        return said_text(line)
    text = json.dumps(line["json"], ensure_ascii=False) if "json" in line else line.get("text", "")
    return said_text(text, line.get("stop", "stop"))


def _oracle(behaviour: Behaviour, reading: Reading, prompt: str) -> tuple[Said, ...]:
    meaning = _meaning(behaviour.meanings, reading.explanation)
    together = uniform(behaviour.seed, "together", prompt) < behaviour.correlation
    confidence = max(0.5, 1 - max(behaviour.rate, 0.001))
    said = []
    for number, window in enumerate(reading.windows):
        draw = uniform(behaviour.seed, "flip", prompt, "all" if together else str(number))
        said.append(Said(_holds(meaning, reading.task, window) != (draw < behaviour.rate), confidence))
    return tuple(said)


def _holds(meaning: Predicate, task: str, window: ReadWindow) -> bool:
    mask = meaning.matches(window.tokens)
    if task == "detection":
        return bool(mask.any())
    return any(window.marked) and all(mask[i] for i, marked in enumerate(window.marked) if marked)


def _meaning(meanings: Mapping[str, str], explanation: str) -> Predicate:
    for known in (explanation, original(explanation)):
        if known in meanings:
            return _parsed(meanings[known])
    try:
        return _parsed(original(explanation))
    except PredicateError:
        raise RequestError(400, f"oracle: nothing tells what this explanation means: {explanation!r}") from None


@lru_cache(maxsize=10_000)
def _parsed(source: str) -> Predicate:
    return parse(source)


def _recorded(model: Model, reading: Reading, window: ReadWindow) -> Said:
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


def _explaining(reading: Reading) -> Content:
    counts: Counter[str] = Counter()
    for window in reading.windows:
        counts.update(
            token.strip().lower() for token, marked in zip(window.tokens, window.marked, strict=True) if marked
        )
    words = sorted(word for word, _ in counts.most_common(5) if any(map(str.isalnum, word)))
    if not words:
        return Content(named={"predicate": "never"}, text="Nothing that the windows have in common.")
    predicate = f"word in {{{', '.join(map(quote, words))}}}"
    text = f"The words {', '.join(words)}."
    named: dict[str, Any] = {"predicate": predicate, "explanation": text}
    return Content(named=named, text=text)
