"""The fast way to a residual stream: the plain transformers model, its weights shared with the bridge, attention fused.

The bridge computes attention step by step so that every point of it has a hook, which costs a third of the time. A pass over
a corpus wants one residual point and nothing else:

1. Before the bridge takes the model apart, the module tree is copied; the tensors are not.
2. A hook before or after one decoder layer takes the vectors and ends the forward pass there.
3. A point is used only where its vectors equal the bridge's on a probe; elsewhere the bridge itself runs.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_POINT = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|in|resid_post|out)")
_TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Largest difference to the bridge that is rounding, as a share of the largest value."""

log = logging.getLogger(__name__)


class _Reached(Exception):
    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = vectors


class FusedForward:
    """A copy of a transformers model's modules over the same tensors. Make it before the model is given to a bridge."""

    def __init__(self, model: Any) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
        try:
            self._model.set_attn_implementation("sdpa")
        except ValueError:  # Gemma-2 caps its attention scores, which no fused kernel does.
            self._model.set_attn_implementation("eager")
        self._layers = _decoder_layers(self._model)
        self._fits: dict[str, bool] = {}

    def fits(self, hook_point: str, probe: Callable[[str], tuple[Tensor, Tensor]]) -> bool:
        """Return whether the vectors at `hook_point` equal the bridge's: `probe` gives tokens and what it has there."""
        if hook_point not in self._fits:
            self._fits[hook_point] = self._equals(hook_point, *probe(hook_point))
            if not self._fits[hook_point]:
                log.info("%s is read through the bridge: the plain model has no equal vectors there", hook_point)
        return self._fits[hook_point]

    def _equals(self, hook_point: str, tokens: Tensor, expected: Tensor) -> bool:
        if self._layers is None or not _POINT.fullmatch(hook_point):
            return False
        own = self.residual(tokens, hook_point)
        tolerance = _TOLERANCE[str(own.dtype).removeprefix("torch.")] * float(expected.abs().max())
        return own.shape == expected.shape and float((own - expected).abs().max()) <= tolerance

    def residual(self, tokens: Tensor, hook_point: str) -> Tensor:
        """Return the vectors at a residual point that `fits`, shape (context, position) → (context, position, width)."""
        found = _POINT.fullmatch(hook_point)
        assert found is not None and self._layers is not None
        layer = self._layers[int(found[1])]
        if found[2] in ("resid_pre", "in"):
            handle = layer.register_forward_pre_hook(_take_input, with_kwargs=True)
        else:
            handle = layer.register_forward_hook(_take_output)
        try:
            with torch.inference_mode():
                self._model(tokens, use_cache=False)
        except _Reached as reached:
            return reached.vectors
        finally:
            handle.remove()
        raise RuntimeError(f"the model never came to {hook_point}")


def _decoder_layers(model: Any) -> Any:
    """Return the list of decoder layers, the only module list as long as the model is deep; None where that is unclear."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth]
    return found[0] if len(found) == 1 else None


def _take_input(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _Reached(arguments[0] if arguments else named["hidden_states"])


def _take_output(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)
