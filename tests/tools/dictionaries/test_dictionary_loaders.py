"""Loaders: sparsify, plain folders and the registry; what does not fit, is damaged or pickled is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exegete.tools.dictionaries import (
    PlainDictionary,
)
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.errors import UserError
from exegete.tools.subject import Subject

POINT = "blocks.1.hook_resid_post"
WIDTH, LATENTS = 32, 96


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


def test_signed_sparsify_keeps_negative_values(subject: Subject, x: Tensor, tmp_path: Path) -> None:
    weights = write_sparsify(tmp_path / "layers.1", tensors={"encoder.bias": torch.full((LATENTS,), -3.0)}, signed=True)
    pre = torch.nn.functional.linear(x - weights["b_dec"], weights["encoder.weight"], weights["encoder.bias"])
    values, places = pre.topk(6, dim=-1)
    z = load_dictionary(str(tmp_path / "layers.1"), subject).encode(x)
    assert bool((z < 0).any())
    torch.testing.assert_close(z, torch.zeros_like(pre).scatter(-1, places, values), atol=1e-5, rtol=1e-5)


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


def test_the_fingerprint_follows_weights_configuration_hook_point_and_subject(
    make_subject: Callable[..., Subject], subject: Subject, tmp_path: Path
) -> None:
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


def test_how_the_model_was_loaded_is_compared(
    make_subject: Callable[..., Subject],
    make_sae: Callable[..., Any],
    save_sae: Callable[..., str],
    subject: Subject,
    tmp_path: Path,
) -> None:
    asked = {"center_writing_weights": True, "fold_ln": False, "dtype": "float32"}
    folder = save_sae(make_sae("standard", metadata={"model_from_pretrained_kwargs": asked}), tmp_path / "sae")
    with pytest.raises(UserError, match=r"center_writing_weights=True.*processing = \['center_writing_weights'\]"):
        load_dictionary(folder, subject)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dictionary(folder, make_subject(processing=["center_writing_weights"]))
    with pytest.raises(UserError, match=r"fold_ln=False.*processing = \['center_writing_weights'\]"):
        load_dictionary(folder, make_subject(processing=["fold_ln", "center_writing_weights"]))
    other = save_sae(make_sae("standard", metadata={"model_from_pretrained_kwargs": {"n_ctx": 9}}), tmp_path / "other")
    with pytest.raises(UserError, match="n_ctx=9, not supported"):
        load_dictionary(other, subject)


def test_what_does_not_fit_names_both_sides(
    make_sae: Callable[..., Any], save_sae: Callable[..., str], subject: Subject, tmp_path: Path
) -> None:
    write_plain(tmp_path / "wide", width=48, activation="relu")
    with pytest.raises(UserError, match="width 48, but subject 'tiny' has width 32"):
        load_dictionary(str(tmp_path / "wide"), subject)
    write_plain(tmp_path / "far", activation="relu", hook_point="blocks.9.hook_resid_post")
    with pytest.raises(UserError, match=r"no hook point 'blocks.9.hook_resid_post'"):
        load_dictionary(str(tmp_path / "far"), subject)
    write_sparsify(tmp_path / "layers.7")
    with pytest.raises(UserError, match=r"no hook point 'blocks.7.hook_resid_post'"):
        load_dictionary(str(tmp_path / "layers.7"), subject)
    save_sae(make_sae("standard", "blocks.1.hook_resid_pots"), tmp_path / "typo")
    with pytest.raises(UserError, match=r"Did you mean 'blocks.1.hook_resid_post'"):
        load_dictionary(str(tmp_path / "typo"), subject)


@pytest.mark.parametrize(("bad", "place"), [(float("nan"), "b_dec"), (float("inf"), "W_enc")])
def test_weights_that_are_not_numbers_are_refused(
    make_sae: Callable[..., Any], save_sae: Callable[..., str], bad: float, place: str, subject: Subject, tmp_path: Path
) -> None:
    folder = Path(save_sae(make_sae("standard"), tmp_path / "sae"))
    weights = load_file(folder / "sae_weights.safetensors")
    weights[place].view(-1)[3] = bad
    save_file(weights, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match=f"NaN or infinite weights in '{place}'"):
        load_dictionary(str(folder), subject)


@pytest.mark.parametrize("kind", ["sae_weights", "sae", "dictionary"])
def test_truncated_weights_are_one_clear_line(
    make_sae: Callable[..., Any], save_sae: Callable[..., str], kind: str, subject: Subject, tmp_path: Path
) -> None:
    folder = tmp_path / "layers.1"
    if kind == "sae_weights":
        save_sae(make_sae("standard"), folder)
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


def test_registered_dictionaries_load(
    make_sae: Callable[..., Any], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_sparsify_folders_of_the_hub(
    subject: Subject, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_sparsify(tmp_path / "layers.1")

    def fetch(repository: str, file: str) -> str:
        assert repository == "someone/their-saes"
        if not (tmp_path / file).exists():
            raise OSError(f"404 for {file}\n(Request ID)")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    dictionary = load_dictionary("sparsify:someone/their-saes/layers.1", subject)
    torch.testing.assert_close(dictionary.encode(x), sparsify_code(weights, x), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"cannot fetch dictionary 'sparsify:someone/their-saes/layers\.2'") as caught:
        load_dictionary("sparsify:someone/their-saes/layers.2", subject)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="expected sparsify:user/repository/"):
        load_dictionary("sparsify:layers.9", subject)


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
