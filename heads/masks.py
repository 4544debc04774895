"""Masks scored: how well found regions agree with true ones."""

import numpy as np
from jaxtyping import Float, Int


def region_similarity(
    found: Int[np.ndarray, "H W"], truth: Int[np.ndarray, "_H _W"], count: int
) -> Float[np.ndarray, " count"]:
    """The intersection over union of each label 0 ... count - 1, in [0, 1]: the J of DAVIS (Perazzi et al. 2016).

    1 where neither mask has the label, as in DAVIS's own evaluation. Raises ValueError for masks of different sizes.
    """
    if found.shape != truth.shape:
        raise ValueError(f"a mask {found.shape} for a truth {truth.shape}; give both in one size")
    scores = np.ones(count)
    for label in range(count):
        both, either = (found == label) & (truth == label), (found == label) | (truth == label)
        if either.any():
            scores[label] = both.sum() / either.sum()
    return scores
