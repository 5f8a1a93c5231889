"""bitsandbytes' layers in place of plain ones, in memory and on disk, in the format that transformers loads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats.nbits import Floats, Weight
from compress.formats.packed import Integers
from compress.maths.rounding import Grid, Scheme
from compress.models.layers import dequantize_weight
from compress.quiet import hide_progress_bars


def replace_layers(
    model: nn.Module, layers: dict[str, nn.Linear], packed: Callable[[nn.Linear], nn.Linear]
) -> dict[str, Any]:
    """Put ``packed(layer)``, without its bias, in the place of each of the ``layers``; the model's state, to be saved.

    It is taken here because the first forward pass arranges 4-bit weights anew for a CPU with bfloat16 instructions,
    and casts biases: what is read afterwards is not what was quantized. It takes no memory of its own until then.
    """
    for name, linear in layers.items():
        layer = packed(linear).train(linear.training)
        layer.bias = linear.bias
        model.set_submodule(name, layer)
    return dict(model.state_dict())


def save_model(model: nn.Module, state: dict[str, Any], layers: Iterable[str], folder: Path, **settings: Any) -> None:
    """Write the ``state`` of ``model``, whose ``layers`` are bitsandbytes' own, to ``folder``, with these ``settings``
    of transformers' ``BitsAndBytesConfig``."""
    from transformers import BitsAndBytesConfig

    kept = list_unconverted(model, set(layers))
    model.config.quantization_config = BitsAndBytesConfig(llm_int8_skip_modules=kept, **settings)
    with hide_progress_bars():
        model.save_pretrained(folder, state_dict=dict(state))


def list_unconverted(model: nn.Module, layers: set[str]) -> list[str]:
    """What transformers must be told so that it makes bitsandbytes' layers of ``layers`` and of no other Linear layer.

    It leaves out whatever starts or ends with a name: where that would be one of the ``layers`` too (``classifier`` and
    ``pre_classifier``), a regular expression, which it knows as well, says the name and no more.
    """
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    catches = {name: any(layer.startswith(name) or layer.endswith(name) for layer in layers) for name in kept}
    return [f"^{re.escape(name)}$" if catches[name] else name for name in kept]


def extract_weights(model: nn.Module) -> dict[str, Weight]:
    """Put plain layers in the place of bitsandbytes' own; what their weights were stored as, by layer.

    Raises:
        ValueError: as :func:`values`.
    """
    found: dict[str, Weight] = {}
    for name, layer in list(model.named_modules()):
        weight: Any = getattr(layer, "weight", None)
        if hasattr(layer, "init_8bit_state"):
            scale = (weight.SCB if layer.state.SCB is None else layer.state.SCB).float()[:, None] / 127
            found[name] = Integers(Scheme(8), weight.data, Grid(scale, torch.zeros_like(scale, dtype=torch.int8)))
            plain = weight.data * scale
        elif state := getattr(weight, "quant_state", None):
            state.dtype = torch.float32
            plain = dequantize_weight(weight)
            found[name] = Floats(weight.data.view(torch.uint8), read_scales(state), state.blocksize, state.quant_type)
        else:
            continue
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False).train(layer.training)  # type: ignore[arg-type]
        linear.weight.data, linear.bias = plain, layer.bias  # type: ignore[assignment]
        model.set_submodule(name, linear)
    return found


def read_scales(state: Any) -> Tensor:
    """Those of the blocks of 4-bit weights, which may be quantized themselves."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def move_model(model: Any, device: torch.device) -> None:
    """``model.to(device)``, and what 8-bit layers keep beside their weights, which they move only when told so
    themselves."""
    model.to(device)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if hasattr(module, "init_8bit_state"):
            if module.weight.CB is not None:
                module.init_8bit_state()
            module.to(device)
