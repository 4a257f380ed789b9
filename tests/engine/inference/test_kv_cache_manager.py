import numpy as np
import pytest

from harmony_core.engine.inference.kv_cache_manager import ROOT, BlockPool, PrefixIndex, blocks_for


def tokens(*numbers: int) -> bytes:
    return np.array(numbers, dtype=np.int32).tobytes()


def test_pages_for_counts_a_begun_page_as_a_page() -> None:
    assert [blocks_for(count, 16) for count in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_a_page_has_one_holder_unless_it_is_shared_and_is_free_when_the_last_has_left() -> None:
    pool = BlockPool(4)
    pages = pool.take(3)
    assert sorted(pages) == [0, 1, 2] and pool.available == 1
    pool.share(pages[:2])
    pool.give_back(pages)
    assert pool.available == 2 and pool.available < pool.capacity
    assert sorted(pool.take(2)) == [2, 3]
    pool.give_back(pages[:2])
    pool.give_back(np.array([2, 3], dtype=np.int32))
    assert pool.available == pool.capacity and pool.available == 4


def test_pages_that_were_used_are_used_again_before_new_ones_are_touched() -> None:
    pool = BlockPool(1000)
    for _ in range(50):
        pool.give_back(pool.take(5))
    assert pool.touched == 5
    assert pool.available == pool.capacity


def test_misuse_is_noticed() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.take(3)
    page = pool.take(1)
    pool.give_back(page)
    with pytest.raises(AssertionError):
        pool.give_back(page)


def test_known_pages_keep_their_content_until_the_room_is_needed_the_oldest_last_page_going_first() -> None:
    pool = BlockPool(6, block_size=2)
    for first in (1, 5):
        pages = pool.take(2)
        node = pool.prefixes.add(ROOT, tokens(first, first), int(pages[0]))
        pool.prefixes.add(node, tokens(9, 9), int(pages[1]))
        pool.give_back(pages)
    assert pool.available == pool.capacity and len(pool.prefixes) == 4
    older, newer = tokens(1, 1, 9, 9), tokens(5, 5, 9, 9)
    pool.take(3)  # two new ones, and one that was known
    assert [len(pool.prefixes.match(prompt, 2)[0]) for prompt in (older, newer)] == [1, 2]
    found = np.array(pool.prefixes.match(newer, 2)[0], dtype=np.int32)
    assert pool.count_kept(found.tolist()) == 2
    pool.share(found)
    assert pool.available == 1
    pool.take(1)
    assert [len(pool.prefixes.match(prompt, 2)[0]) for prompt in (older, newer)] == [0, 2]


def test_forgotten_prefixes_leave_free_pages() -> None:
    pool = BlockPool(3, block_size=2)
    held, kept = pool.take(2)
    for page in (held, kept):
        pool.prefixes.add(ROOT, tokens(page, 1), int(page))
    pool.give_back(np.array([kept]))
    pool.forget_prefixes()
    assert pool.available == 2 and len(pool.prefixes) == 0
    pool.give_back(np.array([held]))
    assert pool.available == pool.capacity and len(set(pool.take(3).tolist())) == 3


def test_a_prefix_is_found_by_its_tokens_page_after_page() -> None:
    index = PrefixIndex(2)
    first = index.add(ROOT, tokens(1, 2), 10)
    second = index.add(first, tokens(3, 4), 11)
    other = index.add(first, tokens(5, 6), 12)
    assert len({first, second, other, ROOT}) == 4
    assert index.match(tokens(1, 2, 3, 4, 7), 2) == ([10, 11], second)
    assert index.match(tokens(1, 2, 3, 4, 7), 1) == ([10], first)
    assert index.match(tokens(1, 2, 5, 6), 2) == ([10, 12], other)
    assert index.match(tokens(1, 2, 4, 3), 2) == ([10], first)
    assert index.match(tokens(3, 4), 1) == ([], ROOT)


def test_a_second_page_with_the_same_content_is_not_known() -> None:
    index = PrefixIndex(2)
    node = index.add(ROOT, tokens(1, 2), 10)
    assert index.add(ROOT, tokens(1, 2), 11) == node
    assert 10 in index and 11 not in index


def test_what_is_behind_a_forgotten_page_is_not_found_though_its_tokens_come_back() -> None:
    index = PrefixIndex(2)
    first = index.add(ROOT, tokens(1, 2), 10)
    index.add(first, tokens(3, 4), 11)
    index.forget(10)
    again = index.add(ROOT, tokens(1, 2), 20)
    assert index.match(tokens(1, 2, 3, 4), 2) == ([20], again)
    assert index.add(again, tokens(3, 4), 11) != again and 11 in index, "its holder may name it once more"
    index.forget(11)
    assert index.add(again, tokens(3, 4), 21) not in (first, again)
    with pytest.raises(AssertionError, match="written again"):
        index.add(again, tokens(7, 7), 21)
