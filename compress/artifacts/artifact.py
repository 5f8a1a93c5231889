"""Save and load artifacts: folders of weights, a tokenizer and a description of how they were made."""

from __future__ import annotations

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from compress import __version__
from compress.errors import UserError
from compress.formats.packed import save_with_packed
from compress.models.backbone import set_pad_token
from compress.models.loading import from_pretrained
from compress.runtimes.processor import require_exact_sums
from compress.runtimes.runtime import check_runtime, import_runtime
from compress.tasks.kinds import KINDS
from compress.technique import Technique

DESCRIPTION = "compress.json"
CHECKED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=CHECKED)
class Done:
    """A finished step of a chain.

    ``seconds`` is the time of the step's Trainer. ``shrinks`` is True if the step promises fewer bytes on disk.
    ``losses`` holds the mean loss of the epoch that was kept by split, if the step trained. ``trained_parameters`` is
    their number if an adapter was trained.
    """

    name: str
    settings: dict[str, Any]
    seconds: float
    trained: bool
    shrinks: bool = False
    losses: dict[str, float] = field(default_factory=dict)
    trained_parameters: int | None = None


@dataclass(frozen=True, config=CHECKED)
class Description:
    """The content of an artifact's ``compress.json``. ``version`` is that of the `compress` that wrote it."""

    kind: str
    model: str
    task: str
    runtime: str = "torch"
    weights: str = "float"
    limits: tuple[str, ...] = ()
    history: tuple[Done, ...] = field(default_factory=tuple)
    version: str = __version__

    @property
    def method(self) -> str:
        return "+".join(done.name for done in self.history[1:]) or "none"

    @property
    def processor(self) -> str | None:
        """What the last step exported it for, if it exported: ``any`` processor, or those with ``vnni``."""
        return self.history[-1].settings.get("processor") if self.history else None

    @property
    def training_time_s(self) -> float:
        """Seconds of the baseline's fine-tuning and of every stage that trained."""
        return sum(done.seconds for done in self.history if done.trained)

    @property
    def compression_time_s(self) -> float:
        """Seconds of every stage after the baseline, including retraining."""
        return sum(done.seconds for done in self.history[1:])

    @property
    def losses(self) -> dict[str, float]:
        """Mean losses of the epoch that was kept of the last step that trained, by split."""
        return next((done.losses for done in reversed(self.history) if done.losses), {})


class Artifact(NamedTuple):
    """A loaded artifact, ready to run: ``model(**tokenizer(text, return_tensors="pt")).logits``."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    description: Description


def write_artifact(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    description: Description,
    stage: Technique | None = None,
    packed: Path | None = None,
) -> None:
    """Save model, tokenizer and description into ``folder``, in the format of the last ``stage`` or as floats.

    Frozen quantized weights are copied from the artifact ``packed``, if it is given.
    """
    if packed:
        save_with_packed(model, packed, folder)
    else:
        (stage or Technique()).save(model, folder)
    save_tokenizer(tokenizer, folder)
    if description.runtime == "torch":
        KINDS[description.kind].write_files(folder, cast(PretrainedConfig, model.config))
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description), indent=2, default=str), encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer to ``folder``. The vocabulary of a tokenizer that is written in Python is copied from its own
    files: BERTweet's code writes merges that it does not read back."""
    names = {} if getattr(tokenizer, "is_fast", False) else tokenizer.vocab_files_names
    files = {name: Path(getattr(tokenizer, attribute, None) or "") for attribute, name in names.items()}
    contents = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    tokenizer.save_pretrained(folder)
    for name in contents.keys() & {file.name for file in folder.iterdir()}:
        (folder / name).write_bytes(contents[name])


def read_description(folder: Path | str, kind: str | None = None) -> Description:
    """Return the artifact's description. A plain Hugging Face folder has none and is taken as a model of ``kind``.

    Raises:
        UserError: the folder does not exist, the kind of task is unknown, or the description is not one of ours.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Set artifact=FOLDER to the `artifact` folder of a run.")
    path = folder / DESCRIPTION
    if path.is_file():
        return parse_description(path)
    if kind is None:
        raise UserError(
            f"{folder} has no {DESCRIPTION}, so the model's task is unknown. Name a task as well (task=sst2)."
        )
    return Description(kind=kind, model=folder.name, task="")


def parse_description(path: Path) -> Description:
    """Return the content of a ``compress.json``, which may be a stranger's. Nothing that it names is imported before
    it is known to be ours.

    Raises:
        UserError: a key is missing or unknown, or a value is of the wrong type or names no kind or runtime.
    """
    wrong, content = "", None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        description = Description(**content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        wrong = f"{where} is {first['input']!r:.80}; {first['msg'][:1].lower()}{first['msg'][1:]}"
        if first["type"] == "missing":
            wrong = f"{where} is not set"
    except (TypeError, ValueError) as error:
        wrong = f"it holds no description; {error}"
    else:
        if description.kind not in KINDS:
            wrong = f"kind is {description.kind!r}; expected one of {', '.join(KINDS)}"
    if wrong:
        version = content.get("version") if isinstance(content, dict) else None
        by = f"It was written by compress {version}; this is {__version__}" if version else f"This is {__version__}"
        raise UserError(f"{path}: {wrong}. {by}. Set artifact to a folder that this version can read.")
    check_runtime(description.runtime, f"{path}: runtime", stored=True)
    return description


def load_artifact(folder: Path | str, kind: str | None = None) -> Artifact:
    """Load an artifact, ready to run. A plain Hugging Face folder is loaded as a model of ``kind``.

    model, tokenizer, _ = compress.load("multirun/.../artifact")
    """
    description = read_description(folder, kind)
    if description.processor == "vnni":
        require_exact_sums(str(folder), f"technique.{description.history[-1].name}.processor")
    tokenizer = from_pretrained(AutoTokenizer, str(folder), "Artifact", "artifact")
    model = import_runtime(description.runtime).load(Path(folder), description.kind)
    set_pad_token(model, tokenizer)
    KINDS[description.kind].prepare_tokenizer(tokenizer, model.config)
    return Artifact(model, tokenizer, description)


def measure_size_bytes(folder: Path | str) -> int:
    """Return the bytes on disk of the weights that a runtime loads from ``folder``."""
    patterns = import_runtime(read_description(folder, kind="").runtime).WEIGHTS
    sizes = ([file.stat().st_size for file in Path(folder).glob(pattern)] for pattern in patterns)
    return sum(next(filter(None, sizes), []))
