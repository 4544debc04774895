"""COCO-Stuff (Caesar et al. 2018): COCO's images in 171 classes, or in the 27 groups of unsupervised papers."""

from functools import partial
from pathlib import Path

from repkit.datasets.layout import check_split, paired, pictures, present, read_lines
from repkit.datasets.masks import IGNORE, read_mask
from repkit.datasets.samples import Samples

# The groups in their usual order, 12 of things and 15 of stuff; classes with a star were never annotated.
GROUPS = {
    "electronic-things": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance-things": "microwave, oven, toaster, sink, refrigerator, blender*",
    "food-things": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture-things": "chair, couch, potted plant, bed, mirror*, dining table, window*, desk*, toilet, door*",
    "indoor-things": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush*",
    "kitchen-things": "bottle, plate*, wine glass, cup, fork, knife, spoon, bowl",
    "accessory-things": "hat*, backpack, umbrella, shoe*, eye glasses*, handbag, tie, suitcase",
    "animal-things": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "outdoor-things": "traffic light, fire hydrant, street sign*, stop sign, parking meter, bench",
    "person-things": "person",
    "sports-things": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket",
    "vehicle-things": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "ceiling-stuff": "ceiling-other, ceiling-tile",
    "floor-stuff": "carpet, floor-marble, floor-other, floor-stone, floor-tile, floor-wood",
    "food-stuff": "food-other, fruit, salad, vegetable",
    "furniture-stuff": "cabinet, counter, cupboard, desk-stuff, door-stuff, furniture-other, light, mirror-stuff, "
    "shelf, stairs, table",
    "raw-material-stuff": "cardboard, metal, paper, plastic",
    "textile-stuff": "banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, textile-other, towel",
    "wall-stuff": "wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood",
    "window-stuff": "window-blind, window-other",
    "building-stuff": "bridge, building-other, house, roof, skyscraper, tent",
    "ground-stuff": "dirt, gravel, ground-other, mud, pavement, platform, playingfield, railroad, road, sand, snow",
    "plant-stuff": "branch, bush, flower, grass, leaves, moss, plant-other, straw, tree",
    "sky-stuff": "clouds, sky-other",
    "solid-stuff": "hill, mountain, rock, solid-other, stone, wood",
    "structural-stuff": "cage, fence, net, railing, structural-other",
    "water-stuff": "fog, river, sea, water-other, waterdrops",
}
# Values in a mask: the things of these groups, one group after the other, then all stuff by name.
_THINGS = (
    *("person", "vehicle", "outdoor", "animal", "accessory", "sports"),
    *("kitchen", "food", "furniture", "electronic", "appliance", "indoor"),
)
_MASKS = ("stuffthingmaps", "stuffthingmaps_trainval2017", "annotations")


def read_coco_stuff(
    root: str | Path, split: str = "val", *, classes: int = 27, listed: str | Path | None = None
) -> Samples:
    """The images of COCO 2017 (train, val) and their masks of things and stuff, by name.

    root has <split>2017, there or in images/, and the masks as stuffthingmaps/<split>2017 (also unpacked to
    stuffthingmaps_trainval2017 or annotations). classes: 27 or 171. listed: a text file of the images to take, one a
    line, with or without suffix, in its order. Raises FileNotFoundError for what is not there, ValueError for images
    without a mask and masks without an image.
    """
    check_split(split, ("train", "val"), "COCO-Stuff")
    if classes not in (27, 171):
        raise ValueError(f"no {classes} classes of COCO-Stuff; have 27 and 171")
    part = f"{split}2017"
    images = _first(Path(root), [f"images/{part}", part])
    folder = _first(Path(root), [f"{name}/{part}" for name in _MASKS])
    if listed is None:
        found = tuple(pictures(images))
        masks = paired(found, pictures(folder))
    else:
        names = [Path(line).stem for line in read_lines(Path(listed))]
        found = present([images / f"{name}.jpg" for name in names], Path(listed))
        masks = present([folder / f"{name}.png" for name in names], Path(listed))
    names_of, values = _coarse() if classes == 27 else _fine()
    read = partial(read_mask, classes=values)
    return Samples(names_of, found, masks=masks, read_mask=read, split=split, root=Path(root))


def _first(root: Path, names: list[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    looked = f"looked for {' or '.join(names)}, and {root} lacks them all"
    raise FileNotFoundError(f"no COCO-Stuff in {root}: {looked}; give the folder that its archives were unpacked to")


def _members(group: str) -> list[str]:
    return GROUPS[group].split(", ")


def _value_names() -> list[str]:
    """The name of each value that a mask can have, 0 ... 181; IGNORE is what nobody labelled."""
    things = [name for group in _THINGS for name in _members(f"{group}-things")]
    return things + sorted(name for group in GROUPS if group.endswith("-stuff") for name in _members(group))


def _fine() -> tuple[tuple[str, ...], dict[int, int]]:
    values = _value_names()
    annotated = [name for name in values if "*" not in name]
    return tuple(annotated), {values.index(name): place for place, name in enumerate(annotated)} | {IGNORE: IGNORE}


def _coarse() -> tuple[tuple[str, ...], dict[int, int]]:
    place = {name: index for index, group in enumerate(GROUPS) for name in _members(group)}
    return tuple(GROUPS), {value: place[name] for value, name in enumerate(_value_names())} | {IGNORE: IGNORE}
