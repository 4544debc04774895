"""The service over vectors: what it answers is what numpy finds, and what it changes is what it answers then."""

import json
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import faiss
import numpy as np
import pyarrow as pa
import pytest

from repkit.service.answers import failure
from repkit.service.calibration import calibrate
from repkit.service.live import LiveIndex
from repkit.service.settings import Settings
from tests.service_cases import COUNT, DIMENSION, asking, make_index, metric, running, vectors_of


@pytest.fixture(scope="module")
def vectors():
    return vectors_of()


@pytest.fixture(scope="module")
def served(vectors, tmp_path_factory):
    folder = make_index(tmp_path_factory.mktemp("indexes") / "index", vectors)
    with running(Settings(index=folder, probe_share=1.0)) as (url, service):
        yield url, service


@pytest.fixture
def http(served):
    with asking(served[0]) as client:
        yield client


@pytest.fixture
def changing(vectors, tmp_path):
    """A service of its own for a test that changes it."""
    with running(Settings(index=make_index(tmp_path / "index", vectors))) as (url, service), asking(url) as client:
        yield client, service


def nearest(vectors, query, k, allowed=None):
    """Rows and cosines by numpy."""
    x, q = (one / np.linalg.norm(one, axis=-1, keepdims=True) for one in (vectors.astype(np.float64), query))
    scores = x @ q
    rows = np.arange(len(x)) if allowed is None else np.flatnonzero(allowed)
    order = rows[np.argsort(-scores[rows], kind="stable")][:k]
    return [str(row) for row in order], scores[order]


def check_hits(answer, vectors, query, k, allowed=None):
    ids, scores = nearest(vectors, query, k, allowed)
    assert [hit["id"] for hit in answer["hits"]] == ids
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], scores, atol=1e-5)


def test_search_by_vector_finds_what_numpy_finds(http, vectors, rng):
    for k in (1, 10, COUNT + 5):
        query = rng.normal(size=DIMENSION)
        answer = http.post("/v1/search", json={"vector": query.tolist(), "k": k}).json()
        check_hits(answer, vectors, query, k)
        assert (answer["exact"], answer["scanned"], answer["version"]) == (True, COUNT, 0)
    assert answer["hits"][0]["metadata"].keys() == {"label", "size"}


