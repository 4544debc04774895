"""Transformer: any extractor as a step of a scikit-learn pipeline, images in and pooled features out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from numpy.typing import ArrayLike
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from torch import Tensor

from repkit.extractors import Extractor
from repkit.pooling import pool, pooled_shape

Batch = Float[Tensor, "b 3 H W"] | Sequence[Image.Image | Path | str]


class Transformer(TransformerMixin, BaseEstimator):
    """Images -> [n d] float32: the map of one tap, pooled. There is nothing to fit.

    extractor: shared by all clones, since it is frozen and may be large. key: which tap, where the extractor has
    several. pool: mean, max, gem or NxN. batch_size: images in one forward.

    `Pipeline([("features", Transformer(extractor)), ("scale", StandardScaler()), ("head", LogisticRegression())])`
    is a classifier of image files.
    """

    def __init__(self, extractor: Extractor, key: str | None = None, pool: str = "mean", batch_size: int = 16) -> None:
        self.extractor = extractor
        self.key = key
        self.pool = pool
        self.batch_size = batch_size

    def fit(self, X: Any = None, y: ArrayLike | None = None) -> "Transformer":
        """Check the parameters; ValueError for an unknown key or pooling, or several taps without a key."""
        self._width()
        return self

    def transform(self, X: Any) -> Float32[np.ndarray, "n d"]:
        """The pooled features of X: a sequence of paths or PIL images, or a tensor [n 3 H W], RGB in [0, 1]."""
        width = self._width()
        rows = [self._rows(batch) for batch in self._batches(X)]
        return np.concatenate(rows) if rows else np.empty((0, width), np.float32)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """`norm_0`, `norm_1`, ...: the tap and the place in its pooled vector."""
        return np.asarray([f"{self._key()}_{index}" for index in range(self._width())], dtype=object)

    def __sklearn_clone__(self) -> "Transformer":
        return type(self)(**self.get_params(deep=False))

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        return tags

    def _batches(self, images: Any) -> Iterator[Batch]:
        numbers = isinstance(images, np.ndarray) and (images.ndim != 1 or images.dtype.kind not in "OU")
        if isinstance(images, str) or numbers or hasattr(images, "columns"):
            kind = type(images).__name__
            raise TypeError(f"X is a {kind}; give a list of paths or PIL images, or a tensor [n 3 H W]")
        images = images if isinstance(images, Tensor) else list(images)
        for start in range(0, len(images), self.batch_size):
            yield images[start : start + self.batch_size]

    def _rows(self, batch: Batch) -> Float32[np.ndarray, "b d"]:
        features = self.extractor(batch)
        return pool(features[self._key()], self.pool, features.mask).float().cpu().numpy()

    def _key(self) -> str:
        keys = list(self.extractor.blocks)
        if self.key is None and len(keys) > 1:
            raise ValueError(f"the extractor has {len(keys)} taps, {', '.join(keys)}; say which by key=")
        if self.key is not None and self.key not in keys:
            raise ValueError(f"no tap {self.key!r} in the extractor; have {', '.join(keys)}")
        return keys[0] if self.key is None else self.key

    def _width(self) -> int:
        """Features of one image; ValueError for parameters that do not make a vector."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; give at least 1")
        shape = pooled_shape(self.extractor.shapes[self._key()], self.pool)
        if len(shape) != 1:
            raise ValueError(f"pool={self.pool!r} leaves maps; have mean, max, gem or NxN for vectors")
        return shape[0]
