"""Swaps of objects whose place is known, and refinement by backbones whose data are known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from repkit.cli.pairing import pairing
from repkit.cli.swap import _refiner
from repkit.dino import DinoExtractor
from repkit.tasks.refine import Refinement, refined, working_size
from repkit.tasks.swap import blended, feathered, spilled, swap
from tests import tiny, tiny_sit, tiny_vit
from tests.oracles import GaussianBackbone, class_means, noise_levels
from tests.patches import by_patches, texture

MASK = np.zeros((64, 64), bool)
MASK[17:42, 22:51] = True  # its outline runs through cells


def rgb(picture):
    return np.asarray(picture)


# --- by correspondence


@pytest.mark.parametrize("options", [{}, {"policy": "pad"}, {"flip": True}])
@pytest.mark.parametrize("target_mask", [MASK, None])
def test_an_object_in_its_own_place_changes_nothing(options, target_mask):
    one = texture(64, 64)
    found = swap(one, one, MASK, by_patches(**options), target_mask=target_mask)
    assert (rgb(found.picture) == rgb(one)).all() and not found.mirrored
    if target_mask is None:  # to about the cells that the mask covers
        assert (found.region == MASK).mean() > 0.97


def pale_copy(dx, dy, turned=False):
    """Another background, with the source's object moved and at half its contrast: for cosines the same."""
    one, other = texture(64, 64), np.array(texture(64, 64, seed=1))
    copy = np.rint(127.5 + (rgb(one)[16:40, 20:44].astype(float) - 127.5) / 2).astype(np.uint8)
    copy = copy[:, ::-1] if turned else copy
    other[16 + dy : 40 + dy, 20 + dx : 44 + dx] = copy
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 16:40, 20:44] = masks[1, 16 + dy : 40 + dy, 20 + dx : 44 + dx] = True
    return one, Image.fromarray(other), masks


@pytest.mark.parametrize("given", [True, False])
def test_an_object_comes_to_the_place_of_its_like(given):
    one, other, (mask, there) = pale_copy(12, -8)
    found = swap(one, other, mask, by_patches(), target_mask=there if given else None, feather=0.0)
    assert (found.region == there).mean() > (0.999 if given else 0.97)
    moved = np.roll(rgb(one), (-8, 12), (0, 1))
    inside = (
        (slice(8, 32), slice(32, 56)) if given else (slice(12, 24), slice(40, 52))
    )  # outlines that are found are a cell off
    assert (rgb(found.picture)[inside] == moved[inside]).all()
    assert (rgb(found.picture)[~found.region] == rgb(other)[~found.region]).all()


def test_a_mirrored_object_is_turned():
    one, other, (mask, there) = pale_copy(0, 0, turned=True)
    found = swap(one, other, mask, by_patches(flip=True), target_mask=there, feather=0.0)
    assert found.mirrored
    assert (rgb(found.picture)[there] == rgb(one)[16:40, 20:44][:, ::-1].reshape(-1, 3)).all()


def test_swaps_are_the_same_each_time():
    one, other = texture(64, 64), texture(64, 64, seed=1)
    first, second = (swap(one, other, MASK, by_patches(), target_mask=MASK) for _ in range(2))
    assert (rgb(first.picture) == rgb(second.picture)).all()


def test_masks_that_do_not_fit_are_refused():
    one = texture(64, 64)
    with pytest.raises(ValueError, match="a mask of 32x64 with 2048 pixels for an image of 64x64"):
        swap(one, one, np.ones((64, 32), bool), by_patches())
    with pytest.raises(ValueError, match="a mask of 10x64"):
        swap(one, one, MASK, by_patches(), target_mask=np.ones((64, 10), bool))
    with pytest.raises(ValueError, match="feather=-1.0"):
        swap(one, one, MASK, by_patches(), feather=-1.0)


def test_an_object_that_is_not_there_is_said():
    one, other = texture(64, 64), Image.new("RGB", (64, 64), "red")
    mask = np.zeros((64, 64), bool)
    mask[0:1, 0:1] = True
    with pytest.raises(ValueError, match="no place of the target is like the masked object"):
        swap(one, other, mask, by_patches())


def test_colours_outside_the_mask_are_those_of_the_nearest_pixel_inside():
    picture = texture(5, 6)
    mask = np.zeros((5, 6), bool)
    mask[1, 2] = mask[4, 5] = True
    found = rgb(spilled(picture, mask))
    for y in range(5):
        for x in range(6):
            first = (y - 1) ** 2 + (x - 2) ** 2 <= (y - 4) ** 2 + (x - 5) ** 2
            assert (found[y, x] == rgb(picture)[(1, 2) if first else (4, 5)]).all()


