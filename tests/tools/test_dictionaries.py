"""Dictionaries: every architecture encodes as its own library does, and what does not fit is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from exegete.tools.subject import Subject, subject_from_model

POINT = "blocks.1.hook_resid_post"
WIDTH, LATENTS = 32, 96


def make_subject(seed: int = 0, **options: Any) -> Subject:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    model = Tokenizer(WordLevel({"<s>": 0, **{f"w{i}": i + 1 for i in range(40)}}, unk_token="<s>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")
    torch.manual_seed(seed)
    shape = {"n_positions": 64, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return subject_from_model(GPT2LMHeadModel(GPT2Config(vocab_size=41, **shape)), tokenizer, "tiny", **options)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.3


def make_sae(architecture: str, hook_point: str = POINT, metadata: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a SAELens dictionary whose every parameter is random, so that nothing passes by being zero."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, configuration_class = get_sae_class(architecture)
    known = {"hook_name": hook_point, **(metadata or {})}
    sae = sae_class(configuration_class(d_in=WIDTH, d_sae=LATENTS, metadata=SAEMetadata(**known), **options))
    source = torch.Generator().manual_seed(3)
    for name, value in sae.named_parameters():
        scale = 0.3 if value.dim() == 1 else 0.15
        value.data = torch.randn(value.shape, generator=source) * scale
        if name == "threshold":
            value.data = value.data.abs()
    return sae


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


def saved(sae: Any, folder: Path) -> str:
    sae.save_model(folder)
    return str(folder)


def test_every_architecture_of_the_library_is_tried() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    tried = {name.split(",")[0].split(" ")[0] for name in [*PLAIN, *OPAQUE]}
    assert tried == set(SAE_CLASS_REGISTRY)


@pytest.mark.parametrize(("name", "options"), [*PLAIN.items(), *OPAQUE.items()], ids=[*PLAIN, *OPAQUE])
def test_it_encodes_and_decodes_as_sae_lens_does(
    name: str, options: dict[str, Any], subject: Subject, x: Tensor, tmp_path: Path
) -> None:
    architecture = name.split(",")[0].split(" ")[0]
    sae = make_sae(architecture, **options)
    dictionary = load_dictionary(saved(sae, tmp_path / "sae"), subject)
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
    name: str, options: dict[str, Any], subject: Subject, x: Tensor, tmp_path: Path
) -> None:
    sae = make_sae(name.split(",")[0].split(" ")[0], **options)
    dictionary = load_dictionary(saved(sae, tmp_path / "sae"), subject)
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
    name: str, options: dict[str, Any], subject: Subject, x: Tensor, tmp_path: Path
) -> None:
    loaded = load_dictionary(saved(make_sae(name.split(" ")[0], **options), tmp_path / "sae"), subject)
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


def test_heads_arrive_concatenated(subject: Subject, tmp_path: Path) -> None:
    point = "blocks.1.attn.hook_z"
    sae = make_sae("gated", point, reshape_activations="hook_z")
    flat = subject.residual(torch.randint(0, 41, (2, 6)), point)
    expected = sae.encode(flat.reshape(2, 6, 4, 8)).detach()
    dictionary = load_dictionary(saved(sae, tmp_path / "sae"), subject)
    torch.testing.assert_close(dictionary.encode(flat), expected, atol=1e-5, rtol=1e-5)
    plain = load_dictionary(
        saved(make_sae("standard", point, reshape_activations="hook_z"), tmp_path / "plain"), subject
    )
    assert isinstance(plain, PlainDictionary) and plain.decode(plain.encode(flat)).shape == flat.shape


@pytest.mark.parametrize("normalisation", ["expected_average_only_in", "covariance_whitening"])
def test_normalisation_that_was_not_folded_is_refused(normalisation: str, subject: Subject, tmp_path: Path) -> None:
    folder = saved(make_sae("standard", normalize_activations=normalisation), tmp_path / "sae")
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


def write_sparsify(
    folder: Path, width: int = WIDTH, tensors: dict[str, Tensor] | None = None, **options: Any
) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(2)
    weights = {
        "encoder.weight": torch.randn(LATENTS, width, generator=source) * 0.2,
        "encoder.bias": torch.randn(LATENTS, generator=source) * 0.1,
        "W_dec": torch.randn(LATENTS, width, generator=source) * 0.2,
        "b_dec": torch.randn(width, generator=source) * 0.1,
        **(tensors or {}),
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"expansion_factor": 3, "k": 6, "d_in": width, **options}))
    return weights


def sparsify_code(
    weights: dict[str, Tensor], x: Tensor, *, transcode: bool = False, activation: str = "topk"
) -> Tensor:
    """`fused_encoder` of sparsify, written out from its source."""
    x = x if transcode else x - weights["b_dec"]
    pre = torch.relu(torch.nn.functional.linear(x, weights["encoder.weight"], weights["encoder.bias"]))
    if activation == "topk":
        values, places = pre.topk(6, dim=-1, sorted=False)
    else:
        values, places = pre.reshape(*pre.shape[:-1], 6, -1).max(dim=-1)
        places = places + torch.arange(0, LATENTS, LATENTS // 6)
    return torch.zeros_like(pre).scatter(-1, places, values)


@pytest.mark.parametrize(
    ("folder", "point"),
    [
        ("layers.1", POINT),
        ("h.1", POINT),
        ("gpt_neox.layers.2", "blocks.2.hook_resid_post"),
        ("layers.1.mlp", "blocks.1.mlp.hook_out"),
        ("layers.0.attention", "blocks.0.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
    ],
)
def test_sparsify_folders_say_where_they_belong(
    folder: str, point: str, subject: Subject, x: Tensor, tmp_path: Path
) -> None:
    weights = write_sparsify(tmp_path / folder)
    dictionary = load_dictionary(str(tmp_path / folder), subject)
    assert dictionary.hook_point == point and isinstance(dictionary, PlainDictionary)
    torch.testing.assert_close(dictionary.encode(x), sparsify_code(weights, x), atol=1e-5, rtol=1e-5)
    expected = sparsify_code(weights, x) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), expected, atol=1e-5, rtol=1e-5)


def test_sparsify_groups_and_skipping_transcoders(subject: Subject, x: Tensor, tmp_path: Path) -> None:
    weights = write_sparsify(tmp_path / "layers.1", activation="groupmax")
    grouped = load_dictionary(str(tmp_path / "layers.1"), subject)
    torch.testing.assert_close(
        grouped.encode(x), sparsify_code(weights, x, activation="groupmax"), atol=1e-5, rtol=1e-5
    )
    across = torch.randn(WIDTH, WIDTH)
    folder = tmp_path / "t" / "layers.1.mlp"
    weights = write_sparsify(folder, tensors={"W_skip": across}, transcode=True, skip_connection=True)
    transcoder = load_dictionary(str(folder), subject)
    assert (transcoder.hook_point, transcoder.hook_point_out) == ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out")
    z = sparsify_code(weights, x, transcode=True)
    torch.testing.assert_close(transcoder.encode(x), z, atol=1e-5, rtol=1e-5)
    expected = z @ weights["W_dec"] + weights["b_dec"] + x @ across.T
    torch.testing.assert_close(transcoder.decode(z, given=x), expected, atol=1e-5, rtol=1e-5)


def write_plain(folder: Path, width: int = WIDTH, **configuration: Any) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(4)
    shapes = {
        "encoder": (width, LATENTS),
        "encoder_bias": (LATENTS,),
        "decoder": (LATENTS, width),
        "decoder_bias": (width,),
    }
    weights = {name: torch.randn(shape, generator=source) * 0.2 for name, shape in shapes.items()}
    weights["threshold"] = torch.rand(LATENTS, generator=source)
    folder.mkdir()
    save_file(weights, folder / "dictionary.safetensors")
    (folder / "dictionary.json").write_text(json.dumps({"hook_point": POINT, **configuration}))
    return weights


def test_plain_folders(subject: Subject, x: Tensor, tmp_path: Path) -> None:
    w = write_plain(tmp_path / "plain", activation="jumprelu", subtract_decoder_bias=True)
    dictionary = load_dictionary(str(tmp_path / "plain"), subject)
    pre = (x - w["decoder_bias"]) @ w["encoder"] + w["encoder_bias"]
    torch.testing.assert_close(dictionary.encode(x), pre * (pre > w["threshold"]), atol=1e-5, rtol=1e-5)
    assert dictionary.hook_point_out == POINT and dictionary.name == str(tmp_path / "plain")


def test_the_fingerprint_follows_weights_configuration_hook_point_and_subject(subject: Subject, tmp_path: Path) -> None:
    def fingerprint(name: str, of: Subject = subject, nudge: float = 0.0, **configuration: Any) -> str:
        weights = write_plain(tmp_path / name, activation="topk", **({"k": 5} | configuration))
        weights["encoder"][0, 0] += nudge
        save_file(weights, tmp_path / name / "dictionary.safetensors")
        return load_dictionary(str(tmp_path / name), of).fingerprint

    base = fingerprint("a")
    assert base == fingerprint("b") and base.startswith("sha256:")
    others = [
        fingerprint("c", nudge=1e-3),
        fingerprint("d", k=6),
        fingerprint("e", hook_point="blocks.0.hook_resid_post"),
        fingerprint("f", of=make_subject(seed=1)),
    ]
    assert len({base, *others}) == 5


def test_how_the_model_was_loaded_is_compared(subject: Subject, tmp_path: Path) -> None:
    asked = {"center_writing_weights": True, "fold_ln": False, "dtype": "float32"}
    folder = saved(make_sae("standard", metadata={"model_from_pretrained_kwargs": asked}), tmp_path / "sae")
    with pytest.raises(UserError, match=r"center_writing_weights=True.*processing = \['center_writing_weights'\]"):
        load_dictionary(folder, subject)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dictionary(folder, make_subject(processing=["center_writing_weights"]))
    with pytest.raises(UserError, match=r"fold_ln=False.*processing = \['center_writing_weights'\]"):
        load_dictionary(folder, make_subject(processing=["fold_ln", "center_writing_weights"]))
    other = saved(make_sae("standard", metadata={"model_from_pretrained_kwargs": {"n_ctx": 9}}), tmp_path / "other")
    with pytest.raises(UserError, match="n_ctx=9, not supported"):
        load_dictionary(other, subject)


def test_what_does_not_fit_names_both_sides(subject: Subject, tmp_path: Path) -> None:
    write_plain(tmp_path / "wide", width=48, activation="relu")
    with pytest.raises(UserError, match="width 48, but subject 'tiny' has width 32"):
        load_dictionary(str(tmp_path / "wide"), subject)
    write_plain(tmp_path / "far", activation="relu", hook_point="blocks.9.hook_resid_post")
    with pytest.raises(UserError, match=r"no hook point 'blocks.9.hook_resid_post'"):
        load_dictionary(str(tmp_path / "far"), subject)
    write_sparsify(tmp_path / "layers.7")
    with pytest.raises(UserError, match=r"no hook point 'blocks.7.hook_resid_post'"):
        load_dictionary(str(tmp_path / "layers.7"), subject)
    saved(make_sae("standard", "blocks.1.hook_resid_pots"), tmp_path / "typo")
    with pytest.raises(UserError, match=r"Did you mean 'blocks.1.hook_resid_post'"):
        load_dictionary(str(tmp_path / "typo"), subject)


@pytest.mark.parametrize(("bad", "place"), [(float("nan"), "b_dec"), (float("inf"), "W_enc")])
def test_weights_that_are_not_numbers_are_refused(bad: float, place: str, subject: Subject, tmp_path: Path) -> None:
    folder = Path(saved(make_sae("standard"), tmp_path / "sae"))
    weights = load_file(folder / "sae_weights.safetensors")
    weights[place].view(-1)[3] = bad
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match=f"NaN or infinite weights in '{place}'"):
        load_dictionary(str(folder), subject)


@pytest.mark.parametrize("kind", ["sae_weights", "sae", "dictionary"])
def test_truncated_weights_are_one_clear_line(kind: str, subject: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "layers.1"
    if kind == "sae_weights":
        saved(make_sae("standard"), folder)
    elif kind == "sae":
        write_sparsify(folder)
    else:
        write_plain(folder, activation="relu")
    file = folder / f"{kind}.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError) as caught:
        load_dictionary(str(folder), subject)
    assert "again" in str(caught.value) and "\n" not in str(caught.value)


def test_pickles_are_never_opened(subject: Subject, tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (opened,)

    import pickle

    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"is a pickle \(ae.pt\)"):
        load_dictionary(str(tmp_path), subject)
    assert not opened.exists()


def test_pickles_of_the_registry_are_never_opened(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *_: torch.load("ae.pt"))
    with pytest.raises(UserError, match=r"gpt2-small-res-jb/blocks.8.hook_resid_pre' is published as a pickle"):
        load_dictionary("gpt2-small-res-jb/blocks.8.hook_resid_pre", subject)
    assert torch.load.__module__ == "torch.serialization"


def test_registered_dictionaries_load(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens

    asked: list[tuple[str, str]] = []

    def fetch(release: str, entry: str) -> Any:
        asked.append((release, entry))
        return make_sae("standard")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fetch)
    for spec in (
        "gpt2-small-res-jb/blocks.8.hook_resid_pre",
        "saelens:gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_13",
    ):
        assert load_dictionary(spec, subject).name == spec.removeprefix("saelens:")
    load_dictionary("saelens:someone/their-saes/layer/3", subject)
    assert asked == [
        ("gpt2-small-res-jb", "blocks.8.hook_resid_pre"),
        ("gemma-scope-2b-pt-res", "layer_0/width_16k/average_l0_13"),
        ("someone/their-saes", "layer/3"),
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no dictionary folder 'nowhere'"),
        ("./out/nowhere", "no dictionary folder './out/nowhere'"),
        ("gpt2-small-res-bj/blocks.8.hook_resid_pre", "no release 'gpt2-small-res-bj'.*'gpt2-small-res-jb'"),
        ("gpt2-small-res-jb/blocks.8.hook_resid_per", "no 'blocks.8.hook_resid_per'.*'blocks.8.hook_resid_pre'"),
    ],
)
def test_a_missing_dictionary_is_named(spec: str, message: str, subject: Subject) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_dictionary(spec, subject)
    assert "\n" not in str(caught.value)


def test_folders_without_a_dictionary_and_odd_configurations(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no dictionary; expected sae_weights"):
        load_dictionary(str(tmp_path), subject)
    write_plain(tmp_path / "a", activation="gelu")
    with pytest.raises(UserError, match="activation of relu, jumprelu or topk"):
        load_dictionary(str(tmp_path / "a"), subject)
    write_plain(tmp_path / "b", activation="topk", k=0)
    with pytest.raises(UserError, match="k between 1 and 96 latents, not 0"):
        load_dictionary(str(tmp_path / "b"), subject)
    write_plain(tmp_path / "c", activation="relu", normalise="layer_norm")
    with pytest.raises(UserError, match="has 'normalise'"):
        load_dictionary(str(tmp_path / "c"), subject)
    write_sparsify(tmp_path / "somewhere")
    with pytest.raises(UserError, match="'somewhere' does not say which hook point"):
        load_dictionary(str(tmp_path / "somewhere"), subject)


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
