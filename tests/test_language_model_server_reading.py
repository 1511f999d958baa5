"""What the test server's oracle makes of every kind of prompt, without the network; and that the server ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from language_model_server.answers import Content, Said, answer, spoil
from language_model_server.behaviours import Model, behaviour
from language_model_server.judges import reply
from language_model_server.openai_chat import question
from language_model_server.questions import RequestError
from language_model_server.reading import Unreadable, read

from exegete.tools.bundled.grammar import generate
from exegete.tools.bundled.tokenizer import build_tokenizer
from exegete.tools.explainers.asking import Shown
from exegete.tools.llm import Reply, schema_text
from exegete.tools.llm.structured import in_words, repair_request
from exegete.tools.prompting import Rendered, line, render, window_line

CATS = 'word in {"cat"}'


def ask(rendered: Rendered | Any, schema: dict[str, Any] | None = None, **fields: Any) -> Any:
    """Return the oracle's answer to a prompt as JSON."""
    messages = [{"role": message.role, "content": message.text} for message in rendered.messages]
    body: dict[str, Any] = {"model": "m", "messages": messages}
    if schema:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return json.loads(reply(Model("m", behaviour({"answer": "oracle", **fields})), question(body)).text)


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def test_windows_of_the_bundled_language_are_cut_as_its_tokenizer_cuts_them() -> None:
    tokenizer = build_tokenizer()
    for example in generate(3, 20, "held_out"):
        ids = tokenizer(example.text)["input_ids"]
        tokens = [tokenizer.decode([token]) for token in ids]
        for at in range(0, len(tokens), 32):
            window = tokens[at : at + 32]
            marks = set(range(at % 3, len(window), 5))
            text = f"<explanation>x</explanation>\n<window 1>{window_line(window, marks)}</window>"
            (found,) = read("marked tokens", [text]).passages
            assert list(found.tokens) == window
            assert {number for number, marked in enumerate(found.marked) if marked} == marks


def test_simulation_gives_ten_where_the_predicate_holds() -> None:
    tokens = [window_line([token]) for token in (" a", " cat", ":", "\n", " 1: cat")]
    schema = closed(**{str(n): {"type": "integer", "enum": list(range(11))} for n in range(1, 6)})
    given = ask(render("simulation", explanation=line(CATS), tokens=tokens), schema)
    assert given == {"1": 0, "2": 10, "3": 0, "4": 0, "5": 10}
    assert set(ask(render("simulation", explanation=line(CATS), tokens=tokens), schema, rate=1.0).values()) == {0, 10}


@pytest.mark.parametrize(("first", "second", "choice"), [(" a cat", " a dog", 1), (" a dog", " a cat, cat", 2)])
def test_choice_is_the_continuation_that_shows_more(first: str, second: str, choice: int) -> None:
    values = {name: window_line([text]) for name, text in (("first", first), ("second", second), ("text", " the"))}
    schema = closed(choice={"type": "integer", "enum": [1, 2]})
    prompt = render("effect_choice", explanation=line(CATS), **values)
    assert ask(prompt, schema) == {"choice": choice}
    assert ask(prompt, schema, rate=1.0) == {"choice": 3 - choice}


def test_explains_by_the_words_that_are_marked_more_often_than_not() -> None:
    text = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    schema = closed(explanation=text, predicate=text)
    windows = [
        Shown(window_line([" the", " cat", " and", " the"], [0, 1]), None),
        Shown(window_line([" a", " Cat"], [1]), line('" Cat" 10')),
    ]
    wanted = {"explanation": CATS, "predicate": CATS}
    assert ask(render("contrastive", windows=windows, silent=[window_line([" the", " dog"])]), schema) == wanted
    assert ask(render("one_shot", windows=windows), schema)["predicate"] == 'word in {"cat", "the"}'


def test_rates_writes_and_chooses_between_lists() -> None:
    windows = [window_line([" a", " cat"]), window_line([" a", " dog"])]
    schema = closed(ratings={"type": "array", "items": {"type": "integer", "enum": [0, 1, 2]}})
    assert ask(render("rating", explanation=line(CATS), windows=windows), schema) == {"ratings": [2, 0]}
    texts = {"type": "array", "items": {"type": "string"}}
    written = ask(
        render("write_texts", explanation=line(CATS), samples=[window_line(["List all dogs"])], count=2),
        closed(firing=texts, silent=texts),
    )
    assert written == {
        "firing": ["List all dogs 1 cat", "List all dogs 2 cat"],
        "silent": ["List all dogs 1", "List all dogs 2"],
    }
    lists = {
        "first": [window_line([" tax"]), window_line([" law"])],
        "second": [window_line(["\n"]), window_line([" cat"])],
    }
    schema = closed(choice={"type": "integer", "enum": [1, 2]})
    assert ask(render("output_choice", explanation=line(CATS), **lists), schema) == {"choice": 2}


