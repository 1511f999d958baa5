"""Make prompts after which a small story model names its character again, out of stories that it writes itself.

    python examples/make_name_prompts.py         # writes examples/names.jsonl

1. The model samples stories. Of each with "named NAME", where NAME is one of `NAMES`, the first place is taken at which the
   model's most probable next token begins that name again, at least `FAR` tokens after the name was last there, and in
   sentences that speak of nobody else of `NAMES`.
2. `answer` is the first token of the name; `other` is the pronoun of the same person, at the beginning of a sentence or within
   one, whichever of the two the model finds likelier there (with `--other name`: the first token of the variant's name).
3. `variant` is the same text with another name of as many tokens in each place of the name, and nothing else changed.

The file holds nothing but what the model wrote. Names of one token are " Lily", " Tim" and " Timmy" in its vocabulary of 512;
of the others the answer is the token that they begin with (" T" of Tom), which other words may begin with as well.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from exegete.tools.generation import generate
from exegete.tools.live_model import LiveModel
from exegete.tools.subject import load_subject
from exegete.tools.trials import Trial

DATA = Path(__file__).parents[2] / "shared/data"
NAMES = {
    "Lily": ("she", "Tim"), "Tim": ("he", "Lily"), "Timmy": ("he", "Lily"),
    "Tom": ("he", "Ben"), "Ben": ("he", "Sam"), "Sam": ("he", "Ben"),
    "Max": ("he", "Bob"), "Bob": ("he", "Max"), "Sue": ("she", "Mia"), "Mia": ("she", "Sue"),
}  # fmt: skip
"""Name → its pronoun, and the name that stands in the variant: of as many tokens, with another first one."""
FAR = 8
"""Tokens between the name and where it comes again, at least."""


def stories(model: LiveModel, count: int, tokens: int, temperature: float, seed: int) -> list[tuple[int, ...]]:
    """Return the tokens of stories that the model writes, each begun as its contexts are."""
    assert model.subject.bos is not None
    trials = [Trial((model.subject.bos,), draw=draw) for draw in range(count)]
    written = generate(model, trials, tokens, temperature=temperature, seed=seed)
    return [(model.subject.bos, *one.tokens) for one in written]


def case(model: LiveModel, tokens: tuple[int, ...], other: str = "pronoun") -> tuple[str, dict[str, str]] | None:
    """Return the name of a story's character and the case that ends before it comes again; None where there is no such place."""
    said = re.search(r"\bnamed (\w+)", model.text(tokens))
    if said is None or said[1] not in NAMES:
        return None
    name = said[1]
    first, places = begins(model, name), named_at(model, tokens, name)
    logits = model.subject.logits(torch.tensor([tokens]))[0]
    for last in range(places[0] + FAR, len(tokens) - 1) if places else ():
        if int(logits[last].argmax()) != first or last - max(at for at in places if at <= last) < FAR:
            continue
        pronoun, instead = NAMES[name]
        words = (pronoun, pronoun.capitalize()) if other == "pronoun" else (instead,)
        return name, _written(model, tokens[: last + 1], name, words, logits[last])
    return None


def _written(
    model: LiveModel, tokens: tuple[int, ...], name: str, words: tuple[str, ...], logits: torch.Tensor
) -> dict[str, str]:
    prompt, instead = model.text(tokens).lstrip(" "), NAMES[name][1]
    others = [begins(model, word) for word in words]
    return {
        "prompt": prompt,
        "answer": model.subject.pieces[begins(model, name)],
        "other": model.subject.pieces[max(others, key=lambda token: float(logits[token]))],
        "variant": re.sub(rf"\b{name}\b", instead, prompt),
    }


def begins(model: LiveModel, word: str) -> int:
    """Return the token that a word begins with, after a space."""
    return model.tokens(f"a {word}")[len(model.tokens("a"))]


def named_at(model: LiveModel, tokens: tuple[int, ...], name: str) -> list[int]:
    """Return the places of a name's last token."""
    spelled = model.tokens(f"a {name}")[len(model.tokens("a")) :]
    return [at + len(spelled) - 1 for at in range(len(tokens)) if tokens[at : at + len(spelled)] == spelled]


def usable(model: LiveModel, made: dict[str, str], name: str, tokens: tuple[int, ...]) -> bool:
    """Return whether prompt and variant are read as they should be, and nobody else of `NAMES` is in the prompt."""
    prompt, variant = model.tokens(made["prompt"]), model.tokens(made["variant"])
    others = [other for other in NAMES if other != name and re.search(rf"\b{other}\b", made["prompt"])]
    return prompt == tokens[: len(prompt)] and len(variant) == len(prompt) and not others


def chosen(model: LiveModel, written: list[tuple[int, ...]], most: int, other: str) -> Iterator[dict[str, str]]:
    """Yield usable cases, each prompt once, `most` of a name at most."""
    seen: Counter[str] = Counter()
    for tokens in dict.fromkeys(written):
        found = case(model, tokens, other)
        if found is None or not usable(model, found[1], found[0], tokens) or seen[found[0]] >= most:
            continue
        if seen[found[1]["prompt"]]:
            continue
        seen.update([found[0], found[1]["prompt"]])
        yield found[1]


def main() -> None:
    """Sample, choose, write, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DATA / "models/stories260K/hf"))
    parser.add_argument("--out", type=Path, default=Path("examples/names.jsonl"))
    parser.add_argument("--stories", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=100, help="of each story")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--most", type=int, default=16, help="prompts of one name, at most")
    parser.add_argument("--other", choices=("pronoun", "name"), default="pronoun", help="what stands against the name")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = LiveModel(load_subject(arguments.model))
    written = stories(model, arguments.stories, arguments.tokens, arguments.temperature, arguments.seed)
    cases = list(chosen(model, written, arguments.most, arguments.other))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(one) + "\n" for one in cases), encoding="utf-8")
    answers = Counter(one["answer"] for one in cases)
    print(
        json.dumps({"stories": len(written), "prompts": len(cases), "answers": dict(answers.most_common())}, indent=1)
    )


if __name__ == "__main__":
    main()
