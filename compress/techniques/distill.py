"""Distillation: train a smaller student, or recover the quality that compression lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from lightning_fabric.utilities import move_data_to_device
from pydantic import Field, validate_call
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from compress.artifacts.artifact import load_artifact
from compress.cache.digests import compute_digest, digest_environment, fingerprint_files
from compress.cache.sources import digest_source
from compress.errors import UserError
from compress.maths.losses import ACROSS, build_projection, loss_weight, match_loss
from compress.maths.vector_losses import VECTORS
from compress.models.alignment import Aligner
from compress.models.backbone import limit_length
from compress.models.batches import draw_calibration_batches, iterate_texts, mask_tokens
from compress.models.layers import detect_task_kind, find_blocks
from compress.models.loading import from_pretrained
from compress.models.matches import Match, Relations, collect_features, expose_attention
from compress.models.objectives import check_lengths, check_objective, compare_logits
from compress.models.packing import keeps_boundaries
from compress.models.students import Student, build_student, check_same_labels, check_same_vocabulary, load_student
from compress.models.teachers import Batch, KeptLogits, cast_teacher, round_teacher
from compress.models.writing import Writer
from compress.tasks.embedding import read_width
from compress.tasks.formats import read_lines
from compress.tasks.kinds import KINDS
from compress.tasks.metrics import TaskMetrics
from compress.tasks.splits import hash_rows as content
from compress.tasks.task import Task
from compress.technique import Adapter, Training
from compress.techniques.finetune import FineTune
from compress.techniques.prune_vocab import PruneVocab


class Distill(FineTune):
    """Train a student to reproduce its teacher's answers.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531. The losses come from
    TextBrewer (Yang et al., 2020, arXiv:2002.12620) if it has them; :mod:`compress.maths.losses` names the papers of
    the others.

    Without a ``student`` the chain's model is the student, and its own dense baseline is the teacher that recovers the
    loss of compression. As the first stage this model would teach itself, so the student gets half of its layers.

    Args:
        model: the student, or the model that it is cut from.
        student: a student other than the model itself.
        teacher: a model, or the folder of an artifact or a model; null for the chain's fine-tuned baseline.
        adapter: trained in place of all of the student's parameters, an :class:`~compress.technique.Adapter`.
        loss: the loss between the logits: ``ce``, ``kl``, ``mse``, ``reverse_kl``, ``js``; null for ``mse`` for a
            regression and ``ce`` for other tasks. Labels of a multi-label task are compared one by one. Vectors have
            losses of their own: ``vectors`` (null), one minus the cosine to the teacher's vector, by a learnt
            projection where the widths differ; and ``similarities``, the error of the cosines between the texts of a
            batch. Decoders with different tokenizers are compared by ``common``, by the beginnings of words that both
            vocabularies have, or ``uld``, by sorted probabilities, wherever both have read the same characters.
        temperature: divisor of both logits; null for 1 for a language model and 4 for other tasks.
        temperature_schedule: null, or TextBrewer's ``[flsw, beta, gamma]`` or ``[cwsm, beta]`` around the temperature.
        beta: mixing weight of ``js``: near 0 it is KL, near 1 reverse KL.
        soft_weight: weight of the loss between the logits.
        soft_schedule: ``linear_decay`` or ``linear_growth`` of ``soft_weight`` over the training.
        hard_weight: weight of the loss on the task's labels.
        hard_schedule: schedule of ``hard_weight``.
        intermediate_matches: inner features of the models to match as well, each a :class:`Match`.
        kept_logits: ``all``, or the number of logits of a vocabulary, or of tags, to keep: the teacher runs once and
            its logits are stored on disk for later epochs, seeds and students; null to run it at every step.
        teacher_dtype: ``bfloat16``, ``float32``, or ``auto``: bfloat16 if the answers to a training batch stay the
            same.
        written_tokens: the teacher first writes the answers of the training conversations, or continues documents, with
            at most so many tokens, and the student is trained on these texts, which are stored; null for the data's.
        masking: probability of each token to be replaced by the mask token, for student and teacher.
        extra_text: a file of unlabelled text, one text a line; every step adds a batch of it.

    Raises:
        UserError: teacher, student and task do not fit together.

    Example:
        >>> pl.Trainer(max_epochs=1).fit(Distill(student, teacher=teacher), loader)
    """

    packages = ("textbrewer",)
    files = ("teacher", "extra_text", "student.path")

    @validate_call(config={"arbitrary_types_allowed": True})
    def __init__(
        self,
        model: nn.Module,
        metrics: TaskMetrics | None = None,
        training: Training | None = None,
        student: Student = Student(),  # noqa: B008  (frozen)
        adapter: Adapter | None = None,
        teacher: str | nn.Module | None = None,
        loss: Literal["ce", "kl", "mse", "reverse_kl", "js", "vectors", "similarities", "uld", "common"] | None = None,
        temperature: Annotated[float, Field(gt=0)] | None = None,
        temperature_schedule: tuple[Any, ...] | None = None,
        beta: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        soft_weight: Annotated[float, Field(ge=0)] = 1.0,
        soft_schedule: Literal["linear_decay", "linear_growth"] | None = None,
        hard_weight: Annotated[float, Field(ge=0)] = 0.0,
        hard_schedule: Literal["linear_decay", "linear_growth"] | None = None,
        intermediate_matches: tuple[Match, ...] = (),
        kept_logits: Literal["all"] | Annotated[int, Field(ge=1)] | None = None,
        teacher_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        written_tokens: Annotated[int, Field(ge=1)] | None = None,
        masking: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        extra_text: Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        task: Task | None = None,
        baseline: Path | None = None,
        source: Path | None = None,
        keep_in: Path | None = None,
        baseline_config: Any = None,  # a PretrainedConfig, which pydantic would convert
    ) -> None:
        super().__init__(model, metrics, training, adapter)
        self.student = student
        self.kind = KINDS[task.kind if task else detect_task_kind(model)]
        self.labels_known = task is None or task.labels is not None
        self.loss = loss or self.kind.distillation_losses[0]
        # A text has many right continuations, so the teacher's probabilities are informative as they are. It has one
        # right label, so what the teacher knows of the others only shows in softened answers (TextBrewer's default).
        self.temperature = temperature or (1.0 if self.kind.generates else 4.0)
        self.temperature_schedule, self.beta = temperature_schedule, beta
        self.soft_weight, self.soft_schedule = soft_weight, soft_schedule
        self.hard_weight, self.hard_schedule = hard_weight, hard_schedule
        self.matches = intermediate_matches
        self.kept_logits, self.written_tokens = kept_logits, written_tokens
        self.teacher_dtype, self.masking = teacher_dtype, masking
        self.packs, self.template = (task.pack, task.template) if task else (False, None)
        self.extra_text = extra_text
        self.tokenizer, self.baseline, self.keep_in = tokenizer, baseline, keep_in
        self.resumes = extra_text is None  # the reader's position is neither saved nor shared
        self.together = extra_text is None and written_tokens is None
        self.baseline_config = baseline_config
        self.alone = source is not None and source == baseline and not teacher
        self.keeps_zeros = student == Student() and not self.alone
        self.shrinks = not self.keeps_zeros
        # Lists hide these models from the module: they are neither trained nor saved.
        self._named: list[str | nn.Module] = [teacher] if teacher else []
        self._teacher: list[nn.Module] = []
        self._kept: list[KeptLogits] = []
        self._their_tokenizer: PreTrainedTokenizerBase | None = None
        self._aligner: Aligner | None = None
        self._extra: Iterator[Batch] | None = None
        self.projections = nn.ModuleList()
        self.widen: nn.Module = nn.Identity()
        """The projection of the student's vectors to the teacher's width."""
        check_objective(self)

    @property
    def teacher(self) -> str | nn.Module | None:
        return self._named[0] if self._named else None

    @property
    def across(self) -> bool:
        """Whether teacher and student may have different tokenizers."""
        return self.loss in ACROSS

    def check(self, skeleton: Any, before: list[Any]) -> None:
        if not self.training_settings.epochs:
            raise UserError(
                f"{self.key}.train.epochs is 0, so nothing is distilled. Set {self.key}.train.epochs=1 or more."
            )
        if self.extra_text and (not self.extra_text.is_file() or not read_lines(self.extra_text)):
            wrong = "holds no text" if self.extra_text.is_file() else "is no file"
            raise UserError(
                f"{self.key}.extra_text is {self.extra_text}, which {wrong}. Set it to a text file, one text a line."
            )
        if isinstance(self.teacher, str) and not Path(self.teacher).is_dir():
            raise UserError(
                f"{self.key}.teacher is {self.teacher}, which is no folder. Set it to the folder of an artifact or a "
                "model."
            )
        if isinstance(self.teacher, str) and self.tokenizer is not None:
            theirs = from_pretrained(AutoTokenizer, self.teacher, "Teacher", f"{self.key}.teacher")
            self._check_tokenizers(theirs)
        if any(isinstance(stage, PruneVocab) for stage in before) and not (self.teacher or self.across):
            raise UserError(
                "`distill` follows `prune_vocab`, so the tokens of its teacher, the baseline, differ from the "
                "student's. Set technique=distill+prune_vocab to distil first."
            )
        packed = next((stage for stage in before if stage.leaves == "packed"), None)
        if packed and self.student != Student():
            raise UserError(
                f"{self.key}.student sets another model and the chain's model is quantized already. Distil first and "
                "quantize afterwards."
            )
        self.alone = not before and not self.teacher
        student = self.preview(skeleton)
        if self.adapter and self.student.hidden_size:
            raise UserError(f"{self.key}.student.hidden_size makes random weights. Set {self.key}.adapter=null.")
        super().check(student, before)
        teacher = self._teacher_config() or self.baseline_config or skeleton.config
        if self.labels_known and self.kind.num_labels != 0:
            check_same_labels(teacher, skeleton.config, f"{self.key}.teacher")
        for match in self.matches:
            match.check(student.config, teacher, f"{self.key}.intermediate_matches")

    def _check_tokenizers(self, theirs: PreTrainedTokenizerBase) -> None:
        """Raise UserError if the teacher's tokenizer does not suit the comparison of the two models."""
        if self.written_tokens or self.across:
            self.kind.set_template(theirs, self.template)
        if not self.across and (self.soft_weight or self.matches) and self.tokenizer is not None:
            advice = f" Decoders: set {self.key}.loss=common." if self.kind.generates else ""
            check_same_vocabulary(self.tokenizer.get_vocab(), theirs.get_vocab(), f"{self.key}.teacher", advice)

    def preview(self, skeleton: Any) -> Any:
        student = self._choose_student()
        if student.path:
            return load_student(student.path, skeleton, f"{self.key}.student.path", weights=False)
        return skeleton if student == Student() else build_student(skeleton, student, f"{self.key}.student")

    def _choose_student(self) -> Student:
        """Return the settings of the student: the requested one, or half of the layers of a first stage's model."""
        if self.alone and self.student == Student():
            return Student(layers=max(1, len(find_blocks(self.model)[1]) // 2))
        return self.student

    def _teacher_config(self) -> PretrainedConfig | None:
        if isinstance(self.teacher, str):
            return from_pretrained(AutoConfig, self.teacher, "Teacher", f"{self.key}.teacher")
        return getattr(self.teacher, "config", None)

    def configure_model(self) -> None:
        """Create teacher and student when the fit starts, before the optimizer is created."""
        if self._teacher:
            return
        # 1) Load the teacher
        if isinstance(self.teacher, nn.Module):
            self._teacher = [self.teacher]
        elif folder := self.teacher or self.baseline:
            loaded = load_artifact(folder, self.kind.name)
            self._teacher = [loaded.model]
            self._their_tokenizer = loaded.tokenizer
            if self.tokenizer is not None:
                self._check_tokenizers(loaded.tokenizer)
        else:
            raise UserError(f"{self.key}.teacher is not set and there is no baseline. Set {self.key}.teacher.")
        if self.written_tokens:
            self._write_training_text()
        # 2) Build the student
        student, model = self._choose_student(), cast(PreTrainedModel, self.model)
        if student.path:
            self.model = load_student(student.path, model, f"{self.key}.student.path", self.tokenizer)
        elif student != Student():
            self.model = build_student(model, student, f"{self.key}.student")
        theirs = cast(PretrainedConfig, self._teacher[0].config)
        if self.kind.num_labels != 0:
            check_same_labels(theirs, model.config, f"{self.key}.teacher")
        # 3) Prepare the matching of vectors and of inner features
        widths = read_width(cast(PreTrainedModel, self.model).config), read_width(theirs)
        if self.loss == "vectors" and widths[0] != widths[1]:
            self.widen = nn.Linear(*widths, bias=False)
        self.projections = nn.ModuleList(
            build_projection(match.proj) if match.proj else nn.Identity() for match in self.matches
        )
        if any(match.feature == "attention" for match in self.matches):
            expose_attention(self.model, self._teacher[0])
        super().configure_model()

    def _locate(self, setting: str, data: Any) -> tuple[Path, Path]:
        """Return the folders of the teacher and of what is kept of its answers."""
        folder = self.teacher or self.baseline
        if data is None or self.keep_in is None or not isinstance(folder, str | Path):
            raise UserError(
                f"{self.key}.{setting} needs a datamodule, keep_in and the folder of a teacher. Set "
                f"{self.key}.{setting}=null."
            )
        return Path(folder), self.keep_in

    def _write_training_text(self) -> None:
        """Let the teacher write the texts that the student is trained on, or read those that it wrote before."""
        data = getattr(self.trainer, "datamodule", None)
        folder, keep_in = self._locate("written_tokens", data)
        assert self._their_tokenizer is not None and self.written_tokens is not None
        teacher = cast(PreTrainedModel, self._teacher[0].to(self.trainer.strategy.root_device).eval())
        length = limit_length(teacher, self._their_tokenizer, data.max_length)
        rows = data.splits.train
        decides = fingerprint_files(folder), content(rows), self.written_tokens, length, data.seed, self.template
        key = [*decides, digest_source(__name__), digest_environment()]
        writer = Writer(teacher, self._their_tokenizer, self.written_tokens, length, data.seed)
        file = keep_in / f"{compute_digest(key)}.jsonl"
        data.replace_training(writer.write_rows(rows, file, data.batch_size))

    def _make_aligner(self, data: Any) -> Aligner:
        if data is None or self._their_tokenizer is None:
            raise UserError(
                f"{self.key}.loss is {self.loss}, which needs a datamodule and the folder of a teacher. Set "
                f"{self.key}.loss=null."
            )
        length = limit_length(self._teacher[0], self._their_tokenizer, data.max_length)
        rows = data.tokenised("train")
        return Aligner(data.tokenizer, self._their_tokenizer, rows, data.splits.train, length)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            check_lengths({"student": self.model, "teacher": self._teacher[0]}, data)
        teacher = self._teacher[0].to(self.device).eval().requires_grad_(False)
        probe = next(draw_calibration_batches(self.trainer, samples=8, batch_size=8))
        if self.teacher_dtype == "auto" and not self.across:  # the probe is in the student's tokens
            self._teacher = [round_teacher(teacher, probe, self.kind.probabilities)]
        elif self.teacher_dtype == "bfloat16":
            self._teacher = [cast_teacher(teacher)]
        if getattr(data, "packs", False) and not keeps_boundaries(teacher):
            raise UserError(
                f"task.pack is true and the teacher, a `{type(teacher).__name__}`, does not keep packed conversations "
                "apart. Set task.pack=false."
            )
        if self.across:
            self._aligner = self._make_aligner(data)
        if self.kept_logits:
            self._kept = [self._keep(data)]
        if self.extra_text:
            self._extra = iterate_texts(self.extra_text, data, self.device, f"{self.key}.extra_text")

    def _keep(self, data: Any) -> KeptLogits:
        folder, keep_in = self._locate("kept_logits", data)
        rows = data.tokenised("train")
        k = None if self.kept_logits == "all" else self.kept_logits
        dtype = next(self._teacher[0].parameters()).dtype
        decides = fingerprint_files(folder), content(rows), k, str(dtype), digest_source(__name__)
        key = [*decides, digest_environment()]
        kept = KeptLogits(keep_in / compute_digest(key), rows, k)
        kept.fill(lambda batch: self._ask(batch).logits, data.collate, data.batch_size)
        return kept

    @torch.no_grad()
    def _ask(self, batch: Batch, **wanted: bool) -> Any:
        return self._teacher[0](**move_data_to_device(batch, self.device), **wanted)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        progress = self.trainer.global_step / max(self.trainer.estimated_stepping_batches, 1)
        hard_weight = self.hard_weight * loss_weight(self.hard_schedule, progress)
        answers = self.kind.mask_answers(inputs, labels)
        total = self._imitation_loss(inputs, answers, progress, labels if hard_weight else None, hard_weight)
        if self._extra is not None:
            extra = dict(next(self._extra))
            answers = self.kind.mask_answers(extra, None)
            total = total + self._imitation_loss(extra, answers, progress, prefix="extra_")
        self.log("train/loss", total, prog_bar=True)
        self.log("train/epoch_loss", total, on_step=False, on_epoch=True, sync_dist=True)
        return total

    def _imitation_loss(
        self,
        inputs: Batch,
        answers: Tensor,
        progress: float,
        labels: Tensor | None = None,
        hard_weight: float = 0.0,
        prefix: str = "",
    ) -> Tensor:
        """Return the weighted sum of all losses on a batch, and log each of them. ``answers`` marks the tokens whose
        logits are compared."""
        # 1) Run student and teacher
        if self.masking:
            inputs = mask_tokens(inputs, self.tokenizer, self.masking)
        kept = self._kept[0](inputs) if self._kept and not prefix else None
        wanted = {
            "output_hidden_states": any(match.feature == "hidden" for match in self.matches),
            "output_attentions": any(match.feature == "attention" for match in self.matches),
        }
        with Relations(self.model, self.matches) as ours, Relations(self._teacher[0], self.matches) as theirs:
            student = self.model(**inputs, labels=labels, **wanted)
            asked = kept is None and not self.across and (self.soft_weight or self.matches)
            teacher = self._ask(inputs, **wanted) if asked else None
        # 2) Compute every loss with its weight
        mask = self.kind.find_tokens(inputs)
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.soft_weight:
            weight = self.soft_weight * loss_weight(self.soft_schedule, progress)
            if self._aligner is not None:
                loss = self._aligner.compare(student.logits, inputs, self._ask, self.loss, self.temperature)
            elif self.loss in VECTORS:
                loss = VECTORS[self.loss](self.widen(student.logits.float()), teacher.logits if kept is None else kept)
            else:
                logits: Tensor = teacher.logits.float() if kept is None else kept
                loss = compare_logits(self, student.logits, logits, answers)
            terms["soft"] = weight, loss
        if labels is not None:
            terms["hard"] = hard_weight, student.loss
        for i, match in enumerate(self.matches):
            mine = match.select_features(collect_features(student, ours), match.layer_S)
            other = match.select_features(collect_features(teacher, theirs), match.layer_T)
            project = self.projections[i]
            mine = [project(x) for x in mine] if isinstance(mine, list) else project(mine)
            terms[f"{match.loss}_{i}"] = match.weight, match_loss(match.loss, mine, other, mask, match.heads)
        for name, (_, value) in terms.items():
            self.log(f"train/{prefix}{name}", value.detach())
        return sum((weight * value for weight, value in terms.values()), start=torch.zeros((), device=self.device))
