"""Pictures: seen as `repkit search` sees them, matched, shown by id alone, and decoded where they can do no harm."""

import asyncio
import json
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi import HTTPException
from PIL import Image

from repkit.datasets.fashion_mnist import write_folder
from repkit.exporting import export
from repkit.images import Resize, decode
from repkit.pooling import pool
from repkit.retrieval import Index
from repkit.service.decoder import Decoder
from repkit.service.live import LiveIndex
from repkit.service.metrics import Metrics
from repkit.service.settings import Settings
from repkit.service.thumbnails import Files
from repkit.tasks.building import build_extractor
from tests.service_cases import asking, metric, running


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    root = tmp_path_factory.mktemp("clothes")
    write_folder(root, "test", 4)
    return root


@pytest.fixture(scope="module")
def extractor():
    return build_extractor("mini-unet", ["up.0@50"])


@pytest.fixture(scope="module")
def folder(clothes, extractor, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexes")
    Index.build(export(clothes, extractor, out / "store", pool="2x2")).save(out / "index")
    return out / "index"


@pytest.fixture(scope="module")
def served(folder):
    with running(Settings(index=folder, decoders=1)) as found:
        yield found


@pytest.fixture
def http(served):
    with asking(served[0]) as client:
        yield client


def encoded(array, kind="PNG", **options):
    content = BytesIO()
    Image.fromarray(array).save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def photo(rng):
    """A picture of another shape and size than the model's."""
    small = Image.fromarray(rng.integers(0, 255, (5, 7, 3), np.uint8))
    return encoded(np.asarray(small.resize((70, 50), Image.Resampling.BICUBIC)))


def test_a_picture_finds_what_the_command_finds_to_the_last_bit(http, folder, extractor, photo, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo)
    expected = Index.load(folder).search(extractor([tmp_path / "photo.png"]), 6)
    answer = http.post("/v1/search/image", files={"file": photo}, data={"k": 6}).json()
    assert [hit["id"] for hit in answer["hits"]] == expected.ids[0]
    assert [hit["score"] for hit in answer["hits"]] == [float(score) for score in expected.scores[0]]
    assert answer["model"]["name"] == "mini-unet" and answer["model"]["key"] == "up.0@50"


def test_pictures_at_once_find_what_each_alone_finds(http, clothes):
    paths = sorted(clothes.rglob("*.png"))[:12]

    def hits(path):
        return http.post("/v1/search/image", files={"file": path.read_bytes()}, data={"k": 5}).json()["hits"]

    alone = [hits(path) for path in paths]
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(hits, paths))
    for path, one, other in zip(paths, alone, together, strict=True):
        assert one[0]["id"] == other[0]["id"] == str(path.relative_to(clothes))
        np.testing.assert_allclose([hit["score"] for hit in one], [hit["score"] for hit in other], atol=1e-5)


def test_a_filter_and_settings_go_with_a_picture(http, photo):
    label = http.post("/v1/search/image", files={"file": photo}).json()["hits"][3]["metadata"]["label"]
    data = {"k": "3", "where": json.dumps({"label": label}), "exact": "true"}
    hits = http.post("/v1/search/image", files={"file": photo}, data=data).json()["hits"]
    assert [hit["metadata"]["label"] for hit in hits] == [label] * 3
    for wrong in ({"k": "0"}, {"k": "x"}, {"where": "{"}, {"where": '{"label": [[1]]}'}, {"ef": "-1"}):
        assert http.post("/v1/search/image", files={"file": photo}, data=wrong).status_code == 422
    assert http.post("/v1/search/image", data={"k": "3"}, files={"other": photo}).status_code == 422
    assert http.post("/v1/search/image", files={"file": (None, "http://127.0.0.1:1/x.png")}).status_code == 422


