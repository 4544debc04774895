"""Benchmarks of correspondence on small trees: PCK recomputed by hand, forwards counted, runs cut off and taken up."""

import json
import os
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import copytree, rmtree

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repkit import cli
from repkit.datasets.pairs import Pair, read_pairs
from repkit.datasets.spair import read_spair
from repkit.datasets.tss import read_tss
from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor
from repkit.fusion import Part
from repkit.images import Resize, decode
from repkit.mirrored import Mirrored
from repkit.tasks.correspondence import Correspondence
from repkit.tasks.evaluate_pairs import Rules, Running, evaluate_pairs, headline, search_weights
from repkit.tasks.extraction_cost import image_flops
from repkit.tasks.pair_matches import visiting_order
from repkit.tasks.pair_pictures import draw_pairs
from repkit.tasks.pair_table import MATCHES
from repkit.tasks.seen_store import store_seen
from tests import tiny
from tests.pair_trees import (
    SIZES,
    texture,
    write_own,
    write_pascal,
    write_spair,
    write_texture,
    write_tss,
    write_willow,
)
from tests.test_fusion import vit

RULES = Rules(alphas=(0.3, 0.15))
UNET, VIT = tiny.unet(), vit()


@cache
def extractors(network=UNET) -> tuple[DiffusionExtractor, DinoExtractor]:
    resize = Resize(16, "squash")
    diffusion = DiffusionExtractor(network, ["mid@50", "up.0@100"], resize=resize)
    return diffusion, DinoExtractor(VIT, "block.0", resize=resize)


