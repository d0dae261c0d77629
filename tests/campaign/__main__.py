"""Run the campaign: `python -m campaign --out FOLDER [--only PART ...] [--count N] [--minutes M] [--seed S]`.

Case N of a part depends on the seed and N alone. `--case mutations 17` repeats one and keeps its files. Finished cases
are in OUT/cases.jsonl, and a campaign that is started again with the same OUT goes on after them; with `--again` it
also repeats those that had a fault. Several may work on different parts in the same OUT. `--report FILE` writes the
counts of all finished cases between two markers in a Markdown file, after each part.
"""

import argparse
import fcntl
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from math import ceil
from pathlib import Path
from random import Random
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from campaign import PARTS
from campaign.core import Case, Verdict

WARM = (
    *("matplotlib.pyplot", "torch._dynamo", "dualtoken_vit.deploy.export"),
    *("dualtoken_vit.evaluation", "dualtoken_vit.predict", "dualtoken_vit.tasks.trainer", "dualtoken_vit.paper.study"),
)
HEADINGS = "part", "cases", "of which", "CPU minutes", "faults"
MARKERS = "<!-- counts -->", "<!-- end of counts -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs", "campaign"), help="folder of the campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--count", type=int, help="the first cases of each part only")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each part, chosen by the seed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--again", action="store_true", help="repeat the finished cases that had a fault")
    parser.add_argument("--case", nargs=2, metavar=("PART", "NUMBER"), help="repeat one case, and keep its files")
    parser.add_argument("--report", type=Path, help="Markdown file for the table of counts")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out = chosen.out.resolve()
    prepare(out)
    if chosen.case:
        verdict = run_case(out, chosen.case[0], chosen.seed, int(chosen.case[1]), keep=True)
        print(*verdict, sep="\n")
        return bool(verdict.fault)
    end = time.monotonic() + 60 * chosen.minutes
    try:
        for part in chosen.only:
            numbers = range(count_of(out, part, chosen.count))
            some = sorted(Random(chosen.seed).sample(numbers, ceil(chosen.share * len(numbers))))
            run_part(out, chosen.seed, part, some, end, chosen.again)
            if chosen.report:
                write_report(chosen.report, chosen.seed, finished(out, chosen.seed))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
    found = finished(out, chosen.seed)
    table = Table(*HEADINGS)
    for row in summary(found):
        table.add_row(*row)
    Console().print(table)
    faulty = {case: one for case, one in found.items() if one.verdict.fault}
    for (part, number), one in faulty.items():
        print(f"{part} {number}: {one.verdict.what}: {one.verdict.fault}")
    return bool(faulty)


def cases_of(out: Path, part: str) -> list[Case]:
    """The cases of a part, which are repeated with other choices until there are COUNT of them."""
    module = import_module(f"campaign.{part}")
    return module.cases(out / "world") if hasattr(module, "cases") else module.CASES


def count_of(out: Path, part: str, given: int | None) -> int:
    """The number of cases of a part: at most all of them where they are not repeated."""
    count = getattr(import_module(f"campaign.{part}"), "COUNT", None)
    return given or count if count else min(given or sys.maxsize, len(cases_of(out, part)))


def prepare(out: Path) -> None:
    """Import what the cases need, so that forks start at once, and build their world."""
    for name in WARM:
        import_module(name)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # notes on runs that were resumed
    from campaign import world

    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        world.build(out / "world")


def run_case(out: Path, part: str, seed: int, number: int, keep: bool = False) -> Verdict:
    """One case in a new folder, which is kept if there is a fault."""
    folder = out / "cases" / f"{part}-{number}"
    if (folder / "disk").is_mount():  # of a campaign that was killed
        subprocess.run(["umount", folder / "disk"], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cases = cases_of(out, part)
    try:
        verdict = cases[number % len(cases)](Random(f"{seed} {part} {number}"), out / "world", folder)
    except Exception as error:  # of the campaign itself
        verdict = Verdict(part, "?", "?", f"the case failed: {type(error).__name__}: {error}"[:300])
    if not keep and not verdict.fault:
        shutil.rmtree(folder)
    return verdict


class Finished(NamedTuple):
    """A line of cases.jsonl."""

    verdict: Verdict
    seconds: float  # of CPU time
    commit: str


def finished(out: Path, seed: int) -> dict[tuple[str, int], Finished]:
    """All finished cases of a seed."""
    path = out / "cases.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {
        (one["part"], one["number"]): Finished(Verdict(*one["verdict"]), one["seconds"], one["commit"])
        for one in lines
        if one["seed"] == seed
    }