def test_search_by_id_finds_the_item_first(http, vectors):
    answer = http.post("/v1/search", json={"id": "7", "k": 5, "include_vectors": True}).json()
    check_hits(answer, vectors, vectors[7].astype(np.float64), 5)
    assert answer["hits"][0]["id"] == "7"
    row = vectors[int(answer["hits"][1]["id"])]
    np.testing.assert_allclose(answer["hits"][1]["vector"], row / np.linalg.norm(row), atol=1e-6)
    missing = http.post("/v1/search", json={"id": "no such"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("where", "allows"),
    [
        ({"label": "class-1"}, lambda row: row % 3 == 1),
        ({"label": ["class-1", "class-2"], "size": {"gte": 5}}, lambda row: row % 3 and row % 7 >= 5),
        ({"size": {"gt": 2, "lt": 4}, "id": {"ne": "3"}}, lambda row: row % 7 == 3 and row != 3),
        ({"label": "none"}, lambda row: False),
    ],
)
def test_a_filter_allows_what_it_says(http, vectors, rng, where, allows):
    query, allowed = rng.normal(size=DIMENSION), np.array([bool(allows(row)) for row in range(COUNT)])
    answer = http.post("/v1/search", json={"vector": query.tolist(), "k": 8, "where": where}).json()
    check_hits(answer, vectors, query, 8, allowed)
    assert answer["scanned"] == allowed.sum()
    count = http.get("/v1/count", params={"where": json.dumps(where)}).json()
    assert count == {"count": allowed.sum()}


def test_many_at_once_are_as_one_by_one(http, vectors, rng):
    queries = rng.normal(size=(9, DIMENSION))
    asked = [{"vector": query.tolist(), "k": 3 + row % 2} for row, query in enumerate(queries)]
    answers = http.post("/v1/search/batch", json={"queries": asked}).json()["answers"]
    for row, answer in enumerate(answers):
        check_hits(answer, vectors, queries[row], 3 + row % 2)
    assert http.post("/v1/search/batch", json={"queries": asked * 12}).status_code == 422


def test_requests_that_wait_are_searched_together(served, http, vectors, rng):
    """While the one search thread is held up, requests gather; then they take one search and get their own answers."""
    _, service = served
    queries, before = rng.normal(size=(24, DIMENSION)), http.get("/metrics").text
    held, search = threading.Event(), service.batcher._search
    begun = threading.Event()

    def slow(*arguments):
        begun.set()
        held.wait(10)
        return search(*arguments)

    service.batcher._search = slow
    try:
        with ThreadPoolExecutor(25) as threads:
            first = threads.submit(http.post, "/v1/search", json={"vector": queries[0].tolist()})
            begun.wait(10)
            found = [threads.submit(http.post, "/v1/search", json={"vector": one.tolist()}) for one in queries]
            while len(service.batcher._line) < len(queries):
                held.wait(0.01)
            held.set()
            for query, answer in zip([queries[0], *queries], [first, *found], strict=True):
                check_hits(answer.result().json(), vectors, query, 10)
    finally:
        held.set()
        service.batcher._search = search
    after = http.get("/metrics").text
    searches, asked = (
        metric(after, f"repkit_batch_size_{part}") - metric(before, f"repkit_batch_size_{part}")
        for part in ("count", "sum")
    )
    assert asked == 25 and searches == 2


def test_items_are_listed_in_pages(http):
    seen, after = [], None
    while True:
        page = http.get("/v1/items", params={"limit": 150} | ({} if after is None else {"after": after})).json()
        seen += page["items"]
        if (after := page["after"]) is None:
            break
    assert [one["id"] for one in seen] == sorted(str(row) for row in range(COUNT))
    assert seen[0]["metadata"] == {"label": "class-0", "size": 0}
    few = http.get("/v1/items", params={"where": json.dumps({"size": 6}), "limit": 2}).json()
    assert [one["id"] for one in few["items"]] == ["104", "111"]


def test_items_are_drawn_at_random(http):
    told = http.get("/v1/items", params={"order": "random", "limit": 5, "where": '{"label": "class-1"}'}).json()
    assert len({one["id"] for one in told["items"]}) == 5 and told["after"] is None
    assert {one["metadata"]["label"] for one in told["items"]} == {"class-1"}
    firsts = [http.get("/v1/items", params={"order": "random", "limit": 5}).json()["items"] for _ in range(4)]
    assert any(one != firsts[0] for one in firsts)
    for wrong in ({"order": "random", "after": "3"}, {"order": "best"}):
        assert http.get("/v1/items", params=wrong).status_code == 422


def test_what_is_changed_is_what_is_found(changing, vectors):
    http, _ = changing
    own, other = np.zeros(DIMENSION), vectors[3].astype(np.float64)
    own[0] = 1
    items = [
        {"id": "new/ä\u2028%2F..", "vector": own.tolist(), "metadata": {"label": "new", "width": 4}},
        {"id": "3", "vector": (-other).tolist()},
    ]
    version = http.put("/v1/items", json={"items": items}).json()["version"]
    found = http.post("/v1/search", json={"vector": own.tolist(), "k": 1}).json()
    assert found["hits"][0]["id"] == items[0]["id"] and found["version"] == version
    assert found["hits"][0]["metadata"] == {"label": "new", "width": 4}
    got = http.post("/v1/items/get", json={"ids": [items[0]["id"], "3", "missing"]}).json()["items"]
    assert [one["id"] for one in got] == [items[0]["id"], "3"] and got[1]["metadata"] == {}
    np.testing.assert_allclose(got[1]["vector"], -other / np.linalg.norm(other), atol=1e-6)

    assert http.patch("/v1/items/5", json={"metadata": {"size": None, "label": "b"}}).json()["version"] > version
    assert http.get("/v1/items/5").json()["metadata"] == {"label": "b"}
    assert http.delete("/v1/items/5").json()["deleted"] == 1
    assert http.get("/v1/items/5").status_code == http.delete("/v1/items/5").status_code == 404
    assert http.patch("/v1/items/5", json={"metadata": {}}).status_code == 404
    assert http.post("/v1/items/delete", json={"ids": ["6", "7", "missing"]}).json()["deleted"] == 2
    assert http.get("/v1/count").json()["count"] == COUNT + 1 - 3


def test_every_id_has_an_address(changing):
    http, _ = changing
    names = ["count", "get", "image", "delete", "..", "a/../b", "x/", "/x", "?", "%2F", " ", "v1/items"]
    items = [{"id": name, "vector": [1.0] * DIMENSION} for name in names]
    assert http.put("/v1/items", json={"items": items}).status_code == 200
    for name in names:
        path = "/v1/items/" + quote(name, safe="").replace(".", "%2E")
        assert http.get(path).json()["id"] == name
        assert http.patch(path, json={"metadata": {"size": 1}}).status_code == 200
        assert http.delete(path).json()["deleted"] == 1
        assert http.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/livez", "/readyz"])
def test_monitors_may_ask_for_the_head_alone(changing, path):
    http, service = changing
    whole, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"") and head.headers["content-length"] != "0"
    assert {**head.headers, "date": ""} == {**whole.headers, "date": ""}
    service.draining = True
    assert http.head("/readyz").status_code == 503


