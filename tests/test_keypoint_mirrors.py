"""Which keypoints trade places in a mirror image: what any such table must obey, and pairs with keypoints missing."""

import pytest

from repkit.datasets.keypoint_mirrors import PAIRS, partner
from repkit.matching.flow import partners

ALL = [str(number) for number in range(30)]


def test_every_category_of_spair_is_there():
    assert len(PAIRS) == 18 and list(PAIRS) == sorted(PAIRS)


@pytest.mark.parametrize("category", PAIRS)
def test_who_trades_places_does_so_both_ways(category):
    found = partner(category, ALL)
    assert [found[other] for other in found] == list(range(30)) and found != list(range(30))
    pairs = [tuple(map(int, pair.split("-"))) for pair in PAIRS[category].split()]
    assert found == partners(30, pairs)  # which refuses a keypoint in two pairs
    assert pairs == sorted(pairs) and all(left < right for left, right in pairs)


def test_partners_are_places_in_the_list():
    # A cat's ears are 0 and 1 below, 2 and 3 on top, its eyes 4 and 5, and 8 is on its middle.
    assert partner("cat", ["8", "5", "0", "4", "3"]) == [0, 3, None, 1, None]
    assert partner("cat", []) == []


def test_wheels_of_a_car_trade_with_those_of_the_other_side():
    assert partner("car", ["11", "14", "21", "24"]) == [2, 3, 0, 1]


def test_another_category_is_refused():
    with pytest.raises(ValueError, match="no category 'sofa' in SPair-71k; have aeroplane, bicycle"):
        partner("sofa", ["0"])
