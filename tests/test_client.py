"""The client: what it gives is what the service answers, and errors are Python's own."""

from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest

from repkit.service.client import Client, Item
from repkit.service.keys import Keys, _hashed
from repkit.service.settings import Settings
from tests.service_cases import COUNT, DIMENSION, make_index, running, vectors_of

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def vectors():
    return vectors_of()


@pytest.fixture(scope="module")
def url(vectors, tmp_path_factory):
    folder = make_index(tmp_path_factory.mktemp("indexes") / "index", vectors)
    with running(Settings(index=folder, keys=Keys(frozenset({_hashed(KEY)})))) as (url, _):
        yield url


@pytest.fixture
def client(url):
    with Client(url, key=KEY) as found:
        yield found


def test_searches(client, vectors):
    found = client.search(vectors[4], 3, where={"label": "class-1"}, exact=True, include_vectors=True)
    assert found.hits[0].id == "4" and len(found.hits) == 3 and found.exact and found.version == 0
    np.testing.assert_allclose(found.hits[0].vector, vectors[4] / np.linalg.norm(vectors[4]), atol=1e-6)
    assert [hit.id for hit in client.search("4", 3, where={"label": "class-1"}).hits] == [hit.id for hit in found.hits]
    batch = client.search_batch([vectors[row] for row in range(5)], 1)
    assert [one.hits[0].id for one in batch] == ["0", "1", "2", "3", "4"]
    assert found.model["metric"] == "cosine" and found.scanned == len(range(1, COUNT, 3))


@pytest.mark.parametrize("name", ["plain", "..", "a/../b", "count", "a b?c#d%2F", "ä/\u2028"])
def test_changes(client, name):
    vector = np.arange(DIMENSION, dtype=np.float32)
    first = client.upsert([Item(name, vector, {"label": "new"})], idempotency_key=None)
    assert client.update(name, {"label": None, "size": 9}) > first
    (item,) = client.get([name, "missing"])
    assert (item.id, item.metadata) == (name, {"size": 9}) and item.version > first
    np.testing.assert_allclose(item.vector, vector / np.linalg.norm(vector), atol=1e-6)
    assert dict(client.list({"size": 9}, page=1)) == {name: {"size": 9}}
    assert client.count() == COUNT + 1 and client.delete([name, "missing"]) == 1


def test_lists_all_pages(client):
    assert [name for name, _ in client.list(page=37)] == sorted(map(str, range(COUNT)))


def test_tells_about_the_service(client):
    assert client.ready() and client.model()["count"] == client.stats()["count"] == COUNT
    assert {one["name"] for one in client.columns()} >= {"label", "size"}
    client.make_snapshot("one")
    assert [one["name"] for one in client.snapshots()] == ["one"]
    client.delete_snapshot("one")
    assert list(client.snapshots()) == []


def test_errors_are_those_of_python(client, url, vectors):
    with pytest.raises(LookupError, match="no item"):
        client.search("missing")
    with pytest.raises(LookupError, match="no item"):
        client.update("missing", {})
    with pytest.raises(ValueError, match="11 numbers and the index has 12"):
        client.search(vectors[0, 1:])
    with pytest.raises(ValueError, match="no column 'colour'"):
        client.search(vectors[0], where={"colour": "red"})
    with pytest.raises(ConnectionError, match="built from an array"):
        client.search_image(b"x")
    with pytest.raises(LookupError, match="picture"):
        client.thumbnail("1")
    for ids in (client.get, client.delete):
        with pytest.raises(ValueError, match=r"give a list of ids, such as \['12'\]"):
            ids("12")
    with pytest.raises(ValueError, match="is a date"):
        client.upsert([Item("new", vectors[0], {"day": date(2020, 2, 2)})])
    for key in ("schlüssel-0123456789", f"{KEY}\n"):
        with pytest.raises(ValueError, match="the key has a line break or a letter beyond ASCII") as told:
            Client(url, key=key)
        assert KEY not in str(told.value)
    with Client(url) as stranger, pytest.raises(PermissionError, match="Bearer"):
        stranger.count()
    with Client("http://127.0.0.1:9", timeout=1) as lost:
        assert not lost.ready()
        with pytest.raises(ConnectionError, match="127.0.0.1:9"):
            lost.count()


def test_numbers_of_numpy_are_numbers(client, vectors):
    client.upsert([Item("numpy", vectors[0], {"size": np.int64(77), "label": np.str_("one")})])
    assert dict(client.list({"size": np.int64(77)})) == {"numpy": {"size": 77, "label": "one"}}
    assert client.count({"size": {"gte": np.float32(77)}}) == client.delete(["numpy"]) == 1


def test_another_service_is_told():
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.handle_request, daemon=True).start()
        with (
            Client(f"http://127.0.0.1:{server.server_address[1]}") as client,
            pytest.raises(ConnectionError, match="is no repkit service"),
        ):
            client.count()
