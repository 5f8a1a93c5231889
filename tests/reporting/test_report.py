import base64
import csv
import io
import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pandas
import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from omegaconf import OmegaConf
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from torch.utils.tensorboard import SummaryWriter

from compress.artifacts.artifact import Description, Done
from compress.maths.statistics import SMALLEST_P, pareto_indices
from compress.measuring.measure import Interval, Measurement
from compress.measuring.predictions import Predictions, compare_predictions
from compress.reporting import report
from compress.reporting.budgets import find_budget_lines
from compress.reporting.card import write_card
from compress.reporting.findings import format_markdown, list_notes, recommend_rows
from compress.reporting.jobs import gather_rows
from compress.reporting.page import write_page
from compress.reporting.plots import choose_best_rows, draw_figures, spread_positions
from compress.reporting.rows import (
    Job,
    Outcome,
    build_failed_row,
    build_row,
    correct_p_values,
    drop_repeated_baselines,
    is_significant,
)
from compress.reporting.tables import (
    build_table,
    differing_overrides,
    figure_columns,
    format_figures,
    format_significance,
    format_title,
    summarise_seeds,
)
from compress.reporting.tensorboard import differing_settings, write_overlay
from compress.runtimes.timing import Spread
from compress.sweeping.callbacks import SweepReport


def measured(accuracy, size, speedup=None, same=None):
    latency = Spread(median_ms=2.0, mean_ms=2.5, p95_ms=4.0, repeats=9)
    times = (latency, 12.5, 50.0, 11, speedup, same)
    return Measurement({"accuracy": accuracy}, 100, size, 10, 8, *times, "torch", "cpu", 2)


def begin(job):
    """Write the files that Hydra writes when a job begins."""
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "config.yaml").write_text("seed: 0\n")
    (job / ".hydra" / "overrides.yaml").write_text("- technique=prune\n")
    (job / ".hydra" / "hydra.yaml").write_text(
        "hydra: {job: {config_name: train}, runtime: {config_sources: []}, overrides: {task: [technique=prune]}}\n"
    )


def answered(wrong):
    """Return predictions for a hundred examples of two labels, wrong for the first ``wrong`` examples."""
    labels = np.arange(100) % 2
    logits = np.eye(2)[np.where(np.arange(100) < wrong, 1 - labels, labels)]
    lengths, negated = np.arange(1, 101), np.arange(100) < 30
    return Predictions("multiclass", logits, labels, lengths, lengths, negated, ("bad", "good"))


BASELINE = Done("baseline", {}, 10.0, trained=True)
PRUNE = Done("prune", {}, 2.0, trained=False)
OUTCOME = Outcome(
    primary="accuracy",
    descriptions={
        "none": Description("multiclass", "tiny", "toy", history=(BASELINE,)),
        "prune": Description("multiclass", "tiny", "toy", limits=("prune: no speed",), history=(BASELINE, PRUNE)),
    },
    measurements={"none": measured(0.9, 4_000_000), "prune": measured(0.88, 1_000_000, Interval(1.5, 1.4, 1.6))},
    predictions={"none": answered(10), "prune": answered(12)},
)
WORSE = replace(
    OUTCOME,
    measurements={
        "none": OUTCOME.measurements["none"],
        "prune": replace(
            measured(0.8, 2_000_000, Interval(1.2, 1.1, 1.3)),
            comparison=compare_predictions(answered(10), answered(20), "accuracy"),
        ),
    },
    predictions={"none": answered(10), "prune": answered(20)},
)
JOB = Job("prune", "tiny", "toy", 0)


