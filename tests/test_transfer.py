"""Mask transfer on a scene whose masks are known, the files of masks, and the command as a user meets it."""

import json

import numpy as np
import pytest
from PIL import Image

from repkit.listing import list_images
from repkit.tasks.mask_files import Labels, read_mask_of
from repkit.tasks.mask_pictures import label_colours, overlay
from repkit.tasks.transfer import transfer_masks
from tests.export_cases import hashes
from tests.mask_scenes import PALETTE, calls, greys, scene, write_palette_mask, write_video

MODEL = ["-m", "mini-unet", "-t", "up.2@50"]


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "video", 4)


def transfer(video, out, *, targets=None, correspondence=None, **options):
    listing = list_images(targets or video / "frames")
    image, mask = video / "frames" / "0.png", video / "truth" / "0.png"
    return transfer_masks(image, mask, listing, correspondence or greys((20, 24)), out, **options)


# --- what is carried


@pytest.mark.parametrize("policy", ["squash", "pad"])
def test_exact_features_carry_the_exact_mask(video, tmp_path, policy):
    size = (20, 24) if policy == "squash" else 24
    masks = transfer(video, tmp_path / "masks", correspondence=greys(size, policy), top_k=1)
    assert masks.ids == ["0.png", "1.png", "2.png", "3.png"] and not masks.failures
    for step, name in enumerate(masks.ids):
        assert np.array_equal(masks[name], scene(step)[1])


def test_a_target_of_another_size_gets_a_mask_of_its_own(video, tmp_path):
    picture, mask = scene(2)
    twice = np.repeat(np.repeat(picture, 2, 0), 2, 1)[:, :44]
    Image.fromarray(twice).save(video / "frames" / "wide.png")
    found = transfer(video, tmp_path / "masks", correspondence=greys((20, 24), "pad"))["wide.png"]
    assert found.shape == twice.shape[:2]
    expected = np.repeat(np.repeat(mask, 2, 0), 2, 1)[:, :44]
    assert (found == expected).mean() > 0.9  # resampling mixes greys at edges


