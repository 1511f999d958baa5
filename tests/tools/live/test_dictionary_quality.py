from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exegete.tools.bundled import subject_path, write_corpus
from exegete.tools.bundled.grammar import generate
from exegete.tools.corpus import build_corpus
from exegete.tools.dictionaries import Dictionary, OpaqueDictionary
from exegete.tools.dictionary_quality import CorpusContexts, Quality, dictionary_quality
from exegete.tools.error_regression import ErrorRegression
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.subject import Subject

POINT, WIDTH = "blocks.1.hook_resid_post", 128


@pytest.fixture(scope="module")
def contexts(subject: Subject) -> list[Tokens]:
    live = LiveModel(subject)
    return [live.tokens(example.text) for example in generate(3, 80)]


@pytest.fixture(scope="module")
def packed(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> list[Tokens]:
    """80 documents in contexts of 256 tokens, as the dictionary was trained and measured on."""
    folder = tmp_path_factory.mktemp("quality")
    write_corpus(folder / "text.jsonl", 1, 80)
    return list(CorpusContexts(build_corpus(str(folder / "text.jsonl"), subject, folder / "corpus", seed=0)))


@pytest.fixture(scope="module")
def quality(subject: Subject, dictionary: Dictionary, packed: list[Tokens]) -> Quality:
    return dictionary_quality(LiveModel(subject, [dictionary]), packed)


def made(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor, Tensor | None], Tensor], **changes: Any
) -> OpaqueDictionary:
    options: dict[str, Any] = {"latents": WIDTH} | changes
    return OpaqueDictionary(
        "made", "sha256:made", POINT, WIDTH, device="cpu", dtype="float32", encoder=encode, decoder=decode, **options
    )


def test_the_bundled_dictionary_is_as_its_figures_say(quality: Quality, packed: list[Tokens]) -> None:
    figures = json.loads((subject_path().parent / "figures.json").read_text())["dictionary_tests"]
    assert quality.l0.value == pytest.approx(figures["l0"], abs=0.05)
    assert quality.fvu.value == pytest.approx(figures["fvu"], rel=0.1)
    assert quality.losses.recovered.value == pytest.approx(figures["loss_recovered"], abs=0.001)
    assert quality.losses.clean.value == pytest.approx(figures["loss_subject"], rel=0.1)
    assert quality.losses.zeros.value == pytest.approx(figures["loss_zeros"], rel=0.1)
    # A latent that is rare looks dead on fewer tokens.
    assert figures["dead_share"] <= quality.dead_share < 0.1
    assert quality.dead == round(quality.dead_share * 1_024)
    assert quality.tokens + quality.special_tokens == sum(map(len, packed))
    assert 80 <= quality.special_tokens <= 80 + len(packed)
    assert quality.l0.n == quality.fvu.n == quality.losses.recovered.n == len(packed)
    for one in (quality.fvu, quality.cosine, quality.losses.clean, quality.losses.recovered):
        assert one.low is not None
        assert one.high is not None
        assert one.low < one.value < one.high
    assert quality.losses.clean.value < quality.losses.reconstruction.value < quality.losses.mean.value
    assert quality.losses.recovered_from_mean.value < 1


def test_sums_equal_those_taken_at_once(
    subject: Subject, dictionary: Dictionary, packed: list[Tokens], quality: Quality
) -> None:
    special = torch.tensor(sorted(subject.special_tokens))
    rows = [torch.tensor(tokens) for tokens in packed]
    alone = [subject.residual(row[None], POINT)[0][~torch.isin(row, special)] for row in rows]
    x = torch.cat(alone).double()
    z = dictionary.encode(x.float())
    reconstruction = dictionary.decode(z).double()
    squared, variance = (x - reconstruction).square().sum(1), (x - x.mean(0)).square().sum(1)
    assert quality.fvu.value == pytest.approx(float(squared.sum() / variance.sum()), rel=1e-4)
    assert quality.fvu_per_token.value == pytest.approx(float((squared / variance).mean()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(x, reconstruction).mean()
    assert quality.cosine.value == pytest.approx(float(cosine), rel=1e-6)
    active = (z != 0).sum(1)
    assert quality.l0.value == pytest.approx(float(active.double().mean()), abs=1e-3)
    assert quality.l0_quantiles[0.5] == float(active.median())
    assert quality.dead == int((~(z != 0).any(0)).sum())


def test_the_loss_of_zeros_equals_one_prompt_at_a_time_by_plain_hooks(
    subject: Subject, dictionary: Dictionary, contexts: list[Tokens]
) -> None:
    few = contexts[:3]
    total = count = 0.0
    for tokens in few:

        def zero(vectors: Tensor, hook: Any) -> Tensor:
            return torch.cat([vectors[:, :1], 0 * vectors[:, 1:]], 1)

        with torch.inference_mode():
            logits = subject.bridge.run_with_hooks(
                torch.tensor([tokens]), return_type="logits", fwd_hooks=[(POINT, zero)]
            )
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(tokens[1:]), reduction="sum"))
        count += len(tokens) - 1
    found = dictionary_quality(LiveModel(subject, [dictionary]), few)
    assert found.losses.zeros.value == pytest.approx(total / count, rel=1e-4)
    assert found.losses.predicted_tokens == count
    assert found.error.status == "too few tokens"
    assert found.error.linear is None


