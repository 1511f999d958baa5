"""Slices done by processes of their own, without Ray: the folder that they share is all they have in common."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from exegete.agent import gathering
from exegete.agent.cli import app
from exegete.agent.config import RunConfig, load_config
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.agent.slices_cli import do_slices, prepare_slices
from exegete.tools.activations import computing_with, do_slice, prepare_pass
from exegete.tools.corpus import Corpus
from exegete.tools.errors import UserError
from exegete.tools.parts import is_complete, whole_folder
from exegete.tools.store import Store
from exegete.tools.workers import Workers, parse_workers, require_shared, shared_token

CONFIG = """
seed = 3
[subject]
name = "bundled"
[dictionary]
path = "bundled:tests"
[corpus]
source = "bundled"
documents = 400
[evidence]
firing = [10, 2, 20]
top = [4, 2, 2]
random = [10, 2, 20]
hard = [4, 2, 4]
[label]
limit = 4
floors = 0
evaluators = ["detection"]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration; what runs in this process shares the subject and the dictionary."""
    path = tmp_path_factory.mktemp("slices") / "night.toml"
    path.write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "open_subject", cache(gathering.open_subject))
        patch.setattr(gathering, "open_dictionary", cache(gathering.open_dictionary))
        yield path


def of(file: Path, store: Path, *assignments: str) -> RunConfig:
    return load_config(file, assignments, {"store": str(store)})


def evidence(store: Path) -> dict[str, str]:
    [folder] = (store / "evidence").iterdir()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def quiet() -> Lines:
    return Lines(every_s=1e9)


def test_three_processes_then_label_give_the_evidence_of_one_process(file: Path, tmp_path: Path) -> None:
    run(of(file, tmp_path / "alone"), quiet())
    apart = tmp_path / "apart"
    [(name, slices)] = prepare_slices(of(file, apart), quiet(), at_least=5)
    assert (name, slices) == ("bundled:tests", 5)
    children = [_fork(of(file, apart), index, 3) for index in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    [working] = (apart / "passes").iterdir()
    parts = sorted(working.glob("slice-*"))
    assert len(parts) == 5 and all(map(is_complete, parts))
    made = {part: part.stat().st_mtime_ns for part in parts}
    assert run(of(file, apart), quiet()).finished
    assert {part: part.stat().st_mtime_ns for part in parts} == made
    assert evidence(apart) == evidence(tmp_path / "alone")


def _fork(config: RunConfig, index: int, count: int) -> int:
    """Do a share of the slices in a process of its own."""
    child = os.fork()
    if not child:
        try:
            [done] = do_slices(config, index, count, quiet())
            os._exit(0 if done.here == (2, 2, 1)[index] else 1)
        finally:
            os._exit(2)
    return child


def test_the_command_prepares_and_does(file: Path, tmp_path: Path) -> None:
    given = ["slice", str(file), "--store", str(tmp_path), "--set", "corpus.documents=40"]
    lines = [
        CliRunner().invoke(app, [*given, *more]).stdout
        for more in (["--prepare", "--of", "3"], ["--index", "2", "--of", "3"], ["--index", "0", "--of", "2"])
    ]
    assert lines == [
        f"bundled:tests: 3 slices; do them with `exegete slice {file} --index I --of N`\n",
        "bundled:tests: 1 slices done here; 1 of 3 are complete\n",
        "bundled:tests: 1 slices done here; 2 of 3 are complete\n",
    ]
    with pytest.raises(UserError, match="give --prepare, or --index I --of N"):
        CliRunner().invoke(app, given, catch_exceptions=False)


def test_slices_that_are_done_are_not_done_again(file: Path, tmp_path: Path) -> None:
    config = of(file, tmp_path, "evidence.slices=2", "label.random_control=5", "corpus.documents=40")
    assert [slices for _, slices in prepare_slices(config, quiet())] == [2, 2]
    assert [(done.here, done.complete) for done in do_slices(config, 1, 2, quiet())] == [(1, 1), (1, 1)]
    assert [(done.here, done.complete) for done in do_slices(config, 0, 1, quiet())] == [(1, 2), (1, 2)]
    assert [done.name for done in do_slices(config, 0, 1, quiet())] == [
        "bundled:tests",
        "random control of bundled:tests",
    ]


def test_a_pass_is_taken_up_as_it_was_begun(file: Path, tmp_path: Path) -> None:
    config = of(file, tmp_path, "corpus.documents=40")
    prepare_slices(config, quiet(), at_least=3)
    inputs, store = gathering.load_inputs(config, quiet()), Store.open(tmp_path)
    assert inputs is not None
    corpus = Corpus.open(gathering.corpus_folder(config, store, inputs.subject))
    folder = gathering.pass_folder(config, inputs, corpus, store)
    given = (inputs.subject, inputs.dictionary, corpus, folder, config.evidence.settings(config.seed))
    with computing_with(2):
        taken = prepare_pass(*given, begin=False, slices_at_least=2)
        assert (len(taken.slices), taken.threads) == (3, 1)
        seen: list[int] = []
        do_slice(taken, 0, lambda micro_batches: seen.append(torch.get_num_threads()))
        assert set(seen) == {1} and torch.get_num_threads() == 2
    with pytest.raises(UserError, match="holds no activation pass"):
        prepare_pass(*given[:3], tmp_path / "elsewhere", given[4], begin=False)


def test_a_worker_makes_itself_ready_for_the_control_too(file: Path, tmp_path: Path) -> None:
    config = of(file, tmp_path, "corpus.documents=40", "label.random_control=5", "evidence.slices=2")
    prepare_slices(config, quiet())
    inputs, store = gathering.load_inputs(config, quiet()), Store.open(tmp_path)
    assert inputs is not None
    corpus = Corpus.open(gathering.corpus_folder(config, store, inputs.subject))
    for control in (False, True):
        given = gathering.random_inputs(config, inputs, store, corpus)[0] if control else inputs
        folder = gathering.pass_folder(config, given, corpus, store)
        places = (config.model_dump(mode="json"), str(store.folder), str(corpus.folder), str(folder), control)
        with shared_token(folder) as token:
            work = gathering.slice_worker(*places, token)
        assert [work(1), work(1)] == [True, False]
        assert [part.name for part in folder.glob("slice-*")] == ["slice-00001-of-00002"]


def test_what_is_not_prepared_is_said(file: Path, tmp_path: Path) -> None:
    config = of(file, tmp_path, "corpus.documents=40")
    with pytest.raises(UserError, match="is no store"):
        do_slices(config, 0, 1, quiet())
    prepare_slices(config, quiet())
    with pytest.raises(UserError, match=r"no pass of this configuration is prepared .*--prepare"):
        do_slices(of(file, tmp_path, "corpus.documents=40", "evidence.top=[1,1,1]"), 0, 1, quiet())
    with pytest.raises(UserError, match=r"--index 3 --of 3: the index must be at least 0 and below 3"):
        do_slices(config, 3, 3, quiet())


def test_of_two_that_do_the_same_the_first_stays(tmp_path: Path) -> None:
    part = tmp_path / "slice-00000-of-00001"
    with whole_folder(part) as slow:
        (slow / "a").write_text("slow")
        with whole_folder(part) as fast:
            (fast / "a").write_text("fast")
        assert is_complete(part)
    assert (part / "a").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == [part.name]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    part = tmp_path / "slice-00000-of-00001"
    child = os.fork()
    if not child:
        with whole_folder(part) as temporary:
            (temporary / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    [left] = tmp_path.iterdir()
    assert str(child) in left.name and (left / "half").exists()
    with whole_folder(part) as mine:
        assert not left.exists()
        with whole_folder(tmp_path / "slice-00000-of-00001"):
            assert mine.exists()


def test_a_folder_that_is_in_the_way_is_not_taken_for_a_part(tmp_path: Path) -> None:
    part = tmp_path / "slice-00000-of-00001"
    part.mkdir()
    (part / "stranger").touch()
    with pytest.raises(UserError, match="cannot write"), whole_folder(part) as temporary:
        (temporary / "a").touch()


def test_shared_storage_is_checked(tmp_path: Path) -> None:
    with shared_token(tmp_path) as token:
        require_shared(tmp_path, token)
        with pytest.raises(UserError, match=r"does not see the files of this process in .*elsewhere"):
            require_shared(tmp_path / "elsewhere", token)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("ray", Workers("ray")),
        ("ray:12", Workers("ray:12", count=12)),
        ("ray://head.cluster:10001", Workers("ray://head.cluster:10001", address="ray://head.cluster:10001")),
        ("ray://[::1]:10001", Workers("ray://[::1]:10001", address="ray://[::1]:10001")),
    ],
)
def test_workers_are_understood(spec: str, expected: Workers) -> None:
    assert parse_workers(spec) == expected


@pytest.mark.parametrize("spec", ["", "ray:", "ray:0", "ray:two", "ray://host", "ray://:10001", "dask", "ray:1 "])
def test_workers_that_are_none_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"workers '.*': expected ray, ray:2"):
        parse_workers(spec)


def test_without_ray_the_way_out_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'exegete\[ray\]'"):
        run(of(file, tmp_path / "store", "evidence.workers=ray"), quiet())
    assert not (tmp_path / "store").exists()
