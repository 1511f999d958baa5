"""Dictionaries that SAELens trained, published or can fetch.

ReLU, JumpReLU and TopK autoencoders and transcoders become `PlainDictionary`; every other architecture runs in SAELens'
own code, wrapped. An option that would change a code is honoured or refused, never passed over: normalisation at run
time keeps SAELens' code, normalisation that should have been folded into the weights is refused, decoder norms in the
TopK choice are folded, heads of `hook_z` arrive concatenated.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exegete.tools.dictionaries import Activation, Dictionary, OpaqueDictionary, PlainDictionary, dictionary_fingerprint
from exegete.tools.dictionary_loaders import not_fetched, read_json, require_fit
from exegete.tools.errors import UserError
from exegete.tools.subject import PROCESSING, Subject
from exegete.tools.weights import no_pickles, require_finite

_PLAIN: Mapping[str, Activation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}
"""Architectures of one affine map, and what follows it."""

_AT_RUN_TIME = ("layer_norm", "constant_norm_rescale")
_TEMPORAL_ONLY = "constant_scalar_rescale"
_TO_BE_FOLDED = ("expected_average_only_in", "covariance_whitening")
_HARMLESS = {
    *("device", "dtype", "torch_dtype", "n_devices", "device_map", "trust_remote_code"),
    *("attn_implementation", "low_cpu_mem_usage", "default_padding_side"),
}
"""Arguments with which a dictionary's model was loaded that change no vector (beyond rounding)."""


def load_saelens_folder(folder: Path, name: str, subject: Subject) -> Dictionary:
    """Load what `SAE.save_model` or `save_inference_model` wrote: `cfg.json` and `sae_weights.safetensors`.

    Raises:
        UserError: it is damaged, a training checkpoint, or does not fit the subject (see `load_dictionary`).
    """
    from sae_lens import SAE
    from sae_lens.registry import SAE_CLASS_REGISTRY
    from safetensors import SafetensorError

    configuration = read_json(folder / "cfg.json")
    architecture = configuration.get("architecture", "standard")
    if architecture not in SAE_CLASS_REGISTRY:
        known = ", ".join(sorted(SAE_CLASS_REGISTRY))
        way_out = "if it is a training checkpoint, save it with sae.save_inference_model(folder)"
        raise UserError(f"dictionary {name!r} has architecture {architecture!r}, not one of {known}; {way_out}")
    try:
        with _quiet(), no_pickles(f"dictionary {name!r}"):
            sae = SAE.load_from_disk(folder)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(name, error) from error
    return dictionary_of_sae(sae, name, subject)


def load_registered(spec: str, subject: Subject) -> Dictionary:
    """Load `release/id` of SAELens' registry, or `saelens:user/repository/id` from the Hugging Face hub.

    Raises:
        UserError: there is no such entry, the hub cannot be reached, or it does not fit the subject.
    """
    from sae_lens import SAE

    release, entry = _registered(spec)
    try:
        with _quiet(), no_pickles(f"dictionary {spec!r}"):
            sae = SAE.from_pretrained(release, entry)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise not_fetched(spec, error) from error
    return dictionary_of_sae(sae, f"{release}/{entry}", subject)


def dictionary_of_sae(sae: Any, name: str, subject: Subject) -> Dictionary:
    """Return the dictionary of a SAELens `SAE` in memory, in the fast form where its architecture allows it.

    Raises:
        UserError: its options are not supported, or it does not fit the subject.
    """
    configuration = sae.cfg.to_dict()
    metadata = configuration["metadata"]
    hook_point = metadata.get("hook_name")
    if not hook_point:
        raise UserError(f"dictionary {name!r} does not say its hook point; set metadata.hook_name in its cfg.json")
    weights = {key: value.detach() for key, value in sae.state_dict().items()}
    require_finite(weights, f"dictionary {name!r}")
    _require_supported(name, sae.cfg, metadata)
    require_fit(name, sae.cfg.d_in, hook_point, subject)
    _require_processing(name, metadata.get("model_from_pretrained_kwargs") or {}, subject)
    facts = {key: value for key, value in configuration.items() if key not in ("metadata", "device")}
    facts["hook_name_out"] = metadata.get("hook_name_out")
    fingerprint = dictionary_fingerprint(weights, facts, hook_point, subject)
    if sae.cfg.architecture() in _PLAIN and sae.cfg.normalize_activations == "none":
        return _plain(sae, name, fingerprint, hook_point).to(subject.device, subject.dtype)
    return _opaque(sae, name, fingerprint, hook_point, subject)


def _plain(sae: Any, name: str, fingerprint: str, hook_point: str) -> PlainDictionary:
    encoder, bias, decoder = sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # The choice of the k largest weighs by decoder norm: fold it, as `TopKSAE.fold_W_dec_norm` does.
        norms = decoder.norm(dim=-1)
        encoder, bias, decoder = encoder * norms, bias * norms, decoder / norms.clamp_min(1e-8)[:, None]
    activation = _PLAIN[sae.cfg.architecture()]
    return PlainDictionary(
        name=name,
        fingerprint=fingerprint,
        hook_point=hook_point,
        encoder=encoder.contiguous(),
        encoder_bias=bias,
        decoder=decoder.contiguous(),
        decoder_bias=sae.b_dec.detach(),
        activation=activation,
        k=int(sae.cfg.k) if activation == "topk" else None,
        threshold=sae.threshold.detach() if activation == "jumprelu" else None,
        input_shift=sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else None,
        output=sae.cfg.metadata.hook_name_out,
    )


