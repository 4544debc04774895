from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from repkit.schedule import Schedule
from repkit.zeroshot.errortable import ErrorTable, join, replay
from repkit.zeroshot.levels import levels_at, strata
from repkit.zeroshot.racing import Racing
from repkit.zeroshot.strategies import Uniform

WEIGHTS = np.ones(16)


@pytest.fixture
def table(rng):
    errors = rng.gamma(3, size=(5, 4, 16, 3)) + 4 * np.arange(4)[:, None, None]
    return ErrorTable(
        ids=("z", "a", "m", "b", "y"),
        classes=("cat", 7, None),
        conditions=("a cat", "the cat", 7, None),
        owner=np.array([0, 0, 1, 2]),
        levels=levels_at(Schedule.flow(3.0), strata(16), "shifted"),
        errors=errors.astype(np.float32).astype(np.float64),
        decided=np.array([True, False, True, True, False]),
        info={"model": "toy", "seed": 3},
    )


def assert_same(found, expected):
    for name in ("ids", "classes", "conditions", "info"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("owner", "errors", "decided"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name, value in vars(expected.levels).items():
        np.testing.assert_array_equal(getattr(found.levels, name), value)


def test_what_is_written_is_read(table, tmp_path):
    table.write(tmp_path / "errors.parquet")
    assert_same(ErrorTable.read(tmp_path / "errors.parquet"), table)


def test_gaps_are_written_and_read(table, rng, tmp_path):
    table.errors[rng.random((5, 4, 16)) < 0.5] = np.nan
    table.errors[:, 0] = table.errors[2] = np.nan  # a prompt and an image that nothing was asked of
    table.write(tmp_path / "errors.parquet")
    read = ErrorTable.read(tmp_path / "errors.parquet")
    assert_same(read, table)
    assert read.evaluations.tolist() == (~np.isnan(table.errors[..., 0])).sum((1, 2)).tolist()
    assert read.evaluations[2] == 0


def test_a_file_is_a_plain_table(table, tmp_path):
    table.write(tmp_path / "errors.parquet")
    rows = pq.read_table(tmp_path / "errors.parquet").to_pylist()
    assert len(rows) == 5 * 4 * 16
    row = rows[(1 * 4 + 2) * 16 + 9]
    assert (row["image"], row["class"], row["prompt"], row["level"], row["draw"]) == ("a", "7", "7", 9, 0)
    assert row["time"] == table.levels.t[9]
    assert [row["l2"], row["l1"], row["huber"]] == table.errors[1, 2, 9].tolist()


@pytest.mark.parametrize(
    ("twice", "message"),
    [
        ({"ids": ("z", "a", "z", "b", "y")}, "'z' names two"),
        ({"conditions": ("7", "the cat", 7, None)}, "'7' names two"),
    ],
)
def test_names_that_a_file_cannot_tell_apart_are_refused(table, tmp_path, twice, message):
    with pytest.raises(ValueError, match=message):
        replace(table, **twice).write(tmp_path / "errors.parquet")


def test_other_files_are_told(table, tmp_path):
    text, plain, future = (tmp_path / name for name in ("text", "plain.parquet", "future.parquet"))
    text.write_text("no table")
    table.write(future)
    rows = pq.read_table(future)
    pq.write_table(rows.replace_schema_metadata({}), plain)
    pq.write_table(rows.replace_schema_metadata({"repkit": '{"format": 99}'}), future)
    for path in (text, plain):
        with pytest.raises(ValueError, match="is no table of errors; repkit classify --errors FILE writes one"):
            ErrorTable.read(path)
    with pytest.raises(ValueError, match="in format 99, and this repkit reads 1"):
        ErrorTable.read(future)


def test_some_images_of_a_table(table):
    for rows in (slice(1, 3), [1, 2], np.array([1, 2]), np.array([False, True, True, False, False])):
        part = table[rows]
        assert len(part) == 2 and part.ids == ("a", "m") and part.decided.tolist() == [False, True]
        np.testing.assert_array_equal(part.errors, table.errors[1:3])


def test_parts_are_joined(table):
    assert_same(join([table[:2], table[2:4], table[4:]]), table)
    assert_same(join([table]), table)


def test_other_tables_are_not_joined(table):
    for other in (
        replace(table, classes=("cat", 7, 8)),
        replace(table, conditions=("a cat", "one cat", 7, None)),
        replace(table, owner=np.array([0, 1, 1, 2])),
        replace(table, levels=levels_at(Schedule.flow(), strata(16))),
        replace(table, info={"model": "toy", "seed": 4}),
    ):
        with pytest.raises(ValueError, match="only tables of one run can be joined"):
            join([table, other])
    with pytest.raises(ValueError, match="no tables given"):
        join([])


def test_replay_of_everything_is_the_table(table):
    again = replay(table, Uniform(16), WEIGHTS)
    np.testing.assert_array_equal(again.errors, table.errors)
    assert again.decided.all()


def test_replay_keeps_what_a_strategy_looked_at(table, tmp_path):
    before = table.errors.copy()
    raced = replay(table, Racing(max_evaluations=16), WEIGHTS)
    seen = ~np.isnan(raced.errors)
    np.testing.assert_array_equal(raced.errors[seen], table.errors[seen])
    assert (seen.sum((1, 2, 3)) < 4 * 16 * 3).all() and seen.any((2, 3)).all()
    np.testing.assert_array_equal(table.errors, before)
    raced.write(tmp_path / "raced.parquet")
    assert_same(ErrorTable.read(tmp_path / "raced.parquet"), raced)


def test_replay_of_candidates_looks_at_no_others(table):
    rows = [np.array([row % 4, 3]) if row % 4 != 3 else np.array([0, 3]) for row in range(5)]
    kept = replay(table, Uniform(16), WEIGHTS, candidates=rows)
    for row, chosen in enumerate(rows):
        assert np.nonzero(~np.isnan(kept.errors[row, :, 0, 0]))[0].tolist() == chosen.tolist()


def test_replay_of_what_is_not_there_is_told(table):
    with pytest.raises(ValueError, match="8 evaluations a class on a table of 16"):
        replay(table, Uniform(8), WEIGHTS)
    table.errors[3, 1, 5] = np.nan
    with pytest.raises(ValueError, match="no error for b where the strategy looks"):
        replay(table, Uniform(16), WEIGHTS)


def test_antithetic_noise_counts_twice(table):
    twice = replace(table, info={"antithetic": True})
    assert twice.evaluations.tolist() == [2 * 4 * 16] * 5
