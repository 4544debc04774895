// The page: reads the address, asks the server, shows what it says.

import * as api from "/static/api.js";
import { go, onView, read } from "/static/address.js";
import { closeCompare, makeCompare, openCompare } from "/static/compare.js";
import { $, brief, el, sentence, whole } from "/static/dom.js";
import { drawFilters, foldFilters, makeFilters } from "/static/filters.js";
import { drawQuery, makeQuery, refuseFiles, uploaded } from "/static/query.js";
import * as results from "/static/results.js";
import { SCORES } from "/static/results.js";

const EXAMPLES = 18;
const FOLLOW = 10_000; // milliseconds between looks at the count

let model = null; // as /v1/model tells it
const pictured = () => model?.extractor !== null; // vectors from elsewhere have no pictures
const matching = () => model?.image_search === null; // a comparison needs the model
let columns = [];
let found = { asked: null, hits: [], facts: new Map() }; // facts: of items that are compared, by id
let search = new AbortController();

async function start() {
  makeQuery();
  makeTheme();
  makeCompare(turn);
  foldFilters();
  makeKeyForm();
  onView(show);
  $("others").addEventListener("click", () => show(read(), { again: true }));
  $("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address holds the view
    $("results").focus();
  });
  addEventListener("online", () => show(read(), { again: true }));
  setInterval(followCount, FOLLOW);
  await connect();
}

/** Learn what the index is, then show what the address asks for. */
async function connect() {
  try {
    [model, columns] = await Promise.all([api.model(), api.columns()]);
    tellModel();
    makeFilters(columns);
    $("key").hidden = true;
    $("main").hidden = false;
    await show(read(), { again: true });
  } catch (error) {
    if (error.status === 401) return; // the form for a key is shown
    $("main").hidden = false;
    results.clearTiles();
    results.showFailure(error, connect);
  }
}

function tellModel() {
  const { index, name, key, taps, pool, count, kind, recall, image_search: missing } = model;
  document.title = `${index} · repkit search`;
  $("name").textContent = index;
  const used = key === null || key in taps ? key : Object.keys(taps).join(" + "); // a fusion's key names none of them
  const size = el("span", { id: "count" }, whole(count));
  const measured = recall === null ? kind : `${kind}, recall ${recall.toFixed(2)}`;
  const many = [size, pictured() ? " images" : " items"];
  const facts = [name ?? "vectors", used, pool, many, measured].filter((fact) => fact !== null);
  $("facts").replaceChildren(...facts.flatMap((fact, at) => [at ? "\u00a0· " : "", ...[fact].flat()]));
  $("details").replaceChildren(...details(model).flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]));
  $("about").hidden = false;
  if (missing !== null) {
    refuseFiles(`${sentence(missing)} Search from ${pictured() ? "a picture" : "an item"} of the index.`);
  }
}

/** What else is known of how the index was made. */
function details({ extractor, key, taps, resize, dimension, metric }) {
  const used = Object.entries(taps).filter(([tap, time]) => time && (tap === key || !(key in taps)));
  const time = ([tap, { t, logsnr }]) => `${tap}: t ${t}, log-SNR ${logsnr}`;
  return [
    ["extractor", extractor],
    ["time", used.map(time).join("; ")],
    ["resize", resize?.size ? `${[resize.size].flat().toReversed().join(" x ")} pixels, ${resize.policy}` : null],
    ["vectors", `${dimension} numbers, compared by ${SCORES[metric].name}`],
  ].filter(([, text]) => text);
}

async function followCount() {
  if (document.hidden || !model) return;
  const count = await api.count().catch(() => null);
  if (count === null || count === model.count) return;
  $("count").textContent = whole(count);
  const now = await api.columns().catch(() => null);
  if (now === null || $("columns").contains(document.activeElement)) return; // who uses a filter keeps it; next time
  [model.count, columns] = [count, now];
  makeFilters(columns);
  drawFilters(read().where);
}

/** Show a view: its controls at once, its results when they come. */
async function show(view, { again = false } = {}) {
  drawQuery(view, { flat: model?.kind === "flat", pictured: pictured() });
  drawFilters(view.where);
  const asked = JSON.stringify([view.id, view.upload, view.k, view.exact, view.where]);
  if (model && (again || asked !== found.asked)) {
    found = { asked, hits: [], facts: new Map() };
    await fill(view);
  }
  await showCompare(read());
}

