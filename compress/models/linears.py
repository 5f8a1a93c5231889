"""Store every matrix in a Linear layer of its own, for formats that know only these: GPT-2's transposed layers, and
experts, which transformers stacks in one parameter.

The entry ``compress`` of the config then names what was replaced (``linear: [Conv1D, experts]``), and the model is
built by the subclass of :func:`compress.models.shapes.build_cut_class`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.models.matrices import is_expert_list, read_matrices

REPLACED = ("Conv1D", "experts")


def use_linear_layers(model: nn.Module, replaced: Iterable[str] = REPLACED) -> None:
    """Replace the layers of the kinds ``replaced``, on any device, by Linear layers that compute the same.

    The Parameters of a ``Conv1D`` stay the same objects, so an existing optimizer can continue to train them. Experts
    get new ones.
    """
    found = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D) and "Conv1D" in replaced:
            module.weight.data = module.weight.data.T.contiguous()
            model.set_submodule(name, build_linear(module.weight, module.bias).train(module.training))
            found.add("Conv1D")
        elif is_expert_list(module) and "experts" in replaced:
            split_expert_list(module)
            found.add("experts")
    config: Any = getattr(model, "config", None)
    if found and config is not None:
        own = getattr(config, "compress", {})
        config.compress = {**own, "linear": sorted({*own.get("linear", ()), *found})}
    if "experts" in found:
        keep_names(model)


def copy_with_linear_layers(skeleton: nn.Module) -> nn.Module:
    """Return a skeleton with a Linear layer for every matrix: itself if it has no others."""
    if not any(isinstance(module, Conv1D) or is_expert_list(module) for module in skeleton.modules()):
        return skeleton
    copied = copy.deepcopy(skeleton)
    use_linear_layers(copied)
    return copied


def build_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return a layer with these Parameters, ``[rows, inputs]`` and ``[rows]``."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


class ExpertLayers(nn.Module):
    """Experts with a Linear layer for each matrix: ``experts.3.down_proj``. The class of transformers that they were
    lends its gate."""

    has_gate: bool
    _apply_gate: Any
    act_fn: Any

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        experts: list[Any] = [child for name, child in self.named_children() if name.isdigit()]
        layers = [(getattr(expert, first), expert.down_proj) for expert in experts]
        return compute_experts(self, layers, hidden_states, top_k_index, top_k_weights)


def compute_experts(
    experts: Any,
    layers: Iterable[tuple[Any, Any]],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute each expert on the tokens that chose it, by the two ``layers`` of each.

    ``hidden_states`` is ``[tokens, width]``; ``top_k_index`` and ``top_k_weights`` are ``[tokens, chosen experts]``.
    """
    output = torch.zeros_like(hidden_states)
    for expert, (enter, leave) in enumerate(layers):
        tokens, place = torch.where(top_k_index == expert)
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling() or len(tokens)):
            continue  # a graph has every expert; layers of bitsandbytes end the process where they get no token
        channels = enter(hidden_states[tokens].unsqueeze(0))  # loaders find tokens in the second of three dimensions
        channels = experts._apply_gate(channels) if experts.has_gate else experts.act_fn(channels)
        result = leave(channels).squeeze(0)
        output = output.index_add(0, tokens, result * top_k_weights[tokens, place].unsqueeze(-1))
    return output


def split_expert_list(experts: Any) -> None:
    """Turn a list of experts in place into :class:`ExpertLayers`."""
    found = read_matrices("", experts)
    stacked = [name for name, _ in experts.named_parameters(recurse=False)]
    for matrix in found:
        trained = matrix.stored.requires_grad
        bias = None if matrix.bias is None else nn.Parameter(matrix.bias.detach().clone(), trained)
        linear = build_linear(nn.Parameter(matrix.weight.clone().contiguous(), trained), bias)
        if not hasattr(experts, str(matrix.expert)):
            experts.add_module(str(matrix.expert), nn.Module())
        getattr(experts, str(matrix.expert)).add_module(matrix.parameter, linear)
    for name in stacked:
        delattr(experts, name)
    kind: Any = type(experts)
    experts.__class__ = derive_expert_layers(kind)


@functools.cache
def derive_expert_layers(base: Any) -> type[ExpertLayers]:
    """Return :class:`ExpertLayers` with the gate of ``base``."""
    return type(base.__name__, (ExpertLayers,), {"_apply_gate": base._apply_gate, "__module__": base.__module__})


def keep_names(model: nn.Module) -> None:
    """Let transformers save and load the weights under the names that they have in the model: it stacks what is named
    like an expert's layer."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).update(is_custom_code=_returns_true, _weight_conversions=None)


def _returns_true() -> bool:
    return True