def correspondence(cond: str | None = None, network=UNET, **options) -> Correspondence:
    diffusion, dino = extractors(network)
    return Correspondence([Part(diffusion), Part(dino, 0.5)], conds=[cond, None], **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_spair(tmp_path_factory.mktemp("trees"), ("test", "val"))


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An uninterrupted run: its results, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return evaluate_pairs(read_spair(root), correspondence(), out, RULES), out


@pytest.fixture
def rows():
    """Rows of each forward of the networks from now on."""
    found: dict[str, int] = Counter()

    def count(name: str):
        def hook(module, args, out) -> None:
            found[name] += 0 if isinstance(out, FakeTensor) else len(out)  # those count operations on shapes

        return hook

    networks = {"end": UNET.model.conv_out, "mid": UNET.model.mid_block, "vit": VIT.patch_embed}
    hooks = [network.register_forward_hook(count(name)) for name, network in networks.items()]
    yield found
    for hook in hooks:
        hook.remove()


def numbers(results: dict) -> dict:
    return {name: value for name, value in results.items() if name != "cost"}


def shares(table, alpha: float, length: str, hit) -> tuple[list[float], list[bool]]:
    """By hand: the share of each pair, and all points; hit(error, limit, row)."""
    pairs: dict[str, list[bool]] = {}
    for row in table:
        pairs.setdefault(row["pair"], []).append(hit(row, alpha * row[length]))
    return [sum(of) / len(of) for of in pairs.values()], sum(pairs.values(), [])


def in_original(row, limit) -> bool:
    return ((row["found_x"] - row["true_x"]) ** 2 + (row["found_y"] - row["true_y"]) ** 2) ** 0.5 <= limit


def in_frame_of_840(row, limit) -> bool:
    scale = 840 / max(row["target_width"], row["target_height"])
    found = [(row[f"found_{axis}"] + 0.5) * scale - 0.5 for axis in "xy"]
    true = [row[f"true_{axis}"] * scale for axis in "xy"]
    return sum((one - other) ** 2 for one, other in zip(found, true, strict=True)) ** 0.5 < limit * scale


# --- the numbers


def test_pck_is_that_of_the_table_of_matches_by_hand(whole, root):
    results, out = whole
    table = pq.read_table(out / MATCHES).to_pylist()
    assert (results["pairs"], results["points"]) == (6, len(table)) == (6, sum(len(p.names) for p in read_spair(root)))
    for n, alpha in enumerate(RULES.alphas):
        for threshold in ("box", "image"):
            dift = results["pck"][threshold]["dift"]
            by_pair, points = shares(table, alpha, f"{threshold}_length", in_original)
            assert dift["image"][n] == pytest.approx(np.mean(by_pair))
            assert dift["point"][n] == pytest.approx(np.mean(points))
            for category in ("cat", "cow"):
                own = [row for row in table if row["category"] == category]
                by_pair, points = shares(own, alpha, f"{threshold}_length", in_original)
                found = results["categories"][category]["pck"][threshold]["dift"]
                assert found["image"][n] == pytest.approx(np.mean(by_pair))
                assert found["point"][n] == pytest.approx(np.mean(points))
            macro = np.mean([results["categories"][c]["pck"][threshold]["dift"]["point"][n] for c in ("cat", "cow")])
            assert dift["category"][n] == pytest.approx(macro)
            _, points = shares(table, alpha, f"{threshold}_length", in_frame_of_840)
            assert results["pck"][threshold]["sd-dino"]["point"][n] == pytest.approx(np.mean(points))
    assert 0 < results["pck"]["box"]["dift"]["point"][0] < 1
    assert json.loads((out / "results.json").read_text()) == results


def test_the_matches_are_those_of_images_seen_without_stores(whole, root):
    table = pq.read_table(whole[1] / MATCHES).to_pylist()
    plain = correspondence()
    for pair in read_spair(root):
        source, target = plain.see([pair.source, pair.target])
        found = plain.match(source, target, torch.from_numpy(pair.source_points))
        own = [row for row in table if row["pair"] == pair.id]
        np.testing.assert_allclose([[row["found_x"], row["found_y"]] for row in own], found.points, atol=1e-4)
        np.testing.assert_allclose([row["score"] for row in own], found.scores, atol=1e-5)
        np.testing.assert_array_equal([[row["x"], row["y"]] for row in own], pair.source_points)
        assert tuple(row["name"] for row in own) == pair.names and not any(row["mirrored"] for row in own)


def test_what_position_alone_reaches_stands_beside_it(whole):
    results, out = whole
    table = pq.read_table(out / MATCHES).to_pylist()
    stayed, truly, hits = [], [], []
    for row in table:
        sx, sy = row["target_width"] / row["source_width"], row["target_height"] / row["source_height"]
        still = (row["x"] + 0.5) * sx - 0.5, (row["y"] + 0.5) * sy - 0.5
        assert (row["still_x"], row["still_y"]) == pytest.approx(still)
        cell = row["target_width"] / 16, row["target_height"] / 16  # the finer map has 16x16 cells
        for what, where in (("found", stayed), ("true", truly)):
            where.append(
                all(abs(row[f"{what}_{a}"] - s) <= c + 1e-9 for a, s, c in zip("xy", still, cell, strict=True))
            )
        hits.append(np.hypot(row["true_x"] - still[0], row["true_y"] - still[1]) <= 0.15 * row["box_length"])
    assert results["stayed"] == pytest.approx(np.mean(stayed))
    assert results["true_stayed"] == pytest.approx(np.mean(truly))
    assert results["position_only"]["box"]["dift"]["point"][1] == pytest.approx(np.mean(hits))
    assert np.mean(hits) == 1  # these points lie at the same share of both images


def test_the_protocol_and_threshold_that_are_asked_for_come_first(whole, root, tmp_path):
    rules = replace(RULES, protocol="sd-dino", threshold="image")
    results = evaluate_pairs(read_spair(root), correspondence(), tmp_path, rules, features=whole[1] / "features")
    assert list(results["pck"]) == ["image", "box"] and next(iter(results["pck"]["image"])) == "sd-dino"
    assert list(results["pck"]["box"]["sd-dino"])[:2] == ["pairs", "category"] and results["average"] == "pairs"
    assert headline(results) == results["pck"]["image"]["sd-dino"]["pairs"][0]
    assert results["pck"]["box"]["dift"] == whole[0]["pck"]["box"]["dift"]


# --- images once, and runs cut off


def test_each_image_is_encoded_once(root, tmp_path, rows):
    pairs = read_spair(root)
    images = {path for pair in pairs for path in (pair.source, pair.target)}
    found = correspondence()
    rows.clear()
    evaluate_pairs(pairs, found, tmp_path, RULES, Running(batch_size=4))
    assert len(images) == 6 and len(pairs) == 6
    assert +rows == {"mid": 2 * len(images), "vit": len(images)}  # two noise levels; nothing after the last tap
    evaluate_pairs(pairs, found, tmp_path, RULES)
    assert +rows == {"mid": 2 * len(images), "vit": len(images)}


def test_an_image_is_encoded_for_each_category_where_the_prompt_names_it(tmp_path, rows):
    for seed, name in enumerate("ab"):
        write_texture(tmp_path / f"{name}.png", seed, (20, 20))
    network = tiny.grey_unet()
    counts: list[int] = []
    network.model.mid_block.register_forward_hook(lambda module, args, out: counts.append(len(out)))
    point = np.array([[3.0, 4.0]])
    pairs = [
        Pair(f"{kind}", tmp_path / "a.png", tmp_path / "b.png", point, point, ("0",), kind) for kind in ("cat", "dog")
    ]
    found = correspondence("{label}", network)
    counts.clear()
    seen = store_seen(found, [(pair.source, pair.category) for pair in pairs], tmp_path / "s")
    assert sum(counts) == 2 * 2  # two categories and two noise levels
    cat, dog = (seen.seen(tmp_path / "a.png", kind) for kind in ("cat", "dog"))
    torch.testing.assert_close(cat.maps[0], found.see([tmp_path / "a.png"], "cat")[0].maps[0], atol=1e-5, rtol=1e-4)
    assert not torch.equal(cat.maps[0][0], dog.maps[0][0]) and torch.equal(cat.maps[1][0], dog.maps[1][0])
    mixed = [pairs[0], replace(pairs[1], category=None)]
    with pytest.raises(ValueError, match="1 of 2 images have no category, which '{label}' needs"):
        store_seen(found, [(pair.source, pair.category) for pair in mixed], tmp_path / "t")


class Stop(Exception):
    pass


def stopping_at(what: str, count: int) -> Running:
    def tell(done: int, *_) -> None:
        if done == count:
            raise Stop

    return Running(batch_size=1, watch=lambda name, unit: nullcontext(tell if what in name else lambda *_: None))


@pytest.mark.parametrize(("what", "count"), [("extract 0-", 3), ("extract 1-", 2), ("match", 0), ("match", 4)])
def test_a_run_that_was_cut_off_goes_on(whole, root, tmp_path, what, count, rows):
    pairs, found = read_spair(root), correspondence()
    with pytest.raises(Stop):
        evaluate_pairs(pairs, found, tmp_path / "out", RULES, stopping_at(what, count))
    kept = [path for path in (tmp_path / "out").glob("part-*.parquet")]
    assert len(kept) == (what == "match" and count > 0)
    rows.clear()
    results = evaluate_pairs(pairs[::-1], correspondence(), tmp_path / "out", RULES)
    assert numbers(results) == numbers(whole[0])
    assert rows["vit"] == (0 if what == "match" else 6)
    table, expected = (pq.read_table(out / MATCHES).to_pylist() for out in (tmp_path / "out", whole[1]))
    assert sorted(row["pair"] for row in table) == sorted(row["pair"] for row in expected)
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_order_and_batches_change_no_number(whole, root, tmp_path, batch_size):
    pairs = read_spair(root)
    order = np.random.default_rng(0).permutation(len(pairs))
    results = evaluate_pairs([pairs[n] for n in order], correspondence(), tmp_path, RULES, Running(batch_size))
    assert numbers(results) == numbers(whole[0])


def test_what_is_something_else_is_refused_by_name(whole, root):
    pairs, out = read_spair(root), whole[1]
    cases = [
        (pairs, correspondence(flip=True), RULES, "flip: True here, False there"),
        (pairs, correspondence(), replace(RULES, remove_position=True), "remove_position: True here"),
        (pairs, correspondence(), replace(RULES, dtype="float16"), "stored: float16 here, float32 there"),
        (pairs[:5], correspondence(), RULES, "pairs.count: 5 here, 6 there"),
    ]
    for asked, found, rules, words in cases:
        with pytest.raises(ValueError, match=f"has matches of something else; .*{re.escape(words)}"):
            evaluate_pairs(asked, found, out, rules)
    with pytest.raises(ValueError, match="has files that are no matches"):
        evaluate_pairs(pairs, correspondence(), root, RULES)
    other = evaluate_pairs(pairs, correspondence(), out, replace(RULES, alphas=(0.2,)))  # counting is done again
    assert other["alphas"] == [0.2]
    assert evaluate_pairs(pairs, correspondence(), out, RULES)["cost"] == whole[0]["cost"]


def test_pairs_are_visited_so_that_images_are_needed_again(root):
    pairs = [
        Pair(f"{s}{t}", Path(s), Path(t), np.zeros((1, 2)), np.zeros((1, 2)), ("0",)) for s in "abcd" for t in "abcd"
    ]
    order = visiting_order(pairs[::-1])
    assert sorted(pair.id for pair in order) == sorted(pair.id for pair in pairs)
    assert [pair.id for pair in order[:8]] == ["aa", "ab", "ac", "ad", "bd", "bc", "bb", "ba"]


# --- what changes between two runs


def test_positions_of_other_images_match_again(root, tmp_path):
    pairs, rules = read_spair(root)[:3], replace(RULES, remove_position=True)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    asked = [replace(pairs[0], source=broken), *pairs[1:]]
    first = evaluate_pairs(asked, correspondence(), tmp_path / "out", rules)
    broken.write_bytes(pairs[0].source.read_bytes())
    again = evaluate_pairs(asked, correspondence(), tmp_path / "out", rules, Running(retry_failed=True))
    anew = evaluate_pairs(asked, correspondence(), tmp_path / "new", rules)
    tables = [pq.read_table(tmp_path / out / MATCHES) for out in ("out", "new")]
    assert (first["pairs"], again["pairs"]) == (2, 3)
    assert tables[0].sort_by("pair").equals(tables[1].sort_by("pair")) and numbers(again) == numbers(anew)


def test_positions_of_few_images_are_warned_of(root, tmp_path, caplog):
    pairs = read_spair(root)[:1]
    evaluate_pairs(pairs, correspondence(), tmp_path, replace(RULES, remove_position=True))
    assert [line for line in caplog.messages if "positions" in line] == [
        "positions are the mean over 2 images, which still shows what these show; give 10 or more"
    ]


@pytest.fixture
def copied(root, tmp_path) -> list[Pair]:
    """Two pairs with images of their own, which tests may change."""
    return read_spair(copytree(root, tmp_path / "copied"))[:2]


@pytest.mark.parametrize("keep_time", [False, True])
def test_an_edited_image_is_named(copied, tmp_path, keep_time):
    changed = copied[0].source
    evaluate_pairs(copied, correspondence(), tmp_path / "out", RULES)
    before = pq.read_table(tmp_path / "out" / MATCHES)
    changed.touch()  # the same content
    assert evaluate_pairs(copied, correspondence(), tmp_path / "out", RULES)["pairs"] == 2
    status = changed.stat()
    changed.write_bytes(write_texture(tmp_path / "x.png", 99, SIZES[0]).read_bytes())
    if keep_time:
        os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns - 10**15))  # as of cp -p
    with pytest.raises(
        ValueError, match=f"{changed} has changed since .*; choose another folder, or delete .*features"
    ):
        evaluate_pairs(copied, correspondence(), tmp_path / "out", RULES)
    rmtree(tmp_path / "out/features")
    evaluate_pairs(copied, correspondence(), tmp_path / "out", RULES)
    evaluate_pairs(copied, correspondence(), tmp_path / "anew", RULES)
    after, anew = (pq.read_table(tmp_path / out / MATCHES) for out in ("out", "anew"))
    assert after.sort_by("pair").equals(anew.sort_by("pair")) and not after.equals(before)


