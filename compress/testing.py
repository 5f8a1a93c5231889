"""Test a stage of your own: one suite that every stage passes, on models of a few thousand random weights.

>>> from compress.techniques.prune import Prune
>>> check_technique(Prune, {"sparsity": 0.5})
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import inspect
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import SkipTest

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, LlamaConfig

from compress.artifacts.artifact import Description, load_artifact, write_artifact
from compress.errors import PostconditionError, UserError
from compress.maths.sparsity import mask_tensor
from compress.models.backbone import find_auto_class
from compress.models.layers import detect_task_kind, unwrap_model
from compress.models.matrices import matrices, measure_matrices
from compress.planning.plan import Step
from compress.planning.settings import Hardware, to_plain
from compress.running.promises import capture_state, check_bits, check_folder, check_model, compute_logits
from compress.running.resume import Checkpoints, make_trainer_options
from compress.running.training import HoldZeros
from compress.tasks.kinds import KINDS
from compress.technique import Technique, Training
from compress.techniques.finetune import FineTune
from compress.tiny_models import (
    QUIET,
    SHAPE,
    Theirs,
    make_bert,
    make_llama_lm,
    make_loader,
    make_tokenizer,
    make_trainer,
)

OFFERED = set("model metrics tokenizer task training baseline source keep_in baseline_config".split())
"""Arguments that a constructor gets from the chain and not from its YAML."""
Models = tuple[Callable[[], Any], ...]


def make_tagger() -> Any:
    """Return a Llama that tags words with one of three tags."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0})
    return find_auto_class("tokens", config).from_config(config).eval()


def make_reader() -> Any:
    """Return a BERT that answers questions by a part of a text."""
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, max_position_embeddings=40)
    return find_auto_class("span", config).from_config(config).eval()


MODELS: Models = (make_bert, make_llama_lm)
HEADS: Models = (make_tagger, make_reader)
"""Models whose heads answer at every token, for ``check_technique(..., models=HEADS)``."""


def make_embedding() -> Any:
    """Return a model that answers with vectors, for ``models`` of :func:`check_technique`."""
    torch.manual_seed(0)
    config = BertConfig(**{**SHAPE, "max_position_embeddings": 40})
    return find_auto_class("embedding", config).from_config(config).eval()


