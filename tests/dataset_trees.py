"""Small trees in the published layouts of data sets, and what was written: per split, images in the reader's order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (20, 16)  # width, height


@dataclass(frozen=True)
class Tree:
    """A data set's own folder, and of each split the grey value of each image with its label or mask."""

    root: Path
    truth: Mapping[str, Sequence[tuple[int, Any]]]


def write_image(path: Path, grey: int, size: tuple[int, int] = SIZE) -> Path:
    """A picture of one grey, which JPEG keeps exactly, so that it says which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


def write_text(path: Path, lines: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_mask(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def mask_values(number: int, values: Sequence[int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Every one of `values` at random places, other ones for another number."""
    count = size[0] * size[1]
    placed = np.resize(np.array(values), count)
    return np.random.default_rng(number).permutation(placed).reshape(size[1], size[0])


def write_image_folder(root: Path, splits: Sequence[str] = ("train", "val", "test"), per_class: int = 2) -> Tree:
    """root/<split>/<ant|bee>/<number>.jpg."""
    truth, grey = {}, 0
    for split in splits:
        truth[split] = [(grey + number, number // per_class) for number in range(2 * per_class)]
        for value, label in truth[split]:
            write_image(root / split / ("ant", "bee")[label] / f"{value:03d}.jpg", value)
        grey += 2 * per_class
    return Tree(root, truth)


def write_imagenet(root: Path, wnids: Sequence[str] = ("n01440764", "n01443537", "n01601694")) -> Tree:
    """root/<train|val>/<wnid>/*.JPEG: two training and one validation image of each class."""
    truth: dict[str, list[tuple[int, Any]]] = {"train": [], "val": []}
    for label, name in enumerate(wnids):
        for number in range(2):
            write_image(root / "train" / name / f"{name}_{number}.JPEG", 10 * label + number)
            truth["train"].append((10 * label + number, label))
        write_image(root / "val" / name / f"ILSVRC2012_val_{label:08d}.JPEG", 100 + label)
        truth["val"].append((100 + label, label))
    return Tree(root, truth)


def write_tiny_imagenet(folder: Path) -> Tree:
    """tiny-imagenet-200 with three classes; wnids.txt is not sorted, as the published one."""
    root, names = folder / "tiny-imagenet-200", ("n02124075", "n01443537", "n07875152")
    write_text(root / "wnids.txt", names)
    train, val, rows = [], [], []
    for label, name in enumerate(sorted(names)):
        for number in range(2):
            write_image(root / f"train/{name}/images/{name}_{number}.JPEG", 10 * label + number, (64, 64))
            train.append((10 * label + number, label))
        write_image(root / f"val/images/val_{2 - label}.JPEG", 102 - label, (64, 64))
        rows.append(f"val_{2 - label}.JPEG\t{name}\t0\t0\t63\t63")
        val.append((102 - label, label))
    write_text(root / "val/val_annotations.txt", rows)
    return Tree(root, {"train": train, "val": val})


def write_cifar(folder: Path, classes: int, per_file: int = 3) -> Tree:
    """The binary version of CIFAR-10 or CIFAR-100: here the truth is the pixels `[32 32 3]` and (fine) label."""
    rng = np.random.default_rng(classes)
    root = folder / {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[classes]
    files = {10: [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], 100: ["train", "test"]}[classes]
    names = {10: {"batches.meta.txt": 10}, 100: {"fine_label_names.txt": 100, "coarse_label_names.txt": 20}}[classes]
    for name, count in names.items():
        write_text(root / name, [*(f"{name[:4]} {number}" for number in range(count)), ""])
    truth: dict[str, list[Any]] = {"train": [], "test": []}
    for name in files:
        content = b""
        for _ in range(per_file):
            image, label = rng.integers(0, 256, (32, 32, 3), np.uint8), int(rng.integers(classes))
            content += bytes([label] if classes == 10 else [label // 5, label])
            content += b"".join(image[..., channel].tobytes() for channel in range(3))
            truth["test" if name.startswith("test") else "train"].append((image, label))
        (root / f"{name}.bin").write_bytes(content)
    return Tree(root, truth)


def write_cub(folder: Path) -> Tree:
    """CUB_200_2011 with two species of three images, of which every third is for testing."""
    root, species = folder / "CUB_200_2011", ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    truth: dict[str, list[tuple[int, Any]]] = {"train": [], "test": []}
    lists: dict[str, list[str]] = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    for number in range(6):
        name, training = f"{species[number // 3]}/{number}.jpg", number % 3 < 2
        write_image(root / "images" / name, 10 * number)
        truth["train" if training else "test"].append((10 * number, number // 3))
        lists["images"].append(f"{number + 1} {name}")
        lists["image_class_labels"].append(f"{number + 1} {number // 3 + 1}")
        lists["train_test_split"].append(f"{number + 1} {int(training)}")
    for name, lines in lists.items():
        write_text(root / f"{name}.txt", lines)
    write_text(root / "classes.txt", [f"{place} {name}" for place, name in enumerate(species, 1)])
    return Tree(root, truth)


def write_flowers(folder: Path) -> Tree:
    """flowers-102 with six images, two a split."""
    root, labels = folder / "flowers-102", [77, 1, 102, 3, 3, 50]
    for number in range(1, 7):
        write_image(root / f"jpg/image_{number:05d}.jpg", 10 * number)
    splits = {"train": ("trnid", [5, 1]), "val": ("valid", [2, 6]), "test": ("tstid", [3, 4])}
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(root / "setid.mat", {key: np.array([numbers], np.uint16) for key, numbers in splits.values()})
    truth = {split: [(10 * n, labels[n - 1] - 1) for n in numbers] for split, (_, numbers) in splits.items()}
    return Tree(root, truth)


def write_aircraft(folder: Path) -> Tree:
    """fgvc-aircraft-2013b with three variants of two families and makers; labels are those of the variants."""
    root = folder / "fgvc-aircraft-2013b"
    levels = {
        "variant": ("variants", ["747-100", "747-200", "F/A-18"]),
        "family": ("families", ["Boeing 747", "F/A-18"]),
        "manufacturer": ("manufacturers", ["Boeing", "McDonnell Douglas"]),
    }
    names = {"train": ["0000001", "0000002"], "val": ["0000003"], "test": ["0000004", "0000005"]}
    names["trainval"] = names["train"] + names["val"]
    for number in range(1, 6):
        write_image(root / f"data/images/{number:07d}.jpg", 10 * number)
    for level, (plural, classes) in levels.items():
        write_text(root / f"data/{plural}.txt", classes)
        for split, listed in names.items():
            rows = [f"{name} {classes[_aircraft_label(name, level)]}" for name in listed]
            write_text(root / f"data/images_{level}_{split}.txt", rows)
    truth = {
        split: [(10 * int(name), _aircraft_label(name, "variant")) for name in listed]
        for split, listed in names.items()
    }
    return Tree(root, truth)


def _aircraft_label(name: str, level: str) -> int:
    variant = int(name) % 3
    return variant if level == "variant" else max(variant - 1, 0)


def write_food(folder: Path) -> Tree:
    """food-101 with two dishes; the lists name the second one first."""
    root, truth = folder / "food-101", {}
    for start, split in ((0, "train"), (100, "test")):
        listed = {name: [f"{name}/{start + 10 * place + n}" for n in range(2)] for place, name in
                  ((1, "baby_back_ribs"), (0, "apple_pie"))}  # fmt: skip
        for name in [name for names in listed.values() for name in names]:
            write_image(root / f"images/{name}.jpg", int(name.split("/")[1]))
        (root / "meta").mkdir(exist_ok=True)
        (root / f"meta/{split}.json").write_text(json.dumps(listed))
        truth[split] = [(start + 10 * place + n, place) for place in (1, 0) for n in range(2)]
    return Tree(root, truth)


def write_pets(folder: Path) -> Tree:
    """oxford-iiit-pet with two breeds; of the truth, the trimap is 1 (pet), 2 (background), 3 (border)."""
    root, truth = folder / "oxford-iiit-pet", {}
    for start, split in ((0, "trainval"), (100, "test")):
        rows = []
        for number, (name, label) in enumerate((("Abyssinian_7", 0), ("american_bulldog_9", 1), ("Abyssinian_11", 0))):
            image = f"{name}{start}"
            write_image(root / f"images/{image}.jpg", start + number)
            write_mask(root / f"annotations/trimaps/{image}.png", mask_values(start + number, (1, 2, 3)))
            rows.append(f"{image} {label + 1} {label + 1} {number + 1}")
            truth.setdefault(split, []).append((start + number, label))
        write_text(root / f"annotations/{split}.txt", rows)
    return Tree(root, truth)


def write_medmnist(path: Path, *, rgb: bool = True, labels: int = 1) -> Tree:
    """A .npz of four images a split: the truth is pixels and label."""
    rng, arrays, truth = np.random.default_rng(3), {}, {}
    for split in ("train", "val", "test"):
        images = rng.integers(0, 256, (4, 28, 28, 3) if rgb else (4, 28, 28), np.uint8)
        given = np.resize(np.arange(3, dtype=np.uint8), (4, labels))
        arrays |= {f"{split}_images": images, f"{split}_labels": given}
        truth[split] = [(image, int(label[0])) for image, label in zip(images, given, strict=True)]
    np.savez(path, **arrays)
    return Tree(path, truth)
