"""Write a language model as a file of llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from compress.errors import PostconditionError, UserError
from compress.exporting.tracing import strip_config
from compress.exporting.vocabulary import NONE, Vocabulary
from compress.formats.gguf import FILE, FREQUENCIES, LAYOUTS, choose_type, pack_integers
from compress.maths.rounding import Integers
from compress.models.batches import Batch

HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""Layers whose outputs get rotary positions, with the key of the config that counts their heads."""
FITS = 2**-9
"""Largest change of a kept weight by scales in float16, as a fraction of the layer's largest weight."""
ROPE = ("default", "linear", "llama3")
"""Types of rotary positions that :func:`add_rope` and :func:`list_extra_tensors` describe."""


def export(model: Any, example: Batch, folder: Path) -> None:
    """Write the model in float32 to ``folder``, for the runtime to load.

    Raises:
        UserError: llama.cpp does not have such a model.
    """
    check_layout("hardware.runtime", model)
    write_file(model, folder / FILE, {}, {}, NONE)
    describe_config(model).save_pretrained(folder)


def describe_config(model: Any) -> PretrainedConfig:
    """Return the config by which transformers reads the file, whose architecture may have another name there."""
    config = strip_config(model)
    name = LAYOUTS[config.model_type].name
    return config if name == config.model_type else AutoConfig.for_model(**{**config.to_dict(), "model_type": name})


def check_layout(key: str, model: nn.Module) -> None:
    """Raise UserError if llama.cpp would compute something else than the ``model``, maybe a skeleton."""
    config: Any = model.config
    reason = ""
    if config.model_type not in LAYOUTS or not type(model).__name__.endswith("ForCausalLM"):
        known = ", ".join(LAYOUTS)
        reason = f"llama.cpp's files are written of language models of the families {known}; this is a"
        reason += f" {type(model).__name__}"
    elif hasattr(config, "compress"):
        reason = "blocks of different shapes, or a width that the config cannot say, do not fit llama.cpp's layout"
    elif getattr(config, "hidden_act", "silu") != "silu":
        reason = f"llama.cpp's layout has the activation silu, and this model {config.hidden_act}"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()) or slides(config):
        reason = f"llama.cpp's layout attends to all tokens, and this model to the last {config.sliding_window}"
    elif (kind := config.rope_parameters["rope_type"]) not in ROPE:
        reason = f"rotary positions are written of the types {', '.join(ROPE)}, and this model has {kind}"
    if reason:
        raise UserError(f"{key}: {reason}. Set technique=onnx or technique=openvino, or choose another model.")


def slides(config: Any) -> bool:
    """Return whether attention ends before the model's positions do; families without ``layer_types`` set a window."""
    window = getattr(config, "sliding_window", None)
    typed = getattr(config, "layer_types", None) is not None
    return window is not None and not typed and window < config.max_position_embeddings


def write_file(
    model: Any, path: Path, kinds: Mapping[str, str], kept: Mapping[str, Integers], vocabulary: Vocabulary
) -> None:
    """Write the model to ``path``.

    Args:
        kinds: types of layers that are rounded here, by name; others are ``F32``.
        kept: integers of layers that are written as they are.
        vocabulary: the model's tokenizer.
    """
    import gguf

    # 1) Describe the model and its tokenizer
    config, layout = model.config, LAYOUTS[model.config.model_type]
    writer = gguf.GGUFWriter(path, layout.name)
    types = {name: kinds.get(name, "F32") for name in kinds}
    types |= {name: str(choose_type(weight.scheme)) for name, weight in kept.items()}
    add_settings(writer, config, types.values())
    add_vocabulary(writer, vocabulary, config)
    # 2) Describe every tensor, then write one after the other, so that memory holds one of them
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.name.upper()], config.num_hidden_layers)
    tensors = list_tensors(model)
    extra = list_extra_tensors(config, model)
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        kind = gguf.GGMLQuantizationType[types.get(layer, "F32") if part == "weight" else "F32"]
        size, each = gguf.GGML_QUANT_SIZES[kind]
        bytes = tensor.numel() // size * each
        writer.add_tensor_info(f"{names.get_name(layer)}.{part}", tensor.shape, np.dtype(np.float32), bytes, kind)
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        order = order_rows(layer, len(tensor), config) if layout.interleaves else None
        if part == "weight" and layer in kept:
            stored = pack_integers(reorder_rows(kept[layer], order))
        else:
            floats = tensor.detach().float() if order is None else tensor.detach().float()[order]
            kind = gguf.GGMLQuantizationType[types.get(layer, "F32") if part == "weight" else "F32"]
            stored = gguf.quantize(np.ascontiguousarray(floats.numpy()), kind)
        writer.write_tensor_data(stored)
    for tensor in extra.values():
        writer.write_tensor_data(tensor.numpy())
    writer.close()


