"""The live model against plain transformers with plain hooks, padded batches against single runs, and bad input."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT, FAMILIES, VOCABULARY, WIDTH, Device, bare, decoder_layers, prompt, tiny_subject
from torch import Tensor, nn

from exegete.tools.codes import codes
from exegete.tools.dictionaries import Dictionary, PlainDictionary, random_dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import (
    CLEAN,
    Intervention,
    LatentEdit,
    ablate,
    clamp,
    patch,
    project_out,
    push,
    scale,
    steer,
)
from exegete.tools.live_model import LiveModel, Reading, Trial

LATENTS = 64
POST, PRE, MID = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_mid"
ATTENTION, Z, MLP = "blocks.1.hook_attn_out", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"
NORMALIZED, POST_0 = "blocks.1.ln1.hook_normalized", "blocks.0.hook_resid_post"
PROMPTS = [prompt(length, seed=length) for length in (3, 9, 17, 30)]
OTHER = prompt(12, seed=99)


@cache
def coder(family: str, point: str, activation: Any = "jumprelu", seed: int = 0) -> PlainDictionary:
    return random_dictionary(tiny_subject(family), point, LATENTS, activation, k=12, seed=seed)


def last_logits(model: LiveModel, trials: list[Trial]) -> Tensor:
    return torch.stack(model.run(trials, lambda reading: list(reading.logits)))


def all_logits(model: LiveModel, trial: Trial) -> Tensor:
    logits: Tensor = model.run([trial], lambda reading: list(reading.logits), keep="all")[0]
    return logits


def firing(family: str, d: PlainDictionary, tokens: tuple[int, ...]) -> list[int]:
    """Return latents that fire on the last token, most active first, and on other tokens, so that edits of them matter."""
    z = d.encode(tiny_subject(family).residual(torch.tensor([tokens]), d.hook_point)[0])
    score = (z > 0).float().mean(0) + 2 * (z[-1] > 0)
    return [int(latent) for latent in score.topk(8).indices]


# Independent of everything under test: a bare transformers model and PyTorch's own hooks.


@contextmanager
def plain_hook(model: Any, point: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    layer: Any = decoder_layers(model)[int(point.split(".")[1])]
    name = point.split(".", 2)[2]
    attention: Any = next(part for key, part in layer.named_children() if "attn" in key or key == "attention")
    post_norm = hasattr(layer, "pre_feedforward_layernorm")

    def after(module: nn.Module, arguments: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def before(module: nn.Module, arguments: Any, named: Any) -> Any:
        if arguments:
            return (change(arguments[0]), *arguments[1:]), named
        return arguments, named | {"hidden_states": change(named["hidden_states"])}

    if name == "hook_resid_post":
        handle = layer.register_forward_hook(after)
    elif name == "hook_resid_pre":
        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    elif name == "hook_attn_out":
        handle = (layer.post_attention_layernorm if post_norm else attention).register_forward_hook(after)
    elif name == "hook_mlp_out":
        handle = (layer.post_feedforward_layernorm if post_norm else layer.mlp).register_forward_hook(after)
    else:
        projection = next(part for key, part in attention.named_children() if key in ("o_proj", "c_proj", "dense"))
        handle = projection.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def plain_logits(family: str, tokens: tuple[int, ...], point: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    model = bare(family)
    with torch.no_grad(), plain_hook(model, point, change):
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def plain_vectors(family: str, tokens: tuple[int, ...], point: str) -> Tensor:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    plain_logits(family, tokens, point, keep)
    return kept[0][0]


def plain_code(d: PlainDictionary, x: Tensor) -> Tensor:
    assert d.threshold is not None and d.input_shift is not None
    before = (x - d.input_shift) @ d.encoder + d.encoder_bias
    return torch.where(before > d.threshold, before.clamp(min=0), torch.zeros_like(before))


def plain_edit(d: PlainDictionary, at: list[int], edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return x ↦ x + (decode(z') − decode(z)) at some positions; `edit` takes and returns codes there."""

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        for position in at:
            z = plain_code(d, x[0, position])
            new[0, position] = x[0, position] + (edit(z.clone()) @ d.decoder - z @ d.decoder)
        return new

    return change