def test_batches_and_halving_change_nothing(
    subject: Subject,
    dictionary: Dictionary,
    packed: list[Tokens],
    quality: Quality,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LiveModel(subject, [dictionary], batch_tokens=600)
    whole, calls = model.logits, []

    def small(tokens: Tensor, *arguments: Any, **named: Any) -> Tensor:
        calls.append(len(tokens))
        if len(calls) % 7 == 3 and len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(tokens, *arguments, **named)

    monkeypatch.setattr(model, "logits", small)
    found = dictionary_quality(model, packed)
    assert (found.tokens, found.dead) == (quality.tokens, quality.dead)
    assert found.special_tokens == quality.special_tokens
    assert found.fvu.value == pytest.approx(quality.fvu.value, rel=1e-4)
    assert found.losses.recovered.value == pytest.approx(quality.losses.recovered.value, abs=1e-5)
    assert found.error.linear is not None
    assert quality.error.linear is not None
    assert found.error.linear.value == pytest.approx(quality.error.linear.value, abs=1e-3)


def test_shares_of_the_error_stand_beside_their_floors(quality: Quality) -> None:
    error = quality.error
    assert error.status == "ok"
    assert error.fitted_tokens + error.held_out_tokens == quality.tokens
    assert error.linear and error.non_linear and error.linear_floor and error.fvu_non_linear
    assert error.squared_norm and error.squared_norm_floor
    assert error.linear.value + error.non_linear.value == pytest.approx(1)
    assert abs(error.linear_floor.value) < 0.02
    assert abs(error.squared_norm_floor.value) < 0.02
    # On so few tokens nothing of the error vector is found to be linear; of its squared norm almost half is.
    assert abs(error.linear.value) < 0.05
    assert error.squared_norm.low is not None
    assert 0.1 < error.squared_norm.low < error.squared_norm.value < 1
    assert error.ridge is not None
    assert error.fvu_non_linear.value < quality.fvu.value * 1.2


def test_an_error_that_is_linear_is_found_to_be() -> None:
    # The error is x @ map: 100 %. Plus noise of as much variance: 50 %. Noise alone: 0 %.
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(6_000, 8, generator=noise)
    linear = x @ torch.randn(8, 3, generator=noise)
    linear = (linear - linear.mean(0)) / linear.std(0)
    other = torch.randn(6_000, 3, generator=noise)
    for error, wanted in ((linear, 1.0), (linear + other, 0.5), (other, 0.0)):
        regression = ErrorRegression(torch.zeros(8), 3)
        for start in range(0, 4_000, 50):
            regression.add(x[start : start + 50], error[start : start + 50])
        fitted = regression.fit()
        squares = fitted.squares(x[4_000:], error[4_000:])
        residual, deviation = squares["error"]
        assert 1 - residual / deviation == pytest.approx(wanted, abs=0.03)
        residual, deviation = squares["error_floor"]
        assert abs(1 - residual / deviation) < 0.03


def test_inputs_of_less_than_full_rank_can_be_fitted() -> None:
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0)).expand(100, 4)
    regression = ErrorRegression(torch.zeros(4), 1)
    regression.add(x, 3 * x[:, :1] + 1)
    residual, deviation = regression.fit().squares(x, 3 * x[:, :1] + 1)["error"]
    assert residual < 1e-9 * deviation


def test_a_perfect_dictionary_recovers_everything(subject: Subject, contexts: list[Tokens]) -> None:
    model = LiveModel(subject, [made(lambda x: x, lambda z, given: z)])
    found = dictionary_quality(model, contexts[:20])
    assert found.fvu.value == 0
    assert found.cosine.value == pytest.approx(1)
    assert found.losses.recovered.value == pytest.approx(1, abs=1e-6)
    assert found.losses.reconstruction.value == pytest.approx(found.losses.clean.value, abs=1e-6)
    assert found.l0.value == WIDTH
    assert found.dead == 0
    assert found.error.status == "no error"
    assert found.error.linear is None


