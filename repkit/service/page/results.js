// The grid: a tile for each item, which searches from it; and what stands there while there is nothing to show.

import { go } from "/static/address.js";
import { $, brief, el, icon, plural, sentence } from "/static/dom.js";
import { pictureElement, showPicture } from "/static/pictures.js";

export const label = ({ label: text = null }) => (text === null ? null : String(text));

/** What a score is called, and which share of a bar it fills; of distances less is nearer. */
export const SCORES = {
  cosine: { name: "cosine", share: (score) => score },
  ip: { name: "inner product", share: (score, all) => score / Math.max(...all, 1e-12) },
  l2: { name: "distance", share: (score, all) => 1 - score / Math.max(...all, 1e-12) },
};

/**
 * Show tiles of items [{id, metadata, score?}], whose ids stand for pictures where they are not `pictured`.
 * query: its id, "" for an upload, null where there is none; comparable: with each of the items.
 */
export function showTiles(items, { metric = "cosine", query = null, pictured = true, comparable = false } = {}) {
  const scores = items.map((item) => item.score).filter((score) => score !== undefined);
  $("grid").removeAttribute("aria-busy");
  $("grid").replaceChildren(...items.map((item) => tile(item, { scores, metric, query, pictured, comparable })));
}

function tile(item, { scores, metric, query, pictured, comparable }) {
  const name = label(item.metadata);
  const scored = item.score !== undefined;
  const spoken = [name, item.id, scored ? `${SCORES[metric].name} ${brief(item.score)}` : null].filter(Boolean).join(", ");
  const from = () => go({ id: item.id, upload: null, compare: null });
  const title = name ?? (pictured ? item.id : ""); // else it stands in the picture's place
  const given = { type: "button", class: "picture", "aria-label": `Search from ${spoken}`, onclick: from };
  return el(
    "li",
    { class: "tile", "data-id": item.id },
    el("button", given, pictured ? picture(item.id) : el("bdi", { class: "name", title: item.id }, item.id)),
    el(
      "div",
      { class: "caption" },
      el("span", { class: name === null ? "id" : "label", title: item.id }, el("bdi", {}, title)),
      scored ? el("span", { class: "score" }, brief(item.score)) : null,
    ),
    scored ? bar(SCORES[metric].share(item.score, scores)) : null,
    el(
      "div",
      { class: "under" },
      el("span", { class: "id", title: item.id }, name === null || !pictured ? "" : el("bdi", {}, item.id)),
      query === null ? null : action(item, query, comparable),
    ),
  );
}

function picture(id) {
  const image = pictureElement();
  showPicture(image, id);
  return image;
}

function bar(share) {
  const fill = el("i");
  fill.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
  return el("div", { class: "bar", "aria-hidden": "true" }, fill);
}

function action(item, query, comparable) {
  if (item.id === query) return el("span", { class: "self" }, "query");
  if (!comparable) return null;
  return el(
    "button",
    {
      type: "button",
      class: "quiet compare",
      "aria-label": `Compare the query with ${item.id}`,
      title: "Compare",
      onclick: () => go({ compare: item.id, at: null, swapped: false }),
    },
    icon("compare"),
    el("span", {}, "Compare"),
  );
}

export function showWaiting(many, title) {
  $("found-title").textContent = title;
  $("found-facts").textContent = "";
  $("grid").setAttribute("aria-busy", "true");
  const tiles = Array.from({ length: many }, () => {
    const parts = [el("div", { class: "picture" }), el("div", { class: "words" })];
    return el("li", { class: "tile waiting", "aria-hidden": "true" }, ...parts);
  });
  $("grid").replaceChildren(...tiles);
  $("empty").hidden = true;
}

export function clearTiles() {
  $("grid").removeAttribute("aria-busy");
  $("grid").replaceChildren();
}

/** The line over the results: how many, how fast, how thoroughly; aloud, how many. */
export function tellAnswer({ hits, exact, scanned, took_ms: took }, title) {
  $("found-title").textContent = title;
  const time = `${took < 100 ? took.toFixed(1) : Math.round(took)} ms`;
  const facts = [time, exact ? "exact" : "approximate", `${plural(scanned, "vector")} compared`];
  $("found-facts").textContent = facts.join(" · ");
  $("told").textContent = `${plural(hits.length, "result")}. ${title}.`;
}

export function tellExamples(items, filtered) {
  $("found-title").textContent = filtered ? "Fitting the filters" : "Try one of these";
  $("found-facts").textContent = "";
  $("told").textContent = plural(items.length, "example");
}

/** Nothing to show, and why. */
export function showEmpty(filtered) {
  clearTiles();
  $("empty").hidden = false;
  const clear = el("button", { type: "button", class: "quiet", onclick: () => go({ where: {} }) }, "Clear the filters");
  if (filtered) $("empty").replaceChildren("Nothing fits these filters. ", clear);
  else $("empty").replaceChildren("The index is empty. Items that are added appear here.");
}

/** A calm line with the server's message and what to do; `retry` is offered where trying again may help. */
export function showFailure({ status, code, message, wait }, retry) {
  const may = status === 0 || status === 429 || (status >= 500 && code !== "no_model");
  const again = may ? el("button", { type: "button", class: "main", onclick: retry }, "Try again") : "";
  const text = sentence(message);
  $("banner").replaceChildren(el("p", {}, el("b", {}, text), " ", advice(status, code, wait)), again);
  $("banner").hidden = false;
  $("found-title").textContent = "No results";
  $("found-facts").textContent = $("told").textContent = "";
}

export function hideFailure() {
  $("banner").hidden = true;
  $("banner").replaceChildren();
}

function advice(status, code, wait) {
  if (code === "no_model") return "Searching from an item of the index still works: choose one below.";
  if (status === 429 || status === 503) return `Wait ${wait ? plural(wait, "second") : "a moment"} and try again.`;
  const told = {
    0: "Is repkit serve still running?",
    403: "Use a key that may do this.",
    404: "It may have been deleted; start from another item.",
    413: "Choose a smaller file.",
    415: "Choose another file.",
    422: "Choose another file, or change the filters.",
    504: "Ask for fewer results, or try again.",
  };
  return told[status] ?? "";
}
