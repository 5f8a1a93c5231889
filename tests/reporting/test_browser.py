"""Open ``report.html`` in a browser, and sort its table by clicks on headings."""

import json
import re
import shutil
import subprocess

import pytest
from test_report import many

from compress.reporting.page import write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium to open the page with: apt install chromium")

VISIT = """<script>
  addEventListener("load", () => {
    const table = document.querySelector("table.sortable"), headings = [...table.tHead.rows[0].cells];
    const column = at => [...table.tBodies[0].rows].map(row => row.cells[at]?.dataset.value ?? "");
    const sorted = name => {
      const heading = headings.find(heading => heading.textContent === name);
      heading.scrollIntoView();
      const {left, top, width, height} = heading.getBoundingClientRect();
      document.elementFromPoint(left + width / 2, top + height / 2).click();
      return {arrow: heading.className, values: column(heading.cellIndex), rows: column(0)};
    };
    const found = {
      rows: column(0),
      sorted: ["MB", "MB", "p (Holm)", "method"].map(sorted),
      pictures: [...document.images].map(image => [image.alt, image.naturalWidth, image.clientWidth]),
      wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    };
    const output = document.body.appendChild(document.createElement("pre"));
    [output.id, output.textContent] = ["found", JSON.stringify(found)];
  });
</script>"""


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """Return a function that opens the page of twenty rows in a window of ``width`` pixels and returns its content."""
    folder = tmp_path_factory.mktemp("page")
    page = write_page(folder, many(folder))
    page.write_text(page.read_text() + VISIT)

    def visit(width):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
        shown = subprocess.run(
            [BROWSER, *flags, f"--window-size={width},900", "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        (found,) = re.findall(r'<pre id="found">(.+)</pre>', shown)
        return json.loads(found)

    return visit


def test_a_click_on_a_heading_sorts_the_table_and_another_reverses_it(visit):
    found = visit(1280)
    down, up, tested, named = found["sorted"]
    assert found["rows"] == [str(number) for number in range(1, 22)]
    values = [float(value) for value in down["values"] if value]
    assert down["arrow"] == "down" and len(values) == 20 and values == sorted(values, reverse=True)
    assert up["arrow"] == "up" and [float(value) for value in up["values"] if value] == values[::-1]
    assert sorted(down["rows"]) == sorted(found["rows"]) and down["rows"] != found["rows"]  # whole lines have moved
    for column in (down, up, tested):  # empty cells are last in either order
        filled = [bool(value) for value in column["values"]]
        assert filled == sorted(filled, reverse=True)
    assert named["arrow"] == "text down" and named["values"] == sorted(named["values"], reverse=True)


@pytest.mark.parametrize("width", [1280, 600])
def test_the_plots_are_there_and_nothing_reaches_beyond_the_window(visit, width):
    found = visit(width)
    assert [alt for alt, *_ in found["pictures"]] == [
        "accuracy against latency",
        "accuracy against size",
        "latency, with accuracy in the bars",
        "change by slice of the test split, in points",
        "against prune.sparsity",
    ]
    assert all(100 < shown <= width and drawn > 100 for _, drawn, shown in found["pictures"])
    assert found["wide"] == 0
