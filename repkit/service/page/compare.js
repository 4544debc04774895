// The compare view: a point of the left picture, and where it is in the right one.

import { go, read } from "/static/address.js";
import { match } from "/static/api.js";
import { $, brief, el, icon, sentence } from "/static/dom.js";
import { drawHeat, drawScale } from "/static/heat.js";
import { pictureElement, showLocal, showPicture } from "/static/pictures.js";

const STEP = 0.02; // of the picture's side, for an arrow key; at least a pixel
const LEAP = 5; // times that, with Shift
const LARGE = 1024; // pixels of the longer side

const sizes = new Map(); // of pictures in pixels, which the server knows; what is shown may be smaller
const stages = {}; // source and target: {place, image, cross}
let sides = null; // {source, target}: each {id} or {file, url}, with name and facts
let point = [0.5, 0.5]; // as fractions of the source's sides
let best = null; // what was found for it, as fractions of the target's sides
let asked = null; // the AbortController of the request under way
let moved = false; // whether the point has changed since

const key = (side) => side.id ?? side.url;

/** Make the view's parts once. `turn(step)` shows the result before or after. */
export function makeCompare(turn) {
  for (const name of ["source", "target"]) stages[name] = stage($(name));
  stages.target.heat = el("canvas", { class: "heat", hidden: true, "aria-hidden": "true" });
  stages.target.image.after(stages.target.heat);
  drawScale($("scale"));
  drawOptions();
  $("compare").addEventListener("close", () => go({ compare: null, at: null, swapped: false }));
  $("close").addEventListener("click", () => $("compare").close());
  $("before").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("swap").addEventListener("click", () => go({ swapped: !read().swapped, at: best ?? point }));
  $("heat").addEventListener("change", drawOptions);
  $("opacity").addEventListener("input", drawOptions);
  $("source").addEventListener("keydown", pickByKey);
  pickByPointer($("source"));
}

function stage(place) {
  const image = pictureElement({ draggable: "false" });
  const cross = el("div", { class: "cross", hidden: true }, icon("cross"));
  image.addEventListener("load", () => shape(place, image.naturalWidth / image.naturalHeight));
  place.append(image, cross);
  return { place, image, cross };
}

const shape = (place, ratio) => place.style.setProperty("--ratio", ratio);

/** Open the view on two pictures, or show others in it; `at`: the point, or null for the one before. */
export function openCompare(source, target, at) {
  const same = sides !== null && key(sides.source) === key(source) && key(sides.target) === key(target);
  if (!same) {
    asked?.abort();
    sides = { source, target };
    forget();
    for (const name of ["source", "target"]) drawSide(name);
  }
  if (!$("compare").open) {
    $("compare").showModal();
    $("source").focus();
  }
  if (!same || (at !== null && at.join() !== point.join())) place(at ?? point);
}

export function closeCompare() {
  asked?.abort();
  sides = null;
  if ($("compare").open) $("compare").close();
}

function drawSide(name) {
  const side = sides[name];
  const { image } = stages[name];
  if (side.url) showLocal(image, side.url);
  else showPicture(image, side.id, LARGE);
  image.alt = side.name;
  $(`${name}-name`).textContent = side.name;
  $(`${name}-facts`).textContent = side.facts;
}

/** What was found for other pictures does not hold for these. */
function forget() {
  best = null;
  stages.target.cross.hidden = stages.target.heat.hidden = $("legend").hidden = true;
  $("answer").textContent = "";
  drawOptions();
}

function pickByPointer(picked) {
  const pick = (event) => {
    const box = picked.getBoundingClientRect();
    place([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
  };
  picked.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    picked.setPointerCapture(event.pointerId);
    pick(event);
  });
  picked.addEventListener("pointermove", (event) => picked.hasPointerCapture(event.pointerId) && pick(event));
}

