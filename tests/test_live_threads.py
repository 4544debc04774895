"""Readers, writers and compaction at once: each answer is that of one state, no older than what was acknowledged."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest

from repkit.service.committing import Waiting
from repkit.service.items import Answer
from repkit.service.live import LiveIndex
from tests.live_cases import DIMENSION, Shadow, assert_hits, assert_same, items_of, vector_of, write_base

READERS, WRITERS = 3, 2
CHECKED = 300  # answers looked at afterwards, spread over the run


class Run:
    """What the threads saw: changes by version, and answers with the version that was acknowledged before each."""

    def __init__(self, live: LiveIndex, seconds: float) -> None:
        self.live, self.until = live, time.monotonic() + seconds
        self.changes: dict[int, tuple[str, list[str], int]] = {}
        self.answers: list[tuple[np.ndarray, str | None, int, Answer]] = []
        self.latencies: list[float] = []
        self.failed: list[BaseException] = []
        self.acknowledged = 0

    def go(self) -> None:
        work: list[Callable[[], None]] = [self.compact]
        work += [partial(self.write, number) for number in range(WRITERS)]
        work += [partial(self.read, number) for number in range(READERS)]
        threads = [threading.Thread(target=self.guarded, args=(one,)) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.failed.append(error)

    def running(self) -> bool:
        return time.monotonic() < self.until and not self.failed

    def write(self, number: int) -> None:
        chance, stamp = random.Random(number), number
        while self.running():
            stamp += WRITERS
            ids = sorted({f"w{number}-{chance.randrange(80)}" for _ in range(chance.randrange(1, 6))})
            kind = chance.choice(["upsert", "upsert", "delete"])
            start = time.perf_counter()
            if kind == "upsert":
                version = self.live.upsert(items_of(ids, stamp))
                self.latencies.append(time.perf_counter() - start)
                hit = self.live.search(vector_of(stamp, 0)[None], 1).hits[0][0]
                assert hit.id == ids[0] and hit.metadata["stamp"] == stamp  # at once, without a wait
            else:
                version, count = self.live.delete(ids)
                if count == 0:
                    continue
            self.changes[version] = kind, ids, stamp
            self.acknowledged = max(self.acknowledged, version)

    def read(self, number: int) -> None:
        chance, seen = np.random.default_rng(number), 0
        while self.running():
            query = chance.normal(size=DIMENSION).astype(np.float32)
            label = [None, "bag"][int(chance.integers(2))]
            before = self.acknowledged
            answer = self.live.search(query[None], 5, where=None if label is None else {"label": label})
            assert answer.version >= max(before, seen)
            seen = answer.version
            self.answers.append((query, label, before, answer))
            assert self.live.get("base-0") is not None

    def compact(self) -> None:
        while self.running():
            self.live.compact()
            time.sleep(0.02)


def check(run: Run, shadow: Shadow) -> int:
    """Replay the changes, and compare answers with brute force over the state of their version."""
    step = max(1, len(run.answers) // CHECKED)
    waiting = sorted(run.answers[::step], key=lambda one: one[3].version)
    checked = 0
    for version in range(max(run.changes) + 1):
        if version:
            kind, ids, stamp = run.changes[version]
            if kind == "upsert":
                shadow.upsert(ids, stamp)
            else:
                shadow.delete(ids)
        while checked < len(waiting) and waiting[checked][3].version == version:
            query, label, _, answer = waiting[checked]
            assert_hits(answer.hits[0], shadow.nearest(query, 5, label))
            checked += 1
    return checked


def together(folder, seconds: float, note: Callable[[str, object], None]) -> None:
    shadow = write_base(folder, 200)
    with LiveIndex.open(folder, flush_rows=50) as live:
        run = Run(live, seconds)
        run.go()
        assert not run.failed, run.failed
        assert check(run, shadow) >= min(CHECKED, len(run.answers))
        assert len(run.answers) > 20 and len(run.changes) > 20
        assert_same(live, shadow)
        note("writes", len(run.changes))
        note("searches", len(run.answers))
        note("write_ms_median", 1000 * float(np.median(run.latencies)))
    with LiveIndex.open(folder) as live:
        assert_same(live, shadow)


def test_no_answer_is_torn_in_three_seconds(tmp_path, record_property):
    together(tmp_path / "index", 3, record_property)


@pytest.mark.slow
def test_no_answer_is_torn_in_a_minute(tmp_path, record_property):
    together(tmp_path / "index", 60, record_property)


def test_writers_that_wait_together_share_a_commit(tmp_path, monkeypatch):
    write_base(tmp_path / "index")
    with LiveIndex.open(tmp_path / "index") as live:
        groups: list[int] = []
        real = live._store.change._commit
        versions: list[int] = []

        def commit(group: Sequence[Waiting]) -> None:
            groups.append(len(group))
            real(group)

        monkeypatch.setattr(live._store.change, "_commit", commit)

        def write(number: int) -> None:
            for stamp in range(10):
                versions.append(live.upsert(items_of([f"w{number}-{stamp}"], stamp + 1)))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        with live._store.change.writing:  # all of them wait
            for thread in threads:
                thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        assert sorted(versions) == list(range(1, 81))
        assert groups[0] == 8 and sum(groups) == 80
        assert len(live) == 110


def test_a_bad_change_does_not_take_its_group_with_it(tmp_path):
    write_base(tmp_path / "index")
    with LiveIndex.open(tmp_path / "index") as live:
        told: list[BaseException | None] = []

        def attempt(call: Callable[[], object]) -> None:
            try:
                call()
                told.append(None)
            except (KeyError, ValueError) as error:
                told.append(error)

        calls = [
            lambda: live.upsert(items_of(["a"], 1)),
            lambda: live.update("never", {"label": "bag"}),
            lambda: live.update("base-1", {"stamp": "text"}),
            lambda: live.upsert(items_of(["b"], 2)),
        ]
        threads = [threading.Thread(target=attempt, args=(call,)) for call in calls]
        with live._store.change.writing:
            for thread in threads:
                thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join()
        assert sorted(type(one).__name__ for one in told) == ["KeyError", "NoneType", "NoneType", "ValueError"]
        assert live.get("a") is not None and live.get("b") is not None and len(live) == 32
        assert live.get("base-1").metadata["stamp"] == 0
