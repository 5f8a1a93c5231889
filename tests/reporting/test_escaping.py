"""Labels, methods, reasons and paths of any characters reach every part of a report as they are."""

import base64
import csv
import io
import re
import shlex
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.io_wrapper import GetLogdirSubdirectories
from tensorboard.plugins.hparams import metadata
from test_report import WORSE, answered, begin, read_sweep
from torch.utils.tensorboard import SummaryWriter

from compress.artifacts.artifact import Done
from compress.cache.events import hide_events, reveal_events
from compress.measuring.predictions import compare_predictions
from compress.reporting import report
from compress.reporting.card import write_card
from compress.reporting.curves import write_curves
from compress.reporting.escaping import escape_markdown, make_file_name, make_printable
from compress.reporting.jobs import RESULT, gather_rows
from compress.reporting.rows import Job, build_failed_row, drop_repeated_baselines
from compress.reporting.tables import build_table, differing_overrides
from compress.reporting.tensorboard import write_overlay
from compress.sweeping.live import State, draw_states

HOSTILE = [
    "[/INST]", "[other] [bold]x[/bold]", "$$ $5 to $10 \\frac", "<b>&lt;</b></td><script>alert(1)</script>",
    "a|b`c`*d*_e_~f~", "back\\", "two\nlines\r\nand\ta tab", "bell\a\x1b[2J escape", ": heart :heart: 'it''s' \"so\"",
    "- # 1. [x](y)", "\u202egnp\u2066 \u05e9\u05dc\u05d5\u05dd", "漢字 🤗👩‍💻", "--- # ..", "word" * 60, " ",
]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20),
    st.text("[]/\\$<>&|`*_~#-:'\" =,\n\r\t.a1", min_size=1, max_size=12),
).filter(lambda text: text not in ("none", "failed"))


class Words(HTMLParser):
    """The texts of a page's elements by tag."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.texts.append([tag, ""])

    def handle_data(self, data):
        if self.texts:
            self.texts[-1][1] += data

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]


def squeeze(text):
    return re.sub(r"\s+", "", text)


def cells_of(markdown):
    """Return the cells of a Markdown text's tables as a reader sees them."""
    return [" ".join(text.split()) for text in Words(MarkdownIt().enable("table").render(markdown)).of("td")]


def make_sweep(folder, text):
    """Write two jobs that ended and one that failed, with ``text`` wherever a user's text can be."""
    names = ("", text)
    before, after = (replace(answered(wrong), names=names) for wrong in (10, 20))
    none, prune = WORSE.descriptions.values()
    outcome = replace(
        WORSE,
        descriptions={
            "none": none,
            text: replace(
                prune, limits=(text,), history=(*prune.history[:1], Done(text, {"a": text}, 1.0, trained=False))
            ),
        },
        measurements={
            "none": WORSE.measurements["none"],
            text: replace(WORSE.measurements["prune"], comparison=compare_predictions(before, after, "accuracy")),
        },
        predictions={"none": before, text: after},
        baseline="a",
    )
    for number, sparsity in enumerate(("0.2", "0.5")):
        words = (f"technique.prune.sparsity={sparsity}", f"technique.prune.calibration={text}{number}")
        begin(folder / f"{number}_job")
        report.report_success(folder / f"{number}_job", Job(text, text, text, 0, words), outcome)
        with SummaryWriter(str(folder / f"{number}_job" / "tensorboard" / "1_prune")) as writer:
            writer.add_scalar("train/loss", number)
    begin(folder / "2_job")
    report.report_failure(folder / "2_job", Job(text, text, text, 0), text)
    return outcome, gather_rows(folder)


@settings(max_examples=1, deadline=None, derandomize=True)
@given(TEXTS)
@example("[/INST] $5 <b>|`*_\n\\ \u202e漢🤗 'it''s' \"so\"")
def test_hostile_labels_through_a_whole_report(text):
    with tempfile.TemporaryDirectory() as temporary:
        check_report(Path(temporary) / "[/a] $b$ <c> é", text)


def check_report(folder, text):
    shown, terminal = make_printable(text), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    outcome, rows = make_sweep(folder, text)
    with redirect_stdout(terminal):
        rows = report.publish_report(folder, drop_repeated_baselines(rows))
    (curve,) = write_curves(folder, rows)
    write_overlay(folder, rows)
    (folder / "0_job" / "config.json").write_text("{}")
    write_card(folder / "0_job", outcome, text)

    # The terminal
    terminal.flush()
    printed = terminal.buffer.getvalue().decode()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", printed)
    reason = make_printable(re.sub(r"[\r\n]+", " ", text))  # its lines become one
    assert squeeze(f"{shown} failed: {reason}") in squeeze(printed)
    assert squeeze(f"results: {folder}") in squeeze(printed)

    # The tables
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for row in (*table, *pandas.read_parquet(folder / "results.parquet").to_dict("records")):
        assert row["method"] in (text, "none") and row["model"] == row["task"] == text
    assert shlex.split(table[2]["overrides"])[1] == f"technique.prune.calibration={text}1"
    assert (table[3]["reason"], table[1]["limits"]) == (text, text)
    written = cells_of((folder / "results.md").read_text(encoding="utf-8"))
    assert {" ".join(shown.split()), "none"} == set(written[:: len(written) // 4])

    # The page and its pictures
    page = (folder / "report.html").read_text(encoding="utf-8")
    words = Words(page)
    (title,) = words.of("h1")
    assert squeeze(title) == squeeze(f"{shown} on {shown}: 100 test examples, cpu, 2 threads")
    failed = read_sweep(folder / "report.html")["rows"][-1]
    assert (failed["label"], failed["details"]["reason"]) == (shown, reason)
    assert len(words.of("script")) == 3 and len(words.of("table")) == 1 and not words.of("b")
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)', page)
    drawn = [ElementTree.fromstring(base64.b64decode(picture)) for picture in pictures]
    assert len(drawn) == 5 and all(image.tag.endswith("svg") for image in drawn)
    labels = ["".join(each.itertext()) for each in drawn[0].iter() if each.tag.endswith("}text")]
    assert any(squeeze(label).startswith(squeeze(f"2 {shown}")[:50]) for label in labels)
    assert imread(curve).shape == (720, 960, 4)

    # The card
    card = ModelCard.load(folder / "0_job" / "README.md")
    assert card.data.model_name == f"tiny-toy-{text}"
    assert " ".join(f"a={shown}".split()) in cells_of(card.text)

    # TensorBoard: the sweep's own folder and a run for every row, none of the jobs' folders
    runs = sorted(map(Path, GetLogdirSubdirectories(str(folder))))
    assert len(runs) == 1 + 4 and {run.parent for run in runs[1:]} == {folder / "tensorboard"} == {runs[0]}
    methods = set()
    for run in runs[1:]:
        content = EventAccumulator(str(run)).Reload().PluginTagToContent("hparams")
        start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
        methods.add(start.hparams["method"].string_value)
    assert methods == {"none", shown}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS)
