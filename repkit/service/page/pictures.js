// Pictures by id. With a key they are fetched, as an <img> cannot send one; without, the browser loads them lazily.

import { ask, hasKey } from "/static/api.js";
import { el } from "/static/dom.js";

const TINY = 64; // pixels; below this a picture is scaled up in squares, so that its pixels can be told apart
const KEPT = 400;
const addresses = new Map(); // path -> object URL, oldest first

const nearView = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      nearView.unobserve(target);
      const { path } = target.dataset;
      const show = (url) => target.dataset.path === path && (target.src = url); // it may have to show another by now
      if (path) fetched(path).then(show, () => target.dispatchEvent(new Event("error")));
    }
  },
  { rootMargin: "400px" },
);

/** Show the picture of an item in an <img>, its longer side at most `side` pixels. */
export function showPicture(image, id, side = 256) {
  image.dataset.path = `/v1/thumbnails?id=${encodeURIComponent(id)}&side=${side}`;
  image.decoding = "async";
  if (hasKey()) return nearView.observe(image);
  image.loading = "lazy";
  image.src = image.dataset.path;
}

/** Show a picture that is here already, or none for null. */
export function showLocal(image, url) {
  delete image.dataset.path;
  if (url === null) image.removeAttribute("src");
  else image.src = url;
}

/** Make an <img> that is marked by class when its picture is tiny or missing, for the style sheet. */
export function pictureElement(given = {}) {
  const image = el("img", { alt: "", ...given });
  image.addEventListener("load", () => {
    const tiny = image.naturalWidth < TINY && image.naturalHeight < TINY;
    image.classList.toggle("tiny", tiny);
    image.classList.remove("missing");
  });
  image.addEventListener("error", () => image.classList.add("missing"));
  return image;
}

async function fetched(path) {
  if (!addresses.has(path)) {
    const content = await (await ask(path)).blob();
    addresses.set(path, URL.createObjectURL(content));
    if (addresses.size > KEPT) {
      const [oldest, url] = addresses.entries().next().value;
      addresses.delete(oldest);
      URL.revokeObjectURL(url);
    }
  }
  return addresses.get(path);
}