def _opaque(sae: Any, name: str, fingerprint: str, hook_point: str, subject: Subject) -> OpaqueDictionary:
    sae = sae.to(device=subject.device, dtype=getattr(torch, subject.dtype)).eval()
    sae.requires_grad_(False)
    # The subject hands over the heads of `hook_z` concatenated already.
    sae.turn_off_forward_pass_hook_z_reshaping()
    architecture = sae.cfg.architecture()
    normalised = sae.cfg.normalize_activations in _AT_RUN_TIME
    skips = hasattr(sae, "W_skip")

    def decode(z: Tensor, given: Tensor | None) -> Tensor:
        if normalised:
            # SAELens keeps each token's scale from its last call to encode, once; set it for this input.
            sae.run_time_activation_norm_fn_in(_given(given, sae))
        decoded: Tensor = sae.decode(z)
        if skips:
            decoded = decoded + _given(given, sae) @ sae.W_skip.T
        return decoded

    return OpaqueDictionary(
        name=name,
        fingerprint=fingerprint,
        hook_point=hook_point,
        width=sae.cfg.d_in,
        latents=sae.cfg.d_sae,
        device=subject.device,
        dtype=subject.dtype,
        encoder=sae.encode,
        decoder=decode,
        directions=None if normalised else _directions(sae),
        output=sae.cfg.metadata.hook_name_out,
        conditioned=normalised or skips or architecture == "temporal",
    )


def _given(given: Tensor | None, sae: Any) -> Tensor:
    assert given is not None  # OpaqueDictionary.decode has asked for it
    converted: Tensor = given.to(sae.W_dec.dtype)
    return converted


def _directions(sae: Any) -> Tensor:
    decoder: Tensor = sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        decoder = decoder / decoder.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    if sae.cfg.normalize_activations == _TEMPORAL_ONLY:
        decoder = decoder / sae.cfg.activation_normalization_factor
    return decoder


def _require_supported(name: str, configuration: Any, metadata: Mapping[str, Any]) -> None:
    normalisation = configuration.normalize_activations
    if normalisation in _TO_BE_FOLDED:
        raise UserError(
            f"dictionary {name!r} expects inputs normalised by {normalisation!r}, and does not hold the factor; "
            f"fold it (sae.fold_activation_norm_scaling_factor(factor) or fold_activation_whitening) and save it"
        )
    known = ("none", *_AT_RUN_TIME, *([_TEMPORAL_ONLY] if configuration.architecture() == "temporal" else []))
    if normalisation not in known:
        raise UserError(f"dictionary {name!r} normalises its input by {normalisation!r}, which is not known here")
    if metadata.get("hook_head_index") is not None:
        raise UserError(
            f"dictionary {name!r} reads one head ({metadata['hook_head_index']}); only whole hook points work"
        )


def _require_processing(name: str, asked: Mapping[str, Any], subject: Subject) -> None:
    """Raise UserError unless the subject was loaded as the dictionary's model was.

    For example `{"center_writing_weights": true}`, of the published GPT-2 dictionaries: their vectors have mean 0.
    """
    for key, value in asked.items():
        if key in PROCESSING and bool(value) != (key in subject.processing):
            wanted = [p for p in PROCESSING if asked.get(p, p in subject.processing)]
            raise UserError(
                f"dictionary {name!r} was trained on a model loaded with {key}={value}; "
                f"load the subject with processing = {wanted}"
            )
        if key == "revision" and value not in (None, subject.revision):
            raise UserError(f"dictionary {name!r} was trained on revision {value!r}; load the subject at that revision")
        if key not in PROCESSING and key not in _HARMLESS and key != "revision" and value:
            raise UserError(
                f"dictionary {name!r} was trained on a model loaded with {key}={value!r}, not supported here"
            )


def _registered(spec: str) -> tuple[str, str]:
    """Return release and id. Ids may have slashes: the release is the longest beginning that the registry knows."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    parts = spec.removeprefix("saelens:").split("/")
    for length in range(len(parts) - 1, 0, -1):
        release, entry = "/".join(parts[:length]), "/".join(parts[length:])
        if release in directory:
            if entry not in directory[release].saes_map:
                raise UserError(
                    f"SAELens release {release!r} has no {entry!r}.{_near(entry, directory[release].saes_map)}"
                )
            return release, entry
    if spec.startswith("saelens:") and len(parts) > 2:
        return "/".join(parts[:2]), "/".join(parts[2:])
    raise UserError(
        f"there is no dictionary folder {spec!r}, and SAELens has no release {parts[0]!r}.{_near(parts[0], directory)}"
    )


def _near(word: str, known: Mapping[str, Any]) -> str:
    """Name the nearest entries; where none is near, the first few."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.4) or list(known)[:3]
    return f" Nearest: {', '.join(map(repr, near))}"


def _damaged(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"dictionary {name!r} cannot be read ({reason}); fetch or export it again")


@contextmanager
def _quiet() -> Iterator[None]:
    # SAELens warns of model_from_pretrained_kwargs, which `_require_processing` checks.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
