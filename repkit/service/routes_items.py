"""Routes: items one by one and in lists, added, changed and deleted."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Header, Query, UploadFile

from repkit.service.answers import Json, refusal
from repkit.service.items import Item as Kept
from repkit.service.items import Stored
from repkit.service.routes_search import WhereText, checked, picture_vector
from repkit.service.schemas import (
    ERRORS,
    Change,
    Count,
    Deleted,
    Id,
    Ids,
    Item,
    Items,
    Page,
    Upsert,
    Version,
    read_json,
)
from repkit.service.state import Running, Service

router = APIRouter(prefix="/v1", tags=["items"], responses=ERRORS)
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="the same key again does not make the change again",
    ),
]


@router.get("/items", response_model=Page)
async def list_items(
    service: Running,
    after: Annotated[Id | None, Query(description="the last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    where: Annotated[WhereText, Query()] = None,
    order: Annotated[Literal["id", "random"], Query(description="random: some items, others each time")] = "id",
) -> Json:
    """Items in the order of their ids, or drawn at random."""
    conditions = read_json(where, "where")
    if order == "random":
        if after is not None:
            raise refusal(422, "items drawn at random have no pages; leave out after")
        listed = await service.reads.run(service.live.snapshot().drawn, limit, conditions)
    else:
        listed = await service.reads.run(service.live.list, after, limit, conditions)
    rows = [{"id": one.id, "metadata": one.metadata} for one in listed]
    more = order == "id" and len(rows) == limit
    return Json({"items": rows, "after": rows[-1]["id"] if more else None})


@router.get("/count", response_model=Count)  # below /items it would be the address of an item
async def count_items(service: Running, where: Annotated[WhereText, Query()] = None) -> Json:
    """How many items there are, or pass a filter."""
    return Json({"count": await service.reads.run(service.live.count, read_json(where, "where"))})


@router.post("/items/get", response_model=Items)
async def get_items(asked: Ids, service: Running) -> Json:
    """Several items by their ids, whatever characters these have; missing ones are left out."""
    _check_number(service, len(asked.ids))
    found = await service.reads.run(lambda: [service.live.get(one) for one in asked.ids])
    return Json({"items": [_told(one) for one in found if one is not None]})


@router.get("/items/{id:path}", response_model=Item)
async def get_item(id: Id, service: Running) -> Json:
    """One item."""
    found = await service.reads.run(service.live.get, id)
    if found is None:
        raise refusal(404, "no item of that id")
    return Json(_told(found))


@router.put("/items", response_model=Version)
async def upsert_items(asked: Upsert, service: Running, idempotency_key: IdempotencyKey = None) -> Json:
    """Add or replace items, all of them or none; searches see them when the answer comes."""
    _check_number(service, len(asked.items))
    items = [Kept(one.id, checked(one.vector, service.live.dimension), one.metadata) for one in asked.items]
    version = await service.writes.run(service.live.upsert, items, idempotency_key=idempotency_key)
    return Json({"version": version})


@router.post("/items/image", response_model=Version)
async def upsert_picture(
    service: Running,
    id: Annotated[Id, Form()],
    file: Annotated[UploadFile, File(description="PNG, JPEG, WebP, BMP, TIFF or GIF")],
    metadata: Annotated[str | None, Form(max_length=65_536, description="as JSON: names with values")] = None,
    idempotency_key: IdempotencyKey = None,
) -> Json:
    """Add or replace an item by its picture, which is kept."""
    told = read_json(metadata, "metadata") or {}
    content = await file.read()
    item = Kept(id, await picture_vector(service, content), told, content)
    version = await service.writes.run(service.live.upsert, [item], idempotency_key=idempotency_key)
    return Json({"version": version})


@router.post("/items/delete", response_model=Deleted)
async def delete_items(asked: Ids, service: Running) -> Json:
    """Delete items; those that are not there are no error."""
    _check_number(service, len(asked.ids))
    version, number = await service.writes.run(service.live.delete, asked.ids)
    return Json({"version": version, "deleted": number})


@router.patch("/items/{id:path}", response_model=Version)
async def change_item(id: Id, asked: Change, service: Running) -> Json:
    """Set columns in an item's metadata, and take away those that are null."""
    try:
        return Json({"version": await service.writes.run(service.live.update, id, asked.metadata)})
    except KeyError:
        raise refusal(404, "no item of that id") from None


@router.delete("/items/{id:path}", response_model=Deleted)
async def delete_item(id: Id, service: Running) -> Json:
    """Delete one item."""
    version, number = await service.writes.run(service.live.delete, [id])
    if not number:
        raise refusal(404, "no item of that id")
    return Json({"version": version, "deleted": number})


def _told(found: Stored) -> dict[str, Any]:
    told = {"id": found.id, "metadata": found.metadata, "version": found.version}
    return {**told, "vector": found.vector.tolist()}


def _check_number(service: Service, number: int) -> None:
    most = 10 * service.settings.most_queries
    if number > most:
        raise refusal(422, f"{number} items; give at most {most}")
