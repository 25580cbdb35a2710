// Small pictures as SVG: accuracy over versions, and the loss of a training. Colours come from hub.css.

import { percent, svg } from "./dom.js";

const HEIGHT = 240;
const LEFT = 50;
const RIGHT = 14;
const TOP = 14;
const BOTTOM = 30;

// points: [{label, value, champion, title, href}], oldest first; width in pixels, so that its text is of one size
export function accuracyChart(points, width) {
  const right = Math.max(280, width) - RIGHT;
  const [low, high, step] = scale(points.map((point) => point.value));
  const x = (index) => LEFT + 26 + (points.length < 2 ? 0.5 : index / (points.length - 1)) * (right - LEFT - 52);
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const picture = svg("svg", { viewBox: `0 0 ${right + RIGHT} ${HEIGHT}`, class: "chart", role: "img", "aria-label": "Test accuracy of each version" });
  for (let value = low; value <= high + step / 2; value += step) {
    picture.append(
      svg("line", { x1: LEFT, x2: right, y1: y(value), y2: y(value), class: "grid" }),
      svg("text", { x: LEFT - 8, y: y(value) + 4, class: "tick end" }, percent(value, step < 0.01 ? 1 : 0)),
    );
  }
  const champions = points.map((point, index) => [index, point]).filter(([, point]) => point.champion);
  const line = champions.map(([index, point]) => `${x(index)},${y(point.value)}`);
  if (line.length > 1) {
    const floor = HEIGHT - BOTTOM;
    const ends = [`${x(champions.at(-1)[0])},${floor}`, `${x(champions[0][0])},${floor}`];
    picture.append(svg("polygon", { points: [...line, ...ends].join(" "), class: "area" }));
    picture.append(svg("polyline", { points: line.join(" "), class: "line" }));
  }
  const every = Math.ceil(points.length / (right / 45));
  points.forEach((point, index) => {
    const dot = svg("circle", { cx: x(index), cy: y(point.value), r: 6, class: point.champion ? "dot" : "dot refused" });
    dot.append(svg("title", {}, point.title));
    picture.append(svg("a", { href: point.href, "aria-label": point.title }, dot));
    if ((points.length - 1 - index) % every === 0) {
      picture.append(svg("text", { x: x(index), y: HEIGHT - 9, class: "tick middle" }, point.label));
    }
    if (index === points.length - 1) {
      picture.append(svg("text", { x: x(index), y: y(point.value) - 12, class: "value middle" }, percent(point.value)));
    }
  });
  return picture;
}

export function lossChart(values) {
  const width = 600;
  const height = 120;
  const high = Math.max(...values);
  const low = Math.min(0, ...values);
  const place = (value, index) =>
    `${((index / Math.max(1, values.length - 1)) * width).toFixed(1)},${(6 + (1 - (value - low) / (high - low || 1)) * (height - 12)).toFixed(1)}`;
  const line = values.map(place);
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, class: "chart loss", role: "img", "aria-label": `Loss, from ${values[0].toFixed(3)} to ${values.at(-1).toFixed(3)}`, preserveAspectRatio: "none" },
    svg("polygon", { points: [...line, `${width},${height}`, `0,${height}`].join(" "), class: "area" }),
    svg("polyline", { points: line.join(" "), class: "line" }),
  );
}

function scale(values) {
  const least = Math.min(...values);
  const most = Math.max(...values);
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2].find((size) => (most - least) / size <= 4) || 0.25;
  let low = Math.floor(least / step - 0.25) * step;
  let high = Math.ceil(most / step + 0.25) * step;
  if (high - low < 2 * step) low -= step;
  return [Math.max(0, low), Math.min(1, high), step];
}
