"""Where the vectors of an index come from: arrays, Features, or a store; and whether they go together."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32
from torch import Tensor

from repkit.features import Features, Identity, identity_differences
from repkit.pooling import pool
from repkit.store import FeatureStore

Vectors = np.ndarray | Tensor  # [n d] of numbers, which is checked in `check_vectors`


def read_store(store: FeatureStore, key: str | None) -> tuple[Float32[np.ndarray, "n d"], pa.Table, dict[str, Any]]:
    """A store's vectors, items, and what an index keeps of where they come from."""
    if key is None and len(store.keys) != 1:
        raise ValueError(f"{store.path} has {len(store.keys)} keys; choose one with key=: {', '.join(store.keys)}")
    key = store.keys[0] if key is None else key
    how = store.identity["pool"]
    if how == "none":
        raise ValueError(f'{store.path} holds maps, not vectors; export it with pool="mean" or another pooling')
    vectors = check_vectors(store.array(key))
    described = {"key": key, "pool": how, "identity": _told(store), "provenance": store.provenance}
    return vectors, store.table.drop_columns(["row"]), described


def check_vectors(vectors: Vectors) -> Float32[np.ndarray, "n d"]:
    """The array in float32; ValueError for what is not a finite matrix."""
    values = vectors.detach().float().cpu().numpy() if isinstance(vectors, Tensor) else np.asarray(vectors)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise ValueError(f"have {values.dtype} of shape {values.shape}; give numbers of shape [n d], a row an image")
    with np.errstate(over="ignore"):  # told just below
        values = np.ascontiguousarray(values, np.float32)
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise ValueError(f"row {int(finite.argmin())} is not finite (of {len(values)}); leave out NaN and infinities")
    return values


def _told(store: FeatureStore) -> Identity:
    """The extractor's identity, with the condition that the export told it where there was one."""
    cond = store.identity["cond"]
    return store.identity["extractor"] if cond is None else {**store.identity["extractor"], "cond": cond}


def pooled(features: Features, identity: Identity | None, key: str | None, how: str | None) -> Tensor:
    """Features as the vectors of the index that has this identity, key and pooling.

    Raises ValueError where another extractor made them, naming the differences, or nothing says which made the index.
    """
    if identity is None or key is None or how is None:
        raise ValueError(
            "the index was built from an array, so nothing says which extractor made it; pool the features "
            "yourself and give the array"
        )
    mine, theirs = _as_json(identity), _as_json(features.identity)
    if (told := prompts_of_their_own(mine.get("cond"))) and mine["cond"] != theirs.get("cond"):
        raise ValueError(
            f"each image of the index was told {told}, so Features of another condition do not compare; pool them "
            "yourself and give the array"
        )
    check_same(mine, theirs)
    return pool(features[key].float(), how, features.mask)


def check_same(mine: Identity | None, theirs: Identity, pool: str | None = None, other_pool: str | None = None) -> None:
    """Raise ValueError naming how an index and what is to be compared with it, or added, differ."""
    differences = identity_differences(_as_json(mine or {}), _as_json(theirs))
    if pool != other_pool:
        differences.append(f"pool: {pool} here, {other_pool} there")
    if differences:
        raise ValueError(
            "the queries come from another extractor than the index (index here, queries there): "
            + "; ".join(differences)
        )


def prompts_of_their_own(cond: Any) -> str | None:
    """What each image of a store was told, where that was not the same for all; None where it was."""
    if isinstance(cond, Mapping):
        return "the prompt that its list has for it"
    if isinstance(cond, str) and "{" in cond:
        return f"its own form of {cond!r}"
    return None if cond is None or isinstance(cond, str | int) else f"one of {len(cond)} prompts"


def _as_json(identity: Identity) -> Any:
    """As it comes back from a manifest, where a tuple is a list."""
    return json.loads(json.dumps(identity))