def test_explains_an_output_by_the_tokens_that_are_promoted() -> None:
    effects = {
        "promoted": line('" Monday", " say \\"no\\"", "<b>"'),
        "promoted_beyond": 1,
        "suppressed": line('" the"'),
        "suppressed_beyond": 0,
        "measured": False,
    }
    text = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    given = ask(render("output", effects=effects), closed(explanation=text))
    assert given == {"explanation": r'token in {" Monday", " say \"no\"", "<b>"}'}
    windows = [Shown(window_line([" a", " cat"], [1]), None)]
    assert ask(render("combined", windows=windows, effects=effects), closed(explanation=text)) == {"explanation": CATS}


def test_merges_the_predicates_of_hypotheses() -> None:
    schema = closed(
        senses={"type": "array", "items": {"type": "string"}, "minItems": 1}, explanation={"type": "string"}
    )
    hypotheses = [
        {"passages": 3, "text": line("Cats."), "predicate": line(CATS)},
        {"passages": 2, "text": line("Dogs."), "predicate": line('word is "dog"')},
        {"passages": 1, "text": line("Who knows."), "predicate": None},
    ]
    given = ask(render("merge_senses", hypotheses=hypotheses), schema)
    assert given["explanation"] == '(word in {"cat"}) or (word is "dog")' and len(given["senses"]) == 1


def test_schemas_in_words_and_repairs_are_followed() -> None:
    schema = closed(judged={"type": "array", "items": closed(window={"type": "integer"}, fires={"type": "boolean"})})
    rendered = render("detection", explanation=line(CATS), windows=[window_line([" cat"]), window_line([" dog"])])
    request = rendered.request(schema_text(schema))
    wanted = {"judged": [{"window": 1, "fires": True}, {"window": 2, "fires": False}]}
    assert ask(in_words(request)) == wanted
    assert ask(repair_request(request, Reply("unparsed", "nonsense", detail="no JSON")), schema) == wanted
    assert ask(request) == {"verdicts": [1, 0]}


def test_what_it_cannot_read_or_does_not_understand() -> None:
    with pytest.raises(Unreadable, match="not numbered from 1"):
        read("", ["<explanation>x</explanation>\n<window 2>a</window>"])
    with pytest.raises(Unreadable, match="several explanations"):
        read("", ["<explanation>x</explanation>\n<explanation>y</explanation>\n<window 1>a</window>"])
    with pytest.raises(Unreadable):
        read("", ["What is the capital of France?"])
    unknown = render("detection", explanation=line("Felines."), windows=[window_line([" cat"])])
    with pytest.raises(RequestError, match="Felines"):
        ask(unknown)
    assert ask(unknown, otherwise="always") == {"verdicts": [1]}
    assert ask(unknown, meanings={"Felines.": CATS}) == {"verdicts": [1]}


SAID = Content((Said(True), Said(False)))
VERDICT = {"type": "integer", "enum": [0, 1]}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "array", "items": {"type": "boolean"}}, [True, False]),
        (closed(window_1={"type": "boolean"}, window_2={"type": "boolean"}), {"window_1": True, "window_2": False}),
        (closed(v={"type": "array", "items": {"enum": ["yes", "no"]}}), {"v": ["yes", "no"]}),
        (closed(v={"$ref": "#/$defs/list"}) | {"$defs": {"list": {"type": "array", "items": VERDICT}}}, {"v": [1, 0]}),
        (
            closed(v={"type": "array", "items": closed(applies=VERDICT, probability={"type": "number"})}),
            {"v": [{"applies": 1, "probability": 0.999}, {"applies": 0, "probability": 0.001}]},
        ),
    ],
)
def test_verdicts_take_the_form_that_is_asked_for(schema: dict[str, Any], value: Any) -> None:
    assert json.loads(answer(SAID, schema).text) == value


def test_the_server_ends_with_the_test_that_started_it() -> None:
    """Also where nobody had the time to stop it."""
    code = "import os, language_model_server as s\nwith s.serving() as r:\n print(r.port, flush=True); os._exit(1)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    port = int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.1)
    pytest.fail("the server still listens")


def test_an_object_without_lists_is_shortened_too() -> None:
    given = answer(SAID, closed(**{"1": VERDICT, "2": VERDICT}))
    assert json.loads(spoil(given, "wrong_length").text) == {"1": 1}
