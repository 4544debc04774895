import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repkit.extractors import DiffusionExtractor
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import replay
from repkit.zeroshot.shortlist import listed_conditions, nearest_classes
from repkit.zeroshot.staged import Staged
from repkit.zeroshot.strategies import Uniform
from tests.oracles import class_means, gaussian_backbone, gaussian_images

MEANS, VARIANCE = class_means(6, spread=0.05), 0.01
LABELS = torch.arange(6).repeat(4)
BACKBONE = gaussian_backbone("eps", MEANS, VARIANCE)
IMAGES = gaussian_images(MEANS, VARIANCE, LABELS)
LISTED = np.array([[row % 6, (row + 2) % 6, (row + 3) % 6] for row in range(len(IMAGES))])


def judge(classes=range(6), **options) -> DiffusionClassifier:
    given = {"strategy": Uniform(8), "weighting": "train", "batch_size": 64} | options
    return DiffusionClassifier(BACKBONE, classes, **given)


def extractor(taps="posterior@100") -> DiffusionExtractor:
    return DiffusionExtractor(BACKBONE, taps)


def vectors(images: torch.Tensor) -> torch.Tensor:
    (maps,) = extractor()(images).values()
    return F.normalize(maps.mean((2, 3)), dim=1)


def nearest(query: torch.Tensor, examples: torch.Tensor, labels: torch.Tensor, k: int) -> list[int]:
    """Classes by their likest example, by brute force."""
    likeness = [(float((examples[labels == label] @ query).max()), label) for label in range(6)]
    return [label for _, label in sorted(likeness, reverse=True)[:k]]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_nearest_classes_are_those_of_brute_force(k) -> None:
    examples, labels = gaussian_images(MEANS, VARIANCE, LABELS, seed=1), LABELS
    found = nearest_classes(extractor(), examples, labels.tolist(), k)(IMAGES)
    known = vectors(examples)
    assert found.tolist() == [nearest(query, known, labels, k) for query in vectors(IMAGES)]


def test_a_class_far_off_is_found_behind_many_examples_of_another() -> None:
    labels = np.array([0] * 200 + [1, 2])
    examples = gaussian_images(MEANS, VARIANCE, torch.from_numpy(labels))
    examples[200:] = 1 - examples[0]  # less like than all the others
    found = nearest_classes(extractor(), examples, labels, 3)(examples[:2])
    assert [sorted(row) for row in found.tolist()] == [[0, 1, 2], [0, 1, 2]] and (found[:, 0] == 0).all()


def test_listed_classes_get_the_full_posterior_given_the_list_and_others_nothing() -> None:
    full, short = judge().classify(IMAGES), judge(shortlist=lambda images: LISTED).classify(IMAGES)
    listed = torch.from_numpy(LISTED)
    mine = full.log_posterior.gather(1, listed)
    torch.testing.assert_close(short.log_posterior.gather(1, listed), mine.log_softmax(1), rtol=0, atol=1e-4)
    others = torch.ones(len(IMAGES), 6, dtype=torch.bool).scatter(1, listed, False)
    assert (short.probabilities[others] == 0).all() and (short.scores[others] == torch.inf).all()
    assert short.labels == listed.gather(1, mine.argmax(1, keepdim=True))[:, 0].tolist()
    assert short.evaluations.tolist() == [3 * 8] * len(IMAGES)


@pytest.mark.parametrize("strategy", [Uniform(8), Staged((2, 1), (4, 8))], ids=repr)
def test_prompts_of_listed_classes_are_looked_at_live_and_replayed(strategy) -> None:
    classes = {"a": [0, 1], "b": [2], "c": [3, 4, 5]}
    listed = np.array([[0, 2], [1, 1], [2, 1], [0, 1]])
    short = judge(classes, strategy=strategy, shortlist=lambda images: listed)
    live = short.measure(IMAGES[:4])
    looked = [set(np.nonzero(~np.isnan(errors[..., 0]).all(1))[0]) for errors in live.errors]
    assert looked == [{0, 1, 3, 4, 5}, {2}, {2, 3, 4, 5}, {0, 1, 2}]
    assert short.rule.posterior(live).labels[1] == "b"
    candidates = listed_conditions(listed, short.owner, 4)
    again = replay(short.complete.measure(IMAGES[:4]), strategy, short.rule.weights, candidates=candidates)
    np.testing.assert_allclose(live.errors, again.errors, rtol=1e-6)


def test_a_shortlist_made_of_examples_answers_as_all_classes_do() -> None:
    retriever = nearest_classes(extractor(), gaussian_images(MEANS, VARIANCE, LABELS, seed=1), LABELS.tolist(), 5)
    full, short = judge().classify(IMAGES), judge(shortlist=retriever).classify(IMAGES)
    kept = [label in row for label, row in zip(full.labels, retriever(IMAGES).tolist(), strict=True)]
    agreed = [mine == yours for mine, yours in zip(full.labels, short.labels, strict=True)]
    assert sum(kept) > 12 and [one for one, there in zip(agreed, kept, strict=True) if there] == [True] * sum(kept)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (np.array([0, 1]), r"shape \(2,\)"),
        (np.array([[0, 1]] * 3), r"shortlist of 2 images has shape \(3, 2\)"),
        (np.zeros((2, 0), int), r"shape \(2, 0\)"),
        (np.array([[0.0, 1.0]] * 2), "float64; give class numbers"),
        (np.array([[0, 6]] * 2), "class number 6; have 0 to 5"),
        (np.array([[-1, 3]] * 2), "class number -1"),
    ],
)
def test_bad_lists_are_told(listed, message) -> None:
    with pytest.raises(ValueError, match=message):
        judge(shortlist=lambda images: listed).classify(IMAGES[:2])


def test_bad_examples_are_told() -> None:
    with pytest.raises(ValueError, match="keys posterior@100, posterior@200; give one of a single key"):
        nearest_classes(extractor("posterior@100,200"), IMAGES, LABELS.tolist(), 2)
    with pytest.raises(ValueError, match=r"shape \(3,\) and int64 for 24 images"):
        nearest_classes(extractor(), IMAGES, [0, 1, 2], 2)
    with pytest.raises(ValueError, match="give one int each"):
        nearest_classes(extractor(), IMAGES[:2], np.array([0.5, 1.0]), 2)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k={k} of the 6 classes.*give 1 to 6"):
            nearest_classes(extractor(), IMAGES, LABELS.tolist(), k)
