"""Dictionaries: every architecture encodes as its own library does, and any object with two functions works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exegete.tools.dictionaries import (
    Dictionary,
    OpaqueDictionary,
    PlainDictionary,
    opaque_dictionary,
    random_dictionary,
)
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.errors import UserError
from exegete.tools.subject import Subject

POINT = "blocks.1.hook_resid_post"
WIDTH, LATENTS = 32, 96


PLAIN = {
    "standard": {},
    "standard without input shift": {"apply_b_dec_to_input": False},
    "jumprelu": {},
    "topk": {"k": 7},
    "topk by decoder norm": {"k": 7, "rescale_acts_by_decoder_norm": True},
    "transcoder": {"apply_b_dec_to_input": False, "d_out": 16},
    "jumprelu_transcoder": {"apply_b_dec_to_input": False, "d_out": 16},
}
OPAQUE = {
    "gated": {},
    "abstopk": {"k": 7},
    "abstopk by decoder norm": {"k": 7, "rescale_acts_by_decoder_norm": True},
    "matching_pursuit": {"max_iterations": 9, "residual_threshold": 3.5},
    "skip_transcoder": {"apply_b_dec_to_input": False, "d_out": 16},
    "jumprelu_skip_transcoder": {"apply_b_dec_to_input": False, "d_out": 16},
    "temporal": {
        "kval_topk": 8,
        "n_heads": 4,
        "bottleneck_factor": 8,
        "activation_normalization_factor": 0.7,
        "normalize_activations": "constant_scalar_rescale",
    },
    "standard, layer norm": {"normalize_activations": "layer_norm"},
    "topk, constant norm": {"normalize_activations": "constant_norm_rescale", "k": 7},
}


def test_every_architecture_of_the_library_is_tried() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    tried = {name.split(",")[0].split(" ")[0] for name in [*PLAIN, *OPAQUE]}
    assert tried == set(SAE_CLASS_REGISTRY)


@pytest.mark.parametrize(("name", "options"), [*PLAIN.items(), *OPAQUE.items()], ids=[*PLAIN, *OPAQUE])
def test_it_encodes_and_decodes_as_sae_lens_does(
    make_sae: Callable[..., Any],
    save_sae: Callable[..., str],
    name: str,
    options: dict[str, Any],
    subject: Subject,
    x: Tensor,
    tmp_path: Path,
) -> None:
    architecture = name.split(",")[0].split(" ")[0]
    sae = make_sae(architecture, **options)
    dictionary = load_dictionary(save_sae(sae, tmp_path / "sae"), subject)
    assert isinstance(dictionary, PlainDictionary if name in PLAIN else OpaqueDictionary)
    assert isinstance(dictionary, Dictionary)
    with torch.no_grad():
        z = sae.encode(x)
        decoded = sae(x) if architecture != "temporal" else sae.decode(z)
    ours = dictionary.encode(x)
    assert 0 < (ours != 0).float().mean() < 1
    torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary.decode(ours, given=x), decoded, atol=1e-5, rtol=1e-5)
    assert (dictionary.width, dictionary.latents, dictionary.hook_point) == (WIDTH, LATENTS, POINT)


@pytest.mark.parametrize(("name", "options"), [*PLAIN.items(), *OPAQUE.items()], ids=[*PLAIN, *OPAQUE])
def test_directions_are_what_a_latent_adds(
    make_sae: Callable[..., Any],
    save_sae: Callable[..., str],
    name: str,
    options: dict[str, Any],
    subject: Subject,
    x: Tensor,
    tmp_path: Path,
) -> None:
    sae = make_sae(name.split(",")[0].split(" ")[0], **options)
    dictionary = load_dictionary(save_sae(sae, tmp_path / "sae"), subject)
    directions = dictionary.decoder_directions()
    if "norm" in name and "decoder" not in name:
        assert directions is None  # scaled by each token's own norm
        return
    z = dictionary.encode(x).clone()
    more = z.clone()
    more[..., 11] += 2.0
    added = dictionary.decode(more, given=x) - dictionary.decode(z, given=x)
    assert directions is not None
    torch.testing.assert_close(added, (2 * directions[11]).expand_as(added), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), PLAIN.items(), ids=PLAIN)
def test_the_sparse_path_and_the_blocks_agree_with_the_dense_code(
    make_sae: Callable[..., Any],
    save_sae: Callable[..., str],
    name: str,
    options: dict[str, Any],
    subject: Subject,
    x: Tensor,
    tmp_path: Path,
) -> None:
    loaded = load_dictionary(save_sae(make_sae(name.split(" ")[0], **options), tmp_path / "sae"), subject)
    assert isinstance(loaded, PlainDictionary)
    flat = x.flatten(0, 1)
    dense = loaded.encode(flat)
    rows, latents, values = loaded.encode_sparse(flat)
    assert torch.equal(torch.zeros_like(dense).index_put((rows, latents), values), dense)
    places = rows * LATENTS + latents
    assert bool((places.diff() > 0).all()) and len(values) == int((dense > 0).sum())
    blocks = [loaded.preactivations(flat, start, start + 40) for start in (0, 40, 80)]
    torch.testing.assert_close(torch.cat(blocks, -1), loaded.preactivations(flat))
    if loaded.activation != "topk":
        joined = torch.cat(
            [loaded.activate(block, start) for block, start in zip(blocks, (0, 40, 80), strict=True)], -1
        )
        torch.testing.assert_close(joined, dense)
    else:
        with pytest.raises(ValueError, match="among all 96"):
            loaded.activate(blocks[0])


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batchtopk_as_the_library_saves_it_for_inference(
    architecture: str, subject: Subject, x: Tensor, tmp_path: Path
) -> None:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, configuration_class = get_sae_training_class(architecture)
    widths = {"matryoshka_widths": [32, LATENTS]} if architecture.startswith("matryoshka") else {}
    metadata = SAEMetadata(hook_name=POINT)
    sae = sae_class(configuration_class(d_in=WIDTH, d_sae=LATENTS, k=5, metadata=metadata, **widths))
    sae.topk_threshold.fill_(0.8)
    sae.save_inference_model(tmp_path / "inference")
    dictionary = load_dictionary(str(tmp_path / "inference"), subject)
    expected = SAE.load_from_disk(tmp_path / "inference").encode(x)
    assert isinstance(dictionary, PlainDictionary) and dictionary.activation == "jumprelu"
    torch.testing.assert_close(dictionary.encode(x), expected.detach(), atol=1e-5, rtol=1e-5)
    sae.save_model(tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"architecture .*batchtopk.*save_inference_model"):
        load_dictionary(str(tmp_path / "checkpoint"), subject)


def test_heads_arrive_concatenated(
    make_sae: Callable[..., Any], save_sae: Callable[..., str], subject: Subject, tmp_path: Path
) -> None:
    point = "blocks.1.attn.hook_z"
    sae = make_sae("gated", point, reshape_activations="hook_z")
    flat = subject.residual(torch.randint(0, 41, (2, 6)), point)
    expected = sae.encode(flat.reshape(2, 6, 4, 8)).detach()
    dictionary = load_dictionary(save_sae(sae, tmp_path / "sae"), subject)
    torch.testing.assert_close(dictionary.encode(flat), expected, atol=1e-5, rtol=1e-5)
    plain = load_dictionary(
        save_sae(make_sae("standard", point, reshape_activations="hook_z"), tmp_path / "plain"), subject
    )
    assert isinstance(plain, PlainDictionary) and plain.decode(plain.encode(flat)).shape == flat.shape


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
def test_normalisation_that_was_not_folded_is_refused(
    make_sae: Callable[..., Any], save_sae: Callable[..., str], normalisation: str, subject: Subject, tmp_path: Path
) -> None:
    folder = save_sae(make_sae("standard", normalize_activations=normalisation), tmp_path / "sae")
    with pytest.raises(UserError, match=f"normalised by '{normalisation}'.*fold"):
        load_dictionary(folder, subject)


class Signed(nn.Module):
    """Codes of either sign, a varying number of them, decoded by a function that is no linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(WIDTH, LATENTS, generator=torch.Generator().manual_seed(5)))

    def encode(self, x: Tensor) -> Tensor:
        z = x @ self.weights
        return z * (z.abs() > 6 + x.mean(-1, keepdim=True))

    def decode(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.weights.T)