def read(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_starts_with_the_columns_that_people_compare(tmp_path):
    report.report_success(tmp_path, JOB, OUTCOME)
    assert (tmp_path / "results.csv").read_text().startswith("method,size_mb,latency_ms,accuracy,training_time_s,")
    none, prune = read(tmp_path)
    assert (none["method"], none["size_mb"], none["accuracy"], none["speedup"]) == ("none", "4.0", "0.9", "")
    assert (prune["method"], prune["training_time_s"], prune["compression_time_s"]) == ("prune", "10.0", "2.0")
    assert (prune["compression_ratio"], prune["speedup"], float(prune["change"])) == ("4.0", "1.5", 0.88 - 0.9)


def test_markdown_shows_the_rows_and_what_they_cannot_do(tmp_path):
    report.report_success(tmp_path, JOB, OUTCOME)
    text = (tmp_path / "results.md").read_text()
    assert "| prune  |   0.8800 | -2.00 pt | 1.00 |   4.00x | 2.00 | 1.50x [1.40, 1.60] |" in text
    assert "100 test examples, cpu, 2 threads" in text and "- prune: no speed" in text


def test_for_another_runtime_the_table_shows_the_effect_of_compression_alone(tmp_path):
    there = measured(0.88, 1_000_000, Interval(4.5, 4.4, 4.6), Interval(1.5, 1.4, 1.6))
    outcome = replace(OUTCOME, measurements={**OUTCOME.measurements, "prune": there})
    report.report_success(tmp_path, JOB, outcome)
    text = (tmp_path / "results.md").read_text()
    assert "4.50x [4.40, 4.60]" in text and "1.50x [1.40, 1.60] |" in text
    assert "- in its runtime: faster than the baseline exported to the same runtime" in text
    assert [row["speedup_same_runtime"] for row in read(tmp_path)] == ["", "1.5"]
    report.report_success(tmp_path, JOB, OUTCOME)
    assert "in its runtime" not in (tmp_path / "results.md").read_text()


def test_perplexity_is_no_fraction():
    row = {**build_row(JOB, "prune", OUTCOME), "metric": "perplexity", "value": 5.5, "change": 0.25}
    figures = format_figures(row)
    assert (figures["value"], figures["change"]) == ("5.500", "+0.250")


def drawn(rows, width):
    """Return the headings of a terminal's table, after checking that nothing is cut off."""
    console = Console(width=width, file=io.StringIO())
    table = build_table(rows, width)
    console.print(table)
    lines = [line for line in console.file.getvalue().splitlines() if line[0] in "┃│"]
    cells = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines]
    shown = ["".join(column) for column in zip(*cells)]
    expected = [str(column.header) + "".join(map(str, column.cells)) for column in table.columns]
    assert [text.replace(" ", "") for text in shown] == [re.sub(r"\s", "", text) for text in expected]
    assert max(map(len, console.file.getvalue().splitlines())) <= width
    return [str(column.header).replace("\n", " ") for column in table.columns]


def test_in_a_narrow_terminal_columns_are_dropped_and_nothing_is_cut_off():
    there = replace(OUTCOME.measurements["prune"], parameters=7, speedup_same_runtime=Interval(11.5, 11.4, 11.6))
    outcome = replace(OUTCOME, measurements={**OUTCOME.measurements, "prune": there})
    settings = [("a=1", "technique.prune.sparsity=0.2"), ("a=1", "technique.prune.calibration=" + "x" * 90)]
    jobs = [Job("prune+distill+openvino", f"model_{i}", "toy", i, words) for i, words in enumerate(settings)]
    rows = [build_row(job, name, outcome) for job in jobs for name in outcome.measurements]
    assert drawn(rows[:2], 150) == [
        "method", "accuracy", "change", "parameters", "MB", "smaller", "ms", "faster [95%]", "in its runtime [95%]",
        "texts/s", "train s", "compress s",
    ]  # fmt: skip
    assert drawn(rows[:2], 120)[-2:] == ["faster [95%]", "in its runtime [95%]"]
    narrower = ["method", "accuracy", "change", "MB", "smaller", "faster [95%]", "in its runtime [95%]"]
    assert drawn(rows[:2], 100) == narrower
    assert drawn(rows[:2], 80) == narrower[:-1]
    assert drawn([*rows, build_failed_row(JOB, "no")], 100)[:4] == ["method", "model", "seed", "settings"]
    assert drawn(rows, 80) == ["method", "model", "seed", "settings", "accuracy", "change"]


