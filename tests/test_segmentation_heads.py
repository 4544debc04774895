"""Supervised segmentation heads and scores against plain torch, torchmetrics and networks trained one by one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from repkit.heads.dense_training import DenseRule, segmentation_loss, train_dense
from repkit.heads.fpn import Fpn
from repkit.heads.linear_segmentation import LinearSegmentation
from repkit.heads.matching_labels import class_of_clusters, matched_iou
from repkit.heads.miou import IGNORE, count_pixels, mean_iou
from repkit.heads.pixel_bank import PixelBank
from repkit.heads.pixel_training import PixelRule, drop_small, pixel_order, train_pixels
from repkit.heads.pixels import PixelEnsemble
from repkit.heads.places import by_stride, joined, pixel_places, sample
from repkit.heads.votes import disagreement, majority, most_uncertain

SHAPES = [(5, 3, 4), (7, 6, 8), (2, 12, 16)]
ROOT = Path(__file__).parent.parent


def maps(generator, count=2):
    return [torch.randn(count, *shape, generator=generator) for shape in SHAPES]


def enlarged(levels, size):
    """All maps at full size, side by side: what nothing here ever makes."""
    return torch.cat([F.interpolate(one, size, mode="bilinear", align_corners=False) for one in levels], 1)


# --- places


@pytest.mark.parametrize("size", [(12, 16), (24, 32), (9, 11)])
def test_pixels_are_those_of_enlarged_maps(generator, size):
    levels = maps(generator)
    whole = enlarged(levels, size)
    bank = PixelBank(2, SHAPES)
    for image in range(2):
        bank.fill(image, [one[image] for one in levels])
    places = pixel_places(*size).flatten(0, 1)
    for image in range(2):
        expected = whole[image].flatten(1).T
        found = bank.at(torch.full((len(places),), image), places)
        assert bank.channels == 14 and torch.allclose(found, expected, atol=1e-5)
        assert torch.allclose(
            torch.cat([sample(one[image : image + 1], places)[0] for one in levels], 1), expected, atol=1e-5
        )


def test_maps_of_one_stride_are_side_by_side(generator):
    one, two, three = (torch.randn(1, c, s, s, generator=generator) for c, s in ((2, 4), (3, 8), (4, 4)))
    levels = by_stride({"a": one, "b": two, "c": three}, {"a": 8, "b": 4, "c": 8})
    assert list(levels) == [4, 8] and torch.equal(levels[8], torch.cat([one, three], 1))
    whole = joined(levels)
    assert whole.shape == (1, 9, 8, 8)
    assert torch.allclose(whole[:, :3], F.normalize(two, dim=1))


# --- pixel classifiers


def plain_network(ensemble, number):
    """One network of the ensemble as the protocol's own sequence of modules."""
    layers: list[nn.Module] = []
    for depth, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
        linear = nn.Linear(*weight.shape[1:]).to(weight.dtype)
        linear.weight.data, linear.bias.data = weight[number].detach().T.clone(), bias[number, 0].detach().clone()
        layers.append(linear)
        if depth + 1 < len(ensemble.weights):
            layers += [nn.ReLU(), nn.BatchNorm1d(weight.shape[2]).to(weight.dtype)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("classes", "hidden"), [(29, (128, 32)), (30, (256, 128))])
def test_sizes_and_weights_are_the_published_ones(classes, hidden):
    ensemble = PixelEnsemble([40, 24], classes)
    assert [tuple(weight.shape) for weight in ensemble.weights] == [
        (10, 64, hidden[0]),
        (10, hidden[0], hidden[1]),
        (10, hidden[1], classes),
    ]
    assert abs(ensemble.weights[0].std().item() - 0.02) < 5e-4 and not any(bias.any() for bias in ensemble.biases)
    assert not torch.equal(ensemble.weights[0][0], ensemble.weights[0][1])


