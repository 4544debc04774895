"""`repkit serve`, up to the moment at which it would listen."""

from pathlib import Path

import numpy as np
import pytest

from repkit.cli import serve as command
from repkit.retrieval import Index
from repkit.service.items import Item
from repkit.service.live import LiveIndex


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """20 items, of which a snapshot "then" was made, and one more that came later."""
    vectors = np.random.default_rng(0).normal(size=(21, 4)).astype(np.float32)
    Index.build(vectors[:20], kind="flat").save(tmp_path / "index")
    with LiveIndex.open(tmp_path / "index") as live:
        live.snapshot_to("then")
        live.upsert([Item("late", vectors[20])])
    return tmp_path / "index"


@pytest.fixture
def served(monkeypatch) -> list[int]:
    """How many items each service that was started had; none listens."""
    counts: list[int] = []

    def run(settings, ready, progress) -> None:
        with LiveIndex.open(settings.index) as live:
            counts.append(len(live))

    monkeypatch.setattr(command, "_imported", lambda: run)
    return counts


def test_serve_begins_where_it_ended_or_from_a_snapshot(repkit, index, served):
    assert repkit("serve", str(index))[0] == 0
    assert repkit("serve", str(index), "--restore", "then")[0] == 0
    assert served == [21, 20]


def test_an_unknown_snapshot_is_told_and_changes_nothing(repkit, index, served):
    told = repkit("serve", str(index), "--restore", "never")
    assert told[0] == 2 and "never" in told[2] and not served
    assert repkit("serve", str(index))[0] == 0
    assert served == [21]
