import pytest

from harmony_core.engine.inference.blocks import PagePool, pages_for


def test_pages_for_counts_a_begun_page_as_a_page() -> None:
    assert [pages_for(tokens, 16) for tokens in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_a_reservation_is_kept_from_others_and_a_page_never_has_two_holders() -> None:
    pool = PagePool(4)
    pool.reserve(3)
    assert pool.available == 1
    assert not pool.can_reserve(2)
    pages = [pool.take() for _ in range(3)]
    pool.reserve(1)
    pages.append(pool.take())
    assert sorted(pages) == [0, 1, 2, 3]
    assert pool.available == 0
    pool.give_back(pages, 0)
    assert pool.is_empty and pool.available == 4


def test_pages_that_were_used_are_used_again_before_new_ones_are_touched() -> None:
    pool = PagePool(1000)
    for _ in range(50):
        pool.reserve(10)
        pages = [pool.take() for _ in range(5)]
        pool.give_back(pages, 5)
    assert pool.touched == 5
    assert pool.is_empty


def test_misuse_is_noticed() -> None:
    pool = PagePool(2)
    with pytest.raises(AssertionError):
        pool.take()
    with pytest.raises(AssertionError):
        pool.reserve(3)
    pool.reserve(1)
    page = pool.take()
    pool.give_back([page], 0)
    with pytest.raises(KeyError):
        pool.give_back([page], 0)
    with pytest.raises(AssertionError):
        pool.give_back([], 1)
