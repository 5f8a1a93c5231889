"""Texts are read as the data means them, and what bounds the figures is in the notes."""

import json
import math

import pandas as pd
import pytest
from test_tasks import files

from compress.errors import UserError
from compress.tasks.reading import read_documents
from compress.tasks.splits import draw_held_out_rows, load_splits


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def write_splits(folder, *texts):
    """Write the texts as train, validation and test, with labels that alternate."""
    for split in ("train", "val", "test"):
        write(folder / f"{split}.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])


def test_missing_texts_are_empty_and_lists_of_words_are_joined(tmp_path):
    write_splits(tmp_path, None, math.nan, "", ["a", "list", "of ", "words"], [], 5, 1.5, True, "nan", "None")
    splits = load_splits(files(tmp_path))
    assert splits.train["text"][:] == ["", "", "", "a list of  words", "", "5", "1.5", "True", "nan", "None"]
    assert "train: 4 of 10 texts are empty" in splits.notes
    write(tmp_path / "train.jsonl", [{"a": "x", "b": None, "label": i} for i in range(2)])
    for split in ("val", "test"):
        (tmp_path / f"{split}.jsonl").unlink()
        write(tmp_path / f"{split}.jsonl", [{"a": None, "b": "y", "label": 1}])
    splits = load_splits(files(tmp_path, columns={"text": ["a", "b"], "label": "label"}))
    assert splits.train["text"][:] == ["x", "x"] and splits.test["text"][:] == ["y"]


@pytest.mark.parametrize("text, kind", [({"en": "a"}, "dict"), ([{"role": "user"}], "list"), ([1, 2], "list")])
def test_an_object_is_no_text(tmp_path, text, kind):
    write_splits(tmp_path, "a", "b", text)
    with pytest.raises(
        UserError, match=rf"^train.jsonl, row 3, column `text`: .* is not text but {kind}\. Set task.columns"
    ):
        load_splits(files(tmp_path))


def test_a_column_that_one_of_several_files_lacks_is_refused(tmp_path):
    for i, label in enumerate(("label", "stars", "label")):
        (tmp_path / f"train-{i}.csv").write_text(f"text,{label},note\na{i},0,x\nb{i},1,y\n")
    with pytest.raises(
        UserError, match=r"no column `label` in train-1.csv, and other files have it. Rename the column"
    ):
        load_splits(files(tmp_path, limit={"train": 3}))
    (tmp_path / "train-1.csv").write_text("label,text\n1,b1\n0,a1\n")  # in any order, and without the unused one
    splits = load_splits(files(tmp_path, holdout={"validation": 1, "test": 1}))
    rows = [*zip(splits.train["text"], splits.train["label"]), *zip(splits.test["text"], splits.test["label"])]
    assert all(label == text.startswith("b") for text, label in rows)


@pytest.mark.parametrize("place", ["data", "."])
def test_a_folder_of_shards_is_read_as_the_hub_has_it(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    for name, texts in {
        "train-00000-of-00002": "ab",
        "train-00001-of-00002": "cd",
        "test-00000-of-00001": "ef",
    }.items():
        frame = pd.DataFrame({"text": [f"{text} {i}" for text in texts for i in range(5)], "label": [0, 1] * 5})
        frame.to_parquet(tmp_path / place / f"{name}.parquet")
    splits = load_splits(files(tmp_path))
    assert sorted({text[0] for text in [*splits.train["text"], *splits.validation["text"]]}) == [*"abcd"]
    assert {text[0] for text in splits.test["text"]} == {*"ef"}
    (tmp_path / place / "validation-00000-of-00001.parquet").write_bytes(
        (tmp_path / place / "test-00000-of-00001.parquet").read_bytes()
    )
    assert len(load_splits(files(tmp_path)).validation) == 10


def test_texts_of_test_that_are_in_train_are_counted(tmp_path):
    write_splits(tmp_path, "a", "b", "c", "d")
    write(tmp_path / "test.jsonl", [{"text": text, "label": 0} for text in "axbya"])
    write(tmp_path / "val.jsonl", [{"text": "new", "label": 0}])
    assert load_splits(files(tmp_path)).notes == ("test: 3 of 5 texts are in train as well",)


def test_a_common_text_does_not_fill_a_held_out_split(tmp_path):
    rows = [{"text": "n/a" if i % 5 < 2 else f"text {i}", "label": i % 2} for i in range(300)]
    write(tmp_path / "train.jsonl", rows)
    for seed in range(4):
        splits = load_splits(files(tmp_path), seed)
        assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [243, 27, 30]
        assert splits.train["text"][:].count("n/a") == 120
    assert draw_held_out_rows("aaabb", 1, seed=0) == [3, 4]


def test_rows_of_one_text_cannot_be_held_out(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "", "label": i % 2} for i in range(30)])
    with pytest.raises(
        UserError, match="30 rows of one text in train, .* none can be held out for test. Set task.columns"
    ):
        load_splits(files(tmp_path))


def test_a_file_of_a_header_only_is_refused_as_empty(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"has no rows in train\. Set task.path"):
        load_splits(files(tmp_path))


def test_rows_without_a_group_are_groups_of_their_own(tmp_path):
    write(
        tmp_path / "train.jsonl",
        [{"text": f"t{i}", "label": i % 2, "group": None if i < 20 else [i // 2]} for i in range(40)],
    )
    columns = {"text": "text", "label": "label", "group": "group"}
    splits = load_splits(files(tmp_path, columns=columns, holdout={"validation": 0.2, "test": 0.2}))
    assert len(splits.test) in (8, 9) and len(splits.train) >= 23
    grouped = [{int(t[1:]) // 2 for t in part["text"] if int(t[1:]) >= 20} for part in (splits.train, splits.test)]
    assert not grouped[0] & grouped[1]


def test_a_header_that_is_a_text_is_named_in_one_line(tmp_path):
    (tmp_path / "train.csv").write_text(f'"a long\ntext {"of words " * 30}",1\nmore,0\n')
    with pytest.raises(UserError, match=r"no column `text` in train.csv, which has a long text of words") as error:
        load_splits(files(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_calibration_documents_come_from_text_or_from_a_column_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still\r\ntwo\n".encode())
    assert read_documents(tmp_path / "a.txt") == ["one\u2028still", "two"]
    write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": None}, {"other": "x", "text": "two"}])
    assert " ".join(read_documents(tmp_path / "a.jsonl")).split() == ["one", "two"]
    write(tmp_path / "a.jsonl", [{"body": "one"}])
    with pytest.raises(UserError, match="has the columns body; `text` is expected"):
        read_documents(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="holds no text"):
        read_documents(tmp_path / "a.txt")
