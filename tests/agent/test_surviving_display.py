"""A display whose output has gone: the work goes on, and what the work raises is still raised."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from exegete.agent.config import load_config
from exegete.agent.progress import Bars, Display, Lines
from exegete.agent.run import run
from exegete.agent.surviving_display import SurvivingDisplay
from exegete.tools.interchange import import_evidence

from .test_cascade import line


class Gone(io.StringIO):
    def __init__(self, error: OSError = BrokenPipeError(errno.EPIPE, "Broken pipe")) -> None:  # noqa: B008
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


DISPLAYS = [
    lambda: Lines(Gone(), every_s=0.0),
    lambda: Lines(closed(), every_s=0.0),
    lambda: Bars(Console(file=Gone(OSError(errno.EIO, "no terminal")), force_terminal=True)),
]


@pytest.mark.parametrize("made", DISPLAYS)
def test_an_output_that_has_gone_stops_nothing(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    display = SurvivingDisplay(made())
    assert isinstance(display, Display)
    display.say("a line")
    done = []
    with display.stage("labeling", 2, "latents") as advance:
        for number in range(2):
            advance(1)
            display.beat()
            done.append(number)
    assert done == [0, 1] and [
        one.levelname for one in caplog.records if one.name == "exegete.agent.surviving_display"
    ] == ["WARNING"]


@pytest.mark.parametrize("made", [*DISPLAYS, lambda: Lines(io.StringIO())])
@pytest.mark.parametrize("error", [KeyError("a bug"), OSError("the disk is full"), KeyboardInterrupt()])
def test_what_the_work_raises_is_raised(made: Any, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, SurvivingDisplay(made()).stage("labeling", 2, "latents"):
        raise error
    assert raised.value is error


def test_a_run_whose_terminal_has_gone_ends_as_any_other(tmp_path: Path) -> None:
    file = tmp_path / "planted.jsonl"
    file.write_text("".join(json.dumps(line(latent)) + "\n" for latent in range(4)))
    import_evidence(file, tmp_path / "store")
    config = load_config(None, ("label.floors=2",), {"store": str(tmp_path / "store")})
    outcome = run(config, Lines(Gone(), every_s=0.0))
    assert outcome.finished and [sum(one["outcomes"].values()) for one in outcome.figures.values()] == [4]
