"""kNN as DINOv2 evaluates it: a softmax over the nearest 200, of which the first k vote."""

import numpy as np
import pytest

from repkit.heads.knn import fit_knn


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_votes_are_those_of_a_softmax_over_the_nearest(temperature):
    random = np.random.default_rng(0)
    labels = random.integers(0, 7, 600)
    centres = random.normal(size=(7, 12))
    bank, held = (centres[y] + 1.5 * random.normal(size=(len(y), 12)) for y in (labels, labels[:150]))
    probe = fit_knn(bank, labels, ks=(10, 20, 100, 200), temperature=temperature, validation=(held, labels[:150]))
    scores = []
    for k in (10, 20, 100, 200):
        hits = 0
        for row, label in zip(held, labels[:150], strict=True):
            cosine = bank @ row / np.linalg.norm(bank, axis=1) / np.linalg.norm(row)
            nearest = np.argsort(-cosine)[:200]
            weights = np.exp(cosine[nearest] / temperature)
            weights /= weights.sum()
            votes = [sum(weights[:k][labels[nearest[:k]] == c]) for c in range(7)]
            hits += int(np.argmax(votes) == label)
        scores.append(hits / 150)
    assert probe.chosen.candidates == (10, 20, 100, 200)
    assert probe.chosen.scores == pytest.approx(scores)
    assert len(set(scores)) > 1, "the case must tell the ks apart"
