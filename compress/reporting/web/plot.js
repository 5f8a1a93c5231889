// The plot: a point for every shown row that has both figures, the Pareto fronts, and budgets as lines.

const plot = document.getElementById("plot");
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8a63d2", "#7a7a7a"]; // Okabe and Ito
const SHAPES = ["circle", "square", "triangle-up", "cross", "star", "pentagon", "hexagon", "bowtie"];
const MOST_INTERVALS = 60; // with more points their intervals hide the points
const view = { x: "", y: "", color: "", points: [], walked: -1 };

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Return a point for each row that has both figures. */
function collectPoints(rows) {
  return rows.filter(row => row.points[view.x] && row.points[view.y]).map(row => ({
    row, x: row.points[view.x][0], y: row.points[view.y][0], front: false,
  }));
}

/** Return the fronts: for each model and task, the points that no other point beats, from left to right. */
function findFronts(points) {
  const [xBetter, yBetter] = [view.x, view.y].map(key => axisOf(key).more ? 1 : -1);
  const groups = new Map();
  for (const point of points) {
    const key = JSON.stringify([point.row.model, point.row.task]);
    groups.set(key, [...groups.get(key) ?? [], point]);
  }
  return [...groups.values()].map(group => {
    const sorted = [...group].sort((a, b) => xBetter * (b.x - a.x) || yBetter * (b.y - a.y));
    let best = -Infinity;
    const front = sorted.filter(point => {
      const better = yBetter * point.y > best;
      best = Math.max(best, yBetter * point.y);
      return better;
    });
    front.forEach(point => { point.front = true; });
    return front.sort((a, b) => a.x - b.x);
  });
}

function groupOf(point) {
  if (view.color !== "front") return point.row[view.color] || "none";
  return point.row.baseline ? "baseline" : point.front ? "on the front" : "beaten by another row";
}

function makeTraces(points, fronts) {
  const names = view.color === "front"
    ? ["baseline", "on the front", "beaten by another row"]
    : distinct(sweep.rows.filter(row => row.status === "completed").map(row => row[view.color] || "none"));
  const fixed = { baseline: [color("text"), "diamond"], "on the front": [color("accent"), "circle"], "beaten by another row": [color("grey"), "circle-open"] };
  const traces = fronts.filter(front => front.length > 1).map(front => ({
    x: front.map(point => point.x), y: front.map(point => point.y), mode: "lines", hoverinfo: "skip", showlegend: false,
    line: { shape: axisOf(view.x).more ? "vh" : "hv", width: 1.5, color: color("accent") }, opacity: 0.6,
  }));
  const crowded = points.length > MOST_INTERVALS;
  names.forEach((name, at) => {
    const group = points.filter(point => groupOf(point) === name);
    if (!group.length) return;
    const [ink, symbol] = view.color === "front" ? fixed[name] : [COLORS[at % COLORS.length], SHAPES[at % SHAPES.length]];
    traces.push({
      x: group.map(point => point.x), y: group.map(point => point.y), customdata: group.map(point => point.row.number),
      mode: "markers", type: "scatter", name: escapeMarkup(name), hoverinfo: "none",
      marker: { size: crowded ? 7 : 9, opacity: crowded ? 0.75 : 1, color: ink, symbol },
      ...(!crowded && { error_x: makeIntervals(group, view.x, ink), error_y: makeIntervals(group, view.y, ink) }),
    });
  });
  const marked = points.filter(point => point.row.number === state.marked);
  traces.push({
    x: marked.map(point => point.x), y: marked.map(point => point.y), mode: "markers", hoverinfo: "skip", showlegend: false,
    marker: { size: 20, color: color("failed"), symbol: "circle-open", line: { width: 3 } },
  });
  return traces;
}

function makeIntervals(group, key, ink) {
  const ends = group.map(point => point.row.points[key]);
  return {
    type: "data", symmetric: false, thickness: 1, width: 3, color: ink,
    array: ends.map(([value, , high]) => high === undefined ? 0 : Math.max(0, high - value)),
    arrayminus: ends.map(([value, low]) => low === undefined ? 0 : Math.max(0, value - low)),
  };
}

