"""Pages: who holds them, whose content is found again, and which is given up first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fssa_runtime.engine.page_pool import Key, PagePool, extend_keys, page_keys


def take(pool: PagePool) -> int:
    page = pool.allocate()
    assert page is not None
    return page


def leave_idle(pool: PagePool, key: Key) -> int:
    """A page that nobody holds and whose content is known."""
    page = take(pool)
    pool.publish(page, key)
    pool.release(page)
    return page


def test_pages_are_handed_out_once_and_come_back() -> None:
    pool = PagePool(3, 4)
    pages = [take(pool) for _ in range(3)]
    assert sorted(pages) == [0, 1, 2]
    assert pool.allocate() is None
    assert pool.num_free == 0
    pool.release(pages[1])
    assert pool.num_free == 1
    assert take(pool) == pages[1]
    pool.check()


def test_a_page_is_free_when_the_last_holder_lets_go() -> None:
    pool = PagePool(1, 4)
    page = take(pool)
    assert not pool.is_shared(page)
    pool.retain(page)
    assert pool.is_shared(page)
    pool.release(page)
    assert not pool.is_shared(page)
    assert pool.allocate() is None
    pool.release(page)
    assert pool.allocate() == page


def test_what_nobody_holds_is_neither_released_nor_retained() -> None:
    pool = PagePool(2, 4)
    page = take(pool)
    pool.release(page)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(page)
    with pytest.raises(ValueError, match="holds nothing"):
        pool.retain(page)
    idle = leave_idle(pool, b"a")
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(idle)
    pool.check()


def test_content_idle_for_longest_goes_first() -> None:
    pool = PagePool(3, 4)
    pages = [take(pool) for _ in range(3)]
    for page, key in zip(pages, [b"a", b"b", b"c"], strict=True):
        pool.publish(page, key)
    for index in (1, 0, 2):
        pool.release(pages[index])
    # To be used again makes a page the youngest.
    assert pool.find([b"b"]) == [pages[1]]
    pool.release(pages[1])
    assert [take(pool) for _ in range(3)] == [pages[0], pages[2], pages[1]]
    assert pool.stats.evicted == 3
    assert pool.find([b"a"]) == pool.find([b"b"]) == pool.find([b"c"]) == []


def test_pages_without_content_are_used_before_content_is_given_up() -> None:
    pool = PagePool(2, 4)
    kept = leave_idle(pool, b"a")
    other = take(pool)
    pool.release(other)
    assert take(pool) == other
    assert pool.stats.evicted == 0
    assert pool.find([b"a"]) == [kept]


def test_find_holds_the_longest_known_beginning() -> None:
    pool = PagePool(4, 4)
    pages = [leave_idle(pool, key) for key in (b"a", b"b", b"d")]
    assert pool.find([b"a", b"b", b"c", b"d"]) == pages[:2]
    assert pool.num_free == 2
    assert pool.find([b"a"]) == pages[:1]  # while held too
    assert pool.is_shared(pages[0])
    assert not pool.is_shared(pages[1])
    assert pool.find([b"c", b"d"]) == []
    assert pool.find([]) == []
    pool.check()


def test_content_held_twice_is_known_once() -> None:
    pool = PagePool(2, 4)
    first, second = take(pool), take(pool)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.publish(first, b"b")  # a page keeps the key it has
    pool.release(second)
    assert pool.find([b"b"]) == []
    assert pool.find([b"a"]) == [first]
    assert take(pool) == second
    pool.check()


def test_forget_all() -> None:
    pool = PagePool(3, 4)
    held = take(pool)
    pool.publish(held, b"a")
    leave_idle(pool, b"b")
    pool.forget_all()
    assert pool.find([b"a"]) == pool.find([b"b"]) == []
    assert pool.num_free == 2
    assert pool.stats.evicted == 0
    pool.check()
    pool.release(held)
    assert len(pool.unused()) == 3
    pool.check()


def test_unused_pages_are_those_nobody_can_use() -> None:
    pool = PagePool(3, 4)
    take(pool)
    leave_idle(pool, b"a")
    (page,) = pool.unused()
    assert take(pool) == page
    assert pool.unused() == []


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0), (-1, 1)])
def test_a_pool_of_nothing_is_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(num_pages, page_size)


def test_pages_for() -> None:
    pool = PagePool(9, 4)
    assert [pool.pages_for(count) for count in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def lose_a_page(pool: PagePool) -> None:
    pool._free.pop()


def free_a_page_twice(pool: PagePool) -> None:
    pool._free.append(pool._free[0])


def free_a_held_page(pool: PagePool) -> None:
    pool._free.append(pool._references.index(1))


def free_an_idle_page(pool: PagePool) -> None:
    pool._free.append(next(iter(pool._idle)))


def drop_the_key_of_an_idle_page(pool: PagePool) -> None:
    pool._forget(next(iter(pool._idle)))


def know_a_free_page(pool: PagePool) -> None:
    pool.publish(pool._free[0], b"x")


def point_a_key_elsewhere(pool: PagePool) -> None:
    pool._pages[b"idle"] = pool._references.index(1)


def count_below_zero(pool: PagePool) -> None:
    pool._references[pool._free[0]] = -1


@pytest.mark.parametrize(
    "fault",
    [
        lose_a_page,
        free_a_page_twice,
        free_a_held_page,
        free_an_idle_page,
        drop_the_key_of_an_idle_page,
        know_a_free_page,
        point_a_key_elsewhere,
        count_below_zero,
    ],
)
def test_check_notices(fault: Callable[[PagePool], None]) -> None:
    pool = PagePool(4, 4)
    leave_idle(pool, b"idle")
    take(pool)
    pool.check()
    fault(pool)
    with pytest.raises(AssertionError):
        pool.check()


def test_keys_stand_for_all_tokens_before_and_for_the_weights() -> None:
    tokens = list(range(11))
    keys = page_keys(b"ana", tokens, 4)
    assert len(keys) == 2  # three tokens are no full page
    assert page_keys(b"ana", tokens[:8], 4) == keys
    assert page_keys(b"ana", tokens[:7], 4) == keys[:1]
    for position in range(8):
        changed = page_keys(b"ana", [*tokens[:position], 99, *tokens[position + 1 :]], 4)
        same = [a == b for a, b in zip(keys, changed, strict=True)]
        assert same == [position >= 4, False]
    assert not set(keys) & set(page_keys(b"ben", tokens, 4))
    # The same tokens one page further on are other content.
    assert len(set(page_keys(b"ana", [7] * 16, 4))) == 4


def test_no_key_matches_across_fingerprints_or_page_sizes() -> None:
    tokens = [1, 2] * 12
    keys = [
        key
        for fingerprint in (b"", b"a", b"b", b"ab", b"a\0", bytes(32))
        for size in (1, 2, 3, 4)
        for key in page_keys(fingerprint, tokens, size)
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("size", [1, 3])
def test_keys_grow_with_the_tokens(size: int) -> None:
    tokens = [5, 2**40, -1, 0, 7, 7, 7, 3]
    keys: list[Key] = []
    for stop in range(len(tokens) + 1):
        keys = extend_keys(keys, b"f", tokens[len(keys) * size : stop], size)
        assert keys == page_keys(b"f", tokens[:stop], size)


class Pool(RuleBasedStateMachine):
    """Against a model that keeps a count and a key for each page, and a list of the idle."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(5, 2)
        self.counts = [0] * 5
        self.keys: list[Key | None] = [None] * 5
        self.idle: list[int] = []

    def held(self) -> list[int]:
        return [page for page, count in enumerate(self.counts) if count]

    @rule()
    def allocate(self) -> None:
        page = self.pool.allocate()
        blank = [p for p in range(5) if not self.counts[p] and self.keys[p] is None]
        if blank:
            assert page in blank
        elif self.idle:
            assert page == self.idle.pop(0)
        else:
            assert page is None
            return
        assert page is not None
        self.counts[page], self.keys[page] = 1, None

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held()))
        self.pool.retain(page)
        self.counts[page] += 1

    @rule(page=st.integers(0, 4))
    def release(self, page: int) -> None:
        if not self.counts[page]:
            with pytest.raises(ValueError, match="nobody"):
                self.pool.release(page)
            return
        self.pool.release(page)
        self.counts[page] -= 1
        if not self.counts[page] and self.keys[page] is not None:
            self.idle.append(page)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data: st.DataObject, key: Key) -> None:
        page = data.draw(st.sampled_from(self.held()))
        self.pool.publish(page, key)
        if self.keys[page] is None and key not in self.keys:
            self.keys[page] = key

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4, unique=True))
    def find(self, keys: list[Key]) -> None:
        expected = []
        for key in keys:
            if key not in self.keys:
                break
            expected.append(self.keys.index(key))
        assert self.pool.find(keys) == expected
        for page in expected:
            self.counts[page] += 1
            if page in self.idle:
                self.idle.remove(page)

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        self.keys, self.idle = [None] * 5, []

    @invariant()
    def agree(self) -> None:
        self.pool.check()
        assert self.pool.num_free == 5 - len(self.held())
        assert [self.pool.is_shared(page) for page in range(5)] == [n > 1 for n in self.counts]


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
