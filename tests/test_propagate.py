"""Label propagation through frames: known motion, runs that were killed, and the command as a user meets it."""

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from repkit import shards
from repkit.fusion import Part
from repkit.listing import list_images
from repkit.matching.propagation import Labelled, propagate_labels
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.mask_scores import score_masks
from repkit.tasks.propagate import STATE, Rule, list_frames, propagate_mask
from tests.export_cases import hashes
from tests.mask_scenes import Greys, calls, greys, scene, write_palette_mask, write_video
from tests.test_kill import fork

FRAMES = 6
RULE = Rule(top_k=5, temperature=0.1, radius=9, context=2)


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "video", FRAMES)


def propagate(video, out, rule=RULE, correspondence=None, frames=None, **options):
    listing = list_frames(video / "frames") if frames is None else frames
    return propagate_mask(listing, video / "truth" / "0.png", correspondence or greys((20, 24)), out, rule, **options)


# --- what is carried


@pytest.mark.parametrize("context", [0, 1, 28])
@pytest.mark.parametrize("radius", [10, None])
def test_exact_features_carry_the_exact_masks(video, tmp_path, context, radius):
    masks = propagate(video, tmp_path / "masks", Rule(top_k=1, radius=radius, context=context))
    assert masks.ids == [f"{step}.png" for step in range(FRAMES)]
    assert score_masks(masks, video / "truth") == ({"1": 1.0, "2": 1.0}, FRAMES - 1)


def test_frames_take_from_the_first_and_the_ones_before(video, tmp_path):
    """The same with plain calls: cells are pixels, so that a mask is its own shares."""
    features = greys((20, 24))
    seen = features.see([video / "frames" / f"{step}.png" for step in range(FRAMES)])
    maps = [features.fuse(one)[0] for one in seen]
    first = torch.stack([torch.from_numpy(scene(0)[1] == label).float() for label in range(3)])
    shares = [first]
    for step in range(1, FRAMES):
        earlier = [0, *range(max(1, step - RULE.context), step)]
        context = [Labelled(maps[n], shares[n]) for n in earlier]
        shares.append(propagate_labels(maps[step], context, top_k=5, temperature=0.1, radius=9))
    masks = propagate(video, tmp_path / "masks", rule := Rule(5, 0.1, 9, 2, stretch=False))
    assert rule.context == 2
    for step, name in enumerate(masks.ids):
        assert np.array_equal(masks[name], shares[step].argmax(0).numpy())


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for number in (1, 2, 10, 9, 21):
        path = tmp_path / "frames" / f"f{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    assert list_frames(tmp_path / "frames")["id"].to_pylist() == ["f1.png", "f2.png", "f9.png", "f10.png", "f21.png"]
    (tmp_path / "list.csv").write_text("path\nframes/f9.png\nframes/f1.png\n")
    assert list_frames(tmp_path / "list.csv")["id"].to_pylist() == ["frames/f9.png", "frames/f1.png"]
    (tmp_path / "frames" / "other").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "frames" / "other" / "f1.png")
    with pytest.raises(ValueError, match="has images in ., other; give the folder of one video"):
        list_frames(tmp_path / "frames")


def test_each_frame_is_looked_at_once(video, tmp_path):
    features = greys((20, 24))
    propagate(video, tmp_path / "masks", correspondence=features)
    assert calls(features) == FRAMES


def test_an_unreadable_frame_is_left_out(video, tmp_path):
    (video / "frames" / "2.png").write_text("no picture")
    masks = propagate(video, tmp_path / "masks")
    assert list(masks.failures) == ["2.png"] and "2.png" not in masks.ids
    assert score_masks(masks, video / "truth") == ({"1": 1.0, "2": 1.0}, FRAMES - 2)


def test_pairs_components_and_flips_are_left_out(video, tmp_path, caplog):
    plain, reduced = greys((20, 24)), greys((20, 24)).replaced(pca=[2], flip=True)
    propagate(video, tmp_path / "one", correspondence=plain)
    assert not caplog.messages
    propagate(video, tmp_path / "two", correspondence=reduced)
    assert any("without the principal components of pairs" in message for message in caplog.messages)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


