"""Process many files in threads, with a progress bar."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dualtoken_vit.errors import InputError
from dualtoken_vit.machine import cores

Item = TypeVar("Item")
Result = TypeVar("Result")


class Rate(ProgressColumn):
    """Items per second, once it is meaningful."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.{1 if task.speed < 10 else 0}f}/s" if task.speed and (task.elapsed or 0) > 1 else "")


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], total: int | None, title: str, ahead: int = 256
) -> Generator[Result]:
    """`function` of each item, in order, with one thread per usable core; a single item is processed without threads.

    `total` is the number of items, if known, and `title` that of the progress bar on stderr, "" for no bar. At most
    `ahead` items are processed before their results are consumed.
    """
    items = iter(items)
    first = list(islice(items, ahead))
    if len(first) < 2:
        yield from map(function, chain(first, items))
        return
    try:
        threads = ThreadPool(min(cores(), len(first)))
    except (RuntimeError, AttributeError) as error:  # the latter where a pool without some of its threads is ended
        raise MemoryError("can't start new threads") from error
    with threads as pool:
        waiting = deque(pool.apply_async(function, (item,)) for item in first)

        def results() -> Iterator[Result]:
            while waiting:
                yield waiting.popleft().get()
                waiting.extend(pool.apply_async(function, (item,)) for item in islice(items, 1))

        yield from track(results(), total, title) if title else results()


_TITLE = TextColumn("{task.description}", markup=False)  # may contain the name of a file


def track(items: Iterable[Item], total: int | None, title: str) -> Generator[Item]:
    """The items, with a progress bar on stderr; `total` is their number, if known.

    What is printed meanwhile appears above the bar on a terminal, and else where stdout leads.
    """
    columns = BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn()
    terminal = sys.stdout is not None and sys.stdout.isatty()
    with Progress(_TITLE, *columns, console=Console(stderr=True), redirect_stdout=terminal) as bar:
        yield from bar.track(items, total, description=title)


@contextmanager
def working(title: str) -> Iterator[None]:
    """Context of a step of unknown duration: shows on stderr that it runs, and for how long."""
    with Progress(_TITLE, BarColumn(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        step = bar.add_task(title, total=None)
        yield
        bar.update(step, total=1, completed=1)


def verify_each(
    function: Callable[[Item], Any], items: Iterable[Item], total: int, title: str, skip: bool = False, hint: str = ""
) -> list[Item]:
    """Call `function`, which raises InputError for an item that cannot be used, once for each of `total` items.

    Returns these items if `skip`; otherwise raises the first error, with the number of others and the `hint` what to
    do. `title` is as for `in_threads`.
    """

    def fault(item: Item) -> tuple[Item | None, str]:
        try:
            function(item)
        except InputError as error:
            return item, str(error)
        return None, ""  # drops the item, which may be a whole file

    bad = [(item, text) for item, text in in_threads(fault, items, total, title) if item is not None]
    if bad and not skip:
        more = [f"and {len(bad) - 1} more: check-data lists all"] * (len(bad) > 1) + [hint] * bool(hint)
        raise InputError(bad[0][1] + (f" ({'; '.join(more)})" if more else ""))
    return [item for item, _ in bad]
