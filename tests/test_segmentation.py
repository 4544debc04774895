"""`repkit segment`: from pictures or a store, and a few masks, to masks, scores and pictures, and on after a kill."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from repkit.datasets.fashion_mnist import load
from repkit.extractors import DiffusionExtractor
from repkit.heads.dense_training import DenseRule
from repkit.heads.miou import IGNORE
from repkit.heads.pixel_training import PixelRule
from repkit.images import Resize
from repkit.listing import list_images
from repkit.tasks.mask_files import Labels
from repkit.tasks.segment import segment
from repkit.tasks.segment_scores import report
from repkit.tasks.segment_source import Pictures
from repkit.tasks.segment_supervised import Linear, Pixels
from repkit.tasks.segment_truth import Truth, find_masks, in_frame, read_labels
from repkit.tasks.segment_unsupervised import Attention, Kmeans, Ncut
from tests.export_cases import hashes
from tests.mask_scenes import Greys, scene

SIZE = (24, 20)  # width, height
MODEL = ["-m", "mini-unet", "-t", "down.*,up.0@25"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Six pictures whose objects have greys of their own; `few` has the masks of two, `all` those of all."""
    root = tmp_path_factory.mktemp("scenes")
    for step in range(6):
        picture, mask = scene(step)
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(picture).save(root / "images" / f"{step}.png")
        mask = mask * 7
        for name in ("few", "all") if step < 2 else ("all",):
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(mask).save(root / name / f"{step}.png")
    return root


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Eight bundled pictures of clothes, enlarged, and where they are not black; `few` has three of the masks."""
    root = tmp_path_factory.mktemp("clothes")
    for number, image in enumerate(load("test")[0][:8]):
        image = np.asarray(Image.fromarray(image).resize((40, 36), Image.Resampling.BILINEAR))
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        for name in ("few", "all") if number < 3 else ("all",):
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(np.where(image > 20, 255, 0).astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def pictures(root, size=SIZE[::-1], policy="squash"):
    return Pictures(list_images(root / "images"), Greys(size, policy))


def truth(root, name, source):
    rows = find_masks(root / name, source.ids)
    return Truth(root / name, read_labels([root / name / f"{row}.png" for row in rows]), rows)


# --- what is found


@pytest.mark.parametrize("policy", ["squash", "pad"])
@pytest.mark.parametrize(
    "method", [Linear(DenseRule(steps=60, lr=0.1)), Pixels(PixelRule(steps=150), networks=3)], ids=["linear", "mlp"]
)
def test_objects_that_the_features_tell_apart_are_found(scenes, tmp_path, method, policy):
    source = pictures(scenes, SIZE[::-1] if policy == "squash" else 24, policy)
    few = truth(scenes, "few", source)
    found = segment(source, method, tmp_path / "out", truth=few)
    told = report(source, found, method.settings, ["ground", "one", "two"], truth(scenes, "all", source))
    assert found.masks.ids == [f"{step}.png" for step in range(6)] and found.trained == [0, 1]
    assert told["scored"] == 4 and told["trained on"] == ["0.png", "1.png"]  # what trained is not scored
    assert told["scores"]["data set"]["mIoU"] > 0.98
    with Image.open(tmp_path / "out" / "masks" / "3.png") as picture:
        assert picture.mode == "P" and set(np.asarray(picture).ravel().tolist()) == {0, 7, 14}
        assert (np.asarray(picture) == scene(3)[1] * 7).mean() > 0.98
    assert ("uncertainty" in told) == (method.name == "mlp")


def test_uncertainty_is_kept_to_16_bits(scenes, tmp_path):
    source, method = pictures(scenes), Pixels(PixelRule(steps=20), networks=4)
    found = segment(source, method, tmp_path, truth=truth(scenes, "few", source))
    maps, size = source.maps(2)
    uncertain = method.uncertain(source, maps, source.places(size))[1]
    assert np.abs(found.uncertainty("2.png") - uncertain.numpy()).max() < 1e-5
    told = report(source, found, method.settings, ["a", "b", "c"])
    largest = uncertain.flatten().topk(uncertain.numel() // 10).values.mean().item()
    assert told["uncertainty"]["images"]["2.png"] == pytest.approx(largest, abs=1e-5)
    assert told["steps"] == [20] * 4 and "scores" not in told


def test_clusters_are_scored_both_ways(scenes, tmp_path):
    source, method = pictures(scenes), Kmeans(15)
    found = segment(source, method, tmp_path)
    told = report(source, found, method.settings, ["a", "b", "c"], truth(scenes, "all", source))
    assert set(told["scores"]) == {"matched per image", "matched per data set"} and told["scored"] == 6
    each, whole = (told["scores"][name]["mIoU"] for name in ("matched per image", "matched per data set"))
    assert 0 < whole < 1 and 0 < each < 1
    with Image.open(tmp_path / "masks" / "0.png") as picture:
        # One cluster a grey: pixels of one grey have one label, of two greys two.
        pairs = {*zip(np.ravel(scene(0)[0][..., 0]).tolist(), np.asarray(picture).ravel().tolist(), strict=True)}
    assert len(pairs) == len({one for one, _ in pairs}) == len({two for _, two in pairs}) and min(pairs)[1] >= 1


def test_cuts_and_attention_are_those_of_one_image(tmp_path):
    """Two flat halves, features that are one-hot in their grey: two segments, whatever the other images are."""
    (tmp_path / "images").mkdir()
    picture = np.full((12, 16, 3), 24, np.uint8)
    picture[:, 8:] = 200
    Image.fromarray(picture).save(tmp_path / "images" / "0.png")
    found = segment(pictures(tmp_path, (12, 16)), Ncut(), tmp_path / "out")
    mask = found.masks["0.png"]
    assert len(np.unique(mask[:, :8])) == len(np.unique(mask[:, 8:])) == 1 and mask[0, 0] != mask[0, 15]


def test_attention_needs_attention_maps(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"grey has maps of shape \(16, 20, 24\); .*self.map"):
        segment(pictures(scenes), Attention(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_attention_of_a_real_model(clothes, tmp_path):
    from repkit.zoo import load as load_model

    extractor = DiffusionExtractor(
        load_model("mini-unet"), "up.0.attn.*.self.map,mid.attn.0.self.map@25", resize=Resize(32, "squash")
    )
    source = Pictures(list_images(sorted((clothes / "images").iterdir())[:2]), extractor)
    found = segment(source, Attention(threshold=0.2), tmp_path)
    assert not found.masks.failures
    assert found.masks["1.png"].shape == (36, 40) and len(np.unique(found.masks["1.png"])) > 1


def test_pixels_are_where_the_maps_have_them(scenes):
    """The place of each pixel, against torch's own enlargement of the maps to the image, and a padding by hand."""
    source = pictures(scenes, (10, 12))
    maps = source.maps(0)[0]["grey"]
    expected = F.interpolate(maps[None], SIZE[::-1], mode="bilinear", align_corners=False)
    found = F.grid_sample(maps[None], source.places(SIZE)[None], padding_mode="border", align_corners=False)
    assert torch.allclose(found, expected, atol=1e-5)
    padded = pictures(scenes, 48, "pad").places(SIZE)  # 24 x 20 becomes 48 x 40, with 4 rows above and below
    assert torch.allclose(padded[0, 0], torch.tensor([0.5 / 24 * 2 - 1, (4 + 1) / 48 * 2 - 1]))