def test_the_feather_falls_in_steps_to_the_outline_and_not_at_the_edge_of_the_image():
    region = np.zeros((4, 9), bool)
    region[:, 3:] = True
    assert feathered(region, 3.0)[2].tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert (feathered(region, 0.0) == region).all() and feathered(np.ones((2, 2), bool), 3.0).tolist() == [[1, 1]] * 2


def test_a_blend_is_the_weighted_mean():
    black, white = Image.new("RGB", (3, 1)), Image.new("RGB", (3, 1), "white")
    assert rgb(blended(white, black, np.array([[0, 0.2, 1]])))[0, :, 0].tolist() == [0, 51, 255]


# --- by a diffusion model

MEANS = class_means(2, size=16, spread=0.2)
HALF = np.zeros((16, 16))
HALF[:, :8] = 1


class Known(GaussianBackbone):
    """Data that are nearly the mean of their class, made into images; keeps what it was asked."""

    def __init__(self, prediction: str = "v") -> None:
        super().__init__(prediction, MEANS, 1e-6)
        self.asked: list[tuple[float, torch.Tensor]] = []

    def denoise(self, x_t, t, condition):
        self.asked.append((float(t), x_t))
        return super().denoise(x_t, t, condition)

    def decode(self, x0):
        return ((x0 + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "edm"])
@pytest.mark.parametrize("label", [0, 1])
def test_the_region_becomes_likely_and_the_rest_stays(prediction, label):
    picture = texture(16, 16)
    found = rgb(refined(picture, HALF, Known(prediction), Refinement(0.8, 10, label)))
    mean = (MEANS[label].permute(1, 2, 0).numpy() + 1) / 2 * 255
    assert np.abs(found[:, :8] - mean[:, :8]).max() < 2
    assert (found[:, 8:] == rgb(picture)[:, 8:]).all()


def test_outside_the_region_the_picture_is_noised_to_every_level():
    picture, backbone = texture(16, 16), Known()
    refined(picture, HALF, backbone, Refinement(0.5, 4, 0))
    assert [t for t, _ in backbone.asked] == [500, 375, 250, 125]
    x0 = torch.from_numpy(rgb(picture).transpose(2, 0, 1).copy()) / 127.5 - 1
    noises = []
    for t, x_t in backbone.asked:
        alpha, sigma = noise_levels("v", torch.tensor(t))
        noises.append((x_t[0] - alpha * x0) / sigma)
    for noise in noises[1:]:
        torch.testing.assert_close(noise[:, :, 8:], noises[0][:, :, 8:], rtol=0, atol=1e-4)
        assert (noise[:, :, :8] - noises[0][:, :, :8]).abs().mean() > 0.1
    assert float(noises[0].std()) == pytest.approx(1, abs=0.1)


def test_no_strength_or_no_region_is_no_refinement():
    picture, backbone = texture(16, 16), Known()
    assert refined(picture, HALF, backbone, Refinement(0.0)) is picture
    assert refined(picture, 0 * HALF, backbone, Refinement(0.5)) is picture
    assert not backbone.asked


def test_refinement_depends_on_the_seed_and_nothing_else():
    picture, backbone = texture(16, 16), tiny.grey_unet()
    found = [rgb(refined(picture, HALF, backbone, Refinement(0.5, 3, 1, seed=seed))) for seed in (0, 0, 1)]
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()


def test_guidance_goes_beyond_the_condition():
    """Away from the other class, at half a region's cost of two forwards a step."""
    picture, backbone = texture(16, 16), tiny.grey_unet()
    plain, guided = (refined(picture, HALF, backbone, Refinement(0.5, 3, 1, guidance=g)) for g in (1.0, 3.0))
    assert (rgb(plain) != rgb(guided)).any()


def test_other_sizes_come_back_and_latents_are_refined():
    picture = texture(20, 30)
    share = np.zeros((20, 30))
    share[5:15, 5:15] = 1
    for backbone in (tiny.dit(), tiny.edm_unet()):
        found = rgb(refined(picture, share, backbone, Refinement(0.6, 2)))
        assert found.shape == (20, 30, 3)
        assert (found[share == 0] == rgb(picture)[share == 0]).all() and (found != rgb(picture)).any()


