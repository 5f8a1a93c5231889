"""Prove on a model that texts which share a line of tokens do not see each other."""

from __future__ import annotations

import torch
from torch import nn

from compress.models.layers import evaluation_mode

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference of two computations of the same logits, as a fraction of the largest, by the weights' type."""
ROUNDED = 3e-2
"""The same in 16 bits."""


@torch.no_grad()
def keeps_boundaries(model: nn.Module) -> bool:
    """Return whether the model's answers to packed texts are those to the texts alone.

    Two texts are packed into a line as :meth:`compress.tasks.kinds.chat.Chat.pack` does: positions begin again, and
    there is neither a mask nor a cache. A model whose layers carry a state from token to token (Mamba) or that has no
    positions to begin again (BLOOM) fails.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (1, count), generator=generator).to(device) for count in (5, 7)]
    packed = {
        "input_ids": torch.cat(texts, 1),
        "position_ids": torch.cat([torch.arange(text.shape[1], device=device)[None] for text in texts], 1),
        "use_cache": False,
    }
    with evaluation_mode(model):
        alone = torch.cat([model(input_ids=text, attention_mask=torch.ones_like(text)).logits for text in texts], 1)
        try:
            together = model(**packed).logits
        except (TypeError, ValueError, RuntimeError):  # no positions, or no text without a mask
            return False
    allowed = CLOSE.get(alone.dtype, ROUNDED) * alone.abs().max()
    return bool((alone - together).abs().max() <= allowed)
