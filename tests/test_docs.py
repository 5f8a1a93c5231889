"""Compose or run every command and every Python block of the README and docs/, and check what the pages quote."""

import functools
import re
import runpy
import shlex
import textwrap
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import tiny
import yaml
from hydra import compose as hydra_compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_conf import CONF, hydra, jobs  # noqa: F401

import compress
from compress import api, command
from compress.artifacts.artifact import Description, write_artifact
from compress.cache.__main__ import main as manage_cache
from compress.planning.chain import drop_unused_settings, read_stages
from compress.planning.plan import check_stage_order, make_plan, make_step
from compress.techniques.finetune import FineTune
from compress.techniques.onnx import Onnx
from compress.techniques.openvino import OpenVINO
from compress.testing import make_embedding

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
BLOCK = re.compile(r"^(?: *<!-- (?P<mark>.+?) -->\n)?(?P<body> *```(?P<language>bash|python)\n.*?^ *```$)", re.M | re.S)
PROGRAMS = ("tensorboard --logdir ", "lm_eval --model hf ", "cut -f1 ", "pip install --no-deps textpruner")
"""What the pages start beside this project."""
MARKS = ("main job", "test command", "run by tests/test_examples.py")
"""Blocks that other tests run: tests/test_readme.py the first two."""


class Block(NamedTuple):
    page: str
    language: str
    code: str


def blocks(language):
    """Return the blocks of a language, without those that need what no test has."""
    found = [(page, match) for page, text in TEXTS.items() for match in BLOCK.finditer(text)]
    return [
        Block(page, language, textwrap.dedent(match["body"]).split("\n", 1)[1].rsplit("\n", 1)[0])
        for page, match in found
        if match["language"] == language
        and (match["mark"] or "") not in MARKS
        and "needs:" not in (match["mark"] or "")
    ]


def commands():
    """Return the commands of the pages, each once."""
    lines = (line for block in blocks("bash") for line in block.code.replace("\\\n", "").splitlines())
    return sorted({line.partition(" #")[0].strip() for line in lines} - {""})


def compose(program, words):
    """Compose the jobs of a command, and check the stages of each and their order. Of an experiment one job is enough:
    tests/test_conf.py composes the others."""
    words = [word for word in words if "=" in word and not word.startswith("-")]
    if any(word.startswith("experiment=") for word in words):
        configs = [hydra_compose(program, first_job(words), return_hydra_config=True)]
    else:
        configs = jobs(program, words, every=False)
    for config in configs:
        if "technique" in config:
            drop_unused_settings(config.technique, config.hydra.overrides.task)
            check_stage_order(config.technique.name, tuple(make_step(stage) for stage in read_stages(config.technique)))


def first_job(words):
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return BasicSweeper.split_arguments(parser.parse_overrides(words), None)[0][0]


def run_script(words):
    """Check that the script is there and knows the options."""
    script, *options = words
    source = (ROOT / script).read_text()
    assert all(f'"{option}"' in source for option in options if option.startswith("--"))


def install(words):
    """Check that the extras that are installed exist."""
    extras = [name for word in words for name in re.findall(r"\[(.+)\]", word)]
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    assert extras and set(",".join(extras).split(",")) <= set(known)


