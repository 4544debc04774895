"""Many heads trained at once: each with its own learning rate and momentum, all on the same batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from repkit.heads.linear import BatchNormLinear, LinearHead
from repkit.heads.rows import Array, read

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A head that is to be trained in place, with its own learning rate and weight decay.

    key: whose features it reads; None: those of all keys, as a mapping. Weight decay is on the matrices of linear and
    convolutional layers, not on biases and norms.
    """

    head: nn.Module
    lr: float
    key: str | None = None
    weight_decay: float = 0.0

    def reads(self, batch: Batch) -> Tensor | Batch:
        """Its part of a batch."""
        return batch if self.key is None else batch[self.key]


def train_heads(
    candidates: Sequence[Candidate],
    features: Mapping[str, Array],
    labels: Int[np.ndarray, " n"],
    *,
    steps: int,
    batch_size: int = 256,
    seed: int = 0,
    momentum: float = 0.9,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Minimise each head's cross-entropy by SGD with momentum, the rate falling to 0 along a half cosine.

    Every batch is read once for all heads, and linear heads of one key are one product. The rows of a step are a
    function of (seed, step). Heads are left in eval mode.
    """
    groups = _grouped(candidates, momentum)
    order = sample_order(len(labels), batch_size, seed)
    device = next(candidates[0].head.parameters()).device
    keys = features if any(one.key is None for one in candidates) else dict.fromkeys(one.key for one in candidates)
    for candidate in candidates:
        candidate.head.train()
    for step in range(steps):
        rows = order(step)
        batch = {str(key): read(features[str(key)], rows).to(device) for key in keys}
        truth = torch.from_numpy(labels[rows]).to(device)
        for group in groups:
            group.step(batch, truth, cosine(step, steps))
        if progress:
            progress(step + 1, steps)
    for group in groups:
        group.write_back()
    for candidate in candidates:
        candidate.head.eval()


@torch.no_grad()
def logits_of(
    candidates: Sequence[Candidate], features: Mapping[str, Array], batch_size: int = 256
) -> list[Float32[np.ndarray, "n k"]]:
    """The logits of each head on all rows, which are read once."""
    device = next(candidates[0].head.parameters()).device
    found: list[list[np.ndarray]] = [[] for _ in candidates]
    for start in range(0, len(next(iter(features.values()))), batch_size):
        rows = slice(start, start + batch_size)
        batch = {key: read(array, rows).to(device) for key, array in features.items()}
        for place, candidate in enumerate(candidates):
            found[place].append(candidate.head(candidate.reads(batch)).cpu().numpy())
    return [np.concatenate(parts) for parts in found]


def sample_order(n: int, batch_size: int, seed: int) -> Callable[[int], Int[np.ndarray, " b"]]:
    """Step -> its rows in ascending order, min(n, batch_size) of them.

    The steps cut an endless row of epochs, each a permutation of all rows, so that every batch is full.
    """
    size = min(n, batch_size)

    @lru_cache(maxsize=2)
    def epoch(number: int) -> Int[np.ndarray, " n"]:
        return np.random.default_rng([seed, number]).permutation(n)

    def rows(step: int) -> Int[np.ndarray, " b"]:
        places = np.arange(step * size, (step + 1) * size)
        return np.sort(np.array([epoch(place // n)[place % n] for place in places.tolist()]))

    return rows


def cosine(step: int, steps: int) -> float:
    """Share of the learning rate at a step: 1 at the first, falling toward 0 after the last."""
    return (1 + math.cos(math.pi * step / steps)) / 2


class _One:
    """Any head, alone."""

    def __init__(self, candidate: Candidate, momentum: float) -> None:
        self.candidate = candidate
        decayed = {id(m.weight) for m in candidate.head.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        parameters = [one for one in candidate.head.parameters() if one.requires_grad]
        decays = [candidate.weight_decay if id(one) in decayed else 0.0 for one in parameters]
        self.sgd = _Sgd(parameters, candidate.lr, decays, momentum)

    def step(self, batch: Batch, truth: Int[Tensor, " b"], share: float) -> None:
        F.cross_entropy(self.candidate.head(self.candidate.reads(batch)), truth).backward()
        self.sgd.step(share)

    def write_back(self) -> None:
        pass


class _Bank:
    """Linear heads on the same rows, as one product [m d k]; their losses add, so no head feels another."""

    def __init__(self, candidates: Sequence[Candidate], momentum: float) -> None:
        self.first = candidates[0]
        self.heads = [one.head for one in candidates if isinstance(one.head, LinearHead | BatchNormLinear)]
        layers = [head.linear for head in self.heads]
        with torch.no_grad():
            self.weight = torch.stack([layer.weight.T for layer in layers]).requires_grad_()  # [m d k]
            self.bias = torch.stack([layer.bias[None] for layer in layers]).requires_grad_()  # [m 1 k]
        lrs, decays = (
            self.weight.new_tensor(values)[:, None, None]
            for values in ([one.lr for one in candidates], [one.weight_decay for one in candidates])
        )
        self.sgd = _Sgd([self.weight, self.bias], lrs, [decays, 0.0], momentum)

    def step(self, batch: Batch, truth: Int[Tensor, " b"], share: float) -> None:
        rows = self.heads[0].inputs(self.first.reads(batch))
        logits = rearrange(rows @ self.weight + self.bias, "m b k -> (m b) k")
        loss = F.cross_entropy(logits, repeat(truth, "b -> (m b)", m=len(self.heads)), reduction="sum")
        (loss / len(truth)).backward()
        self.sgd.step(share)

    @torch.no_grad()
    def write_back(self) -> None:
        """Give each head its weights, and the statistics that they share."""
        for place, head in enumerate(self.heads):
            head.linear.weight.copy_(self.weight[place].T)
            head.linear.bias.copy_(self.bias[place, 0])
            if isinstance(head, BatchNormLinear):
                head.norm.load_state_dict(self.heads[0].norm.state_dict())


class _Sgd:
    """torch.optim.SGD, but for a learning rate and decay that may be tensors: stacked heads differ in them."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float | Float[Tensor, "m 1 1"],
        decays: Sequence[float | Float[Tensor, "m 1 1"]],
        momentum: float,
    ) -> None:
        self.parameters, self.lr, self.decays, self.momentum = parameters, lr, decays, momentum
        self.velocities = [torch.zeros_like(one) for one in parameters]

    @torch.no_grad()
    def step(self, share: float) -> None:
        for parameter, velocity, decay in zip(self.parameters, self.velocities, self.decays, strict=True):
            assert parameter.grad is not None  # every parameter of a head is in its logits
            velocity.mul_(self.momentum).add_(parameter.grad + decay * parameter)
            parameter.sub_(share * self.lr * velocity)
            parameter.grad = None


def _grouped(candidates: Sequence[Candidate], momentum: float) -> list[_One | _Bank]:
    banks: dict[tuple, list[Candidate]] = {}
    groups: list[_One | _Bank] = []
    for one in candidates:
        head = one.head
        if isinstance(head, LinearHead | BatchNormLinear):
            layer = head.linear
            banks.setdefault((one.key, type(head), head.pool, layer.in_features, layer.out_features), []).append(one)
        else:
            groups.append(_One(one, momentum))
    return [_Bank(bank, momentum) for bank in banks.values()] + groups
