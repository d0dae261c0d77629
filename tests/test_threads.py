"""Loading in threads: order, errors, how many and how far ahead."""

import os
import threading
from multiprocessing.pool import ThreadPool

import pytest

from dualtoken_vit.data import threads
from dualtoken_vit.data.threads import in_threads


def test_in_threads_keeps_the_order_and_passes_errors_on(capfd):
    assert list(in_threads(lambda x: x * x, range(1000), 1000, "")) == [x * x for x in range(1000)]
    assert capfd.readouterr() == ("", "")
    assert list(in_threads(str, range(3), 3, "counting")) == ["0", "1", "2"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "counting" in err
    assert "3/3" in err
    assert "/s" not in err  # the rate is not yet known
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda x: 1 / x, range(3), 3, ""))


def test_titles_are_no_markup(capfd):
    for title in ("predicting by runs/[best]/x", "reading a [/b]"):
        assert [*threads.track([1], 1, title)] == [1]
        with threads.working(title):
            pass
        assert capfd.readouterr().err.count(title) >= 2


def test_in_threads_starts_no_more_threads_than_items(monkeypatch, capfd):
    pools = []
    monkeypatch.setattr(threads, "ThreadPool", lambda count: pools.append(count) or ThreadPool(count))
    monkeypatch.setattr(threads, "cores", lambda: 8)
    assert list(in_threads(str, range(3), 3, "")) == ["0", "1", "2"]
    assert list(in_threads(str, iter(range(20)), None, "")) == [str(x) for x in range(20)]
    assert pools == [3, 8]
    here = threading.get_ident()
    assert list(in_threads(lambda x: (x, threading.get_ident()), [7], 1, "counting")) == [(7, here)]
    assert list(in_threads(str, [], 0, "counting")) == []
    assert list(in_threads(str, range(3), 3, "", ahead=1)) == ["0", "1", "2"]
    assert pools == [3, 8]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ahead", [1, 4])
def test_in_threads_reads_few_items_ahead(ahead):
    read = []
    results = in_threads(str, (read.append(x) or x for x in range(100)), 100, "", ahead)
    for index in range(10):
        assert next(results) == str(index)
        assert len(read) <= index + ahead


def test_a_slow_item_does_not_keep_the_others_waiting(monkeypatch):
    """Behind the first of four that may wait, the others are processed, and after it the next four."""
    monkeypatch.setattr(threads, "cores", lambda: 2)
    done = [threading.Event() for _ in range(8)]

    def process(item):
        done[item].set()
        assert item % 4 or done[item + 3].wait(60)
        return item

    assert list(in_threads(process, range(8), 8, "", ahead=4)) == [*range(8)]


@pytest.mark.parametrize("usable", [1, 3])
def test_one_thread_per_usable_core(monkeypatch, usable):
    """Not per core of the machine: a job scheduler or `taskset` may allow fewer."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(usable)), raising=False)
    start = threading.Barrier(usable)  # passes once that many threads wait
    assert all(index >= 0 for index in in_threads(lambda _: start.wait(60), range(3 * usable), None, ""))
    assert len(set(in_threads(lambda _: threading.get_ident(), range(100), None, ""))) <= usable
