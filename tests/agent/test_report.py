from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exegete.agent.report import write_report
from exegete.tools.errors import UserError
from exegete.tools.store import Store

StoreMaker = Callable[..., str]


class Page(HTMLParser):
    """Counts the tags of a page and keeps its text and what its attributes would load or run."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.dangerous: list[tuple[str, str | None]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.dangerous += [(name, value) for name, value in attrs if name.startswith("on") or name == "src"]
        self.dangerous += [(n, v) for n, v in attrs if n in ("href", "xlink:href") and not (v or "").startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[[], str]:
    return lambda: write_report(tmp_path / "store", tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_headline_figure_stands_beside_its_interval_n_and_floors(
    make_store: StoreMaker, page_of: Callable[[], str]
) -> None:
    make_store()
    text = re.sub(r"\s+", " ", Page(page_of()).text)
    assert "detection0.683 [0.628, 0.739]9" in text  # the mean of 0.55 + 0.4·k/12 for k = 0…8
    assert "shuffled0.520 [0.508, 0.532]5" in text and "+0.097 [+0.069, +0.125]5" in text
    assert "sibling0.600 [0.600, 0.600]5" in text and "constant0.500 [0.500, 0.500]5" in text
    assert "Language model callsnone" in text and "This is the offline baseline" in text
    assert "9 labeled" in text and "1 dead" in text and "4 input" in text
    assert "Spearman's ρ = 1.00" in text


def test_the_report_shows_plots_and_the_best_and_worst_latents(
    make_store: StoreMaker, page_of: Callable[[], str]
) -> None:
    make_store(latents=40)
    page = Page(page_of())
    assert page.tags.count("svg") == 8  # two per evaluator, densities, two against density, one pair
    best, worst = page.text.split("Best explained latents")[1].split("Worst explained latents")
    assert [int(n) for n in re.findall(r"Latent (\d+)", best)] == list(range(36, 26, -1))
    assert [int(n) for n in re.findall(r"Latent (\d+)", worst)] == list(range(10))
    assert page.tags.count("mark") > 50
    assert "false positive · detection · test" in best and "false negative · fuzzing · test" in best


def test_text_of_the_corpus_runs_nothing_and_hides_nothing(make_store: StoreMaker, page_of: Callable[[], str]) -> None:
    make_store(name="<script>alert(3)</script>")
    source = page_of()
    page = Page(source)
    assert {"script", "img", "iframe", "link", "object"}.isdisjoint(page.tags)
    assert page.dangerous == []
    assert "</script><script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text
    assert "\\x1b[31mred" in page.text and "\\u202egnp.exe" in page.text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", source)
    assert "default-src 'none'" in source and "http" not in source.replace("http-equiv", "")


def test_a_dictionary_without_floors_says_so(make_store: StoreMaker, page_of: Callable[[], str]) -> None:
    make_store(floors=False)
    assert "No floors were scored for detection and fuzzing" in page_of()


def test_a_missing_floor_is_named(make_store: StoreMaker, page_of: Callable[[], str]) -> None:
    make_store()
    page = page_of()
    assert "The token list floor was not scored for detection and fuzzing." in page  # the toy's run scores the others
    assert "The sibling floor" not in page


def test_an_interrupted_run_shows_provisional_figures(make_store: StoreMaker, page_of: Callable[[], str]) -> None:
    make_store(finish=False)
    page = page_of()
    assert "This run was interrupted" in page and "normal intervals over latents" in page
    # own: 0.4·k/12 over k = 0…8 deviates by 0.0913, ± 1.96·0.0913/√9; pairs: (0.4/12 − 0.01)·k over k = 0…4
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "detection0.683 [0.624, 0.743]9" in text and "+0.097 [+0.064, +0.129]5" in text


def test_a_language_model_judge_is_not_called_a_baseline(make_store: StoreMaker, page_of: Callable[[], str]) -> None:
    make_store(judge="anthropic:claude")
    page = page_of()
    assert "written by the lexical explainer" in page
    assert "offline baseline" not in page and "no language model judged" not in page


def test_a_dictionary_whose_evidence_is_gone_does_not_spoil_the_page(
    make_store: StoreMaker, tmp_path: Path, page_of: Callable[[], str]
) -> None:
    make_store(name="kept")
    lost = make_store(name="lost")
    shutil.rmtree(Store.open(tmp_path / "store").evidence_folder(lost))
    make_store(name="third")  # publishes anew
    page = Page(page_of())
    assert page.tags.count("section") == 3 and page.tags.count("article") == 2 * 9
    assert page.text.count("no longer in the store") == 1


def test_several_dictionaries_have_a_section_each(make_store: StoreMaker, page_of: Callable[[], str]) -> None:
    make_store(name="first")
    make_store(name="second", labeled=False)
    page = page_of()
    assert Page(page).tags.count("section") == 2
    assert "Nothing of this dictionary has been labeled yet" in page.split("<section")[2]


def test_imported_evidence_without_activations_has_no_density_plots(
    make_store: StoreMaker, page_of: Callable[[], str]
) -> None:
    make_store(activations=False)
    page = page_of()
    assert "Firing densities" not in page and "unknown: imported evidence" in page
    assert Page(page).tags.count("svg") == 5


def test_an_empty_store_says_that_nothing_was_labeled(tmp_path: Path, page_of: Callable[[], str]) -> None:
    with Store.create_or_open(tmp_path / "store").writer() as writer:
        writer.publish()
    assert "this store holds no dictionary" in page_of()


def test_the_same_store_gives_the_same_page(make_store: StoreMaker, page_of: Callable[[], str]) -> None:
    make_store()
    assert page_of() == page_of()


def test_a_report_that_cannot_be_written_is_the_users_error(make_store: StoreMaker, tmp_path: Path) -> None:
    make_store()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write the report to .*folder"):
        write_report(tmp_path / "store", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir() if "writing" in path.name] == []


def test_a_browser_draws_the_plots_and_runs_no_script(make_store: StoreMaker, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine: the page was not opened in a browser")
    make_store(name='"><script>document.title="owned"</script>')
    page = write_report(tmp_path / "store", tmp_path / "report.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert dom.count('<svg class="plot"') == 8
    assert len(re.findall(r'<path class="(?:line|area|dots)[^"]*" d="M', dom)) > 20
    assert "<title>Exegete report" in dom and "<title>owned" not in dom
    assert "<script" not in dom and "<img" not in dom


def test_a_cloud_of_many_latents_is_a_fixed_sample_and_says_so(
    make_store: StoreMaker, page_of: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exegete.agent.report_figures.SCATTER_POINTS", 10)
    make_store(latents=40)
    page = page_of()
    assert page.count("10 of 37 latents, a fixed sample") == 3
    assert [path.count("M") for path in re.findall(r'class="dots[^"]*" d="([^"]*)"', page)] == [10, 10, 10]
    assert "(n = 37)" in Page(page).text and page == page_of()
