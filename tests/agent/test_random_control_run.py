"""A run that holds its types against a random-weight dictionary: the bundled subject, a small corpus, few latents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_model_server import serving
from planted_store import tables

import exegete
from exegete.agent import gathering
from exegete.agent import stages as running
from exegete.agent.config import RunConfig, load_config
from exegete.agent.engine import label_latents
from exegete.agent.identity import identity
from exegete.agent.inspection import status_lines
from exegete.agent.latent_cards import choose_dictionary
from exegete.agent.models import Halted
from exegete.agent.planning import plan
from exegete.agent.progress import Lines
from exegete.agent.random_weight import control_latents
from exegete.agent.report import write_report
from exegete.agent.run import Outcome, run
from exegete.agent.summary import headline
from exegete.agent.typed import too_few, typed_latents
from exegete.agent.workbench import check_workbench
from exegete.evaluators.typing import Scored, types
from exegete.tools import activations, random_control
from exegete.tools.errors import UserError
from exegete.tools.store.results import Figures

CONTROL = 24
INPUTS = ("subject.name=bundled", "dictionary.path=bundled:tests", "corpus.source=bundled")
SETTINGS = (
    *(*INPUTS, "corpus.documents=400"),
    *("evidence.firing=[10,2,20]", "evidence.top=[4,2,2]", "evidence.random=[10,2,20]", "evidence.hard=[4,2,4]"),
    *("label.limit=24", "label.floors=20", 'label.evaluators=["detection"]', f"label.random_control={CONTROL}"),
)
VIEWS = ("latents", "explanations", "scores", "best_explanations", "verdicts", "examples", "neighbours", "dictionaries")


def config(store: Path, *assignments: str) -> RunConfig:
    return load_config(None, (*SETTINGS, *assignments), {"store": str(store)})


def label(store: Path, *assignments: str) -> Outcome:
    return run(config(store, *assignments), Lines(every_s=1e9))


def rows(store: Path, query: str) -> list[Any]:
    with exegete.connect(store) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[None]:
    """Have all runs of this file share the subject and the dictionary: loading them takes longer than labeling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "open_subject", cache(gathering.open_subject))
        patch.setattr(gathering, "open_dictionary", cache(gathering.open_dictionary))
        yield


