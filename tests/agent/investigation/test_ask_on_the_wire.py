"""`exegete ask` with a language model, as a process of its own: whole on both wires, and killed at every node of its graph."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

import pytest
from asking import SUBJECT, Place, Warm, ran, warm
from language_model_server import Running, serving

import exegete
from exegete.agent.investigation.ledger import Ledger
from exegete.agent.investigation.record import InvestigationRecord, read_record

from .on_the_wire import ANSWER, FEW, QUESTION, SCRIPT, STEPS, timeless, write_files

KEY = "a-secret-that-is-nobody-elses"
CALLS = 1 + STEPS
"""Questions that the script answers: for the metric, and the decisions."""


@pytest.fixture(scope="module")
def process() -> Iterator[Warm]:
    with warm() as running:
        yield running


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Running) -> Running:
    running.reset()
    running.behave(answer="scripted", by_turn=True, replies=SCRIPT)
    return running


@dataclass(frozen=True)
class Work:
    """One investigation in a folder of its own."""

    process: Warm
    folder: Path
    agent: str
    where: Sequence[str] = ("--out", "out")

    @property
    def own(self) -> Path:
        """The investigation's folder."""
        (found,) = (self.folder / self.where[1]).glob("investigations/*")
        return found

    @property
    def report(self) -> str:
        return (self.own / "report.md").read_text()

    @property
    def record(self) -> InvestigationRecord:
        return read_record(self.own)

    def ended(self) -> set[str]:
        """Return the ids of the calls that are finished."""
        if not list((self.folder / "out").glob("investigations/*/ledger.sqlite")):
            return set()
        with Ledger(self.own) as ledger:
            return {one.result.call.id for one in ledger.calls()}

    def ask(self, place: Place | None = None, resume: bool = False) -> str:
        """Run it to its end, or to a place; return what was printed."""
        arguments = ["ask", "--resume", self.own.name, *self.where] if resume else self._question()
        ended = self.process.exegete(arguments, self.folder, place=place, environment={"EXEGETE_API_KEY": KEY})
        assert ended.status == (0 if place is None else -SIGKILL), (place, ended.status, ended.stderr[-3000:])
        return ended.stdout + ended.stderr

    def _question(self) -> list[str]:
        given = ["--prompts", "prompts.jsonl", "--texts", "texts.txt", "--controls", "2", *SUBJECT]
        return ["ask", QUESTION, *given, "--agent", self.agent, "--no-budget", *self.where]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_whole_investigation(
    process: Warm, server: Running, provider: str, labeled_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(labeled_store, tmp_path / "store")
    work = Work(process, write_files(tmp_path), server.spec(provider, "model"), ("--store", "store"))
    printed = work.ask()
    assert ANSWER in printed and "claim verified: It carries it." in printed
    record = work.record
    assert (record.status, record.answer, record.spent.steps, record.spent.calls) == (
        *("finished", ANSWER, STEPS, CALLS),
    )
    _check_report(work.report, (work.own / "report.html").read_text())
    _check_rows(tmp_path / "store")
    _check_what_it_was_told(server)
    _check_held_out_prompts_are_in_no_request(server, record)
    _check_no_key(tmp_path, printed)


def _check_report(text: str, page: str) -> None:
    for words in (
        *("**verified**: It carries it.", "**unverified**: Latent 3 does too.", "Check: it rests on no experiment."),
        *("**unverified**: So does latent 5.", "there is no E7", "E7 (no such experiment)"),
        *("ablate, ok; tests H1", "ablate, error; tests H1", "there is no latent 1000000", "As predicted: "),
    ):
        assert words in text, words
    assert "It carries it." in page and "unverified" in page


def _check_rows(store: Path) -> None:
    with exegete.connect(store) as connection:
        one = connection.execute(
            "SELECT status, answer, steps, calls, experiments, hits FROM investigations"
        ).fetchall()
        tried = connection.execute("SELECT place, status, hit FROM experiments ORDER BY place").fetchall()
        claims = connection.execute("SELECT statement, verdict FROM claims ORDER BY claim_id").fetchall()
    assert one == [("finished", ANSWER, STEPS, CALLS, 3, 2)]
    assert tried == [(1, "ok", True), (2, "ok", True), (3, "error", None)]
    assert claims == [
        *(("It carries it.", "verified"), ("Latent 3 does too.", "unverified"), ("So does latent 5.", "unverified")),
    ]


def _check_what_it_was_told(server: Running) -> None:
    bodies = [row["body"] for row in server.log(bodies=True)]
    assert server.counts()["by_status"] == {"200": CALLS}
    told = str(bodies[-1]["messages"])
    for words in (
        *("E1: the headline figure was as predicted.", "they are no JSON", "there is no tool 'ablaet'"),
        *("Did you mean 'ablate'?", "a whole number", "there is no latent 1000000", "say before it runs"),
        *("there is no hypothesis 'H9'", "called no tool", "The same call was made before, in E1"),
    ):
        assert words in told or words.replace("'", "\\'") in told, words
    assert all(len(body["tools"]) == len(bodies[1]["tools"]) > 20 for body in bodies[1:])


def _check_held_out_prompts_are_in_no_request(server: Running, record: InvestigationRecord) -> None:
    everything = str([row["body"] for row in server.log(bodies=True)])
    assert _middle(record.cases[0].prompt) in everything
    assert not [case.prompt for case in record.held_out if _middle(case.prompt) in everything]


def _middle(prompt: str) -> str:
    """A line that no two of these prompts share."""
    return next(line for line in prompt.splitlines() if "?" in line or len(line) > 20)


def _check_no_key(folder: Path, printed: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5 and KEY not in printed
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


NODES = ("frame", "approve", "think", "predict", "experiment", "update", "listen", "verify", "report")
WRITES = (
    *(Place("Ledger", "begin", "after"), Place("Ledger", "propose", "after"), Place("Ledger", "settle", "after")),
    *(Place("AsyncSqliteSaver", "aput", "before", 2), Place("AsyncSqliteSaver", "aput", "after", 1)),
    *(
        Place("RunJournal", "answered", "after"),
        Place("Ledger", "decide", "after"),
        Place("Ledger", "predict", "after"),
    ),
    *(Place("Ledger", "finish", "after"), Place("Toolbelt", "run", "before", 2), Place("Toolbelt", "run", "after")),
    *(Place("Ledger", "finish", "after", 2), Place("Ledger", "score", "after"), Place("Ledger", "judge", "before")),
    *(Place("Ledger", "judge", "after"), Place("Ledger", "end", "after"), Place("", "write_whole", "after")),
)
IN_FLIGHT = (Place("RunJournal", "intend", "after", 2), Place("RunJournal", "answered", "before"))
# Those of `predict` and `think` are at their second call: from there on nodes are of the decision that has experiments.
KILLS = {
    "before every node": [Place("Inquiry", node, "before", 1 + (node == "predict")) for node in NODES],
    "after every node": [Place("Inquiry", node, "after", 1 + (node == "think")) for node in NODES],
    "after what is written": WRITES,
    "while a call is in flight": IN_FLIGHT,
}


@pytest.fixture(scope="module")
def undisturbed(process: Warm, running: Running, tmp_path_factory: pytest.TempPathFactory) -> Work:
    running.reset()
    running.behave(answer="scripted", by_turn=True, replies=SCRIPT)
    work = Work(process, write_files(tmp_path_factory.mktemp("whole"), FEW), running.spec("openai", "model"))
    work.ask()
    assert running.counts()["questions"] == CALLS
    return work


@pytest.mark.parametrize("kills", KILLS)
def test_killed_again_and_again_it_ends_in_the_same_report(
    process: Warm, server: Running, undisturbed: Work, tmp_path: Path, kills: str
) -> None:
    work = Work(process, write_files(tmp_path, FEW), undisturbed.agent)
    for number, place in enumerate([*KILLS[kills], None]):
        ended, noted = work.ended(), len(ran(work.folder))
        # By its id, or by the same question: both go on.
        work.ask(place, resume=number > 0 and number % 2 == 0)
        assert not ended & set(ran(work.folder)[noted:]), place
    lost = KILLS[kills] is IN_FLIGHT
    counts = server.counts()
    assert (counts["questions"], counts["asked_again"]) == (CALLS, int(lost))
    assert set(ran(work.folder)) == set(ran(undisturbed.folder))
    if "node" in kills:
        assert len(ran(work.folder)) == len(ran(undisturbed.folder))
    if lost:
        # Neither is known to be unbilled.
        assert work.record.spent.calls == CALLS + 2
        return
    assert timeless(work.report) == timeless(undisturbed.report)
