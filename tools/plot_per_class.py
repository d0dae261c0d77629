"""Plot top-1 against training images per class: `python tools/plot_per_class.py FIGURE.png RUN ...`.

A line for the runs from pretrained weights, and one for those from scratch, by their recipe.json: `--data.per-class`,
`--model.pretrained`.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from dualtoken_vit.show.plots import save_figure


def plot(figure: Path, runs: list[Path]) -> None:
    """Draw the runs' points, and print them as a table in Markdown."""
    points = defaultdict(dict)
    for run in runs:
        recipe, found = (json.loads((run / name).read_text()) for name in ("recipe.json", "evaluation.json"))
        start = "fine-tuned" if recipe["model"]["pretrained"] else "from scratch"
        points[start][recipe["data"]["per_class"]] = 100 * found["top1"]
    drawn = Figure((6, 4), layout="constrained")
    axes = drawn.subplots()
    for start, found in sorted(points.items()):
        axes.plot(*zip(*sorted(found.items()), strict=True), ".-", label=start)
        print(f"| {start} | " + " | ".join(f"{count}: {share:.1f} %" for count, share in sorted(found.items())) + " |")
    axes.set(xscale="log", xlabel="training images per class (log scale)", ylabel="top-1 (%)", ylim=(0, 100))
    axes.set_xticks(sorted({count for found in points.values() for count in found}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(drawn, figure)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
