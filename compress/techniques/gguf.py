"""Export to llama.cpp's format, in full or lower precision."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

import pytorch_lightning as pl
from pydantic import validate_call
from torch import nn

from compress.errors import UserError
from compress.exporting.agreement import NEGLIGIBLE, measure_on_validation, require_kept
from compress.exporting.gguf import check_layout, describe_config, measure_change, write_file
from compress.exporting.stage import Export, check_readable
from compress.exporting.tracing import is_float32
from compress.exporting.vocabulary import NONE, Vocabulary, describe_tokenizer
from compress.formats.gguf import BLOCK, FILE, choose_type, divides
from compress.formats.packed import read_integers
from compress.install import format_install
from compress.maths.rounding import Scheme
from compress.models.batches import Batch, read_validation_batches, spread_evenly
from compress.models.layers import detect_task_kind, evaluation_mode, unwrap_model
from compress.models.matrices import Matrix, count_inputs, find_all_matrices
from compress.runtimes.runtime import find_missing, import_runtime
from compress.tasks.kinds import KINDS
from compress.techniques.prune import Prune

READ_AS_FLOATS = "PyTorch reads the weights as floats to measure them: less to store, no speed there"
NO_TOKENIZER = "the file has no tokenizer, so programs must give tokens"
ROUNDED = 0.1
"""Difference of the logits by which llama.cpp, which rounds inputs to 8 bits, may answer otherwise than PyTorch."""
COMPARED = 32  # texts whose tokens by llama.cpp are compared with the tokenizer's


class GGUF(Export):
    """Export a language model as one file of llama.cpp, with its tokenizer and chat template.

    Runs when the fit ends. The model itself stays unchanged, on the CPU. The families are those of the layouts of
    Llama, Mistral, Qwen2 and Qwen3; check_layout names what is not written.

    - None, the default: the precision of the chain's model. Floats are stored in float32. Weights that ``gptq``,
      ``awq`` or ``mixed`` have rounded keep their integers, in the type of the format that holds them: ``q4_0``,
      ``q4_1`` with zero points, or ``q8_0``. Their scales are stored in float16. So they do in all other precisions
      except ``f32``.
    - ``f32``: everything in float32. ``f16``: the matrices in float16.
    - ``q8_0``: integers of 8 bits with a scale for every 32 weights of a row, rounded to nearest.
    - ``q4_0``, ``q4_1``: integers of 4 bits around zero, or from the block's lowest value. Embeddings and the output
      layer have 8 bits.

    llama.cpp rounds the inputs of quantized matrices to 8 bits in blocks of 32.

    Args:
        precision: precision of the weights.
        vocabulary: whether the file has the tokenizer; without it a program must give tokens.
        runtime: what measures the file: ``llama_cpp``, or ``torch``, which reads it as floats.
        skip: layers that stay floats: ``embeddings``, ``head`` (the output layer) and patterns of layer names.
        tokenizer: the model's tokenizer; the chain passes it.
        source: folder of the artifact that the stage starts from, for its integers.

    Raises:
        UserError: llama.cpp has no such model or tokenizer, blocks do not divide a layer, or no type holds an earlier
            stage's integers.

    Example:
        >>> pl.Trainer(max_epochs=1, callbacks=[GGUF(precision="q8_0", runtime="torch")]).fit(module, loader)
    """

    needs = ("float", "packed")
    leaves = "gguf"
    runtime = "llama_cpp"
    packages = ("gguf", "accelerate")
    instead = MappingProxyType({"nf4": "precision=q4_0", "int8": "precision=q8_0"})

    @validate_call
    def __init__(
        self,
        precision: Literal["f32", "f16", "q8_0", "q4_0", "q4_1"] | None = None,
        vocabulary: bool = True,
        runtime: Literal["llama_cpp", "torch"] = "llama_cpp",
        skip: tuple[str, ...] = (),
        tokenizer: Any = None,
        source: Path | None = None,
    ) -> None:
        super().__init__(precision, skip, source, (), "any")
        self.vocabulary = vocabulary
        self.runtime = runtime
        self.words = tokenizer

    @property
    def lowers_precision(self) -> bool:
        return self.precision not in (None, "f32")

    @property
    def rounds_weights(self) -> bool:
        return self.precision in ("q8_0", "q4_0", "q4_1")

    @property
    def keeps(self) -> bool:
        """True if weights that an earlier stage has rounded are kept."""
        return self.precision != "f32"

    def check(self, skeleton: nn.Module, before: list[Any]) -> None:
        require_runtime(self.key, self.runtime)
        check_readable(self.key, before)
        if not KINDS[detect_task_kind(skeleton)].generates:
            raise UserError(
                f"`{self.key.rpartition('.')[2]}` writes language models, and `{type(skeleton).__name__}` is none. Set "
                "technique=onnx or technique=openvino, or a task whose models generate text (task=toy_lm)."
            )
        check_layout(self.key, skeleton)
        inside = count_inputs(find_all_matrices(skeleton, embeddings=False, head=False))
        for stage in before if self.keeps else ():
            if stage.leaves == "packed":
                for scheme in getattr(stage, "schemes", [getattr(stage, "scheme", Scheme())]):
                    check_scheme(self.key, stage.key, scheme, inside)
        if self.precision == "q4_1" and any(isinstance(stage, Prune) for stage in before):
            raise UserError(
                f"{self.key}.precision is q4_1, whose integers begin at the lowest weight of a block, so that zeros of "
                f"the earlier `prune` would become small numbers. Set {self.key}.precision=q4_0 or q8_0."
            )
        if self.lowers_precision:
            layers = self.chosen(skeleton)
            check_blocks(self.key, str(self.precision), layers if self.rounds_weights else {})
        self.describe_words(skeleton)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # 1) Choose a type for every layer
        model: Any = unwrap_model(pl_module)
        vocabulary = self.describe_words(model)
        kept = read_integers(self.source) if self.source and self.keeps else {}
        self.shrinks = self.lowers_precision and is_float32(model)
        layers = self.chosen(model) if self.lowers_precision else {}
        inside = find_all_matrices(model, embeddings=False, head=False)
        kind = str(self.precision).upper()
        around = "Q8_0" if self.rounds_weights else kind  # a table of 4 bits would cost more than it saves
        few = {name: kind if name in inside else around for name in layers if name not in kept}
        # 2) Write the file
        self.folder = TemporaryDirectory()  # exists as long as the stage
        folder = Path(self.folder.name)
        model.cpu().float()
        write_file(model, folder / FILE, few, kept, vocabulary)
        describe_config(model).save_pretrained(folder)
        # 3) Compare it with the model
        changed = measure_change(model, folder / FILE, kept, self.key)
        self.exported = import_runtime(self.runtime).load(folder, detect_task_kind(model))
        with evaluation_mode(model):
            self.agreement = measure_on_validation(trainer, model, self.exported)
            if not self.lowers_precision or kept:
                allowed = NEGLIGIBLE if self.runtime == "torch" else ROUNDED
                require_kept(self.key, trainer, model, self.exported, (), allowed)
        same = 1.0
        if vocabulary.model != "none" and trainer.enable_validation and hasattr(self.exported, "tokenize"):
            same = compare_tokens(self.words, self.exported, read_validation_batches(trainer))
        # 4) Say what it does not do
        limits = {
            f"scales are stored in float16, which changes weights by up to {changed:.2g} of a layer's largest": changed,
            READ_AS_FLOATS: self.runtime == "torch",
            NO_TOKENIZER: vocabulary.model == "none",
            vocabulary.note: vocabulary.note,
            f"llama.cpp cuts {1 - same:.0%} of the texts into other tokens": same < 1,
        }
        self.limits = ", and ".join(limit for limit, holds in limits.items() if holds)

    def describe_words(self, model: Any) -> Vocabulary:
        """Return the tokenizer as llama.cpp has it.

        Raises:
            UserError: llama.cpp has no such tokenizer.
        """
        if self.words is None or not self.vocabulary:
            return NONE
        found = describe_tokenizer(self.words, model.config.vocab_size)
        if isinstance(found, str):
            raise UserError(
                f"{self.key}.vocabulary is true, and the tokenizer {found}. Set {self.key}.vocabulary=false to write a "
                "file for programs that give tokens."
            )
        return found

    def save(self, model: nn.Module, folder: Path) -> None:
        shutil.copy(Path(self.folder.name) / FILE, folder)
        describe_config(model).save_pretrained(folder)


def require_runtime(key: str, runtime: str) -> None:
    """Raise UserError if a package that the ``runtime``, a setting of the stage ``key``, needs is not installed."""
    module = import_runtime(runtime)
    if missing := find_missing(module.PACKAGES):
        raise UserError(
            f"{key}.runtime is {runtime}, which needs {', '.join(missing)}, which is not installed. Type "
            f"{format_install(str(module.EXTRA))}, or set {key}.runtime=torch to measure the file in PyTorch."
        )


def check_scheme(key: str, stage: str, scheme: Scheme, inputs: dict[str, int]) -> None:
    """Raise UserError if no type of the format holds the integers that an earlier ``stage`` makes of layers with these
    ``inputs``."""
    if choose_type(scheme) is None:
        raise UserError(
            f"{stage}.bits is {scheme.bits} with zero points, which no type of the format holds. Set "
            f"{stage}.symmetric=true, or {key}.precision=f32 to export floats."
        )
    for name, count in inputs.items():
        if not divides(scheme, count):
            raise UserError(
                f"{stage}.group_size is {scheme.group_size}, and llama.cpp's blocks of {BLOCK} do not divide its "
                f"groups of the {count} inputs of `{name}`. Set {stage}.group_size={BLOCK} (or a multiple), or "
                f"{key}.precision=f32 to export floats."
            )


def check_blocks(key: str, precision: str, layers: dict[str, Matrix]) -> None:
    """Raise UserError if blocks do not divide a row of one of the ``layers``."""
    for name, count in count_inputs(layers).items():
        if count % BLOCK:
            raise UserError(
                f"{key}.precision is {precision}, whose blocks of {BLOCK} do not divide the {count} inputs of "
                f"`{name}`. Add '*{name.rpartition('.')[2]}' to {key}.skip, or set {key}.precision=f16."
            )


def compare_tokens(tokenizer: Any, exported: Any, batches: list[Batch]) -> float:
    """Return the share of the validation texts of which llama.cpp makes the tokenizer's tokens."""
    count = min(COMPARED, sum(len(batch["input_ids"]) for batch in batches))
    rows = [row for batch in spread_evenly(batches, count) for row in batch["input_ids"]]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return sum(exported.tokenize(text) == tokenizer(text)["input_ids"] for text in texts) / len(texts)
