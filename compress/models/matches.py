"""Compare the inner features of a student with its teacher's."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import PretrainedConfig

from compress.errors import UserError
from compress.maths import losses
from compress.models.blocks import read_blocks
from compress.models.families import FAMILIES, name_family
from compress.tasks.embedding import read_width

LOSSES = {
    "hidden": ("hidden_mse", "cos", "pkd", *losses.PAIRS),
    "attention": ("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"),
    "relation": ("minilm",),
}
"""Losses of every feature, by the names of TextBrewer and MiniLM."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Match:
    """A pair of features that a loss brings together: one of the student and one of the teacher.

    The names are TextBrewer's. Layers are counted from 0; for ``hidden``, 0 is the embeddings. ``fsp`` and ``mmd``
    take two layers of each model. ``proj`` is ``[linear, width of the student, width of the teacher]``. TextBrewer
    lacks the feature ``relation`` with the loss ``minilm``, over queries, keys and values in ``heads`` relation heads.
    """

    layer_T: int | tuple[int, int]
    layer_S: int | tuple[int, int]
    feature: Literal["hidden", "attention", "relation"]
    loss: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    proj: tuple[Any, ...] | None = None
    heads: Annotated[int, Field(ge=1)] = 12

    def check_settings(self, key: str) -> None:
        """Raise UserError if the settings of a match in the list at ``key`` contradict each other."""
        if self.loss not in LOSSES[self.feature]:
            raise UserError(
                f"{key}: the feature `{self.feature}` has no loss `{self.loss}`. Set one of "
                f"{', '.join(LOSSES[self.feature])}."
            )
        if self.proj and (len(self.proj) != 3 or self.proj[0] not in losses.PROJECTIONS):
            raise UserError(
                f"{key}: proj is {list(self.proj)}; expected one of {', '.join(losses.PROJECTIONS)}, "
                "the student's width and the teacher's. Set for example proj=[linear,192,384]."
            )

    def check(self, student: PretrainedConfig, teacher: PretrainedConfig, key: str) -> None:
        """Raise UserError if a model lacks the feature or the layer, or if the models' shapes differ too much."""
        for who, config in (("student", student), ("teacher", teacher)):
            if config.is_encoder_decoder:
                raise UserError(
                    f"{key}: the {who} is a `{config.model_type}`, which has an encoder and a decoder, and a match "
                    f"counts the blocks of one stack. Set {key}=[]."
                )
            # The teacher's attention is part of its answer. The student's blocks are changed, to return it undropped.
            by_name = self.feature == "relation" or (self.feature == "attention" and who == "student")
            if by_name and name_family(config) not in FAMILIES:
                raise UserError(
                    f"{key}: the feature `{self.feature}` needs the names of the layers of a `{config.model_type}`, "
                    f"the {who}; those of {', '.join(FAMILIES)} are known. Set feature=hidden, which every model has."
                )
            family = FAMILIES.get(name_family(config))
            if self.feature == "relation" and family and (family.layout != "separate" or family.shares_blocks):
                raise UserError(
                    f"{key}: the feature `relation` needs layers for queries, keys and values in every block of the "
                    f"{who}, and a `{config.model_type}` has one for all of them. Set feature=hidden or attention."
                )
        for side, layer, config in (("layer_T", self.layer_T, teacher), ("layer_S", self.layer_S, student)):
            last = config.num_hidden_layers - (self.feature != "hidden")
            if max(layer if isinstance(layer, tuple) else (layer,)) > last:
                raise UserError(
                    f"{key}: {side} is {layer} and the last `{self.feature}`, counted from 0, is {last}. Set {last} or "
                    "less."
                )
            if isinstance(layer, tuple) != (self.loss in losses.PAIRS):
                count, example = ("two layers", "[0,1]") if self.loss in losses.PAIRS else ("one layer", "1")
                raise UserError(
                    f"{key}: {side} is {layer} and `{self.loss}` takes {count}. Set for example {side}={example}."
                )
        if self.loss in ("attention_mse", "attention_ce"):
            heads = count_heads(student, self.layer_S), count_heads(teacher, self.layer_T)
            if heads[0] != heads[1]:
                other = {"attention_mse": "attention_mse_sum", "attention_ce": "attention_ce_mean"}[self.loss]
                raise UserError(
                    f"{key}: block {self.layer_S} of the student has {heads[0]} heads and block {self.layer_T} of the "
                    f"teacher {heads[1]}, and `{self.loss}` compares them one by one. Set loss={other}."
                )
        widths = read_width(student), read_width(teacher)
        narrower = widths[0] != widths[1] and not self.proj
        if self.feature == "hidden" and self.loss not in ("mmd", "nst") and narrower:
            raise UserError(
                f"{key}: the student's width is {widths[0]} and the teacher's {widths[1]}. Set "
                f"proj=[linear,{widths[0]},{widths[1]}] in the match."
            )

    def select_features(self, seen: dict[str, Any], layer: int | tuple[int, int]) -> Any:
        """Return those of a model's features that the loss compares."""
        features = seen[self.feature]
        return [features[i] for i in layer] if isinstance(layer, tuple) else features[layer]


def count_heads(config: PretrainedConfig, layer: Any) -> int:
    """Return the query heads of a block, which a cut model's config has for every block."""
    own = getattr(config, "compress", {}).get("heads")
    return int(own[layer] if own else config.num_attention_heads)


def collect_features(output: Any, relations: Relations) -> dict[str, Any]:
    """Return the features of a forward pass that a match may compare, by name."""
    return {"hidden": output.hidden_states, "attention": output.attentions, "relation": relations}


class Relations:
    """Queries, keys and values of the blocks, recorded by hooks while a model runs, if a match compares them."""

    def __init__(self, model: nn.Module, matches: tuple[Match, ...]) -> None:
        self.model, self.wanted = model, any(match.feature == "relation" for match in matches)
        self.seen: dict[int, dict[str, Tensor]] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> Relations:
        for i, block in enumerate(read_blocks(self.model) if self.wanted else ()):
            self.seen[i] = {}
            for name in ("query", "key", "value"):
                keep = partial(self._keep, self.seen[i], name)
                self.hooks.append(getattr(block, name).register_forward_hook(keep))
        return self

    @staticmethod
    def _keep(into: dict[str, Tensor], name: str, _: nn.Module, args: tuple, output: Tensor) -> None:
        into[name] = output

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self.seen[layer]
        return outputs["query"], outputs["key"], outputs["value"]


def expose_attention(student: Any, teacher: Any) -> None:
    """Let both models return their attention matrices, the student's as they are before dropout."""
    for model in (student, teacher):
        model.set_attn_implementation("eager")  # others return no matrix
    for block in read_blocks(student):
        if not isinstance(getattr(block.attention, "attention_dropout", None), nn.Module):
            vars(block.attention)["attention_dropout"] = 0.0
        for module in block.attention.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