def test_a_model_slower_than_a_text_a_second_has_a_rate(tmp_path):
    slow = {name: replace(one, throughput_per_s=0.131) for name, one in OUTCOME.measurements.items()}
    rows = [build_row(JOB, name, replace(OUTCOME, measurements=slow)) for name in slow]
    assert figure_columns(rows)["texts/s"] == ["0.13", "0.13"]
    assert read_cells(write_page(tmp_path, rows), "throughput_per_s") == ["0.13", "0.13"]


def test_against_another_teacher_the_table_says_how_far_the_student_is_from_it(tmp_path):
    none, prune = OUTCOME.measurements.values()
    outcome = replace(
        OUTCOME,
        descriptions={**OUTCOME.descriptions, "teacher": OUTCOME.descriptions["none"]},
        measurements={"none": none, "teacher": measured(0.93, 9_000_000, Interval(0.5, 0.4, 0.6)), "prune": prune},
    )
    report.report_success(tmp_path, JOB, outcome)
    assert [row["against_teacher"][:5] for row in read(tmp_path)] == ["", "", "-0.05"]
    table = format_markdown([build_row(JOB, "prune", outcome)], [])
    assert "| to teacher |" in (tmp_path / "results.md").read_text() and "-5.00 pt" in table
    assert "to teacher" not in figure_columns([build_row(JOB, "prune", OUTCOME)])


def test_a_failed_job_is_in_the_table_with_its_reason(tmp_path):
    report.report_failure(tmp_path, JOB, "no such thing")
    assert (tmp_path / "results.csv").read_text().startswith("method,size_mb,latency_ms,accuracy,training_time_s,")
    (row,) = read(tmp_path)
    assert (row["method"], row["status"], row["reason"]) == ("prune", "failed", "no such thing")
    assert "prune failed: no such thing" in (tmp_path / "results.md").read_text()


def rows(baseline, *overrides, seed=0):
    job = Job("prune", "tiny", "toy", seed, overrides)
    return [build_row(job, name, replace(OUTCOME, baseline=baseline)) for name in OUTCOME.measurements]


def test_a_sweep_keeps_one_measurement_of_each_baseline_and_every_other_row():
    many = rows("a", "technique.prune.sparsity=0.2") + rows("a", "technique.prune.sparsity=0.5")
    kept = drop_repeated_baselines(many + rows("b", seed=1) + rows("b", seed=1))
    assert [(r["method"], r["overrides"], r["seed"]) for r in kept] == [
        ("none", [], 0),
        ("prune", ["technique.prune.sparsity=0.2"], 0),
        ("prune", ["technique.prune.sparsity=0.5"], 0),
        ("none", [], 1),
        ("prune", [], 1),
        ("prune", [], 1),
    ]


def test_the_table_names_the_settings_that_rows_do_not_share():
    shared = ("model.path=somewhere", "technique.prune.scope=layer")
    many = rows("a", "technique.prune.sparsity=0.2", *shared) + rows("a", "technique.prune.sparsity=0.5", *shared)
    kept = drop_repeated_baselines(many)
    assert differing_overrides(kept) == ["", "sparsity=0.2", "sparsity=0.5"]
    assert differing_overrides(kept[:1]) == [""]
    assert [column.header for column in build_table(kept).columns][:2] == ["method", "settings"]
    assert build_table(rows("a", *shared)).columns[1].header != "settings"


def test_a_note_says_which_rows_read_the_timed_texts_as_more_tokens():
    none, prune = rows("a")
    more = {**prune, "method": "prune_vocab", "latency_tokens": none["latency_tokens"] + 3}
    same, longer = f"{none['latency_tokens']:.0f} tokens", f"{more['latency_tokens']:.0f} with prune_vocab"
    (note,) = (note for note in list_notes([none, prune, more]) if "ms:" in note)
    assert note.startswith(f"ms: one text of {same} ({longer}) on average; texts/s")
    several = [note for note in list_notes([none, prune, {**more, "task": "other"}]) if "ms:" in note]
    assert [note.partition("ms:")[0] for note in several] == ["tiny on toy: ", "tiny on other: "]


