"""A search over chains whose cost and drop are known, so its optimum is known without training."""

from itertools import product

import pytest

from compress.errors import UserError
from compress.planning.settings import parse_values
from compress.planning.words import read_override
from compress.sweeping.search import Result, Search
from compress.sweeping.space import Settings, format_value

SPACE = {
    "objective": "latency_ms",
    "max_drop": 1.0,
    "trials": 50,
    "epochs": [0, 1, 3],
    "recovers": 10.0,
    "slots": [["none", "drop_layers", "structured"], ["none", "drop_layers", "structured"], ["none", "openvino"]],
    "recovery": ["finetune", "distill"],
    "settings": {
        "drop_layers": {"drop": {"of": "layers", "values": [0.17, 0.34, 0.5]}},
        "structured": {"target_heads": {"of": "heads", "values": [0.25, 0.5, 0.75]}},
        "openvino": {"precision": ["fp32", "int8"]},
    },
}
SIZES = {"heads": 12, "ffn": 1536, "layers": 6}
COST = {"drop=1": 0.84, "drop=2": 0.67, "drop=3": 0.5, "heads=9": 0.8, "heads=6": 0.6, "heads=3": 0.45, "fp32": 0.5,
        "int8": 0.2}  # fmt: skip
DROP = {"drop=1": 0.4, "drop=2": 2.0, "drop=3": 9.0, "heads=9": 0.3, "heads=6": 4.0, "heads=3": 12.0, "int8": 0.2}


def settings(**changes):
    return parse_values(Settings, {**SPACE, **changes}, "search")


def worth(words):
    """Return a chain's result: costs multiply, drops add up, 1 epoch recovers half of the drop and 3 recover 80 %."""
    cost, drop = 1.0, 0.0
    for word in words:
        cost *= next((value for end, value in COST.items() if word.endswith(end)), 1.0)
        drop += next((value for end, value in DROP.items() if word.endswith(end)), 0.0)
        if "train.epochs=" in word:
            drop *= {"1": 0.5, "3": 0.2}[word[-1]]
    return Result(cost, drop, cheaper=cost < 0.99)


def wrong(words):
    chain = words[0].partition("=")[2].split("+")
    return "nothing follows an export" if "openvino" in chain[:-1] else ""


def searched(search, minutes=lambda trial: 0.0, fails=lambda words: False):
    """Run the search; return the words of all trials in order."""
    begun = []
    while not search.settings.over(minutes(len(begun)), len(begun)) and (trial := search.ask(minutes(len(begun)))):
        words = trial.user_attrs["words"]
        begun.append(words)
        search.tell(trial, None if fails(words) else worth(words), job=len(begun) - 1)
    return begun


def best_without_training(limit):
    reduce = [(), ("drop=1",), ("drop=2",), ("drop=3",), ("heads=9",), ("heads=6",), ("heads=3",)]
    chains = ([*a, *b, *c] for a, b, c in product(reduce, reduce, [(), ("fp32",), ("int8",)])
              if not a or not b or a[0][:4] != b[0][:4])  # fmt: skip
    return min(result.cost for result in map(worth, chains) if result.drop <= limit)


def test_the_best_chain_that_loses_little_enough_is_found():
    search = Search(settings(epochs=[0], recovery=[]), SIZES, wrong)
    begun = searched(search)
    assert len(begun) == len(set(begun)) == 50
    assert search.chosen().result.cost == pytest.approx(best_without_training(1.0))
    assert search.find_front()[0] == search.chosen() and all(tried.result.drop <= 1.0 for tried in search.find_front())


def test_a_chain_that_training_recovers_is_chosen_over_one_without_training():
    search = Search(settings(), SIZES, wrong)
    begun = searched(search)
    trained = [words[-1][-1] if "train.epochs" in words[-1] else "0" for words in begun]
    assert set(trained) == {"0", "1", "3"} and trained.index("3") > trained.index("1") > 50 * 9 / 13 - 1
    assert search.chosen().epochs and search.chosen().result.cost < 0.8 * best_without_training(1.0)
    assert len({words[0] for words in begun if "finetune" in words[0] or "distill" in words[0]}) > 2, "order is tried"


