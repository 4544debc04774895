"""Typicality: how unlike the images of a reference set an image is to the model, level by level."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int

from repkit.zeroshot.errortable import ErrorTable
from repkit.zeroshot.evaluating import LOSSES

BANDS = 8


@dataclass(frozen=True, eq=False)
class Typicality:
    """Means and standard deviations of in-distribution images' log-errors, band of levels by band.

    An image's errors are those without a condition where the table has them (a condition None), else those of its best
    class. A likelihood is low for smooth images of any kind; here errors that are too small count like too large ones.
    """

    t: Float64[np.ndarray, "n"]
    mean: Float64[np.ndarray, "m"]
    deviation: Float64[np.ndarray, "m"]
    reference: Float64[np.ndarray, "r"]
    loss: str = "l2"

    @classmethod
    def fit(cls, table: ErrorTable, *, loss: str = "l2") -> "Typicality":
        """From complete errors of images like those that are to be expected; ValueError for fewer than two."""
        if len(table) < 2:
            raise ValueError(f"{len(table)} images in the reference; give at least 2, better some hundreds")
        logs = _log_errors(table, loss)
        fitted = cls(table.levels.t, logs.mean(0), logs.std(0, ddof=1), np.empty(0), loss)
        return cls(fitted.t, fitted.mean, fitted.deviation, np.sort(fitted.score(table)), loss)

    def z_scores(self, table: ErrorTable) -> Float64[np.ndarray, "b m"]:
        """Standard deviations above the reference's mean, for each band of levels, least noise first."""
        if not np.array_equal(table.levels.t, self.t):
            raise ValueError(
                f"a table of {len(table.levels)} levels, not the {len(self.t)} of the reference; take its own"
            )
        return (_log_errors(table, self.loss) - self.mean) / self.deviation

    def score(self, table: ErrorTable) -> Float64[np.ndarray, "b"]:
        """Root mean square of an image's z-scores: about 1 for images like the reference, more for others."""
        return np.sqrt((self.z_scores(table) ** 2).mean(1))

    def share(self, table: ErrorTable) -> Float64[np.ndarray, "b"]:
        """The share of reference images that are at least as untypical: a p-value of being one of them.

        The reference's own scores are in-sample: means and deviations were fitted to these images, which therefore look
        a little more typical than fresh ones, and the p-values are a little too small where the reference is.
        """
        below = np.searchsorted(self.reference, self.score(table), side="left")
        return (len(self.reference) - below + 1) / (len(self.reference) + 1)


def _log_errors(table: ErrorTable, loss: str) -> Float64[np.ndarray, "b m"]:
    """Log of each band's mean error; bands are as many levels each, so that a single noise counts for little."""
    if loss not in LOSSES:
        raise ValueError(f"no loss {loss!r}; have {', '.join(LOSSES)}")
    errors = table.errors[..., LOSSES.index(loss)]
    if np.isnan(errors).any():
        raise ValueError("the table has gaps; make it with the uniform strategy, which leaves nothing out")
    own = errors[np.arange(len(table)), _told(table, errors)]
    return np.log(np.stack([band.mean(1) for band in np.array_split(own, min(BANDS, own.shape[1]), axis=1)], 1))


def _told(table: ErrorTable, errors: Float64[np.ndarray, "b j n"]) -> Int[np.ndarray, "b"]:
    if None in table.conditions:
        return np.full(len(table), table.conditions.index(None))
    return errors.mean(2).argmin(1)
