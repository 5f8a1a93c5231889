"""Files are read as pandas, datasets, spreadsheets and people write them, or refused with the line and the remedy."""

import csv
import json

import pandas as pd
import pytest

from compress.errors import UserError
from compress.tasks.formats import read_file, read_lines
from compress.tasks.sources import File, read_files


def read(path, content, names=None, txt="tsv"):
    """Write a file, and return its table and notes."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(path, names, txt)


@pytest.mark.parametrize("quoting", [0, 1, 2])  # QUOTE_MINIMAL, QUOTE_ALL, QUOTE_NONNUMERIC
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t"), ("csv", ";")])
def test_what_pandas_quotes_is_read_as_it_was(tmp_path, quoting, line_end, suffix, separator):
    texts = [
        'He said "hi"\nthere',
        '"',
        'a,b;c\td"',
        "plain",
        "two\r\nlines",
        "\u2028\x0c\x85\x1c",
        "nan",
        "",
        "x\r\ny\r",
    ]
    frame = pd.DataFrame({"text": texts, "label": range(len(texts))})
    frame.to_csv(path := tmp_path / f"a.{suffix}", sep=separator, index=False, quoting=quoting, lineterminator=line_end)
    table, notes = read_file(path, None, "tsv")
    assert table == {"text": texts, "label": [str(i) for i in range(len(texts))]}
    assert any("fields are read as quoted" in note for note in notes) == (suffix == "tsv")
    assert any("separated by `;`" in note for note in notes) == (separator == ";")


def test_quotation_marks_of_glue_stay_text(tmp_path):
    stray = 'text\tlabel\n"a" film\t1\n"open\t0\n"whole ""quote"""\t1\n'
    table, notes = read(tmp_path / "a.tsv", stray)
    assert table["text"] == ['"a" film', '"open', '"whole ""quote"""'] and notes == ()
    table, notes = read(tmp_path / "a.tsv", 'text\tlabel\n"a film"\t1\nmore\t0\n')
    assert table["text"] == ['"a film"', "more"]
    assert notes == ("a.tsv: the quotation marks around 1 fields are read as text",)


def test_stray_quotation_marks_of_a_csv_are_text_or_refused_and_swallow_no_row(tmp_path):
    rows = [f"text {i},{i % 2}" for i in range(300)]
    rows[50], rows[120] = f'"{rows[50]}', f'"{rows[120]}'
    table, notes = read(tmp_path / "a.csv", "\n".join(["text,label", *rows]))
    assert len(table["text"]) == 300 and table["text"][50] == '"text 50'
    assert notes == ("a.csv: quotation marks are read as text, because the one in line 52 is not closed",)
    rows[7] = '"one, two",1'
    with pytest.raises(
        UserError, match=r"a.csv .* \(line 52 begins a field .* double the marks inside\). Fix the file"
    ):
        read(tmp_path / "a.csv", "\n".join(["text,label", *rows]))
    rows[50], rows[120] = '"text 50,1', 'text 120",0'  # closes at the end of a field, so nothing is malformed
    table, notes = read(tmp_path / "a.csv", "\n".join(["text,label", *rows]))
    assert len(table["text"]) == 230
    assert "a.csv: the text in line 52 holds lines that look like rows" in notes[0]


def test_a_lone_carriage_return_is_text_but_ends_the_lines_of_an_old_mac(tmp_path):
    content = "text,label\r\n" + "".join(f"first\rsecond {i},{i % 2}\r\n" for i in range(4)) + "short\r\n"
    table, notes = read(tmp_path / "a.csv", content)
    assert table["text"] == [*(f"first\rsecond {i}" for i in range(4)), "short"] and table["label"] == [*"0101", ""]
    assert notes == ("a.csv: 1 rows have fewer columns than the first line, such as line 6",)
    assert read(tmp_path / "a.csv", "label,text\n1,end\r\n0,b\n")[0] == {"label": ["1", "0"], "text": ["end\r", "b"]}
    assert read(tmp_path / "a.csv", "text,label\ra,1\rb,0")[0] == {"text": ["a", "b"], "label": ["1", "0"]}
    assert read(tmp_path / "a.tsv", "a\t1\r\nb\r\n", ("text", "label"))[0] == {"text": ["a", "b"], "label": ["1", ""]}