def test_a_run_that_came_to_nothing_leaves_its_folder_free(root, tmp_path):
    def refuse(what: str, unit: str):
        raise Stop

    pairs, out = read_spair(root), tmp_path / "out"
    with pytest.raises(Stop):
        evaluate_pairs(pairs, correspondence(flip=True), out, RULES, Running(watch=refuse))
    assert [path.name for path in out.iterdir()] == ["settings.json"]
    assert evaluate_pairs(pairs, correspondence(), out, RULES)["pairs"] == 6
    with pytest.raises(ValueError, match="has matches of something else"):
        evaluate_pairs(pairs, correspondence(flip=True), out, RULES)


def test_rows_of_a_list_in_another_order_are_the_same_pairs(tmp_path, rows):
    given = [["a.png", "b.png", 5, 6, 7, 8], ["b.png", "c.png", 3, 4, 5, 6], ["a.png", "b.png", 30, 20, 20, 30]]
    pairs = read_pairs(write_own(tmp_path, given))
    first = evaluate_pairs(pairs, correspondence(), tmp_path / "out", RULES)
    rows.clear()
    again = evaluate_pairs(read_pairs(write_own(tmp_path, given[::-1])), correspondence(), tmp_path / "out", RULES)
    assert numbers(again) == numbers(first) and again["cost"] == first["cost"] and not rows
    given[0][5] = 9
    with pytest.raises(ValueError, match="pairs.sha256"):
        evaluate_pairs(read_pairs(write_own(tmp_path, given)), correspondence(), tmp_path / "out", RULES)


