"""Which block and which time: one pass over labelled images a noise level, chosen on validation data, tested once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch

from repkit.dino import DinoExtractor
from repkit.extractors import DiffusionExtractor, Extractor
from repkit.features import identity_hash
from repkit.planning import check_conditions, make_conditions
from repkit.publishing import made, parquet_bytes, publish
from repkit.shards import locked
from repkit.tasks.pictures import save
from repkit.tasks.resuming import claim
from repkit.tasks.sweep_cells import Cell, make_cells, on_backbone
from repkit.tasks.sweep_latents import remember
from repkit.tasks.sweep_pictures import heat_map
from repkit.tasks.sweep_reading import Labelled, Reader, Running, label
from repkit.tasks.sweep_report import CELLS, PICTURE, RESULTS, cells_table
from repkit.tasks.sweep_search import Search, Steps, summary, tested
from repkit.zoo import random_control

SIDE = 32  # at the most, of raw pixels as a control


@dataclass(frozen=True)
class Rules:
    """What a sweep compares and reports.

    finalists: cells that logistic regression is tried on too. few_shot: labels a class. seeds: of the noise, for the
    chosen cell. control_seed: of the random weights.
    """

    pools: tuple[str, ...] = ("mean",)
    finalists: int = 5
    few_shot: tuple[int, ...] = ()
    seeds: int = 3
    control_seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("finalists", 1), ("seeds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; give at least {least}")
        if any(shots < 1 for shots in self.few_shot):
            raise ValueError(f"few-shot {', '.join(map(str, self.few_shot))}; give numbers of labels a class, from 1")


def sweep(
    listing: pa.Table,
    extractor: Extractor,
    out: str | Path,
    rules: Rules | None = None,
    *,
    cond: str | None = None,
    running: Running | None = None,
) -> dict[str, Any]:
    """Compare the extractor's taps under each pooling on the labelled images of `list_images`; the results as JSON has.

    Training rows fit ridge on every cell, validation rows choose among all cells and then, with logistic regression,
    among the best; the test rows are read after that, for the chosen cell alone. The same is done with the network's
    weights at random, and ridge is tested on raw pixels. cond: what the network is told, as in `export`.

    Writes cells.parquet, results.json, sweep.png and a part-*.json for each step into the folder `out`; the same call
    goes on after the steps that are there. Raises ValueError for labels or settings that make no sense, and for a
    folder that holds a sweep of something else; FloatingPointError for features that are not finite.
    """
    rules, running, folder = rules or Rules(), running or Running(), Path(out)
    data = label(listing, _told(extractor, listing, cond))
    _check_shots(rules.few_shot, data)
    cells = make_cells(extractor, rules.pools)
    with made(folder), locked(folder):
        claim(folder, _settings(extractor, listing, cond, rules, running), "a sweep")
        extractor.learn(None if data.conds is None else dict.fromkeys(data.conds))
        steps = Steps(folder, Reader(data, running))
        results, screened = _run(_remembering(extractor), cells, rules, steps)
        table = cells_table(cells, screened, results)
        publish(folder, {CELLS: parquet_bytes(table), RESULTS: (json.dumps(results, indent=1) + "\n").encode()})
        save(heat_map(table, results), folder / PICTURE)
    return results


def _run(
    extractor: Extractor, cells: Mapping[str, Cell], rules: Rules, steps: Steps
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results, and what screening and the finals found for each network."""
    reader, screened, controls = steps.reader, {}, dict[str, Any]()
    search = Search("trained", extractor, cells, reader, steps, rules.finalists)
    chosen, test, screened["trained"] = _search(search)
    seeds = _noise_seeds(search, chosen, test, rules.seeds)
    few = [steps(f"few-shot-{shots}", partial(search.few_shot, chosen, shots)) for shots in rules.few_shot]
    if (other := untrained(extractor, rules.control_seed)) is not None:
        control = Search("random", other, cells, reader, steps, rules.finalists)
        best, its_test, screened["random"] = _search(control)
        controls["random"] = {"chosen": best, "test": its_test}
    controls["pixels"] = {"test": steps("pixels", partial(_pixels, reader, extractor))}
    found = {
        "model": extractor.provenance.get("model"),
        "classes": list(reader.data.classes),
        "chosen": chosen,
        "test": test,
        "noise_seeds": seeds,
        "few_shot": few,
        "controls": controls,
        "seconds": steps.seconds,
        "failures": reader.failures,
    }
    return found, screened


