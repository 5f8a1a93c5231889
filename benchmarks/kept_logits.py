"""Time a distillation step with the teacher's logits kept on disk against a step that runs the teacher, in turns.

    python benchmarks/kept_logits.py

The student has half of its teacher's layers. A step is forward pass, backward pass and optimizer on 32 texts of 32
tokens.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from compress.models.students import Student, build_student
from compress.models.teachers import KeptLogits
from compress.quiet import silence_libraries
from compress.runtimes.timing import Latency, estimate_speedup, time_in_turns
from compress.techniques.distill import Distill

TEACHER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BATCH = 32


def stepper(teacher: BertForSequenceClassification) -> tuple[Distill, Callable[[dict, int], None]]:
    """Return a student and a function that trains it on a batch."""
    module = Distill(build_student(teacher, Student(layers=3)), teacher=teacher)
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no Trainer
    optimizer = torch.optim.AdamW(module.model.parameters(), fused=True)

    def step(batch: dict, _: int) -> None:
        module._imitation_loss(batch, progress=0.0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return module, step


def main() -> None:
    silence_libraries()
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(BertConfig(vocab_size=5000, **TEACHER)).eval()
    ids = torch.randint(5, 5000, (BATCH, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = Dataset.from_dict({key: value.tolist() for key, value in batch.items()})

    def collate(cut: list[dict]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in cut]) for key in batch}

    steps = {}
    for name, dtype in (("float32 teacher", torch.float32), ("bfloat16 teacher", torch.bfloat16), ("kept", None)):
        module, step = stepper(teacher)
        if dtype is torch.bfloat16:
            module._teacher = [copy.deepcopy(teacher).to(dtype)]
        steps[name] = partial(step, batch)
        if dtype is None:
            kept = KeptLogits(Path(tempfile.mkdtemp()) / "logits", rows)
            kept.fill(lambda cut: module._ask(cut).logits, collate, BATCH)  # noqa: B023  (called at once)
            module._kept = [kept]
    times = time_in_turns(steps, Latency(seconds=20.0), cycle=1).blocks
    for name in ("float32 teacher", "bfloat16 teacher"):
        ratio = estimate_speedup(times["kept"], times[name])
        print(f"kept / {name}: {ratio.value:.2f} of the time per step [{ratio.low:.2f}, {ratio.high:.2f}]")


if __name__ == "__main__":
    main()
