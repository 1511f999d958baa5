"""One contract for every dictionary: those that the installed SAELens can construct, and those of one's own.

What an edit adds must be `decode(z') − decode(z)`, worked out here with the library itself on vectors that plain runs give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WIDTH, prompt, tiny_subject
from torch import Tensor, nn

from exegete.tools.dictionaries import Dictionary, PlainDictionary, opaque_dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.interventions import Intervention, ablate, clamp, patch, push, scale, steer
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.subject import Subject

LATENTS = 96
POST, Z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
IN, OUT = "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"
PROMPTS = [prompt(length, seed=length) for length in (4, 11, 19)]
ACROSS: dict[str, Any] = {"apply_b_dec_to_input": False, "d_out": WIDTH}
TEMPORAL = {"kval_topk": 8, "n_heads": 4, "bottleneck_factor": 8, "activation_normalization_factor": 0.7}


@dataclass(frozen=True)
class Made:
    """A dictionary as the library has it."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]
    """Of a code, and the input that it is of."""
    linear: bool = True
    plain: bool = False


@dataclass(frozen=True)
class Kind:
    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    point: str = POST
    training: bool = False

    @property
    def scaled(self) -> bool:
        """Whether each token is scaled by its own norm, which the decoder undoes."""
        return self.options.get("normalize_activations") in ("layer_norm", "constant_norm_rescale")


