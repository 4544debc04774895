"""Hostile and careless clients: refused with 4xx and one line, and nothing of it does harm."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import httpx
import pytest

from repkit.service import run
from repkit.service.app import _page
from repkit.service.keys import Keys, _hashed, read_keys
from repkit.service.settings import Settings
from tests.service_cases import COUNT, DIMENSION, asking, make_index, metric, running, vectors_of

WRITE, READ = "write-key-0123456789", "read-key-0123456789"
ONE = [1.0] * DIMENSION
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = make_index(tmp_path_factory.mktemp("indexes") / "index", vectors_of())
    return Settings(index=folder, max_body=200_000, most_waiting=8, body_seconds=0.5)


@pytest.fixture(scope="module")
def served(settings):
    with running(settings) as found:
        yield found


@pytest.fixture
def http(served):
    with asking(served[0]) as client:
        yield client


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    folder = make_index(tmp_path_factory.mktemp("locked") / "index", vectors_of(20))
    keys = Keys(frozenset({_hashed(WRITE)}), frozenset({_hashed(READ)}))
    with running(Settings(index=folder, keys=keys)) as (url, service):
        yield url, service


def check_refused(answer, status, code):
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    assert set(answer.json()) == {"error"} and "Traceback" not in answer.text


def exchange(url, content, seconds=10.0):
    """Bytes sent as they are; what comes back until the other side hangs up."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=seconds) as connection:
        connection.sendall(content)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found


# --- what is asked


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"vector": ONE, "id": "1"},
        {"vector": []},
        {"vector": ONE[:-1]},
        {"vector": [*ONE, 1.0]},
        {"vector": [*ONE[:-1], 1e39]},
        {"vector": [*ONE[:-1], None]},
        {"vector": [*ONE[:-1], "x"]},
        {"vector": [*ONE[:-1], [1.0]]},
        {"vector": "AAAA"},
        {"vector": ONE, "k": 0},
        {"vector": ONE, "k": -1},
        {"vector": ONE, "k": 1001},
        {"vector": ONE, "k": 10**30},
        {"vector": ONE, "k": 1.5},
        {"vector": ONE, "ef": 0},
        {"vector": ONE, "nprobe": 10**9},
        {"vector": ONE, "unknown": 1},
        {"vector": ONE, "where": {"label' OR 1=1 --": "x"}},
        {"vector": ONE, "where": {"missing": 1}},
        {"vector": ONE, "where": {"label": {"$where": "sleep(9)"}}},
        {"vector": ONE, "where": {"label": {"gt": ["a"]}}},
        {"vector": ONE, "where": {"size": "a"}},
        {"vector": ONE, "where": {"size": {"gte": 10**40}}},
        {"vector": ONE, "where": {"label": [[["x"]]]}},
        {"vector": ONE, "where": {f"column-{row}": 1 for row in range(40)}},
        {"vector": ONE, "where": {"label": ["x"] * 1001}},
        {"vector": ONE, "where": []},
        {"id": ""},
        {"id": "x" * 513},
        {"id": "a\x00b"},
        {"id": ["a"]},
        [],
        None,
        "text",
    ],
)
def test_a_wrong_search_is_told(http, asked):
    check_refused(http.post("/v1/search", json=asked), 422, "invalid")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (f'{{"vector": [{"NaN," * (DIMENSION - 1)}1]}}', 422),
        (f'{{"vector": [{"1," * (DIMENSION - 1)}-Infinity]}}', 422),
        (f'{{"vector": [{"1," * (DIMENSION - 1)}1e999]}}', 422),
        ('{"id": "\\ud800"}', 422),
        ('{"vector": ' + "[" * 50_000 + "]" * 50_000 + "}", 400),
        ('{"where": ' + '{"a":' * 30_000 + "1" + "}" * 30_000 + "}", 400),
        ('{"id": "1", "k": ' + "9" * 100_000 + "}", 400),
        ("{", 422),
        ("", 422),
        ("\x00\xff", 422),
    ],
)
def test_what_json_allows_or_does_not(http, text, status):
    begun = time.perf_counter()
    answer = http.post("/v1/search", content=text.encode("latin-1"), headers=JSON)
    assert answer.status_code == status and set(answer.json()) == {"error"}
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize(
    "name",
    ["' OR 1=1 --", '"; DROP TABLE items; --', "../../etc/passwd", "/etc/passwd", "%2e%2e%2f", "a/../b", "x;y", "*"],
)
def test_tricks_in_an_id_are_only_text(served, http, name):
    assert http.post("/v1/items/get", json={"ids": [name]}).json() == {"items": []}
    check_refused(http.post("/v1/search", json={"id": name}), 404, "not_found")
    check_refused(http.get("/v1/thumbnails", params={"id": name}), 404, "not_found")
    before = http.get("/v1/count").json()["count"]
    http.put("/v1/items", json={"items": [{"id": name, "vector": ONE, "metadata": {name: name}}]})
    assert http.post("/v1/items/get", json={"ids": [name]}).json()["items"][0]["metadata"] == {name: name}
    where = json.dumps({name: name})
    assert http.get("/v1/items", params={"where": where}).json()["items"] == [{"id": name, "metadata": {name: name}}]
    assert http.post("/v1/items/delete", json={"ids": [name]}).json()["deleted"] == 1
    assert http.get("/v1/count").json()["count"] == before


