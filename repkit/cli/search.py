"""An index of stored features, and the like of an image in it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repkit.cli.options import Device, Json, Kind, Metric, Store
from repkit.cli.printing import print_json, say
from repkit.cli.threads import wait_briefly

if TYPE_CHECKING:
    from repkit.retrieval import Index


def index(
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the index")],
    key: Annotated[str | None, typer.Option(help="which tap, where the store has several")] = None,
    kind: Annotated[Kind, typer.Option(help="auto: the fastest that reaches --recall within --memory")] = "auto",
    metric: Annotated[Metric, typer.Option(help="how vectors are compared")] = "cosine",
    recall: Annotated[float, typer.Option(help="share of the 10 nearest to find, above 0 to 1")] = 0.95,
    memory: Annotated[str | None, typer.Option(help="most that the index may take, such as 2GB; default: any")] = None,
    as_json: Json = False,
) -> None:
    """Build a search index from stored features."""
    wait_briefly()
    from repkit.indexfiles import check_replaceable
    from repkit.indexsources import prompts_of_their_own
    from repkit.progress import Progress
    from repkit.retrieval import Index
    from repkit.store import FeatureStore

    source = FeatureStore(store)
    if key is None and len(source.keys) > 1:
        raise ValueError(f"{store} has {len(source.keys)} taps; choose one with --key: {', '.join(source.keys)}")
    most = None if memory is None else _bytes(memory)
    check_replaceable(out)  # before the time that building takes
    with Progress("index", "vectors") as progress:
        built = Index.build(source, key, kind, metric, recall=recall, memory=most, progress=progress)
    built.save(out)
    told = prompts_of_their_own(source.identity["cond"])
    if told:
        say(f"each image was told {told}, which a query does not have: repkit search will refuse this index")
    if as_json:
        print_json(_described(built) | {"out": str(out)})
        return
    say(f"{len(built)} vectors of {built.dimension} numbers, {built.key}")
    parameters = "".join(f", {name} {value}" for name, value in built.parameters.items())
    found = "not measured, too few vectors" if built.recall is None else f"{built.recall:.3f}"
    say(f"{built.kind}{parameters}; recall@10 {found}; {built.size / len(built):.0f} bytes a vector")
    print(out)


def _described(built: "Index") -> dict[str, Any]:
    return {
        "vectors": len(built),
        "dimension": built.dimension,
        "key": built.key,
        "kind": built.kind,
        "parameters": dict(built.parameters),
        "recall": built.recall,
        "bytes_per_vector": built.size / len(built),
    }


def _bytes(text: str) -> int:
    """Of a size in words, such as 500MB or 2GB, in decimal units."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?[bB]?)", text.strip())
    if not found:
        raise ValueError(f"--memory {text}; give bytes, or a number with kB, MB, GB or TB")
    return round(float(found[1]) * 1000 ** " KMGT".index(found[2].upper().removesuffix("B") or " "))


def search(
    index: Annotated[Path, typer.Argument(help="a folder that repkit index wrote")],
    image: Annotated[Path, typer.Argument(help="the image to find the like of")],
    k: Annotated[int, typer.Option("-k", min=1, help="how many")] = 10,
    where: Annotated[
        list[str] | None, typer.Option(help='COLUMN=VALUE, or JSON such as \'{"width": {"gte": 64}}\'; repeatable')
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="compare with every image")] = False,
    ef: Annotated[int | None, typer.Option(min=1, help="of hnsw: more finds more, and takes longer")] = None,
    nprobe: Annotated[int | None, typer.Option(min=1, help="of ivf and ivf-pq: the same")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="where the weights are, if not where they were")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the images of an index that are most like one image."""
    from repkit.indexfiles import LIVE
    from repkit.retrieval import Index
    from repkit.tasks.building import rebuild_extractor
    from repkit.where import column_types, mask

    if not image.is_file():
        raise ValueError(f"no image {image}; give the file to find the like of")
    loaded = Index.load(index, mmap=True)
    if (index / LIVE).exists():
        say(f"{index} is searched as it was built; repkit serve knows what was changed since")
    conditions = _conditions(where, column_types(loaded.items))
    if conditions is not None:
        mask(loaded.items, conditions)  # a mistake is told before the model is loaded
    loaded.check_effort(ef=ef, nprobe=nprobe)
    if loaded.identity is None:
        raise ValueError(f"{index} was built from an array, so no extractor can make queries for it; search in Python")
    extractor = rebuild_extractor(loaded.identity, loaded.provenance or {}, model=model, device=device)
    hits = loaded.search(extractor([image]), k, where=conditions, exact=exact, ef=ef, nprobe=nprobe)
    labels = loaded.items["label"].to_pylist()
    found = [
        {"id": name, "score": float(score), "label": labels[row]}
        for name, score, row in zip(hits.ids[0], hits.scores[0], hits.rows[0], strict=True)
    ]
    if not found:
        say("no image of the index is as --where says")
    if as_json:
        print_json({"image": str(image), "exact": hits.exact, "hits": found})
        return
    for hit in found:
        print(f"{hit['score']:8.4f}  {hit['id']}  {hit['label'] or ''}".rstrip())


def _conditions(where: list[str] | None, columns: Mapping[str, type]) -> dict[str, Any] | None:
    """--where as `Index.search` takes it; the text after = is read as its column's type."""
    conditions: dict[str, Any] = {}
    for text in where or []:
        added = _json_object(text) if text.lstrip().startswith("{") else _equality(text, columns)
        if twice := conditions.keys() & added.keys():
            raise ValueError(f"--where names {', '.join(sorted(twice))} twice; put both conditions into one as JSON")
        conditions |= added
    return conditions if where else None


def _json_object(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--where {text} is no JSON ({error}); give COLUMN=VALUE or a JSON object") from None


def _equality(text: str, columns: Mapping[str, type]) -> dict[str, Any]:
    column, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--where {text}; give COLUMN=VALUE or a JSON object")
    if columns.get(column, str) is str:
        return {column: value}
    return {column: _json_value(value)}


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # of which the column's type will be told
