import itertools

import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import OUTCOME, begin

from compress.reporting.curves import draw_curves, numeric_settings
from compress.reporting.report import report_success
from compress.reporting.rows import Job, build_failed_row
from compress.sweeping.callbacks import SweepReport


def row(*overrides, method="structured", value=0.8, size=2.0, **other):
    fixed = {"model": "tiny", "task": "toy", "metric": "accuracy", "seed": 0, "status": "completed"}
    return {**fixed, "method": method, "overrides": list(overrides), "value": value, "size_mb": size, **other}


BASELINE = row("experiment=grid", method="none", value=0.9, size=4.0)
GRID = [
    row("experiment=grid", f"technique.structured.heads={heads}", f"technique.structured.ffn={ffn}", value=heads / ffn)
    for heads, ffn in itertools.product((8, 2, 12, 4), (1024, 256))
]


def drawn(axis):
    """Return the lines of a panel without the baseline's dashed line."""
    return [line for line in axis.lines if line.get_linestyle() == "-"]


def test_settings_are_the_numbers_among_those_of_stages():
    words = "+technique.prune.sparsity=5e-1 technique.prune.scope=layer technique.gptq.bits=4 seed=1 task.epochs=3"
    assert numeric_settings(row(*words.split())) == {"prune.sparsity": 0.5, "gptq.bits": 4.0}
    assert numeric_settings(row("technique.a.x=nan", "technique.a.y=[1,2]", "technique.a.z=true")) == {}


def test_a_grid_leaves_a_figure_for_each_of_its_settings_with_a_line_for_each_value_of_the_other():
    figures = draw_curves([BASELINE, *GRID])
    assert list(figures) == ["structured.heads", "structured.ffn"]
    heads = figures["structured.heads"]
    top, bottom = heads.axes
    assert [line.get_xydata().tolist() for line in drawn(top)] == [
        [[2, 2 / 256], [4, 4 / 256], [8, 8 / 256], [12, 12 / 256]],
        [[2, 2 / 1024], [4, 4 / 1024], [8, 8 / 1024], [12, 12 / 1024]],
    ]
    assert len(drawn(bottom)) == 2 and len(drawn(figures["structured.ffn"].axes[0])) == 4
    assert (top.get_ylabel(), bottom.get_ylabel(), bottom.get_xlabel()) == ("accuracy", "size, MB", "structured.heads")
    (legend,) = heads.legends
    assert [text.get_text() for text in legend.get_texts()] == ["256", "1024", "baseline"]
    assert legend.get_title().get_text() == "structured.ffn"
    assert [tick.get_text() for tick in bottom.get_xticklabels()] == ["2", "4", "8", "12"]


def test_the_baseline_is_a_dashed_line_in_both_panels():
    for axis, value in zip(draw_curves([BASELINE, *GRID])["structured.heads"].axes, (0.9, 4.0)):
        assert [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"] == [value]


def test_a_setting_of_one_value_words_and_failed_rows_leave_no_figure():
    first = row("technique.prune.sparsity=0.5", "technique.prune.scope=layer")
    second = row("technique.prune.sparsity=0.5", "technique.prune.scope=global")
    lost = build_failed_row(Job("prune", "tiny", "toy", 0, ("technique.prune.sparsity=0.9",)), "no such thing")
    assert draw_curves([BASELINE, first, second, lost]) == {}


def test_methods_seeds_and_words_have_lines_of_their_own():
    rows = [
        row(f"technique.prune.sparsity={s}", f"technique.prune.scope={scope}", method=method, seed=seed)
        for s in (0.2, 0.5)
        for scope in ("layer", "global")
        for method in ("prune", "prune+gptq")
        for seed in (0, 1)
    ]
    figure = draw_curves(rows)["prune.sparsity"]
    assert len(drawn(figure.axes[0])) == 8
    assert figure.legends[0].get_texts()[0].get_text() == "prune, 0, global"


def test_tasks_and_models_have_figures_of_their_own():
    rows = [row(f"technique.prune.sparsity={s}", task=task) for s in (0.2, 0.5) for task in ("toy", "sst2")]
    assert list(draw_curves(rows)) == ["tiny-toy-accuracy-prune.sparsity", "tiny-sst2-accuracy-prune.sparsity"]


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ((1e-5, 1e-4, 1e-3), "log", ["1e-05", "0.0001", "0.001"]),
        ((0, 1, 2), "linear", ["0", "1", "2"]),
        ((8, 8.1, 32), "linear", None),  # no room for both
    ],
)
def test_ticks_are_the_values_where_there_is_room(values, scale, ticks):
    axis = draw_curves([row(f"technique.x.y={value}") for value in values])["x.y"].axes[1]
    assert axis.get_xscale() == scale
    shown = [tick.get_text() for tick in axis.get_xticklabels()]
    assert shown == ticks if ticks else "8.1" not in shown


def test_a_sweep_leaves_pictures_figures_for_tensorboard_and_a_line_that_says_where(tmp_path, capsys):
    (tmp_path / "multirun.yaml").write_text("")
    for number, sparsity in enumerate(("0.2", "0.5")):
        folder = tmp_path / f"{number}_job"
        begin(folder)
        job = Job("prune", "tiny", "toy", 0, (f"technique.prune.sparsity={sparsity}",))
        report_success(folder, job, OUTCOME)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    SweepReport().on_multirun_end(config)
    assert imread(tmp_path / "curves" / "prune.sparsity.png").shape == (720, 960, 4)
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()
    assert {"curves/prune.sparsity", "report/accuracy against latency"} <= set(tags["images"])
    assert f"curves: {tmp_path / 'curves'}" in capsys.readouterr().out
