"""docs/compatibility.md says what is true: cells of every row and column are run again and compared with it."""

import re

import pytest
from compatibility import PAGE, ROWS, STAGES, generalise, run_cell

# Every family with a stage and every stage with a family: a diagonal of the table, in steps that share no factor with
# its width.
CELLS = [(list(STAGES)[7 * row % len(STAGES)], family, lm) for row, (family, lm) in enumerate(ROWS)]


def read_page():
    """Return the mark of every cell, ✓ or the sentence of its note."""
    text = PAGE.read_text(encoding="utf-8")
    notes = dict(re.findall(r"^(\d+)\. (.+)$", text, re.M))
    cells = {}
    for lm, section in enumerate(re.split(r"^## .*$", text, flags=re.M)[1:3]):
        header, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
        stages = [cell.strip() for cell in header.strip("|").split("|")][1:]
        for line in lines:
            family, *marks = [cell.strip() for cell in line.strip("|").split("|")]
            for stage, mark in zip(stages, marks):
                cells[stage, family, bool(lm)] = notes[mark.strip("[]")] if mark != "✓" else ""
    return cells


def test_the_page_has_a_cell_for_every_stage_and_family():
    assert set(read_page()) == {(stage, family, lm) for family, lm in ROWS for stage in STAGES}
    assert {stage for stage, *_ in CELLS} == set(STAGES)


@pytest.mark.parametrize(("stage", "family", "lm"), CELLS)
def test_a_cell_of_the_page_is_what_a_run_gives(stage, family, lm):
    assert generalise(run_cell(stage, family, lm)) == read_page()[stage, family, lm]
