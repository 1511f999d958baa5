"""`exegete ask`, through the command line, on the bundled subject, with an investigator of two decisions."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from exegete.agent.ask_cli import Terminal
from exegete.agent.cli import app
from exegete.agent.interrupts import stop_on_interrupt
from exegete.agent.investigation import investigate as investigating
from exegete.agent.investigation import recipe
from exegete.agent.investigation.contract import Call, Case, Claim, Decision, Hypothesis, Metric, Question, View
from exegete.agent.investigation.inquiry import Interrupted
from exegete.agent.live import Live, Wanted, open_live
from exegete.agent.progress import Quiet
from exegete.tools.errors import UserError

QUESTION = "Why does the model answer with DESC here?"
ASK = ("ask", QUESTION, "--answer", " DESC", "--other", " ASC", "--controls", "2")


class Quick:
    """Takes one latent out, and says so."""

    name = "recipe"

    async def frame(self, question: Question) -> Metric:
        """Return the question's metric."""
        return question.metric or Metric("log_odds")

    async def decide(self, view: View) -> Decision:
        """Decide."""
        if not view.results:
            foretold = {"hypothesis": "H1", "because": "it is on here", "high": 0.0}
            call = Call("1", "ablate", {"latents": [244], **foretold})
            return Decision((call,), (Hypothesis("H1", "latent 244 carries it"),))
        if len(view.notes) > 0:
            return Decision((Call("2", "prompts", {"count": 1}),))
        claim = Claim("latent 244 is on where it says descending", "correlational", (244,), experiments=("E1",))
        return Decision(claims=(claim,), answer="Latent 244.", done=True)


@pytest.fixture(scope="module")
def live() -> Live:
    return open_live(Wanted())


@pytest.fixture(autouse=True)
def quick(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(investigating, "open_live", lambda wanted: live)
    monkeypatch.setattr(recipe, "Recipe", Quick)


@pytest.fixture
def prompts(tmp_path: Path, cases: tuple[Case, ...]) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(asdict(case))}\n" for case in cases))
    return path


