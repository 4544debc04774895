"""Masks scored against true ones in files."""

from pathlib import Path

import numpy as np

from repkit.heads.masks import region_similarity
from repkit.tasks.mask_files import read_mask_as
from repkit.tasks.mask_folder import Masks, mask_path


def score_masks(masks: Masks, truth: Path) -> tuple[dict[str, float], int]:
    """J (`region_similarity`) of each object, averaged over the images with a true mask, and how many these are.

    truth: a folder of masks with the images' names and the same values for labels; images without one do not count,
    nor does the first, which a video is given the mask of (DAVIS's own evaluation leaves out the last one as well).
    Raises ValueError where no image has a true mask, or none of these has one of the objects.
    """
    scores, known = [], False
    for name in masks.ids[1:]:
        if (path := mask_path(truth, name)).exists():
            found, true = masks[name], read_mask_as(path, masks.labels)
            if found.shape != true.shape:
                (h, w), (true_h, true_w) = found.shape, true.shape
                raise ValueError(f"{path} has {true_w}x{true_h} pixels, but {name} {w}x{h}, as its image has")
            known = known or bool(np.isin(true, masks.labels.objects).any())
            scores.append(region_similarity(found, true, len(masks.labels)))
    if not known:
        names = ", ".join(masks.labels.name(number) for number in masks.labels.objects)
        have = f"{len(scores)} masks for images after the first, none of which" if scores else "no mask that"
        raise ValueError(f"{truth} has {have} has an object of the given mask ({names}); label them as there")
    means = np.mean(scores, 0)
    return {masks.labels.name(number): float(means[number]) for number in masks.labels.objects}, len(scores)
