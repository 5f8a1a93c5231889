"""Load configs, tokenizers and weights that others have stored."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from compress.cache.files import expand_path
from compress.errors import UserError
from compress.hub import offline_if_unreachable
from compress.install import format_command, format_install

log = logging.getLogger(__name__)
TRUST = "COMPRESS_TRUST_REMOTE_CODE"
SCORE_CAP = "attn_logit_softcapping"
"""Key of a config with a cap on attention scores (Gemma 2, arXiv:2408.00118)."""


def from_pretrained(auto: Any, path: str, what: str, key: str, **kwargs: Any) -> Any:
    """Return ``auto.from_pretrained(path)``; ``what`` and ``key`` name the model and its setting in errors.

    A ``path`` can also be a .gguf file, or a folder that holds nothing else of a model; its weights become floats.
    Python code that is stored with a model runs only with ``COMPRESS_TRUST_REMOTE_CODE=1`` in the environment.
    (Without an answer transformers would ask for one in the terminal.)

    Raises:
        UserError: ``path`` is neither a readable model folder nor an available model of the hub, or needs such code.
    """
    folder = expand_path(path)
    if file := find_gguf(folder):
        if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
            raise UserError(
                f"{what}: {file} is a GGUF file, and {', '.join(missing)}, which reads it, is not installed. Type "
                f"{format_install('gguf')}"
            )
        folder, kwargs = file.parent, {**kwargs, "gguf_file": file.name}
    elif folder.is_dir() and not (folder / "config.json").is_file():
        several = len(list(folder.glob("*.gguf"))) > 1
        raise UserError(
            f"{what}: the folder {path} holds several .gguf files. Set {key} to the file to load."
            if several
            else f"{what}: the folder {path} holds no config.json. Set {key} to a folder in Hugging Face format "
            "(config.json, tokenizer files, *.safetensors)."
        )
    try:
        with nullcontext() if folder.is_dir() else offline_if_unreachable():
            trusted = os.environ.get(TRUST) == "1"
            loaded = auto.from_pretrained(str(folder) if folder.is_dir() else path, trust_remote_code=trusted, **kwargs)
            if not trusted and "auto_map" in getattr(loaded, "init_kwargs", ()):
                warn_of_code(path)
            return loaded
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what}: {path} needs Python code of its own, which is not run unless you trust it. Read the *.py "
                f"files there, then set {TRUST}=1 in the environment."
            ) from error
        reason = join_lines(error)[:300]
        if folder.is_dir():
            raise UserError(
                f"{what}: the {'file' if file else 'folder'} {path} could not be loaded ({reason}). Set {key} to "
                "another model."
            ) from error
        raise UserError(
            f"{what}: `{path}` is neither a local folder nor available on the Hugging Face hub ({reason[:160]}). "
            f"Set {key} to a folder with the model's files (config.json, tokenizer, *.safetensors), or to null to "
            "build the architecture at random weights."
        ) from error


def find_gguf(path: Path) -> Path | None:
    """Return the .gguf file that ``path`` is, or the only one of a folder without a config.json."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    files = list(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    return files[0] if len(files) == 1 else None


@cache
def warn_of_code(path: str) -> None:
    log.warning(
        f"  {path} has Python code of its own for its tokenizer, which is not run; the tokenizer is the one that "
        f"transformers has for the model. Set {TRUST}=1 in the environment if you trust the code."
    )


def refuse_quantized(config: PretrainedConfig, path: str, key: str) -> None:
    """Raise UserError if the weights at ``path``, the value of ``key``, are quantized already."""
    if stored := getattr(config, "quantization_config", None):
        method = stored.get("quant_method", "a packed format") if isinstance(stored, dict) else stored.quant_method
        raise UserError(
            f"{key} is {path}, whose weights are quantized already ({getattr(method, 'value', method)}); training and "
            f"compression start from floats. Set {key} to the model that it was made from, or measure it as it is: "
            f"{format_command('evaluate')} artifact={path} task=..."
        )


def join_lines(error: Exception) -> str:
    """Return a library's message on one line, to be quoted in a sentence."""
    return " ".join(str(error).split())


def load_weights(auto: Any, path: str, what: str, key: str, **kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, and the names of the tensors that the checkpoint lacks, which are random.

    The model can be saved again, and its attention is the one that its config describes.
    """
    if find_gguf(expand_path(path)) and hasattr(transformers, "GgufConfig"):  # without it, they always become floats
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with fill_in_packed_weights():
        model, info = from_pretrained(auto, path, what, key, output_loading_info=True, **kwargs)
    if dropped := repair_generation(model):
        log.warning(
            f"  {path}: its generation config sets {', '.join(dropped)}, which has no effect beside its other settings "
            "and which transformers refuses to save. The model is loaded without it."
        )
    mismatched = [name if isinstance(name, str) else name[0] for name in info["mismatched_keys"]]
    return choose_attention(model), sorted({*info["missing_keys"], *mismatched})


def build_skeleton(build: Callable[[], Any]) -> Any:
    """Return the model that ``build`` returns, on the meta device, where it takes no memory.

    PyTorch's layers initialise their weights there too, which is half of the time and of no use.
    """
    with torch.device("meta"), no_init_weights():
        model = build()
    model.tie_weights()  # a part of transformers' initialisation
    return model


def choose_attention(model: Any) -> Any:
    """Return the model with attention that computes what its config says.

    Of transformers' implementations for every device only the eager one caps attention scores; the others leave the cap
    out and do not say so.
    """
    if getattr(model.config.get_text_config(), SCORE_CAP, None):
        model.set_attn_implementation("eager")
    return model


def repair_generation(model: Any) -> list[str]:
    """Remove the settings of the model's generation config without which transformers will save it, and return their
    names. A temperature without ``do_sample`` is loaded and ignored, but not saved."""
    config = getattr(model, "generation_config", None)
    if config is None or is_savable(config):
        return []
    model.generation_config, dropped = keep_savable(config)
    return dropped


def is_savable(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def keep_savable(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """Return a generation config with those settings of ``config`` that can be saved together, and the names of the
    other settings. Settings that are on or off come first, because they decide which others have an effect."""
    kept, left = GenerationConfig(), sorted(config.to_diff_dict())
    left.sort(key=lambda name: not isinstance(getattr(config, name, None), bool))
    for name in (*left, *left):  # again, for settings that need a later one
        before = getattr(kept, name, None)
        setattr(kept, name, copy.deepcopy(getattr(config, name, None)))
        if is_savable(kept):
            left = [other for other in left if other != name]
        else:
            setattr(kept, name, before)
    return kept, left


@contextmanager
def fill_in_packed_weights() -> Iterator[None]:
    """Let transformers initialise a model with packed layers, whose ``weight`` some architectures read for it.

    Meanwhile each packed layer has a weight on the meta device that counts as initialised.
    """
    original = PreTrainedModel.initialize_weights

    def initialize(model: PreTrainedModel) -> None:
        packed = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and not hasattr(layer, "weight")]
        for layer in packed:
            weight = torch.empty(layer.out_features, layer.in_features, device="meta")
            weight._is_hf_initialized = True  # type: ignore[attr-defined]
            vars(layer)["weight"] = weight
        try:
            original(model)
        finally:
            for layer in packed:
                del vars(layer)["weight"]

    PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = original  # type: ignore[method-assign]
