"""The language model under study, behind TransformerLens' bridge: tokens in, vectors at a named hook point out."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exegete.tools.errors import UserError, nearest
from exegete.tools.fused import FusedForward
from exegete.tools.seeds import digest
from exegete.tools.tokenizers import special_tokens, token_pieces, tokenizer_digest
from exegete.tools.weights import require_finite, weights_digest

if TYPE_CHECKING:
    from collections.abc import Iterator

PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""What TransformerLens can do to weights after loading. Nothing by default: vectors are the published model's."""

_POINTS = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
    *("hook_in", "hook_out", "attn.hook_z", "ln1.hook_normalized", "ln2.hook_normalized"),
    *("mlp.hook_in", "mlp.hook_post", "mlp.hook_out"),
)
"""Ends of the names, after `blocks.N.`, of the points that dictionaries are trained at."""


class Subject:
    """A causal language model with named hook points. Make one with `load_subject` or `subject_from_model`."""

    def __init__(
        self, bridge: Any, tokenizer: Any, name: str, fingerprint: str, revision: str | None = None, fused: Any = None
    ) -> None:
        self._fused: FusedForward | None = fused
        self.lock = threading.RLock()
        """Hold it while hooks are in place: they are seen by whoever runs the model."""
        self.bridge = bridge
        """The TransformerLens bridge itself, for interventions."""
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        """`sha256:…` over configuration, tokenizer and weights, or over name and commit for models of the hub."""
        self.revision = revision
        self.processing: tuple[str, ...] = ()
        """What was done to the weights after loading, of `PROCESSING`."""
        parameter = next(bridge.original_model.parameters())
        self.device = str(parameter.device)
        self.dtype = str(parameter.dtype).removeprefix("torch.")
        self.layers = int(bridge.cfg.n_layers)
        self.max_context = int(bridge.cfg.n_ctx)
        """Tokens that a context may have."""
        self.bos: int | None = tokenizer.bos_token_id
        self.special_tokens: frozenset[int] = special_tokens(tokenizer)
        """Tokens that no text spells (beginning, end, padding), on which no latent counts as firing."""
        self.tokenizer_digest = tokenizer_digest(tokenizer)

    @cached_property
    def pieces(self) -> list[str]:
        """Token → text, such that the pieces of a context join into its text; a leading space belongs to its word."""
        return token_pieces(self.tokenizer, int(self.bridge.cfg.d_vocab))

    @cached_property
    def hook_points(self) -> Mapping[str, int]:
        """Hook point → width, for every point that a dictionary can be at (the heads of `hook_z` concatenated)."""
        probe = torch.zeros((1, 3), dtype=torch.long, device=self.device)
        with self.lock, torch.inference_mode(), _quiet():
            _, cache = self.bridge.run_with_cache(probe, names_filter=self._is_usable, return_cache_object=False)
        return {name: vectors[0, 0].numel() for name, vectors in cache.items() if vectors.shape[:2] == probe.shape}

    @cached_property
    def points(self) -> Mapping[str, Any]:
        """Name → hook point of the bridge, which takes milliseconds to list them."""
        return dict(self.bridge.hook_dict)

    def _is_usable(self, name: str) -> bool:
        return name == "hook_embed" or (name.startswith("blocks.") and name.split(".", 2)[-1] in _POINTS)

    def width(self, hook_point: str) -> int:
        """Return the length of the vectors at `hook_point`.

        Raises:
            UserError: the subject has no such hook point.
        """
        if hook_point not in self.hook_points:
            example = f"{self.layers} layers, for example 'blocks.{self.layers // 2}.hook_resid_post'"
            hint = nearest(hook_point, self.hook_points)
            raise UserError(f"subject {self.name!r} has no hook point {hook_point!r}; it has {example}.{hint}")
        return self.hook_points[hook_point]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special tokens."""
        if not texts:
            return []
        # The tokenizer warns of texts longer than the model's context; they are cut into contexts afterwards.
        return list(self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])

    def residual(self, tokens: Tensor, hook_point: str) -> Tensor:
        """Return the vectors at `hook_point`, shape (context, position) → (context, position, width).

        Runs only up to the hook point, in inference mode, and where the plain model has the point with fused attention.

        Raises:
            UserError: the subject has no such hook point.
        """
        self.width(hook_point)
        with self.lock:
            if self._fused is not None and self._fused.fits(hook_point, self._probe):
                return self._fused.residual(tokens.to(self.device), hook_point)
        return self._through_bridge(tokens, hook_point)

    def _probe(self, hook_point: str) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(16, device=self.device)[None] % int(self.bridge.cfg.d_vocab)
        return tokens, self._through_bridge(tokens, hook_point)

    def _through_bridge(self, tokens: Tensor, hook_point: str) -> Tensor:
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        point = self.points[hook_point]

        def stop(vectors: Tensor, hook: Any) -> Tensor:
            # The bridge itself stops layers so: its forward returns what the exception carries.
            raise StopAtLayerException(vectors)

        with self.lock:
            level = self.bridge.context_level + 1
            point.add_hook(stop, level=level)
            try:
                with torch.inference_mode():
                    vectors: Tensor = self.bridge(tokens.to(self.device), use_cache=False)
            finally:
                point.remove_hooks(dir="fwd", level=level)
        return vectors.reshape(*tokens.shape, -1)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the next-token logits, shape (context, position) → (context, position, vocabulary)."""
        with self.lock, torch.inference_mode():
            logits: Tensor = self.bridge(tokens.to(self.device), return_type="logits", use_cache=False)
        return logits