def commit() -> str:
    """The commit of the code, with a + where the code is not quite that."""

    def git(*args: str) -> str:
        folder = Path(__file__).parents[2]
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "?") + "+" * bool(git("status", "-s", "dualtoken_vit", "tests"))


def run_part(out: Path, seed: int, part: str, numbers: list[int], end: float, again: bool) -> None:
    """Run the cases of a part that OUT/cases.jsonl does not have."""
    found, code, said = finished(out, seed), commit(), 0.0
    done = {number for name, number in found if name == part and not (again and found[name, number].verdict.fault)}
    left = [number for number in numbers if number not in done]
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    # Without a thread for the bar: forks of a process with threads may hang.
    with (
        Progress(*columns, auto_refresh=False, console=Console(stderr=True), speed_estimate_period=600) as bar,
        (out / "cases.jsonl").open("a") as file,
    ):
        task = bar.add_task(part, total=len(numbers), completed=len(numbers) - len(left))
        for place, number in enumerate(left):
            if time.monotonic() > end:
                break
            if not bar.console.is_terminal and time.monotonic() > said + 60:  # where there is no bar
                said = time.monotonic()
                bar.console.print(f"{time.strftime('%H:%M')} {part}: {len(numbers) - len(left) + place}/{len(numbers)}")
            bar.refresh()
            before = used()
            verdict = run_case(out, part, seed, number)
            if verdict.fault:
                bar.console.print(f"{part} {number}: {verdict.what}: {verdict.fault}", markup=False, highlight=False)
            line = {"part": part, "number": number, "seed": seed, "commit": code, "verdict": verdict}
            file.write(json.dumps(line | {"seconds": round(used() - before, 2)}) + "\n")
            file.flush()
            bar.advance(task)


def used() -> float:
    """CPU seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def summary(found: dict[tuple[str, int], Finished]) -> list[tuple[str, ...]]:
    """A row of HEADINGS for each group."""
    groups: dict[tuple[str, str], list[Finished]] = {}
    for part, number in sorted(found, key=lambda case: (PARTS.index(case[0]), case[1])):
        one = found[part, number]
        groups.setdefault((part, one.verdict.group), []).append(one)
    rows = []
    for (part, group), cases in sorted(groups.items(), key=lambda item: PARTS.index(item[0][0])):
        ended = Counter(one.verdict.ended for one in cases)
        text = ", ".join(f"{count} {name}" for name, count in sorted(ended.items()))
        faults = sum(bool(one.verdict.fault) for one in cases)
        minutes = sum(one.seconds for one in cases) / 60
        rows.append((f"{part}: {group}", str(len(cases)), text, f"{minutes:.1f}", str(faults)))
    return rows


def write_report(path: Path, seed: int, found: dict[tuple[str, int], Finished]) -> None:
    """Put the table of counts between the markers of a Markdown file."""
    commits = ", ".join(sorted({one.commit for one in found.values()}))
    faults, minutes = (
        sum(bool(one.verdict.fault) for one in found.values()),
        sum(o.seconds for o in found.values()) / 60,
    )
    about = f"Seed {seed}, commit {commits}: {len(found)} cases, {faults} faults, {minutes:.0f} minutes of CPU time."
    table = [f"| {' | '.join(row)} |" for row in (HEADINGS, ["---"] * len(HEADINGS), *summary(found))]
    text = path.read_text()
    before, after = text.partition(MARKERS[0])[0], text.partition(MARKERS[1])[2]
    path.write_text("\n".join([before + MARKERS[0], about, "", *table, MARKERS[1]]) + after)


if __name__ == "__main__":
    sys.exit(main())
