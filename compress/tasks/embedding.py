"""Read and write how a model turns a text into a vector: pooling, length and prompts, as sentence-transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from compress.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

STRICT = ConfigDict(extra="forbid")
KEY = "sentence_embedding"
"""The entry of a model's config with these settings."""
POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
"""Our names of sentence-transformers' poolings."""
OLD_POOLING = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""The names under which models store the prompt of a document."""


@dataclass(frozen=True, config=STRICT)
class Prompts:
    """The text before a text: before every text of a pair, a query, or a document. None: what the model stores."""

    text: str | None = None
    query: str | None = None
    document: str | None = None


@dataclass(frozen=True, config=STRICT)
class Embedding:
    """How a task reads vectors from a model; None takes what the model's folder says.

    Attributes:
        pooling: ``mean`` of the last hidden states (the default for an encoder), ``cls`` for that of the first token,
            ``last`` for that of the last token (the default for a decoder).
        normalise: whether vectors are scaled to length 1, by default yes.
        prompts: text that is put before the texts.
        scores: lowest and highest score of a pair in the data; training brings cosines from 0 to 1 in line with them.
        negatives: hard negatives for each query of a training batch: documents that BM25 finds and that are not
            relevant.
    """

    pooling: Literal["mean", "cls", "last"] | None = None
    normalise: bool | None = None
    prompts: Prompts = Prompts()
    scores: tuple[float, float] = (0.0, 1.0)
    negatives: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.scores[0] >= self.scores[1]:
            raise UserError(
                f"task.embedding.scores is {list(self.scores)}; the lowest score and a higher one are expected. Set "
                "task.embedding.scores=[0,5]."
            )


def read_settings(path: str, config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of the model at ``path``, a folder or an id of the hub; the defaults of its architecture if
    that is no folder of sentence-transformers, or empty.

    Raises:
        UserError: the folder asks for what is not supported.
    """
    settings: dict[str, Any] = {
        "pooling": "last" if is_decoder(config) else "mean",
        "normalise": True,
        "prompts": {},
        "max_length": None,
    }
    modules = _read_json(path, "modules.json") if path else None
    if modules is None:
        return settings
    settings["normalise"] = False
    for module in modules:
        name = str(module["type"]).rpartition(".")[2]
        if name == "Normalize":
            settings["normalise"] = True
        elif name == "Pooling":
            settings["pooling"] = _read_pooling(path, f"{module['path']}/config.json".removeprefix("/"))
        elif name != "Transformer" or module["path"] not in ("", "."):
            what = f"`{name}`" if name != "Transformer" else f"a transformer in the folder {module['path']}"
            raise UserError(
                f"modules.json of {path} lists {what}; a transformer in the folder itself, Pooling and Normalize are "
                "supported. Set model.path to another model, or to a copy without modules.json."
            )
    about = _read_json(path, "config_sentence_transformers.json") or {}
    prompts = {name: text for name, text in (about.get("prompts") or {}).items() if text}
    default = prompts.get(about.get("default_prompt_name") or "", "")
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if name in prompts), default)
    named = {"text": default, "query": prompts.get("query", default), "document": document}
    settings["prompts"] = {name: text for name, text in named.items() if text}
    settings["max_length"] = (_read_json(path, "sentence_bert_config.json") or {}).get("max_seq_length")
    return settings


def _read_pooling(path: str, file: str) -> str:
    stored = _read_json(path, file) or {}
    modes = stored.get("pooling_mode", [name for name in OLD_POOLING if stored.get(f"pooling_mode_{name}")])
    modes = [modes] if isinstance(modes, str) else modes
    known = [{**POOLING, **OLD_POOLING}.get(mode) for mode in modes]
    if len(known) != 1 or known[0] is None or not stored.get("include_prompt", True):
        asked = " and ".join(map(str, modes)) or "an unknown pooling"
        without = "" if stored.get("include_prompt", True) else " without the prompt's tokens"
        raise UserError(
            f"{file} of {path} pools by {asked}{without}; one of mean, cls and lasttoken with the prompt is "
            "supported. Set model.path to another model."
        )
    return str(known[0])


