"""The live index against a dict and numpy: searches, changes, compaction, snapshots, and what is refused."""

import threading
import time

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repkit.indexfiles import DESCRIBED, write_index
from repkit.service import background
from repkit.service.items import Item
from repkit.service.live import LiveIndex
from tests.live_cases import DIMENSION, Shadow, assert_hits, assert_same, items_of, vector_of, write_base


@pytest.fixture
def shadow(tmp_path):
    return write_base(tmp_path / "index")


@pytest.fixture
def live(tmp_path, shadow):
    with LiveIndex.open(tmp_path / "index") as opened:
        yield opened


def both(live: LiveIndex, shadow: Shadow, stamp: int, ids: list[str]) -> None:
    live.upsert(items_of(ids, stamp))
    shadow.upsert(ids, stamp)


def test_the_first_opening_takes_over_what_was_built(tmp_path, shadow):
    told = []
    with LiveIndex.open(tmp_path / "index", progress=lambda *numbers: told.append(numbers)) as live:
        assert live.columns == {"label": "string", "stamp": "integer"}
        assert (live.version, live.dimension, live.metric) == (0, DIMENSION, "cosine")
        assert_same(live, shadow)
    assert told == [(0, 30), (30, 30)]


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_every_change_is_in_the_next_search_and_after_a_restart(tmp_path, metric):
    folder = tmp_path / "index"
    shadow = write_base(folder, metric=metric)
    for _ in range(2):
        with LiveIndex.open(folder) as live:
            assert_same(live, shadow)
            both(live, shadow, live.version + 1, ["base-1", "new-1", "new-2"])
            assert_same(live, shadow)
            live.update("new-1", {"label": None, "note": "spät"})
            shadow.update("new-1", {"label": None, "note": "spät"})
            live.delete(["base-4", "new-2", "never"])
            shadow.delete(["base-4", "new-2"])
            assert_same(live, shadow)
            live.compact()
            assert_same(live, shadow)
            both(live, shadow, live.version + 1, ["base-2", "new-9"])


def test_a_snapshot_goes_on_answering_from_its_state(live, shadow):
    before, then = live.snapshot(), shadow.copy()
    both(live, shadow, 1, [f"new-{place}" for place in range(2000)])  # the delta grows past its first arrays
    live.delete(["base-0"])
    shadow.delete(["base-0"])
    live.compact()
    query = vector_of(5, 5)
    assert_hits(before.search(query[None], 5).hits[0], then.nearest(query, 5))
    assert len(before) == 30
    assert_same(live, shadow)


def test_versions_count_changes_that_changed_anything(live):
    assert live.upsert(items_of(["a", "b"], 1)) == 1
    assert live.delete(["never"]) == (1, 0)
    assert live.upsert([]) == 1
    assert live.delete(["a", "b", "c"]) == (2, 2)
    assert live.version == live.search(vector_of(1, 1)[None], 1).version == 2


def test_filters_that_span_parts_and_widen_columns(live):
    live.compact()
    live.upsert([Item("half", vector_of(9, 0), {"stamp": 0.5, "fresh": True})])
    query = vector_of(9, 0)[None]
    assert live.columns == {"fresh": "boolean", "label": "string", "stamp": "number"}
    assert [hit.id for hit in live.search(query, 5, where={"stamp": {"gt": 0}}).hits[0]] == ["half"]
    assert live.count({"stamp": {"lte": 0.5}}) == 31
    assert live.count({"fresh": None}) == 30
    assert live.search(query, 5, where={"label": "no such"}).hits == [[]]
    assert live.search(query, 5, where={"id": ["half", "base-1"]}).scanned == 2
    with pytest.raises(ValueError, match="no column 'colour'.*label"):
        live.search(query, 5, where={"colour": "red"})
    with pytest.raises(ValueError, match="'fresh' holds values of type boolean"):
        live.upsert([Item("more", vector_of(9, 1), {"fresh": "yes"})])
    live.compact()
    assert live.count({"stamp": {"gt": 0}}) == 1


