// Curves: the pointer's values, and drawing anew by the choices above them. Python draws them first, alike.
const choices = { scale: "auto", smoothing: "auto", hidden: new Set() };
const SVG = "http://www.w3.org/2000/svg";

function add(layer, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) { element.setAttribute(key, value); }
  if (text !== undefined) { element.textContent = text; }
  layer.append(element);
}

// Exponential average over one n-th of the curve, without the pull of a start at zero.
function smooth(points, part) {
  const decay = 1 - 1 / Math.max(2, points.length / part);
  let total = 0;
  let weight = 0;
  return points.map(([x, y]) => {
    total = decay * total + y;
    weight = decay * weight + 1;
    return [x, total / weight];
  });
}

// A schedule and a curve of few points are drawn as they are, whatever is chosen.
function isBumpy(points) {
  const values = points.map(([, y]) => y);
  const travel = values.slice(1).reduce((sum, y, index) => sum + Math.abs(y - values[index]), 0);
  return points.length >= 20 && travel > 1.5 * (Math.max(...values) - Math.min(...values));
}

function valueScale(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const wanted = choices.scale === "logarithmic" || (choices.scale === "auto" && low > 0 && high / low > 25);
  if (wanted && low > 0) { return { y: [low / 1.15, high * 1.15], log: true }; }
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  const bottom = low >= 0 && (low - margin < 0 || low < 0.3 * high) ? 0 : low - margin;
  return { y: [bottom, high + margin], log: false };
}