def test_a_killed_job_is_identified_by_its_settings(tmp_path):
    begin(tmp_path / "0_job")
    config = "technique: {name: prune}\nmodel: {name: bert}\ntask: {name: sst2}\nseed: 3\n"
    (tmp_path / "0_job" / ".hydra" / "config.yaml").write_text(config)
    (tmp_path / "0_job" / ".hydra" / "overrides.yaml").write_text("- technique=prune\n- task.epochs=1\n")
    (lost,) = gather_rows(tmp_path)
    assert [lost[key] for key in ("method", "model", "task", "seed", "overrides")] == [
        "prune", "bert", "sst2", 3, ["task.epochs=1"]
    ]  # fmt: skip
    assert lost["reason"].startswith("it left no result; its process was probably killed (out of memory?)")


def test_the_cost_of_measuring_and_the_worst_slice_are_reported(tmp_path):
    took = {name: replace(measurement, measuring_time_s=3.0) for name, measurement in WORSE.measurements.items()}
    report.report_success(tmp_path, JOB, replace(WORSE, measurements=took))
    none, prune = read(tmp_path)
    assert (none["run_time_s"], prune["run_time_s"], prune["worst_slice"]) == ("13.0", "15.0", "with negation")
    assert float(prune["worst_slice_change"]) == pytest.approx(-1 / 3) and not none["worst_slice"]
    text = (tmp_path / "results.md").read_text()
    assert "measuring took up to 20% of the time of a run" in text and "hardware.latency sets its budget" in text
    assert (
        "worst slice of the test split: with negation, -33.3 points with prune (significant among its slices)" in text
    )


def test_a_failed_baseline_is_not_dropped_as_repeated():
    failure = build_failed_row(Job("none", "tiny", "toy", 0), "out of memory")
    kept = drop_repeated_baselines([*rows("a"), failure])
    assert [(r["method"], r["status"]) for r in kept] == [
        ("none", "completed"),
        ("prune", "completed"),
        ("none", "failed"),
    ]


def sweep(folder, *jobs):
    (folder / "multirun.yaml").write_text("")
    for number, job in enumerate(jobs):
        begin(folder / f"{number}_job")
        if job:
            report.write_result(folder / f"{number}_job", job)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    SweepReport().on_multirun_end(config)


def test_a_sweep_writes_one_table(tmp_path, capsys):
    sweep(tmp_path, rows("a"), rows("a"))
    assert [row["method"] for row in read(tmp_path)] == ["none", "prune", "prune"]
    assert "100 test examples" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [None, [build_failed_row(JOB, "no such thing")]])
def test_a_sweep_with_a_failed_or_killed_job_exits_with_1(tmp_path, lost):
    with pytest.raises(SystemExit) as exit:
        sweep(tmp_path, rows("a"), lost)
    assert exit.value.code == 1
    assert [row["status"] for row in read(tmp_path)] == ["completed", "completed", "failed"]


def test_a_report_that_cannot_be_written_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.sweeping.callbacks.publish_report", lambda *args: 1 / 0)
    with pytest.raises(SystemExit):
        sweep(tmp_path, rows("a"))


def test_a_note_names_rows_that_are_slower_than_floats_in_their_runtime():
    fast, slow = ({**row, "method": name, "speedup_same_runtime": 1.0, "speedup_same_runtime_high": high}
                  for row, name, high in zip(rows("a"), ("onnx", "openvino"), (1.1, 0.8)))  # fmt: skip
    (note,) = [note for note in list_notes([fast, slow]) if "slower on this processor" in note]
    assert note.startswith("openvino: ") and "precision=fp32" in note