@pytest.fixture(scope="module")
def labeled(loaded_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    store = tmp_path_factory.mktemp("stores") / "store"
    return store, label(store)


@pytest.fixture(scope="module")
def store(labeled: tuple[Path, Outcome]) -> Path:
    return labeled[0]


def test_the_control_is_in_no_view_that_users_ask_for_labels(store: Path) -> None:
    [(own,)] = rows(store, "SELECT DISTINCT dictionary FROM random_controls")
    for view in VIEWS:
        assert rows(store, f"SELECT DISTINCT dictionary FROM {view}") == [(own,)], view
    [(controls, latents)] = rows(store, "SELECT count(DISTINCT control), count(DISTINCT latent) FROM random_controls")
    assert (controls, latents) == (1, CONTROL)
    with exegete.connect(store) as connection:
        assert choose_dictionary(connection, None) == own
    page = write_report(store, store / "report.html").read_text()
    assert "random control of" not in page
    assert "random control</td>" in page  # Its figures stand beside the floors.


def test_runs_and_status_name_it(store: Path) -> None:
    [(own, control)] = rows(store, "SELECT DISTINCT dictionary, control FROM random_controls")
    assert rows(store, "SELECT dictionary, status, control_of FROM runs ORDER BY started_at") == [
        (control, "finished", own),
        (own, "finished", None),
    ]
    lines = status_lines(store)
    at = lines.index("random control of bundled:tests: finished")
    assert f"  {CONTROL} of {CONTROL} latents recorded (100%): {CONTROL} labeled" in lines[at:]
    assert not any("floors" in line for line in lines[at:]) and "bundled:tests: finished" in lines[:at]


def test_types_are_those_of_both_bars(store: Path) -> None:
    query = "SELECT latent, value, low FROM scores WHERE metric = 'balanced_accuracy' AND value IS NOT NULL AND baseline IS "
    scores = {"detection": [Scored(*row) for row in rows(store, f"{query} NULL ORDER BY latent")]}
    shuffled = {"detection": [value for _, value, _ in rows(store, f"{query} NOT NULL AND baseline = 'shuffled'")]}
    found = rows(store, "SELECT value FROM random_controls WHERE metric = 'balanced_accuracy'")
    control = {"detection": [value for (value,) in found]}
    stored = dict(rows(store, "SELECT latent, typed FROM latents WHERE typed IS NOT NULL AND outcome = 'labeled'"))
    assert stored == types(scores, shuffled, controls=[control])
    # Of 24 scores the bar at 0.95 is the ⌈0.95 · 25⌉ = 24th: whatever is explained beats every random direction.
    explained = {latent for latent, typed in stored.items() if typed != "unexplained"}
    assert all(row.low > max(control["detection"]) for row in scores["detection"] if row.latent in explained)
    by_shuffled = {latent for latent, typed in types(scores, shuffled).items() if typed != "unexplained"}
    assert explained < by_shuffled


def test_without_it_the_scores_are_the_same_and_more_is_explained(
    store: Path, labeled: tuple[Path, Outcome], tmp_path: Path
) -> None:
    [figures] = labeled[1].figures.values()
    copy = shutil.copytree(store, tmp_path / "copy")
    [without] = label(copy, "label.random_control=0").figures.values()
    assert without["types"]["input"] > figures["types"].get("input", 0)
    assert "random_control" not in without["evaluators"]["detection"]["floors"]
    assert (
        without["evaluators"]["detection"]["balanced_accuracy"]
        == figures["evaluators"]["detection"]["balanced_accuracy"]
    )
    assert tables(copy)["explanations"] == tables(store)["explanations"]


def test_the_summary_has_the_control_beside_the_floors(store: Path, labeled: tuple[Path, Outcome]) -> None:
    [figures] = labeled[1].figures.values()
    floor = figures["evaluators"]["detection"]["floors"]["random_control"]
    query = "SELECT value FROM random_controls WHERE metric = 'balanced_accuracy'"
    mean = np.mean([value for (value,) in rows(store, query)])
    own = figures["evaluators"]["detection"]["balanced_accuracy"]
    assert floor["balanced_accuracy"]["n"] == CONTROL
    assert floor["balanced_accuracy"]["value"] == pytest.approx(mean)
    assert floor["above"]["value"] == pytest.approx(own["value"] - mean) and floor["above"]["n"] == own["n"]
    assert floor["above"]["low"] < floor["above"]["value"] < floor["above"]["high"]
    assert any(line.startswith(f"  random control {mean:.3f} [") for line in headline(figures))


def test_doing_it_again_reads_nothing_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables(store), rows(store, "SELECT * FROM random_controls ORDER BY ALL")
    monkeypatch.setattr(activations, "run_pass", lambda *_, **__: pytest.fail("a second pass"))
    monkeypatch.setattr(random_control, "calibrate", lambda *_: pytest.fail("calibrated again"))
    label(store)
    assert (tables(store), rows(store, "SELECT * FROM random_controls ORDER BY ALL")) == before


def test_a_run_that_is_stopped_among_the_control_goes_on(store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked = 0

    @contextmanager
    def stopping(progress: object) -> Iterator[Any]:
        yield lambda: asked > 7

    real = label_latents

    async def counting(source: Any, graph: Any, bench: Any, concurrency: int, batch: Any, stop: Any) -> bool:
        def counted() -> bool:
            nonlocal asked
            asked += 1
            return bool(stop())

        return await real(source, graph, bench, 2, batch, counted)

    undisturbed, stopped = (shutil.copytree(store, tmp_path / name) for name in ("undisturbed", "stopped"))
    others = "SELECT DISTINCT latent FROM random_controls JOIN runs USING (run) WHERE config->>'$.label.explainer' = 'token_list'"
    with monkeypatch.context() as patch:
        patch.setattr("exegete.agent.run.stop_on_interrupt", stopping)
        patch.setattr(running, "label_latents", counting)
        assert not label(stopped, "label.explainer=token_list").finished
    assert len(rows(stopped, others)) == 7
    assert rows(stopped, "SELECT control_of IS NOT NULL FROM runs WHERE status = 'interrupted'") == [(True,)]
    for folder in (stopped, undisturbed):
        assert label(folder, "label.explainer=token_list").finished
    assert len(rows(stopped, others)) == CONTROL and tables(stopped) == tables(undisturbed)
    query = "SELECT * FROM random_controls ORDER BY ALL"
    assert rows(stopped, query) == rows(undisturbed, query)


def test_evidence_of_a_control_is_never_labeled_for_its_own_sake(store: Path, tmp_path: Path) -> None:
    """A call without [subject] labels all evidence in the store, which a control's is no part of."""
    copy = shutil.copytree(store, tmp_path / "copy")
    outcome = run(load_config(None, ["label.limit=2"], {"store": str(copy)}), Lines(every_s=1e9))
    assert list(outcome.figures) == [rows(store, "SELECT DISTINCT dictionary FROM random_controls")[0][0]]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ((*INPUTS, "label.random_control=30"), "30 is too few for a bar that detection and fuzzing hold.*at least 39"),
        ((*INPUTS, 'label.evaluators=["detection"]', "label.random_control=18"), "at least 19, better 100"),
        ((*INPUTS, 'label.evaluators=["embedding"]', "label.random_control=100", "models.embedder=x"), "is for typing"),
        (("label.random_control=100",), r"needs \[subject\], \[dictionary\] and \[corpus\]"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    assignments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "open_subject", lambda *_: pytest.fail("loaded"))
    wanted = load_config(None, assignments, {"store": str(tmp_path / "store")})
    with pytest.raises(UserError, match=message):
        check_workbench(wanted)
    with pytest.raises(UserError, match=message):
        run(wanted, Lines())
    assert not (tmp_path / "store").exists()


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"label.random_control = -1"):
        load_config(None, ["label.random_control=-1"])


def test_a_plan_names_the_control(tmp_path: Path) -> None:
    assert any("read twice (random control)" in line for line in plan(config(tmp_path)))
    assert not any("random control" in line for line in plan(config(tmp_path, "label.random_control=0")))


def test_the_identity_of_a_run_contains_it(tmp_path: Path) -> None:
    with_it, without = config(tmp_path), config(tmp_path, "label.random_control=0")
    assert identity(with_it)["label"]["random_control"] == CONTROL and identity(with_it) != identity(without)
    # How many latents and floors the dictionary itself gets, the control's own results do not depend on.
    more = config(tmp_path, "label.limit=200", "label.floors=50")
    assert identity(with_it, control=True) == identity(more, control=True) != identity(without, control=True)
    assert identity(with_it) != identity(more)


class Stored:
    """Results of two latents, one of them dead, on one evaluator."""

    def figures(self, evaluator: str, metric: str) -> Figures:
        return Figures(np.array([1, 2]), np.array([0.9, 0.9]), np.array([0.8, 0.8]))

    def floor_figures(self, evaluator: str, metric: str) -> dict[str, Figures]:
        return {"shuffled": Figures(np.arange(20), np.full(20, 0.5), np.full(20, 0.4))}


def test_a_status_is_the_type_whatever_a_score_says() -> None:
    stored: Any = Stored()
    metrics = {"detection": "balanced_accuracy"}
    silent = {"dead": np.array([2]), "rare": np.array([3]), "dense": np.array([4]), "none": np.zeros(0, dtype=np.int64)}
    expected = {1: "input", 2: "dead", 3: "rare", 4: "dense"}
    assert typed_latents(stored, metrics, silent).as_dict() == expected
    control = {"detection": [0.85] * 19}
    assert typed_latents(stored, metrics, silent, control).as_dict() == {**expected, 1: "unexplained"}


def test_an_evaluator_whose_control_has_too_few_scores_decides_nothing() -> None:
    stored: Any = Stored()
    few = {"detection": [0.1] * 18}
    assert too_few(few) == ["detection"] and too_few({"detection": [0.1] * 19}) == []
    assert too_few({"detection": [0.1] * 39, "fuzzing": [0.1] * 38, "embedding": []}) == ["fuzzing"]
    metrics = {"detection": "balanced_accuracy"}
    assert typed_latents(stored, metrics, {}, few).as_dict() == {1: "unexplained", 2: "unexplained"}
    enough = {"detection": [0.1] * 19}
    assert typed_latents(stored, metrics, {}, enough).as_dict() == {1: "input", 2: "input"}


def test_a_control_takes_live_latents(tmp_path: Path) -> None:
    class Sparse:
        dictionary = "sha256:toy"

        def __init__(self, live: int) -> None:
            self.latents = np.arange(200)
            self.live = self.latents[(self.latents % 2 == 1) & (self.latents < 2 * live)]

        def densities(self) -> Any:
            return np.array([0.001 * latent for latent in range(200)])

    def chosen(live: int, like: Any) -> list[int]:
        return control_latents(config(tmp_path), Sparse(live), like)  # type: ignore[arg-type]

    any_rate, often = Sparse(60), Sparse(60)
    often.live = np.arange(60, 84)
    assert len(chosen(60, any_rate)) == CONTROL and all(latent % 2 for latent in chosen(60, any_rate))
    assert chosen(60, any_rate) == sorted(set(chosen(60, any_rate)))
    # Rates of 0.060 … 0.083: the twelve odd latents there, and twelve more from around.
    found = chosen(60, often)
    assert set(range(61, 84, 2)) <= set(found) and min(found) > 40 and max(found) < 110
    assert len(chosen(20, any_rate)) == 20
    with pytest.raises(UserError, match=r"only 18 of 200 latents.*takes 19: read more text"):
        chosen(18, any_rate)


def test_figures_of_a_control_are_stored_with_its_run(store: Path) -> None:
    [(text,)] = rows(store, "SELECT figures FROM runs WHERE control_of IS NOT NULL")
    figures = json.loads(text)
    assert figures["outcomes"] == {"labeled": CONTROL} and figures["evaluators"]["detection"]["floors"] == {}


def test_one_budget_pays_for_both(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what the control costs ends the run there; what the whole costs, and nothing more, is enough to finish it."""
    monkeypatch.setenv("EXEGETE_API_KEY", "test-key")
    folder = shutil.copytree(store, tmp_path / "copy")
    with serving(answer="oracle", otherwise="never") as server:
        judge = f"openai:judge@{server.openai_url}"
        prices = tmp_path / "prices.toml"
        prices.write_text(f'["{judge}"]\ninput = 10.0\noutput = 10.0\n')
        settings = [f"models.judge={judge}", f"models.prices={prices}", "label.judge_options.max_tokens=100"]
        settings += ["label.limit=3", "label.floors=0", "label.random_control=19"]
        undisturbed = shutil.copytree(store, tmp_path / "undisturbed")
        label(undisturbed, *settings, "models.no_budget=true")
        query = "SELECT control_of IS NULL, usd FROM costs JOIN runs USING (run) WHERE calls > 0 ORDER BY 1"
        [(_, control), (_, own)] = rows(undisturbed, query)
        assert control > own > 0
        server.reset_log()
        with pytest.raises(Halted, match="resume with a larger --budget"):
            label(folder, *settings, f"models.budget_usd={control / 2}")
        [(_, spent)] = rows(folder, query)
        assert 0 < spent <= control / 2
        with pytest.raises(Halted, match="resume with a larger --budget"):
            label(folder, *settings, f"models.budget_usd={control + own / 2}")
        assert label(folder, *settings, f"models.budget_usd={(control + own) * 1.5}").finished
        assert server.counts()["asked_again"] == 0
    assert rows(folder, query) == [(False, pytest.approx(control)), (True, pytest.approx(own))]
