// Names beside the points of the front, where there is room for them.

const LONGEST = 34;

/** Return annotations for the points whose names fit: none overlaps a name, a point or the edge of the plot. */
function placeLabels(points, layout, color) {
  const [xaxis, yaxis] = [layout.xaxis, layout.yaxis];
  const [width, height] = [xaxis._length, yaxis._length];
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "12px system-ui, sans-serif";
  const places = points.map(point => ({ ...point, px: xaxis.d2p(point.x), py: yaxis.d2p(point.y) }));
  const inside = places.filter(({ px, py }) => px >= 0 && px <= width && py >= 0 && py <= height);
  const taken = inside.map(({ px, py }) => [px - 5, py - 5, px + 5, py + 5]);
  const annotations = [];
  for (const place of inside.filter(place => place.named)) {
    const text = shorten(`${place.row.number} ${place.row.label}`);
    const [long, high] = [pen.measureText(text).width + 6, 16];
    const corners = [[4, -22], [-4 - long, -22], [4, 6], [-4 - long, 6], [-long / 2, -24], [-long / 2, 8], [8, -8], [-8 - long, -8]];
    const found = corners.map(([dx, dy]) => [place.px + dx, place.py + dy, place.px + dx + long, place.py + dy + high])
      .find(box => box[0] >= 0 && box[1] >= 0 && box[2] <= width && box[3] <= height && !taken.some(other => overlap(box, other)));
    if (!found) continue;
    taken.push(found);
    annotations.push({
      x: found[0] / width, y: 1 - found[1] / height, xref: "paper", yref: "paper", xanchor: "left", yanchor: "top",
      text: escapeMarkup(text), showarrow: false, borderpad: 0, font: { size: 12, color },
    });
  }
  return annotations;
}

function overlap(first, second) {
  return first[0] < second[2] && second[0] < first[2] && first[1] < second[3] && second[1] < first[3];
}

function shorten(text) {
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
}

/** Return a text that plotly, which reads some HTML, shows as it is. */
function escapeMarkup(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}