def test_a_note_tells_rows_of_several_devices_apart():
    here, there = rows("a"), [{**row, "device": "AMD EPYC (AVX2)"} for row in rows("b")]
    assert not [note for note in list_notes(here) if "several devices" in note]
    (note,) = [note for note in list_notes(here + there) if "several devices" in note]
    assert "cpu, 2 threads: " in note and "AMD EPYC (AVX2), 2 threads: " in note


def test_the_title_names_only_facts_that_all_rows_share():
    some, others = rows("a"), [{**row, "examples": 7} for row in rows("b")]
    assert format_title(some) == "tiny on toy: 100 test examples, cpu, 2 threads"
    assert format_title(some + others) == "tiny on toy"


def test_tensorboard_has_the_figures_and_no_false_point(tmp_path):
    report.report_success(tmp_path, JOB, OUTCOME)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("final/size_mb")] == [1.0]
    assert metadata.SESSION_END_INFO_TAG in events.PluginTagToContent("hparams")
    content = events.PluginTagToContent("hparams")[metadata.SESSION_END_INFO_TAG]
    assert metadata.parse_session_end_info_plugin_data(content).status == 1  # success


def test_tensorboard_marks_a_failed_run(tmp_path):
    report.report_failure(tmp_path, JOB, "no such thing")
    content = EventAccumulator(str(tmp_path / "tensorboard")).Reload().PluginTagToContent("hparams")
    assert metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG]).status == 2  # failure


def test_a_sweep_in_tensorboard_has_short_names_and_charts_over_all_of_it(tmp_path):
    for number, sparsity in enumerate((0.2, 0.5)):
        begin(tmp_path / f"{number}_job")
        job = Job("prune", "tiny", "toy", 0, (f"technique.prune.sparsity={sparsity}", "task.epochs=1"))
        report.report_success(tmp_path / f"{number}_job", job, replace(OUTCOME, baseline="a"))
        for stage, tag in (("0_baseline", "train/loss"), ("1_prune", "train/loss"), ("2_gptq", "hp_metric")):
            with SummaryWriter(str(tmp_path / f"{number}_job" / "tensorboard" / stage)) as writer:
                writer.add_scalar(tag, number)
    begin(tmp_path / "2_job")
    rows = drop_repeated_baselines(gather_rows(tmp_path))
    write_overlay(tmp_path, rows)
    folder = tmp_path / "tensorboard"
    # A run for each row with its own training: once for the baseline, none if nothing was trained.
    runs = {str(path.parent.relative_to(folder)) for path in folder.rglob("events*")}
    assert runs == {".", "none", "prune sparsity=0.2", "prune sparsity=0.5", "2_job"}
    events = EventAccumulator(str(folder / "prune sparsity=0.5")).Reload()
    assert {event.value for event in events.Scalars("train/loss")} == {1.0} and events.Scalars("final/size_mb")
    whole = EventAccumulator(str(folder)).Reload()
    (layout,) = whole.Tensors("custom_scalars__config__")
    charts = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    assert [chart.title for chart in charts.category] == ["final", "training"]
    assert "report/accuracy against size" in whole.Tags()["images"]
    assert differing_settings(rows)[1:3] == [{"method": "prune", "prune.sparsity": x} for x in (0.2, 0.5)]
    content = EventAccumulator(str(folder / "2_job")).Reload().PluginTagToContent("hparams")
    assert metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG]).status == 2  # failure


def many(folder):
    """Return the baseline and twenty rows, one of them failed."""
    for number in range(19):
        begin(folder / f"{number}_job")
        job = Job("prune", "tiny", "toy", 0, (f"technique.prune.sparsity={number / 20}",))
        pruned = replace(WORSE.measurements["prune"], size_bytes=(7 * number % 19 + 1) * 100_000)
        outcome = replace(WORSE, measurements={**WORSE.measurements, "prune": pruned})
        report.report_success(
            folder / f"{number}_job", job, replace(outcome, baseline="a", data="fingerprint-of-the-data")
        )
    begin(folder / "19_job")
    report.report_failure(folder / "19_job", JOB, "<no such> thing")
    return correct_p_values(drop_repeated_baselines(gather_rows(folder)))


