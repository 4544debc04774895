"""An index of stored features, and the like of an image in it."""

from pathlib import Path
from typing import Annotated

import typer

from repkit.cli.options import Device, Json, Metric, Store
from repkit.cli.printing import print_json, say


def index(
    store: Store,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the index")],
    key: Annotated[str | None, typer.Option(help="which tap, where the store has several")] = None,
    metric: Annotated[Metric, typer.Option(help="how vectors are compared")] = "cosine",
    as_json: Json = False,
) -> None:
    """Build a search index from stored features."""
    from repkit.retrieval import Index, prompts_of_their_own
    from repkit.store import FeatureStore

    source = FeatureStore(store)
    if key is None and len(source.keys) > 1:
        raise ValueError(f"{store} has {len(source.keys)} taps; choose one with --key: {', '.join(source.keys)}")
    built = Index.build(source, key, metric=metric)
    built.save(out)
    say(f"{len(built)} vectors of {built.dimension} numbers, {built.key}")
    if told := prompts_of_their_own(source.identity["cond"]):
        say(f"each image was told {told}, which a query does not have: repkit search will refuse this index")
    if as_json:
        print_json({"vectors": len(built), "dimension": built.dimension, "key": built.key, "out": str(out)})
    else:
        print(out)


def search(
    index: Annotated[Path, typer.Argument(help="a folder that repkit index wrote")],
    image: Annotated[Path, typer.Argument(help="the image to find the like of")],
    k: Annotated[int, typer.Option("-k", min=1, help="how many")] = 10,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="where the weights are, if not where they were")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the images of an index that are most like one image."""
    from repkit.retrieval import Index
    from repkit.tasks.building import rebuild_extractor

    if not image.is_file():
        raise ValueError(f"no image {image}; give the file to find the like of")
    loaded = Index.load(index)
    if loaded.identity is None:
        raise ValueError(f"{index} was built from an array, so no extractor can make queries for it; search in Python")
    extractor = rebuild_extractor(loaded.identity, loaded.provenance or {}, model=model, device=device)
    hits = loaded.search(extractor([image]), k)
    labels = loaded.items["label"].to_pylist()
    found = [
        {"id": name, "score": float(score), "label": labels[row]}
        for name, score, row in zip(hits.ids[0], hits.scores[0], hits.rows[0], strict=True)
    ]
    if as_json:
        print_json({"image": str(image), "hits": found})
        return
    for hit in found:
        print(f"{hit['score']:8.4f}  {hit['id']}  {hit['label'] or ''}".rstrip())