def test_the_working_size_keeps_the_area_and_the_shape():
    backbone = tiny.unet()  # 16 pixels, multiples of 2
    assert working_size(backbone, (64, 64)) == (16, 16)
    assert working_size(backbone, (400, 100)) == (8, 32)
    assert working_size(backbone, (1000, 1)) == (2, 506)
    assert working_size(tiny.dit(), (400, 100)) == (8, 8)  # square ones take their own size only


def test_what_cannot_make_images_says_so_before_any_step(monkeypatch):
    backbone = tiny_sit.svg()
    monkeypatch.setattr(backbone, "predict", None)
    with pytest.raises(ValueError, match="cannot generate images"):
        refined(texture(32, 32), np.ones((32, 32)), backbone, Refinement(0.5, 2, 0))


def test_features_of_no_diffusion_model_need_another_refiner():
    given = pairing()
    with pytest.raises(ValueError, match="give --refiner MODEL"):
        _refiner(by_patches(), None, given)
    backbone, template = _refiner(by_patches(), "mini-unet", given)
    assert (backbone.name, template) == ("mini-unet", None)


# --- the command line


@pytest.fixture
def files(tmp_path):
    texture(32, 32).save(tmp_path / "a.png")
    texture(32, 32, seed=1).save(tmp_path / "b.png")
    Image.fromarray(255 * MASK[10:42, 20:52].astype(np.uint8)).save(tmp_path / "m.png")
    return tmp_path


MINI = ["-m", "mini-unet", "-t", "up.1@50", "--seed", "3"]


def test_swap_from_the_command_line(repkit, files):
    written = {}
    runs = {"same": [], "none": ["--refine", "0"], "r1": ["--refine", "0.4"], "r2": ["--refine", "0.4"]}
    for name, more in runs.items():
        given = ["--mask", files / "m.png", "--target-mask", files / "m.png", "-o", files / "deep" / f"{name}.png"]
        code, out, err = repkit("swap", files / "a.png", files / "b.png", *given, *MINI, *more, "--steps", 3, "--json")
        assert (code, err) == (0, "mini-unet: up.1@50; 32 px, squash, 1 draw\n")
        report = json.loads(out)
        assert report == {"pixels": int(MASK.sum()), "mirrored": False, "out": str(given[-1])}
        written[name] = given[-1].read_bytes()
    assert written["same"] == written["none"] and written["r1"] == written["r2"] != written["none"]


def test_an_image_and_itself_from_the_command_line(repkit, files):
    out, masks = files / "o.png", ["--mask", files / "m.png", "--target-mask", files / "m.png"]
    code, stdout, _ = repkit("swap", files / "a.png", files / "a.png", *masks, *MINI, "-o", out)
    assert (code, stdout) == (0, f"{out}\n")
    assert (rgb(Image.open(out)) == rgb(texture(32, 32))).all()


def test_mistakes_are_one_line(repkit, files):
    Image.new("L", (5, 6)).save(files / "none.png")
    small = Image.new("L", (5, 6))
    small.putpixel((1, 1), 9)
    small.save(files / "small.png")
    (files / "broken.png").write_text("no image")
    for mask, word in (("none", "none.png"), ("small", "5x6"), ("broken", "broken.png"), ("missing", "missing.png")):
        given = ["--mask", files / f"{mask}.png", *MINI, "-o", files / "o.png"]
        code, out, err = repkit("swap", files / "a.png", files / "b.png", *given)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1 and word in err
    assert not (files / "o.png").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--refine-prompt", "a {thing}"], "--refine-prompt: 'a {thing}' has a field {thing}"),
        (["--prompt", "a {thing}", "--preset", "dift"], "--prompt 'a {thing}' has a field {thing}"),
        (["-o", "o.jpg"], "--out o.jpg ends in .jpg"),
        (["-o", "m.png"], "--out m.png is one of the files to read"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(given, words, repkit, files, monkeypatch):
    monkeypatch.chdir(files)
    code, out, err = repkit("swap", "a.png", "b.png", "--mask", "m.png", "-m", "no-such-model", *given)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and words in err


def test_what_cannot_refine_is_told_before_the_features(repkit, files, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(DinoExtractor, "__call__", None)
    dino = tiny_vit.save_vit(tmp_path_factory.mktemp("models") / "vit", depth=2)
    given = ["--mask", files / "m.png", "--refine", 0.5, "-o", files / "o.png", "--preset", "dino", "-t", "norm"]
    code, _, err = repkit("swap", files / "a.png", files / "b.png", *given, "--dino", dino, "--size", 32)
    assert code == 2 and "give --refiner MODEL" in err
