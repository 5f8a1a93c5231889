"""Vocabulary pruning: remove the embeddings of tokens that the task does not use."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain as flatten
from itertools import pairwise
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field, FilePath, validate_call
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase

from compress.errors import UserError
from compress.models.layers import unwrap_model
from compress.tasks.formats import read_lines
from compress.technique import Technique, Training


class PruneVocab(Technique, pl.Callback):
    """Cut the tokenizer and the embeddings to the tokens that the training text uses.

    Yang et al., "TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models", 2022, arXiv:2203.15996. Our own
    code, because TextPruner writes the files of transformers 4's slow tokenizers.

    Special tokens, bytes and single characters stay, so that no text becomes unknown; for BPE also the tokens that a
    kept token is merged from. A text whose tokens all stay is tokenised as before and has the same logits (for a
    language model, among the tokens that stay); other texts are split into shorter tokens.

    Runs when the fit ends. Afterwards ``tokenizer`` is the cut tokenizer, with new ids: train further in another fit,
    on text that is tokenised again.

    Args:
        min_count: least number of uses in the training text for a token to stay.
        keep: texts whose tokens stay as well.
        keep_file: a text file of such texts, one a line.
        tokenizer: the model's tokenizer, a fast one (WordPiece, BPE or Unigram).

    Raises:
        UserError: there is no such tokenizer, or this fit is set to train.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[PruneVocab(tokenizer=tokenizer)]).fit(module, loader)
    """

    resumes = True
    files = ("keep_file",)
    shrinks = True
    limits = (
        "texts with other words cost more tokens, and a language model's perplexity, which is per token, does not "
        "compare across vocabularies"
    )

    @validate_call
    def __init__(
        self,
        min_count: Annotated[int, Field(ge=1)] = 1,
        keep: tuple[str, ...] = (),
        keep_file: FilePath | None = None,
        tokenizer: Any = None,
        training: Training | None = None,
    ) -> None:
        if training and training.epochs:
            raise UserError(
                f"{self.key}.train.epochs is {training.epochs}; these epochs would see the ids of the uncut tokenizer. "
                "Remove the setting and set technique=prune_vocab+finetune."
            )
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        self.min_count = min_count
        self.keep = [*keep, *(read_lines(keep_file) if keep_file else [])]
        self.tokenizer = tokenizer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.tokenizer is None:
            raise UserError("`prune_vocab` has no tokenizer to cut. Pass the model's: PruneVocab(tokenizer=...).")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # 1) Collect the tokens in use
        model: Any = unwrap_model(pl_module)
        tokens = {index: token for token, index in self.tokenizer.get_vocab().items()}
        seen = Counter(flatten.from_iterable(read_training_ids(trainer)))
        wanted = {index for index, count in seen.items() if count >= self.min_count}
        wanted.update(*(self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.keep))
        wanted.update(*(ids for _, _, ids in named_tokens(model)))
        # 2) Add the tokens that must stay with them
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        kept = find_kept_tokens(
            content, {tokens[index] for index in wanted & tokens.keys()}, self.tokenizer.all_special_tokens
        )
        ids = [index for index, token in sorted(tokens.items()) if token in kept]
        rows = model.get_input_embeddings().num_embeddings
        if ids[-1] >= rows:
            raise UserError(
                f"The tokenizer has the token {tokens[ids[-1]]!r} with the id {ids[-1]} and the model {rows} "
                "embeddings. Add an embedding for every token first (resize_token_embeddings)."
            )
        # 3) Cut tokenizer and embeddings
        if len(ids) == rows:
            return
        cut = cut_tokenizer(self.tokenizer, content, [tokens[index] for index in ids])
        cut_embeddings(model, ids)
        self.tokenizer = cut


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if the tokenizer cannot be cut without changing the tokens of texts."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"`prune_vocab` cuts fast tokenizers and `{type(tokenizer).__name__}` is none. Save the model with the "
            "tokenizer.json of its fast tokenizer, or remove the stage."
        )
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    marked = model["type"] == "BPE" and (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
    if model["type"] not in ("WordPiece", "BPE", "Unigram") or marked:
        raise UserError(
            f"`prune_vocab` cuts WordPiece, Unigram and BPE without marks at the ends of words, and this tokenizer is "
            f"{model['type']}{' with such marks' if marked else ''}. Remove the stage."
        )


def read_training_ids(trainer: pl.Trainer) -> Iterator[Iterable[int]]:
    """Yield the token ids of the training text: the datamodule's rows, or the batches of the training loader."""
    if tokenised := getattr(getattr(trainer, "datamodule", None), "tokenised", None):
        for rows in tokenised("train").select_columns("input_ids").iter(1000):
            yield from rows["input_ids"]
        return
    trainer.fit_loop.setup_data()  # does nothing if it is set up already
    for batch in trainer.train_dataloader or ():
        yield batch["input_ids"].flatten().tolist()


