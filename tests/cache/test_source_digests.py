"""The code that a result depends on, and no more."""

import re
from pathlib import Path

import compress
from compress.cache.sources import digest_source, list_sources, parse_source
from compress.planning.plan import TRAINING
from compress.running.job import WORK

PACKAGE = Path(compress.__file__).parent


def test_what_writes_the_report_is_no_part_of_a_training():
    trained, worked = ({*list_sources(*modules)} for modules in (TRAINING, (WORK,)))
    assert {"compress.running.training", "compress.techniques.finetune", "compress.tasks.tokens"} <= trained
    assert not [name for name in trained if name.startswith(("compress.reporting", "compress.measuring"))]
    assert "compress.measuring.measure" in worked and "compress.reporting.page" not in worked


def test_a_stage_depends_on_what_it_imports_and_not_on_other_stages():
    sources = {*list_sources("compress.techniques.gptq")}
    assert {"compress.techniques.gptq", "compress.maths.rounding", "compress.technique"} <= sources
    assert "compress.techniques.prune" not in sources and "compress.techniques.awq" not in sources


def test_code_counts_and_comments_do_not(tmp_path, monkeypatch):
    def digest(text):
        file = tmp_path / "stranger.py"
        file.write_text(text)
        return parse_source("stranger", file, text)[0]

    plain = digest("def f():\n    return 1\n")
    assert plain == digest('"""Say."""\n\n\ndef f():  # why\n    """Return 1."""\n    return 1\n')
    assert plain != digest("def f():\n    return 2\n")


def test_what_another_package_imports_of_its_own_and_of_ours_counts(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "stage.py").write_text(
        "from typing import TYPE_CHECKING\nfrom . import factor\nfrom compress.models.layers import find_stacks\n"
        "if TYPE_CHECKING:\n    import compress.reporting.page\n"
    )
    factor = tmp_path / "theirs" / "factor.py"
    factor.write_text("FACTOR = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    sources = list_sources("theirs.stage")
    assert {"theirs.stage", "theirs.factor", "compress.models.layers"} <= {*sources}
    assert "compress.reporting.page" not in sources
    before = digest_source("theirs.stage")
    factor.write_text("FACTOR = 20\n")
    assert digest_source("theirs.stage") != before


def test_modules_imported_by_a_computed_name_are_known():
    """A result that depends on such a module must name it: see the callers of ``digest_source``."""
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    computed = {name for name, text in files.items() if re.search(r"import_module\(", text)}
    assert computed == {
        "__init__.py",
        "artifacts/moving.py",
        "measuring/meters.py",
        "planning/plan.py",
        "runtimes/runtime.py",
    }