def test_a_filter_asked_again_sees_what_was_changed(live):
    live.compact()
    segment = live.snapshot().parts[0].source
    columns = {"stamp": "integer"}
    assert segment.mask({"stamp": 0}, columns) is segment.mask({"stamp": 0}, columns)  # kept
    assert live.count({"stamp": 0}) == live.count({"stamp": {"lt": 0.5}}) == 30 and live.count({"label": "bag"}) == 10
    name = live.list(None, 1, {"label": "bag"})[0].id
    live.update(name, {"label": "coat", "stamp": 7})
    live.delete([live.list(None, 1, {"label": "bag"})[0].id])
    assert live.count({"stamp": 0}) == 28 and live.count({"label": "bag"}) == 8 and live.count({"stamp": 7}) == 1
    live.update(name, {"stamp": 0.25})  # now a column of numbers
    assert live.count({"stamp": 0}) == 28 and live.count({"stamp": {"lt": 0.5}}) == 29 and live.count({"stamp": 7}) == 0


def test_integers_beyond_53_bits_fit_into_columns_of_numbers(live, tmp_path):
    vector, large = vector_of(5, 0), 2**53 + 1
    live.upsert([Item("a", vector, {"n": large}), Item("b", vector, {"m": 0.5})])
    assert live.count({"n": large}) == 1 and live.get("a").metadata == {"n": large}
    live.upsert([Item("c", vector, {"n": 0.5}), Item("d", vector, {"m": large})])  # both hold numbers now
    for _ in range(2):
        assert live.count({"n": {"gt": 1}}) == live.count({"m": {"gt": 1}}) == live.count({"m": 0.5}) == 1
        assert live.count({"label": "bag"}) == 10
        assert live.snapshot().values("m") == {0.5: 1, float(large): 1}
        live.compact()
    live.close()
    with LiveIndex.open(tmp_path / "index") as again:
        assert again.count({"n": {"gt": 1}}) == again.count({"m": float(large)}) == 1


def test_items_are_drawn_from_all_parts_and_no_others(live):
    live.upsert(items_of(["a", "b"], 1))
    live.delete(["base-3"])
    state = live.snapshot()
    assert {one.id for one in state.drawn(100)} == {one.id for one in live.list(limit=100)}
    assert len(drawn := state.drawn(5)) == len({one.id for one in drawn}) == 5
    assert all(live.get(one.id).metadata == one.metadata for one in drawn)
    assert {one.metadata["label"] for one in state.drawn(3, {"label": "boot"})} == {"boot"}
    assert state.drawn(3, {"label": "none"}) == []
    seen = {one.id for _ in range(60) for one in state.drawn(5)}
    assert seen >= {"a", "b", "base-0", "base-29"}  # each stays away with a chance of (26 / 31) ** 60, or 3e-5


def test_more_hits_than_items_and_ties_by_age(live):
    live.delete([f"base-{place}" for place in range(1, 30)])
    live.upsert([Item(name, vector_of(0, 0)) for name in ("z", "y")])
    answer = live.search(vector_of(0, 0)[None], 10)
    assert [hit.id for hit in answer.hits[0]] == ["base-0", "z", "y"]
    assert (answer.exact, answer.scanned) == (True, 3)
    live.delete(["base-0", "z", "y"])
    assert live.search(vector_of(0, 0)[None], 10).hits == [[]]
    live.compact()
    assert live.search(vector_of(0, 0)[None], 10).hits == [[]] and len(live) == 0


def test_the_dead_do_not_hide_the_living_behind_them(tmp_path):
    shadow = write_base(tmp_path / "index", 300)
    queries = np.stack([vector_of(9, 0), vector_of(9, 1)])
    with LiveIndex.open(tmp_path / "index") as live:
        near = [name for name, _, _ in shadow.nearest(queries[0], 50)]
        live.delete(near)
        shadow.delete(near)
        for k in (1, 5, 40, 300):
            for query, hits in zip(queries, live.search(queries, k).hits, strict=True):
                assert_hits(hits, shadow.nearest(query, k))


