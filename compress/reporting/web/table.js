// The table: a <tbody> for each row, which its unfolded details stay in when rows are sorted.

const table = document.getElementById("table");
const bodies = new Map();
const order = { column: "number", down: false };

function buildTable() {
  table.setAttribute("aria-label", "Rows of the sweep");
  const headings = [
    makeHeading("number", "#", "number"), makeHeading("label", "method", "text"),
    ...sweep.columns.map(column => makeHeading(column.key, column.name, column.main ? "" : "extra")),
  ];
  table.append(make("thead", {}, make("tr", {}, ...headings)));
  for (const row of sweep.rows) {
    bodies.set(row.number, makeBody(row));
    table.append(bodies.get(row.number));
  }
  table.classList.add("main-only");
  table.parentElement.classList.toggle("long", sweep.rows.length > 30);
}

function makeHeading(key, name, className) {
  const heading = make("th", { scope: "col", className, "data-key": key });
  heading.append(make("button", { type: "button", onclick: () => sortRows(key) }, name));
  return heading;
}

function makeBody(row) {
  const fold = make("button", {
    type: "button", className: "fold", "aria-expanded": "false", "aria-label": `Details of row ${row.number}`,
    onclick: () => unfoldRow(row),
  });
  const mark = make("button", {
    type: "button", className: "mark", "aria-pressed": "false", "aria-label": `Mark row ${row.number} in the plot`,
    onclick: () => markRow(row.number),
  }, String(row.number));
  const failed = row.status === "failed";
  const cells = sweep.columns.map((column, at) => make("td", { className: column.main ? "" : "extra" }, row.cells[at]));
  const reason = failed && make("td", { className: "text", colSpan: Math.max(1, sweep.columns.length) }, `failed: ${row.details.reason}`);
  const line = make("tr", {}, make("td", { className: "number" }, fold, mark),
    make("th", { scope: "row", className: "text" }, row.label), ...(failed ? [reason] : cells));
  line.addEventListener("click", event => {
    if (!event.target.closest("button") && !String(getSelection())) markRow(row.number);
  });
  return make("tbody", { className: failed ? "failed" : "" }, line);
}

/** Show or hide a row's details, which are made when they are first shown. */
function unfoldRow(row, open = null) {
  const body = bodies.get(row.number);
  const fold = body.querySelector(".fold");
  const expanded = open ?? fold.getAttribute("aria-expanded") === "false";
  if (expanded && body.rows.length < 2) {
    const id = `details-${row.number}`;
    const cell = make("td", { className: "inside", colSpan: sweep.columns.length + 2 }, make("div", {}, makeDetails(row)));
    body.append(make("tr", { id }, cell));
    fold.setAttribute("aria-controls", id);
  }
  if (body.rows[1]) body.rows[1].hidden = !expanded;
  fold.setAttribute("aria-expanded", String(expanded));
}

/** Sort by a column: upwards, and downwards if it is sorted upwards already. Rows without a value go last. */
function sortRows(key) {
  order.down = order.column === key && !order.down;
  order.column = key;
  const at = sweep.columns.findIndex(column => column.key === key);
  const value = row => (at < 0 ? row[key] : row.values[at]) ?? "";
  const sorted = [...sweep.rows].sort((first, second) => {
    const [x, y] = [value(first), value(second)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const ahead = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return order.down ? -ahead : ahead;
  });
  table.append(...sorted.map(row => bodies.get(row.number)));
  for (const heading of table.tHead.rows[0].cells) {
    if (heading.dataset.key === key) heading.setAttribute("aria-sort", order.down ? "descending" : "ascending");
    else heading.removeAttribute("aria-sort");
  }
}

function showRows(shown) {
  const numbers = new Set(shown.map(row => row.number));
  for (const [number, body] of bodies) body.classList.toggle("out", !numbers.has(number));
}

function showMark(number) {
  for (const [each, body] of bodies) {
    body.classList.toggle("marked", each === number);
    body.querySelector(".mark").setAttribute("aria-pressed", String(each === number));
  }
}

/** Bring a row into view and move the keyboard there. */
function goToRow(number) {
  const body = bodies.get(number);
  body.scrollIntoView({ block: "center" });
  body.querySelector(".fold").focus();
}
