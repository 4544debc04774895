// The query: a file that is chosen, dropped or pasted, or a picture of the index.

import { COUNTS, go } from "/static/address.js";
import { $ } from "/static/dom.js";
import { pictureElement, showLocal, showPicture } from "/static/pictures.js";

const COMPARES = "Compares the query with every vector.";
const preview = pictureElement({ hidden: true });
const uploads = new Map(); // token in the address -> {file, url}; gone after a reload, as files are not in addresses

/** The file behind a token of the address, or undefined. */
export const uploaded = (token) => uploads.get(token);

export function makeQuery() {
  $("k").replaceChildren(...COUNTS.map((count) => new Option(count, count)));
  $("k").addEventListener("change", () => go({ k: Number($("k").value) }));
  $("exact").addEventListener("change", () => go({ exact: $("exact").checked }));
  $("clear").addEventListener("click", () => {
    go({ id: null, upload: null, compare: null });
    $("file").focus();
  });
  $("file").addEventListener("change", () => {
    take($("file").files);
    $("file").value = ""; // so that the same file can be chosen again
  });
  $("drop-label").append(preview);
  addEventListener("paste", (event) => take(event.clipboardData?.files));
  acceptDrops();
}

function acceptDrops() {
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!carries(event)) return;
    event.preventDefault(); // or the browser would open the file
    $("drop").classList.toggle("over", !$("file").disabled);
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && $("drop").classList.remove("over"));
  addEventListener("drop", (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    $("drop").classList.remove("over");
    take(event.dataTransfer.files);
  });
}

function take(files) {
  if (!files?.length || $("file").disabled) return;
  const token = crypto.getRandomValues(new Uint32Array(1))[0].toString(36);
  uploads.set(token, { file: files[0], url: URL.createObjectURL(files[0]) });
  go({ id: null, upload: token, compare: null, at: null });
}

/** Show what is asked for; `flat`: every search is exact anyway; `pictured`: items may have pictures. */
export function drawQuery({ id, upload, k, exact }, { flat, pictured }) {
  const own = uploads.get(upload);
  const some = id !== null || own !== undefined;
  $("chosen").hidden = !some;
  preview.hidden = !some || !pictured;
  $("drop").classList.toggle("full", !preview.hidden);
  const shown = pictured ? (id ?? own?.url ?? "") : "";
  if (preview.dataset.shown !== shown) {
    preview.dataset.shown = shown;
    if (shown === "") showLocal(preview, null);
    else if (id !== null) showPicture(preview, id);
    else showLocal(preview, own.url);
  }
  $("chosen-name").textContent = id ?? own?.file.name ?? "";
  $("k").value = k;
  $("exact").checked = exact || flat;
  $("exact").disabled = flat;
  $("exact-note").textContent = flat ? "This index is flat: every search is exact." : COMPARES;
}

/** Without a model there is nothing that could make a query of a file. */
export function refuseFiles(reason) {
  $("file").disabled = true;
  $("drop").classList.add("off");
  $("drop-note").textContent = reason;
}