# --- what is not as it should be


def test_an_image_that_cannot_be_read_costs_only_its_pairs(root, tmp_path):
    pairs = read_spair(root)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    asked = [replace(pairs[0], source=broken), *pairs[1:]]
    results = evaluate_pairs(asked, correspondence(), tmp_path / "out", RULES)
    assert list(results["left_out"]) == [pairs[0].id] and results["pairs"] == 5
    assert results["left_out"][pairs[0].id].startswith(f"{broken}: ")
    broken.write_bytes(pairs[0].source.read_bytes())
    again = evaluate_pairs(asked, correspondence(), tmp_path / "out", RULES, Running(retry_failed=True))
    assert again["pairs"] == 6 and not again["left_out"]


def test_an_annotation_of_another_size_leaves_its_pair_out(root, tmp_path):
    pairs = read_spair(root)
    asked = [replace(pairs[0], target_size=(99, 10)), *pairs[1:]]
    results = evaluate_pairs(asked, correspondence(), tmp_path, RULES)
    assert "has 28x36 pixels, its annotation says (99, 10)" in results["left_out"][pairs[0].id]


def test_points_beyond_the_edge_are_looked_for_from_it(root, tmp_path):
    first = read_spair(root)[0]
    points = np.array([[-2.0, 5.0], [39.0, 29.0], [40.0, 31.0]])
    pair = replace(first, source_points=points, target_points=points, names=("a", "b", "c"))
    results = evaluate_pairs([pair], correspondence(), tmp_path, RULES)
    table = pq.read_table(tmp_path / MATCHES).to_pylist()
    assert results["clamped"] == 2 and [row["clamped"] for row in table] == [True, False, True]
    assert [(row["x"], row["y"]) for row in table] == [tuple(point) for point in points]
    assert [table[2][name] for name in ("found_x", "found_y")] == [table[1][name] for name in ("found_x", "found_y")]