def test_every_medium_shows_the_text_itself(text):
    shown = make_printable(text)
    assert make_printable(shown) == shown and shown.splitlines() == [shown]
    (table,) = (f"| {escape_markdown(text)} |\n|---|\n| {escape_markdown(text)} |",)
    assert cells_of(table) == [" ".join(shown.split())]
    item = Words(MarkdownIt().render(f"- {escape_markdown('x ' + text)}"))
    assert squeeze(item.of("li")[0]) == squeeze(f"x {shown}") and len(item.texts) == 2
    console = Console(width=1000, file=io.StringIO())
    console.print(draw_states([State(text, "failed", text)]))
    assert squeeze(console.file.getvalue()).startswith(squeeze(f"{shown}failed{shown}"))
    row = {**build_failed_row(Job(text, text, text, 0, (text, "a=1")), text), "folder": "x"}
    assert row["overrides"] == [text, "a=1"]
    (line,) = csv.DictReader(io.StringIO(report.format_csv(list(row), [row]), newline=""))
    assert line["method"] == line["reason"] == text
    console = Console(width=1000, file=io.StringIO())
    console.print(build_table([row]))
    assert console.file.getvalue()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS, TEXTS)
def test_a_name_is_that_of_a_file_in_the_folder(first, second):
    name = make_file_name(first)
    other = make_file_name(second, [name])
    assert name != other
    for each in (name, other):
        assert Path(each).name == each and each not in (".", "..") and len(each.encode()) <= 220


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr("compress.reporting.plots.draw_figures", lambda rows: [])


def test_a_label_of_two_dots_removes_nothing_outside_of_tensorboard(no_figures, tmp_path):
    _, rows = make_sweep(tmp_path, "..")
    write_overlay(tmp_path, rows)
    write_overlay(tmp_path, rows)
    assert (tmp_path / "0_job" / RESULT).is_file() and (tmp_path / "tensorboard" / "-").is_dir()


def test_another_sweep_into_the_folder_replaces_the_runs(no_figures, tmp_path):
    _, rows = make_sweep(tmp_path, "prune")
    write_overlay(tmp_path, rows[1:2])
    (tmp_path / "tensorboard" / "mine").mkdir()
    assert {path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()} == {"prune", "mine"}
    write_overlay(tmp_path, rows[1:4:2])
    folders = {path.name for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()}
    assert folders == {"prune sparsity=0.2 calibration=prune0", "prune sparsity=0.5 calibration=prune1", "mine"}
    events = EventAccumulator(str(tmp_path / "tensorboard" / "prune sparsity=0.5 calibration=prune1")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [1.0]  # found though it was hidden


def test_hidden_events_are_unknown_to_tensorboard_until_they_are_revealed(tmp_path):
    with SummaryWriter(str(tmp_path / "stages" / "0")) as writer:
        writer.add_scalar("a", 1)
    names = sorted(tmp_path.rglob("events*"))
    hide_events(tmp_path)
    assert not list(GetLogdirSubdirectories(str(tmp_path)))
    reveal_events(tmp_path)
    assert sorted(tmp_path.rglob("events*")) == names


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_the_characters_shows_their_escapes(monkeypatch, tmp_path, encoding):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    report.show_table([build_failed_row(Job("漢", "tiny", "toy", 0), "10⁶ – 🤗")], tmp_path)
    terminal.flush()
    assert b"\\u6f22 failed: 10\\u2076" in terminal.buffer.getvalue()


def test_a_path_that_is_no_utf8_is_written_as_an_escape(tmp_path):
    row = {**build_failed_row(Job("prune", "tiny", "toy", 0), b"no file caf\xe9".decode(errors="surrogateescape"))}
    report.write_result(tmp_path, [row])
    assert "no file caf\\udce9" in (tmp_path / "results.md").read_text(encoding="utf-8").replace("\\\\", "\\")
    for table in (pandas.read_csv(tmp_path / "results.csv"), pandas.read_parquet(tmp_path / "results.parquet")):
        assert table["reason"][0] == "no file caf\\udce9"


def test_a_setting_with_blanks_stays_one_setting(tmp_path):
    words = ("technique.gptq.calibration={task: wikitext, path: /my data/w}", "technique.gptq.bits=4")
    row = build_failed_row(Job("gptq", "tiny", "toy", 0, words), "")
    other = build_failed_row(Job("gptq", "tiny", "toy", 0, words[1:]), "")
    assert differing_overrides([row, other]) == ["calibration={task: wikitext, path: /my data/w}", ""]