/** Return the budgets of the shown models and tasks as lines, and their names at the edge of the plot. */
function makeBudgets(points) {
  const shown = sweep.budgets.filter(budget => (budget.axis === view.x || budget.axis === view.y) &&
    points.some(({ row }) => row.model === budget.model && row.task === budget.task));
  const line = { color: color("failed"), width: 1.5, dash: "dash" };
  const shapes = shown.map(({ axis, value }) => axis === view.y
    ? { type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line }
    : { type: "line", yref: "paper", y0: 0, y1: 1, x0: value, x1: value, line });
  const names = shown.map(({ axis, value, label }) => ({
    text: escapeMarkup(label), showarrow: false, font: { size: 11, color: color("failed") },
    ...(axis === view.y
      ? { xref: "paper", x: 0, xanchor: "left", y: value, yanchor: "bottom" }
      : { yref: "paper", y: 1, yanchor: "top", x: value, xanchor: "left", textangle: 90 }),
  }));
  return { shapes, names };
}

function makeAxis(name) {
  const key = view[name];
  const { title, more } = axisOf(key);
  return {
    title: { text: `${escapeMarkup(title)} (${more ? "better →" : "← better"})`, standoff: 12 },
    type: document.getElementById(`log-${name}`).checked ? "log" : "linear", gridcolor: color("line"), zeroline: false, automargin: true, linecolor: color("line"),
  };
}

/** Draw the shown rows. */
function drawPlot() {
  if (!view.x || !view.y) return;
  view.points = collectPoints(state.shown);
  view.walked = -1;
  const fronts = findFronts(view.points);
  const budgets = makeBudgets(view.points);
  const layout = {
    xaxis: makeAxis("x"), yaxis: makeAxis("y"), shapes: budgets.shapes, annotations: budgets.names,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("text"), family: "system-ui, sans-serif" },
    margin: { l: 60, r: 16, t: 34, b: 48 }, legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom" }, showlegend: true,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("soft"), activecolor: color("accent") }, hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  };
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] }; // none that uploads
  const name = `${axisOf(view.y).title} against ${axisOf(view.x).title}`;
  plot.setAttribute("aria-label", `Plot of ${name}, ${view.points.length} rows`);
  const missing = state.shown.length - view.points.length;
  document.getElementById("drawn").textContent = `${name}: ${view.points.length} rows` +
    `${missing ? `; ${missing} without these figures` : ""}. The line joins rows that no other beats in both.`;
  return Plotly.react(plot, makeTraces(view.points, fronts), layout, config).then(nameFront);
}

/** Write the names of the front; again after every zoom, because the room has changed. */
function nameFront() {
  const points = view.points.map(point => ({ ...point, named: point.front || point.row.number === state.marked }));
  const labels = placeLabels(points, plot._fullLayout, color("text"));
  return Plotly.relayout(plot, { annotations: [...makeBudgets(view.points).names, ...labels] });
}

function listenToPlot() {
  plot.on("plotly_hover", ({ points, event }) => showCard(points[0].customdata, event.clientX, event.clientY));
  plot.on("plotly_unhover", hideCard);
  plot.on("plotly_click", ({ points }) => markRow(points[0].customdata));
  plot.on("plotly_relayout", change => {
    if (Object.keys(change).some(key => key.includes("axis") || key === "autosize")) nameFront();
  });
  plot.addEventListener("blur", hideCard);
  plot.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && event.target === plot) walk(step);
    else if (event.key === "Enter" && view.walked >= 0 && event.target === plot) markRow(sortedPoints()[view.walked].row.number);
    else if (event.key === "Escape") hideCard();
    else return;
    event.preventDefault();
  });
}

function sortedPoints() {
  return [...view.points].sort((a, b) => a.x - b.x);
}

/** Show the card of the next point to the right or to the left. */
function walk(step) {
  const points = sortedPoints();
  if (!points.length) return;
  const walked = Math.min(points.length - 1, Math.max(0, view.walked < 0 ? (step > 0 ? 0 : points.length - 1) : view.walked + step));
  view.walked = walked;
  const { x, y, row } = points[walked];
  const { xaxis, yaxis } = plot._fullLayout;
  const box = plot.getBoundingClientRect();
  showCard(row.number, box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y));
  document.getElementById("spoken").textContent = document.getElementById("card").innerText;
}
