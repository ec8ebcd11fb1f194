"""Counting references: held against a plain list of what happened."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fssa_runtime.engine.references import References

ACTIONS = st.lists(st.tuples(st.sampled_from(["add", "release", "forget"]), st.integers(0, 3)))


@given(ACTIONS)
def test_counts_and_the_order_of_idle_keys(actions: list[tuple[str, int]]) -> None:
    references: References[int] = References()
    held: list[int] = []  # a key as often as it is referred to
    idle: list[int] = []  # by when the last reference went
    for action, key in actions:
        if action == "add":
            references.add(key)
            held.append(key)
            idle = [k for k in idle if k != key]
        elif action == "release" and key not in held:
            with pytest.raises(ValueError, match="nothing refers to"):
                references.release(key)
        elif action == "release":
            references.release(key)
            held.remove(key)
            if key not in held:
                idle.append(key)
        elif key not in idle:
            with pytest.raises(KeyError):
                references.forget(key)
        else:
            references.forget(key)
            idle.remove(key)
        references.check()
        assert references.num_referred == len(set(held))
        assert len(references) == len(set(held)) + len(idle)
        assert references.longest_idle == (idle[0] if idle else None)
        for k in range(4):
            assert references.is_idle(k) == (k in idle)
            assert (k in references) == (k in held or k in idle)