def test_coarse_cells_carry_their_majority(tmp_path):
    """One cell is 4x4 pixels, each of one grey: the mask comes back as the majority of every cell."""
    greys_of = np.arange(16).reshape(4, 4) * 16 + 8
    picture = np.repeat(np.repeat(greys_of, 4, 0), 4, 1).astype(np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[0:7, 2:12] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(np.stack([picture] * 3, -1)).save(tmp_path / "in" / "a.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    listing = list_images(tmp_path / "in")
    masks = transfer_masks(
        tmp_path / "in" / "a.png", tmp_path / "mask.png", listing, greys(4), tmp_path / "out", top_k=1
    )
    share = (mask > 0).reshape(4, 4, 4, 4).mean((1, 3))
    centres = masks["a.png"][1::4, 1::4]  # beside a centre, the label of the cell decides
    assert np.array_equal(centres[share != 0.5], (share > 0.5)[share != 0.5])


def test_the_order_of_the_targets_does_not_matter(video, tmp_path):
    paths = sorted((video / "frames").iterdir())
    transfer(video, tmp_path / "one", targets=paths)
    transfer(video, tmp_path / "two", targets=paths[::-1])
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_what_is_done_is_not_done_again(video, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "masks"
    transfer(video, whole)
    transfer(video, out)
    (out / "2.png").unlink()
    (out / "1.png.part").write_bytes(b"what a kill has left")
    again = greys((20, 24))
    transfer(video, out, correspondence=again)
    assert calls(again) == 2  # the image and the one target
    (out / "1.png.part").unlink()
    assert hashes(out) == hashes(whole)


def test_other_settings_are_refused(video, tmp_path):
    transfer(video, tmp_path / "masks")
    with pytest.raises(ValueError, match=r"masks of something else.*top_k: 1 here, 10 there"):
        transfer(video, tmp_path / "masks", top_k=1)
    write_palette_mask(video / "truth" / "0.png", np.roll(scene(0)[1], 1))
    with pytest.raises(ValueError, match="mask: "):
        transfer(video, tmp_path / "masks")


def test_flips_are_not_looked_at(video, tmp_path):
    mirrored = greys((20, 24)).replaced(flip=True)
    transfer(video, tmp_path / "masks", correspondence=mirrored)
    assert calls(mirrored) == 5


def test_common_principal_components_are_those_of_each_pair(video, tmp_path):
    masks = transfer(video, tmp_path / "masks", correspondence=greys((20, 24)).replaced(pca=[15]), top_k=1)
    for step, name in enumerate(masks.ids):  # 15 of 16 one-hot directions, less their mean, lose nothing
        assert np.array_equal(masks[name], scene(step)[1])


# --- files


def test_a_palette_is_kept(video, tmp_path):
    transfer(video, tmp_path / "masks")
    with Image.open(tmp_path / "masks" / "1.png") as picture:
        assert picture.mode == "P" and bytes(picture.getpalette())[: len(PALETTE)] == PALETTE
        assert np.array_equal(np.asarray(picture), scene(1)[1])


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB"])
def test_every_kind_of_mask_comes_back_as_it_is(tmp_path, mode, rng):
    shape = (6, 9)
    values = {
        "1": rng.integers(0, 2, shape).astype(bool),
        "L": rng.choice([0, 7, 255], shape).astype(np.uint8),
        "I;16": rng.choice([0, 300, 65535], shape).astype(np.uint16),
        "RGB": rng.choice([0, 128, 255], (*shape, 3)).astype(np.uint8),
    }[mode]
    Image.fromarray(values).save(tmp_path / "mask.png")
    Image.new("RGB", (9, 6)).save(tmp_path / "image.png")
    index, labels = read_mask_of(tmp_path / "image.png", tmp_path / "mask.png")
    assert index.max() == len(labels) - 1
    (tmp_path / "again.png").write_bytes(labels.encode(index))
    with Image.open(tmp_path / "again.png") as one, Image.open(tmp_path / "mask.png") as other:
        assert one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


def test_transparent_pixels_are_background(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[...] = 255, 0, 0, 0
    pixels[1, 1, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    index, labels = read_mask_of(tmp_path / "image.png", tmp_path / "mask.png")
    assert [labels.name(number) for number in labels.objects] == ["#ff0000"]
    assert index.sum() == 1 and index[1, 1] == 1


def test_overlays_colour_the_objects_only():
    image = np.full((2, 2, 3), 100, np.uint8)
    index = np.array([[0, 1], [2, 0]])
    labels = Labels((0, 1, 2), "P", PALETTE)
    assert label_colours(labels).tolist() == [[0, 0, 0], [200, 30, 30], [20, 180, 90]]
    assert overlay(image, index, labels).tolist() == [[[100] * 3, [150, 65, 65]], [[60, 140, 95], [100] * 3]]
    assert len(np.unique(label_colours(Labels(tuple(range(9)), "L")), axis=0)) == 9


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((20, 24), np.uint8), "has only one label, 0; give a mask with objects"),
        (np.eye(20, 25, dtype=np.uint8), "has 25x20 pixels, but .* 24x20; give one of its size"),
        (np.arange(20 * 24, dtype=np.uint16).reshape(20, 24), "has 480 different values, more than the 256 labels"),
        (
            (np.arange(20 * 24, dtype=np.uint16) % 65).astype(np.uint8).reshape(20, 24),
            "has 65 values of grey; a mask has",
        ),
        (
            np.stack([np.arange(480) % 213] * 3, -1).astype(np.uint8).reshape(20, 24, 3),
            "has 213 values of grey; a mask",
        ),
        (b"no picture", "cannot read .* as a mask"),
    ],
)
def test_what_is_no_mask_is_refused(tmp_path, mask, words):
    Image.fromarray(scene(0)[0]).save(tmp_path / "image.png")
    if isinstance(mask, bytes):
        (tmp_path / "mask.png").write_bytes(mask)
    else:
        Image.fromarray(mask).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=words):
        read_mask_of(tmp_path / "image.png", tmp_path / "mask.png")


def test_as_many_greys_as_are_allowed_are_labels(tmp_path):
    Image.new("RGB", (24, 20)).save(tmp_path / "image.png")
    for count, more in ((64, {}), (200, {"most_greys": 200})):
        Image.fromarray((np.arange(480) % count).astype(np.uint8).reshape(20, 24)).save(tmp_path / "mask.png")
        assert len(read_mask_of(tmp_path / "image.png", tmp_path / "mask.png", **more)[1]) == count


def test_names_that_would_meet_are_refused(video, tmp_path):
    picture = Image.fromarray(scene(0)[0])
    picture.save(video / "frames" / "1.jpg")
    with pytest.raises(ValueError, match=r"1.png and 1.jpg would both be .*1.png; rename one"):
        transfer(video, tmp_path / "masks")
    (video / "frames" / "1.jpg").rename(video / "frames" / "overlay.jpg")
    with pytest.raises(ValueError, match=r"overlay.jpg and the picture of all masks"):
        transfer(video, tmp_path / "masks")


# --- the command


def test_the_command(repkit, video, tmp_path):
    (video / "frames" / "broken.png").write_text("no picture")
    out = tmp_path / "masks"
    image, mask = video / "frames" / "0.png", video / "truth" / "0.png"
    command = ["transfer", image, video / "frames", "--mask", mask, "-o", out, *MODEL, "--size", 32, "--json"]
    code, printed, err = repkit(*command)
    assert code == 3
    assert json.loads(printed) == {
        "masks": 4,
        "failed": 1,
        "objects": ["1", "2"],
        "out": str(out),
        "overlay": str(out / "overlay.png"),
    }
    assert "1 of 5 images failed" in err and "broken.png: not a PNG" in err
    with Image.open(out / "0.png") as same:  # the image itself: all that differs is near edges
        assert (np.asarray(same) == scene(0)[1]).mean() > 0.95
    before = hashes(out)
    assert repkit(*command)[0] == 3
    assert hashes(out) == before


def test_mistakes_are_told_before_a_model_is_loaded(repkit, video, tmp_path):
    image, mask, frames = video / "frames" / "0.png", video / "truth" / "0.png", video / "frames"
    given = ["transfer", image, frames, "-m", "no-such-model"]
    for more, words in (
        (["--mask", mask, "-o", frames / "masks"], "lies in"),
        (["--mask", frames / "1.png", "-o", tmp_path / "o"], "is among the images"),
        (["--mask", mask, "-o", tmp_path / "o", "--temperature", 0], "temperature=0"),
        (["--mask", tmp_path / "none.png", "-o", tmp_path / "o"], "No such file"),
        (["--mask", mask, "-o", tmp_path / "o", "--prompt", "a {0}"], "--prompt 'a {0}' has a field {0}"),
    ):
        code, printed, err = repkit(*given, *more)
        assert (code, printed) == (2, "") and words in err and "Traceback" not in err
        assert len(err.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    code, _, err = repkit("transfer", image, tmp_path / "empty", "--mask", mask, "-o", tmp_path / "o", *MODEL)
    assert code == 2 and "no image in" in err
    assert not (tmp_path / "o").exists()