@pytest.mark.parametrize(
    "item",
    [
        {"id": "a"},
        {"id": "a", "vector": ONE[:-1]},
        {"id": "a\n", "vector": ONE},
        {"id": "a", "vector": ONE, "metadata": {"label": {"deep": 1}}},
        {"id": "a", "vector": ONE, "metadata": {"label": [1]}},
        {"id": "a", "vector": ONE, "metadata": {"label": 5}},
        {"id": "a", "vector": ONE, "metadata": {"id": "b"}},
        {"id": "a", "vector": ONE, "metadata": {"x": 10**400}},
        {"id": "a", "vector": ONE, "image": "http://127.0.0.1/x.png"},
        {"id": "a", "vector": ONE, "url": "file:///etc/passwd"},
    ],
)
def test_a_wrong_item_changes_nothing(http, item):
    good = {"id": "good", "vector": ONE}
    check_refused(http.put("/v1/items", json={"items": [good, item]}), 422, "invalid")
    assert http.post("/v1/items/get", json={"ids": ["good", "a"]}).json() == {"items": []}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"where": {"label": [["x"]]}}, "where.label: give text, a number, true or false, a list or operators with"),
        ({"where": {"size": {"gte": {"a": 1}}}}, "where.size: give text, a number, true or false, a list or"),
        ({"where": {"size": ["x"] * 1001}}, "where.size: List should have at most 1000 items"),
        ({"where": {"label": "x" * 5000}}, "where.label: String should have at most 4096 characters"),
    ],
)
def test_a_wrong_filter_is_told_in_one_line(http, asked, message):
    told = http.post("/v1/search", json={"vector": ONE, **asked}).json()["error"]["message"]
    assert told.startswith(f"body.{message}") and ";" not in told and len(told) < 120
    told = http.get("/v1/count", params={"where": json.dumps(asked["where"])}).json()["error"]["message"]
    assert told.startswith(message)


def test_wrong_metadata_are_told_in_one_line(http):
    for value in ({"a": 1}, [1]):
        item = {"id": "x", "vector": ONE, "metadata": {"size": value}}
        told = http.put("/v1/items", json={"items": [item]}).json()["error"]["message"]
        assert told == "body.items.0.metadata.size: give text, a number, true or false"


def test_wrong_parameters_are_told(http):
    for path in (
        "/v1/items?limit=0",
        "/v1/items?limit=100000",
        "/v1/items?where=%7B",
        "/v1/items?where=" + "[" * 5000,
        '/v1/items?where={"size":NaN}',
        "/v1/items?after=%00",
        "/v1/count?where=[]",
        "/v1/thumbnails",
        "/v1/thumbnails?id=1&side=100000",
    ):
        check_refused(http.get(path), 422, "invalid")
    check_refused(http.get("/v1/items/%00"), 422, "invalid")
    check_refused(http.get("/v1/nowhere"), 404, "not_found")
    check_refused(http.get("/static/../settings.py"), 404, "not_found")
    check_refused(http.get("/static/%2e%2e/settings.py"), 404, "not_found")
    check_refused(http.put("/v1/search", json={}), 405, "no_such_method")
    check_refused(http.put("/v1/items", json={"items": []}, headers={"Idempotency-Key": "a b"}), 422, "invalid")


# --- how much, how fast


def test_a_large_body_is_refused_before_it_is_read(http, settings):
    check_refused(http.post("/v1/search", content=b" " * (settings.max_body + 1), headers=JSON), 413, "too_large")
    declared = {"Content-Length": str(10**12), **JSON}
    found = exchange(str(http.base_url), head("POST", "/v1/search", declared))
    assert found.startswith(b"HTTP/1.1 413") and b"too_large" in found


def test_a_chunked_body_is_counted(http, settings):
    def endless():
        sent = 0
        while sent <= 4 * settings.max_body:
            sent += 10_000
            yield b" " * 10_000

    check_refused(http.post("/v1/search", content=endless(), headers=JSON), 413, "too_large")
    whole = json.dumps({"id": "1"}).encode()
    answer = http.post("/v1/search", content=(bytes([one]) for one in whole), headers=JSON)
    assert answer.json()["hits"][0]["id"] == "1"