async function fill(view) {
  search.abort();
  search = new AbortController();
  const { signal } = search;
  const query = view.id !== null || uploaded(view.upload) !== undefined;
  results.hideFailure();
  $("others").hidden = query;
  $("empty").hidden = true;
  const wait = query ? [view.k, "Searching"] : [EXAMPLES, "Try one of these"];
  const late = setTimeout(() => results.showWaiting(...wait), 120); // milliseconds; no flicker for quick answers
  try {
    await (query ? fillHits(view, signal) : fillExamples(view, signal));
  } catch (error) {
    if (error.name === "AbortError" || error.status === 401) return;
    clearTimeout(late);
    await failed(error, view);
  } finally {
    clearTimeout(late);
  }
}

async function fillHits(view, signal) {
  const file = uploaded(view.upload)?.file;
  const answer = await api.search({ ...view, file }, signal);
  if (signal.aborted) return;
  found.hits = answer.hits;
  results.tellAnswer(answer, `Most like ${view.id ?? file.name}`);
  if (!answer.hits.length) return results.showEmpty(Object.keys(view.where).length > 0);
  const how = { metric: model.metric, query: view.id ?? "", pictured: pictured(), comparable: matching() };
  results.showTiles(answer.hits, how);
}

async function fillExamples(view, signal) {
  const filtered = Object.keys(view.where).length > 0;
  const items = await examples(view.where, signal);
  if (signal.aborted) return;
  results.tellExamples(items, filtered);
  if (!items.length) return results.showEmpty(filtered);
  results.showTiles(items, { pictured: pictured() });
}

/** Items at random: where a column has few values, from each of them. */
async function examples(where, signal) {
  const kinds = columns.find(({ name, values }) => values?.length > 1 && values.length <= EXAMPLES && !(name in where));
  if (!kinds || typeof kinds.min === "number") return api.some(where, EXAMPLES, signal);
  const lists = await Promise.all(
    kinds.values.map(({ value }) => api.some({ ...where, [kinds.name]: value }, EXAMPLES, signal)),
  );
  const each = Math.ceil(EXAMPLES / lists.filter((list) => list.length).length);
  return shuffled(lists.flatMap((list) => list.slice(0, each))).slice(0, EXAMPLES);
}

/** Say what went wrong; where no file can be searched from, offer what can be. */
async function failed(error, view) {
  results.clearTiles();
  results.showFailure(error, () => show(read(), { again: true }));
  if (error.code === "no_model") await fillExamples(view, search.signal).catch(() => {});
}

async function showCompare(view) {
  if (!matching()) return closeCompare();
  const query = await side(view.upload === null ? view.id : null, uploaded(view.upload));
  const other = view.compare === null ? null : await side(view.compare);
  if (!query || !other) return closeCompare();
  if (read().compare !== view.compare) return;
  const [source, target] = view.swapped ? [other, query] : [query, other];
  openCompare(source, target, view.at);
  const at = found.hits.findIndex((hit) => hit.id === view.compare);
  $("before").disabled = at <= 0;
  $("next").disabled = at < 0 || at >= found.hits.length - 1;
}

/** A side of the compare view: its picture, name, and what is known of it. */
async function side(id, own) {
  if (own) return { file: own.file, url: own.url, name: own.file.name, facts: "query" };
  if (id === null) return null;
  const { facts, hits } = found;
  if (!facts.has(id)) {
    const hit = hits.find((one) => one.id === id);
    const metadata = hit?.metadata ?? (await api.metadata(id).catch(() => ({})));
    const score = hit ? `${SCORES[model.metric].name} ${brief(hit.score)}` : null;
    const role = id === read().id ? "query" : score;
    facts.set(id, [results.label(metadata), role].filter(Boolean).join(" · "));
  }
  return { id, name: id, facts: facts.get(id) };
}

function turn(step) {
  const at = found.hits.findIndex((hit) => hit.id === read().compare);
  const other = found.hits[at + step];
  if (other) go({ compare: other.id }, { replace: true });
}

function shuffled(items) {
  for (let last = items.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [items[last], items[other]] = [items[other], items[last]];
  }
  return items;
}

function makeKeyForm() {
  addEventListener("keyneeded", () => {
    $("key-note").classList.toggle("failed", api.hasKey());
    if (api.hasKey()) $("key-note").textContent = "The server does not know this key.";
    $("key").hidden = false;
    $("main").hidden = true;
    $("key-field").focus();
  });
  $("key").addEventListener("submit", (event) => {
    event.preventDefault();
    api.useKey($("key-field").value.trim());
    connect();
  });
}

function makeTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const draw = () => $("theme").setAttribute("aria-pressed", isDark());
  $("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    localStorage.setItem("theme", theme);
    document.documentElement.dataset.theme = theme;
    draw();
  });
  dark.addEventListener("change", draw);
  draw();
}

start();