def read_sweep(page):
    """Return what the scripts of a page show."""
    (text,) = re.findall(r'<script id="sweep" type="application/json">(.*)</script>', page.read_text(encoding="utf-8"))
    return json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON, so that a browser could not read it


def read_cells(page, key):
    sweep = read_sweep(page)
    (at,) = (at for at, column in enumerate(sweep["columns"]) if column["key"] == key)
    return [row["cells"][at] for row in sweep["rows"]]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.outside, self.pictures, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.pictures.append(attributes["alt"])
        self.outside += [v for k, v in attributes.items() if k in ("src", "href") and not v.startswith("data:")]


def test_the_page_has_everything_and_needs_no_network(tmp_path):
    path = write_page(tmp_path, many(tmp_path))
    text, sweep = path.read_text(), read_sweep(path)
    page = Page(text)
    assert not page.outside
    assert page.pictures == [
        "accuracy against latency",
        "accuracy against size",
        "latency, with accuracy in the bars",
        "change by slice of the test split, in points",
        "against prune.sparsity",
    ]
    assert [row["number"] for row in sweep["rows"]] == list(range(1, 22))
    *_, pruned, failed = (row["details"] for row in sweep["rows"])
    assert failed["reason"] == "<no such> thing" and "<no such>" not in text
    assert pruned["data"] == "fingerprint-of-the-data" and pruned["command"].endswith(" technique=prune")
    assert pruned["config"] == "seed: 0\n" and pruned["limits"] == ["prune: no speed"]
    assert pruned["answers"]["changed"] == 10 and pruned["slices"][0]["name"] == "with negation"
    for said in ("torch", "smallest within 1 point of the baseline: none is smaller"):
        assert said in text
    assert re.fullmatch(
        r"-10\.00 \[-1[56]\.\d\d, -[34]\.\d\d\]\*", read_cells(path, "change")[1]
    )  # 1.98 times 3 points
    images = [base64.b64decode(uri).decode() for uri in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)', text)]
    assert len(images) == 5 and all(image.rstrip().endswith("</svg>") for image in images)


def test_of_many_rows_a_static_plot_shows_the_best(tmp_path):
    rows = many(tmp_path)[:20]
    more = [{**row, "size_mb": row["size_mb"] + number} for number in range(3) for row in rows[1:]]
    assert [title for title, _ in draw_figures(rows[:1] + more)][1].startswith("the best ")
    sizes = {row["size_mb"] for row in choose_best_rows(rows[:1] + more)}
    assert min(row["size_mb"] for row in more) in sizes and len(sizes) < 10


def test_every_point_that_no_other_beats_is_on_the_front():
    assert pareto_indices([3, 1, 2, 2, 4], [0.9, 0.5, 0.7, 0.6, 0.8]) == [1, 2, 0]


def test_names_beside_a_plot_do_not_overlap():
    moved = spread_positions([0.5, 0.5, 0.51, 1.0, 0.99], 0.1)
    assert sorted(moved) == pytest.approx([0.5, 0.6, 0.7, 0.9, 1.0]) and moved[4] < moved[3]


def test_parquet_is_the_same_table(tmp_path):
    report.report_success(tmp_path, JOB, WORSE)
    table = pandas.read_parquet(tmp_path / "results.parquet")
    assert list(table.columns) == list(read(tmp_path)[0]) and table["size_mb"].tolist() == [4.0, 2.0]
    assert table["churn"][1] == 0.1 and table["change_high"][1] < 0
    assert json.loads((tmp_path / "result.json").read_text())["environment"]["python"]


def test_significance_allows_for_the_number_of_comparisons():
    rows = [{"p_value": p} for p in (0.03, 0.001, None)]
    assert [row.get("p_holm") for row in correct_p_values(rows)] == pytest.approx([0.03, 0.002, None])
    assert is_significant({"p_holm": 0.03}) and not is_significant({"p_holm": None})


