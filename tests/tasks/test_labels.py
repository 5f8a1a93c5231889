"""Labels are read as the data means them, or refused with the file, row and remedy; never taken for an index."""

import json
import math

import pytest
from test_tasks import files, shipped

from compress.errors import UserError
from compress.planning.settings import parse_values
from compress.tasks.labels import LabelError, label_text, parse_list, read_name_lists, read_names, sort_label_names
from compress.tasks.splits import load_splits
from compress.tasks.task import Task

MULTILABEL = {"kind": "multilabel", "metrics": ["f1_micro"], "primary": "f1_micro"}
REGRESSION = {"kind": "regression", "metrics": ["pearson"], "primary": "pearson"}


def write(folder, split, labels, suffix="jsonl", name="label", text="text"):
    """Write a file with one row a label, and distinct texts in every split."""
    rows = [{text: f"{split} {i}", name: label} for i, label in enumerate(labels)]
    if suffix == "csv":
        lines = [f"{text},{name}", *(f"{row[text]},{row[name]}" for row in rows)]
    else:
        lines = map(json.dumps, rows)
    (folder / f"{split}.{suffix}").write_text("\n".join(lines) + "\n")


def read(folder, train, test=("",), **changes):
    """Return the names, and the encoded labels of train and test, of data with these labels."""
    write(folder, "train", train)
    write(folder, "val", train[:1])
    write(folder, "test", test)
    splits = load_splits(files(folder, **changes))
    return splits.task.labels, splits.train["label"][:], splits.test["label"][:]


# One label


@pytest.mark.parametrize(
    "train, test, labels",
    [
        ([0, 1, 3, 4], [2], None),  # a gap
        ([1, 2, 3], [0], None),
        ([1, 2, 3], [0], ["1", "2", "3"]),
        (["a", "b"], ["0"], None),  # names that were found have no indices
        (["a", "b"], [1], None),
        (["a", "b"], [2], ["a", "b"]),
        (["a", "b"], [-1], ["a", "b"]),
        (["a", "b"], ["²"], ["a", "b"]),
    ],
)
def test_a_label_that_train_lacks_is_refused_and_no_index(tmp_path, train, test, labels):
    with pytest.raises(UserError) as error:
        read(tmp_path, train * 3, [train[0], *test], labels=labels)
    assert str(error.value).startswith(
        f"test.jsonl, row 2, column `label`: Task `files` has the label `{test[0]}` in test; "
    )
    assert "Set task.labels" in str(error.value)


@pytest.mark.parametrize(
    "found, labels, names, indices",
    [
        ([3, 0, 4, 1], None, ("0", "1", "3", "4"), [2, 0, 3, 1]),
        ([-1, 0, 1], None, ("-1", "0", "1"), [0, 1, 2]),
        (["1.0", None, "0", 1.0, True, math.nan, " ", ""], None, ("0", "1"), [1, 0, 1, 1]),
        ([2.5, "10", 1.0, "2.50"], None, ("1", "2.5", "2.50", "10"), [1, 3, 0, 2]),
        ([" good", "bad\t", "bad"], None, ("bad", "good"), [1, 0, 0]),
        ([1, "0", "1.0", "pos", " neg "], ["neg", "pos"], ("neg", "pos"), [1, 0, 1, 1, 0]),
        ([True, False, "True", "FALSE"], ["neg", "pos"], ("neg", "pos"), [1, 0, 1, 0]),
        ([1.0, 2, "1"], [1.0, 2.0], ("1.0", "2.0"), [0, 1, 0]),
        (["true", "mostly-true", "false"], None, ("false", "mostly-true", "true"), [2, 1, 0]),
        (["nan", "None", "NA", "null"], None, ("NA", "None", "nan", "null"), [2, 1, 0, 3]),  # words
        (["[URL]", "[/INST]"], None, ("[/INST]", "[URL]"), [1, 0]),
        (["\ud800", "a"], None, ("a", "\ufffd"), [1, 0]),
    ],
)  # fmt: skip
def test_one_label_is_read(tmp_path, found, labels, names, indices):
    assert read(tmp_path, found, found, labels=labels) == (names, indices, indices)


def test_names_are_those_of_all_of_train_whatever_the_limit_and_the_seed(tmp_path):
    write(tmp_path, "train", [*["a", "b"] * 20, "rare"])
    for seed in range(3):
        assert load_splits(files(tmp_path, limit={"train": 4}), seed).task.labels == ("a", "b", "rare")