def test_masks_are_taken_to_the_frame(scenes):
    mask = scene(0)[1].astype(np.int64)
    assert np.array_equal(in_frame(pictures(scenes), mask), mask)
    twice = in_frame(pictures(scenes, (40, 48)), mask).numpy()
    assert np.array_equal(twice, np.repeat(np.repeat(mask, 2, 0), 2, 1))
    padded = in_frame(pictures(scenes, 24, "pad"), mask).numpy()
    assert (padded[:2] == IGNORE).all() and (padded[-2:] == IGNORE).all() and np.array_equal(padded[2:-2], mask)


def test_a_crop_that_loses_pixels_is_refused(scenes, tmp_path):
    found = segment(pictures(scenes, 20, "crop"), Ncut(), tmp_path)
    assert not found.masks.ids and "24x20 pixels were cropped to 20x20" in found.masks.failures["0.png"]


# --- labels


def write_values(path, *values, mode=np.uint8):
    Image.fromarray(np.array([values], mode)).save(path)
    return path


def test_labels_are_those_of_all_masks(tmp_path):
    one, two = write_values(tmp_path / "1.png", 0, 3, 255), write_values(tmp_path / "2.png", 9, 9, 0)
    assert read_labels([one, two]).values == (0, 3, 9)
    assert read_labels([one, two], ignore=-1).values == (0, 3, 9, 255)
    assert read_labels([one, two], ignore=0).values == (3, 9, 255)
    white = write_values(tmp_path / "3.png", 0, 255, 255)
    labels = read_labels([white])
    assert labels.values == (0, 255) and labels.mode == "P"
    with pytest.raises(ValueError, match="have 1 labels in all"):
        read_labels([white], ignore=255)
    Image.new("RGB", (3, 1), "red").save(tmp_path / "4.png")
    with pytest.raises(ValueError, match="masks of colours and of numbers"):
        read_labels([one, tmp_path / "4.png"])