def test_the_same_key_makes_a_change_once(changing):
    http, _ = changing
    asked = {"items": [{"id": "a", "vector": [1.0] * DIMENSION}]}
    first = http.put("/v1/items", json=asked, headers={"Idempotency-Key": "k1"}).json()
    http.delete("/v1/items/a")
    assert http.put("/v1/items", json=asked, headers={"Idempotency-Key": "k1"}).json() == first
    assert http.get("/v1/items/a").status_code == 404


def test_snapshots_are_made_listed_and_deleted(changing):
    http, _ = changing
    assert http.get("/v1/snapshots").json() == {"snapshots": []}
    (made,) = http.post("/v1/snapshots", json={"name": "monday"}).json()["snapshots"]
    assert (made["name"], made["count"], made["version"]) == ("monday", COUNT, 0)
    assert http.post("/v1/snapshots", json={"name": "monday"}).status_code == 409
    for name in ("../up", "a/b", ".", "", "x" * 65):
        assert http.post("/v1/snapshots", json={"name": name}).status_code == 422
    assert http.get("/v1/snapshots").json()["snapshots"] == [made]
    assert http.delete("/v1/snapshots/monday").json() == {"snapshots": []}
    assert http.delete("/v1/snapshots/monday").status_code == 404


def test_a_restarted_service_has_what_was_changed(vectors, tmp_path):
    folder = make_index(tmp_path / "index", vectors)
    with running(Settings(index=folder)) as (url, _), asking(url) as http:
        http.put("/v1/items", json={"items": [{"id": "a", "vector": [1.0] * DIMENSION}]})
        http.delete("/v1/items/0")
    with running(Settings(index=folder)) as (url, _), asking(url) as http:
        assert http.post("/v1/search", json={"vector": [2.0] * DIMENSION, "k": 1}).json()["hits"][0]["id"] == "a"
        assert http.get("/v1/count").json()["count"] == COUNT


def test_the_index_is_described(http, served):
    told = http.get("/v1/model").json()
    assert (told["count"], told["dimension"], told["metric"], told["kind"]) == (COUNT, DIMENSION, "cosine", "flat")
    assert "array" in told["image_search"]
    columns = {one["name"]: one for one in http.get("/v1/columns").json()["columns"]}
    assert columns["label"]["values"][0] == {"value": "class-0", "count": 134}
    assert (columns["size"]["min"], columns["size"]["max"], columns["size"]["type"]) == (0, 6, "integer")
    assert http.get("/v1/stats").json()["count"] == COUNT
    assert http.get("/readyz").status_code == http.get("/livez").status_code == 200