def test_the_first_layer_at_each_maps_size_is_that_on_enlarged_maps(generator):
    levels, ensemble = maps(generator), PixelEnsemble([5, 7, 2], 4, networks=3, seed=1)
    with torch.no_grad():
        for state in ensemble.state_dict().values():
            if state.is_floating_point():
                state.copy_(torch.rand(state.shape, generator=generator) + 0.1)
        ensemble.eval()
        places = pixel_places(24, 32).flatten(0, 1)
        found = torch.cat(list(ensemble.logits([one[1] for one in levels], places, chunk=100)), 1)
    pixels = enlarged(levels, (24, 32))[1].flatten(1).T
    for number in range(3):
        network = plain_network(ensemble, number)
        for norm, own in zip((m for m in network if isinstance(m, nn.BatchNorm1d)), ensemble.norms, strict=True):
            for name, state in norm.state_dict().items():
                if state.ndim:
                    state.copy_(own.state_dict()[name].view(3, -1)[number])
        expected = network.eval()(pixels).detach()
        assert (found[number] - expected).abs().max() <= 1e-5 * expected.abs().max()
    labels, uncertain = ensemble.predict([one[1] for one in levels], places)
    assert torch.equal(labels, majority(found)) and torch.allclose(uncertain, disagreement(found), atol=1e-5)


def train_alone(network, vectors, labels, number, rule, seed):
    """The protocol for one network, written out; the step at which it stopped."""
    optimizer, best, waited, step = torch.optim.Adam(network.parameters(), lr=rule.lr), float("inf"), 0, 0
    network.train()
    for epoch in range(rule.epochs):
        order = torch.from_numpy(pixel_order(len(labels), number, epoch, seed))
        for rows in order.split(rule.batch):
            if len(rows) == 1:
                continue
            optimizer.zero_grad()
            loss = F.cross_entropy(network(vectors[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            step += 1
            if epoch >= rule.settle:
                best, waited = (loss.item(), 0) if loss.item() < best else (best, waited + 1)
                if waited > rule.patience:
                    return step
    return step


def test_networks_trained_together_are_those_trained_alone(generator):
    """In float64, where only mistakes differ; each stops by its own loss."""
    levels = [one.double() for one in maps(generator)]
    masks = torch.randint(0, 3, (2, 9, 13), generator=generator)
    masks[0, :2] = IGNORE  # 208 pixels are left: the last step of an epoch has 16
    ensemble = PixelEnsemble([5, 7, 2], 3, networks=4, hidden=(8, 6), seed=2).double()
    bank = PixelBank(2, SHAPES)
    bank.maps = [one.permute(0, 2, 3, 1) for one in levels]
    networks = [plain_network(ensemble, number) for number in range(4)]
    rule = PixelRule(epochs=40, settle=2, patience=6, lr=3e-3)
    steps = train_pixels(ensemble, bank, masks, rule, seed=5)
    pixels = torch.cat([one.flatten(1).T for one in enlarged(levels, (9, 13))])
    keep = masks.flatten() != IGNORE
    for number, network in enumerate(networks):
        assert train_alone(network, pixels[keep], masks.flatten()[keep], number, rule, 5) == steps[number]
        assert torch.allclose(network[0].weight.T, ensemble.weights[0][number], atol=1e-6)
        assert torch.allclose(network[6].weight.T, ensemble.weights[2][number], atol=1e-6)
        assert torch.allclose(network[2].running_var, ensemble.norms[0].running_var.view(4, -1)[number], atol=1e-6)
    assert len(set(steps)) > 1


def test_training_learns_what_a_linear_rule_tells(generator):
    bank = PixelBank(2, [(6, 8, 8)])
    levels = torch.randn(2, 6, 8, 8, generator=generator)
    for image in range(2):
        bank.fill(image, [levels[image]])
    masks = (levels[:, 0] > 0).long() + 2 * (levels[:, 1] > 0).long()
    ensemble = PixelEnsemble([6], 4, networks=3)
    told: list[tuple[int, int]] = []
    train_pixels(ensemble, bank, masks, PixelRule(steps=200), progress=lambda *at: told.append(at))
    labels, uncertain = ensemble.predict([levels[0]], pixel_places(8, 8).flatten(0, 1))
    assert (labels == masks[0].flatten()).float().mean() > 0.95
    assert told[0] == (0, 200) and told[-1] == (200, 200)
    assert 0 <= uncertain.min() <= uncertain.max() <= np.log(3)


def test_small_classes_are_dropped_from_an_image():
    masks = torch.zeros(2, 6, 8, dtype=torch.long)
    masks[0, :2], masks[0, 5, :3], masks[1, :3] = 1, 2, 2
    found = drop_small(masks, 16)
    assert (found[0] == IGNORE).sum() == 3 and found[0, 5, :3].eq(IGNORE).all()
    assert torch.equal(found[1], masks[1]) and masks.max() == 2


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (torch.full((1, 2, 2), IGNORE), "0 labelled pixels"),
        (torch.full((1, 2, 2), 3), "labels 3 to 3 for 3 classes"),
    ],
)
def test_masks_that_cannot_train_are_refused(masks, words):
    with pytest.raises(ValueError, match=words):
        train_pixels(PixelEnsemble([2], 3), PixelBank(1, [(2, 2, 2)]), masks)


# --- votes


def test_votes_and_disagreement_by_hand():
    p = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.6, 0.3]], [[0.2, 0.7, 0.1]], [[0.9, 0.05, 0.05]]])
    assert majority(p.log()).tolist() == [0]  # two votes each: the lower class
    assert majority(p[:3].log()).tolist() == [1]
    entropy = lambda q: -(q * np.log(q)).sum(-1)  # noqa: E731
    q = p[:, 0].double().numpy()
    assert disagreement(p.log()).item() == pytest.approx(entropy(q.mean(0)) - entropy(q).mean(), abs=1e-6)
    sure = torch.tensor([[[30.0, 0.0]], [[0.0, 30.0]]])
    assert disagreement(sure).item() == pytest.approx(np.log(2), abs=1e-6)
    assert disagreement(sure[:1]).item() == 0
    assert most_uncertain(torch.arange(30.0)) == 28


