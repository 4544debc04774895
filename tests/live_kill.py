"""A process that has imported all that a live index needs, and forks children to be killed; it never imports torch.

Run as `python -c "from tests.live_kill import serve; serve()"`. It reads a line of JSON for each child, and what a
child reports comes out of the same stdout: `start` before a change, `done` after it was acknowledged.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WRITERS = 2
FLUSH = 16


def serve() -> None:
    """Fork a child for each line of stdin, one at a time."""
    import pyarrow.dataset  # noqa: F401  what reading Parquet imports late

    from tests import live_cases  # noqa: F401  with all that the children need

    assert "torch" not in sys.modules
    report("ready")
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            report("forked", pid=os.getpid())
            status = 1
            try:
                {"changes": change_forever, "steps": walk_through}[order["script"]](order)
                status = 0
            except BaseException as error:
                report("failed", error=f"{type(error).__name__}: {error}")
            finally:
                os._exit(status)
        report("ended", status=os.waitpid(child, 0)[1])


def report(what: str, **more: Any) -> None:
    os.write(1, (json.dumps({"what": what, **more}) + "\n").encode())  # below PIPE_BUF, so lines stay whole


def change_forever(order: dict[str, Any]) -> None:
    """Open the index and change it from several threads until something kills this process."""
    from repkit.service.live import LiveIndex

    live = LiveIndex.open(order["folder"], flush_rows=FLUSH)
    report("open", version=live.version)
    threads = [threading.Thread(target=_write, args=(live, order, number)) for number in range(WRITERS)]
    threads += [threading.Thread(target=_compact, args=(live, order))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _write(live: Any, order: dict[str, Any], writer: int) -> None:
    """Each writer has ids of its own, so that what it did does not depend on the other's pace."""
    chance = random.Random(f"{order['seed']}-{writer}")
    known: list[str] = list(order["known"][writer])
    stamp = order["stamp"] + writer
    try:
        while True:
            stamp += WRITERS
            done = _change(live, chance, known, writer, stamp)
            report("done", writer=writer, stamp=stamp, version=done)
    except BaseException as error:
        report("failed", error=f"{type(error).__name__}: {error}")
        os._exit(1)


def _change(live: Any, chance: random.Random, known: list[str], writer: int, stamp: int) -> int:
    from tests.live_cases import items_of

    kind = chance.choices(["upsert", "update", "delete", "snapshot"], [5, 3, 2, 0.3])[0] if known else "upsert"
    start = {"writer": writer, "stamp": stamp, "kind": kind}
    if kind == "upsert":
        ids = sorted({f"w{writer}-{chance.randrange(60)}" for _ in range(chance.randrange(1, 9))})
        report("start", **start, ids=ids)
        version = live.upsert(items_of(ids, stamp))
        known[:] = sorted({*known, *ids})
    elif kind == "update":
        name = chance.choice(known)
        report("start", **start, ids=[name])
        version = live.update(name, {"stamp": stamp, "label": None})
    elif kind == "delete":
        ids = sorted({chance.choice(known) for _ in range(chance.randrange(1, 5))})
        report("start", **start, ids=ids)
        version = live.delete(ids)[0]
        known[:] = [name for name in known if name not in ids]
    else:
        report("start", **start, ids=[])
        version = live.snapshot_to(f"snap-{stamp}").version
    return version


def _compact(live: Any, order: dict[str, Any]) -> None:
    chance = random.Random(order["seed"])
    while True:
        time.sleep(chance.uniform(0.0, 0.05))
        live.compact()


def walk_through(order: dict[str, Any]) -> None:
    """One of each, killed before the n-th of the calls that put something on the disk."""
    from repkit.service.live import LiveIndex
    from tests.live_cases import items_of

    _kill_before(order["kill_at"])
    folder = order["folder"]
    live = LiveIndex.open(folder)
    report("done", step="open")
    live.upsert(items_of([f"new-{place}" for place in range(20)], 1))
    report("done", step="upsert")
    live.delete(["base-3", "new-4"])
    report("done", step="delete")
    live.compact()
    live.snapshot_to("one")
    report("done", step="snapshot")
    live.delete(["new-5"])
    report("done", step="after")
    live.compact()
    live.close()
    LiveIndex.restore(folder, "one")
    report("done", step="restore")


def _kill_before(count: int) -> None:
    done = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return step

    for name in ("fsync", "replace", "rename", "link", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


class Nursery:
    """The parent's end: starts children and hears what they report until they end."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        code = "from tests.live_kill import serve; serve()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]
        assert self._heard()["what"] == "ready"

    def _heard(self) -> dict[str, Any]:
        return json.loads(self.process.stdout.readline())

    def run(self, after: str = "forked", delay: float | None = None, **order: Any) -> Iterator[dict[str, Any]]:
        """What a child reports; it is killed `delay` seconds after it said so. The last line has its `status`."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        killer = threading.Timer(0, lambda: None)
        try:
            while True:
                heard = self._heard()
                if heard["what"] == "forked":
                    child = heard["pid"]
                if heard["what"] == after and delay is not None:
                    killer = threading.Timer(delay, os.kill, (child, signal.SIGKILL))
                    killer.start()
                if heard["what"] == "failed":
                    raise AssertionError(heard["error"])
                yield heard
                if heard["what"] == "ended":
                    return
        finally:
            killer.cancel()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
