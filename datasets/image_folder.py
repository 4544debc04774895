"""Folders of images in class folders, with or without splits above them, as `repkit extract` lists them."""

from pathlib import Path

from repkit.datasets.layout import numbered
from repkit.datasets.samples import Samples
from repkit.listing import SPLITS, list_images


def read_image_folder(root: str | Path, split: str | None = None) -> Samples:
    """The images of root/<split>/<class>/, or with split None all of root/<class>/, in the order of their paths.

    Classes are the folders' names, sorted, of all splits; train may be called training, and so on (`list_images`).
    Raises ValueError where there is no image, no such split, or images that lie in no class folder.
    """
    table = list_images(root)
    rows = [row for row in table.to_pylist() if split is None or row["split"] == SPLITS.get(split.lower(), split)]
    if not rows:
        have = sorted({row["split"] for row in table.to_pylist() if row["split"]})
        looked = f"have {', '.join(have)}" if have else "looked for folders train, val and test with all images below"
        raise ValueError(f"no split {split!r} in {root}; {looked}")
    if alone := [row["id"] for row in rows if row["label"] is None]:
        some = ", ".join(alone[:3])
        raise ValueError(f"{len(alone)} of {len(rows)} images of {root} lie in no class folder: {some}")
    classes = tuple(sorted({label for label in table["label"].to_pylist() if label is not None}))
    return Samples(
        classes,
        tuple(Path(row["path"]) for row in rows),
        numbered([row["label"] for row in rows], classes, Path(root)),
        split=split,
        root=Path(root),
    )
