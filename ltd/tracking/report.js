"use strict";
// Marks on the page what loaded (data-* attributes, for whoever checks it) and plays samples.
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

// Played together, videos start at once, and start again when the longest has ended.
let together = null;
function playTogether(group, button, text) {
  const before = together;
  stopTogether();
  if (before && before.button === button) { return; }
  together = { group, button, text };
  button.textContent = "Pause";
  for (const video of group) { video.loop = false; restart(video); }
}
function restart(video) {
  video.currentTime = 0;
  video.play().catch((error) => { if (error.name !== "AbortError") { countError(); } });
}
function stopTogether() {
  if (!together) { return; }
  for (const video of together.group) { video.loop = true; video.pause(); }
  together.button.textContent = together.text;
  together = null;
}
for (const video of videos) {
  video.addEventListener("ended", () => {
    if (!together || !together.group.includes(video)) { return; }
    const ended = together.group.filter((one) => one.ended);
    if (ended.length === together.group.filter((one) => one.ended || !one.paused).length) { ended.forEach(restart); }
  });
}
const playAll = document.getElementById("play-all");
if (playAll) {
  playAll.addEventListener("click", () => playTogether(videos, playAll, "Play all"));
}
for (const button of document.querySelectorAll(".play-row")) {
  const row = [...button.closest(".sample-row").querySelectorAll("video")];
  button.addEventListener("click", () => playTogether(row, button, "Play row"));
}