def measure_change(model: Any, path: Path, kept: Mapping[str, Integers], key: str) -> float:
    """Return the largest change of the layers ``kept`` in the file at ``path``, as a fraction of a layer's largest
    weight.

    Raises:
        PostconditionError: the file has other weights than the ``model``; ``key`` is the setting of the stage.
    """
    import gguf

    layout, config = LAYOUTS[model.config.model_type], model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[layout.name.upper()], config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} if kept else {}
    largest = 0.0
    for name in kept:
        weight, tensor = model.get_submodule(name).weight.detach(), stored[f"{names.get_name(name)}.weight"]
        order = order_rows(name, len(weight), config) if layout.interleaves else None
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        change = (found - (weight if order is None else weight[order])).abs().max() / weight.abs().max().clamp(
            min=1e-30
        )
        if not change <= FITS:
            raise PostconditionError(
                f"`{key.rpartition('.')[2]}` should keep the integers of `{name}`, but its weights in the file differ "
                f"by up to {change:.2%} of the largest. Set {key}.precision=f32 to write floats."
            )
        largest = max(largest, change.item())
    return largest


def list_tensors(model: Any) -> dict[str, Tensor]:
    """Return the model's weights and biases by name, without an output layer that is the table of embeddings."""
    state: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def order_rows(layer: str, rows: int, config: Any) -> Tensor | None:
    """Return the order in which llama.cpp has the ``rows`` of a layer whose outputs get rotary positions: the channels
    that are turned together are neighbours, not halves of a head. None for other layers."""
    count = HEADS.get(layer.rpartition(".")[2])
    if count is None:
        return None
    return torch.arange(rows).view(getattr(config, count), 2, -1).transpose(1, 2).flatten()


def reorder_rows(weight: Integers, order: Tensor | None) -> Integers:
    """Return the weights with their rows in another order."""
    if order is None:
        return weight
    grid = type(weight.grid)(*(part[order] for part in weight.grid))
    return weight._replace(integers=weight.integers[order], grid=grid)


def add_settings(writer: Any, config: Any, types: Any) -> None:
    """Add what llama.cpp needs to know of the architecture."""
    import gguf

    writer.add_name(LAYOUTS[config.model_type].name)
    common = max([*types], key=list(types).count, default="F32")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if common == "F32" else f"MOSTLY_{common}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def list_extra_tensors(config: Any, model: Any) -> dict[str, Tensor]:
    """Return the tensors that are no parameters of the model: by how much Llama 3 slows each rotary frequency."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return {}
    slowed = model.get_decoder().rotary_emb.inv_freq.float().cpu()
    steps = torch.arange(len(slowed), dtype=torch.float32) / len(slowed)
    return {FREQUENCIES: torch.exp(-steps * math.log(rope["rope_theta"])) / slowed}


def add_vocabulary(writer: Any, vocabulary: Vocabulary, config: Any) -> None:
    """Add the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == "none":
        return
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special:
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds[0])
    writer.add_add_eos_token(vocabulary.adds[1])
    writer.add_add_space_prefix(vocabulary.prefix)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
