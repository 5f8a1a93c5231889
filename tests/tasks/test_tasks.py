"""A task reads its rows, holds out splits and refuses mistakes. Every YAML of conf/task is built here by its file."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from compress import hub
from compress.errors import UserError
from compress.planning.plan import read_choice
from compress.tasks.splits import draw_held_out_rows, hash_rows, load_splits
from compress.tasks.task import Task

CONF = Path(__file__).parents[2] / "conf" / "task"
NAMES = sorted(path.stem for path in CONF.glob("[!_]*.yaml"))


def shipped(task, **changes):
    return Task(**{**read_choice("task", task), **changes})


def files(folder, **changes):
    """Return a task on the user's own files."""
    return shipped("files", path=str(folder), **changes)


def sizes(splits):
    return len(splits.train), len(splits.validation), len(splits.test)


def write(folder, name, *rows, header="text\tlabel"):
    (folder / name).write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def reviews(tmp_path):
    write(tmp_path, "train.tsv", *(f"text {i}\t{'yes' if i % 3 else 'no'}" for i in range(30)))
    write(tmp_path, "test.tsv", "a test\tno", "one more\tyes")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_valid_under_its_own_name(name):
    assert shipped(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_tasks_data_is_available_or_one_line_says_what_to_type(name, monkeypatch):
    monkeypatch.setattr(hub, "is_reachable", lambda url: False)
    task = shipped(name)
    if task.generate:
        assert len(load_splits(task).test)
        return
    with pytest.raises(UserError, match=r"Set task\.path") as error:
        load_splits(task)
    assert "\n" not in str(error.value)


def test_an_unreachable_hub_is_reported_in_one_line(monkeypatch):
    monkeypatch.setattr(hub, "is_reachable", lambda url: False)
    with pytest.raises(UserError) as error:
        load_splits(shipped("sst2"))
    assert str(error.value) == (
        "The data of task `sst2` is not available: the hub could not be reached for nyu-mll/glue. Set task.path=FOLDER "
        "to a folder with train.tsv and dev.tsv."
    )


# The real data: rows as published. Rows held out for validation come from train.


@pytest.mark.parametrize(
    "name, folder, train, validation, test",
    [
        ("sst2", "glue-sst2", 67_349 - 1_347, 1_347, 872),
        ("cola", "glue-cola", 8_551 - 428, 428, 527 + 516),
        ("semeval_emotion", "semeval2018-ec", 6_838, 886, 3_259),
        ("goemotions", "goemotions", 43_410, 5_426, 5_427),
        ("agnews", "agnews", 10_001 - 500, 500, 7_600),
        ("wikitext", "wikitext2", 60 - 6, 6, 60),
    ],
)
def test_published_rows(shared_data, name, folder, train, validation, test):
    splits = load_splits(shipped(name, path=str(shared_data(folder))))
    assert sizes(splits) == pytest.approx((train, validation, test), abs=3)  # copies of a text stay together
    assert len(splits.train) + len(splits.validation) == train + validation
    assert len(splits.test) == test


def test_sst2s_own_test_set_can_be_named(shared_data):
    layout = {"train": "train.tsv", "validation": "dev.tsv", "test": "test-labeled.tsv"}
    splits = load_splits(shipped("sst2", path=str(shared_data("glue-sst2")), files=[layout]))
    assert sizes(splits) == (67_349, 872, 1_821)


def test_goemotions_labels_are_in_their_published_order(shared_data):
    folder = shared_data("goemotions")
    task = shipped("goemotions", path=str(folder))
    assert list(task.labels) == (folder / "labels.txt").read_text().split()
    first = load_splits(task).train[0]
    assert [task.labels[i] for i, flag in enumerate(first["label"]) if flag] == ["neutral"]


def test_semeval_flags_are_its_columns(shared_data):
    splits = load_splits(shipped("semeval_emotion", path=str(shared_data("semeval2018-ec"))))
    assert [splits.task.labels[i] for i, flag in enumerate(splits.train[0]["label"]) if flag] == [
        "anticipation", "optimism", "trust"
    ]  # fmt: skip


def test_agnews_numbers_from_1_and_names_mean_the_same(shared_data):
    splits = load_splits(shipped("agnews", path=str(shared_data("agnews"))))
    assert [splits.test["label"][i] for i in range(3)] == [2, 3, 3]
    assert splits.test[0]["text"].startswith("Fears for T N pension after talks Unions representing workers")


def test_esconv_holds_out_whole_dialogues(shared_data):
    splits = load_splits(shipped("augesc", path=str(shared_data("esconv"))))
    train, validation, test = sizes(splits)
    assert (train + validation, test) == (1_772, 1_948)
    records = [json.loads(line)["dialog"] for line in (shared_data("esconv") / "esc-valid.jsonl").open()]
    counts = [sum("strategy" in utterance for utterance in dialog) for dialog in records]
    held = set(draw_held_out_rows([i for i, count in enumerate(counts) for _ in range(count)], 177, seed=0))
    starts = [sum(counts[:i]) for i in range(len(counts))]
    assert all(len(held & set(range(s, s + n))) in (0, n) for s, n in zip(starts, counts))
    assert validation == len(held)


def test_tinystories_splits_follow_one_another(shared_data):
    folder = shared_data("tinystories-sample")
    splits = load_splits(shipped("tinystories", path=str(folder)))
    text = "\n\n".join(t for part in (splits.train, splits.validation, splits.test) for t in part["text"])
    assert text.split() == (folder / "tinystories.txt").read_text().split()


def test_c4_is_files_of_documents(shared_data):
    path = shared_data("c4-sample") / "c4_sample.jsonl"
    splits = load_splits(files(path, kind="lm", metrics=["perplexity"], primary="perplexity"))
    assert sizes(splits) == (810, 90, 100)
    assert splits.train.column_names == ["text"]


# GLUE's zips


@pytest.mark.parametrize(
    "name, header, row, expected",
    [
        ("sst2", "sentence\tlabel", 'the "film\t1', {"text": 'the "film', "label": 1}),
        (
            "mrpc",
            "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            '0\t1\t2\tHe "said\tso',
            {"text": 'He "said', "text_pair": "so", "label": 0},
        ),
        (
            "stsb",
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tg\tf\t2012\t1\ts\ts\ta\tb\t3.800",
            {"text": "a", "text_pair": "b", "label": 3.8},
        ),
        (
            "rte",
            "index\tsentence1\tsentence2\tlabel",
            "0\ta\tb\tnot_entailment",
            {"text": "a", "text_pair": "b", "label": 1},
        ),
        (
            "qnli",
            "index\tquestion\tsentence\tlabel",
            "0\ta\tb\tentailment",
            {"text": "a", "text_pair": "b", "label": 0},
        ),
        (
            "qqp",
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "0\t1\t2\ta\tb\t1",
            {"text": "a", "text_pair": "b", "label": 1},
        ),
        (
            "mnli",
            "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label",
            "0\t1\ta\tb\tneutral\tcontradiction",
            {"text": "a", "text_pair": "b", "label": 2},
        ),
    ],
)
def test_glue_zips(tmp_path, name, header, row, expected):
    test = "dev_matched.tsv" if name == "mnli" else "dev.tsv"
    write(tmp_path, test, row, header=header)
    texts = [f"{expected['text']} {i}" for i in range(40)]
    write(tmp_path, "train.tsv", *(row.replace(expected["text"], text, 1) for text in texts), header=header)
    splits = load_splits(shipped(name, path=str(tmp_path), holdout={"validation": 1}))
    assert splits.test[0] == expected
    assert sorted([*splits.train["text"], *splits.validation["text"]]) == sorted(texts)


def test_qqps_broken_lines_are_left_out_and_reported(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    write(tmp_path, "train.tsv", "0\t1\t2\ta\tb\t1", "1\t3\t4\tcut off", "2\t5\t6\tc\td\t0", header=header)
    write(tmp_path, "dev.tsv", "0\t1\t2\ta\tb\t1", header=header)
    splits = load_splits(shipped("qqp", path=str(tmp_path)))
    assert "train: 1 rows without a label left out" in splits.notes
    assert len(splits.train) + len(splits.validation) == 2


def test_mrpcs_dev_set_is_not_read_beside_the_file_it_was_cut_from(tmp_path):
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "train.tsv", "dev.tsv"):
        write(tmp_path, name, f"1\t1\t1\t{name}\tx", f"0\t1\t1\t{name} too\tx", header=header)
    splits = load_splits(shipped("mrpc", path=str(tmp_path)))
    assert {t.split()[0] for t in [*splits.train["text"], *splits.validation["text"]]} == {"train.tsv"}
    assert splits.test["text"][0] == "dev.tsv"


# The user's own files


def test_labels_are_found_in_train_and_what_is_missing_is_held_out(reviews):
    splits = load_splits(files(reviews))
    assert splits.task.labels == ("no", "yes")
    assert splits.task.num_labels == 2
    assert sizes(splits) == (27, 3, 2)
    assert splits.test["label"][:] == [0, 1]
    assert splits.notes == ("validation: 3 rows held out of train (task.holdout.validation)",)


def test_numbers_as_labels_are_sorted_as_numbers(tmp_path):
    write(tmp_path, "train.tsv", *(f"t{i}\t{i % 11}" for i in range(60)))
    assert load_splits(files(tmp_path)).task.labels == tuple(map(str, range(11)))


def test_validation_files_are_read_under_either_name(reviews):
    for name in ("dev.tsv", "valid.tsv"):
        write(reviews, name, "fresh\tno")
        assert load_splits(files(reviews)).validation["text"][:] == ["fresh"]
        (reviews / name).unlink()


def test_no_row_is_in_two_splits_and_copies_of_a_text_stay_together(tmp_path):
    write(tmp_path, "train.tsv", *(f"text {i // 2}\t{i % 2}" for i in range(200)))
    splits = load_splits(files(tmp_path))
    parts = [set(part["text"]) for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 100
    assert sum(sizes(splits)) == 200


def test_a_seed_draws_other_validation_rows_but_never_another_test_split(tmp_path):
    write(tmp_path, "train.tsv", *(f"text {i}\t{i % 2}" for i in range(100)))
    first, same, other = (load_splits(files(tmp_path), seed) for seed in (1, 1, 2))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert first.test["text"][:] == other.test["text"][:]
    assert first.validation["text"][:] != other.validation["text"][:]


def test_limits_leave_random_rows_and_are_reported(reviews):
    splits = load_splits(files(reviews, limit={"train": 5, "test": 1}))
    assert sizes(splits) == (5, 3, 1)
    assert "train: 5 of 27 rows (task.limit.train)" in splits.notes
    assert splits.train["text"][:] != [f"text {i}" for i in range(5)]


def test_columns_are_joined_by_a_space(tmp_path):
    (tmp_path / "train.csv").write_text("title,body,stars\n" + "".join(f"t{i},b{i},{i % 2}\n" for i in range(20)))
    splits = load_splits(files(tmp_path, columns={"text": ["title", "body"], "label": "stars"}))
    assert all(text.split()[1] == text.split()[0].replace("t", "b") for text in splits.train["text"])


@pytest.mark.parametrize("labels", [["a,c", "b", ""], [["a", "c"], ["b"], []], [[0, 2], [1], []]])
def test_many_labels_come_as_strings_or_lists_of_names_or_indices(tmp_path, labels):
    rows = [{"text": f"text {i}", "label": labels[i % 3]} for i in range(30)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kind = {"kind": "multilabel", "metrics": ["f1_micro"], "primary": "f1_micro", "labels": ["a", "b", "c"]}
    rows = load_splits(files(tmp_path, **kind)).train
    encoded = {int(text.split()[1]) % 3: label for text, label in zip(rows["text"], rows["label"])}
    assert encoded == {0: [1.0, 0.0, 1.0], 1: [0.0, 1.0, 0.0], 2: [0.0, 0.0, 0.0]}


def test_the_hubs_splits_are_used_as_set(monkeypatch):
    def load_dataset(path, split, **_):
        import datasets

        rows = {"train": 100, "validation": 10}[split]
        texts = [f"{split} {i}" for i in range(rows)]
        return datasets.Dataset.from_dict(
            {"sentence": texts, "label": [i % 2 for i in range(rows)], "idx": [*range(rows)]}
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(hub, "is_reachable", lambda url: True)
    splits = load_splits(shipped("sst2"))
    assert sizes(splits) == (98, 2, 10)
    assert splits.test[1] == {"text": "validation 1", "label": 1}
    assert all(text.startswith("train") for text in splits.validation["text"])


def test_the_hubs_own_refusal_is_passed_on(monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError('Unknown split "train".\nMore.')

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(hub, "is_reachable", lambda url: True)
    with pytest.raises(UserError, match=r'the hub answered “Unknown split "train".” for nyu-mll/glue. Set task.path'):
        load_splits(shipped("sst2"))


# Mistakes


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"metrics": ["pearson"], "primary": "pearson"},
            "task.metrics is pearson, and task .* is multiclass. .* accuracy, f1",
        ),
        ({"primary": "matthews"}, "task.primary is matthews.*Set task.primary to one of accuracy, f1_macro"),
        ({"labels": ["a", "a"]}, "has the labels a, a. Set task.labels"),
        (
            {"kind": "multilabel", "metrics": ["f1_micro"], "primary": "f1_micro", "columns": {}},
            "names neither its labels nor their column",
        ),
        ({"hub": {"id": "a/b", "train": "train", "test": "train"}}, "one set of rows for two of its splits"),
        ({"files": [{"train": "a.csv", "test": "a.csv"}]}, "one set of rows for two of its splits"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        shipped("files", **changes)


@pytest.mark.parametrize(
    "changes", [{"kid": 1}, {"kind": "binary"}, {"holdout": {"test": 1.5}}, {"limit": {"train": 0}}, {"max_length": 1}]
)
def test_a_wrong_key_or_value_is_refused(changes):
    with pytest.raises(ValidationError):
        shipped("files", **changes)


def test_labels_that_are_not_yet_found_have_no_number():
    with pytest.raises(UserError, match="finds its labels in its training data"):
        _ = shipped("files").num_labels


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"path": "/nowhere"}, "There is no folder /nowhere. Set task.path"),
        ({"files": [{"train": "a.csv"}]}, "needs a.csv and .* has test.tsv, train.tsv. Set task.path"),
        (
            {"columns": {"text": "body"}},
            "no column `body` in train.*, which has text, label. Set task.columns.text to one",
        ),
        ({"labels": ["yes", "maybe"]}, "has the label `no` in .*; yes, maybe are known. Set task.labels"),
        (
            {"kind": "regression", "metrics": ["pearson"], "primary": "pearson"},
            "train has labels that are not numbers .*. Set task.kind=multiclass",
        ),
        ({"holdout": {"validation": 30}}, "30 rows and 30 of them are to be held out for validation"),
        ({"holdout": {}}, "has no validation split .* cut it from train with task.holdout.validation=0.1"),
        ({"rows": "dialogues"}, "could not be read as tsv|expects dialogues, which the columns text, label do not"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(reviews, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_splits(shipped("files", **{"path": str(reviews), **changes}))
    assert "\n" not in str(error.value)


def test_a_label_that_only_test_has_is_refused(reviews):
    write(reviews, "test.tsv", "a test\tperhaps")
    with pytest.raises(UserError, match="has the label `perhaps` in test; no, yes are known"):
        load_splits(files(reviews))


def test_flags_other_than_0_and_1_are_refused(tmp_path):
    write(tmp_path, "train.tsv", "t\t1\t2", header="text\ta\tb")
    kind = {"kind": "multilabel", "metrics": ["f1_micro"], "primary": "f1_micro", "labels": ["a", "b"]}
    with pytest.raises(UserError, match="holds `2`; 0 or 1 is expected"):
        load_splits(files(tmp_path, columns={"text": "text"}, **kind))


def test_a_benchmark_without_its_test_file_is_refused(tmp_path):
    write(tmp_path, "train.tsv", "a\t1", "b\t0", header="sentence\tlabel")
    with pytest.raises(UserError, match=r"has no test split \(dev.tsv\) in"):
        load_splits(shipped("sst2", path=str(tmp_path)))


def test_the_fingerprint_is_of_rows_and_label_names(reviews):
    splits = load_splits(files(reviews))
    assert splits.fingerprint == load_splits(files(reviews)).fingerprint
    assert splits.fingerprint != load_splits(files(reviews, labels=["yes", "no"])).fingerprint
    assert hash_rows(splits.train) != hash_rows(splits.validation)