def test_what_spreadsheets_leave_empty_is_left_out_and_counted(tmp_path):
    table, notes = read(tmp_path / "a.csv", "\ufeff,text, label ,,\r\n0,a,1,,\r\n\r\n1,b,0,,\r\n,,,,\r\n,,,,\r\n")
    assert table == {"text": ["a", "b"], "label": ["1", "0"]}
    assert notes == ("a.csv: 3 empty rows left out",)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.csv", "text,text,label\nx,y,1\n", "it has 2 columns named `text`; rename all but one"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a", "text": "b"}\n', "line 2: it has 2 columns named `text`"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3: Expecting value"),
        ("a.csv", "text,label\na,1\nb,1,2\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"text,label\ngood,1\ncaf\xe9,0\n", "line 3 is not UTF-8 but perhaps CP1252; `iconv -f CP1252"),
        ("a.txt", "text\tlabel\n\xe9\t0\n".encode("utf-16"), "line 1 is not UTF-8 but perhaps UTF-16; `iconv"),
        ("a.tsv", "text\tlabel\ncafe\t0\n".encode("utf-16-le"), "perhaps UTF-16"),
        ("a.json", '{"text": {"x": "a"}, "label": [1]}\n[]', "expected a list of objects"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_line(tmp_path, name, content, reason):
    with pytest.raises(UserError) as error:
        read(tmp_path / name, content)
    assert reason in str(error.value) and str(error.value).startswith(f"{name} could not be read as")
    assert "\n" not in str(error.value)


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="2 columns named `text`"):
        read_file(tmp_path / "a.parquet", None, "tsv")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_every_form_of_json_is_read_under_either_suffix(tmp_path, suffix):
    frame = pd.DataFrame({"text": ["a\u2028b", 'q"\\/é', "c\n"], "label": [0, 1, 0]}, index=[5, 6, 9])
    expected = {"text": frame["text"].tolist(), "label": [0, 1, 0]}
    whole = [{}, {"orient": "index"}] if suffix == "json" else []  # one line of JSON lines is one record
    for options in (*whole, {"orient": "records"}, {"orient": "records", "lines": True}):
        for ascii in (True, False):
            frame.to_json(path := tmp_path / f"a.{suffix}", **options, force_ascii=ascii)
            assert read_file(path, None, "tsv")[0] == expected
    records = frame.to_dict("records")
    for content in (
        json.dumps(records, indent=2),
        json.dumps(expected, indent=1),
        json.dumps({"data": records}, indent=1),
    ):
        assert read(path, f"\ufeff{content}\n\n")[0] == expected
    assert read(path, json.dumps(records[0], indent=1))[0] == {"text": ["a\u2028b"], "label": [0]}


def test_lines_end_at_line_breaks_alone(tmp_path):
    (tmp_path / "words").write_bytes("\ufeffone\u2028two\r\n\n \nthr\x0cee \x85\n".encode())
    assert read_lines(tmp_path / "words") == ["one\u2028two", "thr\x0cee \x85"]
    (tmp_path / "words").write_bytes(b"ok\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"words could not be read as text \(line 2 is not UTF-8 but perhaps CP1252"):
        read_lines(tmp_path / "words")


def test_rows_of_several_files_are_located_and_their_columns_keep_together(tmp_path):
    (tmp_path / "train-0.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "train-1.csv").write_text("text,stars\nc,5\n")
    (tmp_path / "train-2.csv").write_text("label,text\n1,d\n")
    rows = read_files(tmp_path, File(file="train-*.csv"), "tsv")
    assert rows.table == {
        "text": ["a", "b", "c", "d"],
        "label": ["0", "1", None, "1"],
        "stars": [None, None, "5", None],
    }
    assert rows.incomplete == {"label": "train-1.csv", "stars": "train-2.csv"}
    assert [rows.locate_row(i) for i in (0, 2, 3)] == ["train-0.csv, row 1", "train-1.csv, row 1", "train-2.csv, row 1"]


@pytest.mark.parametrize(
    "folder, name, names",
    [
        ("goemotions", "dev.tsv", ("text", "labels", "id")),  # both hold the quotation marks of a csv writer
        ("agnews", "train-sample-10k.tsv", ("text", "label")),
    ],
)
def test_published_tsv_with_quoted_fields_is_read_as_the_csv_module_reads_it(shared_data, folder, name, names):
    path = shared_data(folder) / name
    with path.open(encoding="utf-8", newline="") as lines:
        expected = list(csv.reader(lines, delimiter="\t"))
    table, notes = read_file(path, names, "tsv")
    assert list(map(list, zip(*(table[column] for column in names)))) == expected
    assert "fields are read as quoted" in notes[0]