def test_any_object_with_encode_and_decode_works(subject: Subject, x: Tensor) -> None:
    coder = Signed()
    dictionary = opaque_dictionary(coder, subject, name="mine", hook_point=POINT, latents=LATENTS)
    z = dictionary.encode(x)
    active = (z != 0).sum(-1)
    assert bool((z < 0).any()) and bool((z > 0).any()) and len(set(active.flatten().tolist())) > 3
    assert torch.equal(z, coder.encode(x)) and dictionary.decoder_directions() is None
    double = dictionary.decode(2 * z) - dictionary.decode(0 * z)
    assert not torch.allclose(double, 2 * (dictionary.decode(z) - dictionary.decode(0 * z)), atol=1e-2)
    with torch.no_grad():
        coder.weights[0, 0] += 1
    changed = opaque_dictionary(coder, subject, name="mine", hook_point=POINT, latents=LATENTS)
    assert changed.fingerprint != dictionary.fingerprint


def test_an_object_without_weights_must_say_what_it_is(subject: Subject) -> None:
    class Bare:
        def encode(self, x: Tensor) -> Tensor:
            return x

        def decode(self, z: Tensor, given: Tensor) -> Tensor:
            return z + given

    with pytest.raises(UserError, match="identity="):
        opaque_dictionary(Bare(), subject, name="bare", hook_point=POINT, latents=WIDTH)
    options: dict[str, Any] = {
        "name": "bare",
        "hook_point": POINT,
        "latents": WIDTH,
        "identity": "v1",
        "conditioned": True,
    }
    dictionary = opaque_dictionary(Bare(), subject, **options)
    z = torch.ones(3, WIDTH)
    assert torch.equal(dictionary.decode(z, given=z), 2 * z)
    with pytest.raises(ValueError, match="pass it as `given`"):
        dictionary.decode(z)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_random_dictionaries_fire_as_often_as_asked_and_repeat(activation: Any, subject: Subject) -> None:
    one, same, other = (random_dictionary(subject, POINT, 512, activation, k=16, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(one.encoder, same.encoder)
    tokens = torch.randint(0, 41, (20, 60), generator=torch.Generator().manual_seed(0))
    fires = one.encode(subject.residual(tokens, POINT).flatten(0, 1)) > 0
    assert float(fires.sum(-1).float().mean()) == pytest.approx(16, rel=0.3)
    rates = fires.float().mean(0)
    assert float((rates == 0).float().mean()) < 0.3 and float(rates.max()) < 0.6
    lower = one.to(dtype="bfloat16")
    assert lower.dtype == "bfloat16" and lower.fingerprint == one.fingerprint and lower.encoder.dtype == torch.bfloat16
