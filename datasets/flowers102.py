"""Oxford 102 Flowers (Nilsback and Zisserman 2008)."""

from pathlib import Path

import numpy as np

from repkit.datasets.layout import check_split, find_folder, present
from repkit.datasets.matlab import read_mat
from repkit.datasets.samples import Samples

# By the numbers in imagelabels.mat, from 1.
CLASSES = tuple(
    (
        "pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon "
        "orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, "
        "yellow iris, globe-flower, purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire "
        "lily, pincushion flower, fritillary, red ginger, grape hyacinth, corn poppy, prince of wales feathers, "
        "stemless gentian, artichoke, sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine "
        "sea holly, ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton daisy, "
        "daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup, oxeye daisy, common "
        "dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange "
        "dahlia, pink-yellow dahlia?, cautleya spicata, japanese anemone, black-eyed susan, silverbush, californian "
        "poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose, "
        "thorn apple, morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus, "
        "columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball "
        "moss, foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, "
        "blackberry lily"
    ).split(", ")
)
_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


def read_flowers102(root: str | Path, split: str = "train") -> Samples:
    """The images of flowers-102 (train, val, test), in the order of setid.mat; root has jpg/ and the two .mat files.

    Raises FileNotFoundError for what is not there, ValueError for damaged lists.
    """
    check_split(split, _SPLITS, "Flowers102")
    folder = find_folder(root, "Flowers102", ["jpg", "imagelabels.mat", "setid.mat"], ["flowers-102"])
    numbers = _vector(folder / "setid.mat", _SPLITS[split])
    labels = _vector(folder / "imagelabels.mat", "labels")
    if numbers.min() < 1 or numbers.max() > len(labels):
        raise ValueError(f"{folder} has {len(labels)} labels, and none for image {numbers.max()}; unpack it again")
    paths = [folder / f"jpg/image_{number:05d}.jpg" for number in numbers]
    found = labels[numbers - 1] - 1
    return Samples(CLASSES, present(paths, folder / "setid.mat"), found, split=split, root=folder)


def _vector(path: Path, name: str) -> np.ndarray:
    return read_mat(path, name, lambda found: np.ravel(found[name]).astype(np.int64))
