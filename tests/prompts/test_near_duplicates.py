"""Leaders and de-duplication: worked out by hand, against brute force, and one source after another."""

import numpy as np
import pytest
from fixtures.datasets import unit_rows
from fixtures.prompts import cosines, neighbourhoods, pairs_of

from kutils.prompts.near_duplicates import deduplicate, greedy_leaders


def test_leaders_by_hand():
    # 1 follows 0. 2 resembles 1 alone, a follower: it leads. 3 resembles both leaders, 2 more. 4 resembles nothing.
    pairs = pairs_of((0, 1, 0.8), (0, 3, 0.75), (1, 2, 0.9), (2, 3, 0.85), (3, 5, 0.7))
    assert greedy_leaders(6, pairs).tolist() == [0, 0, 2, 2, 4, 5]


def check_choice(leaders: np.ndarray, similar: np.ndarray, order: np.ndarray, num_kept: int) -> None:
    """No two chosen are similar; each other one resembles its leader, which was chosen and comes before it in order."""
    numbers = num_kept + np.arange(len(leaders))
    chosen = np.concatenate([np.arange(num_kept), numbers[leaders == numbers]])
    among = similar[np.ix_(chosen, chosen)]
    assert not among[num_kept:].any()
    place = np.concatenate([np.full(num_kept, -1), np.argsort(order)])
    for number, leader in zip(numbers, leaders, strict=True):
        if leader != number:
            assert leader in chosen and similar[number, leader] and place[leader] < place[number]


@pytest.fixture
def rows():
    return neighbourhoods(num_groups=40, group_size=4, noise=0.3)


@pytest.fixture
def similar(rows):
    similar = cosines(rows) >= 0.9
    np.fill_diagonal(similar, False)
    return similar


def test_dedup_keeps_one_of_each_neighbourhood(rows, similar):
    leaders = deduplicate(rows, 0.9)
    assert 40 <= (leaders == np.arange(160)).sum() < 100
    check_choice(leaders, similar, np.arange(160), num_kept=0)


def test_what_was_chosen_before_stays_and_adding_changes_nothing(rows, similar):
    whole = deduplicate(rows, 0.9)
    first = deduplicate(rows[:70], 0.9)
    assert np.array_equal(first, whole[:70])
    kept = np.flatnonzero(first == np.arange(70))
    second = deduplicate(rows[70:], 0.9, kept=rows[kept])
    numbers = np.concatenate([kept, np.arange(70, 160)])
    assert np.array_equal(numbers[second], whole[70:])
    check_choice(second, similar[np.ix_(numbers, numbers)], np.arange(90), num_kept=len(kept))
    assert (second < len(kept)).any()  # some resemble a prompt of the first


def test_priority_comes_before_the_order_of_rows(rows, similar):
    priority = np.arange(160) % 3
    leaders = deduplicate(rows, 0.9, priority=priority)
    order = np.argsort(priority, kind="stable")
    check_choice(leaders, similar, order, num_kept=0)
    assert not np.array_equal(leaders, deduplicate(rows, 0.9))
    place = np.argsort(order)
    assert np.array_equal(leaders, order[deduplicate(rows[order], 0.9)][place])
    kept = rows[:30]
    leaders = deduplicate(rows[30:], 0.9, kept=kept, priority=priority[30:])
    check_choice(leaders, similar, np.argsort(priority[30:], kind="stable"), num_kept=30)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_nothing_similar_is_left_out(count):
    assert deduplicate(unit_rows(count), 0.9).tolist() == list(range(count))
    assert deduplicate(unit_rows(count), 0.9, kept=unit_rows(2, seed=9)).tolist() == list(range(2, 2 + count))
