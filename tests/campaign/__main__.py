"""Run the campaign: `python -m campaign --out FOLDER [--only PART ...] [--count N] [--minutes M] [--seed S]`.

Case N of a part depends on the seed and N alone. `--case mutations 17` repeats one and keeps its files. Finished cases
are in OUT/cases.jsonl, and a campaign that is started again with the same OUT goes on after them. `--report FILE`
writes the counts between two markers in a Markdown file.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from random import Random

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from campaign import PARTS
from campaign.core import Case, Verdict

WARM = (
    *("matplotlib.pyplot", "torch._dynamo", "dualtoken_vit.deploy.export"),
    *("dualtoken_vit.evaluation", "dualtoken_vit.predict", "dualtoken_vit.tasks.trainer", "dualtoken_vit.paper.study"),
)
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
    cases = []
    for part in chosen.only:
        numbers = range(count_of(out, part, chosen.count))
        some = Random(chosen.seed).sample(numbers, int(chosen.share * len(numbers)))
        cases += [(part, number) for number in sorted(some)]
    found = run_all(out, chosen.seed, cases, time.monotonic() + 60 * chosen.minutes)
    rows = summary(found)
    table = Table("part", "cases", "of which", "faults")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for (part, number), verdict in found.items():
        if verdict.fault:
            print(f"{part} {number}: {verdict.what}: {verdict.fault}")
    if chosen.report:
        write_report(chosen.report, chosen.seed, rows)
    return any(verdict.fault for verdict in found.values())


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
    world.build(out / "world")


def run_case(out: Path, part: str, seed: int, number: int, keep: bool = False) -> Verdict:
    """One case in a new folder, which is kept if there is a fault."""
    folder = out / "cases" / f"{part}-{number}"
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


def run_all(out: Path, seed: int, cases: list[tuple[str, int]], end: float) -> dict[tuple[str, int], Verdict]:
    """The verdicts on all cases, read from OUT/cases.jsonl where they are there."""
    path = out / "cases.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(one["part"], one["number"]): Verdict(*one["verdict"]) for one in lines if one["seed"] == seed}
    found = {case: done[case] for case in cases if case in done}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Without a thread for the bar: forks of a process with threads may hang.
    with (
        Progress(*columns, auto_refresh=False, console=Console(stderr=True), speed_estimate_period=600) as bar,
        path.open("a") as file,
    ):
        task = bar.add_task("", total=len(cases), completed=len(found))
        for part, number in cases:
            if (part, number) in found or time.monotonic() > end:
                continue
            bar.update(task, description=part)
            bar.refresh()
            verdict = found[part, number] = run_case(out, part, seed, number)
            if verdict.fault:
                bar.console.print(f"{part} {number}: {verdict.what}: {verdict.fault}", markup=False, highlight=False)
            file.write(json.dumps({"part": part, "number": number, "seed": seed, "verdict": verdict}) + "\n")
            file.flush()
            bar.advance(task)
    return found


def summary(found: dict[tuple[str, int], Verdict]) -> list[tuple[str, str, str, str]]:
    """A row for each group: its name, the number of cases, how they ended, the number of faults."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for (part, _), verdict in found.items():
        groups.setdefault((part, verdict.group), []).append(verdict)
    rows = []
    for (part, group), verdicts in groups.items():
        ended = Counter(verdict.ended for verdict in verdicts)
        text = ", ".join(f"{count} {name}" for name, count in sorted(ended.items()))
        rows.append((f"{part}: {group}", str(len(verdicts)), text, str(sum(bool(one.fault) for one in verdicts))))
    return rows


def write_report(path: Path, seed: int, rows: list[tuple[str, str, str, str]]) -> None:
    """Put the table of counts between the markers of a Markdown file."""
    table = ["| part | cases | of which | faults |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    text = path.read_text()
    before, after = text.partition(MARKERS[0])[0], text.partition(MARKERS[1])[2]
    path.write_text("\n".join([before + MARKERS[0], f"Seed {seed}.", "", *table, MARKERS[1]]) + after)


if __name__ == "__main__":
    sys.exit(main())
