from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from exegete.tools.rendering import CLOSE, OPEN, quantised, render_window


def test_runs_of_marked_tokens_are_wrapped_once() -> None:
    assert render_window([" a", " b", " c", " d"], {1, 2}) == " a<< b c>> d"
    assert render_window([" a"], {0}) == "<< a>>"


def test_look_alikes_and_controls_become_visible() -> None:
    assert render_window([" <<x>>", "\n```", "\x1b[31m", "\u202e"], ()) == " ‹‹x››⏎ˋˋˋ\\x1b[31m�"


@given(st.lists(st.text(), max_size=8), st.sets(st.integers(0, 7)))
def test_no_text_can_forge_a_mark_or_a_line(tokens: list[str], marks: set[int]) -> None:
    marks = {m for m in marks if m < len(tokens)}
    text = render_window(tokens, marks)
    runs = sum(1 for m in marks if m - 1 not in marks)
    assert text.count(OPEN) == text.count(CLOSE) == runs
    assert "\n" not in text and "\x1b" not in text and "`" not in text


def test_activations_are_shown_from_zero_to_ten() -> None:
    assert [quantised(a, 2.0) for a in (0.0, 0.01, 1.0, 2.0, 3.0, -1.0, float("nan"))] == [0, 1, 5, 10, 10, 0, 0]
    assert quantised(1.0, 0.0) == 0
