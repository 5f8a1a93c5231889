// What a row unfolds to: each part that the row keeps, and nothing for a part that it does not.

function makeDetails(row) {
  const details = row.details;
  const parts = [
    makeNotes(row), ...details.stages.map(makeStage), makeSlices(details.slices), makeAnswers(details.answers),
    makeFiguresPart(row), makeSource(details),
  ];
  return make("div", { className: "parts" }, ...parts.filter(Boolean));
}

function makePart(title, ...children) {
  return make("section", {}, make("h3", {}, title), ...children);
}

function makeFiguresPart(row) {
  const pairs = sweep.columns.map((column, at) => [column.name, row.cells[at]]);
  const metrics = sweep.axes.filter(axis => axis.metric && axis.key !== row.metric);
  pairs.unshift(...metrics.map(axis => [axis.key, formatFigure(row, axis.key)]));
  return pairs.some(([, text]) => text !== "") && makePart("Figures", makeFigures(pairs));
}

function makeStage(stage, at) {
  const losses = Object.entries(stage.losses).map(([split, loss]) => [`${split} loss`, formatNumber(loss)]);
  const facts = [
    ["time", `${stage.seconds.toFixed(1)} s${stage.trained ? ", trained" : ""}`],
    ["promise, checked", stage.shrinks ? "fewer bytes on disk" : ""],
    ...losses,
  ];
  return makePart(
    `${at ? `Stage ${at}` : "Start"}: ${stage.name}`,
    makeFigures(facts),
    Object.keys(stage.curves).length ? makeCurves(stage) : null,
    stage.settings.length ? make("details", {}, make("summary", {}, "settings"), makeFigures(stage.settings)) : null,
  );
}

/** Return a small plot of the losses of a stage's training. */
function makeCurves(stage) {
  const [width, height] = [260, 60];
  const curves = Object.entries(stage.curves);
  const points = curves.flatMap(([, curve]) => curve);
  const [steps, values] = [0, 1].map(at => points.map(point => point[at]));
  const scale = (value, all, length) => length * (value - Math.min(...all)) / (Math.max(...all) - Math.min(...all) || 1);
  const place = ([step, value]) => `${scale(step, steps, width).toFixed(1)},${(height - scale(value, values, height)).toFixed(1)}`;
  const ends = curves.map(([tag, curve]) => `${tag} ${formatNumber(curve[0][1])} → ${formatNumber(curve.at(-1)[1])}`);
  const label = `${ends.join("; ")}; ${Math.max(...steps)} steps`;
  const lines = curves.map(([tag, curve]) =>
    draw("polyline", { class: tag.startsWith("validation") ? "curve validation" : "curve", points: curve.map(place).join(" ") }));
  return make("figure", { className: "inside-figure" },
    draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label }, ...lines),
    make("figcaption", {}, label));
}

function makeSlices(slices) {
  if (!slices.length) return null;
  return makePart("Worst slices", makeTable(
    ["slice", "texts", "change, points", "p (Holm)"],
    slices.map(slice => [slice.name, String(slice.examples), (100 * slice.change).toFixed(1), formatP(slice.p_value)]),
  ));
}

function formatP(value) {
  return value < 1e-4 ? "< 0.0001" : value.toPrecision(2);
}

function makeAnswers(answers) {
  if (!answers) return null;
  const summary = `${answers.changed} of ${answers.examples} answers changed` +
    (answers.changed ? `: ${answers.lost} were right and are not now, ${answers.gained} are right now and were not.` : ".");
  const withTexts = answers.shown.some(answer => answer.text);
  const rows = answers.shown.map(answer => [
    ...(withTexts ? [answer.text] : [`number ${answer.number}, ${answer.tokens} tokens`]),
    answer.truth, answer.before, answer.after,
  ]);
  const headings = [withTexts ? "text" : "text of the split", "label", "baseline", "this row"];
  return makePart("Changed answers", make("p", {}, summary), rows.length ? makeTable(headings, rows) : null);
}

function makeTable(headings, rows) {
  return make("table", {},
    make("thead", {}, make("tr", {}, ...headings.map((name, at) => make("th", { scope: "col", className: at ? "" : "text" }, name)))),
    make("tbody", {}, ...rows.map(cells => make("tr", {}, ...cells.map((cell, at) => make("td", { className: at ? "" : "text" }, cell))))));
}

function makeNotes(row) {
  const { reason, effect, limits } = row.details;
  const notes = [reason && `failed: ${reason}`, effect, ...limits].filter(Boolean);
  return notes.length > 0 && makePart("Notes", make("ul", {}, ...notes.map(note => make("li", {}, note))));
}

function makeSource(details) {
  if (!details.folder && !details.settings.length) return null;
  return makePart("Repeat it",
    makeFigures([["folder", details.folder], ["data", details.data]]),
    details.command ? make("pre", {}, details.command) : make("pre", {}, details.settings.join(" ")),
    details.config ? make("details", {}, make("summary", {}, "full config"), make("pre", {}, details.config)) : null);
}