@pytest.mark.parametrize(
    "label, reason",
    [
        ([0], "`[0]` is a list. Set task.kind=multilabel"),
        ("[0, 2]", "`[0, 2]` is a list. Set task.kind=multilabel"),
        ({"id": 1}, "is neither a name nor a number. Set task.columns.label to another column."),
    ],
)
def test_a_list_or_an_object_is_no_single_label(tmp_path, label, reason):
    with pytest.raises(UserError, match="^train.jsonl, row 3, column `label`: ") as error:
        read(tmp_path, ["a", "b", label])
    assert reason in str(error.value)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="has one label in train, `a`; two or more are expected. Set task.columns.label"
    ):
        read(tmp_path, ["a", "a"], ["a"])


def test_missing_numbers_are_left_out_and_others_are_refused_with_their_row(tmp_path):
    assert read(tmp_path, [1.5, math.nan, None, "2", ""], [3], **REGRESSION) == ((), [1.5, 2.0], [3.0])
    for odd in ("nan", "1,5", [1.0], math.inf):
        with pytest.raises(
            UserError, match=r"^train.jsonl, row 3, column `label`: .* train has labels that are not num"
        ):
            read(tmp_path, [1.5, None, odd], [3], **REGRESSION)


def test_rows_without_a_label_are_counted_and_a_split_of_them_is_refused(tmp_path):
    write(tmp_path, "train", ["a", math.nan, "b", None, "", "a", "b"])
    write(tmp_path, "test", ["a"])
    assert "train: 3 rows without a label left out" in load_splits(files(tmp_path)).notes
    write(tmp_path, "test", [None, ""])
    with pytest.raises(UserError, match=r"has no rows in test \(2 rows without a label left out\)"):
        load_splits(files(tmp_path))
    write(tmp_path, "test", ["a"], name="id")
    with pytest.raises(
        UserError, match="no column `label` in test.jsonl, .* test split without labels.* task.holdout.test"
    ):
        load_splits(files(tmp_path))


def test_numbers_from_another_base_are_shifted_for_lists_too():
    assert read_names({"train": ["1", 2]}, None, {"train": 1}).columns == {"train": ["0", "1"]}
    assert read_names({"train": ["1", 2, 0, "x"]}, ("x", "y"), {"train": 1}).columns == {"train": ["x", "y", "0", "x"]}
    lists = read_name_lists({"train": ["1,3", [2]], "test": ["0|2"]}, ("x", "y", "z"), {"train": 1, "test": 0})
    assert lists.columns == {"train": [["x", "z"], ["y"]], "test": [["0|2"]]}
    lists = read_name_lists({"train": ["1|3", [2]], "test": ["0|2"]}, ("x", "y", "z"), {"train": 1, "test": 0})
    assert lists.columns == {"train": [["x", "z"], ["y"]], "test": [["x", "z"]]}


# Several labels


FLAGS = ([1, 0, 1], [0, 1, 0], [0, 0, 0])
MEANT = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("labels, names", [(["a", "b", "c"], ("a", "b", "c")), (None, ("0", "1", "2"))])
@pytest.mark.parametrize(
    "spell",
    [
        list,
        lambda row: list(map(float, row)),
        lambda row: list(map(bool, row)),
        str,  # of a list, in a csv
        lambda row: str(row).replace(",", ""),  # of a numpy array
        lambda row: str(list(map(float, row))).replace(".0", "."),
        lambda row: " | ".join(map(str, row)),
    ],
)
def test_vectors_of_flags_are_no_lists_of_labels(tmp_path, spell, labels, names):
    rows = [spell(row) for row in FLAGS]
    columns = {"text": "text", "label": "label"}
    assert read(tmp_path, rows, rows[:1], labels=labels, columns=columns, **MULTILABEL) == (names, MEANT, MEANT[:1])


@pytest.mark.parametrize(
    "rows",
    [
        ["a,c", "b", ""],
        ["a|c", "b", " "],
        ["a; c", "b", ""],
        ["['a', 'c']", "['b']", "[]"],
        ["['a' 'c']", "['b']", "[]"],  # of a numpy array
        ['["a", "c"]', '["b"]', "[]"],
        ["{'c', 'a'}", "{'b'}", "()"],
        ["('a', 'c')", "('b',)", "()"],
        [["c", "a"], [" b "], []],
        [[0, 2], [1], []],
        [[0.0, 2.0], 1, ""],
        ["[0, 2]", "[1.0]", "[]"],
    ],
)
def test_lists_of_names_or_indices_in_any_spelling(tmp_path, rows):
    assert read(tmp_path, rows, rows[:1], labels=["a", "b", "c"], **MULTILABEL) == (("a", "b", "c"), MEANT, MEANT[:1])


