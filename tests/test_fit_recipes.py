"""Every recipe, built whole and run for two steps on a small tree in its data set's layout."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from repkit.recipes import neighbours as neighbours_module
from repkit.recipes import pixels as pixels_module
from repkit.recipes.extraction import Extraction
from repkit.recipes.fit import main, parse
from repkit.recipes.head_options import HeadOptions
from repkit.recipes.image_data import ImageData
from repkit.taps import parse_taps
from repkit.zoo import outline
from tests import dataset_trees, mask_trees
from tests.fit_cases import CPU, clothes

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("pretrain"))
SHORT = [*CPU, "--trainer.max_steps=2", "--trainer.val_check_interval=1", "--data.batch=4", "--data.workers=0"]
MINI = ["--data.extraction.model=mini-unet", "--data.extraction.taps=['mid@50']", "--data.extraction.load={}"]
NARROW = ["--model.head.width=16", "--model.head.heads=2"]
DIT = ["--data.extraction.model=mini-dit", "--data.extraction.taps=['block.3@120']", "--data.extraction.load={}"]


def scenes(root: Path) -> Any:
    return mask_trees.write_image_masks(root)


def imagenet(folder: Path) -> Any:
    return dataset_trees.write_imagenet(folder / "imagenet")


# What each recipe is run on, and what stands in for the published network.
CASES: dict[str, tuple[Callable[[Path], Any], Sequence[str]]] = {
    "probe": (lambda folder: clothes(folder / "clothes"), ["--data.name=folder"]),
    "segmentation": (scenes, []),
    "diffssl-linear": (imagenet, MINI),
    "diffssl-attention": (imagenet, [*MINI, *NARROW]),
    "diffssl-difformer": (imagenet, [*MINI, "--data.extraction.taps=['mid,up.0@50,90']", *NARROW]),
    "diffssl-linear-fgvc": (dataset_trees.write_cub, MINI),
    "diffssl-attention-fgvc": (dataset_trees.write_cub, [*MINI, *NARROW]),
    "ddae-cifar10": (
        lambda folder: dataset_trees.write_cifar(folder, 10),
        [*MINI, "--data.extraction.taps=['up.*@10']"],
    ),
    "ddae-dit-cifar10": (lambda folder: dataset_trees.write_cifar(folder, 10), DIT),
    "ddae-dit-tiny-imagenet": (dataset_trees.write_tiny_imagenet, DIT),
    "repa-linear": (imagenet, DIT),
}


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_runs(name, tmp_path):
    write, options = CASES[name]
    tree = write(tmp_path)
    root, out = tree if isinstance(tree, Path) else tree.root, tmp_path / "out"
    main([str(RECIPES / f"{name}.yaml"), *SHORT, f"--data.root={root}", *options, f"--out={out}"])
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 2 and results["validation"]
    assert all(np.isfinite(value) for one in results["validation"] for key, value in one.items() if key != "head")


@pytest.fixture
def vit(tmp_path) -> str:
    """A vision transformer of 12 blocks in a folder."""
    torch.manual_seed(0)
    config = {"patch_size": 14, "embed_dim": 16, "depth": 12, "num_heads": 2, "img_size": 28, "num_classes": 0}
    model = timm.create_model("vit_base_patch14_dinov2", pretrained=False, **config)
    return saved_vit(model, config, tmp_path / "vit")


def saved_vit(model: Any, config: dict[str, Any], folder: Path) -> str:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    described = {
        "architecture": "vit_base_patch14_dinov2",
        "num_classes": 0,
        "pretrained_cfg": dict(model.pretrained_cfg) | {"num_classes": 0, "input_size": [3, 28, 28]},
        "model_args": {key: value for key, value in config.items() if key != "num_classes"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    return f"timm:{folder}"


def test_the_linear_evaluation_of_dinov2_trains_its_52_heads(vit, tmp_path):
    tree, out = imagenet(tmp_path), tmp_path / "out"
    small = [f"--data.root={tree.root}", f"--data.extraction.model={vit}", "--data.extraction.size=28"]
    main([str(RECIPES / "dinov2-linear.yaml"), *SHORT, *small, f"--out={out}"])
    results = json.loads((out / "results.json").read_text())
    assert len(results["validation"]) == 52
    names = {one["head"].rpartition(", ")[0] for one in results["validation"]}
    assert names == {"last", "last, mean", "last 4", "last 4, mean"}
    heads = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    widths = {tuple(value.shape) for name, value in heads.items() if name.endswith("weight")}
    assert widths == {(3, 16), (3, 32), (3, 64), (3, 80)}


def test_neighbours_are_those_of_a_loop_over_images(vit, tmp_path, capsys):
    tree, out = imagenet(tmp_path), tmp_path / "out"
    small = [f"--data.root={tree.root}", f"--data.extraction.model={vit}", "--data.extraction.size=28"]
    main([str(RECIPES / "dinov2-knn.yaml"), *small, "--ks=[1, 3]", f"--out={out}"])
    assert "k = 1" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    extract = Extraction(model=vit, taps=["cls"], size=28).build("cpu")
    vectors = {}
    for part in ("train", "val"):
        pictures = [Image.open(path).convert("RGB") for path in sorted((tree.root / part).rglob("*.JPEG"))]
        middles = [picture.resize((28, 28), Image.Resampling.BICUBIC, middle(*picture.size)) for picture in pictures]
        rows = extract(middles)["cls"].flatten(1)
        vectors[part] = rows / rows.norm(dim=1, keepdim=True)
    nearest = (vectors["val"] @ vectors["train"].T).argmax(1) // 2  # two training images a class
    assert found["accuracy"]["1"] == pytest.approx(float((nearest == torch.arange(3)).float().mean()))
    assert found["images"] == {"train": 6, "validation": 3}


def test_neighbours_that_were_killed_go_on_from_their_vectors(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours_module, "BATCHES", 1)
    tree, out = imagenet(tmp_path), tmp_path / "out"
    small = [f"--data.root={tree.root}", f"--data.extraction.model={vit}", "--data.extraction.size=28"]
    command = ["dinov2-knn", *small, "--data.batch=4", "--ks=[1, 3]", f"--out={out}"]
    main(command)
    results, kept = (out / "results.json").read_bytes(), out / "train-00001.npz"
    assert len(np.load(kept)["rows"]) == 2  # of six images
    for gone in (out / "results.json", kept):
        gone.unlink()
    seen, features = list[list[int]](), ImageData.features

    def watched(data, part, rows):
        seen.append(list(rows))
        return features(data, part, rows)

    monkeypatch.setattr(ImageData, "features", watched)
    main(command)
    assert seen == [[4, 5]] and (out / "results.json").read_bytes() == results
    with pytest.raises(ValueError, match="has neighbours of something else.*pool: max here, mean there"):
        main([*command, "--pool=max"])


def middle(width: int, height: int) -> tuple[float, float, float, float]:
    side = 0.875 * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


@pytest.mark.parametrize("name", ["cat_15", "horse_21"])
def test_pixel_classifiers_learn_from_the_published_layout(name, tmp_path, capsys):
    classes = {"cat_15": 15, "horse_21": 21}[name]
    tree = mask_trees.write_label_efficient(tmp_path, name, (*range(classes), 255))
    options = [f"--data.root={tree.root.parent}", f"--data.options={{name: {name}}}", *MINI]
    short = ["--networks=2", "--rule.steps=3", "--small=2", f"--out={tmp_path / 'out'}"]
    main([str(RECIPES / "ddpm-segmentation.yaml"), *options, *short])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["steps"] == [3, 3] and len(results["IoU"]) == classes and 0 <= results["mIoU"] <= 1
    assert "counted as published" in capsys.readouterr().out


def test_pixel_classifiers_are_trained_once(tmp_path, monkeypatch):
    tree = mask_trees.write_label_efficient(tmp_path, "cat_15", (*range(15), 255))
    options = [f"--data.root={tree.root.parent}", "--data.options={name: cat_15}", *MINI]
    command = ["ddpm-segmentation", *options, "--networks=2", "--small=2", f"--out={tmp_path / 'out'}"]
    main([*command, "--rule.steps=3"])
    results = (tmp_path / "out" / "results.json").read_bytes()
    (tmp_path / "out" / "results.json").unlink()  # killed while it scored
    monkeypatch.setattr(pixels_module, "train_pixels", None)
    main([*command, "--rule.steps=3"])
    assert (tmp_path / "out" / "results.json").read_bytes() == results
    with pytest.raises(ValueError, match="has pixel classifiers of something else"):
        main([*command, "--rule.steps=4"])


def test_a_probe_of_a_store_runs(tmp_path):
    from repkit import export
    from repkit.tasks.building import build_extractor

    store = tmp_path / "features"
    export(clothes(tmp_path / "clothes", 3, 1), build_extractor("mini-unet", ["mid,up.0@50"]), store)
    out = tmp_path / "out"
    short = [*CPU, "--trainer.max_steps=2", "--data.batch=4"]
    main([str(RECIPES / "probe-store.yaml"), *short, f"--data.store={store}", f"--out={out}"])
    assert len(json.loads((out / "results.json").read_text())["validation"]) == 10


def test_every_recipe_has_a_run():
    assert {*CASES, "dinov2-linear", "dinov2-knn", "ddpm-segmentation", "probe-store"} == set(NAMES)


@pytest.mark.parametrize(
    ("name", "alias", "count"),
    [
        ("diffssl-linear", "adm-256-uncond", 1),
        ("diffssl-difformer", "adm-256-uncond", 9),
        ("ddae-dit-cifar10", "dit-xl-2-256", 1),
        ("repa-linear", "repa-sit-xl-2", 1),
        ("ddpm-segmentation", "adm-256-uncond", 15),
    ],
)
def test_the_taps_of_a_recipe_are_in_the_published_network(name, alias, count):
    backbone = outline(alias)
    taps = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["data"]["init_args"]["extraction"]["taps"]
    found = parse_taps(taps, list(backbone.points), model=alias)
    assert len(found) == count
    if name == "ddpm-segmentation":
        shapes = backbone.shapes([tap.block for tap in found], 256, 256)
        assert sum(shapes[tap.block][0] for tap in found) == 8448


@pytest.mark.parametrize(("name", "count"), [("diffssl-attention", 27_786_216), ("diffssl-difformer", 31_802_344)])
def test_the_heads_have_as_many_parameters_as_published(name, count):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    backbone = outline("adm-256-uncond")
    taps = parse_taps(recipe["data"]["init_args"]["extraction"]["taps"], list(backbone.points), model="adm")
    shapes = backbone.shapes([tap.block for tap in taps], 256, 256)
    options = HeadOptions(**recipe["model"]["init_args"]["head"])
    with torch.device("meta"):
        head = options.build({str(tap): shapes[tap.block] for tap in taps}, 1000, 0)
    assert sum(parameter.numel() for parameter in head.parameters()) == count


def test_published_schedules():
    """Rates as torch's own schedulers give them, stepped once an epoch."""
    for name, make in {
        "diffssl-linear": lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, 7, 0.1),
        "ddae-cifar10": lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 15),
        "ddae-dit-cifar10": lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 30),
    }.items():
        root = ["--data.name=fashion-mnist", "--data.root=null", "--data.validation=test", "--data.workers=0"]
        cli = parse([str(RECIPES / f"{name}.yaml"), *CPU, *root])
        epochs, optimising = int(cli.datamodule.epochs), cli.model.optimising
        sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = make(sgd)
        for epoch in range(epochs):
            for step in (7 * epoch, 7 * epoch + 6):
                assert optimising.share(step, 7 * epochs) == pytest.approx(sgd.param_groups[0]["lr"], abs=1e-9)
            sgd.step()
            schedule.step()
        assert cli.trainer.max_steps == round(epochs * 4000 / cli.datamodule.batch)
