from dataclasses import replace

import pytest
from test_report import measured

from compress.artifacts.artifact import Description, Done
from compress.maths.statistics import Interval
from compress.measuring.effects import describe_effects, is_only_sparser
from compress.measuring.meters import Memory

PLAIN = replace(measured(0.9, 4_000_000), parameters=100, nonzeros=100, memory=Memory(600, 500))
NOTHING = Interval(1.01, 0.98, 1.04)


def after(stage, shrinks=False, weights="float", runtime="torch"):
    return Description("multiclass", "tiny", "toy", runtime, weights, history=(Done(stage, {}, 1, False, shrinks),))


@pytest.mark.parametrize(
    ("description", "changes", "said"),
    [
        (after("prune"), {"nonzeros": 50}, ["no gain in size", "no gain in speed", "no gain in memory"]),
        (
            after("gptq", True, "packed"),
            {"size_bytes": 1_600_000},
            ["2.50x smaller", "no gain in speed", "no gain in memory"],
        ),
        (
            after("structured", True),
            {
                "size_bytes": 2_000_000,
                "parameters": 50,
                "nonzeros": 50,
                "speedup": Interval(1.5, 1.4, 1.6),
                "memory": Memory(550, 500),
            },
            ["2.00x smaller", "1.50x faster", "2.00x less memory"],
        ),
        (
            after("int8", True, "bitsandbytes"),
            {"size_bytes": 2_000_000, "speedup": Interval(0.5, 0.4, 0.6)},
            ["2.00x smaller", "2.00x slower", "no gain in memory, though possible"],
        ),
        (
            after("onnx", runtime="onnxruntime"),
            {},
            ["no gain in size", "no gain in speed, though possible", "no gain in memory, though possible"],
        ),
        (
            after("prune"),
            {"speedup": Interval(1.2, 1.1, 1.3)},
            ["no gain in size", "1.20x faster, cause unknown", "no gain in memory"],
        ),
    ],
)
def test_effects_state_the_gain_or_whether_a_gain_was_possible(description, changes, said):
    found = describe_effects(description, replace(PLAIN, **{"speedup": NOTHING, **changes}), PLAIN)
    assert list(found.values()) == said


def test_zeros_alone_save_nothing():
    zeros = replace(PLAIN, nonzeros=50)
    assert is_only_sparser(after("prune"), zeros, PLAIN) and not is_only_sparser(
        after("gptq", weights="packed"), zeros, PLAIN
    )
    assert not is_only_sparser(after("finetune"), PLAIN, PLAIN)
    assert not is_only_sparser(
        after("prune"), replace(zeros, parameters=80, nonzeros=40), PLAIN
    )  # half of it distilled


def test_the_memory_of_a_library_is_not_a_gain():
    tiny = replace(PLAIN, memory=Memory(505, 500)), replace(PLAIN, memory=Memory(512, 500))
    assert describe_effects(after("gptq", True, "packed"), *tiny)["memory"] == "no gain in memory"


def test_a_cost_that_was_not_measured_is_not_reported():
    assert list(describe_effects(after("prune"), replace(PLAIN, memory=None), PLAIN)) == ["size"]