def load_subject(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    processing: Sequence[str] = (),
) -> Subject:
    """Load a Hugging Face causal language model, by name or from a local folder.

    Weights are read from safetensors only. `processing` names what to do to the weights (see `PROCESSING`); some
    published dictionaries were trained on processed ones and say so when they are loaded.

    Raises:
        UserError: there is no such model or folder, it is not a causal language model, it has no safetensors, its
            weights hold NaN, or `device`, `dtype` or `processing` is unknown.
    """
    _check(device, dtype, processing)
    folder = _folder(name_or_path)
    source = str(folder) if folder else name_or_path
    commit = None if folder else _commit(name_or_path, revision)
    if folder and not any(folder.glob("*.safetensors")):
        raise UserError(f"model folder {name_or_path!r} has no *.safetensors; save it with model.save_pretrained()")
    tokenizer, bridge, fused = _boot(source, name_or_path, device, dtype, revision)
    require_finite(dict(bridge.original_model.named_parameters()), f"model {name_or_path!r}")
    content = _folder_digest(folder) if folder else digest("hub", name_or_path, commit or "")
    subject = Subject(bridge, tokenizer, name_or_path, content, commit, fused)
    return _finished(subject, processing)


def subject_from_model(model: Any, tokenizer: Any, name: str, *, processing: Sequence[str] = ()) -> Subject:
    """Return the subject of a transformers model in memory (models of one's own, benchmarks).

    Raises:
        UserError: it is not causal, its weights hold NaN, or `processing` is unknown.
    """
    from transformer_lens.model_bridge import TransformerBridge

    parameter = next(model.parameters())
    device = str(parameter.device)
    _check(device, str(parameter.dtype).removeprefix("torch."), processing)
    require_finite(dict(model.named_parameters()), f"model {name!r}")
    content = digest(
        str(model.config.to_json_string(use_diff=False)),
        tokenizer_digest(tokenizer),
        weights_digest(model.state_dict()),
    )
    # As `boot_transformers` loads: the bridge's hooks see nothing of fused attention kernels.
    model.set_attn_implementation("eager")
    fused = FusedForward(model)
    with _quiet():
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model.eval(), tokenizer=_for_bridge(tokenizer), device=device, dtype=parameter.dtype
        )
    return _finished(Subject(bridge, tokenizer, name, content, fused=fused), processing)


