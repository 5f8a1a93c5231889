"""Whatever texts and labels pandas, datasets and json write is read back equal."""

import json
import os
import re

import datasets
import pandas as pd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.planning.plan import read_choice
from compress.tasks.labels import is_list, label_text
from compress.tasks.splits import load_splits
from compress.tasks.task import Task

MARKS = ["\r\n", '""', *"\"',;\t|\n\r\\#", *"\u2028\x85\x0c\x1c\ufeff\x00"]
WORDS = ["nan", "null", "NA", "None", "1.0", " ", "text", "[0, 1]", "é", "\U0001f600", "مرحبا", "\u202e", "x" * 50]
TEXTS = st.lists(st.sampled_from([*MARKS, *WORDS]) | st.characters(exclude_categories=["Cs"]), max_size=8).map("".join)
FILES = read_choice("task", "files")
SURROGATES = re.compile("[\ud800-\udfff]")
WRITERS = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "quoted.csv": lambda frame, path: frame.to_csv(path, index=False, quoting=1, lineterminator="\r\n"),
    "index.csv": lambda frame, path: frame.to_csv(path),
    "tsv": lambda frame, path: frame.to_csv(path, sep="\t", index=False),
    "bom.tsv": lambda frame, path: frame.to_csv(path, sep="\t", index=False, encoding="utf-8-sig", quoting=2),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "json": lambda frame, path: frame.to_json(path, force_ascii=False),
    "parquet": lambda frame, path: frame.to_parquet(path),
    "datasets.json": lambda frame, path: to_dataset(frame).to_json(path),
    "datasets.csv": lambda frame, path: to_dataset(frame).to_csv(path),
    "datasets.parquet": lambda frame, path: to_dataset(frame).to_parquet(path),
    "dump.json": lambda frame, path: path.write_text(json.dumps(frame.to_dict("records")), encoding="utf-8"),
    "dump.jsonl": lambda frame, path: path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in frame.to_dict("records")),
        encoding="utf-8",
        newline="\n",
    ),
}


def to_dataset(frame):
    datasets.disable_progress_bars()
    return datasets.Dataset.from_pandas(frame)


def read_back(path):
    """Return the splits of a task whose splits are all in files like ``path``, which is train's."""
    files = {split: path.name.replace("train", split) for split in ("train", "validation", "test")}
    for split in ("validation", "test"):
        os.link(path, path.with_name(files[split]))
    return load_splits(Task(**{**FILES, "path": str(path.parent), "files": [files]}))


def is_name(text):
    """Return whether a text is a label under its own name: no number with a point and no list."""
    return text.strip() and label_text(text) == text.strip() and not is_list(text)


NAMES = TEXTS.filter(is_name)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    writer=st.sampled_from(sorted(WRITERS)),
    names=st.lists(NAMES, min_size=2, max_size=3, unique_by=str.strip),
    texts=st.lists(st.tuples(TEXTS, st.integers(0, 2)), max_size=6),
    order=st.permutations(["text", "label"]),
)
@example(
    "csv", ["a", "b"], [('"', 0), ('"\n,b"\n', 1), ('x,1\n"y\r', 0), ("\r", 1), ('\ufeff"\t"', 0)], ["label", "text"]
)
def test_texts_and_labels_are_read_back_equal(tmp_path_factory, writer, names, texts, order):
    rows = [*((f"{name} as a text", name) for name in names), *((text, names[i % len(names)]) for text, i in texts)]
    frame = pd.DataFrame(rows, columns=["text", "label"])[order]
    path = tmp_path_factory.mktemp("written") / f"train.{writer}"
    WRITERS[writer](frame, path)
    splits = read_back(path)
    for part in (splits.train, splits.test):
        assert part["text"][:] == frame["text"].tolist()
        assert [splits.task.labels[i] for i in part["label"]] == frame["label"].str.strip().tolist()


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    st.lists(
        st.lists(st.integers(0xD7F0, 0xE00F).map(chr) | st.sampled_from("a\x00é"), max_size=4).map("".join), min_size=2
    )
)
def test_half_a_surrogate_pair_of_json_becomes_one_replacement_character(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("surrogates") / "train.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)))
    splits = read_back(path)
    paired = [json.loads(json.dumps(text)) for text in texts]  # json joins the halves of a pair
    expected = [SURROGATES.sub("\ufffd", text) for text in paired]
    assert splits.train["text"][:] == expected
    changed = sum(old != new for old, new in zip(paired, expected))
    assert any(note.startswith(f"train.jsonl: {changed} texts with half a surrogate") for note in splits.notes) == (
        changed > 0
    )
