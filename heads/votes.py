"""What an ensemble of classifiers says together: the label most of them give, and how much they disagree."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def majority(logits: Float[Tensor, "n p k"]) -> Int[Tensor, " p"]:
    """The class that most of the n networks find likeliest, the lowest of several."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0).argmax(-1)


def disagreement(logits: Float[Tensor, "n p k"]) -> Float[Tensor, " p"]:
    """Jensen-Shannon divergence of the networks' probabilities, in nats: entropy of the mean less the mean entropy.

    From 0, where all say the same, to log(min(n, k)).
    """
    p = logits.softmax(-1)
    return (_entropy(p.mean(0)) - _entropy(p).mean(0)).clamp_min(0)


def most_uncertain(values: Float[Tensor, " p"], share: float = 0.1) -> float:
    """An image's uncertainty as label-efficient segmentation has it: the mean of that share of largest values."""
    return values.topk(max(1, int(values.numel() * share))).values.mean().item()


def _entropy(p: Float[Tensor, "*n k"]) -> Float[Tensor, "*n"]:
    return torch.special.entr(p).sum(-1)