def find_kept_tokens(content: dict[str, Any], wanted: set[str], special: Iterable[str] = ()) -> set[str]:
    """Return the tokens that must stay, so that texts of ``wanted`` tokens are tokenised as before and no other text
    becomes unknown. ``content`` is the tokenizer.json.

    WordPiece takes the longest token at every place and Unigram the best path; both find the same tokens in a smaller
    vocabulary. BPE's merges that lead to a token are all inside this token, so other merges can be removed. (A word
    that WordPiece did not know stays unknown if every character of a token is itself a token, as trainers ensure.)
    """
    model = content["model"]
    vocab = [piece for piece, _ in model["vocab"]] if model["type"] == "Unigram" else model["vocab"]
    prefix = model.get("continuing_subword_prefix") or ""
    letters = {token for token in vocab if len(token.removeprefix(prefix)) == 1}
    bytewise = {token for token in vocab if re.fullmatch("<0x[0-9A-F]{2}>", token)}
    whole = {*special, *(added["content"] for added in content["added_tokens"])}
    kept = {*wanted, *whole, *letters, *bytewise}
    if model["type"] == "Unigram":
        kept.add(min(model["vocab"], key=lambda entry: entry[1])[0])  # its score sets the cost of unknown characters
        if model["unk_id"] is not None:
            kept.add(vocab[model["unk_id"]])
    elif model.get("unk_token"):
        kept.add(model["unk_token"])
    if model["type"] == "BPE":
        ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
        kept.update(*(find_merged_tokens(token, ranks) for token in wanted - whole))
    return kept


def find_merged_tokens(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """Return every token that BPE merges on the way from the characters of ``token`` to ``token`` itself."""
    parts, made = list(token), set()
    while merges := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, i = min(merges)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        made.add(parts[i])
    return made


def cut_tokenizer(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], kept: list[str]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with only the tokens ``kept``, numbered in that order. ``content`` is the tokenizer.json."""
    # 1) Cut the vocabulary and the merges
    ids, content = {token: index for index, token in enumerate(kept)}, copy.deepcopy(content)
    model = content["model"]
    if model["type"] == "Unigram":
        unknown = None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in ids]
        model["unk_id"] = None if unknown is None else ids[unknown]
    else:
        model["vocab"] = {token: ids[token] for token in model["vocab"] if token in ids}
    if model["type"] == "BPE":
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in model["vocab"] and right in model["vocab"] and left + right in model["vocab"]
        ]
    # 2) Renumber the tokens that the other parts of the file name
    for added in content["added_tokens"]:
        added["id"] = ids[added["content"]]
    if content["padding"]:
        content["padding"]["pad_id"] = ids.get(content["padding"]["pad_token"], 0)
    outer = content["post_processor"] or {}
    for processor in outer.get("processors", [outer]):
        for entry in processor.get("special_tokens", {}).values():  # of a TemplateProcessing
            entry["ids"] = [ids[token] for token in entry["tokens"]]
        for name in {"cls", "sep"} & processor.keys():  # of a Bert- or RobertaProcessing
            processor[name] = [processor[name][0], ids[processor[name][0]]]
    # 3) Build the tokenizer and check its numbers
    cut = copy.deepcopy(tokenizer)
    cut._tokenizer = Tokenizer.from_str(json.dumps(content))
    if (numbers := cut.get_vocab()) != ids:
        odd = next(iter(numbers.items() ^ ids.items()))[0]
        raise UserError(f"The id of {odd!r} cannot be set in the cut tokenizer. Remove the stage `prune_vocab`.")
    return cut


@torch.no_grad()
def cut_embeddings(model: Any, ids: list[int]) -> None:
    """Keep only the embeddings of the tokens ``ids``, in that order, at the model's input and, if it predicts tokens,
    at its output. Renumber the tokens that its configs name.

    Raises:
        UserError: the model counts positions from the id of the padding token, and this id would change.
    """
    new = {old: index for index, old in enumerate(ids)}
    words = model.get_input_embeddings()  # BART's encoder and decoder have modules of their own for the same weight
    counted = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not words.weight)
    if moved := [
        m.padding_idx for m in counted if m.padding_idx is not None and new.get(m.padding_idx) != m.padding_idx
    ]:
        raise UserError(
            f"`{model.config.model_type}` counts positions from the id of its padding token, and this id would change "
            f"from {moved[0]} to {new.get(moved[0])}. Remove the stage `prune_vocab`."
        )

    def weights() -> list[nn.Parameter]:
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        return [weight for layer in layers if layer is not None for weight in layer.parameters()]

    padding, rows = words.padding_idx, [weight[ids].clone() for weight in weights()]
    named = list(named_tokens(model))
    model.resize_token_embeddings(len(ids), mean_resizing=False)
    for weight, row in zip(weights(), rows):
        weight.copy_(row)
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is words.weight:
            module.padding_idx = new.get(padding)
    for config, key, tokens in named:
        left = [new[token] for token in tokens if token in new]
        setattr(config, key, left if isinstance(getattr(config, key), list) else next(iter(left), None))


def named_tokens(model: Any) -> Iterator[tuple[Any, str, list[int]]]:
    """Yield the token ids that the model's configs name (``eos_token_id`` can be a list), each with config and key."""
    for config in filter(None, (model.config, getattr(model, "generation_config", None))):
        for key, value in config.to_dict().items():
            if key.endswith("_token_id") and value is not None:
                yield config, key, value if isinstance(value, list) else [value]