def test_an_uploaded_item_is_kept_with_its_picture(http, photo):
    data = {"id": "../up/photo?.png", "metadata": json.dumps({"label": "mine"})}
    assert http.post("/v1/items/image", files={"file": photo}, data=data).status_code == 200
    best = http.post("/v1/search/image", files={"file": photo}, data={"k": 1}).json()["hits"][0]
    assert best["id"] == data["id"] and best["score"] > 1 - 1e-5 and best["metadata"] == {"label": "mine"}
    shown = http.get("/v1/thumbnails", params={"id": data["id"], "side": 35})
    small = Image.open(BytesIO(shown.content))
    assert (small.size, shown.headers["content-type"]) == ((35, 25), "image/png")
    again = http.get(
        "/v1/thumbnails", params={"id": data["id"], "side": 35}, headers={"If-None-Match": shown.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    http.post("/v1/items/delete", json={"ids": [data["id"]]})
    assert http.get("/v1/thumbnails", params={"id": data["id"]}).status_code == 404


def test_the_file_of_an_item_is_not_that_of_the_one_in_its_place(folder, photo, tmp_path):
    copy = tmp_path / "index"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("live"))
    with running(Settings(index=copy, decoders=1)) as (url, service), asking(url) as http:
        name = http.get("/v1/items", params={"limit": 1}).json()["items"][0]["id"]
        vector = {"items": [{"id": name, "vector": [1.0] * service.live.dimension}]}

        def statuses():
            match = http.post("/v1/match", files={"source_id": (None, name), "target": photo})
            return http.get("/v1/thumbnails", params={"id": name}).status_code, match.status_code

        assert http.patch(f"/v1/items/{name}", json={"metadata": {"label": "other"}}).status_code == 200
        assert statuses() == (200, 200) and service.live.is_original(name)
        assert http.put("/v1/items", json=vector).status_code == 200
        assert statuses() == (404, 404)
        assert http.post("/v1/items/image", files={"file": photo}, data={"id": name}).status_code == 200
        shown = http.get("/v1/thumbnails", params={"id": name, "side": 70}).content
        assert Image.open(BytesIO(shown)).size == (70, 50) and statuses() == (200, 200)
        assert http.put("/v1/items", json=vector).status_code == 200
        assert statuses() == (404, 404)
        http.post("/v1/items/delete", json={"ids": [name]})
        assert http.put("/v1/items", json=vector).status_code == 200
        assert statuses() == (404, 404)
        service.live.compact()
        others = [one["id"] for one in http.get("/v1/items").json()["items"] if one["id"] != name]
    with LiveIndex.open(copy) as live:
        assert not live.is_original(name) and all(map(live.is_original, others))


def test_a_thumbnail_is_the_file_that_was_indexed(http, clothes):
    name = http.get("/v1/items", params={"limit": 1}).json()["items"][0]["id"]
    shown = http.get("/v1/thumbnails", params={"id": name})
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(shown.content))), np.asarray(decode(clothes / name)))
    assert "path" not in http.get("/v1/items", params={"limit": 1}).json()["items"][0]["metadata"]
    assert shown.headers["x-content-type-options"] == "nosniff"


def test_a_point_is_found_where_brute_force_finds_it(http, extractor, clothes, photo):
    name = sorted(clothes.rglob("*.png"))[0].relative_to(clothes)
    files = {"source": photo, "target_id": (None, str(name)), "point": (None, "33,20")}
    answer = http.post("/v1/match", files=files).json()
    assert answer["source"] == {"width": 70, "height": 50} and answer["target"] == {"width": 28, "height": 28}
    source, target = extractor([decode(photo), decode(clothes / name)])["up.0@50"].double()
    side = source.shape[-1]
    # The square in the middle of the source, as grid_sample counts: -1 to 1 from edge to edge.
    at = torch.tensor([(33.5 - 35) / 25, (20.5 - 25) / 25], dtype=torch.double)
    query = torch.nn.functional.grid_sample(source[None], at[None, None, None], align_corners=False).flatten()
    scores = torch.nn.functional.cosine_similarity(query[:, None, None], target, dim=0)
    np.testing.assert_allclose(answer["heat"]["grid"], scores.numpy(), atol=1e-5)
    best, cell = scores.argmax().item(), 28 / side
    place = ((best % side + 0.5) * cell - 0.5, (best // side + 0.5) * cell - 0.5)
    assert (answer["best"]["place"]["x"], answer["best"]["place"]["y"]) == pytest.approx(place, abs=1e-4)
    assert answer["best"]["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    assert answer["heat"]["box"] == pytest.approx([0, 0, 28, 28])


def test_a_picture_matches_itself(http, photo):
    dense = http.post("/v1/match", files={"source": photo, "target": photo, "dense": (None, "true")}).json()
    assert all(one["point"] == one["place"] for one in dense["correspondences"])
    mutual = http.post("/v1/match", files={"source": photo, "target": photo}).json()
    assert 0 < len(mutual["correspondences"]) <= 20 < len(dense["correspondences"])
    assert mutual["best"]["score"] == pytest.approx(1, abs=1e-5) and mutual["heat"] is None


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"point": "1,1"}, 422),
        ({"source_id": "missing", "target_id": "missing"}, 404),
        ({"source_id": "missing", "source": b"x", "target_id": "missing"}, 422),
        ({"target_id": "http://127.0.0.1/"}, 422),
    ],
)
def test_a_match_of_nothing_is_told(http, fields, status):
    files = {name: one if isinstance(one, bytes) else (None, one) for name, one in fields.items()}
    assert http.post("/v1/match", files=files).status_code == status