@dataclass(frozen=True)
class Case:
    """A stage to check, built as in a chain.

    Raises:
        SkipTest: a package that the stage needs is not installed.
    """

    technique: type[Technique]
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    config: Mapping[str, Any] | None = None
    models: Models = MODELS

    def __post_init__(self) -> None:
        if missing := [name for name in self.technique.packages if importlib.util.find_spec(name) is None]:
            raise SkipTest(f"{self.technique.__name__} needs {', '.join(missing)}")

    def build(self, model: nn.Module, folder: Path, training: Training | None = None) -> Any:
        """Return the stage with the arguments that a chain gives. ``folder`` is its baseline, its source and its
        cache."""
        name = self.technique.key.removeprefix("technique.")
        step = Step(name, name, self.technique, dict(self.settings), training or self.training)
        # A few classes of tokenizers add a token of their own when they are loaded.
        stored = (folder / "tokenizer.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder) if stored else make_tokenizer()
        return step.build(model=model, tokenizer=tokenizer, baseline=folder, source=folder, keep_in=folder)

    def find_models(self) -> list[Callable[[], Any]]:
        """Return the constructors of the models that the stage accepts.

        Raises:
            AssertionError: the stage accepts none of them.
        """
        reasons = {make: self._refuse(make()) for make in self.models}
        assert not all(reasons.values()), (
            f"{self.technique.__name__} accepts none of the suite's models: {' '.join(reasons.values())}"
        )
        return [make for make in self.models if not reasons[make]]

    def _refuse(self, model: nn.Module) -> str:
        try:
            self.build(model, Path()).check(model, [])
        except UserError as error:
            return str(error)
        return ""


def check_technique(
    technique: type[Technique],
    settings: Mapping[str, Any] | None = None,
    training: Training | None = None,
    config: Mapping[str, Any] | None = None,
    models: Models = MODELS,
) -> None:
    """Check that a stage keeps its contract, with ``settings`` for models of 2 blocks, 4 heads and a width of 32.

    Args:
        technique: the class of the stage.
        settings: arguments of its constructor.
        training: settings of its fit; without them the stage works in one shot.
        config: the content of its YAML, for a comparison with the constructor.
        models: functions that create a model; the suite runs on the models that the stage accepts. ``HEADS`` are models
            that tag words and that answer questions.

    Raises:
        AssertionError: the stage breaks its contract; the message says where.
        SkipTest: a package that the stage needs is not installed.
    """
    case = Case(technique, settings or {}, training or Training(), config, models)
    for check in CHECKS:
        check(case)


def check_kind(case: Case) -> None:
    """Check that the stage is a Technique that a Trainer can run."""
    name = case.technique.__name__
    assert issubclass(case.technique, Technique), f"{name} is no Technique. Inherit compress.technique.Technique."
    assert issubclass(case.technique, pl.Callback | pl.LightningModule), (
        f"{name} is neither a Callback nor a LightningModule. Inherit one of them beside Technique."
    )


def check_promises(case: Case) -> None:
    """Check on a pruned model what the chain checks after every stage: changed weights, zeros, the head, the size on
    disk, and an artifact that reloads to the same logits."""
    for make in case.find_models():
        with tempfile.TemporaryDirectory() as name:
            # 1) Write a pruned model as the stage's source
            source, into, report = (Path(name, folder) for folder in ("source", "into", "report"))
            for folder in (source, into, report):
                folder.mkdir()
            model, tokenizer = make(), make_tokenizer()
            for matrix in matrices(model).values():
                matrix.weight.masked_fill_(mask_tensor(matrix.weight.abs(), 0.5), 0)
            description = Description(detect_task_kind(model), "tiny", "random")
            write_artifact(source, model, tokenizer, description)
            model = load_artifact(source).model
            # 2) Run the stage and check the model
            before = capture_state(model)
            stage, module = _fit(case, model, source)
            model = unwrap_model(module)
            try:
                check_model(stage.key, stage, before, model)
                sizes = measure_matrices(model)
                # 3) Write the artifact and check the folder
                tokenizer = getattr(stage, "tokenizer", None) or tokenizer
                probe: Any = [tokenizer(text, return_tensors="pt") for text in ("a b c d", "w1 w2 z y x")]
                probe = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in probe]
                probe = [_end_texts(model, batch) for batch in probe]
                expected = compute_logits(stage.exported or model, probe)
                description = Description(
                    description.kind, "tiny", "random", stage.runtime, stage.leaves or description.weights
                )
                write_artifact(into, model, tokenizer, description, stage)
                reloaded = compute_logits(load_artifact(into).model, probe)
                check_folder(stage.key, stage, source, into, expected, reloaded)
                if stage.average_bits:
                    check_bits(stage.key, stage.average_bits, sizes, into)
                stage.report(report)
            except (UserError, PostconditionError) as error:
                raise AssertionError(f"{case.technique.__name__} on {make.__name__}: {error}") from error


def check_resuming(case: Case) -> None:
    """Check that a resumed training ends like an uninterrupted one, if the stage promises it."""
    training = Training(epochs=2, learning_rate=1e-2)
    if not case.training.epochs:
        return
    make = case.find_models()[0]
    with tempfile.TemporaryDirectory() as name:
        write_artifact(Path(name), make(), make_tokenizer(), Description(detect_task_kind(make()), "tiny", "random"))
        stage, whole = _fit(case, make(), Path(name), training)
        if not stage.resumes:
            return
        checkpoints = Path(name, "resume")
        with contextlib.suppress(_Stopped):
            _fit(case, make(), Path(name), training, Checkpoints(checkpoints), _Stop(at=6))
        _, again = _fit(case, make(), Path(name), training, Checkpoints(checkpoints))
    wrong = [key for key, value in again.state_dict().items() if not torch.equal(value, whole.state_dict()[key])]
    assert not wrong, (
        f"{case.technique.__name__}.resumes is True, and {wrong[0]} differs after a resumed training. Store in "
        "`state_dict` what changes during training, or set resumes = False."
    )