# --- scores


def test_iou_of_the_data_set_is_not_the_mean_over_images_and_classes():
    """One of eight pixels is wrong: 1/2 and 6/7 over the data set, but 1, 1/2 and 2/3 in the images."""
    truth, found = np.array([[[1, 1, 1, 1]], [[0, 1, 1, 1]]]), np.array([[[1, 1, 1, 1]], [[0, 0, 1, 1]]])
    counts = [count_pixels(one, two, 2) for one, two in zip(found, truth, strict=True)]
    whole = mean_iou(counts[0] + counts[1])
    assert whole.per_class == (1 / 2, 6 / 7) and round(whole.mean, 4) == 0.6786
    each = [score for one in counts for score in mean_iou(one).per_class if score is not None]
    assert round(np.mean(each), 4) == 0.7222
    assert whole.mean == pytest.approx(MulticlassJaccardIndex(2)(torch.tensor(found), torch.tensor(truth)).item())


FOUND = np.array([[[0, 1], [1, 2]], [[0, 0], [1, 1]]])
TRUTH = np.array([[[0, 1], [2, 2]], [[0, 0], [0, 1]]])


def test_iou_is_over_all_pixels_of_the_data_set():
    counts = [count_pixels(one, two, 3) for one, two in zip(FOUND, TRUTH, strict=True)]
    whole = mean_iou(counts[0] + counts[1])
    # Class 0: 3 of 4, class 1: 2 of 4, class 2: 1 of 2.
    assert whole.per_class == (0.75, 0.5, 0.5) and whole.mean == pytest.approx(1.75 / 3)
    metric = MulticlassJaccardIndex(3)
    assert whole.mean == pytest.approx(metric(torch.from_numpy(FOUND), torch.from_numpy(TRUTH)).item())
    # The mean over images of each image's own, which is another number.
    assert np.mean([mean_iou(one).mean for one in counts]) == pytest.approx((2 / 3 + 7 / 12) / 2)


@pytest.mark.parametrize("absent", [False, True])
def test_iou_is_that_of_torchmetrics(rng, absent):
    found, truth = rng.integers(0, 4, (2, 3, 20, 30))
    truth[rng.random(truth.shape) < 0.1] = IGNORE
    classes = 6 if absent else 4  # two are neither there nor found
    counts = sum(count_pixels(one, two, classes) for one, two in zip(found, truth, strict=True))
    given = {"num_classes": classes, "ignore_index": IGNORE}
    pair = torch.from_numpy(found), torch.from_numpy(truth)
    ours = mean_iou(counts)
    assert ours.mean == pytest.approx(MulticlassJaccardIndex(**given)(*pair).item())
    theirs = MulticlassJaccardIndex(**given, average="none")(*pair)[:4].tolist()
    assert ours.per_class == pytest.approx([*theirs, *[None] * (classes - 4)])


