"""Backbones whose data is Gaussian, so that their best denoiser and the true posterior are known in closed form."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from repkit.backbones.base import Backbone
from repkit.backbones.conditions import Cond, Condition
from repkit.backbones.labels import class_labels
from repkit.capture import Point
from repkit.schedule import Schedule

PREDICTIONS = ("eps", "v", "x0", "flow", "edm")
SIGMA_DATA = 0.5
STEPS = 1000


def alphas_cumprod() -> np.ndarray:
    """The linear beta table of Ho et al. 2020, float64 [1000]."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, STEPS))


def noise_levels(prediction: str, t: Tensor, table: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at native times, written down again rather than asked of a Schedule; table: alpha(t)^2."""
    t = t.double()
    if prediction == "flow":
        return 1 - t / 1000, t / 1000
    if prediction == "edm":
        return torch.ones_like(t), t
    kept = torch.from_numpy(np.asarray(table or alphas_cumprod())).to(t.device)[t.long()]
    return kept.sqrt(), (1 - kept).sqrt()


def express(prediction: str, x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of this prediction returns when its estimate is `x0`; each from its own definition."""
    eps = (x_t - alpha * x0) / sigma
    if prediction == "edm":  # alpha = 1: x0 = c_skip*x_t + c_out*F
        c_skip = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)
        c_out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
        return (x0 - c_skip * x_t) / c_out
    return {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[prediction]


class PosteriorMean(nn.Module):
    """E[x0 | x_t, class] for x0 ~ N(mean of the class, variance*I); the class past the last is their even mixture."""

    def __init__(self, means: Float[Tensor, "k c h w"], variance: float) -> None:
        super().__init__()
        self.means = nn.Parameter(means.clone(), requires_grad=False)
        self.variance = variance

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Float[Tensor, "b c h w"]:
        means = self.means.to(x_t.dtype)
        residual = x_t[:, None] - alpha[:, None] * means  # [b k c h w]
        spread = alpha**2 * self.variance + sigma**2  # of x_t around alpha*mean
        each = means + (alpha * self.variance / spread)[:, None] * residual
        distance = reduce(residual**2, "b k c h w -> b k", "sum")
        mixed = torch.softmax(-distance / (2 * rearrange(spread, "b 1 1 1 -> b 1")), dim=1)
        known = (labels[:, None] == torch.arange(len(means), device=labels.device)).to(mixed)
        weights = torch.where((labels == len(means))[:, None], mixed, known)
        return einsum(weights, each, "b k, b k c h w -> b c h w")


class GaussianDenoiser(nn.Module):
    """The network that cannot be better: the prediction that follows from the posterior mean, in float64 inside."""

    def __init__(
        self, prediction: str, means: Float[Tensor, "k c h w"], variance: float, table: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.prediction, self.table = prediction, table
        self.posterior = PosteriorMean(means, variance)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Float[Tensor, "b c h w"]:
        alpha, sigma = (rearrange(level, "b -> b 1 1 1") for level in noise_levels(self.prediction, t, self.table))
        x0 = self.posterior(x_t.double(), alpha, sigma, labels)
        return express(self.prediction, x0, x_t.double(), alpha, sigma).to(x_t.dtype)


class GaussianBackbone(Backbone):
    """Class-conditional Gaussian data in pixel space; block `posterior` is E[x0 | x_t], and None the mixture."""

    def __init__(
        self,
        prediction: str,
        means: Float[Tensor, "k c h w"],
        variance: float,
        class_names: Sequence[str] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.name = f"gaussian-{prediction}"
        self.schedule = schedule or gaussian_schedule(prediction)
        self.model = GaussianDenoiser(prediction, means, variance, self.schedule.alphas_cumprod).eval()
        self.size, self.multiple = means.shape[-1], 1
        self.class_names = class_names or [f"class {k}" for k in range(len(means))]
        self.clean_t = 0.01 if prediction == "edm" else 0  # F has no value at sigma = 0

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
        return images * 2 - 1

    def condition(self, cond: Cond, batch: int) -> Condition:
        names = self.class_names
        assert names is not None
        labels = class_labels(cond, batch, names=names, count=len(names), null=len(names), model=self.name)
        return Condition({"labels": labels.to(self.device)})

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return model(x_t, t, **condition.tensors)

    @cached_property
    def points(self) -> Mapping[str, Point]:
        return {"posterior": Point("posterior")}


class ExactBackbone(GaussianBackbone):
    """The same in float64 from end to end."""

    def denoise(self, x_t: Float[Tensor, "b c h w"], t: Tensor | float | int, condition: Condition) -> Tensor:
        return self.model(x_t.double(), torch.as_tensor(t).double().expand(len(x_t)), **condition.tensors)


def gaussian_schedule(prediction: str) -> Schedule:
    """A rectified flow for "flow", sigma in 0.02 ... 20 for "edm", the linear beta table for the others."""
    if prediction == "flow":
        return Schedule.flow()
    if prediction == "edm":
        return Schedule.edm(0.02, 20.0, SIGMA_DATA)
    return Schedule.discrete(alphas_cumprod().tolist(), prediction)


def gaussian_backbone(
    prediction: str, means: Float[Tensor, "k c h w"], variance: float, **options: Any
) -> GaussianBackbone:
    """A backbone for data x0 ~ N(means[label], variance*I), x0 = 2*image - 1; class_names and schedule may be given."""
    return GaussianBackbone(prediction, means, variance, **options)


def gain(prediction: str, alpha: np.ndarray, sigma: np.ndarray, variance: float) -> np.ndarray:
    """The error the prediction makes per unit of x0 - mean, beside one in eps that all classes share.

    Of E[x0 | x_t] it is x0 - mean - alpha*variance/spread * (x_t - alpha*mean) = sigma^2/spread * (x0 - mean) + ...
    """
    of_x0 = sigma**2 / (alpha**2 * variance + sigma**2)
    of_eps = alpha / sigma * of_x0
    edm = np.sqrt(sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) * of_x0  # 1 / c_out
    return {"x0": of_x0, "eps": of_eps, "v": of_x0 / sigma, "flow": of_x0 / sigma, "edm": edm}[prediction]


def squared_distances(images: Float[Tensor, "b c h w"], means: Float[Tensor, "k c h w"]) -> np.ndarray:
    """||x0 - mean||^2 [b k], in float64."""
    residual = (2 * images.double() - 1)[:, None] - means.double()
    return reduce(residual**2, "b k c h w -> b k", "sum").numpy()


def class_means(classes: int, *, size: int = 4, spread: float = 0.1, seed: int = 0) -> Float[Tensor, "k 3 h w"]:
    """Random class means around 0, near enough to it that images of a small variance stay in [0, 1]."""
    return spread * torch.randn(classes, 3, size, size, generator=torch.Generator().manual_seed(seed))


def gaussian_images(
    means: Float[Tensor, "k c h w"], variance: float, labels: Tensor, *, seed: int = 0
) -> Float[Tensor, "b c h w"]:
    """One image in [0, 1] for each label, drawn from its class."""
    noise = torch.randn(len(labels), *means.shape[1:], generator=torch.Generator().manual_seed(seed))
    images = (means[labels] + variance**0.5 * noise + 1) / 2
    assert images.min() >= 0 and images.max() <= 1, "take a smaller spread or variance: clipped data is not Gaussian"
    return images


def bayes_log_posterior(
    images: Float[Tensor, "b c h w"],
    means: Float[Tensor, "k c h w"],
    variance: float,
    prior: Sequence[float] | None = None,
) -> Float[Tensor, "b k"]:
    """The true log p(class | image), float64."""
    residual = (2 * images.double() - 1)[:, None] - means.double()
    loglik = -reduce(residual**2, "b k c h w -> b k", "sum") / (2 * variance)
    weights = torch.ones(len(means)) if prior is None else torch.tensor(prior)
    return torch.log_softmax(loglik + weights.double().log(), dim=1)


def exact_eps_errors(
    x0: np.ndarray, means: np.ndarray, variance: float, alpha: np.ndarray, sigma: np.ndarray, eps: np.ndarray
) -> np.ndarray:
    """||eps - E[eps | x_t, class]||^2 [b k n] for x0 [b d], means [k d], levels [n] and noise [b n d]."""
    spread = alpha**2 * variance + sigma**2
    from_eps = (alpha**2 * variance / spread)[:, None] * eps  # [b n d]
    from_x0 = (alpha * sigma / spread)[:, None] * (x0[:, None] - means)[:, :, None]  # [b k n d]
    return ((from_eps[:, None] - from_x0) ** 2).sum(-1)