def test_features_of_other_images_are_refused(root, tmp_path):
    pairs = read_spair(root)
    evaluate_pairs(pairs[:1], correspondence(), tmp_path / "one", RULES, features=tmp_path / "features")
    with pytest.raises(ValueError, match="was begun without .*; choose another folder"):
        evaluate_pairs(pairs[:3], correspondence(), tmp_path / "all", RULES, features=tmp_path / "features")


def test_a_box_without_extent_leaves_its_pair_out(root, tmp_path):
    pairs = read_spair(root)
    results = evaluate_pairs(
        [replace(pairs[0], target_box=(5.0, 5.0, 5.0, 5.0)), *pairs[1:3]], correspondence(), tmp_path, RULES
    )
    assert "box (5, 5, 5, 5)" in results["left_out"][pairs[0].id] and results["pairs"] == 2


def test_nothing_to_evaluate(root, tmp_path):
    with pytest.raises(ValueError, match="no pairs; give at least one"):
        evaluate_pairs([], correspondence(), tmp_path)
    with pytest.raises(ValueError, match="alphas 0.1, -1; give fractions above 0"):
        Rules(alphas=(0.1, -1))
    with pytest.raises(ValueError, match="threshold 'box', but not all targets have a box; have image"):
        pairs = [replace(pair, target_box=None) for pair in read_spair(root)]
        evaluate_pairs(pairs, correspondence(), tmp_path / "o", replace(RULES, threshold="box"))


# --- options


def test_co_pca_and_flips_from_stores_are_those_without(root, tmp_path):
    pairs = read_spair(root)[:2]
    turned = pairs[0].target.parent / "turned.png"
    decode(pairs[0].source).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(turned)
    pairs.append(replace(pairs[0], id="turned", target=turned, target_size=pairs[0].source_size))
    plain = correspondence(flip=True, pca=[6, None])

    def partner(pair: Pair) -> list[int | None]:
        return [1, 0, *range(2, len(pair.names))]

    evaluate_pairs(pairs, plain, tmp_path, replace(RULES, partner=partner))
    table = pq.read_table(tmp_path / MATCHES).to_pylist()
    for pair in pairs:
        source, target = plain.see([pair.source, pair.target])
        found, mirrored = plain.matched(source, target, torch.from_numpy(pair.source_points), partner(pair))
        own = [row for row in table if row["pair"] == pair.id]
        np.testing.assert_allclose([[row["found_x"], row["found_y"]] for row in own], found.points, atol=1e-4)
        assert [row["mirrored"] for row in own] == [mirrored] * len(own)
    assert table[-1]["mirrored"]


