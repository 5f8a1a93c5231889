import csv
from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from compress import report
from compress.artifact import Description, Done
from compress.measure import Interval, Measurement, Spread
from compress.report import Job, Outcome


def measured(accuracy, size, speedup=None, same=None):
    latency = Spread(median_ms=2.0, mean_ms=2.5, p95_ms=4.0, repeats=9)
    times = (latency, 12.5, 50.0, 11, speedup, same)
    return Measurement({"accuracy": accuracy}, 100, size, 10, 8, *times, "torch", "cpu", 2)


BASELINE = Done("baseline", {}, 10.0, trained=True)
PRUNE = Done("prune", {}, 2.0, trained=False)
OUTCOME = Outcome(
    primary="accuracy",
    descriptions={
        "none": Description("multiclass", "tiny", "toy", history=(BASELINE,)),
        "prune": Description("multiclass", "tiny", "toy", limits=("prune: no speed",), history=(BASELINE, PRUNE)),
    },
    measurements={"none": measured(0.9, 4_000_000), "prune": measured(0.88, 1_000_000, Interval(1.5, 1.4, 1.6))},
)
JOB = Job("prune", "tiny", "toy", 0)


def read(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_starts_with_the_columns_that_people_compare(tmp_path):
    report.finish(tmp_path, JOB, OUTCOME)
    assert (tmp_path / "results.csv").read_text().startswith("method,size_mb,latency_ms,accuracy,training_time_s,")
    none, prune = read(tmp_path)
    assert (none["method"], none["size_mb"], none["accuracy"], none["speedup"]) == ("none", "4.0", "0.9", "")
    assert (prune["method"], prune["training_time_s"], prune["compression_time_s"]) == ("prune", "10.0", "2.0")
    assert (prune["compression_ratio"], prune["speedup"], float(prune["change"])) == ("4.0", "1.5", 0.88 - 0.9)


def test_markdown_shows_the_rows_and_what_they_cannot_do(tmp_path):
    report.finish(tmp_path, JOB, OUTCOME)
    text = (tmp_path / "results.md").read_text()
    assert "| prune  |   0.8800 | -2.00 pt | 1.00 |   4.00x | 2.00 | 1.50x [1.40, 1.60] |" in text
    assert "100 test examples, cpu, 2 threads" in text and "- prune: no speed" in text


def test_of_another_runtime_the_table_shows_what_compression_is_worth_there(tmp_path):
    there = measured(0.88, 1_000_000, Interval(4.5, 4.4, 4.6), Interval(1.5, 1.4, 1.6))
    outcome = replace(OUTCOME, measurements={**OUTCOME.measurements, "prune": there})
    report.finish(tmp_path, JOB, outcome)
    text = (tmp_path / "results.md").read_text()
    assert "4.50x [4.40, 4.60]" in text and "1.50x [1.40, 1.60] |" in text
    assert "- in its runtime: faster than the baseline exported to the same runtime" in text
    assert [row["speedup_same_runtime"] for row in read(tmp_path)] == ["", "1.5"]
    report.finish(tmp_path, JOB, OUTCOME)
    assert "in its runtime" not in (tmp_path / "results.md").read_text()


def test_perplexity_is_no_fraction():
    row = {**report.row(JOB, "prune", OUTCOME), "metric": "perplexity", "value": 5.5, "change": 0.25}
    assert report.drawn_figures(row)[:2] == ["5.500", "+0.250"]


def test_a_narrow_terminal_gets_fewer_columns_and_no_cut_ones():
    rows = [report.row(JOB, name, OUTCOME) for name in OUTCOME.measurements]
    assert len(report.table(rows, narrow=True).columns) < len(report.table(rows).columns)


def test_a_failed_job_is_in_the_table_with_its_reason(tmp_path):
    report.fail(tmp_path, JOB, "no such thing")
    assert (tmp_path / "results.csv").read_text().startswith("method,size_mb,latency_ms,accuracy,training_time_s,")
    (row,) = read(tmp_path)
    assert (row["method"], row["status"], row["reason"]) == ("prune", "failed", "no such thing")
    assert "prune failed: no such thing" in (tmp_path / "results.md").read_text()


def rows(baseline, *overrides, seed=0):
    job = Job("prune", "tiny", "toy", seed, overrides)
    return [report.row(job, name, replace(OUTCOME, baseline=baseline)) for name in OUTCOME.measurements]


def test_a_sweep_keeps_one_measurement_of_each_baseline_and_every_other_row():
    many = rows("a", "technique.prune.sparsity=0.2") + rows("a", "technique.prune.sparsity=0.5")
    kept = report.without_repeated_baselines(many + rows("b", seed=1) + rows("b", seed=1))
    assert [(r["method"], r["overrides"], r["seed"]) for r in kept] == [
        ("none", "", 0),
        ("prune", "technique.prune.sparsity=0.2", 0),
        ("prune", "technique.prune.sparsity=0.5", 0),
        ("none", "", 1),
        ("prune", "", 1),
        ("prune", "", 1),
    ]


def test_the_table_tells_rows_apart_by_the_settings_that_they_do_not_share():
    shared = ("model.path=somewhere", "technique.prune.scope=layer")
    many = rows("a", "technique.prune.sparsity=0.2", *shared) + rows("a", "technique.prune.sparsity=0.5", *shared)
    kept = report.without_repeated_baselines(many)
    assert report.apart(kept) == ["", "sparsity=0.2", "sparsity=0.5"]
    assert [column.header for column in report.table(kept).columns][:2] == ["method", "settings"]
    assert report.table(rows("a", *shared)).columns[1].header != "settings"


def test_a_failed_baseline_is_no_repeated_one():
    failure = report.failed(Job("none", "tiny", "toy", 0), "out of memory")
    kept = report.without_repeated_baselines([*rows("a"), failure])
    assert [(r["method"], r["status"]) for r in kept] == [
        ("none", "completed"),
        ("prune", "completed"),
        ("none", "failed"),
    ]


def sweep(folder, *jobs):
    for number, job in enumerate(jobs):
        (folder / f"{number}_job" / ".hydra").mkdir(parents=True)
        if job:
            report.conclude(folder / f"{number}_job", job)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    report.SweepReport().on_multirun_end(config)


def test_a_sweep_writes_one_table(tmp_path, capsys):
    sweep(tmp_path, rows("a"), rows("a"))
    assert [row["method"] for row in read(tmp_path)] == ["none", "prune", "prune"]
    assert "100 test examples" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [None, [report.failed(JOB, "no such thing")]])
