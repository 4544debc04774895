// Filters: toggles for columns of few values, ranges for numbers, and what is in use as chips that can be taken off.

import { go, read } from "/static/address.js";
import { $, el, icon, whole } from "/static/dom.js";

const AS_TOGGLES = 12; // a column with more values becomes a list to choose from

/** Make the controls of the columns: [{name, values: [{value, count}] | null, min, max}]. */
export function makeFilters(columns) {
  const usable = columns.map(control).filter(Boolean);
  $("columns").replaceChildren(...usable);
  $("filters").hidden = usable.length === 0;
}

/** Open on wide screens, and folded where results would be far below. */
export function foldFilters() {
  const wide = matchMedia("(min-width: 801px)");
  const fold = () => ($("filters").open = wide.matches);
  wide.addEventListener("change", fold);
  fold();
}

function control(column) {
  const { values, min, max } = column;
  if (typeof min === "number" && typeof max === "number") return min < max ? range(column) : null;
  if (!values || values.length < 2 || values.every(({ count }) => count === 1)) return null; // names, not kinds
  return values.length <= AS_TOGGLES ? toggles(column) : chooser(column);
}

function toggles({ name, values }) {
  const buttons = values.map(({ value, count }) =>
    el(
      "button",
      {
        type: "button",
        class: "toggle",
        "aria-pressed": "false",
        "data-value": JSON.stringify(value),
        onclick: () => flip(name, value),
      },
      shown(value),
      el("small", { "aria-hidden": "true" }, whole(count)),
    ),
  );
  return el("fieldset", { "data-column": name }, el("legend", {}, name), el("div", { class: "toggles" }, ...buttons));
}

function chooser({ name, values }) {
  const option = ({ value, count }) => el("option", { value: JSON.stringify(value) }, `${shown(value)} (${whole(count)})`);
  const all = [el("option", { value: "" }, "Choose"), ...values.map(option)];
  const select = el("select", { "aria-label": `Filter by ${name}` }, ...all);
  select.addEventListener("change", () => {
    if (select.value) flip(name, JSON.parse(select.value));
    select.value = "";
  });
  return el("fieldset", { "data-column": name }, el("legend", {}, name), select);
}

function range({ name, min, max }) {
  const bound = (side, word, placeholder) =>
    el("input", { type: "number", step: "any", placeholder, "data-bound": side, "aria-label": `${name}, ${word}` });
  const from = bound("gte", "from", min);
  const to = bound("lte", "to", max);
  const apply = () => {
    const condition = {};
    for (const field of [from, to]) if (field.value !== "") condition[field.dataset.bound] = Number(field.value);
    set(name, Object.keys(condition).length ? condition : undefined);
  };
  for (const field of [from, to]) field.addEventListener("change", apply);
  const fields = el("div", { class: "range" }, from, el("span", {}, "to"), to);
  return el("fieldset", { "data-column": name }, el("legend", {}, name), fields);
}

function set(name, condition) {
  const where = { ...read().where };
  if (condition === undefined) delete where[name];
  else where[name] = condition;
  go({ where });
}

const isRange = (condition) => condition !== null && typeof condition === "object" && !Array.isArray(condition);

/** The values that a condition names. */
function chosen(condition) {
  if (Array.isArray(condition)) return condition;
  return condition === undefined || isRange(condition) ? [] : [condition];
}

function flip(name, value) {
  const before = chosen(read().where[name]);
  const after = before.includes(value) ? before.filter((one) => one !== value) : [...before, value];
  set(name, after.length ? after : undefined);
}

/** Bring controls and chips in line with the conditions. */
export function drawFilters(where) {
  for (const field of $("columns").children) {
    const condition = where[field.dataset.column];
    const values = chosen(condition).map((value) => JSON.stringify(value));
    const bounds = isRange(condition) ? condition : {};
    for (const one of field.querySelectorAll("button")) one.setAttribute("aria-pressed", values.includes(one.dataset.value));
    for (const one of field.querySelectorAll("input")) one.value = bounds[one.dataset.bound] ?? "";
  }
  const chips = Object.entries(where).flatMap(([name, condition]) =>
    isRange(condition)
      ? [chip(`${name} ${spoken(condition)}`, () => set(name, undefined))]
      : chosen(condition).map((value) => chip(`${name}: ${shown(value)}`, () => flip(name, value))),
  );
  const clear = el("button", { type: "button", class: "quiet", onclick: () => go({ where: {} }) }, "Clear all");
  if (chips.length > 1) chips.push(el("li", {}, clear));
  $("chips").replaceChildren(...chips);
}

function chip(text, remove) {
  const given = { type: "button", class: "chip", "aria-label": `Take off ${text}`, onclick: remove };
  return el("li", {}, el("button", given, text, icon("close")));
}

const shown = (value) => (value === null ? "none" : String(value));

function spoken(condition) {
  const words = { gte: "from", lte: "to", gt: "above", lt: "below", ne: "not", not: "not" };
  return Object.entries(condition).map(([name, value]) => `${words[name] ?? name} ${shown(value)}`).join(" ");
}