def check_other_modules(case: Case) -> None:
    """Check that a callback works in a script with a LightningModule of another author."""
    if issubclass(case.technique, pl.LightningModule):
        return
    make = case.find_models()[0]
    given = {"tokenizer": make_tokenizer()} if "tokenizer" in inspect.signature(case.technique).parameters else {}
    stage: Any = case.technique(**case.settings, **given)
    module: Any = Theirs(make())
    before = capture_state(module.model)
    loader = _make_loader(module.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make_trainer(stage, epochs=case.training.epochs).fit(module, loader, loader)
            check_model(stage.key, stage, before, module.model)
        except Exception as error:
            raise AssertionError(f"{case.technique.__name__} fails in another author's module: {error}") from error


def check_config(case: Case) -> None:
    """Check that the YAML and the constructor have the same settings with the same defaults."""
    if case.config is None:
        return
    name, parameters = case.technique.__name__, inspect.signature(case.technique).parameters
    ours = {key: value for key, value in case.config.items() if key not in ("_target_", "train", "calibration")}
    missing, unknown = parameters.keys() - OFFERED - ours.keys(), ours.keys() - parameters.keys()
    assert not missing, f"The YAML of {name} lacks {', '.join(sorted(missing))}, which its constructor takes. Add them."
    assert not unknown, f"The YAML of {name} has {', '.join(sorted(unknown))}, which its constructor does not take."
    for key, value in ours.items():
        default = _to_lists(to_plain(parameters[key].default))
        assert _is_open(value) or value == default, (
            f"{key} is {value!r} in the YAML of {name} and {default!r} in its constructor. Set both to one value."
        )


def check_example(case: Case) -> None:
    """Check that the example in the docstring runs. It can use ``module`` and its ``model``, ``student``, ``teacher``,
    ``loader``, ``validation_loader`` and ``tokenizer``."""
    make = case.find_models()[0]
    model = make()
    loader = _make_loader(model)
    names = {
        case.technique.__name__: case.technique,
        "Training": Training,
        "pl": SimpleNamespace(Trainer=partial(pl.Trainer, **QUIET)),
        "model": model,
        "student": model,
        "teacher": make(),
        "module": FineTune(model),
        "tokenizer": make_tokenizer(),
        "loader": loader,
        "validation_loader": loader,
    }
    name = case.technique.__name__
    text = inspect.cleandoc(case.technique.__dict__.get("__doc__") or "")
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert test.examples, f"{name} has no example in its docstring. Add a line `>>> ...`."
    try:
        doctest.DebugRunner(verbose=False).run(test, out=lambda text: None)
    except doctest.UnexpectedException as error:
        raise AssertionError(f"The example in the docstring of {name} fails: {error.exc_info[1]}") from error
    except doctest.DocTestFailure as error:
        raise AssertionError(f"The example in the docstring of {name} prints {error.got!r}") from error


CHECKS = (check_kind, check_promises, check_resuming, check_other_modules, check_config, check_example)
"""The checks of :func:`check_technique`, for tests that run them one by one on a :class:`Case`."""


def _fit(
    case: Case, model: Any, folder: Path, training: Training | None = None, *callbacks: pl.Callback
) -> tuple[Any, pl.LightningModule]:
    """Return the stage and the module after one fit with the callbacks of a chain."""
    training = training or case.training
    pl.seed_everything(0, verbose=False)
    stage = case.build(model, folder, training)
    stage.check(model, [])
    module = stage if isinstance(stage, pl.LightningModule) else FineTune(model, training=training)
    stages = [] if stage is module else [stage]
    holding = [HoldZeros()] if training.epochs else []
    last = next((callback.last() for callback in callbacks if isinstance(callback, Checkpoints)), None)
    options = make_trainer_options(Hardware(accelerator="cpu"), together=False)
    loader = _make_loader(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns of loaders without worker processes
        trainer = make_trainer(
            *stages, *holding, *callbacks, epochs=training.epochs, enable_checkpointing=bool(callbacks), **options
        )
        trainer.fit(module, loader, loader, ckpt_path=last)
    return stage, module


def _make_loader(model: nn.Module) -> DataLoader:
    """Return a loader with the labels that the model's head takes; of a decoder, text and conversations in turn."""
    kind = KINDS[detect_task_kind(model)]
    made = ({**batch, "labels": kind.make_labels(batch)} for batch in make_loader())
    batches = [_end_texts(model, batch) for batch in made]
    for batch in batches[1::2] if kind.generates else ():
        batch["labels"][:, : batch["labels"].shape[1] // 2] = -100  # conversations, of which the answer is learnt
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def _end_texts(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch; for an encoder-decoder, whose head reads the end of a text, every text ends in that token."""
    if not model.config.is_encoder_decoder:
        return batch
    ids, last = batch["input_ids"].clone(), batch["attention_mask"].sum(1) - 1
    ids[torch.arange(len(ids)), last] = model.config.eos_token_id
    return {**batch, "input_ids": ids}


class _Stopped(BaseException):
    pass


class _Stop(pl.Callback):
    """Stop training at a step, like a signal to the process."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise _Stopped


def _to_lists(value: Any) -> Any:
    """Return containers as the dicts and lists of YAML."""
    if isinstance(value, Mapping):
        return {key: _to_lists(item) for key, item in value.items()}
    return [_to_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _is_open(value: Any) -> bool:
    """Return True if another setting decides the value."""
    return isinstance(value, str) and "${" in value
