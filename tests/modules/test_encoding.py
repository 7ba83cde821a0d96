"""Items are prepared in a thread, one ahead; errors come to the caller; the thread ends with the iteration."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from sentence_vipyloqwen.modules.encoding import prepared_ahead, prepared_in_turn


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]


def test_items_come_in_order_from_one_thread_but_the_first() -> None:
    names: list[str] = []

    def double(item: int) -> int:
        names.append(threading.current_thread().name)
        return 2 * item

    assert [(item, future.result()) for item, future in prepared_ahead(double, range(5))] == [
        (item, 2 * item) for item in range(5)
    ]
    first, *others = names
    assert first == threading.current_thread().name
    assert len(set(others)) == 1 and first not in others
    assert not threads()
    assert list(prepared_ahead(double, [])) == []


def test_in_turn_nothing_is_prepared_ahead() -> None:
    prepared: list[int] = []
    for item, future in prepared_in_turn(lambda item: prepared.append(item) or -item, range(3)):
        assert prepared == list(range(item + 1)) and future.result() == -item and not threads()


def test_one_item_is_prepared_ahead_and_no_more() -> None:
    begun: list[int] = []
    taken = 0
    for item, future in prepared_ahead(begun.append, range(6)):
        future.result()
        assert set(begun) <= set(range(item + 2))
        taken += 1
    assert taken == len(begun) == 6


def test_the_next_item_is_prepared_while_the_caller_works() -> None:
    begun = [threading.Event() for _ in range(3)]
    with closing(prepared_ahead(lambda item: begun[item].set(), range(3))) as prepared:
        next(prepared)
        assert begun[1].wait(timeout=60)


def test_an_error_reaches_the_caller_and_the_thread_ends() -> None:
    def fail(item: int) -> int:
        if item == 2:
            raise KeyError(item)
        return item

    done: list[int] = []
    with pytest.raises(KeyError), closing(prepared_ahead(fail, range(9))) as prepared:
        for _, future in prepared:
            done.append(future.result())
    assert done == [0, 1]
    assert not threads()


def test_closing_early_ends_the_thread() -> None:
    with closing(prepared_ahead(str, range(9))) as prepared:
        next(prepared)
        assert threads()
    assert not threads()