def test_lists_of_like_length_in_one_split_are_judged_by_all_splits(tmp_path):
    # [0, 1] alone could be a vector of flags.
    assert read(tmp_path, [[0, 1], [1], []], [[0, 1]], labels=["a", "b"], **MULTILABEL)[2] == [[1.0, 1.0]]
    assert read(tmp_path, [[0, 1], [1, 1]], [[0, 1]], labels=["a", "b"], **MULTILABEL)[2] == [[0.0, 1.0]]


def test_a_name_with_a_separator_is_one_name_where_names_are_set(tmp_path):
    names = ["Sci, Tech", "a|b", "World"]
    rows = ["Sci, Tech", "World;a|b", ["Sci, Tech", "World"]]
    meant = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    assert read(tmp_path, rows, rows, labels=names, **MULTILABEL)[1] == meant


@pytest.mark.parametrize(
    "rows, labels, row, reason",
    [
        ([[1, 0, 1], [0, 1]], ["a", "b", "c"], 1, "`[1, 0, 1]` has a label twice. Set vectors of 0/1 flags"),
        ([[1, 0], [0, 1]], ["a", "b", "c"], 1, "a vector has 2 flags and task.labels 3 names"),
        ([["a"], [0.3, 0.7]], None, 2, "holds `0.3`, which is no label"),
        ([["a"], [None]], None, 2, "holds `None`, which is no label"),
        ([["a"], [["b"]]], None, 2, "which is no label"),
        ([["a"], {"b": 1}], None, 2, "which is no label"),
        (["a", "[b, c]"], None, 2, "`[b, c]` looks like a list and is none"),
        (["a", "[np.int64(0)]"], None, 2, "looks like a list and is none"),
        (["a,b", "c|d"], None, 2, "labels hold `,` and `|`, as in `c|d`, and one separator is expected"),
        (["a|b", "c"], ["a", "b"], 1, "has the label `a|b` in train"),
        ([["a"], ["z"]], ["a", "b"], 2, "has the label `z` in train; a, b are known"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_labels_is_refused_with_its_row(tmp_path, rows, labels, row, reason):
    with pytest.raises(UserError) as error:
        read(tmp_path, rows, [rows[0]], labels=labels, **MULTILABEL)
    assert str(error.value).startswith(f"train.jsonl, row {row}, column `label`: ") and reason in str(error.value)


def test_a_missing_list_is_no_empty_list(tmp_path):
    assert read(tmp_path, [["a"], None, math.nan, [], ["b"]], [[]], **MULTILABEL) == (
        ("a", "b"),
        [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]],
        [[0.0, 0.0]],
    )


def test_lists_are_parsed_as_json_python_or_numpy_write_them():
    assert parse_list('["\\ud83d\\ude00", "a, b"]') == ["😀", "a, b"]
    assert parse_list("['it\\'s', \"b\"]") == ["it's", "b"]
    assert parse_list("[0 1\n 1 0]") == [0, 1, 1, 0]
    assert parse_list("[ True False]") == [True, False]
    assert [parse_list(text) for text in ("[a]", "[1, ...]", "{'a': 1}", "[-1. 2.]", "['a", "{}")] == [None] * 6
    assert parse_list("set()") == []


def test_labels_as_text():
    assert [label_text(label) for label in (1.0, True, "1.0", " a ", "1.50", 7, "v1.0")] == [
        "1", "1", "1", "a", "1.50", "7", "v1.0"
    ]  # fmt: skip
    assert sort_label_names(["01", "1", "10", "9"]) == ("01", "1", "9", "10")
    with pytest.raises(LabelError, match="is a list"):
        read_names({"train": [["a"]]}, None, {"train": 0})


def test_yes_and_no_of_yaml_are_to_be_quoted():
    with pytest.raises(UserError, match=r"task.labels.0 is False; unquoted yes, no, .*quotation marks"):
        parse_values(Task, {"name": "t", "kind": "multiclass", "metrics": ["accuracy"], "primary": "accuracy",
                            "labels": [False, True]}, "task")  # fmt: skip
    assert shipped("files", labels=["no", "yes"]).labels == ("no", "yes")
