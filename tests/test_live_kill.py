"""kill -9 at any moment of a live index's life: every acknowledged change is there, and no half change."""

import os
import random
import signal
from itertools import product

import pytest

from repkit.service.live import LiveIndex
from tests.live_cases import Shadow, assert_same, write_base
from tests.live_kill import WRITERS, Nursery

NEW = [f"new-{place}" for place in range(20)]  # as tests.live_kill adds them


@pytest.fixture(scope="module")
def nursery():
    started = Nursery()
    yield started
    started.close()


def applied(shadow: Shadow, change: dict) -> Shadow:
    after = shadow.copy()
    if change["kind"] == "upsert":
        after.upsert(change["ids"], change["stamp"])
    elif change["kind"] == "update":
        after.update(change["ids"][0], {"stamp": change["stamp"], "label": None})
    elif change["kind"] == "delete":
        after.delete(change["ids"])
    return after


def mine(shadow: Shadow, writer: int) -> dict:
    return {name: one[1] for name, one in shadow.items.items() if name.startswith(f"w{writer}-")}


def possible(live: LiveIndex, shadow: Shadow, unsure: list[dict]) -> Shadow:
    """The shadow with those of the changes that were not acknowledged but are there, each wholly."""
    there = {one.id: one.metadata for one in live.list(limit=100_000)}
    for chosen in product((False, True), repeat=len(unsure)):
        state = shadow
        for change, happened in zip(unsure, chosen, strict=True):
            state = applied(state, change) if happened else state
        if there == {name: one[1] for name, one in state.items.items()}:
            return state
    raise AssertionError(f"neither with nor without {unsure}: {sorted(there)}")


def heard(nursery: Nursery, shadow: Shadow, **order) -> tuple[Shadow, list[dict], dict[str, dict], int, bool]:
    """Run a child until it is killed; acknowledged changes go into the shadow."""
    begun: dict[int, dict] = {}
    taken, last, opened = {}, order["stamp"], False
    for line in nursery.run(**order):
        opened |= line["what"] == "open"
        if line["what"] == "start":
            begun[line["writer"]] = line
        elif line["what"] == "done":
            change = begun.pop(line["writer"])
            last = max(last, change["stamp"])
            if change["kind"] == "snapshot":
                taken[f"snap-{change['stamp']}"] = {"writer": change["writer"], "items": mine(shadow, change["writer"])}
            shadow = applied(shadow, change)
        elif line["what"] == "ended":
            assert os.WIFSIGNALED(line["status"]) and os.WTERMSIG(line["status"]) == signal.SIGKILL
    unsure = [change for change in begun.values() if change["kind"] != "snapshot"]
    return shadow, unsure, taken, last + 10 * WRITERS, opened


def lives(nursery: Nursery, folder, restored, rounds: int, seed: int) -> int:
    """Change, kill and look, again and again, on one index; how many changes were acknowledged."""
    chance = random.Random(seed)
    shadow, stamp = write_base(folder), 0
    changes = 0
    for life in range(rounds):
        known = [sorted(mine(shadow, writer)) for writer in range(WRITERS)]
        early = life % 5 == 0  # while it is opened, and the first time while it is taken over
        when = {"after": "forked" if early else "open", "delay": chance.uniform(0, 0.1 if early else 0.4)}
        order = when | {"script": "changes", "folder": str(folder), "seed": seed + life, "stamp": stamp, "known": known}
        before = stamp
        shadow, unsure, taken, stamp, _ = heard(nursery, shadow, **order)
        changes += max(0, stamp - before - 10 * WRITERS)
        with LiveIndex.open(folder) as live:
            shadow = possible(live, shadow, unsure)
            assert_same(live, shadow, life)
            assert set(taken) <= {one.name for one in live.snapshots()}
        with LiveIndex.open(folder) as live:
            assert_same(live, shadow, life)
            for one in live.snapshots():
                if one.name not in taken:
                    live.delete_snapshot(one.name)
        for name, expected in list(taken.items())[:1]:
            LiveIndex.restore(folder, name, restored / f"{seed}-{life}")
            with LiveIndex.open(restored / f"{seed}-{life}") as live:
                prefix = f"w{expected['writer']}-"
                found = {one.id: one.metadata for one in live.list(limit=100_000) if one.id.startswith(prefix)}
                assert found == expected["items"]
    return changes


def test_killed_at_ten_random_moments(nursery, tmp_path):
    assert lives(nursery, tmp_path / "index", tmp_path, 10, seed=1) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_killed_at_two_hundred_random_moments(nursery, tmp_path, seed):
    assert lives(nursery, tmp_path / "index", tmp_path, 20, seed=seed) > 40


def walked(nursery: Nursery, folder, kill_at: int) -> bool:
    """Import, change, compact, snapshot, change and restore, until the n-th call that reaches the disk.

    Looks whether the index is in the state of the last step that was reported, or of the one after; False once there
    were fewer calls.
    """
    states = [write_base(folder)]
    for added, removed in [([], []), (NEW, []), ([], ["base-3", "new-4"]), ([], []), ([], ["new-5"])]:
        states.append(states[-1].copy())
        states[-1].upsert(added, 1)
        states[-1].delete(removed)
    states.append(states[4])  # restored
    lines = list(nursery.run(script="steps", folder=str(folder), kill_at=kill_at))
    done = sum(line["what"] == "done" for line in lines)
    for _ in range(2):
        with LiveIndex.open(folder) as live:
            possible = [state for state in states[done : done + 2] if len(state.items) == len(live)]
            assert possible, f"{len(live)} items after {done} steps"
            assert_same(live, possible[0])
            assert done < 4 or [one.name for one in live.snapshots()] == ["one"]
    return lines[-1]["status"] != 0


def test_killed_before_a_call_that_reaches_the_disk(nursery, tmp_path):
    for kill_at in [1, 3, 6, 8, 11, 14, 18, 22, 26, 31]:
        assert walked(nursery, tmp_path / f"index-{kill_at}", kill_at)


@pytest.mark.slow
def test_killed_before_each_call_that_reaches_the_disk(nursery, tmp_path):
    kills = 0
    while walked(nursery, tmp_path / f"index-{kills}", kills + 1):
        kills += 1
    assert kills > 30
