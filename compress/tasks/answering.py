"""Answer the questions of EleutherAI's harness with any model that returns logits."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from tqdm.auto import tqdm

from compress.errors import UserError
from compress.tasks.kinds.base import choose_filler
from compress.tasks.tokenizers import pad_left

Pair = tuple[Any, list[int], list[int]]
"""A request's text, the tokens of its context, and those of its continuation."""


class HarnessModel(TemplateLM):
    """A model as the harness asks it, with the tokens, lengths and precision of the harness's own ``hf`` model.

    Args:
        model: called as ``model(**batch)``, it returns ``.logits`` of every position.
        tokenizer: the model's tokenizer.
        batch_size: requests that are answered together.
        device: of the model.
        label: text of the progress bar.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, device: torch.device, label: str = "") -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self._device, self.label = device, label
        self.max_length = resolve_max_length(model.config, tokenizer)
        self.stream: TextIO = sys.stderr  # the harness's own bars are hidden while it runs

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return choose_filler(self.tokenizer) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; one that begins with the token of a beginning gets no second one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **chosen)

    def show_progress(self, batches: list[Any]) -> Iterator[Any]:
        return iter(tqdm(batches, desc=self.label, unit="batch", leave=False, disable=None, file=self.stream))

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Pair], **_: Any) -> list[tuple[float, bool]]:
        """Return the log-likelihood of every continuation, and whether it is what greedy decoding would choose.

        Requests with the same input, such as the letters of a question, are one row of a batch.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            groups.setdefault(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), []).append(i)
        inputs = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
        answers: dict[int, tuple[float, bool]] = {}
        for batch in self.show_progress(list(split_batches(inputs, self.batch_size))):
            logits = self.compute_logits(batch)
            for row, tokens in enumerate(batch):
                for i in groups[tokens]:
                    wanted = torch.tensor(requests[i][2], device=logits.device)
                    # In the precision of the logits, as the harness does it.
                    scores = logits[row, len(tokens) - len(wanted) : len(tokens)].log_softmax(-1)
                    greedy = bool((scores.argmax(-1) == wanted).all())
                    answers[i] = float(scores.gather(1, wanted[:, None]).sum()), greedy
        return [answers[i] for i in range(len(requests))]

    def compute_logits(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Return the logits of rows of tokens, which are padded on the right."""
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, tokens in enumerate(rows):
            ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
        batch = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        if isinstance(self.model, nn.Module):
            del batch["attention_mask"]  # nothing attends to what is on its right
        return self.model(**batch).logits

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each in windows of the model's length that do not overlap."""
        windows: list[Pair] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows)):
            sums[owner] += value
        return sums

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of every text up to one of its stop sequences.

        Raises:
            UserError: the model does not generate, or cannot draw at random.
        """
        if not hasattr(self.model, "generate"):
            raise UserError(
                f"task.tasks names {requests[0].task_name}, which has the model write text; this model only returns "
                "logits. Set task.tasks to tasks of likelihoods or choices."
            )
        order = sorted(range(len(requests)), key=lambda i: -len(self.tok_encode(requests[i].args[0])))
        groups: dict[str, list[int]] = {}
        for i in order:
            groups.setdefault(repr(requests[i].args[1]), []).append(i)
        batches = [batch for group in groups.values() for batch in split_batches(group, self.batch_size)]
        answers: dict[int, str] = {}
        for batch in self.show_progress(batches):
            texts = self.continue_texts([requests[i].args[0] for i in batch], requests[batch[0]].args[1])
            answers.update(zip(batch, texts))
        return [answers[i] for i in range(len(requests))]

    def continue_texts(self, texts: list[str], settings: dict[str, Any]) -> list[str]:
        """Return the continuations of texts, with the ``settings`` of the harness's task."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, 256))
        stops = handle_stop_sequences(options.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
        new = options.pop("max_gen_toks")
        if options.get("temperature") == 0.0 or not options["do_sample"]:
            options.pop("temperature", None)
        rows = [self.tok_encode(text)[-(self.max_length - new) :] for text in texts]
        pad = self.tokenizer.pad_token_id or 0
        ids, mask = pad_left(rows, pad, self.device)
        width = ids.shape[1]
        if isinstance(self.model, nn.Module):
            options |= {"pad_token_id": pad, "use_cache": True}
        elif options.pop("do_sample") or options:
            names = ", ".join(["do_sample", *options])
            raise UserError(
                f"A task in task.tasks generates with {names}; an exported model only takes the most likely token. Set "
                "task.tasks to other tasks, or measure the model in PyTorch."
            )
        criteria = stop_sequences_criteria(self.tokenizer, stops, width, len(rows))
        written = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, stopping_criteria=criteria, **options
        )
        continued = self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(text, stops, None) for text in continued]


def split_batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in lists of ``size``, the last maybe shorter."""
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, size)):
        yield batch
