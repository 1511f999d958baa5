"""The record of an investigation: what is written is what is read, and what is damaged is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from investigation_records import investigation

from exegete.agent.investigation.contract import Headline, Prediction
from exegete.agent.investigation.record import (
    ExperimentRecord,
    from_json,
    read_record,
    to_json,
    write_record,
    write_whole,
)
from exegete.tools.errors import UserError


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = investigation('"\\ \n <é> 🦉')
    path = write_record(record, tmp_path)
    assert path.name == "record.json" and [one.name for one in tmp_path.iterdir()] == ["record.json"]
    assert read_record(tmp_path) == record
    assert record.labels == {17: 'the word descending"\\ \n <é> 🦉', 21: 'order by"\\ \n <é> 🦉'}
    assert write_record(read_record(tmp_path), tmp_path).read_bytes() == path.read_bytes()


def test_numbers_that_are_none_and_halves_of_characters_are_written_as_what_they_are() -> None:
    headline = Headline("change", math.nan, -math.inf, math.inf, 3)
    experiment = ExperimentRecord(
        "E1", "ablate", {"word": "\ud800x"}, Prediction("H1", "b", 0.0), "t", headline=headline, facts={"all": [math.nan, 1]}
    )  # fmt: skip
    text = to_json(investigation(experiments=(experiment,)))
    [found] = from_json(text, "it").experiments
    assert found.headline == Headline("change", None, None, None, 3)
    assert (found.facts, found.arguments) == ({"all": [None, 1]}, {"word": "�x"})
    text.encode("utf-8")


def test_what_is_no_plain_value_is_not_written() -> None:
    with pytest.raises(TypeError, match="plain values"):
        to_json(investigation(notes=(object(),)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: json.dumps(json.loads(text) | {"seed": "many"}), "seed: "),
        (lambda text: json.dumps(json.loads(text) | {"status": "excellent"}), "status: "),
        (lambda text: json.dumps({**json.loads(text), "budget": {"steps": -1}}), "budget: steps"),
        (lambda text: json.dumps({**json.loads(text), "format": 99, "more": 1}), "format 99.*pip install -U exegete"),
    ],
)
def test_a_damaged_record_is_an_error_that_names_it(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write_record(investigation(), tmp_path)
    path = tmp_path / "record.json"
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_record(tmp_path)


def test_a_folder_without_a_record_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"record\.json.*when an investigation ends"):
        read_record(tmp_path)


def test_hits_count_experiments_that_gave_a_figure() -> None:
    assert investigation().hits == (3, 4)
    assert replace(investigation(), experiments=()).hits == (0, 0)
    assert not investigation().by_model and investigation(investigator="openai:m").by_model


def test_an_experiment_is_found_by_its_id() -> None:
    assert investigation().experiment("E3").arguments["latents"] == [5]
    with pytest.raises(UserError, match="no experiment 'E9'; it has: E1, E2, E3, E4, E5"):
        investigation().experiment("E9")


def test_a_file_that_cannot_be_written_leaves_the_former(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.txt", "former")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    with pytest.raises(OSError, match="No such file"):
        write_whole(tmp_path / "none" / "a.txt", "text")
    assert path.read_text() == "former"