def test_compatible_counts_are_those_of_the_published_loop(rng):
    found, truth = rng.integers(0, 4, (2, 3, 20, 30))
    truth[rng.random(truth.shape) < 0.1] = IGNORE
    scores = []
    for label in range(5):  # 4 is nowhere
        inside = sum(((a == label) & (b == label)).sum() for a, b in zip(found, truth, strict=True))
        union = sum(((a == label) | (b == label)).sum() for a, b in zip(found, truth, strict=True))
        scores.append(inside / (union + 1e-8))
    counts = sum(count_pixels(one, two, 5) for one, two in zip(found, truth, strict=True))
    ours = mean_iou(counts, compat=True)
    assert ours.per_class == pytest.approx(scores) and ours.per_class[4] == 0
    assert ours.mean == pytest.approx(np.mean(scores)) and ours.mean < mean_iou(counts).mean


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="give both in one size"):
        count_pixels(FOUND[0], np.zeros((3, 3), int), 3)
    with pytest.raises(ValueError, match="true labels from 0 to 2; give 0 ... 1"):
        count_pixels(FOUND[1], TRUTH[0], 2)
    with pytest.raises(ValueError, match="every pixel is ignored"):
        mean_iou(count_pixels(np.zeros((2, 2), int), np.full((2, 2), IGNORE), 3))


def test_clusters_are_matched_per_image_and_per_data_set():
    """Each image is right up to the names of its clusters, which the second image has the other way round."""
    truth = np.array([[0, 0, 1, 1]])
    same, turned = (count_pixels(found, truth, 2) for found in (truth, 1 - truth))
    found = matched_iou([same, turned, same])
    assert found["matched per image"].mean == 1
    assert found["matched per data set"].per_class == (0.5, 0.5)
    assert matched_iou([turned, turned])["matched per data set"].mean == 1


def test_clusters_beyond_the_classes_are_wrong_and_of_no_class():
    truth, found = np.array([[0, 0, 0, 1, 1, IGNORE]]), np.array([[0, 0, 2, 1, 1, 0]])
    counts = count_pixels(found, truth, 2, 3)
    assert class_of_clusters(counts).tolist() == [0, 1, -1]
    assert matched_iou([counts])["matched per image"].per_class == (pytest.approx(2 / 3), 1.0)


def test_the_matching_is_the_best_of_all(rng):
    from itertools import permutations

    counts = rng.integers(1, 50, (5, 4))
    counts[-1] = 1000  # ignored pixels do not take part
    classes = class_of_clusters(counts)
    best = max(sum(counts[row, column] for column, row in enumerate(order)) for order in permutations(range(4)))
    assert sum(counts[row, column] for column, row in enumerate(classes)) == best


# --- heads on whole maps


@pytest.mark.parametrize("sizes", [[(16, 16), (8, 8), (4, 4)], [(17, 13), (9, 7), (5, 4)], [(7, 7)]])
def test_a_pyramid_takes_maps_of_any_size(generator, sizes):
    channels = {2**at: 3 + at for at in range(len(sizes))}
    levels = {
        stride: torch.randn(2, c, *size, generator=generator)
        for (stride, c), size in zip(channels.items(), sizes, strict=True)
    }
    pyramid = Fpn(channels, 5, width=8)
    logits = pyramid(levels)
    assert logits.shape == (2, 5, *sizes[0]) and logits.isfinite().all()
    alone = torch.cat([pyramid({at: one[row : row + 1] for at, one in levels.items()}) for row in range(2)])
    assert torch.allclose(alone, logits, atol=1e-5)
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in pyramid.parameters())
    with pytest.raises(ValueError, match="this pyramid takes"):
        pyramid({3: levels[1]})


def test_a_pyramid_is_what_is_written_here(generator):
    levels = {1: torch.randn(1, 3, 8, 8, generator=generator), 2: torch.randn(1, 4, 4, 4, generator=generator)}
    pyramid = Fpn({2: 4, 1: 3}, 2, width=8)
    for parameter in pyramid.parameters():
        nn.init.normal_(parameter, generator=generator)
    up = lambda x: F.interpolate(x, (8, 8), mode="bilinear", align_corners=False)  # noqa: E731
    state = pyramid.state_dict()
    layer = lambda x, name, pad: F.group_norm(  # noqa: E731
        F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], padding=pad),
        8,
        state[f"{name}.1.weight"],
        state[f"{name}.1.bias"],
    )
    coarse = layer(levels[2], "lateral.2", 0)
    fine = layer(levels[1], "lateral.1", 0) + up(coarse)
    total = layer(fine, "smooth.1.0", 1).relu() + up(layer(coarse, "smooth.2.0", 1).relu())
    expected = F.conv2d(total, state["head.weight"], state["head.bias"])
    assert torch.allclose(pyramid(levels), expected, atol=1e-4)