@pytest.mark.parametrize(
    ("item", "match"),
    [
        (Item("", vector_of(1, 1)), "id ''"),
        (Item("a\x00b", vector_of(1, 1)), "control"),
        (Item("x" * 513, vector_of(1, 1)), "512"),
        (Item("\ud800", vector_of(1, 1)), "id"),
        (Item("a", np.ones(3, np.float32)), r"shape \(3,\); give 8 numbers"),
        (Item("a", np.full(8, np.nan, np.float32)), "not finite"),
        (Item("a", np.full(8, 1e300)), "not finite"),
        (Item("a", vector_of(1, 1), {"id": "b"}), "other than 'id'"),
        (Item("a", vector_of(1, 1), {"": 1}), "column ''"),
        (Item("a", vector_of(1, 1), {"x": float("nan")}), "nan"),
        (Item("a", vector_of(1, 1), {"x": 2**63}), "64 bits"),
        (Item("a", vector_of(1, 1), {"x": [1]}), "list"),
        (Item("a", vector_of(1, 1), {"x": "\ud800"}), "UTF-8"),
        (Item("a", vector_of(1, 1), {"x": "y" * 70_000}), "65536"),
        (Item("a", vector_of(1, 1), {f"x{number}": 1 for number in range(300)}), "256"),
        (Item("a", vector_of(1, 1), {"stamp": "late"}), "'stamp' holds values of type integer"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_whole_batch(live, shadow, item, match):
    with pytest.raises(ValueError, match=match):
        live.upsert([Item("good", vector_of(1, 0)), item])
    assert live.version == 0
    assert_same(live, shadow)


def test_other_mistakes_are_told_in_one_line(live):
    with pytest.raises(ValueError, match="'a' is given twice"):
        live.upsert(items_of(["a", "a"], 1))
    with pytest.raises(KeyError):
        live.update("never", {"label": "bag"})
    with pytest.raises(ValueError, match="k=0"):
        live.search(vector_of(1, 1)[None], 0)
    with pytest.raises(ValueError, match=r"\[n 8\]"):
        live.search(np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        live.search(np.full((1, 8), np.inf, np.float32))


@pytest.mark.parametrize("name", ["'; DROP TABLE items; --", "../../etc/passwd", "%", "a\u202eb", "🥾", "id"])
def test_ids_are_only_text(live, shadow, tmp_path, name):
    both(live, shadow, 1, [name])
    assert live.get(name).metadata == shadow.items[name][1]
    assert live.list(limit=1000, where={"id": name})[0].id == name
    live.close()
    with LiveIndex.open(tmp_path / "index") as again:
        assert_same(again, shadow)
        assert again.delete([name]) == (2, 1)


def test_an_idempotency_key_counts_once(live, tmp_path):
    first = live.upsert(items_of(["a"], 1), idempotency_key="k")
    live.delete(["a"])
    assert live.upsert(items_of(["a"], 1), idempotency_key="k") == first
    assert live.get("a") is None
    with pytest.raises(ValueError, match="idempotency key 'k'"):
        live.upsert(items_of(["a"], 2), idempotency_key="k")
    live.close()
    with LiveIndex.open(tmp_path / "index") as again:
        assert again.upsert(items_of(["a"], 1), idempotency_key="k") == first
        assert again.get("a") is None


def test_pictures_stay_with_their_items(live, tmp_path):
    live.upsert([Item("a", vector_of(1, 1), {}, b"picture"), Item("b", vector_of(1, 2))])
    live.update("a", {"label": "boot"})
    assert (live.image("a"), live.image("b"), live.image("c")) == (b"picture", None, None)
    live.upsert([Item("a", vector_of(1, 3))])
    assert live.image("a") is None
    live.upsert([Item("a", vector_of(1, 3), {}, b"another")])
    live.compact()
    with live._store.reading() as database:
        assert database.execute("SELECT content FROM images").fetchall() == [(b"another",)]
    live.close()
    with LiveIndex.open(tmp_path / "index") as again:
        assert again.image("a") == b"another"


def test_lists_go_on_after_an_id_with_and_without_a_filter(live, shadow):
    both(live, shadow, 1, ["ä", "Z", "a"])
    for where in (None, {"label": "bag"}):
        wanted = [n for n, (_, m) in shadow.items.items() if where is None or m["label"] == "bag"]
        found, after = [], None
        while page := [one.id for one in live.list(after, 7, where)]:
            found, after = found + page, page[-1]
        assert found == sorted(wanted, key=str.encode)


def test_values_of_a_column_are_counted(live):
    live.delete(["base-0"])
    live.upsert(items_of(["new"], 2))
    assert live.snapshot().values("label") == {"bag": 9, "boot": 10, "coat": 11}
    assert live.snapshot().values("label", most=2) is None


def test_rows_that_died_are_gone_after_compaction(live):
    for stamp in range(1, 6):
        live.upsert(items_of([f"new-{place}" for place in range(50)], stamp))
    live.compact()
    with live._store.reading() as database:
        assert database.execute("SELECT count(*) FROM items").fetchone() == (80,)
    assert live.stats()["dead"] == 0
    assert len(list((live._store.live / "segments").iterdir())) == 1


def wait_until(condition) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_background_makes_segments_and_merges_them(tmp_path):
    shadow = write_base(tmp_path / "index", 300)
    with LiveIndex.open(tmp_path / "index", flush_rows=10) as live:
        for stamp in range(1, 15):
            both(live, shadow, stamp, [f"new-{stamp}-{place}" for place in range(12)])
            wait_until(lambda: live.stats()["delta"] == 0)
        wait_until(lambda: len(live.stats()["segments"]) <= 8)
        assert live.stats()["segments"][0]["rows"] == 300  # small ones are merged, the large one is left alone
        live.delete([f"base-{place}" for place in range(70)])
        shadow.delete([f"base-{place}" for place in range(70)])
        wait_until(lambda: live.stats()["dead"] == 0)
        assert_same(live, shadow)
    with LiveIndex.open(tmp_path / "index") as live:
        assert_same(live, shadow)


def test_snapshots_are_taken_listed_restored_and_removed(live, shadow, tmp_path):
    both(live, shadow, 1, ["a", "b"])
    taken = live.snapshot_to("first")
    assert (taken.name, taken.version, taken.count) == ("first", 1, 32)
    live.compact()
    later = shadow.copy()
    later.upsert(["c"], 2)
    live.upsert(items_of(["c"], 2))
    live.snapshot_to("second")
    assert [one.name for one in live.snapshots()] == ["first", "second"]
    with pytest.raises(FileExistsError):
        live.snapshot_to("first")
    for name in ("../up", "", "a/b", ".hidden", "x" * 65, "a.part"):
        with pytest.raises(ValueError, match="snapshot"):
            live.snapshot_to(name)
    LiveIndex.restore(tmp_path / "index", "first", tmp_path / "new")
    built = (tmp_path / "index" / "items.parquet").read_bytes()
    assert (tmp_path / "new" / "items.parquet").read_bytes() == built  # by which the files of items are found
    with LiveIndex.open(tmp_path / "new") as other:
        assert_same(other, shadow)
        assert other.described == live.described
        other.upsert(items_of(["d"], 3))
        other.compact()
    with pytest.raises(BlockingIOError, match="process"):
        LiveIndex.restore(tmp_path / "index", "first")
    with pytest.raises(FileExistsError):
        LiveIndex.restore(tmp_path / "index", "first", tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        LiveIndex.restore(tmp_path / "index", "third")
    live.close()
    for name, state in (("first", shadow), ("second", later), ("first", shadow)):
        LiveIndex.restore(tmp_path / "index", name)
        with LiveIndex.open(tmp_path / "index") as again:
            assert_same(again, state)
            both(again, state.copy(), 7, ["e"])
            assert len(again.snapshots()) == 2
    with LiveIndex.open(tmp_path / "index") as again:
        again.delete_snapshot("first")
        assert [one.name for one in again.snapshots()] == ["second"]
        with pytest.raises(FileNotFoundError):
            again.delete_snapshot("first")


def test_a_snapshot_taken_while_writing_is_one_state(live, shadow, tmp_path):
    stop, states = threading.Event(), {0: shadow.copy()}

    def write() -> None:
        stamp = 0
        while not stop.is_set():
            stamp += 1
            ids = [f"new-{(stamp * 7 + place) % 40}" for place in range(5)]
            version = live.upsert(items_of(ids, stamp))
            states[version] = states[version - 1].copy()
            states[version].upsert(ids, stamp)

    writer = threading.Thread(target=write)
    writer.start()
    taken = []
    for number in range(4):
        time.sleep(0.05)
        taken.append(live.snapshot_to(f"s{number}"))
        live.compact()
    stop.set()
    writer.join()
    assert taken[-1].version > taken[0].version > 0
    for one in taken:
        LiveIndex.restore(tmp_path / "index", one.name, tmp_path / one.name)
        with LiveIndex.open(tmp_path / one.name) as other:
            assert other.version == one.version
            assert_same(other, states[one.version])


def test_columns_of_a_built_index_become_filters(tmp_path, caplog):
    table = pa.table(
        {
            "id": ["a", "b", "c"],
            "path": ["/home/someone/a", "/home/someone/b", "/home/someone/c"],
            "label": pa.array(["x", None, "x"]).dictionary_encode(),
            "width": pa.array([1, 2, None], pa.int32()),
            "score": pa.array([0.5, float("nan"), 2.0], pa.float32()),
            "key": [True, False, None],
            "boxes": [[1, 2], [], [3]],
        }
    )
    index = faiss.IndexFlatL2(2)
    index.add(np.eye(3, 2, dtype=np.float32))
    described = dict.fromkeys(DESCRIBED) | {"metric": "l2", "kind": "flat", "key": "up.0@1", "pool": "mean"}
    write_index(tmp_path / "index", index, None, table, described)
    for _ in range(2):
        with LiveIndex.open(tmp_path / "index") as live:
            assert live.columns == {"key": "boolean", "label": "string", "score": "number", "width": "integer"}
            assert live.count({"label": "x"}) == 2 and live.count({"score": {"gte": 0}}) == 2
            assert live.get("b").metadata == {"width": 2, "key": False}
            assert live.described["key"] == "up.0@1"
            live.compact()
    assert caplog.text.count("left out: boxes") == 1


@settings(max_examples=8)
@given(st.data())
def test_any_sequence_of_changes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any") / "index"
    shadow, stamp = write_base(folder, 6), 0
    names = st.sampled_from([*(f"base-{place}" for place in range(6)), "x", "y", "z"])
    live = LiveIndex.open(folder, flush_rows=data.draw(st.sampled_from([2, 1000])))
    try:
        for kind in data.draw(st.lists(st.sampled_from("udpcrr"), max_size=12)):
            stamp += 1
            if kind == "u":
                both(live, shadow, stamp, data.draw(st.lists(names, unique=True, max_size=4)))
            elif kind == "d":
                gone = data.draw(st.lists(names, max_size=4))
                live.delete(gone)
                shadow.delete(gone)
            elif kind == "p" and shadow.items:
                name = data.draw(st.sampled_from(sorted(shadow.items)))
                live.update(name, {"stamp": -stamp})
                shadow.update(name, {"stamp": -stamp})
            elif kind == "c":
                live.compact()
            else:
                live.close()
                live = LiveIndex.open(folder)
            assert_same(live, shadow, stamp, queries=1)
    finally:
        live.close()


def test_a_compaction_that_fails_is_told_and_tried_again(tmp_path, shadow, monkeypatch):
    monkeypatch.setattr(background, "_RETRY", 0.05)
    failed = threading.Event()
    real = background.Store.rewrite

    def fail_once(store, chosen):
        if not failed.is_set():
            failed.set()
            raise OSError(28, "No space left on device", "somewhere")
        real(store, chosen)

    monkeypatch.setattr(background.Store, "rewrite", fail_once)
    with LiveIndex.open(tmp_path / "index", flush_rows=5) as live:
        both(live, shadow, 1, [f"new-{place}" for place in range(6)])
        wait_until(lambda: live.stats()["delta"] == 0)
        assert failed.is_set()
        assert_same(live, shadow)