def test_a_sweep_with_a_failed_or_killed_job_exits_with_1(tmp_path, lost):
    with pytest.raises(SystemExit) as exit:
        sweep(tmp_path, rows("a"), lost)
    assert exit.value.code == 1
    assert [row["status"] for row in read(tmp_path)] == ["completed", "completed", "failed"]


def test_a_report_that_cannot_be_written_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "publish", lambda *args: 1 / 0)
    with pytest.raises(SystemExit):
        sweep(tmp_path, rows("a"))


def test_the_title_tells_only_what_all_rows_share():
    one, other = rows("a"), [{**row, "examples": 7} for row in rows("b")]
    assert report.title(one) == "tiny on toy: 100 test examples, cpu, 2 threads"
    assert report.title(one + other) == "tiny on toy"


def test_tensorboard_has_the_figures_and_no_false_point(tmp_path):
    report.finish(tmp_path, JOB, OUTCOME)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("final/size_mb")] == [1.0]
    assert metadata.SESSION_END_INFO_TAG in events.PluginTagToContent("hparams")
    content = events.PluginTagToContent("hparams")[metadata.SESSION_END_INFO_TAG]
    assert metadata.parse_session_end_info_plugin_data(content).status == 1  # success


def test_tensorboard_marks_a_failed_run(tmp_path):
    report.fail(tmp_path, JOB, "no such thing")
    content = EventAccumulator(str(tmp_path / "tensorboard")).Reload().PluginTagToContent("hparams")
    assert metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG]).status == 2  # failure
