"""Routes: what the index is and how the service does."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.responses import Response

from repkit.service.answers import Json, refusal
from repkit.service.columns import columns_of
from repkit.service.metrics import TYPE
from repkit.service.schemas import ERRORS, Columns, Model, SnapshotIn, SnapshotName, Snapshots
from repkit.service.state import Running, Service, model_name

router = APIRouter(tags=["service"], responses=ERRORS)


@router.head("/livez", include_in_schema=False)  # which some supervisors send
@router.get("/livez", response_model=dict[str, str])
async def livez() -> Json:
    """Whether the process answers."""
    return Json({"status": "ok"})


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=dict[str, str])
async def readyz(service: Running) -> Json:
    """Whether to send requests here: not while it ends, and not while changes cannot be stored."""
    if service.draining:
        raise refusal(503, "the service is ending", "draining")
    if service.live.degraded is not None:
        raise refusal(503, "changes cannot be stored; searches are answered", "degraded")
    return Json({"status": "ok"})


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Running) -> Response:
    """What the service counts, for Prometheus."""
    return Response(service.metrics.text(), headers={"Content-Type": TYPE})


@router.get("/v1/model", response_model=Model)
async def model(service: Running) -> Json:
    """What made the index: the model, its taps and their times; and what the index is."""
    described, settings = service.live.described, service.settings
    identity = described.get("identity") or {}
    plain = {name: described.get(name) for name in ("key", "pool", "kind", "recall")}
    limits = {"k": settings.most_k, "queries": settings.most_queries, "bytes": settings.max_body}
    return Json(
        {
            **plain,
            "name": model_name(described),
            "dimension": service.live.dimension,
            "metric": service.live.metric,
            "extractor": identity.get("extractor"),
            "taps": _taps(identity),
            "resize": identity.get("resize"),
            "count": len(service.live),
            "index": settings.index.resolve().name,
            "image_search": service.features.missing,
            "limits": {**limits, "pixels": settings.max_pixels},
        }
    )


@router.get("/v1/stats", response_model=dict[str, Any])
async def stats(service: Running) -> Json:
    """Numbers of the index and of what waits."""
    waiting = {"changes": service.writes.running, "reads": service.reads.running}
    told = {**await service.reads.run(service.live.stats), "under_way": waiting}
    if told["degraded"] is not None:  # it names files of this machine
        told["degraded"] = "the last write failed; the log of the service says why"
    return Json(told)


@router.get("/v1/columns", response_model=Columns)
async def columns(service: Running) -> Json:
    """The columns of the metadata: what to filter by."""
    return Json({"columns": await service.reads.run(columns_of, service.live.snapshot())})


@router.get("/v1/snapshots", response_model=Snapshots)
async def list_snapshots(service: Running) -> Json:
    """The snapshots that there are."""
    return await _snapshots(service)


@router.post("/v1/snapshots", response_model=Snapshots)
async def make_snapshot(asked: SnapshotIn, service: Running) -> Json:
    """Make a snapshot of the index as it is now, in the index's own folder."""
    try:
        await service.writes.run(service.live.snapshot_to, asked.name)
    except FileExistsError:
        raise refusal(409, "there is a snapshot of that name; choose another") from None
    return await _snapshots(service)


@router.delete("/v1/snapshots/{name}", response_model=Snapshots)
async def delete_snapshot(name: Annotated[SnapshotName, Path()], service: Running) -> Json:
    """Delete a snapshot."""
    try:
        await service.writes.run(service.live.delete_snapshot, name)
    except FileNotFoundError:
        raise refusal(404, "no snapshot of that name") from None
    return await _snapshots(service)


async def _snapshots(service: Service) -> Json:
    found = await service.reads.run(service.live.snapshots)
    return Json({"snapshots": [asdict(one) for one in found]})


def _taps(identity: Any) -> dict[str, Any]:
    """Each tap with its time; of a fusion, those of all its parts."""
    if "parts" in identity:
        return {key: tap for part in identity["parts"] for key, tap in _taps(part["extractor"]).items()}
    taps = identity.get("taps", {})
    return dict(taps) if isinstance(taps, dict) else {key: None for key in taps}
