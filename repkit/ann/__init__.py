"""Nearest vectors: exactly, or by FAISS indexes that are tuned to a recall; arrays in, arrays out, and no torch."""

from repkit.ann.building import Built, build_vectors
from repkit.ann.nearest import METRICS, nearest, unit
from repkit.ann.searching import reconstruct, search_vectors
from repkit.ann.sizes import KINDS

__all__ = ["KINDS", "METRICS", "Built", "build_vectors", "nearest", "reconstruct", "search_vectors", "unit"]
