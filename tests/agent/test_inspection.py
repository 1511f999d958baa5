from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exegete.agent.inspection import newest_config, status_lines, writer_pid
from exegete.tools.errors import UserError
from exegete.tools.store import Store

StoreMaker = Callable[..., str]


def test_a_finished_run_shows_its_progress_and_headline(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    text = "\n".join(status_lines(tmp_path / "store"))
    assert "no process is writing" in text and "toy: finished" in text
    assert "12 of 12 latents recorded (100%): 1 dead, 1 dense, 9 labeled, 1 rare" in text
    assert "floors: constant on 5 latents, shuffled on 5 latents, sibling on 5 latents (5 asked for)" in text
    assert "detection: mean balanced accuracy 0.683 [0.628, 0.739] (n = 9)" in text


def test_a_run_is_running_only_while_its_process_holds_the_lock(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(finish=False, floors=False, limit=6)
    assert any("toy: interrupted" in line for line in status_lines(tmp_path / "store"))
    with Store.open(tmp_path / "store").writer():
        text = "\n".join(status_lines(tmp_path / "store"))
    assert f"process {os.getpid()} is writing" in text and "toy: running" in text
    assert "6 of 6 latents recorded (100%): 6 labeled" in text and "floors: none yet (5 asked for)" in text
    assert "so far, detection: mean balanced accuracy 0.633" in text
    assert writer_pid(tmp_path / "store") is None


def test_a_killed_writer_is_not_taken_for_a_running_one(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(finish=False)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for left in (str(ended.pid), str(os.getpid()), "", "gibberish"):
        (tmp_path / "store" / "writer.lock").write_text(left)
        assert writer_pid(tmp_path / "store") is None
        assert any("toy: interrupted" in line for line in status_lines(tmp_path / "store"))


def test_a_store_where_nothing_was_published_has_a_status(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path / "store")
    assert "begin one with" in status_lines(tmp_path / "store")[1]
    with store.writer() as writer:
        assert status_lines(tmp_path / "store")[1] == "nothing was published yet"
        writer.publish()
    assert "begin one with" in status_lines(tmp_path / "store")[-1]
    with pytest.raises(UserError, match="is no store"):
        status_lines(tmp_path / "elsewhere")


def test_the_newest_configuration_is_that_of_the_run_begun_last(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store(name="first", seed=1)
    make_store(name="second", seed=2)
    assert newest_config(tmp_path / "store")["seed"] == 2
    make_store("empty", labeled=False)
    with pytest.raises(UserError, match="has no run yet"):
        newest_config(tmp_path / "empty")
