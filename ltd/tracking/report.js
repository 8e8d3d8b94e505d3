"use strict";
// Marks on the page what loaded (data-* attributes, for whoever checks it), follows the pointer on charts, plays samples.
const page = document.documentElement;
page.dataset.errors = "0";
const countError = () => { page.dataset.errors = String(Number(page.dataset.errors) + 1); };
window.addEventListener("error", countError);
document.addEventListener("securitypolicyviolation", countError);

const videos = [...document.querySelectorAll("video")];
function markVideo(video) {
  if (video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA && video.videoWidth > 0) {
    video.dataset.ready = "true";
    video.dataset.duration = String(video.duration);
  }
  page.dataset.videosReady = `${videos.filter((one) => one.dataset.ready).length}/${videos.length}`;
}
for (const video of videos) {
  video.addEventListener("loadeddata", () => markVideo(video));
  video.addEventListener("error", () => { video.dataset.ready = "false"; countError(); });
  // The bar of controls covers half of a small clip: it comes with the pointer or the keyboard.
  video.controls = false;
  video.tabIndex = 0;
  for (const [event, shown] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]]) {
    video.addEventListener(event, () => { video.controls = shown; });
  }
  markVideo(video);
}

const playAll = document.getElementById("play-all");
if (playAll) {
  playAll.addEventListener("click", () => {
    const start = videos.some((video) => video.paused);
    for (const video of videos) {
      if (start) { video.currentTime = 0; video.play(); } else { video.pause(); }
    }
    playAll.textContent = start ? "Pause all" : "Play all";
  });
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
  const svg = figure.querySelector("svg");
  const layer = svg.querySelector(".pointer");
  const [left, top, width, height] = chart.box;
  const place = (y) => chart.log
    ? (Math.log(y) - Math.log(chart.y[0])) / (Math.log(chart.y[1]) - Math.log(chart.y[0]))
    : (y - chart.y[0]) / (chart.y[1] - chart.y[0]);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const make = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) { element.setAttribute(key, value); }
    layer.append(element);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / width;
    const wanted = chart.x[0] + Math.min(1, Math.max(0, share)) * (chart.x[1] - chart.x[0]);
    layer.replaceChildren();
    tip.replaceChildren();
    for (const series of chart.series) {
      const [step, value] = nearest(series.points, wanted);
      const x = left + width * (step - chart.x[0]) / (chart.x[1] - chart.x[0]);
      if (!layer.childElementCount) {
        make("line", { x1: x, x2: x, y1: top, y2: top + height });
      }
      make("circle", { class: `dot c${series.color % 8}`, cx: x, cy: top + height * (1 - place(value)), r: 3.5 });
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
}
const charts = [...document.querySelectorAll("figure[data-chart]")];
charts.forEach(followPointer);
page.dataset.charts = String(charts.length);
page.dataset.script = "done";