def _read_json(path: str, file: str) -> Any:
    """Return the content of a file of a model; None if the model has no such file."""
    from transformers.utils.hub import cached_file

    found: Any = Path(path, file)
    if not Path(path).exists():
        try:
            found = cached_file(path, file, _raise_exceptions_for_missing_entries=False)
        except OSError:
            found = None
    if found is None or not Path(found).is_file():
        return None
    return json.loads(Path(found).read_text(encoding="utf-8"))


def is_decoder(config: PretrainedConfig) -> bool:
    """Return whether the architecture reads left to right, so that only the last token has seen the whole text. A
    causal head does not decide this, because BERT has one too; a head for masked language modelling does."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    name = config.model_type
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def settle(config: PretrainedConfig, wanted: Embedding | None = None, exported: bool = False) -> dict[str, Any]:
    """Return the settings of the model of ``config``, and store them there: those that it has, those of its folder, or
    the defaults, and above all what is ``wanted``.

    Raises:
        UserError: the architecture has an encoder and a decoder, its folder asks for what is not supported, or the
            model is ``exported`` to a graph that pools otherwise.
    """
    if config.is_encoder_decoder:
        raise UserError(
            f"`{config.model_type}` has an encoder and a decoder, and a vector is read from one stack of blocks. Set "
            "model.path to an encoder or a decoder."
        )
    stored = getattr(config, KEY, None)
    settings = dict(stored) if stored else read_settings(getattr(config, "_name_or_path", ""), config)
    if wanted:
        chosen = {"pooling": wanted.pooling, "normalise": wanted.normalise}
        for name, value in chosen.items():
            if exported and value not in (None, settings[name]):
                raise UserError(
                    f"task.embedding.{name} is {str(value).lower()}, and the exported graph was made with "
                    f"{str(settings[name]).lower()}. Set task.embedding.{name}=null, or export the model again."
                )
        settings |= {name: value for name, value in chosen.items() if value is not None}
        asked = {name: getattr(wanted.prompts, name) for name in ("text", "query", "document")}
        merged = {**settings["prompts"], **{name: text for name, text in asked.items() if text is not None}}
        settings["prompts"] = {name: text for name, text in merged.items() if text}
    setattr(config, KEY, settings)
    return settings


def read_width(config: Any) -> int:
    """Return the dimensions of the hidden states of a model, which may be fewer than a plain config can say."""
    return int(getattr(config, "compress", {}).get("width") or config.hidden_size)


def read_prompts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the prompts by the role of a text: ``text``, ``query`` or ``document``."""
    return dict(tokenizer.init_kwargs.get("prompts") or {})


def write_sentence_transformers(folder: Path, config: PretrainedConfig) -> None:
    """Write beside a model of transformers what sentence-transformers needs to compute the same vectors."""
    settings, width = getattr(config, KEY), read_width(config)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] * settings["normalise"])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (path, name) in enumerate(parts)
    ]
    pooling = {f"pooling_mode_{name}": ours == settings["pooling"] for name, ours in OLD_POOLING.items()}
    unused = dict.fromkeys(("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens"), False)
    prompts = settings["prompts"]
    about = {
        "prompts": prompts,
        "default_prompt_name": "text" if "text" in prompts else None,
        "similarity_fn_name": "cosine",
    }
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **pooling,
            **{f"pooling_mode_{name}": value for name, value in unused.items()},
            "include_prompt": True,
        },
        "config_sentence_transformers.json": about,
        "sentence_bert_config.json": {"max_seq_length": settings["max_length"], "do_lower_case": False},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    if settings["normalise"]:
        (folder / "2_Normalize").mkdir(exist_ok=True)
        (folder / "2_Normalize" / "config.json").write_text("{}", encoding="utf-8")
