"""Work on many files at a time, under a progress bar."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dualtoken_vit.errors import InputError

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_threads(
    look: Callable[[Item], Result], items: Iterable[Item], total: int | None, title: str, ahead: int = 256
) -> Iterator[Result]:
    """`look` of each item, in order, on all the processors; with a `title`, under a progress bar on stderr.

    No more than `ahead` items are looked at before their results are asked for.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    items = iter(items)
    with ThreadPool() as pool, Progress(*columns, console=Console(stderr=True), disable=not title) as bar:
        task = bar.add_task(title, total=total, rate="")
        while chunk := list(islice(items, ahead)):  # a pool takes in its whole input at once: keep that small
            for result in pool.imap(look, chunk):
                yield result
                speed = bar.tasks[0].speed if bar.tasks[0].elapsed > 1 else None  # the first moments say nothing
                bar.update(task, advance=1, rate=f"{speed:.0f}/s" if speed else "")


def verify_each(load: Callable[[int], Any], count: int, title: str) -> None:
    """`load` each of `count` samples once; with a `title`, under a progress bar.

    Raises:
        InputError: the first that there was, with the number of the others.
    """

    def look(index: int) -> str:
        try:
            load(index)
        except InputError as error:
            return str(error)
        return ""

    bad = [problem for problem in in_threads(look, range(count), count, title) if problem]
    if bad:
        raise InputError(bad[0] + (f" (and {len(bad) - 1} more: check-data names all)" if len(bad) > 1 else ""))