def test_recommendations_stay_within_a_point_and_say_how_sure_they_are():
    near, far = (build_row(JOB, "prune", outcome) for outcome in (OUTCOME, WORSE))
    none = build_row(JOB, "none", OUTCOME)
    assert all(line.endswith("none is smaller") or line.endswith("none is faster")
               for line in recommend_rows([none, far, near]))  # fmt: skip
    near = {**near, "change": -0.01, "change_low": -0.02, "change_high": 0.0, "p_value": 0.5}
    smallest, fastest = recommend_rows([none, far, near])
    assert smallest.endswith("1.00 MB, 4.00x smaller, accuracy -1.00 pt [-2.00, +0.00], not significant (p = 0.5)")
    assert "1.50x [1.40, 1.60] faster" in fastest


def test_seeds_become_a_mean_with_an_interval():
    rows = [{**row, "change": row["change"] - 0.01 * seed} for seed in (0, 1, 2) for row in rows_of_seed(seed)]
    none, prune = summarise_seeds(rows)
    assert none.change is None and (prune.seeds, prune.label) == (3, "prune (tiny on toy)")
    assert prune.change.value == pytest.approx(-0.03) and prune.change.low < -0.05 < -0.01 < prune.change.high


def rows_of_seed(seed):
    return [build_row(Job("prune", "tiny", "toy", seed), name, OUTCOME) for name in OUTCOME.measurements]


def test_each_seed_counts_once_however_many_rows_it_has():
    rows = [{**row, "value": value} for seed, value in ((0, 0.8), (1, 0.82)) for row in rows_of_seed(seed)]
    prune = summarise_seeds(rows)[1]
    assert summarise_seeds([*rows, *rows])[1] == prune
    half = 12.706 * 0.01  # Student's t of one degree of freedom
    assert prune.seeds == 2 and (prune.value.low, prune.value.high) == pytest.approx(
        (0.81 - half, 0.81 + half), abs=1e-4
    )


def undefined():
    """Return the rows of a job whose metric is undefined for the pruned model, with its comparison."""
    labels = np.ones(100, int)
    one_class = [replace(answered(wrong), labels=labels) for wrong in (10, 12)]
    comparison = compare_predictions(*one_class, "roc_auc")
    pruned = replace(OUTCOME.measurements["prune"], quality={"roc_auc": math.nan}, comparison=comparison)
    none = replace(OUTCOME.measurements["none"], quality={"roc_auc": 0.9})
    outcome = replace(OUTCOME, primary="roc_auc", measurements={"none": none, "prune": pruned}, predictions={})
    return outcome, [build_row(JOB, name, outcome) for name in outcome.measurements]


def test_an_undefined_metric_has_no_star_and_the_other_rows_are_reported(tmp_path):
    outcome, (none, prune) = undefined()
    better = {**prune, "method": "gptq", "value": 0.8, "change": -0.1, "change_low": -0.2, "change_high": 0.0,
              "p_value": 0.001}  # fmt: skip
    rows = report.publish_report(tmp_path, [none, prune, better])
    assert [row.get("p_holm") for row in rows] == [None, None, 0.001] and not is_significant(rows[1])
    assert (prune["p_value"], prune["change_low"], prune["change_high"]) == (None, None, None)
    figures = format_figures(rows[1])
    assert (figures["value"], figures["change"]) == ("undefined", "undefined")
    notes = "\n".join(list_notes(rows))
    assert "roc_auc of prune is undefined on the test split" in notes and "*: p < 0.05" in notes
    page = tmp_path / "report.html"
    assert read_cells(page, "value")[1] == "undefined" and "roc_auc against size" in page.read_text()
    assert "roc_auc" not in read_sweep(page)["rows"][1]["points"]
    assert "prune, " not in "".join(recommend_rows(rows))
    write_overlay(tmp_path, [{**row, "folder": str(tmp_path)} for row in rows])
    (tmp_path / "config.json").write_text("{}")
    write_card(tmp_path, outcome, "prune")
    assert "nan" not in (tmp_path / "README.md").read_text()
    alone = report.write_report(tmp_path, [{**none, "value": math.nan, "change": math.nan}, prune])
    assert not any(map(is_significant, alone))


