"""What requests and answers look like; nothing in a request is without a bound."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from repkit.service.answers import problems, refusal

ID_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]+$"
Id = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=ID_PATTERN)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Text = Annotated[str, StringConstraints(max_length=4096, strict=True)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Scalar = Text | Annotated[bool, Field(strict=True)] | Whole | Finite | None
Vector = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1, max_length=65_536)]
OneOf = Annotated[list[Scalar], Field(max_length=1000)]
Bounds = Annotated[dict[Name, Scalar | OneOf], Field(max_length=8)]
Where = Annotated[dict[Name, Scalar | OneOf | Bounds], Field(max_length=32)]
Metadata = Annotated[dict[Name, Scalar], Field(max_length=256)]
SnapshotName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class Request(BaseModel):
    """A body in which nothing unknown is passed over."""

    model_config = ConfigDict(extra="forbid")


class Search(Request):
    """Search by a vector, or by the vector of an item, which then is among its own nearest."""

    vector: Vector | None = None
    id: Id | None = None
    k: Annotated[int, Field(ge=1, le=100_000)] = 10
    where: Where | None = None
    exact: bool = False
    ef: Annotated[int, Field(ge=1, le=100_000)] | None = None
    nprobe: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    include_vectors: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> "Search":
        if (self.vector is None) == (self.id is None):
            raise ValueError("give vector or id, one of them")
        return self


class SearchBatch(Request):
    """Several searches; those with equal settings are made at once."""

    queries: Annotated[list[Search], Field(min_length=1, max_length=10_000)]


class ItemIn(Request):
    """A vector to keep; an item of that id is replaced."""

    id: Id
    vector: Vector
    metadata: Metadata = {}


class Upsert(Request):
    """Items to add or replace, all of them or none."""

    items: Annotated[list[ItemIn], Field(min_length=1, max_length=10_000)]


class Change(Request):
    """Columns of the metadata to set; null takes one away."""

    metadata: Metadata


class Ids(Request):
    """Items by their ids."""

    ids: Annotated[list[Id], Field(min_length=1, max_length=10_000)]


class SnapshotIn(Request):
    """The name of a snapshot to be."""

    name: SnapshotName


class Hit(BaseModel):
    """A found item; score: cosine or inner product, of which more is nearer, or for "l2" the distance."""

    id: str
    score: float
    metadata: dict[str, Any]
    vector: list[float] | None = None


class Maker(BaseModel):
    """What made the vectors."""

    name: str | None
    key: str | None
    metric: str
    identity: str | None = Field(description="sha256 of the extractor's identity")


class Found(BaseModel):
    """Hits, nearest first; version: of the last change that was seen; scanned: among how many items was chosen."""

    hits: list[Hit]
    exact: bool
    version: int
    scanned: int
    took_ms: float
    model: Maker


class FoundBatch(BaseModel):
    """An answer for each query, in their order."""

    answers: list[Found]


class Item(BaseModel):
    """An item as it is kept; the vector has length 1 under "cosine"."""

    id: str
    metadata: dict[str, Any]
    vector: list[float]
    version: int


class Listed(BaseModel):
    """An item of a list."""

    id: str
    metadata: dict[str, Any]


class Page(BaseModel):
    """Items in the order of their ids; after: what to ask with next, null at the end."""

    items: list[Listed]
    after: str | None


class Items(BaseModel):
    """The items that there are among those asked for."""

    items: list[Item]


class Count(BaseModel):
    """How many items."""

    count: int


class Version(BaseModel):
    """The version that the change made; searches see it by now."""

    version: int


class Deleted(Version):
    """How many items were there to delete."""

    deleted: int


class Value(BaseModel):
    """A value and how many items have it."""

    value: Any
    count: int


class Column(BaseModel):
    """A column to filter by; values: where they are few; min and max: of numbers."""

    name: str
    type: str
    values: list[Value] | None
    min: float | None
    max: float | None


class Columns(BaseModel):
    """All columns."""

    columns: list[Column]


class Model(BaseModel):
    """What made the index, and what it is. image_search: null where pictures can be searched with, else why not."""

    name: str | None
    extractor: str | None
    key: str | None
    taps: dict[str, Any]
    pool: str | None
    resize: dict[str, Any] | None
    dimension: int
    metric: str
    kind: str
    recall: float | None
    count: int
    index: str
    image_search: str | None
    limits: dict[str, int]


class Snapshot(BaseModel):
    """A copy of the index as it was after the change `version`."""

    name: str
    version: int
    count: int
    bytes: int


class Snapshots(BaseModel):
    """The snapshots that there are."""

    snapshots: list[Snapshot]


class Point(BaseModel):
    """A place of a picture, (x, y) in its own pixels, whose centres are whole numbers."""

    x: float
    y: float


class Correspondence(BaseModel):
    """A point of the source and the place of the target that is most like it; score: their cosine."""

    point: Point
    place: Point
    score: float


class Size(BaseModel):
    """Of a picture, in pixels."""

    width: int
    height: int


class Heat(BaseModel):
    """Cosines of the point with every cell of the target, row by row; null where the network saw only padding.

    box: the left, top, right and bottom edges, in pixels of the target, of what the grid covers.
    """

    grid: list[list[float | None]]
    box: list[float]


class Matched(BaseModel):
    """Where points of the source are in the target, the most alike first; heat: of the point that was given."""

    source: Size
    target: Size
    best: Correspondence | None
    correspondences: list[Correspondence]
    heat: Heat | None


class Trouble(BaseModel):
    """Why a request was refused: a constant code, and a sentence."""

    code: str
    message: str


class Error(BaseModel):
    """The body of every answer that is not of the 200s."""

    error: Trouble


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504, 507)
}


_READ: dict[str, TypeAdapter[Any]] = {"where": TypeAdapter(Where), "metadata": TypeAdapter(Metadata)}


def read_json(text: str | None, name: str) -> Any:
    """The `where` or `metadata` in a parameter or a field of a form; None where it is empty."""
    if not text:
        return None
    try:
        return _READ[name].validate_python(json.loads(text))
    except ValidationError as error:
        raise refusal(422, f"{name}.{problems(error.errors())[0]}") from None
    except (ValueError, RecursionError):
        raise refusal(422, f"{name} is not JSON") from None