def _check(device: str, dtype: str, processing: Sequence[str]) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"no device is named {device!r}; there are: cpu, cuda, cuda:0, mps, …") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f'device {device!r} asked for, but this torch sees no CUDA device; use device = "cpu"')
    if dtype not in ("float32", "float16", "bfloat16", "float64"):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16, float16, float64")
    for name in processing:
        if name not in PROCESSING:
            raise UserError(f"processing {name!r} is not one of {', '.join(PROCESSING)}.{nearest(name, PROCESSING)}")


def _folder(name_or_path: str) -> Path | None:
    """Return the folder, None for a name of the hub."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1 or path.exists():
        raise UserError(f"there is no model folder {name_or_path!r}; give one with config.json or a Hugging Face name")
    return None


def _commit(name: str, revision: str | None) -> str:
    """Return the commit that `name` resolves to on the hub, refusing models that have pickled weights only."""
    from transformers.utils.hub import cached_file

    try:
        configuration = cached_file(name, "config.json", revision=revision)
        for file in ("model.safetensors.index.json", "model.safetensors"):
            found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                # …/snapshots/<commit>/config.json
                return Path(str(configuration)).parent.name
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from error
    raise UserError(
        f"model {name!r} has no safetensors on the hub, and pickled weights are never loaded; convert it first"
    )


def _not_loadable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    way_out = "give a local folder, or a Hugging Face name that is reachable or cached"
    return UserError(f"cannot load model {name!r}: {way_out} ({reason})")


def _boot(source: str, name: str, device: str, dtype: str, revision: str | None) -> tuple[Any, Any, FusedForward]:
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import transformers as source_of
    from transformers import AutoConfig, AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            config = AutoConfig.from_pretrained(source, revision=revision)
            architecture = source_of.determine_architecture_from_hf_config(config)
            model = source_of.get_hf_model_class_for_architecture(architecture).from_pretrained(
                source, revision=revision, dtype=getattr(torch, dtype), attn_implementation="eager"
            )
            fused = FusedForward(model.to(device))
            bridge = TransformerBridge.boot_transformers(
                source, hf_model=model, device=device, dtype=getattr(torch, dtype), tokenizer=_for_bridge(tokenizer)
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_loadable(name, error) from error
    bridge.eval()
    return tokenizer, bridge, fused


def _for_bridge(tokenizer: Any) -> Any:
    """Return a copy for the bridge, which gives it special tokens that the model may never have seen.

    Without a beginning: for one, the bridge would load the tokenizer again, by name.
    """
    copied = copy.deepcopy(tokenizer)
    copied.bos_token = None
    return copied


def _folder_digest(folder: Path) -> str:
    """Return the digest of everything in a model folder that its outputs depend on."""
    import hashlib

    parts: list[str] = []
    for pattern in ("*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt"):
        for path in sorted(folder.glob(pattern)):
            with path.open("rb") as file:
                parts += [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
    return digest(*parts)


def _require_causal(subject: Subject) -> None:
    """Raise UserError if what follows a token changes what the model computes there (encoders, encoder-decoders)."""
    runs = [subject.logits(torch.tensor([[1, 2, last]]))[0, 1] for last in (0, int(subject.bridge.cfg.d_vocab) - 1)]
    # One shape and one order of operations: without a way from the last token back, not even rounding differs.
    tolerance = 8 * torch.finfo(runs[0].dtype).eps * float(runs[0].abs().max())
    if float((runs[0] - runs[1]).abs().max()) > tolerance:
        raise UserError(
            f"model {subject.name!r} is not causal: later tokens change earlier vectors; use a decoder model"
        )


def _finished(subject: Subject, processing: Sequence[str]) -> Subject:
    _require_causal(subject)
    if not processing:
        return subject
    with _quiet():
        subject.bridge.process_weights(**{name: name in processing for name in PROCESSING})
    subject._fused = None  # It shares the weights as they were.
    subject.processing = tuple(name for name in PROCESSING if name in processing)
    subject.fingerprint = digest(subject.fingerprint, *subject.processing)
    return subject


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and warnings about their own defaults off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