def test_ignored_pixels_are_255_and_others_numbers(tmp_path):
    write_values(tmp_path / "1.png", 0, 3, 255, 9)
    found = Truth(tmp_path, Labels((0, 3, 9), "P"), [0])
    assert found.read("1.jpg", (4, 1)).tolist() == [[0, 1, IGNORE, 2]]
    with pytest.raises(ValueError, match="has 4x1 pixels, but 1.jpg 5x1"):
        found.read("1.jpg", (5, 1))


# --- going on


def test_what_is_done_is_not_done_again(scenes, tmp_path):
    def run(out):
        source = pictures(scenes)
        found = segment(source, Pixels(PixelRule(steps=20), networks=2), out, truth=truth(scenes, "few", source))
        return found, source.extractor.calls

    assert run(tmp_path / "whole")[1] == 9  # two to learn from, the first of them for where it is, and all six
    run(tmp_path / "out")
    for name in ("masks/2.png", "masks/4.png", "uncertainty/4.png"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "masks" / "1.png.part").write_bytes(b"what a kill has left")
    found, calls = run(tmp_path / "out")
    assert calls == 2 and found.learned["steps"].tolist() == [20, 20]
    (tmp_path / "out" / "masks" / "1.png.part").unlink()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_other_settings_and_masks_are_refused(scenes, tmp_path):
    source = pictures(scenes)
    few, rule = truth(scenes, "few", source), DenseRule(steps=1)
    segment(source, Linear(rule), tmp_path, truth=few)
    with pytest.raises(ValueError, match=r"masks of something else.*seed: 1 here, 0 there"):
        segment(source, Linear(rule, seed=1), tmp_path, truth=few)
    with pytest.raises(ValueError, match="masks: "):
        segment(source, Linear(rule), tmp_path, truth=Truth(few.folder, few.labels, [0]))
    with pytest.raises(ValueError, match="the head linear learns from masks"):
        segment(source, Linear(rule), tmp_path)


def test_an_image_that_cannot_be_read_has_no_mask(scenes, tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(scene(0)[0]).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "broken.png").write_text("no picture")
    found = segment(pictures(tmp_path), Kmeans(4), tmp_path / "out")
    assert found.masks.ids == ["0.png"] and "not a PNG" in found.masks.failures["broken.png"]


# --- the command


