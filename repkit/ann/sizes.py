"""How large an index becomes, which kinds fit a memory, and the parameters that do not need measuring."""

from collections.abc import Mapping

KINDS = ("auto", "flat", "ivf", "hnsw", "ivf-pq")
LINKS, BUILD_EF = 16, 100  # of "hnsw": links of a vector at the upper levels (twice as many at the lowest), and effort
TRAINING = 39  # vectors for each centroid: below, FAISS warns
FEW = 1 << 22  # numbers that one query is compared with in about a millisecond: no kind is worth its trouble
_CODES = 256  # centroids of each part of a compressed vector

Parameters = dict[str, int]


def parameters_for(kind: str, count: int, dimension: int, memory: int | None = None) -> Parameters:
    """Those that the numbers decide: links of "hnsw", lists of "ivf", and bytes of a vector (`m`) of "ivf-pq".

    `m` is the largest that the memory allows, or without one a sixteenth of the vector's bytes or a little more.
    Raises ValueError for too few vectors to compress by, and for too little memory.
    """
    if kind == "flat":
        return {}
    if kind == "hnsw":
        return {"M": LINKS, "efConstruction": BUILD_EF}
    lists = {"nlist": max(1, min(round(2 * count**0.5), count // TRAINING))}
    if kind == "ivf":
        return lists
    if count < TRAINING * _CODES:
        raise ValueError(f'"ivf-pq" learns from {TRAINING * _CODES} vectors or more and has {count}; use "flat"')
    return lists | {"m": _parts(count, dimension, memory, lists)}


def size(kind: str, count: int, dimension: int, parameters: Mapping[str, int]) -> int:
    """Bytes in memory; those of raw vectors that "ivf-pq" keeps in a file are not counted."""
    if kind == "flat":
        return 4 * dimension * count
    if kind == "hnsw":
        links = 2 * parameters["M"] + parameters["M"] / (parameters["M"] - 1)
        return round(count * (4 * dimension + 4 * links + 12))  # 12: where its links are, and its level
    coarse = 4 * dimension * parameters["nlist"]
    ids = 16  # of a vector in its list, and of its place there
    if kind == "ivf":
        return coarse + count * (4 * dimension + ids)
    return coarse + 4 * dimension * _CODES + count * (parameters["m"] + ids)


def kinds_for(count: int, dimension: int, recall: float, memory: int | None) -> list[str]:
    """What "auto" tries, in the order of the time that a search takes, of the kinds that fit the memory.

    Raises ValueError where none does.
    """
    if recall >= 1 or count * dimension <= FEW:
        order = ["flat", "hnsw", "ivf", "ivf-pq"]
    else:
        order = ["hnsw", "ivf", "flat", "ivf-pq"]
    fitting = [kind for kind in order if fits(kind, count, dimension, memory)]
    if not fitting:
        needed = least(count, dimension)
        raise ValueError(f"memory={memory} bytes for {count} vectors of {dimension}; the smallest kind takes {needed}")
    return fitting


def fits(kind: str, count: int, dimension: int, memory: int | None) -> bool:
    """Whether an index of the kind can be built in so many bytes; None is any number."""
    try:
        parameters = parameters_for(kind, count, dimension, memory)
    except ValueError:
        return False
    return memory is None or size(kind, count, dimension, parameters) <= memory


def least(count: int, dimension: int) -> int:
    """The bytes of the smallest index."""
    flat = size("flat", count, dimension, {})
    if count < TRAINING * _CODES:
        return flat
    return min(flat, size("ivf-pq", count, dimension, {**parameters_for("ivf", count, dimension), "m": 1}))


def _parts(count: int, dimension: int, memory: int | None, lists: Parameters) -> int:
    """Bytes of a compressed vector: one for each of so many parts, all of one length."""
    possible = [m for m in range(1, dimension + 1) if dimension % m == 0]
    if memory is None:
        return next(m for m in possible if 4 * m >= dimension)
    fitting = [m for m in possible if size("ivf-pq", count, dimension, {**lists, "m": m}) <= memory]
    if not fitting:
        raise ValueError(f"memory={memory} bytes is too little for {count} vectors of {dimension}")
    return fitting[-1]
