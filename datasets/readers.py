"""The reader of every labelled data set by its name: `READERS["cub"](root, "train")` -> Samples."""

from collections.abc import Callable

from repkit.datasets.ade20k import read_ade20k
from repkit.datasets.aircraft import read_aircraft
from repkit.datasets.cifar import read_cifar10, read_cifar100
from repkit.datasets.cityscapes import read_cityscapes
from repkit.datasets.coco_stuff import read_coco_stuff
from repkit.datasets.cub import read_cub
from repkit.datasets.fashion_mnist import read_fashion_mnist
from repkit.datasets.flowers102 import read_flowers102
from repkit.datasets.food101 import read_food101
from repkit.datasets.image_folder import read_image_folder
from repkit.datasets.image_masks import read_image_masks
from repkit.datasets.imagenet import read_imagenet, read_tiny_imagenet
from repkit.datasets.label_efficient import read_label_efficient
from repkit.datasets.medmnist import read_medmnist
from repkit.datasets.pets import read_pet_masks, read_pets
from repkit.datasets.samples import Samples
from repkit.datasets.voc import read_voc

# Labels first, then masks. All take root and split, and what else their own docstring says.
READERS: dict[str, Callable[..., Samples]] = {
    "folder": read_image_folder,
    "imagenet": read_imagenet,
    "tiny-imagenet": read_tiny_imagenet,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "cub": read_cub,
    "flowers102": read_flowers102,
    "aircraft": read_aircraft,
    "food101": read_food101,
    "pets": read_pets,
    "medmnist": read_medmnist,
    "fashion-mnist": read_fashion_mnist,
    "image-masks": read_image_masks,
    "voc": read_voc,
    "ade20k": read_ade20k,
    "cityscapes": read_cityscapes,
    "coco-stuff": read_coco_stuff,
    "pet-masks": read_pet_masks,
    "label-efficient": read_label_efficient,
}
