"""Instance swapping: a masked object of one image put in the place of another image's, by dense correspondence."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from scipy.ndimage import distance_transform_edt

from repkit.matching.propagation import propagate_labels
from repkit.tasks.alignment import Framed, align
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.mask_cells import labelled, to_pixels
from repkit.tasks.match import pixel_flow
from repkit.tasks.match_pictures import pulled

Mask = Bool[np.ndarray, "_H _W"]
TOP_K, TEMPERATURE = 10, 0.1  # of the transfer of a mask


@dataclass(frozen=True, eq=False)
class Swapped:
    """The target with the source's object, its share of the source in every pixel, and the region that it is in."""

    picture: Image.Image
    share: Float[np.ndarray, "H W"]
    region: Mask
    mirrored: bool


def swap(
    source: Image.Image,
    target: Image.Image,
    mask: Mask,
    correspondence: Correspondence,
    *,
    target_mask: Mask | None = None,
    label: str | None = None,
    feather: float = 3.0,
    smooth: int = 1,
) -> Swapped:
    """The source's object, in `mask`, put in the place of the target's: in `target_mask`, or where the mask transfers.

    Every pixel of the region gets the colour of the pixel of the object that it corresponds to, so the target's outline
    and pose stay. feather: over how many pixels within the outline the target fades. smooth: as of `pixel_flow`.
    Raises ValueError for masks of other sizes than their images, empty ones, and where the transferred one is empty.
    """
    one, other = align(correspondence, *correspondence.see([source, target], label))
    object_ = one.within(torch.from_numpy(mask))
    region = transferred(one, other, mask) if target_mask is None else target_mask
    if not region.any():
        raise ValueError("no place of the target is like the masked object; give the target's own mask")
    flow = pixel_flow(other.within(torch.from_numpy(region)), object_, smooth=smooth)
    share = feathered(region, feather)
    return Swapped(blended(pulled(spilled(source, mask), flow), target, share), share, region, one.mirrored)


def transferred(source: Framed, target: Framed, mask: Mask) -> Mask:
    """Where the target's object is, by the labels of the source's cells that are most like its own."""
    index = (mask[:, ::-1] if source.mirrored else mask).astype(np.int64)
    context = [labelled(source.map, index, 2, source.correspondence)]
    shares = propagate_labels(target.map, context, top_k=TOP_K, temperature=TEMPERATURE)
    return to_pixels(shares, target.size, target.correspondence) == 1


def spilled(picture: Image.Image, mask: Mask) -> Image.Image:
    """The picture in which every pixel outside the mask has the colour of the nearest one inside.

    So nothing of the background comes along where a place between pixels is interpolated.
    """
    rows, columns = distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return Image.fromarray(np.asarray(picture)[rows, columns])


def feathered(region: Mask, width: float) -> Float[np.ndarray, "H W"]:
    """1 in the region from `width` pixels within its outline on, falling to 0 outside; the image's edge is no outline.

    Raises ValueError for a negative width.
    """
    if not width >= 0:
        raise ValueError(f"feather={width}; give 0 pixels or more")
    if region.all() or width == 0:
        return region.astype(np.float64)
    return np.minimum(distance_transform_edt(region) / (width + 1), 1.0)


def blended(inside: Image.Image, outside: Image.Image, share: Float[np.ndarray, "H W"]) -> Image.Image:
    """The mean of two pictures of one size, weighted by the share of the first."""
    values = share[..., None] * np.asarray(inside) + (1 - share[..., None]) * np.asarray(outside)
    return Image.fromarray(np.rint(values).astype(np.uint8))
