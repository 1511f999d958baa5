"""Edits made without anything under test: a bare transformers model and PyTorch's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny_models import bare, decoder_layers
from torch import Tensor, nn

from exegete.tools.dictionaries import PlainDictionary


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