function linearTicks(low, high) {
  const raw = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= raw);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index <= Math.floor(high / step + 1e-9); index += 1) {
    ticks.push(Number((index * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks(low, high) {
  let inside = [];
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    inside = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      inside.push(...factors.map((factor) => Number((factor * 10 ** power).toPrecision(12))));
    }
    inside = inside.filter((tick) => low <= tick && tick <= high);
    if (inside.length <= 8) { return inside; }
  }
  return inside.filter((_, index) => index % Math.ceil(inside.length / 8) === 0);
}

function shortNumber(value) {
  if (Math.abs(value) >= 1e4 && Math.abs(value) < 1e7) { return Math.round(value).toLocaleString("en-US"); }
  return String(Number(value.toPrecision(4)));
}

function place(chart, y) {
  const [low, high] = chart.log ? chart.y.map(Math.log) : chart.y;
  return ((chart.log ? Math.log(y) : y) - low) / (high - low);
}

function drawAxes(chart, plot) {
  const [left, top, width, height] = chart.box;
  for (const tick of chart.log ? logTicks(...chart.y) : linearTicks(...chart.y)) {
    const y = top + height * (1 - place(chart, tick));
    add(plot, "line", { class: "grid", x1: left, x2: left + width, y1: y, y2: y });
    add(plot, "text", { class: "tick", x: left - 6, y: y + 3.5, "text-anchor": "end" }, shortNumber(tick));
  }
  for (const tick of linearTicks(...chart.x).filter(Number.isInteger)) {
    const x = left + width * (tick - chart.x[0]) / (chart.x[1] - chart.x[0]);
    add(plot, "text", { class: "tick", x, y: top + height + 15, "text-anchor": "middle" }, tick.toLocaleString("en-US"));
  }
  add(plot, "line", { class: "axis", x1: left, x2: left + width, y1: top + height, y2: top + height });
  add(plot, "text", { class: "tick", x: left + width / 2, y: top + height + 31, "text-anchor": "middle" }, "step");
  for (const mark of chart.marks) {
    const x = left + width * (mark - chart.x[0]) / (chart.x[1] - chart.x[0]);
    add(plot, "line", { class: "mark", x1: x, x2: x, y1: top, y2: top + height });
  }
}

function drawCurve(chart, plot, series) {
  const [left, top, width, height] = chart.box;
  const path = (points, faint) => {
    const placed = points.filter(([, y]) => !chart.log || y > 0).map(([x, y]) => [
      left + width * (x - chart.x[0]) / (chart.x[1] - chart.x[0]),
      top + height * (1 - place(chart, y)),
    ]);
    const style = `c${series.color % 8}`;
    if (placed.length === 1) { add(plot, "circle", { class: `dot ${style}`, cx: placed[0][0], cy: placed[0][1], r: 3 }); }
    if (placed.length < 2) { return; }
    const d = `M${placed.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
    const dashes = series.dashed && !faint ? { "stroke-dasharray": "5 3" } : {};
    add(plot, "path", { class: `line ${faint ? "faint " : ""}${style}`, d, ...dashes });
  };
  const chosen = choices.smoothing === "auto" ? (series.noisy ? 50 : 0) : Number(choices.smoothing);
  const part = isBumpy(series.points) ? chosen : 0;
  path(series.points, part > 0);
  if (part > 0) { path(smooth(series.means || series.points, part), false); }
}

function redraw(chart) {
  const plot = chart.figure.querySelector(".plot");
  chart.shown = chart.series.filter((series) => !choices.hidden.has(series.color) || choices.single);
  const asMade = choices.scale === "auto" && choices.smoothing === "auto" && chart.shown.length === chart.series.length;
  const values = chart.shown.flatMap((series) => series.points.map(([, y]) => y));
  const positive = values.filter((y) => y > 0);
  const usable = choices.scale === "logarithmic" && positive.length ? positive : values;
  if (asMade || !usable.length) {
    Object.assign(chart, { y: chart.made.y, log: chart.made.log });
    plot.innerHTML = chart.made.drawing;
    plot.style.display = usable.length ? "" : "none";
  } else {
    Object.assign(chart, valueScale(usable));
    plot.style.display = "";
    plot.replaceChildren();
    drawAxes(chart, plot);
    chart.shown.forEach((series) => drawCurve(chart, plot, series));
  }
  const kind = chart.figure.querySelector(".kind");
  kind.textContent = chart.log ? "(logarithmic)" : "";
  for (const key of chart.figure.querySelectorAll(".key")) {
    key.classList.toggle("off", choices.hidden.has(Number(key.dataset.color)) && !choices.single);
  }
}

function nearest(points, x) {
  let low = 0;
  let high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) { low = middle; } else { high = middle; }
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}

function followPointer(figure) {
  const chart = JSON.parse(figure.dataset.chart);
  chart.figure = figure;
  chart.shown = chart.series;
  chart.made = { y: chart.y, log: chart.log, drawing: figure.querySelector(".plot").innerHTML };
  const svg = figure.querySelector("svg");
  const layer = svg.querySelector(".pointer");
  const [left, top, width, height] = chart.box;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / width;
    const wanted = chart.x[0] + Math.min(1, Math.max(0, share)) * (chart.x[1] - chart.x[0]);
    layer.replaceChildren();
    tip.replaceChildren();
    for (const series of chart.shown) {
      const [step, value] = nearest(series.points, wanted);
      const x = left + width * (step - chart.x[0]) / (chart.x[1] - chart.x[0]);
      if (!layer.childElementCount) {
        add(layer, "line", { x1: x, x2: x, y1: top, y2: top + height });
      }
      add(layer, "circle", { class: `dot c${series.color % 8}`, cx: x, cy: top + height * (1 - place(chart, chart.log ? Math.max(value, chart.y[0]) : value)), r: 3.5 });
      const line = document.createElement("div");
      line.textContent = `${series.label} at ${step}: ${value}`;
      tip.append(line);
    }
    tip.hidden = false;
    const outer = figure.getBoundingClientRect();
    const at = event.clientX - outer.left;
    tip.style.top = `${box.top - outer.top + 8}px`;
    tip.style.left = `${at > outer.width / 2 ? Math.max(4, at - tip.offsetWidth - 12) : at + 12}px`;
  });
  svg.addEventListener("pointerleave", () => { layer.replaceChildren(); tip.hidden = true; });
  return chart;
}

const charts = [...document.querySelectorAll("figure[data-chart]")].map(followPointer);
for (const name of ["scale", "smoothing"]) {
  const choice = document.getElementById(name);
  if (choice) {
    choice.addEventListener("change", () => { choices[name] = choice.value; charts.forEach(redraw); });
  }
}
const boxes = [...document.querySelectorAll(".run-shown")];
choices.single = !boxes.length;
for (const box of boxes) {
  box.addEventListener("change", () => {
    choices.hidden = new Set(boxes.filter((one) => !one.checked).map((one) => Number(one.value)));
    charts.forEach(redraw);
  });
}
page.dataset.charts = String(charts.length);
page.dataset.script = "done";
