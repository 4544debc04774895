import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repkit import where as filters
from repkit.where import MOST_CHARACTERS, MOST_COLUMNS, MOST_VALUES, Masks, check_where, column_types, mask

LABELS = ["bag", "coat", None, "bag", "shoe", ""]
WIDTHS = [64, 32, 64, None, -5, 2**53 + 1]
SCORES = [0.5, None, float("nan"), 2.0, -1.0, float("inf")]
GOOD = [True, False, None, True, False, True]


@pytest.fixture(scope="module")
def items():
    return pa.table(
        {
            "label": pa.chunked_array([LABELS[:2], LABELS[2:]], pa.string()),
            "width": pa.array(WIDTHS, pa.int64()),
            "score": pa.array(SCORES, pa.float32()),
            "good": GOOD,
            "kind": pa.array(["a", "b", "a", None, "b", "a"]).dictionary_encode(),
            "nothing": pa.nulls(6),
            "small": pa.array([1, 2, 3, 4, 5, 6], pa.uint8()),
            "boxes": [[1], [2], [3], [4], [5], [6]],
        }
    )


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"label": "bag"}, [0, 3]),
        ({"label": ""}, [5]),
        ({"label": None}, [2]),
        ({"label": ["bag", "shoe"]}, [0, 3, 4]),
        ({"label": ["bag", None]}, [0, 2, 3]),
        ({"label": []}, []),
        ({"label": {"ne": "bag"}}, [1, 2, 4, 5]),
        ({"label": {"not": None}}, [0, 1, 3, 4, 5]),
        ({"label": {"not": ["bag", None]}}, [1, 4, 5]),
        ({"label": {"gte": "c"}}, [1, 4]),
        ({"width": 64}, [0, 2]),
        ({"width": 64.0}, [0, 2]),
        ({"width": 64.5}, []),
        ({"width": {"gt": 31.5}}, [0, 1, 2, 5]),
        ({"width": {"gte": 32, "lt": 65}}, [0, 1, 2]),
        ({"width": 2**53 + 1}, [5]),
        ({"width": {"gt": 2**53}}, [5]),
        ({"width": {"lte": -5}}, [4]),
        ({"score": 0.5}, [0]),
        ({"score": {"gt": 0}}, [0, 3, 5]),
        ({"score": 2}, [3]),
        ({"score": {"lt": 2**53 + 1}}, [0, 3, 4]),
        ({"score": [2**63 + 1, 2]}, [3]),
        ({"score": {"gt": -1.7e308, "lt": 1e300}}, [0, 3, 4]),
        ({"width": -(2**63)}, []),
        ({"good": True}, [0, 3, 5]),
        ({"good": {"ne": True}}, [1, 2, 4]),
        ({"kind": "a"}, [0, 2, 5]),
        ({"nothing": None}, [0, 1, 2, 3, 4, 5]),
        ({"nothing": "x"}, []),
        ({"small": {"gt": 3, "not": [5, 6]}}, [3]),
        ({"small": 1000}, []),
        ({"label": "bag", "width": 64}, [0]),
        ({"label": "bag", "good": True, "width": None}, [3]),
        ({"label": "'; DROP TABLE items; --"}, []),
    ],
)
def test_the_rows_of_which_every_condition_holds(items, where, rows):
    found = mask(items, where)
    assert found.dtype == bool and np.flatnonzero(found).tolist() == rows


VALUES = st.one_of(st.none(), st.integers(-3, 3))
CONDITIONS = st.one_of(
    VALUES,
    st.lists(VALUES, max_size=3),
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), st.integers(-3, 3) | st.floats(-3, 3), max_size=2),
    st.dictionaries(st.sampled_from(["ne", "not"]), VALUES | st.lists(VALUES, max_size=3), max_size=2),
)


def holds(value, condition):
    if isinstance(condition, list):
        return value in condition
    if not isinstance(condition, dict):
        return value == condition
    orders = {
        "gt": lambda a, b: a is not None and a > b,
        "gte": lambda a, b: a is not None and a >= b,
        "lt": lambda a, b: a is not None and a < b,
        "lte": lambda a, b: a is not None and a <= b,
        "ne": lambda a, b: not holds(a, b),
        "not": lambda a, b: not holds(a, b),
    }
    return all(orders[operator](value, other) for operator, other in condition.items())


