// What is shown, kept in the part of the address after "#": a view can be bookmarked, and back and forward work.

export const COUNTS = [10, 20, 50, 100];
const DEFAULT_COUNT = 20;

/** The view of an address; what is missing or makes no sense there is as at the start. */
export function read(hash = location.hash) {
  const given = new URLSearchParams(hash.slice(1));
  const count = Number(given.get("k"));
  return {
    id: given.get("id"),
    upload: given.get("upload"),
    k: COUNTS.includes(count) ? count : DEFAULT_COUNT,
    exact: given.get("exact") === "1",
    where: conditions(given.get("where")),
    compare: given.get("compare"),
    at: fractions(given.get("at")),
    swapped: given.get("swapped") === "1",
  };
}

export function write(view) {
  const kept = new URLSearchParams();
  for (const name of ["id", "upload", "compare"]) if (view[name] !== null) kept.set(name, view[name]);
  if (view.k !== DEFAULT_COUNT) kept.set("k", view.k);
  if (view.exact) kept.set("exact", "1");
  if (Object.keys(view.where).length) kept.set("where", JSON.stringify(view.where));
  if (view.compare !== null && view.at) kept.set("at", view.at.map((part) => part.toFixed(4)).join(","));
  if (view.compare !== null && view.swapped) kept.set("swapped", "1");
  return `#${kept}`;
}

/** Change some of the view and show it; `replace` keeps it out of the history, as for every move of a cross. */
export function go(change, { replace = false } = {}) {
  const hash = write({ ...read(), ...change });
  if (hash === write(read())) return;
  history[replace ? "replaceState" : "pushState"](null, "", hash);
  dispatchEvent(new Event("viewchange"));
}

export function onView(listener) {
  for (const name of ["viewchange", "popstate"]) addEventListener(name, () => listener(read()));
}

function conditions(text) {
  try {
    const found = JSON.parse(text ?? "{}");
    return found !== null && typeof found === "object" && !Array.isArray(found) ? found : {};
  } catch {
    return {};
  }
}

function fractions(text) {
  const parts = (text ?? "").split(",").map(Number);
  return parts.length === 2 && parts.every((part) => part >= 0 && part <= 1) && text !== "," ? parts : null;
}