def test_removing_positions_takes_off_the_mean_map(root, tmp_path):
    pairs, found = read_spair(root), correspondence()
    results = evaluate_pairs(pairs, found, tmp_path, replace(RULES, remove_position=True))
    images = sorted({path for pair in pairs for path in (pair.source, pair.target)})
    features = found.parts[0].extractor(images)["mid@50"].double()
    mean = features.mean(0)
    expected = (mean - mean.mean((1, 2), keepdim=True)).float()
    seen = store_seen(found, [(path, None) for path in images], tmp_path / "features")
    positions = seen.positions()
    assert set(positions) == {(0, "mid@50"), (0, "up.0@100"), (1, "block.0")}
    torch.testing.assert_close(positions[0, "mid@50"], expected, atol=1e-5, rtol=1e-4)
    pair = pairs[0]
    by_hand = found.replaced(positions=positions)
    source, target = by_hand.see([pair.source, pair.target])
    match = by_hand.match(source, target, torch.from_numpy(pair.source_points))
    table = [row for row in pq.read_table(tmp_path / MATCHES).to_pylist() if row["pair"] == pair.id]
    np.testing.assert_allclose([[row["found_x"], row["found_y"]] for row in table], match.points, atol=1e-4)
    assert results["position_removed"]


def test_weights_are_searched_on_val_with_one_store(root, tmp_path, rows):
    pairs, weights = read_spair(root, "val"), [0, 0.5, 2, float("inf")]
    rows.clear()
    best, scores = search_weights(pairs, correspondence(), tmp_path / "out", weights, RULES, Running())
    assert +rows == {"mid": 2 * 6, "vit": 6}
    assert [one["weights"] for one in scores] == [[1, 0], [1, 0.5], [1, 2], [0, 1]]
    assert len({one["pck"] for one in scores}) > 1
    assert {path.name for path in (tmp_path / "out/val").glob("w*")} == {f"weight-{w}" for w in (0.0, 0.5, 2.0, "inf")}
    for n in (1, 3):
        parts = [replace(part, weight=w) for part, w in zip(correspondence().parts, scores[n]["weights"], strict=True)]
        results = evaluate_pairs(pairs, correspondence().replaced(parts=parts), tmp_path / f"alone{n}", RULES)
        assert scores[n]["pck"] == headline(results)
    assert [part.weight for part in best.parts] == max(scores, key=lambda one: one["pck"])["weights"]
    assert evaluate_pairs(read_spair(root), best, tmp_path / "out", RULES)["pairs"] == 6  # beside the folder of val
    alone = correspondence().replaced(parts=correspondence().parts[:1], conds=[None], pca=[None])
    with pytest.raises(ValueError, match="1 part; weights are searched for two"):
        search_weights(pairs, alone, tmp_path / "one", [1], RULES, Running())


def test_features_stored_in_half_the_bytes_are_read_back(root, tmp_path):
    pair = read_spair(root)[0]
    seen = store_seen(correspondence(), [(pair.source, "cat")], tmp_path, dtype="float16")
    maps = seen.seen(pair.source, "cat").maps
    expected = correspondence().see([pair.source])[0].maps
    assert maps[0][0].dtype == torch.float16
    torch.testing.assert_close(maps[0][0].float(), expected[0][0], atol=1e-2, rtol=1e-3)


def test_flows_are_scored_at_their_known_pixels(tmp_path):
    pairs = read_tss(write_tss(tmp_path / "tss"))
    rules = replace(RULES, threshold="image", step=3)
    results = evaluate_pairs(pairs, correspondence(), tmp_path / "out", rules)
    table = pq.read_table(tmp_path / "out" / MATCHES).to_pylist()
    assert len(table) == 4 * len(range(6, 22, 3)) * len(range(6, 30, 3)) == results["points"]
    assert {(row["true_x"] - row["x"], row["true_y"] - row["y"]) for row in table} == {(3, 2), (-3, -2)}
    assert {row["image_length"] for row in table} == {36} and list(results["pck"]) == ["image"]
    by_pair, points = shares(table, 0.15, "image_length", in_original)
    assert results["pck"]["image"]["dift"]["image"][1] == pytest.approx(np.mean(by_pair))
    assert results["categories"].keys() == {"FG3DCar", "PASCAL"}
    path = pairs[0].flow
    path.write_bytes(path.read_bytes()[:-1])
    again = evaluate_pairs(pairs, correspondence(), tmp_path / "damaged", rules)
    assert "flow1.flo has" in again["left_out"][pairs[0].id] and again["pairs"] == 3


