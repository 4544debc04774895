"""Method: how a point's place in another image is chosen from scores, as plain data."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from repkit.matching.nearest import Matcher, nearest, soft_nearest
from repkit.matching.scoring import CHUNK, Metric
from repkit.matching.softargmax import Outside, kernel_soft_argmax, soft_argmax

Choice = Literal["cell", "pixel", "window", "kernel"]


@dataclass(frozen=True)
class Method:
    """How a match is found.

    choice: "cell", the centre of the target's most similar cell; "pixel", its most similar pixel, with features
    interpolated there; "window", soft-argmax within `window` cells of the best; "kernel", soft-argmax of scores damped
    by a Gaussian of `sigma` cells around the best. metric: cosine or l2 (for cell and pixel). temperature, outside: of
    the soft-argmaxes, as in `soft_argmax`.
    """

    choice: Choice = "cell"
    metric: Metric = "cosine"
    window: int = 5
    temperature: float = 0.02
    outside: Outside = "excluded"
    sigma: float = 5.0

    def __post_init__(self) -> None:
        if self.choice not in get_args(Choice):
            raise ValueError(f"no choice {self.choice!r} of a match; have {', '.join(get_args(Choice))}")
        if self.choice in ("window", "kernel") and self.metric != "cosine":
            raise ValueError(f"{self.choice} takes cosines, not {self.metric}; choose cell or pixel for {self.metric}")

    def matcher(self, chunk: int = CHUNK) -> Matcher:
        """The function that matches points so; chunk: how many scores it holds at once."""
        if self.choice in ("cell", "pixel"):
            return partial(nearest, metric=self.metric, exact=self.choice == "pixel", chunk=chunk)
        if self.choice == "window":
            locate = partial(soft_argmax, temperature=self.temperature, window=self.window, outside=self.outside)
        else:
            locate = partial(kernel_soft_argmax, temperature=self.temperature, sigma=self.sigma)
        return partial(soft_nearest, locate=locate, chunk=chunk)
