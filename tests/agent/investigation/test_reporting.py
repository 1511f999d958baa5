"""The report: every verdict as it is, every figure beside its control, and no text that acts on a page."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from investigation_records import BARS, CURVE, TOKENS, investigation

from exegete.agent.investigation.contract import Headline
from exegete.agent.investigation.drawing import Row, Tokens, Undrawable, drawn, forest
from exegete.agent.investigation.markdown import fenced, markdown, plain_text
from exegete.agent.investigation.record import InvestigationRecord
from exegete.agent.investigation.reporting import html, page, write_report
from exegete.agent.investigation.wording import hit_rate, number, probability
from exegete.agent.plots import Plot
from exegete.tools.errors import UserError

HOSTILE = (
    "</script><script>alert(1)</script>",
    "</title></style><style>*{display:none}</style>",
    "\"><svg onload=alert(3)>' onmouseover='alert(4)",
    "</p></article></main></body></html><!-- --><base href=//evil>",
    "&lt;script&gt;{{ 7*7 }}{% raw %}{# #}",
    "| a | b |\n# heading\n- item\n```\n````\n~~~\n[link](http://evil) ![x](//evil/x.png) www.evil.example me@evil.example",
    "\x1b[31mred\x1b[0m \u202egnp.exe\u2066\u200b\ufeff\x00\x9b",
)  # fmt: skip
ALL = "".join(HOSTILE)
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


class Structure(HTMLParser):
    """Tags and attributes but those that hold words, comments and declarations, in order; and the texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, [(name, "…" if name in ("title", "aria-label") else value) for name, value in attrs]))

    def handle_endtag(self, tag: str) -> None:
        self.seen.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.seen.append(f"comment {data}")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def outline(source: str) -> list[tuple[str, int, int]]:
    """Return of each line of Markdown how it begins, its cells and its links, fences without what is in them."""
    found, fence = [], ""
    for line in source.split("\n"):
        assert not UNSEEN.search(line)
        if fence:
            fence = "" if line == fence else fence
            continue
        begins = re.match(r"`{3,}|[#*+-]*", line)
        assert begins
        if begins[0].startswith("```"):
            fence = begins[0]
        else:
            assert "<" not in line and "://" not in line and "www." not in line and "me@" not in line
            assert len(re.findall(r"(?<!\\)`", line)) in (0, 2)
        found.append((begins[0][:3], len(re.findall(r"(?<!\\)\|", line)), len(re.findall(r"(?<!\\)\[", line))))
    assert not fence
    return found


def shown(record: InvestigationRecord) -> tuple[str, str]:
    made = page(record, Path("there"))
    return html(made), markdown(made)


@pytest.mark.parametrize("text", [*HOSTILE, ALL])
def test_hostile_text_changes_nothing_of_the_page(text: str) -> None:
    source = html(page(investigation(text, investigator=f"m:odel{text}"), Path("there")))
    harmless = html(page(investigation("x", investigator="m:odelx"), Path("there")))
    found = Structure(source)
    assert found.seen == Structure(harmless).seen
    assert not UNSEEN.search(source)
    assert "default-src 'none'" in source and "<script" not in source
    attributes = [pair for tag in found.seen if isinstance(tag, tuple) for pair in tag[1]]
    assert not [name for name, _ in attributes if name in ("src", "action", "formaction") or name.startswith("on")]
    assert all(value.startswith("#") for name, value in attributes if name in ("href", "xlink:href"))
    assert not re.search(r"url\(|@import", source.partition("</style>")[0].partition("<style>")[2])


@pytest.mark.parametrize("text", [*HOSTILE, ALL])
def test_hostile_text_changes_nothing_of_the_markdown(text: str) -> None:
    source = markdown(page(investigation(text), Path("there")))
    assert outline(source) == outline(markdown(page(investigation("x"), Path("there"))))