def test_a_body_of_another_kind_is_refused(http):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml", ""):
        check_refused(http.post("/v1/search", content=b"{}", headers={"Content-Type": kind}), 415, "wrong_type")
    packed = {"Content-Encoding": "gzip", **JSON}
    check_refused(http.post("/v1/search", content=b"{}", headers=packed), 415, "wrong_type")


def head(method, path, headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_a_slow_body_is_given_up(http):
    begun = time.perf_counter()
    found = exchange(str(http.base_url), head("POST", "/v1/search", {"Content-Length": "100", **JSON}) + b'{"id"')
    assert found.startswith(b"HTTP/1.1 408") and time.perf_counter() - begun < 5


def test_slow_headers_are_given_up(http, monkeypatch):
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)
    begun = time.perf_counter()
    assert exchange(str(http.base_url), b"GET /livez HT") == b""
    assert exchange(str(http.base_url), b"") == b""
    assert time.perf_counter() - begun < 5


def test_a_client_that_does_not_read_its_answers_is_hung_up_on(served, http, monkeypatch):
    monkeypatch.setattr(run, "ANSWER_SECONDS", 0.3)
    body = json.dumps({"id": "1", "k": COUNT, "include_vectors": True}).encode()
    asked = head("POST", "/v1/search", {"Content-Length": str(len(body)), **JSON}) + body
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect((http.base_url.host, http.base_url.port))
        connection.sendall(200 * asked)  # more than the buffers between both take
        with pytest.raises(ConnectionError):
            while connection.send(b"\r\n"):
                time.sleep(0.01)
    assert http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"\x16\x03\x01\x02\x00", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost\r\n\r\n"],
)
def test_what_is_no_http_is_answered_with_400(http, content):
    assert exchange(str(http.base_url), content).startswith(b"HTTP/1.1 400")


