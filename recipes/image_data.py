"""ImageData: images, cropped and flipped at random, through a frozen model in every step."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch.utils.data import DataLoader, Dataset, default_collate

from repkit.datasets.masks import IGNORE
from repkit.datasets.readers import READERS
from repkit.datasets.samples import Samples
from repkit.heads.scores import stratified_split
from repkit.recipes.extraction import Extraction, at_step, strides_of
from repkit.recipes.feature_data import Batch, FeatureData, Lists
from repkit.recipes.views import View, Views


class ImageData(FeatureData):
    """Images through a frozen model in every step.

    Args:
        name: reader of the data set: folder, imagenet, tiny-imagenet, cifar10, cub, flowers102, aircraft, voc, ...
        root: folder of the data set; null for the bundled images of fashion-mnist
        train: split to train on
        validation: split that chooses among heads; null holds out a fifth of each class of the training split
        test: split that is scored once, at the end; null for none
        options: what else the reader takes, such as subset or level
        extraction: the model and its taps
        views: random crops and flips
        batch: images a step, on all processes together
        epochs: passes over the training images
        validate_every: epochs between validations
        workers: processes that decode; 0 decodes in line
        seed: decides the order of the images, their crops, and what is held out
    """

    def __init__(
        self,
        name: str,
        root: str | None = None,
        train: str = "train",
        validation: str | None = None,
        test: str | None = "test",
        options: dict[str, Any] | None = None,
        extraction: Extraction = Extraction(),  # noqa: B008 - frozen
        views: Views = Views(),  # noqa: B008 - frozen
        batch: int = 128,
        epochs: float = 1,
        validate_every: float = 1,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch, epochs, validate_every, seed)
        if name not in READERS:
            raise ValueError(f"no data set {name!r}; have {', '.join(READERS)}")
        self.name, self.root, self.options = name, root, options or {}
        self.splits = {"train": train, "validation": validation, "test": test}
        self.extraction, self.views, self.workers = extraction, views, workers

    @cached_property
    def samples(self) -> dict[str, Samples]:
        """The samples of each part."""
        found = {part: self._read(split) for part, split in self.splits.items() if split is not None}
        if "validation" not in found:
            train = found["train"]
            some = np.arange(len(train)) if train.labels is None else train.labels
            kept, held = stratified_split(some if train.labels is not None else some * 0, 0.2, self.seed)
            found["train"], found["validation"] = train.take(kept.tolist()), train.take(held.tolist())
        if differing := [part for part in found if found[part].classes != found["train"].classes]:
            raise ValueError(f"the classes of {differing[0]} are not those of train; give splits of one data set")
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features of an evaluation, as JSON-ready data."""
        parts = {name: getattr(self, name) for name in ("name", "root", "options", "splits", "seed", "batch")}
        return {**parts, "extraction": asdict(self.extraction), "views": asdict(self.views)}

    def count(self, part: str) -> int:
        return len(self.samples[part])

    @property
    def tested(self) -> bool:
        return self.splits["test"] is not None

    def setup(self, stage: str) -> None:
        """Build the extractor, on the device on which the heads will be."""
        assert self.trainer is not None
        if not hasattr(self, "extractor"):
            self.open(self.trainer.strategy.root_device)

    def open(self, device: str | torch.device) -> None:
        """Read the lists of the data set, and load the model."""
        self.classes = self.samples["train"].classes
        self.extractor = self.extraction.build(device)
        self.sizes, self.strides = self.extractor.shapes, strides_of(self.extractor)

    def features(self, part: str, rows: Sequence[int]) -> Batch:
        """Some samples of a part as evaluation sees them, with their features."""
        items = Centred(self.samples[part], self.views, self.extractor.resize.shape)
        batch = default_collate([items[row, True] for row in rows])
        return self.on_after_batch_transfer(batch, 0)

    def train_dataloader(self) -> Iterable[Batch]:
        items = Drawn(self.samples["train"], self.views, self.extractor.resize.shape, self.seed)
        return self._loader(items, batch_sampler=self.step_rows())

    def val_dataloader(self) -> Iterable[Batch]:
        return self._evaluated("validation")

    def test_dataloader(self) -> Iterable[Batch]:
        return self._evaluated("test")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Images -> features, which have no gradient."""
        images = rearrange(batch.pop("image"), "b H W c -> b c H W").float() / 255
        fresh = "step" in batch and self.extraction.noise == "step"
        extractor = at_step(self.extractor, int(batch["step"][0])) if fresh else self.extractor
        return {**batch, "features": dict(extractor(images))}

    def _read(self, split: str) -> Samples:
        return READERS[self.name](self.root, split, **self.options)

    def _evaluated(self, part: str) -> Iterable[Batch]:
        items = Centred(self.samples[part], self.views, self.extractor.resize.shape)
        return self._loader(items, batch_sampler=Lists(self.shared_rows(part), self.share))

    def _loader(self, items: Dataset, **settings: Any) -> DataLoader:
        # Workers are spawned: a fork would copy the threads' locks of a model that runs.
        context = "spawn" if self.workers else None
        return DataLoader(items, num_workers=self.workers, multiprocessing_context=context, **settings)


class Shown(Dataset):
    """Samples as tensors: image [H W 3] in 8 bits, index, label and mask where there are such."""

    def __init__(self, samples: Samples, views: Views, shape: tuple[int, int], seed: int = 0) -> None:
        self.samples, self.views, self.shape, self.seed = samples, views, shape, seed

    def __len__(self) -> int:
        return len(self.samples)

    def shown(self, sample: dict[str, Any], view: View) -> Batch:
        """A sample as it is seen through a view."""
        found: Batch = {"image": torch.from_numpy(view.image(sample["image"], self.shape)), "index": sample["index"]}
        if "label" in sample:
            found["label"] = sample["label"]
        if "mask" in sample:
            found["mask"] = torch.from_numpy(view.mask(sample["mask"], self.shape, IGNORE))
        return found


class Drawn(Shown):
    """The samples of training by (step, row): their views are functions of (seed, step, row)."""

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        step, row = place
        sample, rng = self.samples[row], np.random.default_rng([self.seed, step, row])
        view = self.views.training(sample["image"].size, self.shape, rng)
        return {**self.shown(sample, view), "step": step}


class Centred(Shown):
    """The samples of an evaluation by (row, whether it counts); those that do not have the index -1."""

    def __getitem__(self, place: tuple[int, bool]) -> Batch:
        row, counts = place
        sample = self.samples[row]
        found = self.shown(sample, self.views.evaluation(sample["image"].size, self.shape))
        return found if counts else {**found, "index": -1}