@pytest.mark.parametrize("line", commands())
def test_every_printed_command_works(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    for name in re.findall(r"=([\w]+\.txt)", line):  # a text file that a setting names
        (tmp_path / name).write_text("A text.\n")
    in_cache = ["--dir", str(tmp_path / "cache")]
    monkeypatch.setattr(command, "evaluate", lambda words: compose("evaluate", words))
    starts = {
        "python train.py": lambda words: compose("train", words),
        "compress train": lambda words: compose("train", words),
        "python evaluate.py": lambda words: compose("evaluate", words),
        "compress evaluate": lambda words: compose("evaluate", words),
        "python -m compress.cache": lambda words: manage_cache([*words, *in_cache]),
        "compress cache": lambda words: manage_cache([*words, *in_cache]),
        "compress report": command.write_report_again,
        "compress compare": command.compare_sweeps,
        "python benchmarks/": lambda words: run_script([f"benchmarks/{words[0]}", *words[1:]]),
        "pip install -e": install,
    }
    if not line.startswith(PROGRAMS):
        start = next((start for start in starts if line.startswith(start)), None)
        assert start, f"no test knows how to run {line!r}: write <!-- needs: ... --> before its block"
        if "resume=" not in line:  # tests/running/test_resume.py resumes
            starts[start](shlex.split(line.removeprefix(start)))


def plan(model, technique="none", task="toy", *, tokenizer=None, output=None, **settings):
    """Check a call of `compress.compress` as far as its plan, and return a result."""
    with api.choose_model(model, tokenizer) as words:
        words += [f"technique={technique}", *api.choose_group("task", task), *api.set_values(technique, settings)]
        GlobalHydra.instance().clear()  # of this module's fixture
        make_plan(api.compose_config("train", words))
    return SimpleNamespace(artifact="artifact", report="")


def check_measuring(artifact, **settings):
    GlobalHydra.instance().clear()
    api.compose_config("evaluate", [f"artifact={artifact}", *api.set_values("", settings)])


@functools.cache
def make_artifact(stage):
    """Return a function that writes a tiny artifact, in floats or as an export."""
    model = make_embedding() if stage == "embedding" else tiny.bert()
    exporter = {"onnx": Onnx, "openvino": OpenVINO}.get(stage)
    if exporter:
        exporter = exporter()
        tiny.trainer(exporter, epochs=0).fit(FineTune(model), tiny.loader())
    kind = "embedding" if stage == "embedding" else "multiclass"
    description = Description(kind, "tiny", "random", exporter.runtime if exporter else "torch", stage)
    return lambda folder: write_artifact(folder, model, tiny.tokenizer(), description, exporter)


def choose_artifact(code):
    """Return the kind of artifact that a block of Python opens."""
    names = {"onnxruntime": "onnx", "openvino": "openvino", "sentence_transformers": "embedding"}
    return next((kind for name, kind in names.items() if f"import {name}" in code or f"from {name}" in code), "float")


@pytest.mark.parametrize("code", sorted({block.code for block in blocks("python")}))
def test_every_printed_block_of_python_runs(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where Lightning writes its logs
    kind = choose_artifact(code)
    for folder in ("artifact", "my-classifier", "embedding"):
        Path(folder).mkdir()
        make_artifact(kind)(Path(folder))
    monkeypatch.setattr(compress, "compress", plan, raising=False)
    monkeypatch.setattr(compress, "measure", check_measuring, raising=False)
    monkeypatch.setattr(pl, "Trainer", functools.partial(pl.Trainer, **tiny.QUIET))
    names = {
        "your_module": FineTune(tiny.bert()),
        "your_loader": tiny.loader(),
        "loader": tiny.loader(),
        "model": tiny.bert(),
        "student": tiny.bert(),
        "tokenizer": tiny.tokenizer(),
    }
    exec(code.replace("bits=4", "bits=4, group_size=16, samples=8"), names)


def test_the_test_sees_blocks_and_marks():
    assert len(commands()) > 90 and len(blocks("python")) > 8
    texts = "".join(TEXTS.values())
    assert "vllm serve" in texts and not any(line.startswith("vllm") for line in commands())


def read_table(page, first):
    """Return the rows of the table whose header begins with a name, as lists of cells."""
    (lines,) = re.findall(rf"^\| {first} .*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXTS[page], re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]


def test_the_readmes_table_is_measured():
    measured = TEXTS["docs/measured.md"].splitlines()
    for _, *figures in read_table("README.md", "method"):
        figures = [figure for figure in figures if figure]
        assert any(all(figure in line for figure in figures) for line in measured), figures


def test_the_picture_shows_the_readmes_table():
    for name, picture in runpy.run_path(str(ROOT / "docs/overview.py"))["draw_all"]().items():
        assert (ROOT / "docs" / name).read_text() == picture, "python docs/overview.py draws it again"


@pytest.mark.parametrize("page", ["docs/choose.md", "docs/stages/index.md", "docs/measuring.md", "docs/index.md"])
def test_figures_in_sentences_are_measured(page):
    prose = re.sub(r"<!--.*?-->|```.*?```|`[^`]*`|\[[\d., ]+\]", "", TEXTS[page], flags=re.S)
    sources = "docs/measured.md docs/studies.md docs/embeddings.md docs/guides/search.md docs/measuring.md".split()
    known = {number for source in sources if source != page for number in re.findall(r"\d+\.\d+", TEXTS[source])}
    own = {"3.3", "4.5", "0.998", "1.00"}  # of the measurement itself, which docs/measuring.md is the source of
    assert set(re.findall(r"(?<![\d.])\d+\.\d+", prose)) - known <= own


# What the site takes from the repository


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs/hooks.py")))


@pytest.mark.parametrize("page", sorted(name for name in TEXTS if name.startswith("docs/")))
def test_every_quotation_of_a_page_has_its_source(page, hooks):
    file = SimpleNamespace(src_uri=page.removeprefix("docs/"))
    answered = hooks.on_page_markdown(TEXTS[page], page=SimpleNamespace(file=file))
    assert not re.search(rf"^ *<!-- (?:{'|'.join(hooks.ANSWERS)}):", answered, re.M)


@pytest.mark.parametrize(
    ("quotation", "expected"),
    [
        ("rows: measured.md | Criteria of pruning | *", nullcontext()),
        ("rows: measured.md | Criteria of prunning | *", pytest.raises(Exception, match="no heading")),
        ("rows: measured.md | MiniLM on SST-2 | none, gtpq", pytest.raises(Exception, match="no table has the rows")),
        ("rows: measured.md | MiniLM on SST-2 | none | acuracy", pytest.raises(Exception, match="no column")),
        ("settings: technique/stage/prun.yaml", pytest.raises(Exception, match="cannot be answered")),
    ],
)
def test_a_quotation_without_a_source_ends_the_build(quotation, expected, hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="stages/prune.md"))
    with expected:
        hooks.on_page_markdown(f"<!-- {quotation} -->", page=page)


def test_settings_have_their_comments_types_and_inherited_values(hooks):
    table = hooks.quote_settings("", "technique/stage/prune.yaml")
    assert (
        "| `sparsity` | `0.2` | number from 0 below 1 | fraction of zero weights in the transformer blocks |" in table
    )
    assert "| `train.learning_rate` | as `baseline.learning_rate` | number above 0 |" in table
    assert "`magnitude`, `wanda`, `sparsegpt`" in table and '`{"*attention*": 0.3}`' in table
    assert table.index("`train.epochs`") < table.index("`samples`")


@pytest.mark.parametrize("stage", sorted(path.stem for path in CONF.glob("technique/stage/[!_]*.yaml")))
def test_every_setting_of_a_stage_is_in_its_table(stage, hooks):
    values = yaml.safe_load((CONF / f"technique/stage/{stage}.yaml").read_text()) or {}
    keys = {setting.key.split(".")[0] for setting in hooks.read_settings(f"technique/stage/{stage}.yaml")}
    assert values.keys() - {"_target_", "defaults"} <= keys


@pytest.mark.parametrize(
    ("html", "fetches"),
    [
        ('<script src="https://unpkg.com/x"></script>', True),
        ("<img alt=a src=//elsewhere/x.png>", True),
        ('<link rel="stylesheet" href="https://fonts.googleapis.com/css">', True),
        ('<a href="https://arxiv.org/abs/2306.00978">paper</a><img src="report.png">', False),
        ('<link rel="canonical" href="https://example.org/">', False),
    ],
)
def test_a_page_that_fetches_from_elsewhere_ends_the_build(html, fetches, hooks, tmp_path):
    (tmp_path / "page.html").write_text(html)
    with pytest.raises(Exception, match=r"page.html fetches") if fetches else nullcontext():
        hooks.on_post_build(config=SimpleNamespace(site_dir=str(tmp_path)))


@pytest.mark.parametrize("stage", sorted(path.stem for path in CONF.glob("technique/stage/[!_]*.yaml")))
def test_every_stage_has_a_page_that_the_navigation_shows(stage):
    if stage == "none":
        return
    assert f"<!-- settings: technique/stage/{stage}.yaml -->" in TEXTS[f"docs/stages/{stage}.md"]
    assert f"stages/{stage}.md" in (ROOT / "mkdocs.yml").read_text()
    assert f"({stage}.md)" in TEXTS["docs/stages/index.md"] and f"`{stage}`" in TEXTS["README.md"]
    assert f"::: compress.techniques.{stage}." in TEXTS["docs/reference/stages.md"]
