"""Routes: the pictures of items, small, and places in two pictures that correspond."""

from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from starlette.responses import Response

from repkit.service.answers import Json, refusal
from repkit.service.schemas import ERRORS, Id, Matched
from repkit.service.state import Running, Service
from repkit.service.thumbnails import media_type, picture_name

router = APIRouter(prefix="/v1", tags=["pictures"], responses=ERRORS)
Upload = Annotated[UploadFile | None, File()]
_PICTURE: dict[str, Any] = {"image/png": {}, "image/jpeg": {}}


@router.get("/thumbnails", response_class=Response, responses={200: {"content": _PICTURE}, 304: {}})
async def thumbnail(
    id: Annotated[Id, Query()],
    request: Request,
    service: Running,
    side: Annotated[int, Query(ge=16, le=1024, description="of the longer side, at most, in pixels")] = 256,
) -> Response:
    """The picture of an item, as PNG or JPEG."""
    content = await _item_picture(service, id)
    name = picture_name(content)
    headers = {"Cache-Control": "private, no-cache", "ETag": f'"{name[:32]}-{side}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    found = service.thumbnails.get(name, side)
    if found is None:
        found = await service.decoder.thumbnail(content, side)
        service.thumbnails.put(name, side, found)
    return Response(found, media_type=media_type(found), headers=headers)


@router.post("/match", response_model=Matched)
async def match(
    service: Running,
    source: Upload = None,
    source_id: Annotated[Id | None, Form()] = None,
    target: Upload = None,
    target_id: Annotated[Id | None, Form()] = None,
    point: Annotated[str | None, Form(max_length=64, description="x,y in pixels of the source")] = None,
    dense: Annotated[bool, Form(description="a place for every cell of the source")] = False,
) -> Json:
    """Where a point of the source is in the target; without a point the places that are each other's nearest.

    Source and target are each a file, or an item by its id.
    """
    service.features.check()
    from repkit.service.match import match_dense, match_mutual, match_point

    wanted = None if point is None else _read_point(point)
    if wanted is not None and dense:
        raise refusal(422, "give point or dense, not both")
    one = await _seen(service, source, source_id, "source")
    other = await _seen(service, target, target_id, "target")
    find: Any = match_dense if dense else match_mutual
    told = await (
        service.reads.run(find, one, other) if wanted is None else service.reads.run(match_point, one, other, wanted)
    )
    return Json({"source": _size(one), "target": _size(other), **told})


async def _item_picture(service: Service, id: str) -> bytes:
    """The picture of an item: what was uploaded with it, or the file it was made from."""

    def read() -> bytes | None:
        uploaded = service.live.image(id)
        if uploaded is not None or not service.live.is_original(id):
            return uploaded
        return service.files.read(id)

    content = await service.reads.run(read)
    if content is None:
        raise refusal(404, "no item of that id has a picture here")
    return content


async def _seen(service: Service, file: UploadFile | None, id: str | None, name: str) -> Any:
    """What the network sees of a picture."""
    from repkit.images import Resize
    from repkit.service.match import Seen

    if (file is None) == (id is None):
        raise refusal(422, f"give {name} as a file, or {name}_id, one of them")
    content = await _item_picture(service, id) if id is not None else await file.read()  # type: ignore[union-attr]
    shape, policy = service.features.shape, service.features.policy
    picture = await service.decoder.picture(content, shape, policy)
    found = await service.features.map(picture, picture_name(content))
    return Seen(found, picture.size, Resize(shape, policy))


def _size(seen: Any) -> dict[str, int]:
    return {"width": seen.size[0], "height": seen.size[1]}


def _read_point(text: str) -> tuple[float, float]:
    parts = text.split(",")
    try:
        x, y = (float(part) for part in parts)
    except ValueError:
        raise refusal(422, "point is x,y: two numbers, in pixels of the source") from None
    return x, y