KINDS = {
    "standard": Kind("standard"),
    "standard, hook_z": Kind("standard", {"reshape_activations": "hook_z"}, Z),
    "standard, layer norm": Kind("standard", {"normalize_activations": "layer_norm"}),
    "gated": Kind("gated"),
    "gated, hook_z": Kind("gated", {"reshape_activations": "hook_z"}, Z),
    "topk": Kind("topk", {"k": 7}),
    "topk, decoder norm": Kind("topk", {"k": 7, "rescale_acts_by_decoder_norm": True}),
    "topk, constant norm": Kind("topk", {"k": 7, "normalize_activations": "constant_norm_rescale"}),
    "abstopk": Kind("abstopk", {"k": 7}),
    "abstopk, decoder norm": Kind("abstopk", {"k": 7, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": Kind("jumprelu"),
    "transcoder": Kind("transcoder", ACROSS, IN),
    "skip_transcoder": Kind("skip_transcoder", ACROSS, IN),
    "jumprelu_transcoder": Kind("jumprelu_transcoder", ACROSS, IN),
    "jumprelu_skip_transcoder": Kind("jumprelu_skip_transcoder", ACROSS, IN),
    "temporal": Kind("temporal", TEMPORAL | {"normalize_activations": "constant_scalar_rescale"}),
    "matching_pursuit": Kind("matching_pursuit", {"max_iterations": 9, "residual_threshold": 1.0}),
    "trained standard": Kind("standard", training=True),
    "trained gated": Kind("gated", training=True),
    "trained topk": Kind("topk", {"k": 7}, training=True),
    "trained abstopk": Kind("abstopk", {"k": 7}, training=True),
    "trained jumprelu": Kind("jumprelu", training=True),
    "trained batchtopk": Kind("batchtopk", {"k": 5}, training=True),
    "trained matryoshka": Kind("matryoshka_batchtopk", {"k": 5, "matryoshka_widths": [32, LATENTS]}, training=True),
    "trained matching_pursuit": Kind(
        "matching_pursuit", {"max_iterations": 9, "residual_threshold": 1.0}, training=True
    ),
}


def test_every_architecture_of_the_library_is_tried() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    assert {kind.architecture for kind in KINDS.values() if not kind.training} == set(SAE_CLASS_REGISTRY)
    assert {kind.architecture for kind in KINDS.values() if kind.training} == set(SAE_TRAINING_CLASS_REGISTRY)


def construct(kind: Kind) -> Any:
    """Return a SAELens dictionary whose every parameter is random, so that nothing passes by being zero."""
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, configuration = (get_sae_training_class if kind.training else get_sae_class)(kind.architecture)
    metadata = SAEMetadata(hook_name=kind.point, **({"hook_name_out": OUT} if kind.point == IN else {}))
    sae = sae_class(configuration(d_in=WIDTH, d_sae=LATENTS, metadata=metadata, **kind.options))
    source = torch.Generator().manual_seed(3)
    for name, value in sae.named_parameters():
        value.data = torch.randn(value.shape, generator=source) * (0.3 if value.dim() == 1 else 0.15)
        if "threshold" in name:
            value.data = value.data.abs() - (3 if "log" in name else 0)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.6)
    return sae


def saelens(kind: Kind, folder: Path, subject: Subject) -> tuple[Dictionary, Made]:
    from sae_lens import SAE

    sae = construct(kind)
    (sae.save_inference_model if kind.training else sae.save_model)(folder)
    dictionary = load_dictionary(str(folder), subject)
    library: Any = SAE.load_from_disk(folder)
    heads = kind.options.get("reshape_activations") == "hook_z"

    def encode(x: Tensor) -> Tensor:
        z: Tensor = library.encode(x.reshape(*x.shape[:-1], 4, -1) if heads else x)
        return z

    def decode(z: Tensor, given: Tensor) -> Tensor:
        encode(given)  # The library keeps what it scaled this input by, and how many heads it has.
        decoded: Tensor = library.decode(z)
        if hasattr(library, "W_skip"):
            decoded = decoded + given @ library.W_skip.T
        return decoded.flatten(-2) if heads else decoded

    return dictionary, Made(encode, decode, linear=not kind.scaled)


class Bent(nn.Module):
    """Signed codes, a varying number of them, and a decoder that is no linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(WIDTH, LATENTS, generator=torch.Generator().manual_seed(5)) * 0.3)

    def encode(self, x: Tensor) -> Tensor:
        z = x @ self.weights
        return z * (z.abs() > 1.5 + x.mean(-1, keepdim=True))

    def decode(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.weights.T)


class Conditioned(Bent):
    """A code depends on all earlier vectors of its context, and the decoder on the input."""

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1)[:, None])

    def decode(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        assert given is not None
        return super().decode(z) * (1 + given.abs()) + given.roll(1, -2)


def own(name: str, subject: Subject) -> tuple[Dictionary, Made]:
    coder = Bent() if name == "bent" else Conditioned()
    options: dict[str, Any] = {"name": name, "hook_point": POST, "latents": LATENTS}
    dictionary = opaque_dictionary(coder, subject, conditioned=name == "conditioned", **options)
    if isinstance(coder, Conditioned):
        return dictionary, Made(coder.encode, coder.decode, linear=False)
    return dictionary, Made(coder.encode, lambda z, given: coder.decode(z), linear=False)


@cache
def made(name: str) -> tuple[Subject, Dictionary, Made]:
    import tempfile

    subject = tiny_subject("llama")
    if name in ("bent", "conditioned"):
        return subject, *own(name, subject)
    with tempfile.TemporaryDirectory() as folder:
        return subject, *saelens(KINDS[name], Path(folder), subject)


EVERY = [*KINDS, "bent", "conditioned"]


def vectors(subject: Subject, point: str, tokens: tuple[int, ...]) -> Tensor:
    return subject.residual(torch.tensor([tokens]), point).clone()


@pytest.mark.parametrize("name", EVERY)
def test_codes_and_reconstructions_are_the_librarys(name: str) -> None:
    subject, dictionary, library = made(name)
    assert isinstance(dictionary, Dictionary)
    for tokens in PROMPTS:
        x = vectors(subject, dictionary.hook_point, tokens)
        with torch.no_grad():
            z = library.encode(x)
            torch.testing.assert_close(dictionary.encode(x), z, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(dictionary.decode(z, given=x), library.decode(z, x), atol=1e-5, rtol=1e-5)
    assert 0 < (z != 0).float().mean() < 1
    assert (dictionary.decoder_directions() is not None) == library.linear


def edited(library: Made, x: Tensor, change: Callable[[Tensor], Tensor], at: slice) -> Tensor:
    """Return decode(z') − decode(z), by the library itself, zero elsewhere than `at`."""
    with torch.no_grad():
        z = library.encode(x)
        new = z.clone()
        new[:, at] = change(z[:, at].clone())
        delta = library.decode(new, x) - library.decode(z, x)
    kept = torch.zeros_like(delta)
    kept[:, at] = delta[:, at]
    return kept


def changes(latents: list[int]) -> dict[str, tuple[Callable[[str], Intervention], Callable[[Tensor], Tensor], slice]]:
    def to(value: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        def change(z: Tensor) -> Tensor:
            z[..., latents] = torch.as_tensor(value(z[..., latents]))
            return z

        return change

    whole, last = slice(0, None), slice(-1, None)
    return {
        "ablate": (lambda d: ablate(d, latents), to(lambda z: 0.0), whole),
        "ablate one at the end": (
            lambda d: ablate(d, latents[:1], "last"), lambda z: z.index_fill(-1, torch.tensor(latents[:1]), 0.0), last
        ),
        "steer": (lambda d: steer(d, latents, 2.0, (1,)), to(lambda z: z + 2.0), slice(1, 2)),
        "scale": (lambda d: scale(d, latents, -1.5), to(lambda z: -1.5 * z), whole),
        "clamp": (lambda d: clamp(d, latents, 1.5, "all"), to(lambda z: 1.5), whole),
    }  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_edits_add_what_the_library_says(name: str) -> None:
    """At the point that the dictionary writes to, in one padded batch, and so in the logits."""
    subject, dictionary, library = made(name)
    model, point, out = LiveModel(subject, [dictionary]), dictionary.hook_point, dictionary.hook_point_out
    x = [vectors(subject, point, tokens) for tokens in PROMPTS]
    with torch.no_grad():
        fires = (library.encode(x[2])[0] != 0).float()
        latents = (fires.mean(0) + fires[-1]).topk(5).indices.tolist()
    clean = [vectors(subject, out, tokens) for tokens in PROMPTS]
    for kind, (make, change, at) in changes(latents).items():
        trials = [Trial(tokens, make(dictionary.fingerprint)) for tokens in PROMPTS]
        found = model.run(
            trials, lambda r: [(r.logits[i], r.of(out, i)) for i in range(len(r.batch.trials))], points=[out]
        )
        moved = 0.0
        for tokens, given, before, (logits, after) in zip(PROMPTS, x, clean, found, strict=True):
            delta = edited(library, given, change, at)
            moved = max(moved, float(delta.abs().max()))
            torch.testing.assert_close(after, (before + delta)[0], atol=1e-4, rtol=0, msg=f"{kind}: {tokens}")
            with model.hooked(out, lambda v, d=delta: v + d):  # type: ignore[misc]
                expected = model.run([Trial(tokens)], lambda r: list(r.logits))[0]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert moved > 0.01, kind


@pytest.mark.parametrize("name", EVERY)
def test_null_edits_and_those_that_are_taken_back_change_nothing(name: str) -> None:
    subject, dictionary, library = made(name)
    model, f, every = LiveModel(subject, [dictionary]), dictionary.fingerprint, list(range(LATENTS))

    def logits(make: Callable[[tuple[int, ...]], Intervention]) -> Tensor:
        return torch.stack(model.run([Trial(t, make(t)) for t in PROMPTS], lambda r: list(r.logits)))

    clean = logits(lambda tokens: Intervention())
    assert (logits(lambda tokens: steer(f, every, 0.0, "all")) - clean).abs().max() <= 1e-5
    assert (logits(lambda tokens: scale(f, every, 1.0)) - clean).abs().max() <= 1e-5
    assert (logits(lambda tokens: patch(f, every, tokens)) - clean).abs().max() <= 1e-5
    if library.linear:
        # Ablated, and the directions added again by their activations, as vectors: the identity.
        directions = dictionary.decoder_directions()
        assert directions is not None
        for tokens in PROMPTS:
            with torch.no_grad():
                z = library.encode(vectors(subject, dictionary.hook_point, tokens))[0]
            back = ablate(f, every)
            for position, vector in enumerate(z @ directions):
                if vector.any():
                    back += push(dictionary.hook_point_out, vector.tolist(), 1.0, (position,))
            (found,) = model.run([Trial(tokens, back)], lambda r: list(r.logits))
            torch.testing.assert_close(found, clean[PROMPTS.index(tokens)], atol=1e-4, rtol=0)
            assert isinstance(dictionary, PlainDictionary) or (z != 0).any()


def test_codes_of_a_context_do_not_see_padding_or_later_edits() -> None:
    """Generation with a dictionary that reads whole contexts: batched as alone, every step on what was written."""
    from exegete.tools.generation import generate

    subject, dictionary, _ = made("conditioned")
    model = LiveModel(subject, [dictionary])
    trials = [Trial(t, clamp(dictionary.fingerprint, list(range(9)), 5.0)) for t in PROMPTS]
    batched = generate(model, trials, 5, temperature=0)
    assert [one.tokens for one in batched] == [generate(model, [t], 5, temperature=0)[0].tokens for t in trials]
    clean = generate(model, [Trial(t) for t in PROMPTS], 5, temperature=0)
    assert [one.tokens for one in clean] != [one.tokens for one in batched]
