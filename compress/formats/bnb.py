"""Replace layers by bitsandbytes' own, in memory and on disk, in the format that transformers loads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import UserError
from compress.formats.nbits import Floats, Weight
from compress.maths.rounding import Grid, Integers, Scheme
from compress.models.matrices import Matrix, dequantize_weight, select_quantizable
from compress.quiet import hide_progress_bars


def select_convertible(model: nn.Module, skip: Sequence[str], key: str) -> dict[str, Matrix]:
    """Return the matrices that the stage ``key`` quantizes, by name: those that the setting ``key.skip`` does not
    exclude.

    Raises:
        UserError: ``skip`` does not fit the model, or transformers would load a layer as floats.
    """
    found = select_quantizable(model, skip, key, (nn.Linear, Conv1D), "bitsandbytes' format", experts=True)
    for name, matrix in found.items():
        if matrix.expert is not None:
            continue
        if not is_convertible(matrix.module) or name.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
            raise UserError(
                f"`{name}` is a {type(matrix.module).__name__} that transformers loads as floats, not as a layer of "
                f"bitsandbytes. Set technique=gptq, or add a pattern of its name to {key}.skip."
            )
    return found


def replace_layers(
    model: nn.Module, layers: Mapping[str, Matrix], packed: Callable[[Matrix], nn.Linear]
) -> dict[str, Any]:
    """Replace each of the ``layers`` by ``packed(layer)``, which has no bias, and return the model's state to save.

    The state is taken here because the first forward pass casts biases and, on a CPU with bfloat16 instructions,
    rearranges 4-bit weights: later reads would differ from what was quantized. Until then it takes no extra memory.
    """
    for name, matrix in layers.items():
        layer = packed(matrix).train(matrix.module.training)
        layer.bias = matrix.module.bias  # type: ignore[assignment]
        model.set_submodule(name, layer)
    return dict(model.state_dict())


def save_model(model: nn.Module, state: dict[str, Any], layers: Iterable[str], folder: Path, **settings: Any) -> None:
    """Write the ``state`` of ``model``, whose ``layers`` are bitsandbytes' own, to ``folder``; ``settings`` are those
    of transformers' ``BitsAndBytesConfig``."""
    from transformers import BitsAndBytesConfig

    kept = list_unconverted(model, set(layers))
    model.config.quantization_config = BitsAndBytesConfig(llm_int8_skip_modules=kept, **settings)
    with hide_progress_bars():
        model.save_pretrained(folder, state_dict=dict(state))


def is_convertible(module: nn.Module) -> bool:
    """Return whether transformers replaces the module by a layer of bitsandbytes when it loads an artifact."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return type(module) is nn.Linear or isinstance(module, Conv1D | Linear4bit | Linear8bitLt)


def list_unconverted(model: nn.Module, layers: set[str]) -> list[str]:
    """Return the names that keep transformers from converting any Linear layer but ``layers``.

    transformers skips every layer whose name starts or ends with a given name. Where that would skip one of the
    ``layers`` too (``classifier`` and ``pre_classifier``), the name is given as a regular expression.
    """
    kept = [name for name, module in model.named_modules() if is_convertible(module) and name not in layers]
    catches = {name: any(layer.startswith(name) or layer.endswith(name) for layer in layers) for name in kept}
    return [f"^{re.escape(name)}$" if catches[name] else name for name in kept]


def extract_weights(model: nn.Module) -> dict[str, Weight]:
    """Replace bitsandbytes' layers by plain ones and return their stored weights, by layer.

    Raises:
        ValueError: as :func:`~compress.models.matrices.dequantize_weight`.
    """
    stored: dict[str, Weight] = {}
    for name, layer in list(model.named_modules()):
        weight: Any = getattr(layer, "weight", None)
        if hasattr(layer, "init_8bit_state"):
            scale = (weight.SCB if layer.state.SCB is None else layer.state.SCB).float()[:, None] / 127
            stored[name] = Integers(Scheme(8), weight.data, Grid(scale, torch.zeros_like(scale, dtype=torch.int8)))
            plain = weight.data * scale
        elif state := getattr(weight, "quant_state", None):
            state.dtype = torch.float32
            plain = dequantize_weight(weight)
            stored[name] = Floats(weight.data.view(torch.uint8), read_scales(state), state.blocksize, state.quant_type)
        else:
            continue
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False).train(layer.training)  # type: ignore[arg-type]
        linear.weight.data, linear.bias = plain, layer.bias  # type: ignore[assignment]
        model.set_submodule(name, linear)
    return stored


def read_scales(state: Any) -> Tensor:
    """Return the scales of the blocks of 4-bit weights, dequantized where they are quantized themselves."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2) + state.offset


def move_model(model: Any, device: torch.device) -> None:
    """Move the model, including the 8-bit state that moves only when its own layer is moved."""
    model.to(device)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if hasattr(module, "init_8bit_state"):
            if module.weight.CB is not None:
                module.init_8bit_state()
            module.to(device)