# --- cost


def test_operations_are_those_of_a_real_forward():
    dit = DiffusionExtractor(tiny.dit(), "block.0@50,clean", draws=2)
    for extractor in (correspondence().parts[0].extractor, correspondence().parts[1].extractor, dit):
        # As plain products: older torch does not count the attention of CPUs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            extractor(tiny.images(1, *extractor.resize.shape))
        count = image_flops(extractor)
        assert count == counter.get_total_flops() == image_flops(Mirrored(extractor)) and count


def test_the_cost_stands_beside_the_accuracy(whole):
    cost = whole[0]["cost"]
    assert cost["flops_an_image"] == sum(image_flops(part.extractor) or 0 for part in correspondence().parts)
    assert all(cost[name] > 0 for name in ("seconds_an_image", "seconds_a_pair", "points_a_second"))


def test_the_time_of_encoding_outlives_a_run_that_was_cut_off(root, tmp_path):
    pairs = read_spair(root)
    with pytest.raises(Stop):
        evaluate_pairs(pairs, correspondence(), tmp_path, RULES, stopping_at("match", 0))
    kept = [json.loads(path.read_text()) for path in (tmp_path / "features").glob("*.json")]
    assert [one["images"] for one in kept] == [6, 6]
    cost = evaluate_pairs(pairs, correspondence(), tmp_path, RULES)["cost"]
    assert cost["seconds_an_image"] == pytest.approx(sum(one["seconds"] / 6 for one in kept))


def test_best_and_worst_pairs_are_drawn(whole):
    draw_pairs(*whole)
    for name in ("best", "worst"):
        with Image.open(whole[1] / f"{name}.png") as picture:
            assert picture.width > 600 and len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50


# --- the command


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *map(str, arguments)])
    return stop.value.code, *capsys.readouterr()


MODEL = ["-m", "mini-unet", "-t", "mid@100"]


def test_spair_from_the_command_line(root, tmp_path, capsys):
    out = tmp_path / "out"
    code, printed, told = run(capsys, "spair", root, *MODEL, "-o", out, "--most", 2, "--alphas", "0.3,0.1")
    lines = printed.splitlines()
    assert code == 0 and "4 pairs of 6 images" in told
    results = json.loads((out / "results.json").read_text())
    assert lines[0].startswith("own on spair test: 4 pairs, at most 2 a category, ")
    rows = {line[:28].strip(): line[28:].split() for line in lines if line[28:].strip()}
    assert rows["PCK in %"] == ["@0.3", "@0.1"]
    expected = results["pck"]["box"]["dift"]
    for name in ("image", "point", "category", "pairs"):
        assert rows[f"by {name}"] == [f"{100 * value:.2f}" for value in expected[name]]
    assert rows["cat, by image"] == [
        f"{100 * v:.2f}" for v in results["categories"]["cat"]["pck"]["box"]["dift"]["image"]
    ]
    assert "position only, by image" in rows and "cost: " in printed and "TFLOP an image" in printed
    code, printed, _ = run(capsys, "spair", root, *MODEL, "-o", out, "--most", 2, "--alphas", "0.3,0.1", "--json")
    assert json.loads(printed) == {**results, "out": str(out)}


def test_every_benchmark_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trees = {
        "pf-pascal": write_pascal(tmp_path),
        "pf-willow": write_willow(tmp_path),
        "tss": write_tss(tmp_path / "tss"),
        "pairs": write_own(tmp_path / "own"),
    }
    for name, tree in trees.items():
        code, printed, _ = run(capsys, name, tree, *MODEL, "--json")
        found = json.loads(printed)
        assert code == 0 and found["out"] == f"{name}-mini-unet"
        assert found["threshold"] == ("box" if name == "pf-willow" else "image")
        assert found["points"] == {"pf-pascal": 3, "pf-willow": 10, "tss": 4 * 4 * 6, "pairs": 3}[name]


def test_left_out_pairs_are_named_and_end_with_their_code(root, tmp_path, capsys):
    own = write_own(tmp_path, [["a.png", "b.png", 1, 2, 3, 4], ["b.png", "c.jpg", 1, 2, 3, 4]])
    texture(0, (20, 20)).save(own / "c.jpg")
    content = (own / "c.jpg").read_bytes()
    (own / "c.jpg").write_bytes(content[:-40])  # a header that can be read
    code, _, told = run(capsys, "pairs", own, *MODEL, "-o", tmp_path / "out")
    assert code == 3 and "1 of 2 pairs are left out" in told and "b.png>c.jpg: " in told
    (own / "pairs.csv").write_text("source,target,x1,y1,x2,y2\nb.png,c.jpg,1,1,1,1\n")
    code, _, told = run(capsys, "pairs", own, *MODEL, "-o", tmp_path / "none")
    assert code == 4 and "1 of 1 pairs are left out" in told