function pickByKey(event) {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (way) {
    const { naturalWidth: width, naturalHeight: height } = stages.source.image;
    const far = event.shiftKey ? LEAP : 1;
    const steps = [Math.max(STEP, 1 / width), Math.max(STEP, 1 / height)];
    draw("source", point.map((part, axis) => part + way[axis] * far * steps[axis]));
    stages.source.cross.classList.add("moved");
  } else if (event.key === "Enter" || event.key === " ") place(point);
  else return;
  event.preventDefault();
}

/** Put a cross at fractions of a picture's sides, rounded as the address has them; returns where it is. */
function draw(name, at) {
  const inside = at.map((part) => Math.round(1e4 * Math.min(Math.max(part, 0), 1)) / 1e4);
  const { cross } = stages[name];
  [cross.style.left, cross.style.top] = inside.map((part) => `${100 * part}%`);
  cross.hidden = false;
  if (name === "source") point = inside;
  return inside;
}

/** Take the point and ask where it is; while an answer is awaited, only the last of the points that follow is kept. */
function place(at) {
  draw("source", at);
  stages.source.cross.classList.remove("moved");
  go({ at: point }, { replace: true });
  moved = true;
  if (!asked) answerPoints();
}

async function answerPoints() {
  while (moved && sides) {
    moved = false;
    asked = new AbortController();
    const { source, target } = sides;
    $("target").setAttribute("aria-busy", "true");
    try {
      const size = sizes.get(key(source)) ?? (await shownSize());
      const found = await match(source, target, inPixels(point, size), asked.signal);
      if (sides?.source !== source || sides.target !== target) continue;
      sizes.set(key(source), found.source);
      if (found.source.width === size.width && found.source.height === size.height) show(found);
      else moved = true; // a reduced picture was shown, so that was another point
    } catch (error) {
      if (error.name !== "AbortError" && sides?.source === source) fail(error);
    }
  }
  asked = null;
  $("target").removeAttribute("aria-busy");
}

/** The size of the source as it is shown, which is its own unless that is larger. */
async function shownSize() {
  const { image } = stages.source;
  if (!image.naturalWidth) await image.decode().catch(() => null); // a format that only the server reads
  return { width: image.naturalWidth || 1, height: image.naturalHeight || 1 };
}

/** Fractions as the place (x, y) in pixels; the centre of the first one is 0. */
const inPixels = ([x, y], { width, height }) => [x * width - 0.5, y * height - 0.5];

function show({ best: found, source, target, heat }) {
  shape($("source"), source.width / source.height);
  shape($("target"), target.width / target.height);
  const { x, y } = found.place;
  best = draw("target", [(x + 0.5) / target.width, (y + 0.5) / target.height]);
  drawBox(heat.box, target);
  const { low, high } = drawHeat(stages.target.heat, heat.grid);
  [$("low").textContent, $("high").textContent] = [brief(low), brief(high)];
  stages.target.heat.hidden = $("legend").hidden = false;
  drawOptions();
  $("answer").classList.remove("failed");
  $("answer").textContent = `Best match at x ${Math.round(x)}, y ${Math.round(y)}: cosine ${brief(found.score)}`;
}

/** Lay the heat map over what the network saw: the edges of a box in pixels of the target. */
function drawBox([left, top, right, bottom], { width, height }) {
  const { style } = stages.target.heat;
  [style.left, style.top] = [`${(100 * left) / width}%`, `${(100 * top) / height}%`];
  [style.width, style.height] = [`${(100 * (right - left)) / width}%`, `${(100 * (bottom - top)) / height}%`];
}

function fail({ status, message }) {
  forget();
  $("answer").classList.add("failed");
  $("answer").textContent = sentence(message) + (status === 429 ? " Wait a moment and press Enter." : "");
}

function drawOptions() {
  const on = $("heat").checked;
  const { heat, place: box } = stages.target;
  heat.classList.toggle("off", !on);
  heat.style.opacity = $("opacity").value / 100;
  box.classList.toggle("grey", on && !heat.hidden);
  $("opacity").disabled = !on;
}
