"""The activation pass on a local Ray cluster of two workers, held against the single process, bit for bit.

`.ci/ray` installs Ray and runs this file; it is skipped where Ray is not installed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray_jobs

pytest.importorskip("ray", reason="Ray is not installed: pip install 'exegete[ray]'")

from exegete.agent.config import RunConfig, load_config
from exegete.agent.gathering import Inputs, bundled_texts, load_inputs, open_corpus, slice_worker, slicer_of
from exegete.agent.progress import Lines
from exegete.tools.activations import Slicer, do_every_slice, run_pass
from exegete.tools.corpus import Corpus
from exegete.tools.errors import UserError
from exegete.tools.generation import generate
from exegete.tools.interventions import steer
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.merging import merge
from exegete.tools.ray_workers import WorkerPool, connected
from exegete.tools.store import Store
from exegete.tools.trial_workers import TrialPool
from exegete.tools.workers import Job, parse_workers

TWO = parse_workers("ray:2")
SETTINGS = (
    *("subject.name=bundled", "dictionary.path=bundled:tests", "corpus.source=bundled", "corpus.documents=1200"),
    *("evidence.firing=[10,4,20]", "evidence.top=[4,2,2]", "evidence.random=[10,4,20]", "evidence.hard=[4,2,4]"),
    *("evidence.workers=ray:2", "evidence.slices=6"),
)


@dataclass(frozen=True)
class Prepared:
    """What passes of these tests are over."""

    config: RunConfig
    inputs: Inputs
    store: Store
    corpus: Corpus
    folder: Path

    def slicer(self, name: str) -> Slicer:
        return slicer_of(self.config, self.store, self.corpus, self.folder / name, False, Lines(every_s=1e9))[0]

    def evidence(self, name: str, slicer: Slicer = do_every_slice) -> dict[str, str]:
        """Return file → digest of the evidence of a pass in a folder of its own."""
        subject, dictionary = self.inputs.subject, self.inputs.dictionary
        settings, working = self.config.evidence.settings(0), self.folder / name
        assert run_pass(subject, dictionary, self.corpus, working, settings, slicer=slicer)
        made = merge(working, self.folder / f"{name}-evidence", subject, dictionary, self.corpus, settings)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(made.folder.iterdir())}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(ray_jobs.__file__).parent))  # For the workers, which inherit it.
        with connected(TWO, Job(ray_jobs.doubling, ())):
            yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("ray")
    config = load_config(None, SETTINGS, {"store": str(folder / "store")})
    inputs = load_inputs(config, Lines(every_s=1e9))
    assert inputs is not None
    store = Store.create_or_open(folder / "store")
    corpus = open_corpus(config, store, inputs.subject, Lines(every_s=1e9))
    return Prepared(config, inputs, store, corpus, folder)


@pytest.fixture(scope="module")
def alone(prepared: Prepared) -> dict[str, str]:
    return prepared.evidence("alone")


def test_two_workers_give_the_evidence_of_one_process(cluster: None, prepared: Prepared, alone: dict[str, str]) -> None:
    assert prepared.evidence("two", prepared.slicer("two")) == alone
    assert not list((prepared.folder / "two").glob(".*"))


def test_so_they_do_when_one_is_killed_in_its_slice(cluster: None, prepared: Prepared, alone: dict[str, str]) -> None:
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        """SIGKILL the first worker that is seen to write a slice."""
        while not done.wait(0.002):
            for path in (prepared.folder / "killed").glob(".slice-*.writing"):
                killed.append(int(path.name.split(".")[-3]))
                os.kill(killed[0], signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = prepared.evidence("killed", prepared.slicer("killed"))
    finally:
        done.set()
        killer.join()
    assert killed and killed[0] != os.getpid()
    assert found == alone
    assert not list((prepared.folder / "killed").glob(".*"))


def pool(marks: Path) -> WorkerPool:
    return WorkerPool(TWO, Job(ray_jobs.doubling, (str(marks),), what="number"))


def test_the_task_of_a_lost_worker_is_done_by_another(cluster: None, tmp_path: Path) -> None:
    with pool(tmp_path) as workers:
        assert dict(workers.results([1, 2, 3, 4, 5])) == {0: 2, 1: 4, 2: 6, 3: 8, 4: 10}
        assert dict(workers.results([6])) == {0: 12}
    assert (tmp_path / "killed").exists()


def test_a_task_that_kills_every_worker_ends_with_its_cause(cluster: None, tmp_path: Path) -> None:
    with (
        pool(tmp_path) as workers,
        pytest.raises(UserError, match=r"number 7 failed on 3 workers of 'ray:2'.*ActorDied"),
    ):
        list(workers.results([7]))


def test_a_bug_is_tried_again_and_quoted(cluster: None, tmp_path: Path) -> None:
    with pool(tmp_path) as workers, pytest.raises(UserError, match="ZeroDivisionError: eleven by zero"):
        list(workers.results([11]))


def test_what_the_user_can_mend_is_not_tried_again(cluster: None, tmp_path: Path) -> None:
    with pool(tmp_path) as workers:
        with pytest.raises(UserError, match=r"^nine is no number$"):
            list(workers.results([9]))
        assert len(workers.pids) <= 2


def test_asked_to_stop_nothing_new_is_begun(cluster: None, tmp_path: Path) -> None:
    with pool(tmp_path) as workers:
        found: list[tuple[int, int]] = []
        for number, result in workers.results(list(range(20, 60)), lambda: len(found) >= 2):
            found.append((number, result))
    assert 2 <= len(found) <= 4
    assert len(list(tmp_path.iterdir())) == len(found)


def test_trials_on_workers_give_what_one_live_model_gives_though_one_is_lost(
    cluster: None, prepared: Prepared, tmp_path: Path
) -> None:
    subject, dictionary = prepared.inputs.subject, prepared.inputs.dictionary
    model = LiveModel(subject, [dictionary], batch_tokens=200)
    texts = list(bundled_texts(5, 12))
    trials = [
        Trial(model.tokens(text)[: 20 + 3 * number], steer(dictionary.fingerprint, [number], strength))
        for number, text in enumerate(texts)
        for strength in (0.0, 4.0, 16.0)
    ]
    read = ray_jobs.LastLogits(tmp_path, os.getpid())
    expected, written = model.run(trials, read), generate(model, trials[:8], 5, seed=3)
    assert not (tmp_path / "killed").exists()
    # One at a time: loading a third would take longer than all the rest.
    with TrialPool(TWO, model, ray_jobs.bundled_model, (), most=1) as workers:
        found = workers.run(trials, read)
        again = workers.generate(trials[:8], 5, seed=3)
        with pytest.raises(UserError, match="has no latent 99999"):
            workers.run([Trial(trials[0].tokens, steer(dictionary.fingerprint, [99999], 1.0))], read)
    assert (tmp_path / "killed").exists()
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert again == written


def test_a_store_that_workers_do_not_see_is_named(prepared: Prepared, tmp_path: Path) -> None:
    places = (prepared.config.model_dump(mode="json"), str(tmp_path), str(prepared.corpus.folder), str(tmp_path))
    with pytest.raises(UserError, match=r"does not see the files of this process in .*--store"):
        slice_worker(*places, False, ".token-1 content")
