"""The database under a live index: its settings, transactions, checksums and the words for its errors."""

import errno
import sqlite3

import numpy as np
import pytest

from repkit.service.acknowledged import NAME, read_acknowledged, write_acknowledged
from repkit.service.changes import Delete, Update, Upsert, apply, insert_items, upsert_of
from repkit.service.items import Item, conformed, table_of, widened
from repkit.service.journal import (
    connect,
    create,
    finish,
    open_database,
    read_meta,
    set_meta,
    sqlite_errors,
    transaction,
)
from repkit.service.rows import living, stored


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "live.db"
    database = create(path)
    insert_items(database, [(1, "a", '{"n":1}', np.ones(2, np.float32), None)], born=0)
    finish(database, path, {"sequence": 0, "dimension": 2})
    return path


@pytest.fixture
def database(path):
    opened = open_database(path)
    yield opened
    opened.close()


def setting(database: sqlite3.Connection, name: str) -> object:
    return database.execute(f"PRAGMA {name}").fetchone()[0]


def test_what_is_committed_is_synced_and_readers_cannot_write(path, database):
    assert (setting(database, "journal_mode"), setting(database, "synchronous")) == ("wal", 2)
    reader = connect(path)
    assert read_meta(reader)["format"] == "repkit-live"
    with pytest.raises(OSError) as refused, sqlite_errors(path):
        reader.execute("DELETE FROM items")
    assert refused.value.errno == errno.EROFS
    reader.close()


def test_a_transaction_that_fails_leaves_nothing(path, database):
    with pytest.raises(ZeroDivisionError), transaction(database, path):
        set_meta(database, "sequence", 7)
        raise ZeroDivisionError
    assert read_meta(database)["sequence"] == 0
    with transaction(database, path):
        set_meta(database, "sequence", 8)
    assert read_meta(database)["sequence"] == 8


def test_a_full_database_is_no_space_left_and_the_transaction_is_gone(path, database):
    pages = setting(database, "page_count")
    database.execute(f"PRAGMA max_page_count = {pages}")
    change = upsert_of([Item(f"x{n}", np.ones(2)) for n in range(2000)], 2, "ip", None)
    with pytest.raises(OSError) as full, transaction(database, path):
        apply(database, change, 0, {})
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(path))
    assert not database.in_transaction
    assert [rows.ids for rows in living(database, path, 0, 99, 2)] == [["a"]]


def test_each_change_is_a_new_row_and_the_old_one_dies(path, database):
    with transaction(database, path):
        first = apply(
            database, upsert_of([Item("a", np.array([3, 4])), Item("b", np.array([1, 0]))], 2, "cosine", None), 0, {}
        )
        second = apply(database, Update("b", {"n": 2, "gone": None}), first.version, first.columns)
        third = apply(database, Delete(["a", "c"]), second.version, second.columns)
    assert [one.version for one in (first, second, third)] == [1, 2, 3]
    assert [one.died for one in (first, second, third)] == [[1], [3], [2]]
    assert second.columns == {"n": "integer"}
    rows = database.execute("SELECT key, id, born, died FROM items ORDER BY key").fetchall()
    assert rows == [(1, "a", 0, 1), (2, "a", 1, 3), (3, "b", 1, 2), (4, "b", 2, None)]
    found = stored(database, path, "b", 2)
    assert (found.metadata, found.vector.tolist(), found.version) == ({"n": 2}, [1, 0], 2)
    assert np.allclose(first.rows.vectors, [[0.6, 0.8], [1, 0]])


def test_keys_are_never_used_again(path, database):
    with transaction(database, path):
        apply(database, Delete(["a"]), 0, {})
        database.execute("DELETE FROM items")
        added = apply(database, upsert_of([Item("b", np.array([1, 0]))], 2, "ip", None), 1, {})
    assert added.rows.keys.tolist() == [2]


def test_requests_are_remembered_for_ten_thousand_changes(path, database):
    def ask(version: int, key: str, value: int) -> int:
        change = upsert_of([Item("x", np.array([value, 0]))], 2, "ip", key)
        return apply(database, change, version, {}).version

    with transaction(database, path):
        assert ask(0, "k", 1) == 1
        assert ask(5, "k", 1) == 1
        assert ask(10_000, "other", 1) == 10_001
        assert ask(10_000, "k", 1) == 1
        assert ask(10_001, "another", 1) == 10_002
        assert ask(10_002, "k", 2) == 10_003  # forgotten


def test_digests_tell_requests_apart():
    items = [
        Item("a", np.array([1, 0]), {"n": 1}),
        Item("b", np.array([1, 0])),
        Item("a", np.array([1, 0])),
        Item("a", np.array([0, 1]), {"n": 1}),
    ]
    changes = [upsert_of([item], 2, "ip", "k") for item in [*items, Item("a", np.array([1, 0]), {"n": 1}, b"picture")]]
    assert all(isinstance(change, Upsert) for change in changes)
    assert len({change.digest() for change in changes}) == len(changes)
    assert changes[0].digest() == upsert_of([items[0]], 2, "ip", "k").digest()


def test_columns_widen_from_integers_to_numbers_only():
    columns = widened({}, {"a": 1, "b": "x", "c": True})
    assert columns == {"a": "integer", "b": "string", "c": "boolean"}
    assert widened(columns, {"a": 0.5})["a"] == "number"
    assert widened({"a": "number"}, {"a": 1})["a"] == "number"
    for wrong in ({"a": "1"}, {"a": True}, {"b": 1}, {"c": 1}):
        with pytest.raises(ValueError, match="holds values of type"):
            widened(columns, wrong)
    table = conformed(table_of(["i", "j"], [{"a": 1}, {}], {"a": "integer"}), {"a": "number", "d": "string"})
    assert table.to_pydict() == {"id": ["i", "j"], "a": [1.0, None], "d": [None, None]}


def test_the_acknowledged_version_survives_and_nonsense_is_passed_over(tmp_path, caplog):
    path = tmp_path / NAME
    assert read_acknowledged(path) == 0
    with open(path, "w+b") as file:
        for version in (1, 12_345, 7):
            write_acknowledged(file.fileno(), version)
    assert read_acknowledged(path) == 7
    for content in (b"", b"12 34", path.read_bytes().replace(b"7 ", b"9 "), b"\xff\xfe"):
        path.write_bytes(content)
        assert read_acknowledged(path) == 0
    assert "cannot be read" in caplog.text
