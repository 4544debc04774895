"""ADE20K's 150 classes of scene parsing (Zhou et al. 2017)."""

from functools import partial
from pathlib import Path

from repkit.datasets.layout import check_split, find_folder, paired, pictures
from repkit.datasets.masks import IGNORE, read_mask
from repkit.datasets.samples import Samples

# In the order of objectInfo150.txt, the first of each one's names.
CLASSES = tuple(
    """wall building sky floor tree ceiling road bed windowpane grass cabinet sidewalk person earth door table mountain
    plant curtain chair car water painting sofa shelf house sea mirror rug field armchair seat fence desk rock wardrobe
    lamp bathtub railing cushion base box column signboard chest_of_drawers counter sand sink skyscraper fireplace
    refrigerator grandstand path stairs runway case pool_table pillow screen_door stairway river bridge bookcase blind
    coffee_table toilet flower book hill bench countertop stove palm kitchen_island computer swivel_chair boat bar
    arcade_machine hovel bus towel light truck tower chandelier awning streetlight booth television airplane dirt_track
    apparel pole land bannister escalator ottoman bottle buffet poster stage van ship fountain conveyer_belt canopy
    washer plaything swimming_pool stool barrel basket waterfall tent bag minibike cradle oven ball food step tank
    trade_name microwave pot animal bicycle lake dishwasher screen blanket sculpture hood sconce vase traffic_light tray
    ashcan fan pier crt_screen plate monitor bulletin_board shower radiator glass clock flag""".replace(
        "\n", " "
    ).split()
)
_FOLDERS = {"train": "training", "val": "validation"}
# 0 in a file is everything else.
_VALUES = {0: IGNORE} | {place + 1: place for place in range(len(CLASSES))}


def read_ade20k(root: str | Path, split: str = "train") -> Samples:
    """The images of ADEChallengeData2016 (train, val) and their masks of 150 classes, by name.

    Raises FileNotFoundError for what is not there, ValueError for images without a mask and masks without an image.
    """
    check_split(split, _FOLDERS, "ADE20K")
    needed = [f"images/{_FOLDERS[split]}", f"annotations/{_FOLDERS[split]}"]
    folder = find_folder(root, "ADE20K", needed, ["ADEChallengeData2016"])
    images, masks = (pictures(folder / name) for name in needed)
    return Samples(
        tuple(name.replace("_", " ") for name in CLASSES),
        tuple(images),
        masks=paired(images, masks),
        read_mask=partial(read_mask, classes=_VALUES),
        split=split,
        root=folder,
    )
