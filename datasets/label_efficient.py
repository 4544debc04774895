"""The sets of a few labelled images of Baranchuk et al. 2022 (label-efficient segmentation with diffusion models)."""

from functools import partial
from pathlib import Path

from repkit.datasets.layout import check_split, find_folder, pictures, present
from repkit.datasets.masks import IGNORE, read_mask
from repkit.datasets.samples import Samples

# Part names follow the name of what they are part of after "/".
CLASSES = {
    "bedroom_28": "bed, bed/footboard, bed/headboard, bed/side rail, carpet, ceiling, chandelier or ceiling fan blade, "
    "curtain, cushion, floor, table, table/top, picture or mirror, pillow, lamp/column, lamp/shade, wall, window, "
    "curtain rod, window/frame, chair, picture or mirror/frame, plinth, door or door frame, pouf, wardrobe, plant, "
    "table staff",
    "ffhq_34": "background, head, head/cheek, head/chin, head/ear, head/ear/helix, head/ear/lobule, "
    "head/eye/bottom lid, head/eye/eyelashes, head/eye/iris, head/eye/pupil, head/eye/sclera, head/eye/tear duct, "
    "head/eye/top lid, head/eyebrow, head/forehead, head/frown, head/hair, head/hair/sideburns, head/jaw, "
    "head/moustache, head/mouth/inferior lip, head/mouth/oral commissure, head/mouth/superior lip, head/mouth/teeth, "
    "head/neck, head/nose, head/nose/ala of nose, head/nose/bridge, head/nose/nose tip, head/nose/nostril, "
    "head/philtrum, head/temple, head/wrinkles",
    "cat_15": "background, back, belly, chest, leg, paw, head, ear, eye, mouth, tongue, nose, tail, whiskers, neck",
    "horse_21": "background, person, back, barrel, bridle, chest, ear, eye, forelock, head, hoof, leg, mane, muzzle, "
    "neck, nostril, tail, thigh, saddle, shoulder, leg protection",
    "celeba_19": "background, cloth, right earring, eyeglasses, hair, hat, left brow, left ear, left eye, lower lip, "
    "mouth, neck, necklace, nose, right brow, right ear, right eye, skin, upper lip",
    "ade_bedroom_30": "wall, bed, floor, table, lamp, ceiling, painting, windowpane, pillow, curtain, cushion, door, "
    "chair, cabinet, chest, mirror, rug, armchair, book, sconce, plant, wardrobe, clock, light, flower, vase, fan, "
    "box, shelf, television",
}


def read_label_efficient(root: str | Path, split: str = "train", *, name: str) -> Samples:
    """The images of <name>/real/<split> (train, test) and their masks, name.npy beside name.png, by name.

    root: the folder of all sets, or that of this one. name: bedroom_28, ffhq_34, cat_15, horse_21, celeba_19 or
    ade_bedroom_30; background counts as a class but in bedroom_28, where it is IGNORE. Masks of another size than
    their image's are resized to it by nearest neighbour, as the protocol does. Raises ValueError for another name,
    FileNotFoundError for what is not there.
    """
    check_split(split, ("train", "test"), name)
    if name not in CLASSES:
        raise ValueError(f"no set {name!r}; have {', '.join(CLASSES)}")
    folder = find_folder(root, name, [f"real/{split}"], [name, f"datasets/{name}"])
    images = pictures(folder / "real" / split)
    classes = tuple(CLASSES[name].split(", "))
    first = 1 if name == "bedroom_28" else 0
    values = {value: value - first for value in range(first, first + len(classes))} | {IGNORE: IGNORE}
    return Samples(
        classes,
        tuple(images),
        masks=present([path.with_suffix(".npy") for path in images], folder),
        read_mask=partial(read_mask, classes={0: IGNORE} | values),
        nearest=True,
        split=split,
        root=folder,
    )
