"""Clusters have no names: the assignment of clusters to classes that agrees with the truth on most pixels."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from scipy.optimize import linear_sum_assignment

from repkit.heads.miou import Counts, MeanIou, mean_iou


def class_of_clusters(counts: Counts) -> Int64[np.ndarray, " c"]:
    """The class of each cluster by the counts of `count_pixels`, each class at most once (Hungarian method).

    -1 for a cluster that is left over, or has not a pixel of the class it would get.
    """
    classes, clusters = linear_sum_assignment(counts[:-1], maximize=True)
    found = np.full(counts.shape[1], -1, np.int64)
    agrees = counts[classes, clusters] > 0
    found[clusters[agrees]] = classes[agrees]
    return found


def named(counts: Counts, classes: Int64[np.ndarray, " c"]) -> Counts:
    """The counts with a column a class, and a last one for clusters without."""
    out = np.zeros((len(counts), len(counts)), np.int64)
    np.add.at(out.T, np.where(classes < 0, len(counts) - 1, classes), counts.T)
    return out


def matched_iou(images: Sequence[Counts]) -> dict[str, MeanIou]:
    """IoU over all images' pixels, with clusters matched to classes in each image anew, and once for all images.

    The first flatters: it is told what is in every image. The second needs clusters whose numbers mean the same in all.
    """
    most = max(counts.shape[1] for counts in images)
    whole = sum(np.pad(counts, ((0, 0), (0, most - counts.shape[1]))) for counts in images)
    each = sum(named(counts, class_of_clusters(counts)) for counts in images)
    return {
        "matched per image": mean_iou(np.asarray(each)),
        "matched per data set": mean_iou(named(np.asarray(whole), class_of_clusters(np.asarray(whole)))),
    }
