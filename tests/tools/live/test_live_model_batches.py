"""Padded batches of the live model against single runs, what is read of them and kept, hooks, and memory."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, WIDTH, Device, decoder_layers, tiny_subject
from torch import Tensor

from exegete.tools.codes import codes
from exegete.tools.errors import UserError
from exegete.tools.interventions import LatentEdit, ablate, push, scale
from exegete.tools.live_model import LiveModel, Reading, Trial

from .live_trials import LATENTS, MID, OTHER, POST, POST_0, PROMPTS, all_logits, coder, firing, last_logits, mixed


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