def test_p_values_below_what_is_resolved_are_shown_as_a_bound(tmp_path):
    none, prune = (build_row(JOB, name, WORSE) for name in OUTCOME.measurements)
    rows = [none, *({**prune, "p_value": p, "overrides": f"a={p}"} for p in (SMALLEST_P, 0.5))]
    bound, other = report.write_report(tmp_path, rows)[1:]
    assert "significant (p < 2e-06)" in format_significance(bound, "x") and "(p = 0.5)" in format_significance(
        other, "x"
    )
    assert read_cells(tmp_path / "report.html", "p_holm")[1] == "< 2e-06"


def test_the_card_reports_the_figures_to_the_hub(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_card(tmp_path, OUTCOME, "prune")
    found = ModelCard.load(tmp_path / "README.md")
    (index,) = metadata_load(tmp_path / "README.md")["model-index"]
    assert model_index_to_eval_results([index]) == ("tiny-toy-prune", found.data.eval_results)
    assert found.data.base_model is None and found.data.datasets is None  # neither is on the hub
    (result,) = found.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.88, "toy")
    assert found.data.pipeline_tag == "text-classification" and found.data.model_name == "tiny-toy-prune"
    assert "## Limits\n\n- prune: no speed" in found.text and "One text: 2.00 ms (p95 4.00" in found.text


@pytest.mark.parametrize("path", ["null", "data"])
def test_the_card_names_the_model_and_the_data_of_the_hub(tmp_path, path):
    (tmp_path / "config.json").write_text("{}")
    hub = "{id: nyu-mll/glue, config: sst2, train: train, test: validation}"
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: sentence-transformers/all-MiniLM-L6-v2}}\ntask: {{hub: {hub}, path: {path}}}\n"
    )
    write_card(tmp_path, OUTCOME, "prune")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    (result,) = data.eval_results
    theirs = ("nyu-mll/glue", "sst2", "validation") if path == "null" else ("toy", None, "test")
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == theirs
    assert data.datasets == (["nyu-mll/glue"] if path == "null" else None)


@pytest.mark.parametrize("typed, drop", [(["search=size"], 1.0), (["search=latency", "search.max_drop=0.5"], 0.5)])
def test_the_loss_that_a_search_allowed_is_a_line_of_the_plot(tmp_path, typed, drop):
    rows = rows_of_seed(0)
    assert find_budget_lines(tmp_path, rows) == []
    record = {"job": {"config_name": "train"}, "runtime": {"config_sources": []}, "overrides": {"task": typed}}
    OmegaConf.save({"hydra": record}, tmp_path / "multirun.yaml")
    quality, change = find_budget_lines(tmp_path, rows)
    assert (quality.axis, quality.value) == ("accuracy", pytest.approx(0.9 - drop / 100))
    assert (change.axis, change.value, change.label) == ("change", -drop, f"search.max_drop={drop:g}")


@pytest.mark.parametrize(
    "target, line",
    [
        ({"latency": 0.25, "for": "onnxruntime"}, ("speedup_same_runtime", 4.0)),
        ({"latency": 0.5}, ("speedup", 2.0)),
        ({"size_mb": 1.5}, ("size_mb", 1.5)),
        ({"parameters": 0.5}, ("parameters", 5.0)),
        ({"macs": 3e6}, ("mmacs", 3.0)),
    ],
)
def test_the_target_of_a_stage_is_a_line_of_the_plot(tmp_path, target, line):
    (tmp_path / "artifact").mkdir()
    stages = [asdict(BASELINE), asdict(Done("structured", {"target": target}, 1.0, trained=False))]
    (tmp_path / "artifact" / "compress.json").write_text(json.dumps({"history": stages}))
    (budget,) = find_budget_lines(tmp_path, [{**row, "folder": str(tmp_path)} for row in rows_of_seed(0)])
    assert (budget.axis, budget.value) == line
