from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from exegete.agent.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Canvas,
    Series,
    ecdf,
    power_axis,
    round_axis,
    score_histogram,
    stacked_histogram,
)
from exegete.agent.report_figures import normal, spearman_text

WIDE, HIGH = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


def _path(svg: str, style: str) -> list[tuple[float, float]]:
    found = re.search(rf'class="line s-{style}" d="([^"]*)"', svg)
    assert found is not None
    pairs = re.findall(r"[ML]([\d.]+) ([\d.]+)", found[1])
    return [((float(x) - LEFT) / WIDE, (HEIGHT - BOTTOM - float(y)) / HIGH) for x, y in pairs]


def test_axes_have_round_ticks() -> None:
    assert round_axis("", 0.4, 1.0, 6).ticks[0][0] == pytest.approx(0.4)
    assert [text for _, text in round_axis("", 0.4, 1.0, 6).ticks] == ["0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]
    assert [text for _, text in round_axis("", 0, 1234, 4).ticks] == ["0", "500", "1,000"]
    assert [text for _, text in power_axis("", -2.5, -0.2).ticks] == ["0.001", "0.01", "0.1", "1"]
    assert power_axis("", -2.0, -2.0).high == -1


def test_an_ecdf_steps_up_at_each_value_by_its_share() -> None:
    plot = ecdf("t", "score", [Series("own", "own", [(0.7, 1.0), (1.0, 3.0)])])
    # 0.7 lies in the middle of 0.4 … 1.0
    expected = [(0, 0), (0.5, 0), (0.5, 0.25), (1, 0.25), (1, 1), (1, 1)]
    for point, wanted in zip(_path(plot.svg, "own"), expected, strict=True):
        assert point == pytest.approx(wanted, abs=0.001)


def test_a_constant_floor_is_a_line_and_a_spike_is_cut_and_said() -> None:
    own = Series("own", "own", [(0.5 + i / 40, 1.0) for i in range(20)] + [(1.0, 1.0)])
    floors = [Series("constant", "c", [(0.5, 9.0)]), Series("shuffled", "s", [(0.5, 9.0), (0.6, 1.0)])]
    plot = score_histogram("t", "score", [own, *floors], 0.025)
    for point, wanted in zip(_path(plot.svg, "constant"), [(1 / 6, 0), (1 / 6, 1)], strict=True):
        assert point == pytest.approx(wanted, abs=0.001)
    assert max(y for _, y in _path(plot.svg, "shuffled")) == 1.0
    assert plot.note == "the highest bins of a floor are cut off; they reach 90% of its latents"
    assert score_histogram("t", "score", [own], 0.025).note == ""


def test_bars_stand_on_each_other() -> None:
    series = [Series("live", "live", [(0.0, 3.0)]), Series("rare", "rare", [(0.0, 1.0)])]
    plot = stacked_histogram("t", round_axis("x", 0, 1), "latents", series, 0.5)
    bars = [{k: float(v) for k, v in bar} for bar in (re.findall(r'\b(y|height)="([\d.]+)"', b) for b in
            re.findall(r'<rect class="bar[^>]*>', plot.svg))]  # fmt: skip
    assert bars[0]["height"] == pytest.approx(3 * bars[1]["height"], rel=0.01)
    assert bars[1]["y"] + bars[1]["height"] == pytest.approx(bars[0]["y"], abs=0.15)


def test_text_in_a_plot_is_escaped_and_the_svg_is_whole() -> None:
    hostile = '"><script>alert(1)</script>'
    canvas = Canvas(hostile, round_axis(hostile, 0, 1), round_axis(hostile, 0, 1))
    canvas.bar(0, 1, 0, 1, "own", hostile)
    root = ET.fromstring(canvas.svg())
    assert root.get("aria-label") == hostile
    assert not any("script" in element.tag for element in root.iter())


def test_intervals_of_the_provisional_figures() -> None:
    assert normal(0.5, 0.1, 100) == {
        "value": 0.5,
        "low": pytest.approx(0.4804, abs=1e-4),
        "high": pytest.approx(0.5196, abs=1e-4),
        "n": 100,
    }
    assert normal(0.99, 0.1, 4)["high"] == 1.0 and normal(-0.99, 0.1, 4, least=-1.0)["low"] == -1.0
    assert normal(0.5, None, 1)["low"] is None and normal(None, None, 0)["high"] is None
    # z = atanh(0.5) = 0.5493, its deviation √(1.125/100) = 0.1061
    assert spearman_text(0.5, 103) == "Spearman's ρ = 0.50 [0.33, 0.64] (n = 103)"
    assert spearman_text(None, 7) == spearman_text(float("nan"), 7) == "Spearman's ρ undefined (n = 7)"
