"""Scores of matching images with captions: text, image and group (Thrush et al. 2022), and what guessing reaches."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

SCORES = ("text", "image", "group")


def picks_right(scores: Float[np.ndarray, "n k"], right: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether each row's right candidate scores strictly higher than all others; a tie for the first place fails."""
    own = np.take_along_axis(scores, right[:, None], axis=1)
    others = np.arange(scores.shape[1]) != right[:, None]
    return ((own > scores) | ~others).all(axis=1)


def matched(scores: Float[np.ndarray, "i c"], right: Sequence[int | None]) -> dict[str, bool]:
    """Which of text, image and group are right, of those that the example asks; higher scores fit better.

    right: the caption of each image, None for an image without one. text: every such image prefers its caption, asked
    with several captions. image: every such caption prefers its image, asked with several images. group: both.
    """
    images = np.array([image for image, caption in enumerate(right) if caption is not None])
    captions = np.array([caption for caption in right if caption is not None])
    found = {}
    if scores.shape[1] > 1:
        found["text"] = bool(picks_right(scores[images], captions).all())
    if scores.shape[0] > 1:
        found["image"] = bool(picks_right(scores.T[captions], images).all())
    return found | ({"group": all(found.values())} if len(found) == 2 else {})


def chance(images: int, captions: int, asked: int) -> dict[str, float]:
    """What scores without any information reach, by name; `asked`: images that have a caption.

    The group score's is given for two images with their two captions only.
    """
    found = {}
    if captions > 1:
        found["text"] = captions**-asked
    if images > 1:
        found["image"] = images**-asked
    if images == captions == asked == 2:
        found["group"] = 1 / 6  # of the 24 orders of four scores, those four in which both right ones come first
    return found


def evidence(
    errors: Float[np.ndarray, "i c"], null_errors: Float[np.ndarray, " i"] | None = None
) -> Float[np.ndarray, "i c"]:
    """How well each caption explains each image: higher is better.

    errors: what a conditional denoiser leaves, on the scale of -log p(image | caption). null_errors: the same without a
    caption, -log p(image). Without them, captions of one image can be compared, but an image that is likely anyway
    beats others under any caption; taking its own likelihood off makes images comparable.
    """
    return -errors if null_errors is None else null_errors[:, None] - errors
