"""Routes: search by vector, by id, by picture, and many at once."""

import asyncio
import json
from collections.abc import Sequence
from time import perf_counter
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, File, Form, Request, UploadFile
from jaxtyping import Float32
from pydantic import Field

from repkit.service.answers import Json, refusal
from repkit.service.batching import Options
from repkit.service.items import Answer
from repkit.service.schemas import ERRORS, Found, FoundBatch, Search, SearchBatch, read_json
from repkit.service.state import Running, Service

router = APIRouter(prefix="/v1", tags=["search"], responses=ERRORS)
WhereText = Annotated[str | None, Field(max_length=65_536, description="a filter, as JSON: see Search.where")]


@router.post("/search", response_model=Found)
async def search(asked: Search, request: Request, service: Running) -> Json:
    """The items nearest to a vector or to an item."""
    return Json(await found(service, asked, request.state.deadline))


@router.post("/search/batch", response_model=FoundBatch)
async def search_batch(asked: SearchBatch, request: Request, service: Running) -> Json:
    """The items nearest to each of several vectors or items."""
    most = service.settings.most_queries
    if len(asked.queries) > most:
        raise refusal(422, f"{len(asked.queries)} queries; give at most {most}")
    return Json({"answers": await found_all(service, asked.queries, request.state.deadline)})


@router.post("/search/image", response_model=Found)
async def search_image(
    request: Request,
    service: Running,
    file: Annotated[UploadFile, File(description="PNG, JPEG, WebP, BMP, TIFF or GIF")],
    k: Annotated[int, Form(ge=1, le=100_000)] = 10,
    where: Annotated[WhereText, Form()] = None,
    exact: Annotated[bool, Form()] = False,
    ef: Annotated[int | None, Form(ge=1, le=100_000)] = None,
    nprobe: Annotated[int | None, Form(ge=1, le=1_000_000)] = None,
) -> Json:
    """The items most like a picture, which is resized and seen by the very model that made the index."""
    service.features.check()
    asked = Search(id="-", k=k, where=read_json(where, "where"), exact=exact, ef=ef, nprobe=nprobe)
    vector = await picture_vector(service, await file.read())
    return Json(await found(service, asked, request.state.deadline, vector))


async def picture_vector(service: Service, content: bytes) -> Float32[np.ndarray, " d"]:
    """The vector of an uploaded picture."""
    service.features.check()
    shape, policy = service.features.shape, service.features.policy
    return await service.features.vector(await service.decoder.picture(content, shape, policy))


async def found(
    service: Service, asked: Search, deadline: float, vector: Float32[np.ndarray, " d"] | None = None
) -> dict[str, Any]:
    """The answer to one search; `vector` takes the place of what the request names."""
    begun, options = perf_counter(), _options(service, asked)
    query = await _vector(service, asked) if vector is None else vector
    answer: Answer = await service.batcher.search(query[None], options, deadline)
    return await _told(service, asked, answer, 0, begun)


async def found_all(service: Service, asked: Sequence[Search], deadline: float) -> list[dict[str, Any]]:
    """The answers to several searches; those with the same options wait and are searched as one."""
    begun = perf_counter()
    alike: dict[Options, list[int]] = {}
    for number, one in enumerate(asked):
        alike.setdefault(_options(service, one), []).append(number)
    vectors = await asyncio.gather(*(_vector(service, one) for one in asked))
    answers = await asyncio.gather(
        *(
            service.batcher.search(np.stack([vectors[number] for number in numbers]), options, deadline)
            for options, numbers in alike.items()
        )
    )
    told = {
        number: await _told(service, asked[number], answer, row, begun)
        for numbers, answer in zip(alike.values(), answers, strict=True)
        for row, number in enumerate(numbers)
    }
    return [told[number] for number in range(len(asked))]


def _options(service: Service, asked: Search) -> Options:
    if asked.k > service.settings.most_k:
        raise refusal(422, f"k={asked.k}; give at most {service.settings.most_k}")
    where = None if asked.where is None else json.dumps(asked.where, sort_keys=True)
    return Options(asked.k, where, asked.exact, asked.ef, asked.nprobe)


async def _told(service: Service, asked: Search, answer: Answer, row: int, begun: float) -> dict[str, Any]:
    """One query's part of an answer, as the client gets it."""
    hits: list[dict[str, Any]]
    hits = [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in answer.hits[row]]
    if asked.include_vectors:
        stored = await service.reads.run(lambda: [service.live.get(hit.id) for hit in answer.hits[row]])
        for hit, one in zip(hits, stored, strict=True):
            hit["vector"] = None if one is None else one.vector.tolist()
    told = {"exact": answer.exact, "version": answer.version, "scanned": answer.scanned, "model": service.maker}
    return {"hits": hits, **told, "took_ms": round(1000 * (perf_counter() - begun), 3)}


async def _vector(service: Service, asked: Search) -> Float32[np.ndarray, " d"]:
    if asked.vector is not None:
        return checked(asked.vector, service.live.dimension)
    assert asked.id is not None
    stored = await service.reads.run(service.live.get, asked.id)
    if stored is None:
        raise refusal(404, "no item of that id")
    return stored.vector


def checked(given: list[float], dimension: int) -> Float32[np.ndarray, " d"]:
    """A vector in float32; ValueError for another dimension, and for numbers that float32 does not hold."""
    if len(given) != dimension:
        raise ValueError(f"the vector has {len(given)} numbers and the index has {dimension}")
    with np.errstate(over="ignore"):
        vector = np.asarray(given, np.float64).astype(np.float32)
    if not np.isfinite(vector).all():
        raise ValueError("the vector has numbers beyond those of float32")
    return vector
