"""Evidence maps: where in an image the evidence for one class rather than another lies."""

import numpy as np
import torch
from einops import reduce, repeat
from jaxtyping import Float64
from torch import Tensor

from repkit.extractors import Images
from repkit.noise import noise_like
from repkit.precision import full_float32
from repkit.zeroshot.classifier import DiffusionClassifier
from repkit.zeroshot.errortable import Label
from repkit.zeroshot.evaluating import Evaluator, Prepared

Map = Float64[Tensor, "h w"]


def evidence_maps(classifier: DiffusionClassifier, images: Images, a: Label, b: Label) -> Float64[Tensor, "b h w"]:
    """How much each pixel of the latents speaks for prompt `a` rather than `b`, in units of the score.

    The mean over all levels of weight * (loss under b - loss under a), summed over channels: positive where `a`
    explains the pixel better. A map's sum is the difference of the two scores; with a and b exchanged all signs turn.
    Raises ValueError for prompts that the classifier does not have.
    """
    for prompt in (a, b):
        if prompt not in classifier.prompts:
            raise ValueError(f"no prompt {prompt!r}; have {', '.join(map(str, classifier.prompts))}")
    pair = torch.tensor([classifier.prompts.index(a), classifier.prompts.index(b)])
    evaluator, prepared = classifier.prepared(images)
    weights = torch.from_numpy(classifier.rule.weights) / len(classifier.levels)
    with full_float32(), torch.no_grad(), torch.autocast(classifier.backbone.device.type, enabled=False):
        return torch.stack([_map(evaluator, image, pair, weights, classifier.rule.loss) for image in prepared])


def _map(evaluator: Evaluator, image: Prepared, pair: Tensor, weights: Float64[Tensor, "n"], loss: str) -> Map:
    """Of one image, a few levels at a time."""
    total = torch.zeros(image.x0.shape[-2:], dtype=torch.float64)
    step = max(1, evaluator.batch_size // 2)
    for levels in np.split(np.arange(len(weights)), range(step, len(weights), step)):
        losses = reduce(_losses(evaluator, image, levels, pair, loss), "n two c h w -> n two h w", "sum").cpu()
        total += torch.einsum("n, n h w -> h w", weights[levels], losses[:, 1] - losses[:, 0])
    return total


def _losses(
    evaluator: Evaluator, image: Prepared, levels: np.ndarray, pair: Tensor, loss: str
) -> Float64[Tensor, "n two c h w"]:
    """The loss of every latent pixel at each level under each of two prompts, with the noises of the scores."""
    grid = evaluator.levels
    eps = torch.stack(
        [
            noise_like(
                image.x0.shape, seed=evaluator.seed, digest=image.digest, t=grid.t[n].item(), draw=int(grid.draw[n])
            )
            for n in levels
        ]
    ).to(image.x0)
    x0 = repeat(image.x0, "c h w -> n c h w", n=len(levels))
    rows = repeat(torch.arange(len(levels)), "n -> (n two)", two=2)
    told = evaluator.conditions[pair.repeat(len(levels)).to(x0.device)]
    found = [_each(evaluator.residual(x0, sign * eps, levels, rows, told), loss) for sign in evaluator.signs]
    return torch.stack(found).mean(0).unflatten(0, (len(levels), 2))


def _each(residual: Float64[Tensor, "r c h w"], loss: str) -> Float64[Tensor, "r c h w"]:
    size = residual.abs()
    return {"l2": residual**2, "l1": size, "huber": torch.where(size < 1, residual**2 / 2, size - 0.5)}[loss]