def test_an_index_without_a_model_says_so(http):
    for path, files in (
        ("/v1/search/image", {"file": b"x"}),
        ("/v1/items/image", {"file": b"x", "id": (None, "a")}),
        ("/v1/match", {"source": b"x", "target": b"y"}),
    ):
        answer = http.post(path, files=files)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_model")
        assert "built from an array" in answer.json()["error"]["message"]


def test_a_damaged_item_is_a_fault_of_ours_and_the_rest_is_found(vectors, tmp_path):
    folder = make_index(tmp_path / "index", vectors)
    LiveIndex.open(folder).close()
    database = sqlite3.connect(folder / "live" / "live.db")
    database.execute("UPDATE items SET vector = zeroblob(length(vector)) WHERE id = '0'")
    database.commit()
    database.close()
    with running(Settings(index=folder)) as (url, _), asking(url) as client:  # and cannot be calibrated with it
        told = client.get("/v1/items/0")
        assert (told.status_code, told.json()["error"]["code"]) == (500, "internal") and "live" not in told.text
        assert client.post("/v1/search", json={"id": "1", "k": 3}).json()["hits"][0]["id"] == "1"


def test_what_is_told_of_failures_names_no_file(changing, tmp_path):
    client, service = changing
    service.live._store.degraded = f"[Errno 28] No space left on device: '{tmp_path}/live.db'"
    for path in ("/v1/stats", "/readyz"):
        assert str(tmp_path) not in client.get(path).text
    assert "log" in client.get("/v1/stats").json()["degraded"]
    service.live.close()
    told = client.get("/v1/items/0")
    assert (told.status_code, told.json()["error"]["code"]) == (503, "unavailable") and str(tmp_path) not in told.text


def test_errors_of_other_libraries_are_faults_of_ours():
    for error in (pa.ArrowInvalid("x"), json.JSONDecodeError("x", "y", 0), UnicodeError("x"), KeyError("x")):
        assert failure(error).status_code == 500
    assert failure(ValueError("k=0; give at least 1\nmore")).detail["message"] == "k=0; give at least 1"


def test_metrics_tell_what_was_done(http):
    http.post("/v1/search", json={"id": "1"})
    http.get("/v1/nothing")
    text = http.get("/metrics").text
    assert 'repkit_request_seconds_count{method="POST",route="/v1/search",status="200"}' in text
    assert 'route="none",status="404"' in text
    assert metric(text, "repkit_items") == COUNT and metric(text, "repkit_waiting_searches") == 0
    assert metric(text, "process_resident_memory_bytes") > 0


def test_recall_is_probed(vectors, tmp_path):
    folder = make_index(tmp_path / "index", vectors_of(3000, 16), kind="ivf")
    with running(Settings(index=folder, probe_share=1.0)) as (url, _), asking(url) as http:
        for row in range(20):
            answer = http.post("/v1/search", json={"id": str(row), "nprobe": 1}).json()
        assert not answer["exact"]
        while metric(text := http.get("/metrics").text, "repkit_recall_probes_total") < 20:
            threading.Event().wait(0.01)
        assert 0 < metric(text, "repkit_recall") < 1


def test_the_faster_setting_is_kept(monkeypatch):
    """Threads that the environment sets are left alone; of the thresholds, the one with which the search is fast."""
    threshold, threads = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pause = threading.Event()

    def search(queries):
        pause.wait(0.001 if faiss.cvar.distance_compute_blas_threshold == 1 else 0.03)

    try:
        assert calibrate(search, vectors_of(3), multiplies=True) == (1, 1)
        assert faiss.cvar.distance_compute_blas_threshold == 1
        faiss.cvar.distance_compute_blas_threshold = threshold
        assert calibrate(search, vectors_of(3), multiplies=False) == (1, threshold)
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold
        faiss.omp_set_num_threads(threads)