def test_every_verdict_is_reported_as_it_is() -> None:
    source, plain = shown(investigation())
    texts = Structure(source).texts
    for place, status in enumerate(("verified", "failed", "unverified", "correlational"), 1):
        article = re.search(rf'<article id="C{place}">.*?</article>', source, re.DOTALL)
        assert article and f'<span class="verdict {status}">{status}</span>' in article[0]
        assert re.search(rf"### C{place}\n\n\*\*{status}\*\*", plain)
    assert any("did not hold on held-out prompts" in text for text in texts)
    assert "no such experiment" in source and "E99 (no such experiment)" in plain
    assert "a fixed protocol, no language model" in source and "a fixed protocol, no language model" in plain
    assert source.index("Latents 17 and 21 carry the word.") < source.index("Investigated by")


def test_what_became_of_the_claims_stands_before_the_answer() -> None:
    source, plain = shown(investigation())
    counted = "1 verified (C1), 1 failed (C2), 1 unverified (C3), 1 correlational (C4)."
    [line] = re.findall(r'<p class="tally">.*?</p>', source)
    assert re.sub(r"<[^>]+>", "", line) == f"Claims, checked by code on held-out prompts: {counted}"
    assert "**1 failed** ([C2](#c2))" in plain
    assert source.index(line) < source.index("Latents 17 and 21 carry the word.")
    none = shown(replace(investigation(), verdicts=()))
    assert '<p class="tally"><b>Nothing is claimed.</b></p>' in none[0] and "**Nothing is claimed.**" in none[1]


def test_an_answer_keeps_its_paragraphs() -> None:
    source, plain = shown(investigation(answer="First (E1).\n\n# Second <b>", investigator="openai:m"))
    mark = '<span class="by">the model’s words</span>'
    assert f'<p>First (<a href="#E1">E1</a>).</p><p># Second &lt;b&gt;{mark}</p>' in source
    assert "\nFirst ([E1](#e1)).\n\n\\# Second &lt;b> *(the model’s words)*\n" in plain


def test_how_figures_are_read_and_what_a_p_value_can_be() -> None:
    record = investigation()
    source, plain = shown(record)
    assert "95 % of its n random draws" in source and "95 % of its n random draws" in plain
    assert "random sets allow" not in source
    # One of 20 random sets is at least as large as the claim's effect, where that effect is the largest: 1 / (20 + 1).
    least = replace(record, verdicts=(replace(record.verdicts[0], p=1 / 21, p_adjusted=2 / 21),))
    assert "p = 0.048 (the smallest that 20 random sets allow); adjusted" in shown(least)[0]