# --- going on


def test_a_finished_run_looks_at_nothing(video, tmp_path):
    propagate(video, tmp_path / "masks")
    before, features = hashes(tmp_path / "masks"), greys((20, 24))
    masks = propagate(video, tmp_path / "masks", correspondence=features)
    assert calls(features) == 0 and len(masks.ids) == FRAMES
    assert hashes(tmp_path / "masks") == before


# settings, then a mask and the context for each frame
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 2 * FRAMES, 2 * FRAMES + 1])
def test_killed_before_a_file_is_in_place(video, tmp_path, count, monkeypatch):
    (video / "frames" / "3.png").write_text("no picture")
    propagate(video, tmp_path / "whole")
    done, original = 0, os.replace

    def step(*arguments):
        nonlocal done
        done += 1
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    def run():
        monkeypatch.setattr(shards.os, "replace", step)
        propagate(video, tmp_path / "masks")

    _, status = os.waitpid(fork(run), 0)
    if count < 2 * FRAMES + 1:  # the unreadable frame has no mask
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    propagate(video, tmp_path / "masks")
    assert hashes(tmp_path / "masks") == hashes(tmp_path / "whole")


def test_a_video_that_has_grown_goes_on(video, tmp_path):
    propagate(video, tmp_path / "whole")
    frames = list_frames(video / "frames")
    propagate(video, tmp_path / "masks", frames=frames.slice(0, 3))
    features = greys((20, 24))
    propagate(video, tmp_path / "masks", correspondence=features)
    assert calls(features) == 3 + 1 + 2  # the new ones, the first, and those of the context
    assert hashes(tmp_path / "masks") == hashes(tmp_path / "whole")


def test_other_frames_and_settings_are_refused(video, tmp_path):
    frames = list_images(video / "frames")
    propagate(video, tmp_path / "masks", frames=frames.slice(0, 3))
    with pytest.raises(ValueError, match="masks of other frames than the first 3 here"):
        propagate(video, tmp_path / "masks", frames=frames.take([0, 2, 1]))
    with pytest.raises(ValueError, match="radius: None here, 9 there"):
        propagate(video, tmp_path / "masks", Rule(5, 0.1, None, 2))
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1.png is gone, which was done"):
        propagate(video, tmp_path / "masks")


@pytest.mark.parametrize("changed", ["0.png", "1.png", "2.png"])
def test_a_frame_that_is_another_one_since_is_refused(video, tmp_path, changed):
    (video / "frames" / "2.png").write_text("no picture")
    frames = list_frames(video / "frames")
    propagate(video, tmp_path / "masks", frames=frames.slice(0, 3))
    state, path = (tmp_path / "masks" / STATE).read_bytes(), video / "frames" / changed
    path.touch()  # the same bytes, however new
    propagate(video, tmp_path / "masks", frames=frames.slice(0, 3))
    Image.fromarray(scene(5)[0]).save(path)
    os.utime(path, (0, 0))  # as a copy that keeps its times is old
    words = "masks of something else.*first: " if changed == "0.png" else f"{changed} is another file since it was done"
    with pytest.raises(ValueError, match=words):
        propagate(video, tmp_path / "masks", frames=frames)
    assert (tmp_path / "masks" / STATE).read_bytes() == state


def test_after_an_error_before_the_first_mask_other_settings_may_follow(video, tmp_path):
    class Failing(Greys):
        def __call__(self, images, cond=None, *, grad=False, check=True):
            raise ValueError("no such word")

    with pytest.raises(ValueError, match="no such word"):
        propagate(video, tmp_path / "masks", correspondence=Correspondence([Part(Failing((20, 24)))]))
    propagate(video, tmp_path / "masks", Rule(context=1))
    with pytest.raises(ValueError, match="masks of something else"):
        propagate(video, tmp_path / "masks")


