"""Generate text with a graph that returns the keys and values of the tokens so far."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig


class Decoder(ABC):
    """A graph that generates text if it is a causal language model."""

    config: PretrainedConfig

    @abstractmethod
    def __call__(self, past: Any = None, **batch: Tensor) -> Any:
        """Return the logits and, given ``past`` (from the last call, or ``()``), the keys and values so far."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        stopping_criteria: Iterable[Callable[[Tensor, None], bool]] = (),
    ) -> Tensor:
        """Return the tokens and their most likely continuation, until every text ends or a criterion is true. Texts of
        a batch are padded on the left."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ends = torch.tensor(self.config.eos_token_id if self.config.eos_token_id is not None else []).flatten()
        tokens, new, past = input_ids, input_ids, ()
        done = torch.zeros(len(tokens), 1, dtype=torch.bool)
        for _ in range(max_new_tokens):
            answer = self(past, input_ids=new, attention_mask=mask)
            new, past = answer.logits[:, -1:].argmax(-1), answer.past
            new = new.masked_fill(done, self.config.pad_token_id or 0)
            tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            done |= torch.isin(new, ends)
            if done.all() or any(criterion(tokens, None) for criterion in stopping_criteria):
                break
        return tokens