def test_the_linear_head_is_a_convolution_on_enlarged_maps(generator):
    levels = {1: torch.randn(2, 3, 8, 8, generator=generator), 2: torch.randn(2, 4, 4, 4, generator=generator)}
    head = LinearSegmentation({1: 3, 2: 4}, 5).eval()
    for norm in head.norms.values():
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    units = [
        (levels[at] - head.norms[str(at)].running_mean.view(1, -1, 1, 1))
        / (head.norms[str(at)].running_var + 1e-5).sqrt().view(1, -1, 1, 1)
        for at in (1, 2)
    ]
    weight = torch.cat([head.parts["1"].weight, head.parts["2"].weight], 1)
    assert torch.allclose(head(levels), F.conv2d(enlarged(units, (8, 8)), weight, head.parts["1"].bias), atol=1e-5)


@pytest.mark.parametrize("make", [LinearSegmentation, Fpn])
def test_dense_heads_learn_from_a_handful_of_masks(generator, make):
    levels = {1: torch.randn(3, 4, 8, 8, generator=generator), 2: torch.randn(3, 3, 4, 4, generator=generator)}
    masks = (levels[1][:, 0] > 0).long()
    masks[:, 0] = IGNORE
    torch.manual_seed(0)
    head = make({1: 4, 2: 3}, 2)
    train_dense(head, levels, masks, DenseRule(steps=80, lr=3e-2), seed=1)
    with torch.no_grad():
        right = head(levels).argmax(1) == masks
    assert not head.training and right[:, 1:].float().mean() > 0.9


def test_the_loss_leaves_ignored_pixels_out(generator):
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    masks = torch.randint(0, 3, (2, 4, 4), generator=generator)
    masks[0] = IGNORE
    expected = F.cross_entropy(logits[1:], masks[1:])
    assert segmentation_loss(logits, masks).item() == pytest.approx(expected.item(), rel=1e-5)
    assert segmentation_loss(logits, torch.full_like(masks, IGNORE)).item() == 0


# --- memory

PROTOCOL = """
import resource, sys, torch
from repkit.heads.pixel_bank import PixelBank
from repkit.heads.pixel_training import PixelRule, train_pixels
from repkit.heads.pixels import PixelEnsemble
from repkit.heads.places import pixel_places
torch.set_num_threads(1)
images, side, divide, steps = map(int, sys.argv[1:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
blocks = [(1024, 32), (512, 32), (512, 32), (512, 64), (256, 128)]  # ADM's 5, 6, 7, 8, 12 at 256 pixels
shapes = [(c // divide, s * side // 256, s * side // 256) for _ in (50, 150, 250) for c, s in blocks]
bank = PixelBank(images, shapes)
for image in range(images):
    bank.fill(image, [torch.randn(shape) for shape in shapes])
masks = torch.randint(0, 28, (images, side, side), dtype=torch.uint8)
ensemble = PixelEnsemble([c for c, _, _ in shapes], 28)
train_pixels(ensemble, bank, masks, PixelRule(steps=steps))
ensemble.predict([torch.randn(shape) for shape in shapes], pixel_places(side, side).flatten(0, 1))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(bank.channels, sum(one.numel() * 4 for one in bank.maps), before * 1024, after * 1024)
"""


def peak(*arguments: int) -> list[int]:
    """Channels, bytes of the maps, and the peak of memory of a process before and after the protocol's training."""
    command = [sys.executable, "-c", PROTOCOL, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(value) for value in done.stdout.split()]


def test_memory_is_that_of_the_maps_and_little_more():
    channels, held, before, after = peak(6, 128, 8, 5)
    pixels = 6 * 128 * 128 * channels * 4
    assert channels == 1056 and held < pixels / 20
    assert after - before < held + 0.35e9 < pixels


@pytest.mark.slow
def test_the_published_protocol_fits_in_six_gigabytes():
    channels, held, _, after = peak(30, 256, 1, 200)
    assert channels == 8448 and held == pytest.approx(3.02e9, rel=0.01)
    assert after < 6e9
