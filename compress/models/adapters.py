"""Train few parameters of a model in place of all: LoRA and DoRA by peft, merged into the weights, or norms and biases.

adaptation = Adaptation(model, Adapter("lora"), "baseline.adapter")
...  # train the parameters that require gradients
adaptation.merge()
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import UserError
from compress.install import format_install
from compress.maths.low_rank import add_update
from compress.models.layers import digest_tensor, find_stacks, is_inside
from compress.models.matrices import Matrix, describe_unmatched, find_zeros, matrices, read_matrices
from compress.technique import Adapter

PACKAGE = "peft"
OWN = ("rank", "alpha", "dropout", "targets")
"""Settings that `perp` has no use for."""


def list_packages(settings: Any) -> tuple[str, ...]:
    """Return the packages that an adapter of these settings needs."""
    return (PACKAGE,) if isinstance(settings, Mapping) and settings.get("kind") != "perp" else ()


def check_adapter(adapter: Adapter | None, model: nn.Module, key: str, epochs: int) -> None:
    """Raise UserError if the adapter, whose setting is ``key``, does not fit the shapes of ``model``, trains nothing,
    or needs a package that is not installed."""
    if adapter is None:
        return
    if not epochs:
        trained = key.removesuffix(".adapter") + (".train" if key.startswith("technique") else "")
        raise UserError(
            f"{key} is set and {trained}.epochs is 0, so nothing is trained. Set {trained}.epochs=1 or more, or "
            f"{key}=null."
        )
    if adapter.kind == "perp":
        if given := [name for name in OWN if getattr(adapter, name) != getattr(Adapter("perp"), name)]:
            raise UserError(
                f"{key}.{given[0]} is {getattr(adapter, given[0])}, and `perp` trains norms and biases, without a "
                f"{given[0]}. Set {key}={{kind: perp}}."
            )
        if not select_trained(model, adapter):
            raise UserError(
                f"{key}.kind is perp and `{type(model).__name__}` has no norm, bias or head. Set {key}={{kind: lora}}."
            )
        return
    if importlib.util.find_spec(PACKAGE) is None:
        raise UserError(f"{key}.kind is {adapter.kind}, which needs {PACKAGE}. Type {format_install(PACKAGE)}")
    select_targets(model, adapter, key)


def select_targets(model: nn.Module, adapter: Adapter, key: str) -> dict[str, Matrix]:
    """Return the matrices that get a product, by name.

    Raises:
        UserError: there is none, a pattern matches none, one is an expert's, or the rank is larger than one.
    """
    found = matrices(model)
    patterns = () if isinstance(adapter.targets, str) else adapter.targets
    if adapter.targets == "attention":
        layers = {name: matrix for name, matrix in found.items() if matrix.expert is None}
        found = {name: matrix for name, matrix in layers.items() if is_in_attention(model, name)}
    elif adapter.targets != "all":
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise UserError(describe_unmatched(f"{key}.targets", pattern, found))
        found = {name: matrix for name, matrix in found.items() if any(fnmatchcase(name, p) for p in patterns)}
    if not found:
        raise UserError(
            f"{key}.targets is {adapter.targets}, and `{type(model).__name__}` has no such matrix. Set targets "
            f"in {key} to all or to a list of patterns of names."
        )
    for name, matrix in found.items():
        if matrix.expert is not None:
            raise UserError(
                f"{key}.targets is {adapter.targets}, and `{name}` is an expert's, whose matrices share a parameter; "
                f"adapters are for layers of their own. Set {key}={{kind: {adapter.kind}, targets: attention}}."
            )
        if adapter.rank > (least := min(matrix.shape)):
            raise UserError(
                f"{key}.rank is {adapter.rank} and `{name}` has {matrix.rows} outputs and {matrix.inputs} inputs; a "
                f"rank is at most the smaller of them. Set {key}={{kind: {adapter.kind}, rank: {least}}}."
            )
    return found


def is_in_attention(model: nn.Module, name: str) -> bool:
    """Return whether a module is inside an attention, as the class of a module around it says."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return any("Attention" in type(module).__name__ for module in around)


