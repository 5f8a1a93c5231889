"""The readers read the files that users have."""

import json
import re
import subprocess
import sys

import pytest

from compress import hub
from compress.errors import UserError
from compress.tasks.sources import (
    File,
    Hub,
    Layout,
    choose_layout,
    parse_dialogues,
    read_files,
    read_hub,
    split_articles,
    split_documents,
)


def test_tsv_keeps_quotation_marks_and_fills_short_rows_with_an_empty_value(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b'\xef\xbb\xbftext\tlabel\r\n"quoted\t1\r\nshort\nlone\rreturn\t0\r\n')
    table = read_files(tmp_path, File(file="a.tsv"), "tsv").table
    assert table == {"text": ['"quoted', "short", "lone\rreturn"], "label": ["1", "", "0"]}


def test_csv_reads_quoted_fields_and_na_is_a_word(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one, two\nthree",NA\n')
    assert read_files(tmp_path, File(file="a.csv"), "tsv").table == {"text": ["one, two\nthree"], "label": ["NA"]}


def test_names_are_for_files_without_a_header(tmp_path):
    (tmp_path / "a.tsv").write_text("1\tyes\n")
    assert read_files(tmp_path, File(file="a.tsv", names=("label", "text")), "tsv").table == {
        "label": ["1"],
        "text": ["yes"],
    }
    with pytest.raises(
        UserError, match=r"a.tsv has 2 columns in its first line and 1 are named \(text\). Set task.files"
    ):
        read_files(tmp_path, File(file="a.tsv", names=("text",)), "tsv")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_records_keep_their_types(tmp_path, suffix):
    rows = [{"text": "a", "label": [0, 2]}, {"text": "b", "label": []}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    assert read_files(tmp_path, File(file=path.name), "tsv").table == {"text": ["a", "b"], "label": [[0, 2], []]}


@pytest.mark.parametrize(
    "name, content",
    [("a.tsv", b"a\tb\n1\t2\t3\n"), ("a.csv", b""), ("a.jsonl", b"{"), ("a.json", b'["x"]'), ("a.csv", b"a\n\xff\n")],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} could not be read as .*. Fix the file"):
        read_files(tmp_path, File(file=name), "tsv")


def test_other_formats_are_refused_with_the_list(tmp_path):
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(UserError, match=r"ends in .xlsx; expected csv, tsv"):
        read_files(tmp_path, File(file="a.xlsx"), "tsv")


def test_a_pattern_reads_its_files_one_after_another_but_not_two_formats(tmp_path):
    (tmp_path / "b_dev.tsv").write_text("text\n2\n")
    (tmp_path / "a_dev.tsv").write_text("text\n1\n")
    assert read_files(tmp_path, File(file="*_dev.tsv"), "tsv").table == {"text": ["1", "2"]}
    (tmp_path / "a_dev.csv").write_text("text\n1\n")
    with pytest.raises(UserError, match=r"has a_dev.csv and a_dev.tsv and b_dev.tsv. Name the file to read"):
        read_files(tmp_path, File(file="*_dev.*"), "tsv")


def test_the_layout_with_the_fewest_files_missing_is_read(tmp_path):
    layouts = (
        Layout(train="train.txt", validation="valid.txt", test="test.txt"),
        Layout(train="valid.txt", test="test.txt"),
    )
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).touch()
    assert choose_layout(layouts, tmp_path)[1] == layouts[1]
    (tmp_path / "train.txt").touch()
    assert choose_layout(layouts, tmp_path)[1] == layouts[0]


def test_a_path_to_one_file_is_train_and_read_as_its_layout_says(tmp_path):
    (tmp_path / "train.tsv").touch()
    layouts = (Layout(train=File(file="train.tsv", names=("text", "label")), test="test.tsv"),)
    folder, layout = choose_layout(layouts, tmp_path / "train.tsv")
    assert folder == tmp_path
    assert list(layout.files()) == ["train"]
    assert layout.files()["train"].names == ("text", "label")


def test_dialogues_give_the_utterances_that_have_a_strategy():
    record = {"dialog": [{"text": "a", "strategy": "Question"}, {"text": "b"}, {"text": "c", "strategy": "Others"}]}
    expected = {"text": ["a", "c", "a", "c"], "strategy": ["Question", "Others"] * 2, "dialogue": [0, 0, 1, 1]}
    assert parse_dialogues({"dialog": [record["dialog"]] * 2}) == expected
    assert parse_dialogues({"text": [json.dumps(record)] * 2}) == expected


def test_articles_start_at_titles_but_not_at_headings_or_formulas():
    lines = [
        "",
        " = One = ",
        "",
        " text with k ",
        " = 1 and l = ",
        " 2 . ",
        "",
        " = = Heading = = ",
        "",
        " = Two = ",
        "",
        " x ",
    ]
    of_a_file = split_articles({"text": lines})["text"]
    assert [text.split("\n")[0] for text in of_a_file] == [" = One = ", " = Two = "]
    of_the_hub = split_articles({"text": [line and f"{line}\n" for line in lines]})["text"]
    assert of_the_hub == of_a_file


def test_documents_end_at_their_mark_or_else_are_pieces_of_whole_paragraphs():
    assert split_documents({"text": ["a", "<|endoftext|>", "b", "c"]})["text"] == ["a", "b\nc"]
    assert split_documents({"text": ["one", "", "two", "", "three"]}, piece_chars=6)["text"] == [
        "one\n\ntwo",
        "three",
    ]


def test_the_hub_is_asked_for_the_split_configuration_and_revision(monkeypatch):
    request = {}

    def load_dataset(path, **kwargs):
        import datasets

        request.update(path=path, **kwargs)
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(hub, "is_reachable", lambda url: True)
    files = Hub(id="a/b", config="c", folder="d", revision="e")
    assert read_hub(files, "train[:1%]") == {"text": ["a"]}
    assert request == {"path": "a/b", "name": "c", "data_dir": "d", "revision": "e", "split": "train[:1%]"}


def test_the_hub_is_offline_only_while_it_cannot_be_reached(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "is_reachable", lambda url: False)
    with hub.offline_if_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_nothing_answers_at_a_closed_port():
    assert not hub.is_reachable("http://127.0.0.1:9", timeout_s=1)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "httpx\\[socks\\]"),
        ("all_proxy", "socks4://127.0.0.1:9", "Unknown scheme"),
        ("NO_PROXY", "[::1]", "Invalid port"),
        ("SSL_CERT_FILE", "/nowhere", "No such file"),
    ],
)
def test_an_environment_in_which_the_hub_cannot_be_asked_is_named(monkeypatch, caplog, name, value, reason):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    assert not hub.is_reachable("https://127.0.0.1:9", timeout_s=1)
    (line,) = caplog.messages
    assert re.search(f"The hub cannot be asked: .*{reason}.* Correct or unset .*{name}", line)


def test_naming_a_task_loads_no_heavy_library():
    code = "import sys, compress.tasks.task; print({'torch', 'pandas', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
