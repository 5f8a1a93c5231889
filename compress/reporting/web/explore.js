// The page as a whole: filters decide which rows the plot and the table show, and a mark is shown in both.

const state = { shown: sweep.rows, marked: null };
const CHOICES = [
  ["stage", "Stage", row => row.stages], ["model", "Model", row => [row.model]], ["task", "Task", row => [row.task]],
  ["runtime", "Runtime", row => [row.runtime]], ["seed", "Seed", row => [row.seed]], ["status", "Status", row => [row.status]],
];

function buildFilters() {
  const form = document.getElementById("filters");
  form.append(makeField("Search", make("input", { id: "search", type: "search", oninput: filterRows })));
  for (const [id, label, read] of CHOICES) {
    const values = distinct(sweep.rows.flatMap(read)).filter(Boolean);
    if (values.length > 1) form.append(makeSelect(`only-${id}`, label, [["", "all"], ...values.map(value => [value, value])], "", filterRows));
  }
  form.append(
    makeCheckbox("only-front", "on the front", filterRows),
    make("button", { type: "reset" }, "Reset filters"),
    make("output", { id: "count", "aria-live": "polite" }));
  form.addEventListener("reset", () => setTimeout(filterRows));
  form.addEventListener("submit", event => event.preventDefault());
}

function buildAxes() {
  const usable = sweep.axes.filter(({ key }) => sweep.rows.filter(row => row.points[key]).length > 0);
  if (!usable.length) {
    document.getElementById("figure").hidden = true;
    return;
  }
  const has = key => usable.some(axis => axis.key === key);
  view.y = usable.find(axis => axis.metric)?.key ?? usable[0].key;
  view.x = ["speedup", "size_mb", "latency_ms"].find(has) ?? usable.at(-1).key;
  if (has("speedup") && sweep.rows.every(row => row.baseline || !row.points.speedup)) view.x = has("size_mb") ? "size_mb" : view.x;
  const options = usable.map(({ key, title }) => [key, title]);
  const groups = ["model", "task", "runtime"].filter(key => {
    const values = distinct(sweep.rows.filter(row => row.status === "completed").map(row => row[key]));
    return values.length > 1 && values.length <= COLORS.length;
  });
  view.color = ["model", "task"].find(key => groups.includes(key)) ?? "front";
  const choose = name => event => { view[name] = event.target.value; drawPlot(); };
  const form = document.getElementById("axes");
  form.append(
    makeSelect("axis-y", "Up", options, view.y, choose("y")), makeSelect("axis-x", "Across", options, view.x, choose("x")),
    makeSelect("color", "Color", [["front", "front"], ...groups.map(key => [key, key])], view.color, choose("color")),
    makeCheckbox("log-x", "logarithm across", drawPlot), makeCheckbox("log-y", "logarithm up", drawPlot));
}

function buildOptions() {
  const form = document.getElementById("options");
  if (sweep.columns.some(column => !column.main)) {
    form.append(makeCheckbox("all-columns", "all columns", event => table.classList.toggle("main-only", !event.target.checked)));
  }
  form.append(make("button", { type: "button", onclick: () => state.shown.forEach(row => unfoldRow(row, false)) }, "Fold all"));
}

/** Show the rows that the filters leave, in the plot and in the table. */
function filterRows() {
  const words = document.getElementById("search").value.toLowerCase().split(/\s+/);
  const chosen = CHOICES.map(([id, , read]) => [document.getElementById(`only-${id}`)?.value, read]).filter(([value]) => value);
  let shown = sweep.rows.filter(row => {
    const text = `${row.label} ${row.details.reason}`.toLowerCase();
    return words.every(word => text.includes(word)) && chosen.every(([value, read]) => read(row).includes(value));
  });
  if (document.getElementById("only-front").checked) {
    const points = collectPoints(shown);
    findFronts(points);
    shown = points.filter(point => point.front).map(point => point.row);
  }
  state.shown = shown;
  document.getElementById("count").textContent = `${shown.length} of ${sweep.rows.length} rows`;
  showRows(shown);
  drawPlot();
}

/** Mark a row in the plot and in the table; a second time takes the mark away. */
function markRow(number) {
  state.marked = state.marked === number ? null : number;
  const place = document.getElementById("marked");
  place.replaceChildren();
  if (state.marked !== null) {
    const row = sweep.rows.find(each => each.number === number);
    place.append(
      make("strong", {}, `${number} ${row.label}`), ` ${describe(row).map(([name, text]) => `${name} ${text}`).join("; ")}`,
      make("button", { type: "button", onclick: () => { unfoldRow(row, true); goToRow(number); } }, "Go to its row"),
      make("button", { type: "button", onclick: () => markRow(number) }, "Remove the mark"));
  }
  showMark(state.marked);
  drawPlot();
}

/** Return what a card says of a row: pairs of a name and a text. */
function describe(row) {
  const keys = distinct(["value", "change", "size_mb", "speedup", "latency_ms", view.y === row.metric ? "value" : view.y, view.x]);
  const name = key => key === "value" ? row.metric : sweep.columns.find(column => column.key === key)?.name ?? axisOf(key)?.title ?? key;
  const pairs = keys.filter(Boolean).map(key => [name(key), formatFigure(row, key)]);
  return row.status === "failed" ? [["failed", row.details.reason]] : pairs.filter(([, text]) => text);
}

function showCard(number, x, y) {
  const row = sweep.rows.find(each => each.number === number);
  if (!row) return;
  const card = document.getElementById("card");
  card.replaceChildren(make("strong", {}, `${number} ${row.label}`), makeFigures(describe(row)));
  card.hidden = false;
  const { width, height } = card.getBoundingClientRect();
  card.style.left = `${Math.max(4, x + 14 + width > innerWidth ? x - width - 14 : x + 14)}px`;
  card.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px`;
}

function hideCard() {
  document.getElementById("card").hidden = true;
}

buildFilters();
buildAxes();
buildOptions();
buildTable();
filterRows();
if (view.x) listenToPlot();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlot);
const fit = width => view.x && Plotly.relayout(plot, width ? { width, autosize: false } : { width: null, autosize: true });
addEventListener("beforeprint", () => {
  document.querySelectorAll("details.pictures").forEach(each => { each.open = true; });
  fit(680);
});
addEventListener("afterprint", () => fit(null));