def test_a_truncated_png_is_left_out_like_any_other_image(tmp_path, capsys):
    own = write_own(tmp_path)
    (own / "c.png").write_bytes((own / "c.png").read_bytes()[:-40])
    code, _, told = run(capsys, "pairs", own, *MODEL, "-o", tmp_path / "out")
    assert code == 3 and "b.png>c.png: " in told and "mini-unet: mid@100; 32 px, squash, 1 draw" in told.splitlines()


def test_a_seed_decides_the_noise(tmp_path, capsys):
    own = write_own(tmp_path)
    for seed in (3, 4):
        assert run(capsys, "pairs", own, *MODEL, "--seed", seed, "-o", tmp_path / f"{seed}")[0] == 0
    tables = [pq.read_table(tmp_path / f"{seed}" / MATCHES) for seed in (3, 4)]
    settings = [json.loads((tmp_path / f"{seed}/settings.json").read_text()) for seed in (3, 4)]
    assert [one["parts"]["0"]["extractor"]["seed"] for one in settings] == [3, 4]
    assert not tables[0]["score"].equals(tables[1]["score"])


def test_a_corrected_command_may_use_the_same_folder(root, tmp_path, capsys):
    command = ["spair", root, "-m", "mini-dit", "-t", "block.1@100", "-o", tmp_path / "out", "--categories", "cat, cow"]
    code, _, told = run(capsys, *command, "--prompt", "{label}")
    assert code == 2 and "no class 'cat'" in told
    code, _, told = run(capsys, *command, "--prompt", "bag", "--most", 1)
    assert code == 0, told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["spair", "{root}", "--categories", "owl"], "no category 'owl'; have cat, cow"),
        (["spair", "{root}", "--split", "trn"], "trn; have test, val"),
        (["spair", "{root}", "--weights", "1,2"], "1"),
        (["spair", "{root}", "--weights", "1,x"], "--weights 1,x: give numbers with commas between"),
        (["spair", "{root}", "--alphas", "0"], "alphas 0.0; give fractions above 0"),
        (["spair", "{root}", "--search-weights", "0,1"], "1 part; weights are searched for two"),
        (
            ["spair", "{root}", "--search-weights", "0,1", "--split", "val"],
            "--search-weights chooses the weight on val",
        ),
        (["tss", "{root}", "--search-weights", "0,1"], "No such option: --search-weights"),
        (["pairs", "{root}"], "no list of pairs"),
        (["pairs", "{own}"], "pairs.csv, line 2: (99, 1) lies outside"),
        (["pairs", "{empty}"], "no pairs in"),
        (["pf-pascal", "{root}"], "no list test_pairs_pf_pascal.csv"),
        (["tss", "{root}"], "no TSS in"),
    ],
)
def test_mistakes_are_one_line(root, tmp_path, capsys, arguments, words):
    places = {"root": root, "own": write_own(tmp_path / "own", [["a.png", "b.png", 99, 1, 1, 1]])}
    places["empty"] = tmp_path / "empty.csv"
    places["empty"].write_text("source,target,x1,y1,x2,y2\n")
    code, out, told = run(capsys, *(one.format(**places) for one in arguments), *MODEL, "-o", tmp_path / "out")
    assert (code, out) == (2, "") and words in told.splitlines()[-1] and "Traceback" not in told


def test_a_damaged_annotation_is_named(tmp_path, capsys):
    tree = write_spair(tmp_path)
    path = next((tree / "PairAnnotation/test").iterdir())
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name != "trg_kps"}))
    code, _, told = run(capsys, "spair", tree, *MODEL)
    assert code == 2 and f"{path} lacks trg_kps" in told


def test_own_pairs_without_categories_say_what_a_prompt_loses(tmp_path, capsys):
    pairs = write_own(tmp_path)
    options = ["-m", "mini-unet", "-t", "mid@100", "--prompt", "{label}", "-o", tmp_path / "out"]
    code, _, told = run(capsys, "pairs", pairs, *options)
    assert code == 0 and "the network is told nothing instead of '{label}'" in told
    assert len(read_pairs(pairs)) == 2