def test_what_is_kept_are_the_labels_of_the_context(video, tmp_path):
    propagate(video, tmp_path / "masks")
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "masks" / STATE)
    assert {int(key) for key in kept} == {FRAMES - 2, FRAMES - 1}
    assert all(one.shape == (3, 20, 24) for one in kept.values())


# --- scores


def test_j_is_the_mean_over_frames_with_a_truth(video, tmp_path):
    masks = propagate(video, tmp_path / "masks")
    for step in (1, 2, 4):
        (video / "truth" / f"{step}.png").unlink()
    half = scene(3)[1]
    rows = np.flatnonzero((half == 1).any(1))
    half[rows[-2:]] = np.where(half[rows[-2:]] == 1, 0, half[rows[-2:]])  # 4 of 6 rows are left
    write_palette_mask(video / "truth" / "3.png", half)
    scores, count = score_masks(masks, video / "truth")
    assert count == 2 and scores == pytest.approx({"1": (1 + 4 / 6) / 2, "2": 1})


def test_truth_that_cannot_be_compared_is_refused(video, tmp_path):
    masks = propagate(video, tmp_path / "masks")
    with pytest.raises(ValueError, match="has no mask that has an object of the given mask"):
        score_masks(masks, tmp_path)
    for step in range(FRAMES):
        Image.fromarray((scene(step)[1] > 0).astype(np.uint8) * 255).save(video / "truth" / f"{step}.png")
    with pytest.raises(ValueError, match=r"5 masks for images after the first, none of which has an object .*\(1, 2\)"):
        score_masks(masks, video / "truth")
    Image.new("L", (3, 3)).save(video / "truth" / "2.png")
    with pytest.raises(ValueError, match=r"2.png has 3x3 pixels, but 2.png 24x20"):
        score_masks(masks, video / "truth")


# --- the command


def test_the_command(repkit, tmp_path):
    video, out = write_video(tmp_path / "large", FRAMES, scale=3), tmp_path / "masks"
    options = ["-m", "mini-unet", "-t", "up.2@50", "--size", 64, "--context", 2]
    command = ["propagate", video / "frames", "--mask", video / "truth" / "0.png", "-o", out, *options]
    code, printed, err = repkit(*command, "--truth", video / "truth", "--json")
    told = json.loads(printed)
    assert code == 0 and told["masks"] == FRAMES and told["scored"] == FRAMES - 1
    assert told["J"]["1"] > 0.8 and told["J"]["2"] > 0.9
    assert "object 1: J " in err
    with Image.open(out / "overlay.png") as picture:
        assert picture.size == (6 * 196 + 4, 200)
    before = hashes(out)
    assert repkit(*command) == (0, f"{out}\n", "mini-unet: up.2@50; 64 px, squash, 1 draw\n")
    assert hashes(out) == before


def test_mistakes_are_told_before_a_model_is_loaded(repkit, video, tmp_path):
    refused = partial(repkit, "propagate", video / "frames", "-o", tmp_path / "o", "-m", "no-such-model")
    Image.new("L", (24, 20), 1).save(tmp_path / "plain.png")
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(tmp_path / "small.png")
    for more, words in (
        (["--mask", tmp_path / "plain.png"], "has only one label, 1"),
        (["--mask", tmp_path / "small.png"], "has 9x9 pixels, but"),
        (["--mask", video / "truth" / "0.png", "--temperature", -1], "temperature=-1"),
        (["--mask", video / "frames" / "1.png"], "is among the images"),
        (["--mask", video / "truth" / "0.png", "--temperature", 0], "temperature=0.0; give a number above 0\n"),
        (["--mask", video / "truth" / "0.png", "--truth", tmp_path / "nothere"], "nothere is no folder"),
        (["--mask", video / "truth" / "0.png", "--truth", tmp_path], "has no mask of a frame after the first"),
        (["--mask", video / "truth" / "0.png", "--prompt", "a {thing}"], "--prompt 'a {thing}' has a field"),
    ):
        code, printed, err = refused(*more)
        assert (code, printed) == (2, "") and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "o").exists()