def test_the_command_learns_and_scores(repkit, clothes, tmp_path):
    out = tmp_path / "out"
    given = ["segment", clothes / "images", "--head", "linear", *MODEL, "--masks", clothes / "few", "--steps", 60]
    given += ["--test-masks", clothes / "all", "--classes", "ground,thing", "-o", out, "--json"]
    code, printed, err = repkit(*given)
    told = json.loads(printed)
    assert code == 0 and told["scored"] == 5 and told["classes"] == ["ground", "thing"]
    assert told["scores"]["data set"]["mIoU"] > 0.8  # on clothes, a threshold would do
    assert "data set: mIoU" in err
    assert json.loads((out / "results.json").read_text()) == {
        name: value for name, value in told.items() if name not in ("out", "overlay")
    }
    with Image.open(out / "overlay.png") as picture:
        assert picture.size == (5 * 132 + 4, 3 * 132 + 4)
    before = hashes(out)
    assert repkit(*given)[0] == 0 and hashes(out) == before


def test_one_segment_everywhere_is_told_with_what_to_do(repkit, clothes, tmp_path):
    given = ["segment", clothes / "images", "-m", "mini-unet", "-t", "mid.attn.0.self.map@25", "--head", "attention"]
    code, _, err = repkit(*given, "-o", tmp_path / "one", "--threshold", 2)
    assert code == 0 and "every image is one segment; a lower --threshold than 2 makes more" in err
    code, _, err = repkit(*given, "-o", tmp_path / "more", "--threshold", 0.05)
    assert code == 0 and "every image is one segment" not in err


def test_the_command_takes_a_store(repkit, clothes, tmp_path):
    export = ["extract", clothes / "images", *MODEL, "--pool", "none", "--size", 32, "--resize", "squash"]
    assert repkit(*export, "-o", tmp_path / "store")[0] == 0
    common = ["--head", "kmeans", "--clusters", 3, "--test-masks", clothes / "all"]
    assert repkit("segment", tmp_path / "store", *common, "-o", tmp_path / "one")[0] == 0
    assert repkit("segment", clothes / "images", *MODEL, *common, "-o", tmp_path / "two")[0] == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert set(one["scores"]) == {"matched per image", "matched per data set"}
    for name in one["scores"]:  # a batch of eight and batches of one differ by rounding
        assert one["scores"][name]["mIoU"] == pytest.approx(two["scores"][name]["mIoU"], abs=0.02)


def test_mistakes_are_told_before_a_model_is_loaded(repkit, clothes, tmp_path):
    images, out = clothes / "images", tmp_path / "out"
    (tmp_path / "empty").mkdir()
    few = ["--masks", clothes / "few"]
    for arguments, words in (
        ([images, "--head", "mlp"], "learns from masks; give --masks"),
        ([images, "--head", "ncut", *few], "use --test-masks"),
        ([images, "--head", "kmeans"], "give --clusters"),
        ([images, "--head", "fpn", *few, "--classes", "a,b,c"], "3 classes for 2 labels, 0, 255"),
        ([images, "--head", "fpn", "--masks", tmp_path / "empty"], "has no mask of an image; looked for"),
        ([images, "--head", "fpn", "--masks", images], "lies in"),
        ([images, "--head", "fpn", *few, "--test-masks", clothes / "few"], "score by others than are learned"),
    ):
        code, printed, err = repkit("segment", *arguments, "-o", out, "-m", "no-such-model")
        assert (code, printed) == (2, "") and words in err and len(err.splitlines()) == 1, err
    code, _, err = repkit(
        "segment", images, "--head", "mlp", "--masks", tmp_path / "none", "-o", out, "-m", "no-such-model"
    )
    assert code == 2 and f"no folder {tmp_path / 'none'}" in err
    code, _, err = repkit("segment", images, "--head", "ncut", "-o", out)
    assert code == 2 and "no model for" in err and not out.exists()