@pytest.mark.parametrize("point", ["70,10", "-1,1", "1", "1,2,3", "nan,1", "inf,1", "x,y", "", "1e400,1", "0,10"])
def test_a_point_must_be_one_that_was_seen(http, photo, point):
    """The last lies in the part that the square crop cuts off."""
    answer = http.post("/v1/match", files={"source": photo, "target": photo, "point": (None, point)})
    assert answer.status_code == (200 if point == "" else 422)


def bomb(width, height):
    """A small PNG that says it is huge, with the pixels to prove it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * min(height * (width + 1), 1 << 26), 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bad_pictures():
    good = encoded(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3), "JPEG")
    yield "nothing", b""
    yield "text", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    yield "truncated", good[: len(good) // 2]
    yield "header only", good[:20]
    yield "zip", b"PK\x03\x04" + b"\0" * 100
    yield "eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"
    yield "huge", bomb(100_000, 100_000)
    yield "wide", bomb(2**31 - 1, 1)
    yield "empty", bomb(0, 10)
    yield "random", np.random.default_rng(0).bytes(5000)
    yield "url", b"http://127.0.0.1:1/x.png"


@pytest.mark.parametrize(("name", "content"), list(bad_pictures()))
def test_what_is_no_picture_is_refused(http, name, content):
    for path in ("/v1/search/image", "/v1/items/image"):
        answer = http.post(path, files={"file": content, "id": (None, "bad")})
        assert answer.status_code == 422, name
        assert answer.json()["error"]["code"] == "no_picture" and "/tmp" not in answer.text


def test_pictures_are_counted(http, photo):
    http.post("/v1/search/image", files={"file": photo})
    text = http.get("/metrics").text
    assert 'repkit_images_total{outcome="ok"}' in text and metric(text, "repkit_images_total") > 0


def test_a_picture_that_takes_too_much_is_stopped_and_the_next_one_is_decoded(photo):
    """49 million pixels pass the limit of pixels, and take more memory, or more time, than there is for one."""

    async def ask():
        large, found = bomb(7000, 7000), []
        decoder = Decoder(1, Metrics(), max_pixels=50_000_000, seconds=20, most_waiting=4, memory=60 << 20)
        try:
            for content, seconds in ((large, 20), (photo, 20), (large, 0.001), (photo, 20)):
                decoder._processes[0]._seconds = seconds
                try:
                    found.append((await decoder.picture(content, (8, 8), "crop")).size)
                except HTTPException as error:
                    found.append(error.detail["message"])
            return found
        finally:
            decoder.close()

    much, size, slow, size_again = asyncio.run(ask())
    assert size == size_again == (70, 50)
    assert "more memory" in much and "could not be decoded within" in slow


def test_an_index_whose_model_is_not_there_answers_the_rest(folder, photo, tmp_path, caplog):
    copy = tmp_path / "index"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("live"))
    with running(Settings(index=copy, model="mini-dit", decoders=1)) as (url, _), asking(url) as http:
        answer = http.post("/v1/search/image", files={"file": photo})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_model")
        assert "no search by picture" in answer.json()["error"]["message"] and "mini-dit" not in answer.text
        assert "retry-after" not in answer.headers and "mini-dit" in caplog.text
        name = http.get("/v1/items", params={"limit": 1}).json()["items"][0]["id"]
        assert http.post("/v1/search", json={"id": name, "k": 1}).json()["hits"][0]["id"] == name
        assert http.get("/readyz").status_code == http.get("/v1/thumbnails", params={"id": name}).status_code == 200
        assert http.get("/v1/model").json()["image_search"] == answer.json()["error"]["message"]


def test_a_restored_index_still_shows_the_files(folder, tmp_path):
    copy = tmp_path / "index"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("live"))
    with LiveIndex.open(copy) as live:
        name = live.list(limit=1)[0].id
        live.snapshot_to("then")
    LiveIndex.restore(copy, "then", tmp_path / "new")
    content = Files(copy / "items.parquet", None).read(name)
    assert content and Files(tmp_path / "new" / "items.parquet", None).read(name) == content


def test_the_model_is_told_without_the_folders_it_lay_in(http):
    told = http.get("/v1/model").json()
    assert (told["name"], told["key"], told["pool"], told["extractor"]) == ("mini-unet", "up.0@50", "2x2", "diffusion")
    assert told["taps"]["up.0@50"]["t"] == 50 and told["image_search"] is None
    assert told["resize"]["policy"] == "crop" and "/" not in told["index"]


def test_files_are_read_below_their_folder_and_nowhere_else(clothes, folder, tmp_path):
    files = Files(folder / "items.parquet", None)
    name = str(sorted(clothes.rglob("*.png"))[0].relative_to(clothes))
    assert files.root == clothes.resolve() and files.read(name) == (clothes / name).read_bytes()
    for other in ("../x", "/etc/passwd", str(clothes / name), "", ".", "missing", name + "/"):
        assert files.read(other) is None
    moved = tmp_path / "moved"
    (moved / Path(name).parent).mkdir(parents=True)
    (moved / name).write_bytes(b"moved")
    elsewhere = Files(folder / "items.parquet", moved)
    assert elsewhere.read(name) == b"moved"
    (moved / name).unlink()
    assert elsewhere.read(name) is None
    (tmp_path / "secret").write_bytes(b"secret")
    os.symlink(tmp_path / "secret", moved / name)
    assert elsewhere.read(name) is None
    (moved / name).unlink()
    (moved / name).parent.rmdir()
    os.symlink(clothes / Path(name).parent, (moved / name).parent)
    assert elsewhere.read(name) is None
    os.unlink((moved / name).parent)
    (moved / name).parent.mkdir()
    os.mkfifo(moved / name)
    assert elsewhere.read(name) is None


def test_pooling_and_padding_are_those_of_the_store(clothes, photo, tmp_path):
    """A padded picture is pooled without its padding."""
    padded = build_extractor("mini-unet", ["up.0@50"], resize=Resize(32, "pad"))
    store = export(clothes, padded, tmp_path / "store", pool="mean")
    Index.build(store).save(tmp_path / "index")
    with running(Settings(index=tmp_path / "index", decoders=1)) as (url, service), asking(url) as http:
        answer = http.post("/v1/search/image", files={"file": photo}, data={"k": 4}).json()
        features = padded([decode(photo)])
        vector = pool(features["up.0@50"].float(), "mean", features.mask)[0].numpy()
        expected = service.live.search(vector[None], 4).hits[0]
        assert [hit["id"] for hit in answer["hits"]] == [hit.id for hit in expected]
        assert [hit["score"] for hit in answer["hits"]] == [hit.score for hit in expected]
        heat = http.post("/v1/match", files={"source": photo, "target": photo, "point": (None, "5,5")}).json()["heat"]
        assert heat["grid"][0] == [None] * len(heat["grid"][0]) and None not in heat["grid"][len(heat["grid"]) // 2]
        # 70 x 50 becomes 32 x 23, with 4 rows of padding above and 5 below.
        assert heat["box"] == pytest.approx([0, -4 * 50 / 23, 70, 28 * 50 / 23])