def at_columns(columns: list[int], value: Callable[[Tensor], Tensor | float]) -> Callable[[Tensor], Tensor]:
    def edit(z: Tensor) -> Tensor:
        z[columns] = torch.as_tensor(value(z[columns]))
        return z

    return edit


@dataclass(frozen=True)
class Case:
    intervention: Callable[[str, list[int]], Intervention]
    positions: Callable[[int], list[int]]
    edit: Callable[[list[int]], Callable[[Tensor], Tensor]]


CASES = {
    "ablate one, all": Case(
        lambda d, k: ablate(d, k[:1]), lambda n: list(range(n)), lambda k: at_columns(k[:1], lambda z: 0.0)
    ),
    "ablate a set, all": Case(lambda d, k: ablate(d, k), lambda n: list(range(n)), lambda k: at_columns(k, lambda z: 0.0)),
    "ablate a set, last": Case(lambda d, k: ablate(d, k, "last"), lambda n: [n - 1], lambda k: at_columns(k, lambda z: 0.0)),
    "ablate a set, numbered": Case(
        lambda d, k: ablate(d, k, (0, 4, -1, -2)), lambda n: [0, 4, n - 2, n - 1], lambda k: at_columns(k, lambda z: 0.0)
    ),
    "mean": Case(
        lambda d, k: ablate(d, k[:2], means=[0.5, 1.5]),
        lambda n: list(range(n)),
        lambda k: at_columns(k[:2], lambda z: torch.tensor([0.5, 1.5])),
    ),
    "steer": Case(
        lambda d, k: steer(d, k[:2], [3.0, -1.0]), lambda n: [n - 1], lambda k: at_columns(k[:2], lambda z: z + torch.tensor([3.0, -1.0]))
    ),
    "scale": Case(lambda d, k: scale(d, k[:3], 2.5), lambda n: list(range(n)), lambda k: at_columns(k[:3], lambda z: 2.5 * z)),
    "clamp": Case(lambda d, k: clamp(d, k[:3], 4.0, (2,)), lambda n: [2], lambda k: at_columns(k[:3], lambda z: 4.0)),
    "two edits, in order": Case(
        lambda d, k: ablate(d, k[:2]) + steer(d, k[1:3], 2.0, "all"),
        lambda n: list(range(n)),
        lambda k: lambda z: at_columns(k[1:3], lambda z: z + 2.0)(at_columns(k[:2], lambda z: 0.0)(z)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_it_equals_plain_hooks_on_the_bare_model(family: str, name: str) -> None:
    case, tokens, d = CASES[name], PROMPTS[2], coder(family, POST)
    latents = firing(family, d, tokens)
    change = plain_edit(d, case.positions(len(tokens)), case.edit(latents))
    expected = plain_logits(family, tokens, POST, change)
    found = all_logits(LiveModel(tiny_subject(family), [d]), Trial(tokens, case.intervention(d.fingerprint, latents)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - plain_logits(family, tokens, POST, lambda x: x)).abs().max() > 0.01


@pytest.mark.parametrize("point", [PRE, ATTENTION, Z, MLP])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_plain_hooks_at_other_points(family: str, point: str) -> None:
    tokens, d = PROMPTS[2], coder(family, point)
    latents = firing(family, d, tokens)
    expected = plain_logits(
        family, tokens, point, plain_edit(d, list(range(17)), CASES["ablate a set, all"].edit(latents))
    )
    model = LiveModel(tiny_subject(family), [d])
    found = all_logits(model, Trial(tokens, ablate(d.fingerprint, latents)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    vector = torch.linspace(-1, 1, WIDTH)
    pushed = all_logits(model, Trial(tokens, push(point, vector.tolist(), 1.5, "all")))
    torch.testing.assert_close(
        pushed, plain_logits(family, tokens, point, lambda x: x + 1.5 * vector), atol=1e-4, rtol=0
    )
    unit = vector / vector.norm()
    without = all_logits(model, Trial(tokens, project_out(point, vector.tolist())))
    expected = plain_logits(family, tokens, point, lambda x: x - (x @ unit)[..., None] * unit)
    torch.testing.assert_close(without, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_change_between_attention_and_mlp_reaches_the_residual_too(family: str) -> None:
    """The bridge's hook there changes what the mlp reads, and not the residual around it."""
    model, vector, tokens = bare(family), torch.linspace(-2, 1, WIDTH), PROMPTS[2]
    # What attention writes is added to the residual: a vector added to both is the same.
    expected = plain_logits(family, tokens, ATTENTION, lambda x: x + 0.7 * vector)
    live = LiveModel(tiny_subject(family))
    found = all_logits(live, Trial(tokens, push(MID, vector.tolist(), 0.7, "all")))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - model(torch.tensor([tokens])).logits[0]).abs().max() > 0.1
    both = (
        push(MID, vector.tolist(), 0.3, "all")
        + push(POST, vector.tolist(), -1.0)
        + push(MID, vector.tolist(), 0.4, "all")
    )
    reading = live.run([Trial(tokens, both)], lambda r: [(r.logits[0], r.of(POST, 0))], points=[POST])[0]
    one_by_one = live.run(
        [Trial(tokens, push(ATTENTION, vector.tolist(), 0.7, "all") + push(POST, vector.tolist(), -1.0))],
        lambda r: [(r.logits[0], r.of(POST, 0))],
        points=[POST],
    )[0]
    torch.testing.assert_close(reading, one_by_one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_gives_the_activations_of_the_other_prompt(family: str) -> None:
    d, tokens = coder(family, POST), PROMPTS[2]
    latents = firing(family, d, OTHER)
    z = plain_code(d, plain_vectors(family, OTHER, POST))

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        for back in range(1, len(OTHER) + 1):
            here = plain_code(d, x[0, -back])
            there = at_columns(latents, lambda _, back=back: z[-back, latents])(here.clone())  # type: ignore[misc]
            new[0, -back] = x[0, -back] + (there - here) @ d.decoder
        return new

    found = all_logits(LiveModel(tiny_subject(family), [d]), Trial(tokens, patch(d.fingerprint, latents, OTHER)))
    torch.testing.assert_close(found, plain_logits(family, tokens, POST, change), atol=1e-4, rtol=0)


def nulls(d: Dictionary, tokens: tuple[int, ...]) -> list[Intervention]:
    every = list(range(d.latents))
    fingerprint = d.fingerprint
    return [
        steer(fingerprint, every, 0.0, "all"),
        scale(fingerprint, every, 1.0),
        patch(fingerprint, every, tokens),
        push(d.hook_point, [1.0] * d.width, 0.0, "all"),
        Intervention(),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_null_intervention_changes_nothing_at_any_point(family: str) -> None:
    subject = tiny_subject(family)
    clean = last_logits(LiveModel(subject), [Trial(tokens) for tokens in PROMPTS])
    for point in (POST, PRE, MID, ATTENTION, Z, MLP, NORMALIZED):
        if point not in subject.hook_points:
            assert family == "gpt_neox" and point == MID  # attention and mlp side by side
            continue
        d = coder(family, point)
        model = LiveModel(subject, [d])
        for number in range(5):
            trials = [Trial(tokens, nulls(d, tokens)[number]) for tokens in PROMPTS]
            assert (last_logits(model, trials) - clean).abs().max() <= 1e-5, (point, number)


def mixed(family: str) -> tuple[LiveModel, list[Trial]]:
    """Return trials of every kind on prompts of every length."""
    first, second = coder(family, POST), coder(family, POST_0, "topk")
    same = coder(family, POST, seed=1)
    model = LiveModel(tiny_subject(family), [first, second, same])
    f, s, o = first.fingerprint, second.fingerprint, same.fingerprint
    k = firing(family, first, PROMPTS[2])
    vector = torch.linspace(-1, 1, WIDTH).tolist()
    interventions = [
        CLEAN,
        ablate(f, k),
        ablate(f, k[:1], "last") + steer(s, [1, 2], 3.0),
        steer(o, k[:2], 1.0, "all") + ablate(f, k),
        ablate(f, k) + steer(o, k[:2], 1.0, "all"),
        clamp(s, k[:3], [1.0, 2.0, 3.0], (0, -1)) + push(POST, vector, 2.0),
        push(POST, vector, 2.0, "all") + ablate(f, range(LATENTS)) + push(POST, vector, -1.0, "all"),
        project_out(POST, vector) + scale(f, k, 3.0, (1,)) + push(POST, vector, 1.0, (0,)),
        ablate(f, range(LATENTS), texts=[OTHER, PROMPTS[1]], seed=4),
        ablate(s, k, texts=[PROMPTS[3]], seed=5) + patch(f, k, OTHER),
        patch(f, range(LATENTS), prompt(5, seed=98)),
        ablate(s, k, means=[0.5] * len(k)) + steer(s, k[:1], 2.0),
    ]
    return model, [Trial(tokens, one) for tokens in PROMPTS for one in interventions]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_single_runs(family: str) -> None:
    model, trials = mixed(family)
    d = coder(family, POST)
    assert d.threshold is not None

    def read(reading: Reading) -> list[tuple[Tensor, Tensor]]:
        return [(reading.logits[row], reading.of(POST, row)) for row in range(len(reading.batch.trials))]

    batched = model.run(trials, read, points=[POST])
    alone = LiveModel(model.subject, list(model.dictionaries.values()), batch_tokens=1).run(trials, read, points=[POST])
    back = model.run(trials[::-1], read, points=[POST])[::-1]
    clean = [found[0] for found in alone[:: len(trials) // len(PROMPTS)]]
    for index, (one, other, turned) in enumerate(zip(batched, alone, back, strict=True)):
        torch.testing.assert_close(one[0], other[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(one[0], turned[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(one[1], other[1], atol=1e-4, rtol=0)
        before = [d.preactivations(vectors) for _, vectors in (one, other)]
        differ = (before[0] > d.threshold) != (before[1] > d.threshold)
        assert bool(((before[1] - d.threshold).abs()[differ] < 1e-5).all())
        if index % (len(trials) // len(PROMPTS)):
            assert (other[0] - clean[index // (len(trials) // len(PROMPTS))]).abs().max() > 1e-3, index


def test_edits_at_one_point_are_made_in_the_order_of_their_intervention() -> None:
    """Also where another trial of the batch makes them the other way round, or calls the point by another name."""
    one, other = coder("llama", POST), coder("llama", POST, seed=1)
    subject = tiny_subject("llama")
    tokens = PROMPTS[2]
    vector = (3 * torch.linspace(-1, 1, WIDTH)).tolist()
    alias = POST.replace("hook_resid_post", "hook_out")
    assert subject.bridge.hook_dict[alias] is subject.bridge.hook_dict[POST]
    first, second = ablate(one.fingerprint, range(LATENTS)), push(alias, vector, 1.0, "all")
    third = scale(other.fingerprint, range(LATENTS), 2.0)
    orders = [first + second + third, third + second + first, second + first + third, first + third + second]

    def made(x: Tensor, order: Intervention) -> Tensor:
        for edit in order.edits:
            if not isinstance(edit, LatentEdit):
                x = x + torch.tensor(vector)
            elif edit.operation == "zero":
                x = x - plain_code(one, x) @ one.decoder
            else:
                x = x + plain_code(other, x) @ other.decoder
        return x

    expected = torch.stack([plain_logits("llama", tokens, POST, lambda x, o=o: made(x, o))[-1] for o in orders])  # type: ignore[misc]
    found = last_logits(LiveModel(subject, [one, other]), [Trial(tokens, order) for order in orders])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert all((found[i] - found[j]).abs().max() > 0.01 for i in range(4) for j in range(i))


def test_resampling_draws_whole_tokens_and_depends_on_the_prompt_alone() -> None:
    d, subject = coder("llama", POST), tiny_subject("llama")
    model = LiveModel(subject, [d])
    source = d.encode(torch.cat([subject.residual(torch.tensor([text]), POST)[0] for text in (OTHER, PROMPTS[1])]))

    def drawn(seed: int) -> Tensor:
        trial = Trial(PROMPTS[2], ablate(d.fingerprint, range(LATENTS), texts=[OTHER, PROMPTS[1]], seed=seed))
        read = lambda r: [r.of(POST, 0)]  # noqa: E731
        with torch.inference_mode():
            clean, changed = (
                model.run([Trial(PROMPTS[2])], read, points=[POST]),
                model.run([trial], read, points=[POST]),
            )
            error = clean[0] - d.decode(d.encode(clean[0]))
            decoded: Tensor = changed[0] - error  # = decode(z'), z' one of the source's
        return decoded

    tokens = torch.cdist(drawn(0), d.decode(source)).min(1)
    assert tokens.values.max() < 1e-3 and len(set(tokens.indices.tolist())) > 5
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_only_special_tokens_give_nothing_to_draw_from() -> None:
    d = coder("llama", POST)
    model = LiveModel(tiny_subject("llama"), [d])
    with pytest.raises(UserError, match="special tokens only"):
        last_logits(model, [Trial(PROMPTS[0], ablate(d.fingerprint, [1], texts=[(0, 0)]))])


def test_sources_are_read_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    d = coder("llama", POST)
    model = LiveModel(tiny_subject("llama"), [d])
    resampled = LatentEdit(d.fingerprint, (1, 2), "resample", (), "all", (OTHER,))
    edits = [replace(resampled, seed=seed) for seed in range(5)]
    edits.append(replace(resampled, positions="last", dictionary=d.name))
    with torch.inference_mode():
        found = [model.source_codes(edit) for edit in edits]
    assert all(one is found[0] for one in found) and not found[0].is_inference()
    expected = d.encode(tiny_subject("llama").residual(torch.tensor([OTHER]), POST)[0])[:, [1, 2]]
    torch.testing.assert_close(found[0], expected.clone(), atol=1e-4, rtol=0)
    monkeypatch.setattr("exegete.tools.live_model._SOURCES_KEPT", 60)
    model = LiveModel(tiny_subject("llama"), [d])
    ran = torch.zeros(())

    def count(x: Tensor) -> None:
        ran.add_(1)

    with model.hooked("hook_embed", count):
        for latent in (1, 2, 3, 4, 5, 6, 7, 7, 1):
            source = replace(resampled, latents=(latent,))
            torch.testing.assert_close(
                model.source_codes(source),
                d.encode(tiny_subject("llama").residual(torch.tensor([OTHER]), POST)[0])[:, [latent]].clone(),
                atol=1e-4,
                rtol=0,
            )
    assert float(ran) == 8  # The 7 was kept; there was no room for the 1.


def hooks(model: LiveModel) -> int:
    points = model.subject.bridge.hook_dict.values()
    return sum(len(point._forward_hooks) for point in points) + sum(len(point.fwd_hooks) for point in points)


def test_no_hook_is_left_behind() -> None:
    model, trials = mixed("llama")
    before = hooks(model)

    def fail(reading: Reading) -> list[int]:
        raise KeyError("the caller's own")

    last_logits(model, trials[:6])
    model.run(trials[:6], lambda r: [0] * len(r.batch.trials), keep="none", points=[POST_0, POST_0])
    with pytest.raises(KeyError):
        model.run(trials[:6], fail)
    with pytest.raises(ZeroDivisionError), model.hooked(MID, lambda x: x / (1 // 0)):
        model.run(trials[:1], lambda r: list(r.logits))
    with pytest.raises(RuntimeError, match="in the middle"), model.editing(model.pad(trials[:6])):
        raise RuntimeError("in the middle")
    assert hooks(model) == before


def test_two_live_models_of_one_subject_do_not_see_each_others_hooks() -> None:
    model, trials = mixed("gpt2")
    quiet = LiveModel(model.subject)
    clean = last_logits(quiet, [Trial(PROMPTS[2])])
    found: list[Tensor] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            found.append(last_logits(quiet, [Trial(PROMPTS[2])]))
            found.append(model.subject.logits(torch.tensor([PROMPTS[2]]))[:, -1])

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(5):
        last_logits(model, trials[24:36])
    done.set()
    thread.join()
    assert len(found) >= 2 and all((logits - clean).abs().max() < 1e-4 for logits in found)


def test_what_is_read_is_what_was_changed() -> None:
    """`keep` and `points`: shapes, stopping early, vectors after the edits there."""
    d, subject = coder("gpt2", POST), tiny_subject("gpt2")
    model = LiveModel(subject, [d])
    trial = Trial(PROMPTS[1], push(POST, [1.0] * WIDTH, 2.0, "last"))
    ran: list[int] = []
    count = decoder_layers(subject.bridge.original_model)[2].register_forward_hook(lambda *_: ran.append(2))
    none = model.run([trial], lambda r: [(r.logits, r.of(POST, 0))], keep="none", points=[POST])[0]
    count.remove()
    assert not ran and none[0].shape == (0,)
    expected = subject.residual(torch.tensor([PROMPTS[1]]), POST)[0].clone()
    expected[-1] += 2.0
    torch.testing.assert_close(none[1].clone(), expected, atol=1e-4, rtol=0)
    every = all_logits(model, trial)
    assert every.shape == (9, VOCABULARY) and every.dtype == torch.float32
    torch.testing.assert_close(last_logits(model, [trial])[0], every[-1], atol=1e-5, rtol=0)


def test_gradients_flow_through_edits_and_sources() -> None:
    d, subject = coder("llama", POST), tiny_subject("llama")
    model = LiveModel(subject, [d])
    k = firing("llama", d, PROMPTS[2])
    resampled = ablate(d.fingerprint, k, texts=[OTHER]) + scale(d.fingerprint, k, 0.5)
    last_logits(model, [Trial(PROMPTS[2], resampled)])  # The sources are read in inference mode.
    leaf: list[Tensor] = []

    def begin(x: Tensor) -> Tensor:
        leaf.append(x.detach().requires_grad_(True))
        return leaf[0]

    batch = model.pad([Trial(PROMPTS[2], resampled), Trial(PROMPTS[1], ablate(d.fingerprint, k))])
    with torch.enable_grad(), model.hooked(POST_0, begin), model.editing(batch):
        logits = model.logits(batch.tokens, batch.mask, last=True)
        (gradient,) = torch.autograd.grad(logits[:, 5].sum(), leaf)
    assert gradient.abs().sum() > 0 and bool(gradient.isfinite().all())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision(family: str) -> None:
    """Null edits are exact; real ones come as near to those in float32 as the model itself does."""
    half = tiny_subject(family, dtype=torch.bfloat16)
    d = random_dictionary(half, POST, LATENTS, "jumprelu", k=12)
    model = LiveModel(half, [d])
    trials = [Trial(tokens) for tokens in PROMPTS]
    clean = last_logits(model, trials)
    for number in (0, 1, 3, 4):
        edited = [Trial(tokens, nulls(d, tokens)[number]) for tokens in PROMPTS]
        assert torch.equal(last_logits(model, edited), clean)
    exact = LiveModel(tiny_subject(family))
    away = (last_logits(exact, trials) - clean).abs().max()
    out = [Trial(tokens, project_out(POST, [1.0, 2.0] * (WIDTH // 2))) for tokens in PROMPTS]
    assert (last_logits(exact, out) - last_logits(model, out)).abs().max() < 3 * away + 0.05


# What a user can get wrong.


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


# Memory.


@pytest.mark.parametrize("error", [None, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_halves_the_batch_and_says_so(error: Exception | None, caplog: pytest.LogCaptureFixture) -> None:
    model, trials = mixed("llama")
    expected = last_logits(model, trials)
    device = Device(model, room=7, error=error)
    with caplog.at_level(logging.WARNING, logger="exegete.tools.live_model"):
        found = last_logits(model, trials)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert "out of memory with 48 prompts at once; going on with 24" in caplog.text
    assert device.rows[:4] == [48, 24, 12, 6] and model.batch_tokens < 4_096
    device.rows.clear()
    last_logits(model, trials)
    assert device.rows[0] <= 12  # It does not try as much again.


def test_one_prompt_that_does_not_fit_is_said() -> None:
    model, trials = mixed("llama")
    Device(model, room=0)
    with pytest.raises(UserError, match=r"a prompt of 3 tokens does not fit the memory of cpu .CUDA out of memory"):
        last_logits(model, trials[:2])
    Device(model, room=0, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        last_logits(model, trials[:2])


def test_codes_are_the_columns_of_the_dense_code() -> None:
    latents = torch.tensor([5, 1, 33])
    x = tiny_subject("llama").residual(torch.tensor([PROMPTS[3]]), POST)[0]
    for activation in ("relu", "jumprelu", "topk"):
        d = coder("llama", POST, activation)
        torch.testing.assert_close(codes(d, x, latents), d.encode(x)[:, latents], atol=1e-6, rtol=0)
        assert codes(d, x[:0], latents).shape == (0, 3)
