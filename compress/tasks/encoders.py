"""Make a class of transformers answer a text with a vector, or judge a document by a query."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from compress.maths.vector_losses import pool_tokens
from compress.tasks.adapting import adapt_forward
from compress.tasks.embedding import KEY, settle


@dataclass
class Vectors(ModelOutput):
    """The vectors of a batch ``[texts, width]`` as ``logits``, and the loss if the batch has labels that compare some
    of them."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@cache
def build_encoder_class(base: Any, kind: str, loss: Callable[[Tensor, Tensor], Tensor | None]) -> Any:
    """Return a subclass of transformers' class ``base`` whose forward pass pools the hidden states into vectors.

    Its config has the settings of :mod:`compress.tasks.embedding`. BERT's own pooler, which no vector comes from, is
    left out.
    """

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        settle(config)
        if "add_pooling_layer" in inspect.signature(base.__init__).parameters:
            kwargs["add_pooling_layer"] = False
        base.__init__(self, config, *args, **kwargs)

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Vectors:
        settings = getattr(self.config, KEY)
        output = base.forward(self, *args, **kwargs)
        states = output.last_hidden_state
        given = {**kwargs, **own.bind_partial(self, *args, **kwargs).arguments}  # by name, or by position
        mask = given.get("attention_mask")
        mask = torch.ones_like(states[..., 0]) if mask is None else mask
        vectors = pool_tokens(states, mask, settings["pooling"])
        if settings["normalise"]:
            vectors = F.normalize(vectors, dim=-1)
        return Vectors(
            loss=None if labels is None else loss(vectors, labels),
            logits=vectors,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    own = inspect.signature(base.forward)
    named = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
    before = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    subclass = adapt_forward(base, forward, kind)
    subclass.__init__ = build
    subclass.forward.__signature__ = own.replace(parameters=[*before, named])
    return subclass


@cache
def build_judge_class(base: Any, kind: str) -> Any:
    """Return a subclass of transformers' class ``base``, a classifier with one output, whose loss is the cross-entropy
    of a document's relevance; ``labels`` are ``[pairs, 2]``: the grade and the number of the query."""

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        if labels is not None:
            relevant = (labels[:, 0] > 0).float()
            output.loss = F.binary_cross_entropy_with_logits(output.logits[:, 0].float(), relevant)
        return output

    return adapt_forward(base, forward, kind)
