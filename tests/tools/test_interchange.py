"""Evidence as JSON lines: what goes in comes out, and a wrong line leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exegete
from exegete.tools import interchange_spool
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.interchange import export_evidence, import_evidence
from exegete.tools.windows import KINDS, SPLITS

FIRING: dict[str, Any] = {
    "tokens": ["In", " May", " we"],
    "activations": [0.0, 7.25, -0.5],
    "fires": True,
    "split": "explain",
    "kind": "firing",
    "document": "d1",
}
QUIET: dict[str, Any] = {
    "tokens": ["In", " town"],
    "activations": None,
    "fires": False,
    "split": "test",
    "kind": "random",
}
MARKED: dict[str, Any] = QUIET | {"marks": [1]}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def latent(index: int, *windows: dict[str, Any], dictionary: str = "d", **more: Any) -> dict[str, Any]:
    return {"dictionary": dictionary, "latent": index, "windows": list(windows), **more}


def test_import_reads_back_as_evidence(tmp_path: Path) -> None:
    lines = [latent(7, FIRING, QUIET, MARKED, explanation="May"), latent(2, QUIET), latent(7, FIRING, dictionary="e")]
    first, second = import_evidence(write(tmp_path / "f.jsonl", lines), tmp_path / "s", seed=3)
    assert (first.name, first.latents, first.windows, second.name) == ("d", 2, 4, "e")
    evidence = Evidence.open(first.folder)
    assert evidence.dictionary == first.dictionary
    assert {k: evidence.provenance[k] for k in ("name", "source", "seed")} == {
        "name": "d",
        "source": "import",
        "seed": 3,
    }
    assert evidence.statuses == {2: "dead", 7: "live"}
    quiet, may = evidence.read([2, 7], "score")
    assert may.given_explanation == "May" and quiet.given_explanation is None
    window, unmarked, marked = may.windows
    assert window.tokens == ("In", " May", " we") and window.activations is not None
    assert (window.activations.tolist(), window.document, window.firing_positions()) == ([0.0, 7.25, -0.5], "d1", (1,))
    assert (unmarked.activations, unmarked.marks, unmarked.marks_correct) == (None, None, None)
    assert (marked.marks, marked.marks_correct) == ((1,), False)
    assert unmarked.id == marked.id == quiet.windows[0].id != window.id
    with exegete.connect(tmp_path / "s") as connection:
        found = connection.execute("SELECT latent, text FROM examples WHERE split = 'explain' ORDER BY ALL").fetchall()
        assert found == [(7, "In<< May>> we")] * 2
        assert connection.execute("SELECT name FROM dictionaries ORDER BY 1").fetchall() == [("d",), ("e",)]


@st.composite
def _windows(draw: st.DrawFn) -> dict[str, Any]:
    tokens = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), min_size=1, max_size=5))
    fires = draw(st.booleans())
    numbers = st.floats(-4, 4 if fires else 0, width=32).map(lambda x: x + 0.0)
    values = draw(st.none() | st.lists(numbers, min_size=len(tokens), max_size=len(tokens)))
    if values is not None and fires:
        values[0] = 1.0
    kind = "firing" if fires else draw(st.sampled_from(KINDS[1:]))
    window: dict[str, Any] = {
        "tokens": tokens,
        "activations": values,
        "fires": fires,
        "split": draw(st.sampled_from(SPLITS)),
        "kind": kind,
    }
    if draw(st.booleans()):
        window |= {
            "marks": draw(st.lists(st.integers(0, len(tokens) - 1), max_size=2)),
            "marks_correct": draw(st.booleans()),
        }
    return window | ({"document": draw(st.text("ab", max_size=2))} if draw(st.booleans()) else {})


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, 2**31 - 2), st.lists(_windows(), max_size=4), min_size=1, max_size=3))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, latents: dict[int, list[dict[str, Any]]]) -> None:
    folder = tmp_path_factory.mktemp("round")
    lines = [latent(index, *windows) for index, windows in sorted(latents.items())]
    import_evidence(write(folder / "f.jsonl", lines), folder / "s")
    assert export_evidence(folder / "s", folder / "out.jsonl") == len(lines)
    back = [json.loads(line) for line in (folder / "out.jsonl").read_text().split("\n")[:-1]]
    for line in lines:
        line["windows"].sort(key=lambda w: (w["split"], w["kind"]))
    # -0.0 is no firing, so that it comes back as 0.0, which equals it.
    assert back == lines
    import_evidence(folder / "out.jsonl", folder / "again")
    export_evidence(folder / "again", folder / "out2.jsonl")
    assert (folder / "out2.jsonl").read_text() == (folder / "out.jsonl").read_text()


def test_compressed_files(tmp_path: Path) -> None:
    text = json.dumps(latent(0, FIRING)).encode()
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "f.jsonl.zst").write_bytes(zstandard.compress(text))
    for name in ("f.jsonl.gz", "f.jsonl.zst"):
        assert import_evidence(tmp_path / name, tmp_path / name[-3:])[0].windows == 1
        assert export_evidence(tmp_path / name[-3:], tmp_path / f"out{name}") == 1
    assert json.loads(gzip.decompress((tmp_path / "outf.jsonl.gz").read_bytes()))["windows"] == [FIRING]


WRONG = [
    ("{", "invalid JSON"),
    ("[1]", "expected an object"),
    ({"dictionary": "d", "latent": 0}, "'windows' is missing"),
    ({"dictionary": 3, "latent": 0, "windows": []}, "'dictionary' must be a name; found 3"),
    ({"dictionary": "d", "latent": -1, "windows": []}, "'latent' must be an index from 0; found -1"),
    ({"dictionary": "d", "latent": True, "windows": []}, "'latent' must be an index"),
    (latent(0, explantion="x"), "unknown key 'explantion'. Did you mean 'explanation'"),
    (latent(1, FIRING), "stands on line 1 already"),
    (
        latent(0, QUIET, FIRING | {"split": "train"}),
        "window 1: 'split' must be one of explain, refine, test; found \"train\"",
    ),
    (latent(0, FIRING | {"kind": "top"}), "'kind' must be one of"),
    (latent(0, FIRING | {"activations": [1.0]}), r"one number a token \(3\); found 1"),
    (latent(0, FIRING | {"activations": [1.0, float("nan"), 0]}), "NaN is no number"),
    (latent(0, FIRING | {"activations": [1.0, 1e39, 0]}), "finite"),
    (latent(0, FIRING | {"activations": [1.0, "2", 0]}), 'finite numbers; found "2"'),
    (latent(0, FIRING | {"activations": [0, 0, 0]}), "contradicts the activations"),
    (latent(0, QUIET | {"activations": [0, 1]}), "contradicts the activations"),
    (latent(0, QUIET | {"kind": "firing"}), "contradicts 'fires' false"),
    (latent(0, MARKED | {"marks": [2]}), r"positions from 0 to 1; found \[2\]"),
    (latent(0, QUIET | {"marks_correct": True}), "without 'marks'"),
    (latent(0, QUIET | {"tokens": []}), "'tokens' must be a list of at least one text"),
    (latent(0, QUIET | {"tokens": ["\ud800", "x"]}), "half a character"),
    (latent(0, QUIET | {"fires": 1}), "'fires' must be true or false"),
    (latent(0, QUIET | {"mark": [1]}), "Did you mean 'marks'"),
]


@pytest.mark.parametrize(("line", "said"), WRONG)
def test_a_wrong_line_is_named_and_nothing_is_written(tmp_path: Path, line: Any, said: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "f.jsonl").write_text(json.dumps(latent(1, FIRING)) + "\n" + text + "\n")
    with pytest.raises(UserError, match=said) as caught:
        import_evidence(tmp_path / "f.jsonl", tmp_path / "s")
    assert str(caught.value).startswith(f"{tmp_path / 'f.jsonl'}:2") and "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_files_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"dictionary": "\xe9"}')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(latent(0, FIRING)).encode())[:-20])
    (tmp_path / "no.jsonl.gz").write_text("{}")
    (tmp_path / "no.jsonl.zst").write_text("{}")
    for name, said in (
        ("absent", "no file"),
        ("empty", "holds no latents"),
        ("latin", "UTF-8"),
        ("cut", "readable|read"),
    ):
        with pytest.raises(UserError, match=said):
            import_evidence(next(tmp_path.glob(f"{name}*"), tmp_path / name), tmp_path / "s")
    for name in ("no.jsonl.gz", "no.jsonl.zst"):
        with pytest.raises(UserError, match="read"):
            import_evidence(tmp_path / name, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_again_changes_nothing_and_other_evidence_of_that_name_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [latent(0, FIRING)])
    assert import_evidence(file, tmp_path / "s") == import_evidence(file, tmp_path / "s")
    with pytest.raises(UserError, match="other evidence of a dictionary named 'd'"):
        import_evidence(
            write(tmp_path / "g.jsonl", [latent(1, FIRING), latent(1, FIRING, dictionary="new")]), tmp_path / "s"
        )
    with exegete.connect(tmp_path / "s") as connection:
        assert connection.execute("SELECT name FROM dictionaries").fetchall() == [("d",)]


def test_export_chooses_a_dictionary(tmp_path: Path) -> None:
    lines = [latent(0, FIRING), latent(0, QUIET, dictionary="e"), latent(1, FIRING, dictionary="e")]
    found = import_evidence(write(tmp_path / "f.jsonl", lines), tmp_path / "s")
    out = tmp_path / "out.jsonl"
    assert export_evidence(tmp_path / "s", out) == 3
    assert export_evidence(tmp_path / "s", out, "e") == 2
    assert export_evidence(tmp_path / "s", out, found[0].dictionary[:20]) == 1
    before = out.read_text()
    with pytest.raises(UserError, match="no dictionary is named 'f'; there are"):
        export_evidence(tmp_path / "s", out, "f")
    assert out.read_text() == before
    with pytest.raises(UserError, match="cannot write"):
        export_evidence(tmp_path / "s", tmp_path / "absent" / "out.jsonl")


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interchange_spool, "_ROWS", 1_000)
    peaks = []
    for latents in (500, 2_500):
        with (tmp_path / "f.jsonl").open("w") as file:
            for index in range(latents):
                windows = [FIRING | {"document": f"{index}-{i}"} for i in range(10)]
                file.write(json.dumps(latent(index, *windows)) + "\n")
        tracemalloc.start()
        import_evidence(tmp_path / "f.jsonl", tmp_path / f"s{latents}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What is kept of a latent is the number of its line.
    assert peaks[1] - peaks[0] < 2_000 * 400