def _search(search: Search) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The chosen cell, its test, and what decided: ridge on all cells and logistic regression on the best."""
    screened = search.screen()
    compared = search.compare(screened)
    chosen = search.choose(screened, compared)
    test = search.steps(f"{search.name}-test", partial(search.test, chosen))
    return chosen, test, {"ridge": screened, "logistic": compared}


def _noise_seeds(search: Search, chosen: dict[str, Any], test: dict[str, Any], count: int) -> dict[str, Any] | None:
    """The chosen cell's test under other noise; None where there is no noise."""
    extractor = search.extractor
    if not search.noisy(chosen) or not isinstance(extractor, DiffusionExtractor):
        return None
    seeds = [extractor.seed + number for number in range(count)]
    tests = [search.steps(f"trained-test-seed-{seed}", partial(search.test, chosen, seed)) for seed in seeds[1:]]
    return {"seeds": seeds, **summary([one["test_accuracy"] for one in (test, *tests)])}


def untrained(extractor: Extractor, seed: int = 0) -> Extractor | None:
    """The same extractor on a network with random weights; None for a network of which only the weights are known."""
    if isinstance(extractor, DiffusionExtractor):
        return on_backbone(extractor, random_control(extractor.backbone, seed))
    assert isinstance(extractor, DinoExtractor)
    if "model" not in extractor.provenance:
        return None
    source = str(extractor.provenance["model"]).removeprefix("timm:")
    source = f"local-dir:{source}" if Path(source).is_dir() and not timm.is_model(source) else source
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(source, pretrained=False, num_classes=0, dynamic_img_size=True)
    model = model.to(extractor.device, extractor.dtype).eval().requires_grad_(False)
    return DinoExtractor(model, list(extractor.blocks), resize=extractor.resize)


def _remembering(extractor: Extractor) -> Extractor:
    """The extractor, its images encoded once for all passes."""
    if not isinstance(extractor, DiffusionExtractor):
        return extractor
    return on_backbone(extractor, remember(extractor.backbone))


def _pixels(reader: Reader, extractor: Extractor) -> dict[str, Any]:
    return tested(reader, reader.pixels(extractor.resize, SIDE), "pixels", "ridge")


def _told(extractor: Extractor, listing: pa.Table, cond: str | None) -> list[str] | None:
    if cond is not None and "{label" in cond:
        raise ValueError(f"the prompt {cond!r} tells the network the label that the probe is to find; leave it out")
    conds = make_conditions(listing, cond)
    check_conditions(extractor, conds)
    return conds


def _check_shots(few_shot: Sequence[int], data: Labelled) -> None:
    counts = np.bincount(data.labels[data.splits.train], minlength=len(data.classes))
    least = int(counts.argmin())
    if few_shot and max(few_shot) > counts[least]:
        raise ValueError(
            f"few-shot {max(few_shot)}, but class {data.classes[least]} has {counts[least]} training images; give less"
        )


def _settings(
    extractor: Extractor, listing: pa.Table, cond: str | None, rules: Rules, running: Running
) -> dict[str, Any]:
    """What decides the steps that are kept; what has steps of its own, few-shot and noise seeds, is not among it."""
    images = listing.select(["id", "path", "label", "split", "prompt"]).to_pylist()
    return {
        "extractor": dict(extractor.identity),
        "cond": cond,
        "pools": list(rules.pools),
        "finalists": rules.finalists,
        "control_seed": rules.control_seed,
        "images": {"count": len(images), "sha256": identity_hash({"images": images})},
        "batch_size": running.batch_size,
        "max_pixels": running.max_pixels,
    }