def test_two_lengths_are_refused(http):
    smuggled = head("POST", "/v1/search", {"Content-Length": "5", "Transfer-Encoding": "chunked", **JSON})
    found = exchange(str(http.base_url), smuggled + b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 400") and found.count(b"HTTP/1.1") == 1


def test_when_too_many_wait_the_next_are_sent_away(served, http, settings):
    _, service = served
    begun, held, search = threading.Event(), threading.Event(), service.batcher._search

    def slow(*arguments):
        begun.set()
        held.wait(10)
        return search(*arguments)

    service.batcher._search = slow
    try:
        with ThreadPoolExecutor(30) as threads:
            asked = [threads.submit(http.post, "/v1/search", json={"vector": ONE})]
            begun.wait(10)
            asked += [threads.submit(http.post, "/v1/search", json={"vector": ONE}) for _ in range(29)]
            while sum(one.done() for one in asked) < 30 - settings.most_waiting - 1:
                held.wait(0.01)
            assert http.get("/livez").status_code == http.get("/readyz").status_code == 200
            unread = http.post("/v1/search", content=b"{", headers=JSON)  # is refused before it is parsed
            check_refused(unread, 429, "busy")
            held.set()
            answers = [one.result() for one in asked]
    finally:
        held.set()
        service.batcher._search = search
    statuses = [one.status_code for one in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) == settings.most_waiting + 1
    busy = next(one for one in answers if one.status_code == 429)
    assert busy.headers["retry-after"] == "1" and busy.json()["error"]["code"] == "busy"
    assert http.post("/v1/search", json={"id": "1"}).status_code == 200
    assert 'repkit_refused_total{reason="busy"} 22.0' in http.get("/metrics").text


def test_a_deadline_is_kept(served, http):
    _, service = served
    held, search = threading.Event(), service.batcher._search
    service.batcher._search = lambda *arguments: held.wait(10) and search(*arguments)
    try:
        begun = time.perf_counter()
        answer = http.post("/v1/search", json={"vector": ONE}, headers={"X-Timeout-Ms": "150"})
        check_refused(answer, 504, "deadline")
        assert time.perf_counter() - begun < 3
    finally:
        held.set()
        service.batcher._search = search
    for wrong in ("0", "-5", "x", "1e3", "9" * 30):
        check_refused(http.get("/v1/model", headers={"X-Timeout-Ms": wrong}), 400, "bad_request")
    assert http.get("/v1/model", headers={"X-Timeout-Ms": "5000"}).status_code == 200


def test_clients_that_go_away_leave_nothing_behind(served, http):
    _, service = served
    for _ in range(20):
        with closing(socket.create_connection((http.base_url.host, http.base_url.port))) as connection:
            connection.sendall(head("POST", "/v1/search", {"Content-Length": "1000", **JSON}) + b"{")
    deadline = time.monotonic() + 10
    while metric(http.get("/metrics").text, "repkit_waiting_searches") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert http.post("/v1/search", json={"id": "1"}).status_code == 200


# --- who


def routes(url, key):
    with asking(url, key) as http:
        for path, methods in http.get("/v1/openapi.json").json()["paths"].items():
            yield from ((method.upper(), path.replace("{id}", "0").replace("{name}", "x")) for method in methods)


def test_without_a_key_nothing_is_open_but_the_page(locked):
    url, _ = locked
    every = {*routes(url, READ), ("GET", "/v1/openapi.json")}
    assert {("POST", "/v1/search"), ("GET", "/metrics"), ("PUT", "/v1/items")} < every
    with asking(url) as http:
        for method, path in every:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {WRITE}"}):
                answer = http.request(method, path, headers=headers)
                if path in ("/livez", "/readyz"):
                    assert answer.status_code == 200
                else:
                    check_refused(answer, 401, "no_key")
                    assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/nowhere", "/docs", "/openapi.json", "/V1/items", "/livez/", "/static/x.py"):
            check_refused(http.get(path), 401, "no_key")
        assert all(http.get(path).status_code == 200 for path in _page())


def test_a_read_key_reads_and_does_not_write(locked):
    url, _ = locked
    reads = {"/v1/search", "/v1/search/batch", "/v1/search/image", "/v1/match", "/v1/items/get"}
    with asking(url, READ) as http:
        for method, path in routes(url, READ):
            answer = http.request(method, path, json={} if method != "GET" else None)
            if method == "GET" or path in reads:
                assert answer.status_code not in (401, 403), (method, path)
            else:
                check_refused(answer, 403, "forbidden")
        assert http.get("/v1/count").json()["count"] == 20
    with asking(url, WRITE) as http:
        assert http.put("/v1/items", json={"items": [{"id": "w", "vector": ONE}]}).status_code == 200
        assert http.delete("/v1/items/w").status_code == 200


def test_keys_are_read_from_files_and_kept_as_hashes(tmp_path):
    (tmp_path / "keys").write_text(f"{WRITE}\n\n  other-key-0123456789 \n")
    (tmp_path / "read").write_text(READ)
    keys = read_keys(tmp_path / "keys", tmp_path / "read")
    assert keys and WRITE not in repr(keys) and READ not in repr(keys)
    scopes = {key: keys.scope(f"Bearer {key}") for key in (WRITE, "other-key-0123456789", READ, "", "x" * 10_000)}
    assert list(scopes.values()) == ["write", "write", "read", None, None]
    assert keys.scope(None) is keys.scope(WRITE) is keys.scope(f"Basic {WRITE}") is None
    assert Keys().scope(None) == "write" and not Keys()
    for content, message in (("", "no key"), ("short", "fewer than 16")):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_keys(tmp_path / "keys", None)
    with pytest.raises(ValueError, match="make one"):
        read_keys(tmp_path / "none", None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_address_needs_a_key(settings, host):
    with pytest.raises(ValueError, match="--key-file"):
        replace(settings, host=host)
    assert replace(settings, host=host, keys=Keys(frozenset({_hashed(WRITE)}))).host == host


def test_other_sites_and_names_may_not_ask(http):
    port = http.base_url.port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[::"):
        check_refused(http.get("/v1/model", headers={"Host": host}), 403, "forbidden")
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}", "http://[::"):
        check_refused(http.post("/v1/search", json={"id": "1"}, headers={"Origin": origin}), 403, "forbidden")
    own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert http.post("/v1/search", json={"id": "1"}, headers=own).status_code == 200


def test_every_answer_carries_the_headers(http):
    for answer in (
        http.get("/livez"),
        http.get("/v1/nowhere"),
        http.post("/v1/search", content=b"x"),
        http.get("/metrics"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_memory_for_bodies_is_bounded(settings):
    """Many clients that each send most of a large body are not all held at once."""
    from repkit.service.limits import BODIES, Limits

    async def app(scope, receive, send):
        raise AssertionError("no body is whole")

    async def client(limits, sent):
        parts = iter([{"type": "http.request", "body": b" " * settings.max_body, "more_body": True}])

        async def receive():
            if part := next(parts, None):
                return part
            await asyncio.sleep(10)

        async def send(message):
            sent.append(message.get("status"))

        headers = [(b"transfer-encoding", b"chunked"), (b"content-type", b"multipart/form-data")]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        await limits(scope, receive, send)

    async def all_of_them():
        limits, sent = Limits(app, replace(settings, body_seconds=0.2)), []
        await asyncio.gather(*(client(limits, sent) for _ in range(BODIES + 5)))
        return limits.held, sent

    held, sent = asyncio.run(all_of_them())
    assert held == 0 and sorted(one for one in sent if one) == [408] * BODIES + [429] * 5


def test_the_index_is_unharmed(http):
    assert http.get("/v1/count").json()["count"] == COUNT