def test_no_chain_is_begun_that_cannot_work_and_a_stage_that_never_can_is_reported():
    def none_can(words):
        return "openvino is not installed" if "openvino" in words[0] else ""

    search = Search(settings(trials=30), SIZES, none_can)
    begun = searched(search)
    assert len(begun) == 30 and not any("openvino" in words[0] for words in begun)
    assert search.left_out == {"openvino": "openvino is not installed"}
    assert not any("openvino+" in words[0] for words in searched(Search(settings(trials=30), SIZES, wrong)))


def test_a_space_that_is_used_up_ends_the_search():
    small = settings(slots=[["none", "openvino"]], recovery=[], trials=50)
    assert len(searched(Search(small, SIZES, wrong))) == 2


def test_minutes_end_it_and_divide_it_into_rounds():
    search = Search(settings(trials=None, minutes=20.0), SIZES, wrong)
    begun = searched(search, minutes=lambda trial: float(trial))
    assert len(begun) == 20
    assert not any("train.epochs" in words[-1] for words in begun[:7])
    assert any("train.epochs=1" in words[-1] for words in begun[7:14])


def test_failed_trials_end_nothing_and_are_not_tried_again():
    search = Search(settings(trials=20), SIZES, wrong)
    begun = searched(search, fails=lambda words: "drop_layers" in words[0])
    assert len(begun) == len(set(begun)) == 20
    lost = [tried for tried in search.finished_trials if tried.result is None]
    assert lost and all("drop_layers" in tried.words[0] for tried in lost) and search.chosen()


def test_a_resumed_search_tries_failed_trials_again(tmp_path):
    first = Search(settings(trials=4), SIZES, wrong, file=tmp_path / "study.log")
    lost = searched(first, fails=lambda words: "drop_layers" in words[0])[:4]
    failed = [tried.words for tried in first.finished_trials if tried.result is None]
    again = Search(settings(trials=4), SIZES, wrong, file=tmp_path / "study.log")
    assert failed and len(again.finished_trials) == len(lost) - len(failed)
    technique, *_ = again.ask(0.0).user_attrs["words"]
    assert technique == failed[0][0]


def test_a_stopped_search_resumes_the_trials_that_it_had_begun(tmp_path):
    first = Search(settings(), SIZES, wrong, file=tmp_path / "study.log")
    for _ in range(3):
        first.tell(trial := first.ask(0.0), worth(trial.user_attrs["words"]))
    first.seconds = 90.0
    stopped = first.ask(0.0).user_attrs["words"]
    again = Search(settings(), SIZES, wrong, file=tmp_path / "study.log")
    assert again.finished_trials == first.finished_trials and len(again.finished_trials) == 3 and again.seconds == 90.0
    assert tuple(again.ask(0.0).user_attrs["words"]) == tuple(stopped)
    assert not Search(settings(), SIZES, wrong, file=tmp_path / "study.log", name="another").finished_trials


def test_trials_at_once_differ():
    search = Search(settings(), SIZES, wrong)
    batch = [search.ask(0.0).user_attrs["words"] for _ in range(8)]
    assert len({tuple(words) for words in batch}) == 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "speed"}, r"search.objective is 'speed'; input should be 'latency_ms' or 'size_mb'\.$"),
        ({"trials": None}, r"no budget\. Set search.minutes=60"),
        ({"max_drop": -1}, r"search.max_drop is -1; input should be greater than or equal to 0"),
        ({"slots": [["none"]]}, r"search.slots names no stage"),
        ({"slots": []}, r"search.slots names no stage"),
        ({"epochs": [1, 0]}, r"search.epochs is \[1, 0\]; every round must train for longer"),
        ({"settings": {"prune": {"sparsity": 0.5}}}, r"search.settings.prune.sparsity is 0.5; expected a list"),
        ({"settings": {"prune": {"sparsity": {"low": 1}}}}, r"search.settings.prune.sparsity"),
        ({"settings": {"drop_layers": {"drop": {"of": "words", "values": [1]}}}}, r"drop.of is 'words'"),
        ({"trails": 3}, r"search.trails is no setting"),
    ],
)
def test_a_mistake_is_reported_in_one_line(changes, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        settings(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", ["fp32", "/d/données.txt", "it's a=b", None, True, 3, 0.5, ["a b", 1], {"task": "sst2"}]
)
def test_a_value_is_typed_as_hydra_reads_it(value):
    assert read_override(f"technique.gptq.calibration={format_value(value)}").value() == value
