"""What a user can get wrong with interventions, prompts and dictionaries, and how these are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, VOCABULARY, WIDTH, prompt, tiny_subject

from exegete.tools.errors import UserError
from exegete.tools.interventions import ablate, patch, push, steer
from exegete.tools.live_model import LiveModel, Trial

from .live_trials import MLP, NORMALIZED, POST, POST_0, PRE, PROMPTS, coder, last_logits


def test_only_special_tokens_give_nothing_to_draw_from() -> None:
    d = coder("llama", POST)
    model = LiveModel(tiny_subject("llama"), [d])
    with pytest.raises(UserError, match="special tokens only"):
        last_logits(model, [Trial(PROMPTS[0], ablate(d.fingerprint, [1], texts=[(0, 0)]))])


def test_bad_interventions_and_prompts_are_said() -> None:
    d = coder("llama", POST)
    f = d.fingerprint
    model = LiveModel(tiny_subject("llama"), [d])
    wide = [1.0] * WIDTH
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: ablate(f, [64]), r"has no latent 64; it has 0 to 63"),
        (lambda: ablate(f, [3, -1]), r"has no latent -1"),
        (lambda: ablate("resid", [3]), r"'resid' fits 0 dictionaries; attached: 'random-jumprelu-64-seed0'"),
        (lambda: ablate(f[:8], [3]), r"'sha256:.' fits 0 dictionaries"),
        (lambda: ablate(f, [3], (3,)), r"position 3 is outside the prompt, which has 3 tokens"),
        (lambda: ablate(f, [3], (-4,)), r"position -4 is outside the prompt"),
        (lambda: ablate(f, [3], ()), r"names no position"),
        (lambda: steer(f, [3], float("nan")), r"add is nan; it must be a finite number"),
        (lambda: steer(f, [3], 1e39), r"a value of add is 1e\+39; float32 holds at most 3.4e\+38"),
        (
            lambda: patch(f, [3], prompt(CONTEXT + 1)),
            rf"has {CONTEXT + 1} tokens; subject 'tiny-llama' takes {CONTEXT}",
        ),
        (lambda: patch(f, [3], [VOCABULARY]), rf"token {VOCABULARY} is not one of subject"),
        (
            lambda: push("blocks.1.hook_resid_pots", wide, 1.0),
            r"no hook point.*Did you mean 'blocks.1.hook_resid_post'",
        ),
        (
            lambda: push("blocks.9.hook_resid_post", wide, 1.0),
            r"no hook point 'blocks.9.hook_resid_post'; it has 3 layers",
        ),
        (lambda: push(POST, wide[1:], 1.0), r"the vector has length 31; at 'blocks.1.hook_resid_post' it must be 32"),
        (lambda: push(POST, wide, float("inf")), r"strength is inf"),
        (lambda: push(POST, [1e30] * WIDTH, 1e30), r"strength times vector is 1e\+60"),
        (lambda: push(POST, [float("nan")] * WIDTH, 1.0), r"vector is nan"),
    ]
    for make, message in bad:
        with pytest.raises(UserError, match=message) as caught:
            last_logits(model, [Trial(PROMPTS[0], make())])
        assert "\n" not in str(caught.value)


def test_bad_prompts_are_said() -> None:
    model = LiveModel(tiny_subject("llama"))
    bad: list[tuple[list[Any], str]] = [
        ([], "there is no prompt to run"),
        ([()], "a prompt is empty"),
        ([prompt(CONTEXT + 1)], f"has {CONTEXT + 1} tokens; subject 'tiny-llama' takes {CONTEXT}: shorten it"),
        ([(1, VOCABULARY)], f"token {VOCABULARY} is not one of subject 'tiny-llama', which has {VOCABULARY}"),
        ([(1, -1)], "token -1 is not one of"),
        ([(1, 1.5)], "are no tokens"),
        (["w1 w2"], "'w1 w2' are no tokens"),
    ]
    for prompts, message in bad:
        with pytest.raises(UserError, match=message):
            last_logits(model, [Trial(tokens) for tokens in prompts])
    last_logits(model, [Trial(prompt(CONTEXT))])
    with pytest.raises(UserError, match="the prompt '' is empty"):
        model.tokens("")
    with pytest.raises(UserError, match=r"the prompt 'w1 w1.*has 49 tokens"):
        model.tokens("w1 " * (CONTEXT + 1))
    with pytest.raises(UserError, match="no hook point"):
        model.run([Trial(PROMPTS[0])], lambda r: [0], points=["blocks.1.hook_resid"])
    with pytest.raises(UserError, match="batch_tokens is 0"):
        LiveModel(tiny_subject("llama"), batch_tokens=0)


def test_tokens_are_integers_whatever_they_came_in() -> None:
    assert Trial(torch.tensor([3, 4])) == Trial((3, 4))  # type: ignore[arg-type]
    assert type(Trial(torch.tensor([3])).tokens[0]) is int  # type: ignore[arg-type]


def test_a_beginning_is_given_where_the_subject_has_one() -> None:
    assert LiveModel(tiny_subject("llama")).tokens("w1 w2") == (2, 3)
    with_beginning = LiveModel(tiny_subject("llama", bos_token="<e>"))
    assert with_beginning.tokens("w1 w2") == (0, 2, 3) and with_beginning.text((0, 2)).strip() == "w1"
    with pytest.raises(UserError, match="is empty"):
        with_beginning.tokens("")


def test_a_padding_token_that_the_model_never_saw_does_not_matter() -> None:
    """Tokenizers are given padding tokens beyond the embedding."""
    subject = tiny_subject("gpt2", pad_token="<pad>")
    assert subject.tokenizer.pad_token_id == VOCABULARY
    found = last_logits(LiveModel(subject), [Trial(tokens) for tokens in PROMPTS])
    expected = last_logits(LiveModel(tiny_subject("gpt2")), [Trial(tokens) for tokens in PROMPTS])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_dictionaries_that_do_not_fit_are_refused() -> None:
    subject, d = tiny_subject("llama"), coder("llama", POST)
    mlp = "blocks.1.mlp.hook_post"
    bad: list[tuple[Any, str]] = [
        (replace(d, hook_point=mlp), r"takes vectors of width 32, but subject 'tiny-llama' has width 64 at 'blocks.1.mlp"),
        (replace(d, hook_point="blocks.7.hook_resid_post"), r"no hook point 'blocks.7.hook_resid_post'"),
        (replace(d, output=MLP, decoder=d.decoder[:, :1]), r"writes vectors of width 1, but subject 'tiny-llama' has width 32"),
        (replace(d, output=POST_0), r"writes at 'blocks.0.hook_resid_post' before it reads at"),
        (d.to(device="meta"), r"is on meta, subject 'tiny-llama' on cpu; load both on one device"),
    ]  # fmt: skip
    for dictionary, message in bad:
        with pytest.raises(UserError, match=message):
            LiveModel(subject, [dictionary])


def test_dictionaries_are_found_by_fingerprint_name_and_first_digits() -> None:
    one = coder("llama", POST)
    other, named = coder("llama", POST_0), replace(coder("llama", PRE), name=one.fingerprint[7:15])
    model = LiveModel(tiny_subject("llama"), [one, other, named])
    assert model.dictionary(one.fingerprint) is one
    assert model.dictionary(named.name) is named  # a whole name before the beginning of a fingerprint
    assert model.dictionary(other.fingerprint[7:13]) is other
    assert model.dictionary(other.fingerprint[:13]) is other
    for wanted in ("", "sha256:", other.fingerprint[7:12], None, one.name):
        with pytest.raises(UserError, match="attached: "):
            model.dictionary(wanted)
    assert LiveModel(tiny_subject("llama"), [one]).dictionary() is one


def test_a_point_that_only_looks_on_is_refused() -> None:
    subject = tiny_subject("llama")
    model = LiveModel(subject)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("exegete.tools.hooking._disturbed", lambda x: x)
        with pytest.raises(UserError, match="does not reach the output"):
            model.require_effective(NORMALIZED)
    model.require_effective(NORMALIZED)
