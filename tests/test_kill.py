"""kill -9 at any moment of an export, then the same call again: the folder is that of an undisturbed run."""

import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest

from repkit import decoding, shards
from repkit.exporting import export
from repkit.store import FeatureStore
from tests.export_cases import hashes, tiny_extractor, write_images

OPTIONS = {"batch_size": 3, "shard_size": 4}


@pytest.fixture(scope="module")
def extractor():
    return tiny_extractor()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp("images"), 22)
    (folder / "004-text.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def undisturbed(images, extractor, tmp_path_factory):
    """The hashes of the files of an uninterrupted export, and the seconds it took."""
    out = tmp_path_factory.mktemp("undisturbed")
    started = time.perf_counter()
    export(images, extractor, out, **OPTIONS)
    return hashes(out), time.perf_counter() - started


def fork(task: Callable[[], object]) -> int:
    """Run a task in a child that has all of this process's warm state; the child's id."""
    child = os.fork()
    if child:
        return child
    try:
        task()
        os._exit(0)
    except BaseException:
        os._exit(1)


def kill_after(child: int, seconds: float) -> bool:
    """Whether the child was killed, rather than done before."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_at_random(kills: int, seed: int, images, extractor, undisturbed, out) -> None:
    """Export, be killed, go on, be killed ...; and go on to the end."""
    expected, seconds = undisturbed
    rng = np.random.default_rng(seed)
    killed = 0
    for _ in range(20 * kills):
        child = fork(lambda: export(images, extractor, out, **OPTIONS))
        killed += kill_after(child, rng.uniform(0.05, 0.7) * seconds)
        if out.exists() and (out / "manifest.json").exists() and FeatureStore(out).complete:
            assert hashes(out) == expected
            for path in out.iterdir():
                path.unlink()
        if killed == kills:
            break
    assert killed == kills
    export(images, extractor, out, **OPTIONS)
    assert hashes(out) == expected


def test_three_random_kills(images, extractor, undisturbed, tmp_path):
    kill_at_random(3, 0, images, extractor, undisturbed, tmp_path / "out")


@pytest.mark.slow
def test_twenty_random_kills(images, extractor, undisturbed, tmp_path):
    kill_at_random(20, 1, images, extractor, undisturbed, tmp_path / "out")


# list + manifest, six shards of three files, failures, manifest: 22 renames and as many files written
@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12, 20, 21, 22])
def test_killed_before_a_step_of_writing(call, count, images, extractor, undisturbed, tmp_path, monkeypatch):
    done = 0
    original = getattr(os, call)

    def step(*arguments):
        nonlocal done
        done += 1
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    def run():
        monkeypatch.setattr(shards.os, call, step)
        export(images, extractor, tmp_path / "out", **OPTIONS)

    _, status = os.waitpid(fork(run), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    export(images, extractor, tmp_path / "out", **OPTIONS)
    assert hashes(tmp_path / "out") == undisturbed[0]


def test_the_lock_goes_with_the_killed_process(images, extractor, undisturbed, tmp_path):
    reader, writer = os.pipe()

    def run():
        def hold(done, total, failed):
            os.write(writer, b"x")
            time.sleep(60)

        export(images, extractor, tmp_path / "out", **OPTIONS, progress=hold)

    child = fork(run)
    os.read(reader, 1)
    try:
        with pytest.raises(BlockingIOError, match="another export"):
            export(images, extractor, tmp_path / "out", **OPTIONS)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    export(images, extractor, tmp_path / "out", **OPTIONS)
    assert hashes(tmp_path / "out") == undisturbed[0]


@pytest.mark.slow
def test_a_decoding_process_that_is_killed_is_replaced(images, extractor, undisturbed, tmp_path, monkeypatch):
    started = []
    start = decoding.Process._start

    def remember(process):
        started.append(start(process))
        return started[-1]

    def kill_one(done, total, failed):
        if len(started) == 2:
            started[0].kill()

    monkeypatch.setattr(decoding.Process, "_start", remember)
    export(images, extractor, tmp_path / "out", **OPTIONS, workers=2, progress=kill_one)
    assert len(started) > 2
    assert hashes(tmp_path / "out") == undisturbed[0]
