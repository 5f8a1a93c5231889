"""Explore ``report.html`` in a browser: point, mark, filter, sort and unfold, and look for barriers with axe."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
from test_report import BASELINE, WORSE, answered, begin
from torch.utils.tensorboard import SummaryWriter

from compress.artifacts.artifact import Description, Done
from compress.measuring.measure import Interval
from compress.reporting import report
from compress.reporting.jobs import gather_rows
from compress.reporting.page import write_page
from compress.reporting.rows import Job, correct_p_values, drop_repeated_baselines

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install -e '.[dev]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="there is no Chromium to open the page with: apt install chromium"),
]

HOSTILE = "<script>document.title = 'taken over'</script><b>bold</b>"
ACTS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
"""Tags of axe's rules: WCAG's levels A and AA, and headings in order."""


PLACE = """number => {
  const {x, y} = view.points.find(point => point.row.number === number);
  const {xaxis, yaxis} = plot._fullLayout, {left, top} = plot.getBoundingClientRect();
  return [left + xaxis._offset + xaxis.d2p(x), top + yaxis._offset + yaxis.d2p(y)];
}"""
"""Returns where a row's point is in the window."""


def make_sweep(folder):
    """Write eleven jobs and return their twelve rows: a baseline, ten chains, and a failure."""
    texts = [f"{HOSTILE} number {number}" for number in range(1, 101)]
    for number in range(10):
        job = folder / f"{number}_job"
        method, size = ("prune", "prune+onnx")[number % 2], (7 * number % 19 + 1) * 100_000
        settings = {"sparsity": number / 10, "target": {"size_mb": 1.5} if number == 3 else None}
        stages = [Done(name, settings, 2.0, trained=False, shrinks=True) for name in method.split("+")]
        description = Description("multiclass", "tiny", "toy", limits=(HOSTILE,), history=(BASELINE, *stages))
        pruned = replace(
            WORSE.measurements["prune"], size_bytes=size, speedup=Interval(1 + number / 4, 0.9 + number / 4, 9.0)
        )
        outcome = replace(
            WORSE,
            descriptions={"none": WORSE.descriptions["none"], method: description},
            measurements={"none": WORSE.measurements["none"], method: pruned},
            predictions={"none": answered(10), method: answered(20)},
            baseline="a",
            texts=texts,
        )
        begin(job)
        hostile = [f"technique.prune.calibration={HOSTILE}"] if number == 5 else []
        words = (f"technique.prune.sparsity={number / 10}", *hostile)
        report.report_success(job, Job(method, "tiny", "toy", 0, words), outcome)
        (job / "artifact").mkdir()
        (job / "artifact" / "compress.json").write_text(json.dumps(asdict(description)))
        with SummaryWriter(str(job / "tensorboard" / "0_baseline")) as writer:
            for step, loss in enumerate((1.5, 1.0, 0.5)):
                writer.add_scalar("train/loss", loss, step)
    begin(folder / "10_job")
    report.report_failure(folder / "10_job", Job("gptq", "tiny", "toy", 0), HOSTILE)
    return correct_p_values(drop_repeated_baselines(gather_rows(folder)))


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """Return a function that opens the page of twelve rows in a new window of its own."""
    folder = tmp_path_factory.mktemp("page")
    address = write_page(folder, make_sweep(folder)).as_uri()

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])

        @contextmanager
        def visit(**window):
            page = browser.new_page(**window)
            asked, wrong = [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.goto(address)
            page.wait_for_selector("#plot .xtitle")
            yield page
            outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
            assert not outside and not wrong
            page.close()

        yield visit
        browser.close()


def shown(page):
    """Return the numbers of the rows that the table shows, in order."""
    return [int(text) for text in page.locator("#table > tbody:not(.out) .mark").all_inner_texts()]


def drawn(page):
    """Return the numbers of the rows that the plot shows."""
    return sorted(page.evaluate("plot.data.flatMap(trace => trace.customdata ?? [])"))


def find_barriers(page):
    """Return the rules that the page breaks and where, as axe sees it."""
    found = axe.Axe().run(page, options={"runOnly": ACTS}).response["violations"]
    return [(rule["id"], [node["html"][:120] for node in rule["nodes"][:3]]) for rule in found]


def test_a_point_shows_its_figures_and_marks_its_row_and_the_other_way_round(visit):
    with visit(viewport={"width": 1280, "height": 900}) as page:
        at = page.evaluate(PLACE, 11)
        page.mouse.move(*at)
        said = page.locator("#card").inner_text()
        assert said.startswith("11 prune+onnx") and all(name in said for name in ("accuracy", "change", "MB", "faster"))
        page.mouse.click(*at)
        pressed = page.locator("#table .mark[aria-pressed=true]")
        assert pressed.all_inner_texts() == ["11"]
        assert page.locator("#marked").inner_text().startswith("11 prune+onnx")
        page.get_by_label("Mark row 1 in the plot", exact=True).click()
        assert pressed.all_inner_texts() == ["1"]
        assert page.evaluate("plot.data.at(-1).x.length") == 1, "a ring is around the marked point"
        page.get_by_role("button", name="Remove the mark").click()
        assert not pressed.count() and page.evaluate("plot.data.at(-1).x.length") == 0


def test_the_keyboard_walks_over_the_points(visit):
    with visit() as page:
        page.locator("#plot").focus()
        page.keyboard.press("ArrowRight")
        first = page.locator("#spoken").inner_text()
        page.keyboard.press("ArrowRight")
        assert first and page.locator("#spoken").inner_text() != first
        page.keyboard.press("Enter")
        assert page.locator("#table .mark[aria-pressed=true]").count() == 1


def test_filters_leave_the_same_rows_in_the_table_and_the_plot(visit):
    with visit() as page:
        assert shown(page) == list(range(1, 13)) and drawn(page) == list(range(1, 12))
        page.get_by_label("Stage").select_option("onnx")
        assert shown(page) == drawn(page) == [3, 5, 7, 9, 11]
        assert page.locator("#count").inner_text() == "5 of 12 rows"
        page.get_by_label("Search").fill("sparsity=0.3")
        assert shown(page) == drawn(page) == [5]
        page.get_by_role("button", name="Reset filters").click()
        page.get_by_label("Status").select_option("failed")
        assert shown(page) == [12] and drawn(page) == []
        page.get_by_role("button", name="Reset filters").click()
        page.get_by_label("on the front").check()
        assert shown(page) == drawn(page) == [1, 11]


def test_headings_sort_by_mouse_and_keyboard_and_empty_cells_stay_last(visit):
    with visit() as page:
        heading = page.locator("#table th[data-key=size_mb]")
        heading.get_by_role("button").click()
        size = "number => sweep.rows[number - 1].points.size_mb?.[0]"
        up = [page.evaluate(size, number) for number in shown(page)[:-1]]
        assert up == sorted(up) and shown(page)[-1] == 12 and heading.get_attribute("aria-sort") == "ascending"
        heading.get_by_role("button").press("Enter")
        down = [page.evaluate(size, number) for number in shown(page)[:-1]]
        assert down == up[::-1] and shown(page)[-1] == 12 and heading.get_attribute("aria-sort") == "descending"


def test_a_row_unfolds_to_what_its_folder_keeps_and_no_text_acts(visit):
    with visit() as page:
        fold = page.get_by_label("Details of row 7")
        assert fold.get_attribute("aria-expanded") == "false"
        fold.press("Enter")
        assert fold.get_attribute("aria-expanded") == "true"
        inside = page.locator(f"#{fold.get_attribute('aria-controls')}")
        said = inside.inner_text()
        for part in ("Stage 2: onnx", "fewer bytes on disk", "train/loss 1.5 → 0.5", "10 of 100 answers changed",
                     "10 were right", "Worst slices", f"{HOSTILE} number 11", "technique=prune"):  # fmt: skip
            assert part in said
        page.get_by_label("Details of row 1", exact=True).click()
        assert "answers changed" not in page.locator("#details-1").inner_text(), "the baseline has no other answers"
        fold.press("Enter")
        assert fold.get_attribute("aria-expanded") == "false" and not inside.is_visible()
        assert page.title() == "tiny on toy: 100 test examples, cpu, 2 threads"
        assert page.locator("script").count() == 3 and not page.locator("main b, main script").count()
        assert HOSTILE in page.locator("#table > tbody.failed").inner_text()


def test_axes_can_be_chosen_and_a_budget_is_a_line(visit):
    with visit() as page:
        assert page.evaluate("plot.layout.shapes.length") == 0
        page.get_by_label("Across", exact=True).select_option("size_mb")
        assert page.evaluate("plot.layout.shapes.map(shape => shape.x0)") == [1.5]
        names = page.evaluate("plot.layout.annotations.map(each => each.text)")
        assert "prune.target.size_mb=1.5" in names and "2 prune sparsity=0.0" in names
        page.get_by_label("Up", exact=True).select_option("change")
        page.get_by_label("logarithm across").check()
        assert page.evaluate("[plot.layout.yaxis.title.text, plot.layout.xaxis.type]") == [
            "change of the metric, points (better →)", "log",
        ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(visit, scheme):
    with visit(color_scheme=scheme) as page:
        assert find_barriers(page) == []
        page.get_by_label("Details of row 7").click()
        page.get_by_label("Mark row 7 in the plot").click()
        page.get_by_label("all columns").check()
        assert find_barriers(page) == []


def test_on_a_phone_only_the_table_scrolls_sideways(visit):
    with visit(viewport={"width": 390, "height": 844}) as page:
        page.get_by_label("Details of row 7").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("table.clientWidth > table.parentElement.clientWidth")


def test_paper_shows_all_rows_and_no_controls(visit):
    with visit() as page:
        page.get_by_label("Stage").select_option("onnx")
        page.emulate_media(media="print")
        assert all(body.is_visible() for body in page.locator("#table > tbody").all())
        assert not any(form.is_visible() for form in page.locator("form, .modebar").all())