def test_what_the_dictionary_leaves_out_is_said_where_it_was_measured() -> None:
    record = investigation()
    share = {"error_share": {"value": 0.25, "low": 0.2, "high": 0.3, "sd": 0.1, "n": 16}}
    measured = replace(record, experiments=(replace(record.experiments[0], facts=share), *record.experiments[1:]))
    words = "0.25 [0.2, 0.3] of the size of all attributions is its error's (E1), which no intervention changes"
    source, plain = shown(measured)
    assert f"<dd>{words.replace(chr(39), '&#39;')}</dd>" in source and plain_text(words) in plain
    assert "Not in the dictionary" not in shown(record)[0]
    alone = {"error_total": {"exact": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    first = replace(record.experiments[0], facts={**share, **alone})
    more = shown(replace(record, experiments=(first, *record.experiments[1:])))[1]
    assert plain_text("; with the error alone at zero the metric loses 0.5 [0.4, 0.6]") in more


def test_latents_without_labels_and_calls_without_arguments_say_so() -> None:
    record = replace(investigation(), labels={})
    plainest = replace(record, experiments=(replace(record.experiments[0], arguments={"hypothesis": "H1"}),))
    source, plain = shown(plainest)
    assert "No label is known of these latents" in source and "| latent | claims | experiments |" in plain
    assert "With its defaults." in source and "With its defaults." in plain and "```json" not in plain
    assert "| latent | what the store said of it |" in shown(investigation())[1]


def test_effects_stand_beside_their_controls_with_interval_n_and_adjusted_p() -> None:
    source, plain = shown(investigation())
    [claim] = re.findall(r'<article id="C1">.*?</article>', source, re.DOTALL)
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", claim)]
    assert rows[1:3] == [
        ["change", "-3.1", "[-3.8,", "-2.4]", "4"],
        ["control:", "random", "latents", "-0.1", "[-0.4,", "0.2]", "20"],
    ]
    assert rows[3:] == [
        ["flipped", "0.75", "[0.3,", "0.95]", "4"],
        ["control:", "random", "latents", "0", "[0,", "0.49]", "4"],
    ]
    assert "p = 0.002" in claim and "0.004" in claim
    assert "p = 0.4, adjusted by Holm 0.4" in plain
    assert "6 to search on; 4 held out" in source and "1,234 of 20,000 forward passes" in source


def test_every_number_links_to_where_it_comes_from() -> None:
    source, plain = shown(investigation())
    anchors = set(re.findall(r'id="([^"]+)"', source))
    links = set(re.findall(r'href="#([^"]+)"', source))
    assert links <= anchors and {"E1", "E2", "E3", "E4", "C1", "C2", "latent-17"} <= links
    headings = set(re.findall(r"^### (\w+)$", plain, re.MULTILINE))
    assert {link.upper() for link in re.findall(r"\]\(#(\w+)\)", plain)} <= headings
    for id in ("E1", "E5"):
        assert f"exegete rerun there/{id}" in source and f"exegete rerun there/{id}" in plain
    stored = replace(investigation(), origin={**investigation().origin, "store": "my store"})
    assert "exegete rerun there/E1 --store 'my store'" in shown(stored)[1]
    kept = markdown(page(stored, Path("my store/investigations/i-0001")))
    assert "exegete rerun i-0001/E1 --store 'my store'" in kept


def test_what_a_text_cites_is_linked_where_there_is_such_an_experiment_or_claim() -> None:
    source, plain = shown(investigation(answer="It falls (E1; E77; xE2, C2) <b>."))
    assert '(<a href="#E1">E1</a>; E77; xE2, <a href="#C2">C2</a>) &lt;b&gt;.' in source
    assert "([E1](#e1); E77; xE2, [C2](#c2)) &lt;b>." in plain


def test_no_link_leads_nowhere_however_many_latents_a_claim_names() -> None:
    record = investigation()
    claim = replace(record.verdicts[0].claim, latents=tuple(range(600)))
    many = replace(record, verdicts=(replace(record.verdicts[0], claim=claim),))
    source, plain = shown(many)
    assert set(re.findall(r'href="#([^"]+)"', source)) <= set(re.findall(r'id="([^"]+)"', source))
    assert source.count('<tr id="latent-') == 498 and source.count('<article id="latent-') == 2
    assert "100 more latents are named" in source and "100 more are named" in plain


def test_three_of_four_predictions_have_the_known_interval() -> None:
    # Wilson (1927) at 3 of 4: centre (0.75 + 1.9207 / 4) / (1 + 3.8415 / 4) = 0.6275, half width 0.3269.
    # At most −1, at least 0.5, between −0.5 and 0.5, at most −1; each control is −0.1.
    words = "3 of 4 (75 %, 95 % interval 30 % to 95 %); the controls' own figures would have met 1 of 4"
    assert hit_rate(investigation()) == words
    assert words.partition(";")[0] in shown(investigation())[0]
    assert hit_rate(replace(investigation(), experiments=())) == "none could be held against a figure"


def test_what_a_language_model_wrote_is_marked_and_what_the_recipe_wrote_is_not() -> None:
    source, plain = shown(investigation(investigator="openai:m"))
    assert source.count('<span class="by">') == 1 + 4 + 3 + 5
    assert plain.count("(the model’s words)") == 1 + 4 + 3 + 5
    given = shown(investigation(investigator="mine"))
    assert (
        given[0].count("the investigator’s words") == 1 + 4 + 3 + 5 + 1 and "an investigator that was given" in given[1]
    )
    recipes = shown(investigation())
    assert '<span class="by">' not in recipes[0] and "’s words)" not in recipes[1]


def test_rejected_hypotheses_and_what_tested_them_are_shown() -> None:
    source, plain = shown(investigation())
    # For it and against it, and what came to no figure.
    assert "| H1 | Latents 17 and 21 carry it | supported | [E1](#e1), [E4](#e4) | [E2](#e2) | [E5](#e5) |" in plain
    assert "| H2 | Latent 5 alone carries it | rejected | [E3](#e3) | – | – |" in plain
    assert "| H3 | The position carries it | open | – | – | – |" in plain
    assert re.search(
        r'Latents 17 and 21 carry it</td><td class="hit">supported</td><td><a href="#E1">E1</a>, <a href="#E4">E4</a></td>'
        r'<td><a href="#E2">E2</a></td><td><a href="#E5">E5</a></td>',
        source,
    )
    assert re.search(r'Latent 5 alone carries it</td><td class="miss">rejected</td><td><a href="#E3">E3</a>', source)


def test_an_investigation_that_ended_early_says_so_first() -> None:
    for status, words in (("interrupted", "It was interrupted"), ("budget", "Its budget was used up (no passes left)")):
        stopped = "no passes left" if status == "budget" else ""
        source, plain = shown(investigation(status=status, stopped=stopped, metric=None, verdicts=(), answer=""))
        assert words in source and words in plain and source.index(words) < source.index("No answer was given.")
        assert "it ended before that was settled" in source


def test_an_empty_record_still_makes_a_report(tmp_path: Path) -> None:
    empty = replace(
        investigation(), experiments=(), verdicts=(), hypotheses=(), labels={}, cases=(), held_out=(), answer=""
    )
    assert write_report(empty, tmp_path / "new").read_text(encoding="utf-8").count("None was made.") == 2
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.html", "report.md"}


def test_a_report_is_the_same_each_time_and_is_replaced_whole(tmp_path: Path) -> None:
    first = write_report(investigation(), tmp_path).read_bytes()
    assert write_report(investigation(), tmp_path).read_bytes() == first
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(investigation(), tmp_path / "file" / "below")


def test_plots_of_every_kind_are_drawn() -> None:
    source = shown(investigation())[0]
    assert source.count("<svg") == 3 and "A plot is left out" not in source
    assert 'class="line s-a"' in source and 'class="line s-control"' in source and 'class="area s-a"' in source
    tokens = drawn(TOKENS)
    assert isinstance(tokens, Tokens) and [token.strength for token in tokens.tokens] == [0.05, 0.2, 1.0]
    assert '<mark class="less" style="--s:0.17" title="-0.4 logits"> in</mark>' in source


def test_figures_lie_on_their_axis() -> None:
    plot = forest("t", "logits", [Row("a", -2.0, -4.0, 0.0), Row("b", 1.0, 0.5, 4.0, control=True, link="E1")])
    intervals = re.findall(r'class="interval s-(\w+)" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', plot.svg)
    dots = [float(x) for x in re.findall(r'cx="([\d.]+)"', plot.svg)]
    zero = float(re.findall(r'class="axis" x1="([\d.]+)"', plot.svg)[0])
    (_, left, middle), (_, right_low, right) = [(style, float(low), float(high)) for style, low, high in intervals]
    assert [style for style, _, _ in intervals] == ["a", "control"]
    assert middle == zero and left < dots[0] < zero < right_low < dots[1] < right
    # 206 pixels to the left, 86 to the right, and 4 % of the span on both sides.
    assert right - left == pytest.approx((520 - 292) / 1.08, abs=0.2)
    assert dots[0] == pytest.approx((left + zero) / 2, abs=0.1) and '<a href="#E1">' in plot.svg


@pytest.mark.parametrize(
    "plot",
    [
        {},
        {"kind": "pie"},
        {"kind": ["bars"]},
        {"kind": "bars"},
        {**BARS, "bars": []},
        {**BARS, "bars": [{"label": "a", "value": "1"}]},
        {**BARS, "bars": [{"label": "a", "value": True}]},
        {**BARS, "bars": [{"label": "a", "value": 10**400}]},
        {**BARS, "bars": [{"label": "a", "value": -1.7e308}, {"label": "b", "value": 1.7e308}]},
        {**BARS, "bars": [{"label": "a", "value": 5e-324}]},
        {**CURVE, "series": [{"label": "a", "points": [[0]]}]},
        {**CURVE, "series": [{"label": "a", "points": [[0, 1]], "low": []}, {"points": []}]},
        {**CURVE, "series": [{"label": "a", "points": [[0, 1], [1, 2]], "low": [0], "high": [0]}]},
        {**CURVE, "series": 5},
        {**TOKENS, "values": [1.0]},
        {**TOKENS, "tokens": [], "values": []},
    ],
)
def test_a_plot_that_is_none_is_said_and_left_out(plot: dict[str, Any]) -> None:
    with pytest.raises(Undrawable):
        drawn(plot)
    record = investigation()
    broken = replace(record, experiments=(replace(record.experiments[0], plots=(plot,)), *record.experiments[1:]))
    assert shown(broken)[0].count("A plot is left out") == 1


def test_a_single_point_of_a_control_keeps_its_interval() -> None:
    one = {"label": "random", "points": [[1, 0.5]], "low": [0.0], "high": [1.0], "control": True}
    plot = drawn({**CURVE, "series": [*CURVE["series"], one]})
    assert isinstance(plot, Plot) and [style for style, _ in plot.legend] == ["a", "control", "beside"]
    [bar] = re.findall(r'class="line s-beside" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', plot.svg)
    assert bar[0] == bar[2] and float(bar[1]) > float(bar[3])


def test_plots_leave_out_points_without_a_figure_and_what_is_too_much() -> None:
    curve = drawn({**CURVE, "series": [{"label": "a", "points": [[0, 1], [1, None], [2, 3]]}]})
    assert (
        isinstance(curve, Plot)
        and len(re.findall(r"[ML]\d", re.findall(r'class="line[^>]* d="([^"]+)', curve.svg)[0])) == 2
    )
    many = drawn({**BARS, "bars": [{"label": str(n), "value": n} for n in range(100)]})
    assert isinstance(many, Plot) and many.note.startswith("40 more") and many.svg.count("<circle") == 60
    none = forest("t", "u", [Row("a", None), Row("b", 1.0)])
    assert none.svg.count("<circle") == 1 and "no figure" in none.svg


def test_numbers_are_short() -> None:
    assert [number(x) for x in (None, 0.0, -3.14159, 0.00012345, 1234.5, 1e12)] == [
        "–", "0", "-3.14", "0.000123", "1,234", "1e+12",
    ]  # fmt: skip
    assert [probability(p) for p in (None, 0.00001, 0.0421)] == ["–", "< 0.0001", "0.042"]


def test_markdown_shows_texts_as_they_stand() -> None:
    assert plain_text("1. a_b*c*") == "1\\. a\\_b\\*c\\*"
    assert plain_text("# <b>|`x`") == "\\# &lt;b>\\|\\`x\\`"
    assert fenced("a\n```\nb") == "````\na\n```\nb\n````"


def test_latents_have_their_cards_where_the_store_can_be_read(make_store: Any, tmp_path: Path) -> None:
    dictionary = make_store("store")
    origin = {**investigation().origin, "fingerprint": dictionary, "store": str(tmp_path / "store")}
    record = replace(investigation(), origin=origin, labels={3: "three"})
    found = {one.latent: one for one in page(record, tmp_path).latents}
    assert found[3].card is not None and found[3].label == "three" and found[17].card is None
    source = html(page(record, tmp_path))
    assert source.count('<div class="window"') > 3 and "Word 3" not in source  # The label is that of the investigation.


def test_a_store_that_is_gone_takes_the_windows_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = replace(investigation(), origin={**investigation().origin, "store": str(tmp_path / "gone")})
    assert "the word descending" in html(page(record, tmp_path))
    assert "shows no windows" in caplog.text


def test_reporting_loads_no_torch() -> None:
    import subprocess

    code = (
        "import sys, exegete.agent.investigation.reporting; print('torch' in sys.modules, 'langgraph' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_control_without_an_interval_says_so() -> None:
    headline = Headline("change", 1.0, None, None, 6)
    record = investigation()
    bare = replace(record, experiments=(replace(record.experiments[0], headline=headline),))
    source, plain = shown(bare)
    assert "no interval" in source and "no control" in source and "| no control |" in plain
