"""Mask transfer: the mask of one image carried to many others by the likeness of their features."""

from pathlib import Path

import pyarrow as pa

from repkit.images import decode
from repkit.matching.propagation import check_rule, propagate_labels
from repkit.tasks.correspondence import Correspondence, Seen
from repkit.tasks.mask_cells import labelled, to_pixels
from repkit.tasks.mask_files import Index, read_mask_of
from repkit.tasks.mask_folder import (
    Masks,
    Progress,
    check_names,
    file_hash,
    kept,
    look,
    mask_path,
    settings_of,
    write_mask,
)


def transfer_masks(
    image: Path,
    mask: Path,
    targets: pa.Table,
    correspondence: Correspondence,
    out: Path,
    *,
    top_k: int = 10,
    temperature: float = 0.1,
    label: str | None = None,
    progress: Progress | None = None,
) -> Masks:
    """Masks of the targets, as `list_images` lists them, from that of one image; each has its own image's size.

    A target's cell gets the mean, weighted by softmax(cosine / temperature), of the labels of the image's `top_k` cells
    that are most like it, and a pixel the label with the largest share there. label: fills the templates of what the
    networks are told, for all images alike.

    Masks that are there already stay: killed at any moment, the same call goes on from there, to the same bytes.
    Raises ValueError for a mask of another size than its image or without objects, and for a folder of other settings.
    """
    correspondence = correspondence.replaced(flip=False)
    check_rule(top_k, temperature)
    index, labels = read_mask_of(image, mask)
    check_names(targets, mask, out)
    rule = {"task": "transfer", "top_k": top_k, "temperature": temperature, "label": label}
    hashes = {"source": file_hash(image), "mask": file_hash(mask)}
    source = correspondence.see([decode(image)], label)[0]
    failures, tell = dict[str, str](), progress or (lambda *_: None)
    with kept(out, settings_of(correspondence, targets, **rule, **hashes)):
        ids, paths = targets["id"].to_pylist(), targets["path"].to_pylist()
        left = [(name, path) for name, path in zip(ids, paths, strict=True) if not mask_path(out, name).exists()]
        tell(len(ids) - len(left), len(ids), 0)
        for done, (name, path) in enumerate(left, len(ids) - len(left) + 1):
            if isinstance(target := look(path, correspondence, label), str):
                failures[name] = target
            else:
                found = carried(source, index, target, correspondence, top_k=top_k, temperature=temperature)
                write_mask(out, name, found, labels)
            tell(done, len(ids), len(failures))
    return Masks(out, labels, [name for name in ids if name not in failures], failures)


def carried(
    source: Seen, index: Index, target: Seen, correspondence: Correspondence, *, top_k: int, temperature: float
) -> Index:
    """The label number of every pixel of the target, given those of the source."""
    one, other = correspondence.fuse(source, target)
    context = [labelled(one, index, int(index.max()) + 1, correspondence)]
    shares = propagate_labels(other, context, top_k=top_k, temperature=temperature)
    return to_pixels(shares, target.size, correspondence)
