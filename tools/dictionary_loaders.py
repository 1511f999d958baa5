"""Dictionaries from disk and from SAELens' registry, checked against the subject that they are to read.

What `load_dictionary` takes:

1. a folder that SAELens saved (`cfg.json`, `sae_weights.safetensors`) – see `dictionary_saelens`;
2. a folder that sparsify saved (`cfg.json`, `sae.safetensors`), whose name says where it belongs: `layers.6`;
3. a folder with `dictionary.json` and `dictionary.safetensors`, the form for everyone else's (`_load_plain`);
4. `release/id` of SAELens' registry, or `saelens:release/id`, for example `gpt2-small-res-jb/blocks.8.hook_resid_pre`;
5. `sparsify:user/repository/layers.6`, a sparsify folder on the Hugging Face hub.

Only safetensors are read. Pickles are refused: loading one runs whatever code it holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exegete.tools.dictionaries import (
    Activation,
    Dictionary,
    OpaqueDictionary,
    PlainDictionary,
    dictionary_fingerprint,
)
from exegete.tools.errors import UserError
from exegete.tools.subject import Subject
from exegete.tools.weights import pickles_in, require_finite

EXPECTED = "sae_weights.safetensors (SAELens), sae.safetensors (sparsify) or dictionary.safetensors (plain)"


def load_dictionary(spec: str, subject: Subject) -> Dictionary:
    """Load the dictionary that `spec` names, onto the subject's device and in its number format.

    Raises:
        UserError: there is none, it was pickled, its weights hold NaN, its configuration asks for what is not
            supported, or the subject has no such hook point, another width there, or weights processed otherwise.
    """
    from exegete.tools.dictionary_saelens import load_registered, load_saelens_folder

    folder = Path(spec.removeprefix("saelens:").removeprefix("sparsify:")).expanduser()
    if not folder.is_dir() and spec.startswith("sparsify:"):
        folder = _fetch_sparsify(spec)
    if not folder.is_dir():
        _require_registered(spec, folder)
        return load_registered(spec, subject)
    files: dict[str, Callable[[Path, str, Subject], Dictionary]] = {
        "sae_weights.safetensors": load_saelens_folder,
        "sae.safetensors": _load_sparsify_folder,
        "dictionary.safetensors": _load_plain,
    }
    for file, load in files.items():
        if (folder / file).exists():
            return load(folder, spec, subject)
    if pickled := pickles_in(folder):
        raise UserError(
            f"dictionary {spec!r} is a pickle ({pickled[0]}), and pickles are never loaded; save safetensors"
        )
    raise UserError(f"folder {spec!r} holds no dictionary; expected {EXPECTED}")


def require_fit(name: str, width: int, hook_point: str, subject: Subject) -> None:
    """Raise UserError unless the subject has the hook point, with vectors of this width."""
    actual = subject.width(hook_point)
    if width != actual:
        raise UserError(
            f"dictionary {name!r} takes vectors of width {width}, but subject {subject.name!r} has width {actual} at "
            f"{hook_point!r}; load the model that the dictionary was trained on"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError where there is no file, or none that parses."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{str(path)!r} is missing; it must stand beside the weights") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON ({error}); export the dictionary again") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_weights(path: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises UserError where it is damaged or holds NaN."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is damaged ({error}); fetch or export it again") from error
    require_finite(weights, f"dictionary {name!r}")
    return weights


def not_fetched(spec: str, error: Exception) -> UserError:
    """Return what to tell the user when the hub did not give a dictionary."""
    reason = " ".join(str(error).split())[:200]
    return UserError(f"cannot fetch dictionary {spec!r}; is the hub reachable, or the file cached? ({reason})")


def _fetch_sparsify(spec: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = spec.removeprefix("sparsify:").split("/")
    if len(parts) < 3:
        raise UserError(f"{spec!r} does not name a dictionary; expected sparsify:user/repository/layers.6")
    repository, folder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        hf_hub_download(repository, f"{folder}/cfg.json")
        return Path(hf_hub_download(repository, f"{folder}/sae.safetensors")).parent
    except (OSError, ValueError) as error:
        raise not_fetched(spec, error) from error


def _load_sparsify_folder(folder: Path, name: str, subject: Subject) -> Dictionary:
    """Load what EleutherAI's sparsify (`sae` before) saved with `SparseCoder.save_to_disk`.

    Encodes as `sparsify/sparse_coder.py` does: autoencoders subtract `b_dec` first, transcoders do not.
    """
    configuration = read_json(folder / "cfg.json")
    for option in ("embed_skip", "gram_lookup"):
        if configuration.get(option):
            raise UserError(
                f"dictionary {name!r} was trained with {option}, which needs inputs beside the hook point's"
            )
    weights = read_weights(folder / "sae.safetensors", name)
    transcodes = bool(configuration.get("transcode"))
    hook_point, output = _sparsify_hook_points(folder.name, transcodes)
    encoder, decoder = _take(weights, name, "encoder.weight"), _take(weights, name, "W_dec", "decoder.weight")
    if decoder.shape != encoder.shape:  # a plain nn.Linear decoder is stored the other way round
        decoder = decoder.T
    shift = _take(weights, name, "b_dec", "decoder.bias")
    plain = PlainDictionary(
        name=name,
        fingerprint=dictionary_fingerprint(weights, configuration, hook_point, subject),
        hook_point=hook_point,
        encoder=encoder.T.contiguous(),
        encoder_bias=_take(weights, name, "encoder.bias"),
        decoder=decoder.contiguous(),
        decoder_bias=shift,
        activation="topk",
        k=int(configuration["k"]),
        input_shift=None if transcodes else shift,
        output=output,
    ).to(subject.device, subject.dtype)
    require_fit(name, plain.width, hook_point, subject)
    return _sparsify_variant(plain, configuration, weights.get("W_skip"))


def _sparsify_variant(plain: PlainDictionary, configuration: Mapping[str, Any], skip: Tensor | None) -> Dictionary:
    """Return `plain` itself, or what sparsify's rarer options make of it."""
    activation = configuration.get("activation", "topk")
    encode: Callable[[Tensor], Tensor] = plain.encode
    k = plain.k
    assert k is not None
    if activation == "groupmax":
        encode = _group_maxima(plain, k)
    elif activation != "topk":
        raise UserError(f"dictionary {plain.name!r} has activation {activation!r}; sparsify knows topk and groupmax")
    elif configuration.get("signed"):
        encode = _signed_topk(plain, k)
    elif skip is None:
        return plain
    decode: Callable[[Tensor, Tensor | None], Tensor] = lambda z, given: plain.decode(z)  # noqa: E731
    if skip is not None:
        across = skip.to(plain.encoder)
        decode = lambda z, given: plain.decode(z) + given.to(across) @ across.T  # type: ignore[union-attr]  # noqa: E731
    return _opaque_from(plain, encode, decode, conditioned=skip is not None)


