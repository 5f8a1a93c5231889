"""Run artifacts in PyTorch, loaded by transformers from any format that it knows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel

from compress.errors import UserError
from compress.formats.gguf import FILE
from compress.formats.gptq import load_model
from compress.formats.packed import describe_layer
from compress.models.backbone import find_auto_class
from compress.models.loading import SCORE_CAP, from_pretrained, load_weights
from compress.quiet import hide_progress_bars
from compress.runtimes.runtime import Loading
from compress.tasks.kinds import KINDS

STAGE = None
EXTRA = None
DEVICES = ("cpu", "cuda")
PACKAGES = ()
LIBRARY = "transformers"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", FILE)
FORMATS = {
    "compressed-tensors": ("compressed-tensors",),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "gptq": ("gptqmodel", "optimum"),
}
"""Packages that transformers needs to load a packed format. (We read GPTQ's ourselves.)"""
PACKED = ".weight_packed"
CODE = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("."{attention})
tokenizer = AutoTokenizer.from_pretrained(".")
{lines}{reading}"""
CODE_GGUF = """\
from transformers import AutoConfig, {auto}, AutoTokenizer

config = AutoConfig.from_pretrained(".")
model = {auto}.from_pretrained(".", gguf_file="{file}", config=config)
tokenizer = AutoTokenizer.from_pretrained(".")
{lines}{reading}"""
CODE_OURS = """\
import compress

model, tokenizer, _ = compress.load(".")
logits = model(**tokenizer({example}, return_tensors="pt")).logits
{reading}"""
UNEVEN = "A plain transformers config cannot describe its shapes: config.json has them under `compress`."
REPLACED = (
    "transformers stores layers of this architecture transposed (Conv1D) or several experts in one parameter, and the "
    "format of its weights knows Linear layers only, which are in their place."
)
UNREADABLE = (
    "transformers alone cannot load it: its code for this architecture initialises layers by their float weights, and "
    "these are packed."
)
READS_GGUF = (
    "transformers reads its weights as floats: `pip install gguf accelerate`. llama.cpp runs the file as it is."
)
CAPPED = "Its attention scores are capped, which of transformers' implementations only `eager` does."


def load(folder: Path, kind: str) -> PreTrainedModel:
    """Return the model in eval mode on the CPU. Its weights are floats or bitsandbytes' own; quantized activations stay
    quantized.

    Raises:
        UserError: ``folder`` holds no model, or one in a format whose library is not installed.
    """
    config = from_pretrained(AutoConfig, str(folder), "Artifact", "artifact")
    path, options = folder, dict[str, Any](dtype="auto")
    if (folder / FILE).is_file():
        path, options = folder / FILE, {"dtype": torch.float32, "config": config}
    packed: Any = getattr(config, "quantization_config", {}).get("quant_method")
    if packed == "gptq":
        return load_model(find_auto_class(kind, config), config, folder).eval()
    needed = FORMATS.get(packed, ())
    if any(importlib.util.find_spec(package.replace("-", "_")) is None for package in needed):
        raise UserError(
            f"{folder} is in the {packed} format, which needs more packages: pip install {' '.join(needed)}"
        )
    if packed == "bitsandbytes":
        options |= {
            "device_map": "cpu",
            "disable_mmap": True,
        }  # scales are not parameters, so they are not copied below
    if packed == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with hide_progress_bars():
        model, missing = load_weights(find_auto_class(kind, config), str(path), "Artifact", "artifact", **options)
    if missing:
        raise UserError(
            f"{folder} holds no weights for {', '.join(missing[:4])}, so its answers would be random. Name a folder "
            "with a model that was trained for the task."
        )
    if packed == "compressed-tensors":
        unwrap_layers(model)
    for parameter in model.parameters():
        # Copy from the mapped file: its pages are slower to read than memory, which would favour decompressed models,
        # and writing the file again would change the loaded model.
        parameter.data = parameter.data.clone()
    return model.eval()


def describe_loading(folder: Path, kind: str) -> Loading:
    """Return how to load the artifact, by transformers where its config says all shapes and its code allows it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = config.get("quantization_config", {}).get("quant_method")
    notes: tuple[str, ...] = ()
    if packed in FORMATS:
        notes = (f"Its weights are in the {packed} format: `pip install {' '.join(FORMATS[packed])}`.",)
    task = KINDS[kind]
    if (folder / FILE).is_file():
        code = CODE_GGUF.format(auto=task.auto_class, file=FILE, lines=task.lines, reading=task.reading)
        return Loading(code, (READS_GGUF,))
    ours = CODE_OURS.format(example=task.example, reading=task.reading)
    if own := config.get("compress"):
        why = [UNEVEN] * bool(own.keys() - {"linear"}) + [REPLACED] * ("linear" in own)
        return Loading(ours, (*why, *notes), needs_us=True)
    if not initialises_packed(folder, kind):
        return Loading(ours, (UNREADABLE, *notes), needs_us=True)
    capped = config.get("text_config", config).get(SCORE_CAP)
    if task.loading_code:
        return Loading(task.loading_code, notes)
    attention = ', attn_implementation="eager"' if capped else ""
    code = CODE.format(auto=task.auto_class, attention=attention, lines=task.lines, reading=task.reading)
    if "torch." in task.lines:
        code = f"import torch\n{code}"
    return Loading(code, (*notes, CAPPED) if capped else notes)


def initialises_packed(folder: Path, kind: str) -> bool:
    """Return whether transformers' own code can initialise the architecture without the ``weight`` of those layers that
    are packed in ``folder``; it initialises every model that it loads."""
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {key.removesuffix(PACKED) for key in file.keys() if key.endswith(PACKED)}  # noqa: SIM118
    if not names:
        return True
    config = from_pretrained(AutoConfig, str(folder), "Artifact", "artifact")
    with torch.device("meta"):
        model = find_auto_class(kind, config).from_config(config)
    for name, module in model.named_modules():
        vars(module).pop("_is_hf_initialized", None)
        if name in names:
            del module.weight
    try:
        model.initialize_weights()
    except AttributeError:
        return False
    return True


def unwrap_layers(model: PreTrainedModel) -> None:
    """Make plain layers of decompressed ones.

    compressed-tensors leaves a cache and wrapped forward methods, which slow every call down, and scales as unused
    parameters. A layer with quantized activations keeps its forward method, and the activations' scale as a buffer.
    """
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(model)
    module: Any
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        quantizes = scheme is not None and (scheme.input_activations or scheme.output_activations)
        if quantizes:
            module.quantized = describe_layer(module)
        for name in {"weight_scale", "weight_zero_point", "weight_shape"} & set(module._parameters):
            delattr(module, name)
        if not quantizes:
            vars(module).pop("forward", None)
            continue
        for name in set(module._parameters) - {"weight", "bias"}:
            module.register_buffer(name, module._parameters.pop(name).data.clone())