def test_half_of_the_vector_is_a_quarter_of_the_variance_unexplained(subject: Subject, contexts: list[Tokens]) -> None:
    # decode(z) = mean + (x − mean)/2 leaves (x − mean)/2: FVU 1/4, all of it linear.
    x = torch.cat([subject.residual(torch.tensor([tokens]), POINT)[0, 1:] for tokens in contexts])
    mean = x.mean(0)
    model = LiveModel(subject, [made(lambda x: x, lambda z, given: mean + (z - mean) / 2)])
    found = dictionary_quality(model, contexts)
    assert found.fvu.value == pytest.approx(0.25, abs=1e-5)
    assert found.fvu_per_token.value == pytest.approx(0.25, abs=1e-5)
    assert found.error.linear is not None
    assert found.error.linear.value == pytest.approx(1, abs=1e-6)


def test_a_non_linear_decoder(subject: Subject, dictionary: Dictionary, contexts: list[Tokens]) -> None:
    squared = made(
        lambda x: dictionary.encode(x).square(),
        lambda z, given: dictionary.decode(z.sqrt()),
        latents=dictionary.latents,
    )
    found, wanted = (dictionary_quality(LiveModel(subject, [one]), contexts[:30]) for one in (squared, dictionary))
    assert found.fvu.value == pytest.approx(wanted.fvu.value, rel=1e-3)
    assert found.losses.recovered.value == pytest.approx(wanted.losses.recovered.value, abs=1e-4)


def test_a_conditioned_dictionary_is_given_whole_contexts(subject: Subject, contexts: list[Tokens]) -> None:
    # The code is the difference from the vector before; the decoder adds that one again.
    def before(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    def decode(z: Tensor, given: Tensor | None) -> Tensor:
        assert given is not None
        return z + before(given)

    one = made(lambda x: x - before(x), decode, conditioned=True)
    found = dictionary_quality(LiveModel(subject, [one]), contexts[:20])
    assert found.fvu.value < 1e-10
    assert found.losses.recovered.value == pytest.approx(1, abs=1e-5)


def test_a_transcoder_is_compared_with_what_it_predicts(subject: Subject, contexts: list[Tokens]) -> None:
    mlp = subject.bridge.blocks[2].mlp
    point, output = "blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out"
    one = OpaqueDictionary(
        "mlp", "sha256:mlp", point, WIDTH, WIDTH, "cpu", "float32", lambda x: x, lambda z, given: mlp(z), output=output
    )
    with torch.inference_mode():
        found = dictionary_quality(LiveModel(subject, [one]), contexts[:20])
    assert found.fvu.value < 1e-8
    assert found.losses.recovered.value == pytest.approx(1, abs=1e-3)
    assert found.losses.zeros.value > found.losses.clean.value + 0.01


def test_contexts_of_a_corpus(tmp_path: Path, subject: Subject, dictionary: Dictionary) -> None:
    write_corpus(tmp_path / "text.jsonl", 1, 60)
    corpus = build_corpus(str(tmp_path / "text.jsonl"), subject, tmp_path / "corpus", seed=0)
    contexts = CorpusContexts(corpus)
    assert len(contexts) == corpus.contexts
    assert sum(map(len, contexts)) == corpus.counts["tokens"]
    found = dictionary_quality(LiveModel(subject, [dictionary]), contexts)
    assert found.tokens == int(corpus.mask(0, corpus.contexts).sum())
    assert 0.005 < found.fvu.value < 0.011
    assert list(CorpusContexts(corpus, 1, 3)) == [contexts[1], contexts[2]]
    assert contexts[0] == tuple(corpus.tokens(0, 1)[0][: len(contexts[0])].tolist())
    with pytest.raises(IndexError):
        contexts[len(contexts)]


def test_bad_input_is_refused(subject: Subject, dictionary: Dictionary, contexts: list[Tokens]) -> None:
    model = LiveModel(subject, [dictionary])
    assert subject.bos is not None
    for wrong, said in (
        ([], "no context"),
        ([(subject.bos,)], "special tokens only"),
        ([contexts[0][1:2]], "all the same"),
        ([contexts[0] * 20], "shorten it"),
    ):
        with pytest.raises(UserError, match=said):
            dictionary_quality(model, wrong)
    with pytest.raises(UserError, match="fits 0 dictionaries"):
        dictionary_quality(model, contexts, "other")
    broken = LiveModel(subject, [made(lambda x: x, lambda z, given: z / 0)])
    with pytest.raises(UserError, match="not all finite"):
        dictionary_quality(broken, contexts[:2])


def test_which_contexts_are_fitted_depends_on_the_seed_alone(
    subject: Subject, dictionary: Dictionary, contexts: list[Tokens]
) -> None:
    model = LiveModel(subject, [dictionary])
    tokens = [dictionary_quality(model, contexts[:40], seed=seed).error.fitted_tokens for seed in (0, 0, 1)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert np.isclose(tokens[0], sum(map(len, contexts[:40])) / 2, rtol=0.2)
    assert model.run([Trial(contexts[0])], lambda reading: [True]) == [True]