def _opaque_from(
    plain: PlainDictionary,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor, Tensor | None], Tensor],
    *,
    conditioned: bool,
) -> OpaqueDictionary:
    """Return an opaque dictionary with the facts of `plain` and other functions."""
    return OpaqueDictionary(
        name=plain.name,
        fingerprint=plain.fingerprint,
        hook_point=plain.hook_point,
        width=plain.width,
        latents=plain.latents,
        device=plain.device,
        dtype=plain.dtype,
        encoder=encode,
        decoder=decode,
        directions=plain.decoder,
        output=plain.output,
        conditioned=conditioned,
    )


def _group_maxima(plain: PlainDictionary, groups: int) -> Callable[[Tensor], Tensor]:
    """One latent of each of `groups` equal runs of latents fires: the largest."""

    def encode(x: Tensor) -> Tensor:
        grouped = plain.preactivations(x).relu()
        grouped = grouped.reshape(*grouped.shape[:-1], groups, -1)
        values, places = grouped.max(dim=-1, keepdim=True)
        return torch.zeros_like(grouped).scatter_(-1, places, values).flatten(-2)

    return encode


def _signed_topk(plain: PlainDictionary, k: int) -> Callable[[Tensor], Tensor]:
    """The k largest fire, negative ones too."""

    def encode(x: Tensor) -> Tensor:
        preactivations = plain.preactivations(x)
        values, places = preactivations.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(preactivations).scatter_(-1, places, values)

    return encode


