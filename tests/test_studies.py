"""Check the experiments that repeat earlier studies: plan a row of each technique at both sizes, and run one of each
kind."""

import functools
import random

import pytest
from hydra import compose
from omegaconf import open_dict
from test_conf import CONF, hydra, jobs  # noqa: F401

from compress.planning.chain import drop_unused_settings, read_stages
from compress.planning.plan import make_plan
from compress.running.experiment import run_experiment
from compress.tasks.reading import Examples, name_rows
from compress.tasks.task import SPLITS

TEXTS = {path.stem: path.read_text() for path in sorted((CONF / "experiment").glob("*.yaml"))}
STUDIES = [
    name for name, text in TEXTS.items() if "${scaled:" in text or any(f"  - {other}\n" in text for other in TEXTS)
]
NARROW = ["model.path=null", "model.config.hidden_size=48", "model.config.vocab_size=500"]


def rows(*words):
    """Return the configs of a sweep as its jobs get them: the last of each technique."""
    configs = jobs("train", list(words), every=False)
    for config in configs:
        drop_unused_settings(config.technique, config.hydra.overrides.task)
        with open_dict(config):
            del config["hydra"]
    return configs


@functools.cache
def study(experiment, scale="full"):
    """Return a row of each technique of a study, with the last of its settings and models from their configs alone."""
    return rows(f"experiment={experiment}", f"scale={scale}", "model.path=null")


def shortened(config):
    """Limit a config to one step of training for the baseline and each stage that trains, and to little timing."""
    texts = config.baseline.batch_size * config.baseline.accumulate
    config.task.limit = {"train": texts, "validation": 8, "test": 16}
    config.baseline.epochs = 1
    config.hardware.latency.seconds, config.hardware.latency.block_s = 0.01, 0.002
    config.hardware.latency.batch_sizes, config.hardware.latency.memory = [1, 4], False
    for stage in read_stages(config.technique):
        if "samples" in stage.node:
            stage.node.samples = texts
        if stage.node.get("train", {}).get("epochs"):
            stage.node.train.epochs = 1
    return config


def generated(words):
    """Return a replacement for a task's data: texts of ``words`` random words, with its labels in turn."""

    def read(task):
        draw = random.Random(0)

        def text():
            return " ".join("".join(draw.choices("aeioklmnrst", k=draw.randint(2, 6))) for _ in range(words))

        def label(i):
            name = task.labels[i % len(task.labels)]
            return [name] if task.kind == "multilabel" else name

        tables = {
            split: {"text": [text() for _ in range(64)], "label": [label(i) for i in range(64)]} for split in SPLITS
        }
        return {split: Examples(table, name_rows(table, split), "label") for split, table in tables.items()}

    return read


def test_the_scale_swaps_the_model_where_none_is_typed():
    def names(*words):
        config = compose("train", ["experiment=tinyllama_augesc", *words])
        return config.model.name, config.baseline.accumulate, config.hardware.accelerator

    assert names() == ("tinyllama", 4, "auto")
    assert names("scale=small") == ("tiny_llama", 1, "cpu")
    assert names("scale=small", "model=llama", "hardware=auto") == ("llama", 1, "auto")


@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize("experiment", STUDIES)
def test_a_row_of_each_technique_can_be_planned(experiment, scale):
    planned = [make_plan(config) for config in study(experiment, scale)]
    assert len({plan.method for plan in planned}) == len(planned)


@pytest.mark.parametrize(
    ("experiment", "heads", "ffn"),
    [
        ("roberta_sst2_heads", "12,10,8,6,4,2,1", None),
        ("roberta_sst2_ffn", "12", "4096,2048,1024,512"),
        ("roberta_sst2_both", "12,10,8,6,4,2,1", "1536"),
    ],
)
def test_the_curves_are_the_studys(experiment, heads, ffn):
    params = compose("train", [f"experiment={experiment}"], return_hydra_config=True).hydra.sweeper.params
    swept = {key.rpartition(".")[2]: str(values) for key, values in params.items()}
    assert swept.pop("technique") == "structured,structured+finetune" and swept.pop("target_heads") == heads
    assert swept == ({"target_ffn_size": ffn} if ffn else {})
    cuts = [row.technique.structured for row in study(experiment)]
    assert len(cuts) == 2
    assert all((cut.iterations, cut.importance, cut.even_heads) == (8, "logits", False) for cut in cuts)


@pytest.mark.parametrize(
    ("experiment", "epochs", "chains"),
    [
        (
            "bert_semeval",
            5,
            "nf4 int8 distill distill+prune distill+nf4 distill+int8 prune prune+nf4 prune+int8 distill+prune+nf4 "
            "distill+prune+int8",
        ),
        ("tinyllama_augesc", 3, "nf4 int8 gptq awq prune prune+nf4 prune+int8 prune+gptq prune+awq"),
        ("roberta_cola_int8", 30, "finetune qat"),
        ("roberta_sst2_distill", 3, "distill"),
    ],
)
def test_the_rows_are_the_studys(experiment, epochs, chains):
    configs = study(experiment)
    assert set(chains.split()) <= {config.technique.name for config in configs}
    assert {config.task.epochs for config in configs} == {epochs}
    assert {config.technique.prune.sparsity for config in configs if "prune" in config.technique} <= {0.2}


@pytest.mark.parametrize(
    ("experiment", "technique", "settings"),
    [
        ("roberta_sst2_both", "structured+finetune", [*NARROW, "technique.structured.target_heads=6"]),
        ("roberta_sst2_distill", "distill", NARROW),
        ("roberta_cola_int8", "qat+onnx", NARROW),
        (
            "bert_semeval",
            "distill+structured+distill+prune_vocab+onnx",
            [*NARROW, "technique.prune_vocab.min_count=2"],  # with so few texts the tokenizer has no unused token
        ),
        ("exchange_tinyllama", "awq+openvino", []),
    ],
)
def test_a_row_of_each_kind_runs_at_small_scale(experiment, technique, settings, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.tasks.splits.read_tables", generated(words=6))
    words = [f"experiment={experiment}", "scale=small", f"technique={technique}", f"cache.dir={cache}", *settings]
    (config,) = rows(*words)
    none, changed = run_experiment(shortened(config), tmp_path).measurements.values()
    assert changed.size_bytes < none.size_bytes and changed.speedup is not None
