"""Time callables against each other, in turns."""

from collections.abc import Callable, Hashable
from random import Random
from time import perf_counter, sleep
from typing import TypeVar

PAUSE = 0.1  # of a visit
Name = TypeVar("Name", bound=Hashable)


def take_turns(
    calls: dict[Name, Callable[[int], object]],
    *,
    rounds: int,
    visit_seconds: float,
    synchronize: Callable[[], object] = lambda: None,
    after_visit: Callable[[], object] = lambda: None,
) -> dict[Name, list[float]]:
    """Time callables against each other: seconds per repeat by name, one value per round.

    Each round visits all of them, in a random order. A visit calls one with the number of repeats that take about
    `visit_seconds`, at least one; `synchronize` waits for the device before and after, `after_visit` follows. A pause,
    a tenth of a visit, precedes it: threads of the last callable's runtime may still spin, which slows the next one.
    """

    def visit(call: Callable[[int], object], repeats: int) -> float:
        synchronize()
        start = perf_counter()
        call(repeats)
        synchronize()
        return (perf_counter() - start) / repeats

    repeats = {}
    for name, call in calls.items():
        visit(call, 2)  # warm up
        repeats[name] = max(1, round(visit_seconds / visit(call, 1)))
    order = Random(0)
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            sleep(PAUSE * visit_seconds)
            seconds[name].append(visit(calls[name], repeats[name]))
            after_visit()
    return seconds