@given(st.lists(VALUES, max_size=8), CONDITIONS)
def test_conditions_mean_what_they_do_in_python(values, condition):
    found = mask(pa.table({"x": pa.array(values, pa.int32())}), {"x": condition})
    assert found.tolist() == [holds(value, condition) for value in values]


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_both_zeros_are_one_number(zero):
    table = pa.table({"x": [0.0, -0.0, 1.0, None]})
    assert mask(table, {"x": zero}).tolist() == mask(table, {"x": [zero, 2.0]}).tolist() == [True, True, False, False]
    assert mask(table, {"x": {"ne": zero}}).tolist() == [False, False, True, True]


def test_columns_that_can_be_filtered(items):
    expected = {"label": str, "width": int, "score": float, "good": bool, "kind": str, "nothing": str, "small": int}
    assert column_types(items) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"weight": 3}, "no column 'weight' to filter by; have good, kind, label"),
        ({"boxes": [1]}, "no column 'boxes'"),
        ({"label": {"like": "b%"}}, "no operator 'like' .on label.; have gt, gte, lt, lte, ne, not"),
        ({"label": {3: "b"}}, "no operator 3"),
        ({"label": 3}, "label holds str and is compared with 3, a int"),
        ({"width": "64"}, "width holds int and is compared with '64', a str"),
        ({"width": True}, "width holds int and is compared with True, a bool"),
        ({"good": 1}, "good holds bool"),
        ({"label": [["bag"]]}, "compared with .'bag'., a list"),
        ({"label": {"ne": {"ne": "bag"}}}, "a dict"),
        ({"label": {"gt": None}}, "gt needs one number or text, not None"),
        ({"width": {"lt": [1]}}, "lt needs one number or text"),
        ({"good": {"gt": False}}, "good holds bool; gt needs"),
        ({"score": float("nan")}, "give a finite number"),
        ({"score": {"lt": float("inf")}}, "give a finite number"),
        ({"width": 10**30}, "within 64 bits"),
        ({"width": {"lt": 1e300}}, "within 64 bits"),
        ({"score": 10**400}, "give a finite number"),
        ({"label": "x" * (MOST_CHARACTERS + 1)}, "a text of 1001 characters"),
        ({"label": "\ud800"}, "not Unicode"),
        ({"label": ["a"] * (MOST_VALUES + 1)}, "1001 values for label"),
        ({str(number): 1 for number in range(MOST_COLUMNS + 1)}, "where has 33 columns"),
    ],
)
def test_what_is_no_filter_is_told(items, where, message):
    with pytest.raises(ValueError, match=message) as told:
        mask(items, where)
    assert len(str(told.value)) < 300
    with pytest.raises(ValueError):
        check_where(where, column_types(items))


def test_a_table_without_columns_says_so():
    with pytest.raises(ValueError, match="no column 'x' to filter by; have none"):
        check_where({"x": 1}, {})


def test_text_is_no_filter():
    with pytest.raises(ValueError, match="where is a str; give a mapping"):
        check_where("label = 'bag'", {"label": str})


def test_masks_of_late_are_kept_and_right(items):
    masks = Masks(items)
    asked = [
        {"label": "bag"},
        {"label": ["bag"]},
        {"label": {"ne": "bag"}},
        {"label": {"ne": ["bag", None]}},
        {"label": None},
        {"width": {"gte": 32}},
        {"width": {"gt": 32}},
        {"width": {"gte": 32, "lt": 64}},
        {"good": True},
        {"good": True, "label": "bag"},
        {},
    ]
    for _ in range(2):
        for where in asked:
            np.testing.assert_array_equal(masks(where), mask(items, where))
    assert masks({"label": "bag"}) is masks({"label": "bag"})
    with pytest.raises(ValueError, match="read-only"):
        masks({"label": "bag"})[0] = False
    with pytest.raises(ValueError, match="no column 'x'"):
        masks({"x": 1})


@pytest.mark.parametrize(("name", "most"), [("_MOST_MASKS", 3), ("_MOST_BYTES", 3 * 6)])
def test_only_so_many_masks_are_kept(items, monkeypatch, name, most):
    monkeypatch.setattr(filters, name, most)
    masks = Masks(items)
    first = masks({"width": 0})
    for width in (1, 2, 0, 3):
        masks({"width": width})
    assert masks({"width": 0}) is first  # asked for again not long ago
    for width in (4, 5, 6):
        masks({"width": width})
    assert masks({"width": 0}) is not first
