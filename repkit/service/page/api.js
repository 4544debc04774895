// The server's answers, or a Failure that says what went wrong and what to do.

const KEY = "repkit-key";

/** status 0: the server did not answer at all. wait: seconds that it asks to wait, or null. */
export class Failure extends Error {
  constructor(status, code, message, wait = null) {
    super(message);
    Object.assign(this, { status, code, wait });
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export function useKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** Ask; returns the Response. Raises Failure, also for 401, which is announced as the event "keyneeded" as well. */
export async function ask(path, { method = "GET", json, form, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const body = json === undefined ? form : JSON.stringify(json);
  let answer;
  try {
    answer = await fetch(path, { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "no_answer", "The server does not answer.");
  }
  if (answer.ok) return answer;
  const current = key === sessionStorage.getItem(KEY); // an answer to an older key says nothing of this one
  if (answer.status === 401 && current) dispatchEvent(new Event("keyneeded"));
  throw await failure(answer);
}

async function failure(answer) {
  const told = await answer.json().then((body) => body.error ?? {}, () => ({}));
  const wait = Number(answer.headers.get("Retry-After")) || null;
  return new Failure(answer.status, told.code ?? "", told.message ?? `The server answered ${answer.status}.`, wait);
}

const get = async (path, signal) => (await ask(path, { signal })).json();

export const model = () => get("/v1/model");
export const columns = async () => (await get("/v1/columns")).columns;
export const count = async () => (await get("/v1/count")).count;
/** The metadata of an item; asked for in a body, as an address cannot hold every id. */
export async function metadata(id) {
  const { items } = await (await ask("/v1/items/get", { method: "POST", json: { ids: [id] } })).json();
  return items[0]?.metadata ?? {};
}

/** Items at random. */
export async function some(where, limit, signal) {
  const asked = new URLSearchParams({ limit, order: "random" });
  if (Object.keys(where).length) asked.set("where", JSON.stringify(where));
  return (await get(`/v1/items?${asked}`, signal)).items;
}

/** Search from an id of the index or from a file. */
export async function search({ id, file, k, exact, where }, signal) {
  if (file) {
    const form = new FormData();
    form.set("file", file);
    form.set("k", k);
    form.set("exact", exact);
    if (Object.keys(where).length) form.set("where", JSON.stringify(where));
    return (await ask("/v1/search/image", { method: "POST", form, signal })).json();
  }
  const json = { id, k, exact, ...(Object.keys(where).length ? { where } : {}) };
  return (await ask("/v1/search", { method: "POST", json, signal })).json();
}

/** Where a point of one picture is in another; a picture is {id} or {file}, the point [x, y] in pixels of the source. */
export async function match(source, target, point, signal) {
  const form = new FormData();
  for (const [name, side] of [["source", source], ["target", target]]) {
    if (side.file) form.set(name, side.file);
    else form.set(`${name}_id`, side.id);
  }
  form.set("point", point.join(","));
  return (await ask("/v1/match", { method: "POST", form, signal })).json();
}