def asked(*arguments: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def test_a_question_is_answered_with_its_claims_and_a_report(prompts: Path, tmp_path: Path) -> None:
    result = asked(*ASK, "--prompts", prompts, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "H1: latent 244 carries it" in result.stderr
    assert re.search(r"E1 ablate: .* -?\d.* \[.*\], n = 12; beside .*; as predicted", result.stderr)
    assert "investigation: 2 of 40 steps" in result.stderr
    assert "Latent 244." in result.stdout and "claim correlational: latent 244 is on" in result.stdout
    (report,) = tmp_path.glob("investigations/*/report.html")
    assert f"report: {report}" in result.stdout and QUESTION in report.read_text()
    assert report.parent.name.startswith("why-does-the-model-answer-with-desc-here-")
    assert re.search(r"1 of 1 predictions held; 2 steps, [\d,]+ forward passes", result.stdout)


def test_asked_again_it_is_finished_and_json_is_the_record(prompts: Path, tmp_path: Path) -> None:
    first, second = (
        json.loads(asked(*ASK, "--prompts", prompts, "--out", tmp_path, "--format", "json").stdout) for _ in range(2)
    )
    assert first == second and first["status"] == "finished" and first["finished_at"]
    assert len(first["cases"]) == 12 and len(first["held_out"]) == 8 and len(first["texts"]) == 200
    again = asked("ask", "--resume", first["id"], "--out", tmp_path, "--format", "json")
    assert json.loads(again.stdout) == first
    other = json.loads(asked(*ASK, "--prompts", prompts, "--out", tmp_path, "--seed", "1", "--format", "json").stdout)
    assert other["id"] != first["id"]


def test_it_stops_and_goes_on(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def stopping(progress: object) -> Iterator[Callable[[], bool]]:
        yield lambda: bool(list(tmp_path.glob("investigations/*/ledger.sqlite")))

    monkeypatch.setattr("exegete.agent.interrupts.stop_on_interrupt", stopping)
    result = asked(*ASK, "--prompts", prompts, "--out", tmp_path)
    assert result.exit_code == 130
    (found,) = re.findall(r"Go on: exegete (ask --resume \S+ --out \S+)", result.stdout)
    monkeypatch.undo()
    monkeypatch.setattr(recipe, "Recipe", Quick)
    result = asked(*found.split())
    assert result.exit_code == 0 and "Latent 244." in result.stdout


def test_a_person_confirms_and_says_something(prompts: Path, tmp_path: Path) -> None:
    said = 'what?\nlog_probability " DESC"\nlook at the prompts\n\n'
    result = asked(*ASK, "--prompts", prompts, "--out", tmp_path, "--interactive", "--format", "json", input=said)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout[result.stdout.index("{\n") :])  # After what was typed.
    assert record["metric"]["kind"] == "log_probability" and record["notes"] == ["look at the prompts"]
    assert record["lookups"] == {"prompts": 1} and record["answer"] == "Latent 244."
    assert "'what?' is no metric" in result.stderr


def test_ctrl_c_ends_the_waiting_for_a_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Typing:
        """Somebody who presses Ctrl-C before enter."""

        def readline(self) -> str:
            os.kill(os.getpid(), signal.SIGINT)
            return "a remark that was never sent\n"

    monkeypatch.setattr("sys.stdin", Typing())
    with stop_on_interrupt(Quiet()):
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(Interrupted):
            Terminal().between(2, [])
        assert signal.getsignal(signal.SIGINT) is handler


def test_whoever_stops_at_a_prompt_is_told_how_to_go_on(prompts: Path, tmp_path: Path) -> None:
    # The input ends after the metric is confirmed.
    result = asked(*ASK, "--prompts", prompts, "--out", tmp_path, "--interactive", input="\n")
    assert result.exit_code == 130 and not isinstance(result.exception, UserError)
    (found,) = re.findall(r"Go on: exegete (ask --resume \S+ --out \S+)", result.stdout)
    assert "Latent 244." in asked(*found.split()).stdout


def test_the_budget_is_said_and_more_of_it_goes_on(prompts: Path, tmp_path: Path) -> None:
    result = asked(*ASK, "--prompts", prompts, "--out", tmp_path, "--steps", "1")
    assert result.exit_code == 0 and "ended early: its 1 steps are used" in result.stdout
    (folder,) = tmp_path.glob("investigations/*")
    assert "ended early" in asked("ask", "--resume", folder).stdout
    more = asked("ask", "--resume", folder, "--steps", "5")
    assert "Latent 244." in more.stdout and "ended early" not in more.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", QUESTION, "--prompts", "missing.jsonl"), "cannot read 'missing.jsonl'"),
        (("ask", QUESTION), "give a question and its prompts"),
        (("ask", " ", "--prompts", "{prompts}"), "the question is empty"),
        (("ask", QUESTION, "--prompts", "{few}"), "give 20 or more"),
        ((*ASK, "--prompts", "{prompts}", "--agent", "recpie"), "Did you mean 'recipe'"),
        ((*ASK, "--prompts", "{prompts}", "--agent", "antropic:x"), "antropic"),
        ((*ASK, "--prompts", "{prompts}", "--agent", "hf:model"), "expected anthropic:MODEL"),
        ((*ASK, "--prompts", "{prompts}", "--agent", "anthropic:claude-haiku-4-5"), "ANTHROPIC_API_KEY"),
        ((*ASK, "--prompts", "{prompts}", "--passes", "0"), "passes = 0"),
        ((*ASK, "--prompts", "{prompts}", "--passes", "5"), "give more with --passes"),
        (("ask", QUESTION, "--prompts", "{prompts}", "--other", "x"), "give --answer as well"),
        (("ask", QUESTION, "--prompts", "{prompts}", "--metric", "judged"), "--criterion"),
        (("ask", QUESTION, "--prompts", "{prompts}", "--criterion", "it rhymes"), "--judge"),
        (("ask", QUESTION, "--prompts", "{texts}", "--answer", "no single token"), "is no token of subject"),
        (("ask", QUESTION, "--resume", "x", "--device", "cpu"), "leave out question, --device"),
        (("ask", "--resume", "why"), "there is no investigation 'why'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    lines = prompts.read_text().splitlines()
    places = {"prompts": prompts, "few": tmp_path / "few.jsonl", "texts": tmp_path / "texts.txt"}
    places["few"].write_text("\n".join(lines[:5]))
    places["texts"].write_text("\n".join(json.loads(line)["prompt"].replace("\n", " ") for line in lines))
    result = asked(*(argument.format(**places) for argument in arguments))
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)


def test_an_unknown_metric_is_a_usage_error(prompts: Path) -> None:
    result = asked(*ASK, "--prompts", prompts, "--metric", "mood")
    assert result.exit_code == 2 and "mood" in result.output