def select_trained(model: nn.Module, adapter: Adapter) -> list[nn.Parameter]:
    """Return the model's own parameters that are trained: those of the head, and for `perp` norms and biases."""
    small = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad] if adapter.kind == "perp" else []
    return list(dict.fromkeys([*small, *find_head(model)]))


def find_head(model: Any) -> list[nn.Parameter]:
    """Return the parameters that only the task's head has: all beside transformers' base model, and its pooler; of
    another model all outside the blocks but embeddings. The output layer of a language model is no such head: it is as
    pretrained as the blocks."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    others = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is output]
    left_out = {id(p) for module in others for p in module.parameters()}
    if isinstance(model, PreTrainedModel):
        left_out |= {id(p) for name, p in model.base_model.named_parameters() if "pooler" not in name.split(".")}
    else:
        stacks = find_stacks(model)
        left_out |= {id(p) for name, p in model.named_parameters() if is_inside(name, stacks)}
    return [p for p in model.parameters() if id(p) not in left_out and p.requires_grad]


@dataclass(frozen=True)
class Trained:
    """How many parameters an adapter trains, of a model with so many without it."""

    count: int
    parameters: int

    @property
    def share(self) -> float:
        return self.count / self.parameters

    def __str__(self) -> str:
        return f"trains {self.count:,} parameters, {self.share:.2%} of the model's {self.parameters:,}"


class Adaptation:
    """An adapter in a model: from its addition, in place, until it is merged into the weights.

    All parameters but those of the adapter are excluded from training. The zeros of the matrices that get a product are
    held: the product is masked, in training and when it is merged.

    Args:
        model: the model to train.
        adapter: the settings of the adapter.
        key: the setting that holds them, for error messages.

    Raises:
        UserError: as :func:`check_adapter`.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, key: str) -> None:
        check_adapter(adapter, model, key, epochs=1)
        self.model: Any = model
        self.key = key
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        own = select_trained(model, adapter)
        targets = {} if adapter.kind == "perp" else select_targets(model, adapter, key)
        self.adapted = tuple(targets)
        """The names of the matrices that get a product."""
        zeros = {name: mask for name, mask in find_zeros(model).items() if name in targets}
        model.requires_grad_(False)
        if targets:
            from compress.models.masked_lora import mask_layer

            inject_products(model, adapter, targets)
            for name, mask in zeros.items():
                mask_layer(model.get_submodule(name), ~mask.T if targets[name].transposed else ~mask)
        for parameter in own:
            parameter.requires_grad_()
        self.before = self._digest()
        self.trained = Trained(sum(parameter.numel() for parameter in self._list_trained().values()), parameters)

    def _list_trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _digest(self) -> dict[str, bytes]:
        return {name: digest_tensor(parameter) for name, parameter in self._list_trained().items()}

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the products into the weights, and remove all that peft added to the model.

        Raises:
            UserError: no parameter has changed since the adapter was added.
        """
        if self._digest() == self.before:
            raise UserError(
                f"{self.key}: none of the {self.trained.count:,} trained parameters changed. Set more epochs or a "
                "larger learning rate."
            )
        for name in self.adapted:
            layer: Any = self.model.get_submodule(name)
            (matrix,) = read_matrices(name, layer.get_base_layer())
            (own,) = layer.active_adapters
            update: Tensor = layer.get_delta_weight(own)
            lengths = layer.lora_magnitude_vector[own].weight if own in layer.lora_magnitude_vector else None
            update = update.T if matrix.transposed else update
            matrix.weight.copy_(add_update(matrix.weight.to(update.dtype), update, lengths))
            self.model.set_submodule(name, matrix.module)
        if self.adapted:
            del self.model.peft_config
        for parameter, trainable in self.trainable:
            parameter.requires_grad_(trainable)


def inject_products(model: nn.Module, adapter: Adapter, targets: Mapping[str, Matrix]) -> None:
    """Replace the layers of ``targets`` by those of peft, which hold them."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules="|".join(map(re.escape, targets)),  # names in a list would match the ends of others too
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what it decides for GPT-2's transposed layers
        inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # in 16 bits, small steps would be lost
            parameter.data = parameter.data.float()
