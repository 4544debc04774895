"""The service as a process: what it imports, how it starts, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

from repkit.exporting import export
from repkit.retrieval import Index
from repkit.service.live import LiveIndex
from repkit.service.run import HEADER_SECONDS
from repkit.tasks.building import build_extractor
from tests.export_cases import write_images
from tests.service_cases import DIMENSION, asking, make_index, vectors_of

_SERVE = """if True:
    import json, sys
    from pathlib import Path
    from repkit.service.run import serve
    from repkit.service.settings import Settings
    def ready(address):
        print(json.dumps([address, sorted(sys.modules)]), flush=True)
    serve(Settings(index=Path(sys.argv[1]), port=0), ready)
"""


@pytest.fixture
def start():
    """Start a process; it is killed after the test."""
    started = []

    def begin(*arguments):
        command = [sys.executable, *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, text=True, env=environment, stdout=pipe, stderr=pipe))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_service_of_vectors_does_without_torch(start, tmp_path):
    folder = make_index(tmp_path / "index", vectors_of(50))
    process = start("-c", _SERVE, folder)
    url, modules = json.loads(process.stdout.readline())
    with asking(url) as http:
        assert http.post("/v1/search", json={"id": "3", "k": 1}).json()["hits"][0]["id"] == "3"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not {"torch", "lightning", "diffusers", "repkit.recipes", "repkit.cli"} & set(modules)
    assert process.stderr.read() == ""


def test_a_service_with_a_model_imports_no_training(start, tmp_path):
    photos = write_images(tmp_path / "photos", 3)
    store = export(photos, build_extractor("mini-unet", ["mid@50"]), tmp_path / "store")
    Index.build(store).save(tmp_path / "index")
    process = start("-c", _SERVE, tmp_path / "index")
    url, modules = json.loads(process.stdout.readline())
    with asking(url) as http:
        picture = sorted(photos.rglob("*.png"))[0]
        hits = http.post("/v1/search/image", files={"file": picture.read_bytes()}).json()["hits"]
        assert hits[0]["id"] == picture.name and hits[0]["score"] > 1 - 1e-5
    assert "torch" in modules
    tops = {name.split(".")[0] for name in modules}
    assert not tops & {"lightning", "pytorch_lightning", "lightning_fabric"} and "repkit.recipes" not in modules
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and process.stderr.read() == ""  # no library complains of what was not freed


def head(length, route="PUT /v1/items", *more):
    lines = [f"{route} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {length}"]
    lines += more
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_a_signal_ends_the_service_when_what_it_has_begun_is_done(start, tmp_path):
    folder = make_index(tmp_path / "index", vectors_of(50))
    process = start("-m", "repkit.cli", "serve", folder, "--port", 0)
    url = process.stdout.readline().strip()
    body = json.dumps({"items": [{"id": "last", "vector": [1.0] * DIMENSION}]}).encode()
    with asking(url) as http, socket.create_connection((http.base_url.host, http.base_url.port), timeout=20) as slow:
        slow.sendall(head(len(body)) + body[:10])
        assert http.get("/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (ready := http.get("/readyz")).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ready.status_code == 503 and ready.json()["error"]["code"] == "draining"
        assert http.get("/livez").status_code == 200
        assert http.post("/v1/search", json={"id": "3", "k": 1}).json()["hits"][0]["id"] == "3"
        time.sleep(1.2)  # by now it has stopped to listen
        slow.sendall(body[10:])
        assert slow.recv(4096).startswith(b"HTTP/1.1 200")
    assert process.wait(20) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((http.base_url.host, http.base_url.port), timeout=5)
    assert "Traceback" not in process.stderr.read()
    with LiveIndex.open(folder) as live:
        np.testing.assert_allclose(live.get("last").vector, np.full(DIMENSION, DIMENSION**-0.5), atol=1e-6)


def test_what_cannot_be_served_is_one_line(repkit, tmp_path):
    folder = make_index(tmp_path / "index", vectors_of(5))
    for arguments, words in (
        (["--host", "0.0.0.0"], ["0.0.0.0", "--key-file"]),
        (["--key-file", tmp_path / "none"], ["none", "make one"]),
        (["--images", tmp_path / "none"], ["--images", "none"]),
        (["--host", "203.0.113.1", "--key-file", key_file(tmp_path)], ["203.0.113.1:8000", "cannot listen"]),
    ):
        code, out, err = repkit("serve", folder, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and all(word in err for word in words), err
    for other in (tmp_path / "none", tmp_path):
        code, out, err = repkit("serve", other, "--port", 0)
        assert (code, out, err.count("\n")) == (2, "", 1), err
    with LiveIndex.open(folder):
        code, out, err = repkit("serve", folder, "--port", 0)
        assert (code, out, err.count("\n")) == (2, "", 1) and str(os.getpid()) in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = repkit("serve", folder, "--port", taken.getsockname()[1])
        assert code == 2 and "cannot listen" in err


def key_file(folder):
    (folder / "keys").write_text("0123456789abcdef")
    return folder / "keys"


@pytest.fixture
def few(start, tmp_path):
    """The address of a service for three connections."""
    folder = make_index(tmp_path / "index", vectors_of(5))
    fewer = "    from repkit.service import run\n    run.MOST_CONNECTIONS = 3\n"
    process = start("-c", _SERVE.replace("    def ready", f"{fewer}    def ready"), folder)
    return json.loads(process.stdout.readline())[0]


def test_where_all_connections_are_busy_requests_on_others_are_refused(few):
    place = few.removeprefix("http://").split(":")
    busy = [socket.create_connection((place[0], int(place[1])), timeout=20) for _ in range(3)]
    body = json.dumps({"id": "3", "k": 1}).encode()
    for one in busy:
        one.sendall(head(len(body), "POST /v1/search", "Expect: 100-continue"))
        assert one.recv(4096).startswith(b"HTTP/1.1 100")  # by now it waits for the body
    with asking(few) as late:
        refused = late.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "busy")
        assert refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
        assert late.get("/livez").status_code == late.get("/readyz").status_code == 200
    busy[0].sendall(body)
    assert busy[0].recv(4096).startswith(b"HTTP/1.1 200")
    with asking(few) as late:
        assert late.get("/v1/stats").status_code == 200  # in the place of the one that has its answer
    for one in busy[1:]:
        one.sendall(body)
        assert one.recv(4096).startswith(b"HTTP/1.1 200")
    for one in busy:
        one.close()


def test_a_connection_without_a_request_makes_room(few):
    with asking(few) as http:
        assert http.get("/v1/stats").status_code == 200
        address = (http.base_url.host, http.base_url.port)
        idle = [socket.create_connection(address, timeout=20) for _ in range(20)]
        with asking(few) as late:
            assert late.get("/v1/stats").status_code == 200
        idle[0].settimeout(HEADER_SECONDS / 2)  # by then it would have been hung up on in any case
        with suppress(ConnectionResetError):
            assert idle[0].recv(1) == b""
        for one in idle:
            one.close()
