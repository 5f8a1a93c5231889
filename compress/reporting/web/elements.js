"use strict";

// The rows of the sweep, and small functions that make elements. Texts of rows are only ever set as text.
const sweep = JSON.parse(document.getElementById("sweep").textContent);

/** Return an element with properties and children; a child is an element or a text, and what is empty is left out. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element && name !== "list" && name !== "form") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return element;
}

/** Return an SVG element with attributes. */
function draw(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return a labelled choice; `options` are pairs of a value and a text. */
function makeSelect(id, label, options, value, onchange) {
  const select = make("select", { id, onchange }, ...options.map(([key, text]) => make("option", { value: key }, text)));
  select.value = value;
  return makeField(label, select);
}

/** Return a control below its label. */
function makeField(label, control) {
  return make("div", { className: "field" }, make("label", { for: control.id }, label), control);
}

function makeCheckbox(id, label, onchange, checked = false) {
  return make("label", { className: "check" }, make("input", { id, type: "checkbox", onchange, checked }), label);
}

/** Return a list of names and texts: `pairs` whose text is empty are left out. */
function makeFigures(pairs) {
  const shown = pairs.filter(([, text]) => text !== "");
  return make("dl", { className: "figures" }, ...shown.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
}

/** Return the different values in their first order. */
function distinct(values) {
  return [...new Set(values)];
}

function formatNumber(value) {
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function axisOf(key) {
  return sweep.axes.find(axis => axis.key === key);
}

/** Return a row's figure for a column or an axis as text, with its interval. */
function formatFigure(row, key) {
  const at = sweep.columns.findIndex(column => column.key === key);
  if (at >= 0) return row.cells[at];
  const [value, low, high] = row.points[key] ?? [];
  if (value === undefined) return "";
  return formatNumber(value) + (low === undefined ? "" : ` [${formatNumber(low)}, ${formatNumber(high)}]`);
}