def _sparsify_hook_points(folder_name: str, transcodes: bool) -> tuple[str, str | None]:
    """Return where a folder named for a module (`layers.6`, `h.3.mlp`) reads, and where it writes if elsewhere."""
    if folder_name == "embed_tokens":
        return "hook_embed", None
    found = re.search(r"(?:^|[._])(?:layers|h|blocks)[._](\d+)(?:[._](\w+))?$", folder_name)
    part = {None: "hook_resid_post", "mlp": "mlp.hook_out", "attn": "hook_attn_out"}
    part |= {"attention": "hook_attn_out", "self_attn": "hook_attn_out"}
    if found is None or found[2] not in part:
        expected = "'layers.6', 'layers.6.mlp' or 'layers.6.attention'"
        raise UserError(
            f"folder name {folder_name!r} does not say which hook point it is for; rename it like {expected}"
        )
    output = f"blocks.{found[1]}.{part[found[2]]}"
    if not transcodes:
        return output, None
    if found[2] != "mlp":
        raise UserError(
            f"transcoder {folder_name!r}: only transcoders of an mlp are supported, named like 'layers.6.mlp'"
        )
    return f"blocks.{found[1]}.mlp.hook_in", output


def _load_plain(folder: Path, name: str, subject: Subject) -> Dictionary:
    """Load `dictionary.json` and `dictionary.safetensors`.

    The JSON: `{"hook_point": "blocks.6.hook_resid_post", "activation": "topk", "k": 32}`, with activation `relu`,
    `jumprelu` or `topk` (with `k`), optionally `"subtract_decoder_bias": true` (from the input, first) and
    `"output_hook_point"` for transcoders. The tensors: `encoder` (width, latent), `encoder_bias` (latent), `decoder`
    (latent, width), `decoder_bias` (width), and for jumprelu `threshold` (latent).
    """
    configuration = read_json(folder / "dictionary.json")
    weights = read_weights(folder / "dictionary.safetensors", name)
    known = {"hook_point", "activation", "k", "subtract_decoder_bias", "output_hook_point", "name"}
    if unknown := sorted(set(configuration) - known):
        raise UserError(f"dictionary.json of {name!r} has {unknown[0]!r}; it may have {', '.join(sorted(known))}")
    hook_point = configuration.get("hook_point")
    activation: Activation = configuration.get("activation", "relu")
    if not isinstance(hook_point, str) or activation not in ("relu", "jumprelu", "topk"):
        raise UserError(f"dictionary.json of {name!r} needs a hook_point, and an activation of relu, jumprelu or topk")
    shift = weights.get("decoder_bias") if configuration.get("subtract_decoder_bias") else None
    encoder = _take(weights, name, "encoder")
    require_fit(name, encoder.shape[0], hook_point, subject)
    _require_shapes(weights, name, encoder)
    return PlainDictionary(
        name=name,
        fingerprint=dictionary_fingerprint(weights, configuration, hook_point, subject),
        hook_point=hook_point,
        encoder=encoder,
        encoder_bias=_take(weights, name, "encoder_bias"),
        decoder=_take(weights, name, "decoder"),
        decoder_bias=_take(weights, name, "decoder_bias"),
        activation=activation,
        k=configuration.get("k") if activation == "topk" else None,
        threshold=weights.get("threshold") if activation == "jumprelu" else None,
        input_shift=shift,
        output=configuration.get("output_hook_point"),
    ).to(subject.device, subject.dtype)


def _require_shapes(weights: Mapping[str, Tensor], name: str, encoder: Tensor) -> None:
    latents, out = encoder.shape[1], _take(weights, name, "decoder").shape[-1]
    expected = {
        "encoder_bias": (latents,), "threshold": (latents,), "decoder": (latents, out), "decoder_bias": (out,)
    }  # fmt: skip
    for key, shape in expected.items():
        if key in weights and tuple(weights[key].shape) != shape:
            raise UserError(f"dictionary {name!r}: {key} has shape {tuple(weights[key].shape)}, expected {shape}")


def _take(weights: Mapping[str, Tensor], name: str, *keys: str) -> Tensor:
    for key in keys:
        if key in weights:
            return weights[key]
    raise UserError(f"dictionary {name!r} has no tensor {keys[0]!r}; its file has {', '.join(sorted(weights))}")


def _require_registered(spec: str, folder: Path) -> None:
    if spec.startswith("saelens:"):
        return
    if folder.is_file() or folder.is_absolute() or spec.startswith((".", "~")) or "/" not in spec:
        way_out = f"give a folder with {EXPECTED}, or release/id of SAELens' registry"
        raise UserError(f"there is no dictionary folder {spec!r}; {way_out}")
