from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from exegete.tools import evidence_writing
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.evidence_writing import write_evidence


def _tables() -> dict[str, Any]:
    return {
        "vocabulary": pa.table({"token": [0, 1, 2], "piece": [" the", " cat", " sat"]}),
        "windows": [
            pa.table({"window": [3, 5], "document": ["a", None], "tokens": [[0, 1, 2], [2, 2]]}),
            pa.table({"window": [9], "document": ["b"], "tokens": [[1]]}),
        ],
        "items": pa.table(
            {
                "latent": [4, 4, 7],
                "split": ["explain", "test", "explain"],
                "kind": ["firing", "random", "firing"],
                "rank": [0, 0, 0],
                "window": [9, 3, 5],
                "fires": [True, False, True],
                "positions": [[0], [], None],
                "values": [[2.5], [], None],
                "marks": [None, None, [1]],
                "marks_correct": [None, None, True],
            }
        ),
        "latents": pa.table({"latent": [4, 7], "status": ["live", "rare"], "firing_tokens": [12, None]}),
        "provenance": {"dictionary": "sha256:d", "source": "import", "seed": 0},
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_evidence(tmp_path / "evidence", **_tables())
    four, seven = Evidence.open(tmp_path / "evidence").read([7, 4], "score")
    assert [w.tokens for w in four.windows] == [(" cat",), (" the", " cat", " sat")]
    assert four.windows[0].activations is not None
    assert four.windows[0].activations.tolist() == [2.5]
    assert four.windows[0].document == "b"
    assert four.statistics == {"firing_tokens": 12.0}
    assert seven.windows[0].activations is None and seven.windows[0].marks == (1,)
    assert seven.status == "rare"


def test_the_explainer_is_not_given_test_windows(tmp_path: Path) -> None:
    write_evidence(tmp_path / "evidence", **_tables())
    (four,) = Evidence.open(tmp_path / "evidence").read([4], "explain")
    assert [w.split for w in four.windows] == ["explain"]


def test_only_the_wanted_windows_are_read(tmp_path: Path) -> None:
    write_evidence(tmp_path / "evidence", **_tables())
    evidence = Evidence.open(tmp_path / "evidence")
    (firing,) = evidence.read([4], "score", kinds=["firing"])
    (test,) = evidence.read([4], "score", splits=["test"])
    (sealed,) = evidence.read([4], "explain", splits=["test"])
    (none,) = evidence.read([4], "score", first=0)
    assert [w.id for w in firing.windows] == [9] and [w.id for w in test.windows] == [3]
    assert sealed.windows == () and none.windows == ()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ascending by 'window'"):
        write_evidence(tmp_path / "evidence", **{**_tables(), "windows": list(reversed(_tables()["windows"]))})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evidence_writing, "_write_arrays", full)
    with pytest.raises(UserError, match="No space left"):
        write_evidence(tmp_path / "evidence", **_tables())
    assert list(tmp_path.iterdir()) == []


def test_finished_evidence_is_replaced_only_on_request(tmp_path: Path) -> None:
    write_evidence(tmp_path / "evidence", **_tables())
    with pytest.raises(UserError, match="finished evidence already"):
        write_evidence(tmp_path / "evidence", **_tables())
    write_evidence(
        tmp_path / "evidence", **{**_tables(), "items": pa.table({"latent": pa.array([], pa.int32())})}, replace=True
    )
    (four,) = Evidence.open(tmp_path / "evidence").read([4], "score")
    assert four.windows == ()
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]
