"""Which keypoints of SPair-71k trade places when an image is mirrored: left and right of the same part."""

from collections.abc import Mapping, Sequence

# By category, the ids of such pairs; a keypoint in none of them is on the object's middle, or like nothing opposite.
PAIRS: Mapping[str, str] = {
    "aeroplane": "4-5 6-7 8-9 10-11 12-13 14-15 16-17 18-19 20-21",
    "bicycle": "2-3 6-7 9-10",
    "bird": "1-2 4-5 7-8 10-11 12-13 14-15",
    "boat": "1-2 3-4 5-6 7-8 9-10 11-12",
    "bottle": "0-1 2-3 4-5 6-7 8-9",
    "bus": "0-1 2-3 5-6 10-20 11-21 12-22 13-23 14-24 15-25 16-17 18-19 26-27 28-29",
    "car": "0-1 2-3 6-7 10-20 11-21 12-22 13-23 14-24 15-25 16-17 18-19 26-27 28-29",
    "cat": "0-1 2-3 4-5 6-7 9-10 11-12",
    "chair": "0-1 2-3 4-5 6-7 8-9 10-11 12-13",
    "cow": "0-1 2-3 4-5 6-7 9-10 11-12 15-16 17-18 19-20",
    "dog": "0-1 2-3 4-5 9-10 11-12",
    "horse": "0-1 2-3 4-5 6-7 10-11 12-13 16-17 18-19",
    "motorbike": "0-1 2-3",
    "person": "0-1 2-3 8-9 10-11 12-13 14-15 16-17 18-19",
    "pottedplant": "0-2 4-5 6-8",
    "sheep": "0-1 2-3 4-5 6-7 9-10 11-12 15-16 17-18 19-20",
    "train": "0-1 2-3 4-5 6-7 8-9 10-11 12-13 14-15 16-17",
    "tvmonitor": "0-2 3-7 4-6 8-10 11-15 12-14",
}


def partner(category: str, names: Sequence[str]) -> list[int | None]:
    """For each keypoint of a SPair-71k pair the one in `names` that it trades places with in the mirror image.

    names: the keypoints' ids, as `read_spair` has them. The result is positions in `names`, for `flip_aligned`: its own
    for a keypoint that has no partner, None where the partner is not in `names`. Ids mean other points in other data
    sets.
    Raises ValueError for a category that SPair-71k does not have.
    """
    if category not in PAIRS:
        raise ValueError(f"no category {category!r} in SPair-71k; have {', '.join(PAIRS)}")
    other = dict(pair.split("-") for pair in PAIRS[category].split())
    other |= {right: left for left, right in other.items()}
    place = {name: position for position, name in enumerate(names)}
    return [place.get(other.get(name, name)) for name in names]
