"""Vectors of real pictures, and brute force over them."""

import numpy as np

from repkit.datasets.fashion_mnist import load


def pixels(count, side=7):
    """The first test images of Fashion-MNIST, averaged to side x side pixels, and their labels."""
    images, labels = load("test")
    step = 28 // side
    small = images[:count].reshape(-1, side, step, side, step).mean((2, 4))
    return small.reshape(len(small), -1).astype(np.float32) / 255, labels[:count]


def brute_force(vectors, queries, k, metric, allowed=None):
    """Scores and rows in float64, nearest first; fewer than k columns where fewer are allowed."""
    x, q = (np.asarray(array, np.float64) for array in (vectors, queries))
    if metric == "cosine":
        x, q = (array / np.linalg.norm(array, axis=1, keepdims=True) for array in (x, q))
    products = q @ x.T
    far = -products
    if metric == "l2":
        far = np.sqrt(np.maximum((q**2).sum(1)[:, None] + (x**2).sum(1) - 2 * products, 0))
    rows = np.arange(len(x)) if allowed is None else np.flatnonzero(allowed)
    best = rows[np.argsort(far[:, rows], axis=1, kind="stable")[:, :k]]
    scores = np.take_along_axis(far, best, 1)
    return (scores if metric == "l2" else -scores), best


def recall(vectors, queries, rows, metric, allowed=None):
    """The share of the 10 nearest that was found; of equally near ones any counts."""
    limit = brute_force(vectors, queries, rows.shape[1], metric, allowed)[0][:, -1:]
    chosen = np.asarray(vectors, np.float64)[rows]
    asked = np.asarray(queries, np.float64)[:, None]
    if metric == "cosine":
        chosen = chosen / np.linalg.norm(chosen, axis=2, keepdims=True)
        asked = asked / np.linalg.norm(asked, axis=2, keepdims=True)
    if metric == "l2":
        right = np.linalg.norm(chosen - asked, axis=2) <= limit * (1 + 1e-6)
    else:
        right = (chosen * asked).sum(2) >= limit - 1e-6 * np.abs(limit)
    return (right & (rows >= 0)).mean()
