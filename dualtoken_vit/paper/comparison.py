"""The outcome of a study: accuracies of its networks, the verdict on the paper's ranking, table and plot."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from textwrap import wrap

from matplotlib.figure import Figure
from scipy.stats import binomtest, tukey_hsd

from dualtoken_vit.data.classification import Images
from dualtoken_vit.data.streams import ImageStream
from dualtoken_vit.paper.counting import Counts
from dualtoken_vit.paper.tables import Published
from dualtoken_vit.recipes import Model
from dualtoken_vit.show.console import table_text

ALPHA = 0.05  # error rate of the tests, in Tukey's family-wise


@dataclass(frozen=True)
class Result:
    """One network of a study."""

    published: Published
    name: str  # the paper's name, or that of the smaller network in its place
    model: Model
    lr: float
    counts: Counts  # at the image size and number of classes of the study
    top1: tuple[float, ...]  # accuracy after the last epoch for each seed, between 0 and 1

    @property
    def mean(self) -> float:
        return mean(self.top1)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return stdev(self.top1) if len(self.top1) > 1 else None


def chance(val: Images) -> float:
    """The accuracy of a network that always predicts the most frequent class; for a stream 1 / classes."""
    if isinstance(val, ImageStream):
        return 1 / len(val.class_names)
    return max(Counter(val.targets).values()) / len(val)


def _leaders(scores: Sequence[tuple[str, float]]) -> str:
    """The networks with the highest score."""
    highest = max(score for _, score in scores)
    return f"{' and '.join(name for name, score in scores if score == highest)}, {highest:.1f} %"


def verdict(results: Sequence[Result], chance: float, images: int) -> list[str]:
    """Whether the measured ranking agrees with the paper's, in sentences.

    Differences are tested for all pairs at once by Tukey's HSD: they are compared with the spread of the seeds within
    the networks, which the test assumes to be equal. Pairs that are equal here or in the paper are not counted.
    Networks that did not learn are left out: their mean accuracy on `images` validation images is not above `chance` by
    a binomial test.
    """
    able = [
        r for r in results if binomtest(round(r.mean * images), images, chance, alternative="greater").pvalue < ALPHA
    ]
    lines = []
    if failed := [r.name for r in results if r not in able]:
        lines.append(f"Not above chance ({100 * chance:.1f} %), so not compared: {', '.join(failed)}.")
    if len(able) < 2:
        who = "No network" if not able else f"Only {able[0].name}"
        return [*lines, f"{who} learned at this budget: it says nothing about the paper's ranking."]
    results = able
    lines.append(
        f"Best network: {_leaders([(r.name, 100 * r.mean) for r in results])}; "
        f"in the paper: {_leaders([(r.published.network, float(r.published.score)) for r in results])}."
    )
    several = min(len(result.top1) for result in results) > 1
    varied = any(len(set(result.top1)) > 1 for result in results)  # else any difference would seem certain
    p_values = tukey_hsd(*(result.top1 for result in results)).pvalue if several and varied else None
    agreements: list[bool] = []  # of the counted pairs
    significant: dict[bool, list[str]] = {True: [], False: []}  # by agreement
    for i, j in combinations(range(len(results)), 2):
        worse, better = sorted((results[i], results[j]), key=lambda r: r.mean)
        gain = float(better.published.score) - float(worse.published.score)
        if gain == 0 or better.mean == worse.mean:
            continue
        agreements.append(gain > 0)
        if p_values is not None and p_values[i, j] < ALPHA:
            by = 100 * (better.mean - worse.mean)
            significant[gain > 0].append(f"{better.name} over {worse.name} by {by:.1f}")
    lines.append(f"Pairs ranked as in the paper: {sum(agreements)} of {len(agreements)}.")
    error = max(math.sqrt(result.mean * (1 - result.mean) / images) for result in results)
    lines.append(
        f"The choice of the {images:,} validation images adds a standard error of up to {100 * error:.1f} points to "
        "each accuracy, which the comparison of seeds leaves out."
    )
    if p_values is None:
        why = "All seeds of each network are equal" if several else "One seed per network"
        return [*lines, f"{why}: significance cannot be tested."]
    lines.append(
        f"Significant differences (Tukey's HSD, {100 * ALPHA:.0f} %): {len(significant[True])} as in the paper, "
        f"{len(significant[False])} contrary to it."
    )
    for agrees, words in ((True, "as in"), (False, "contrary to")):
        if significant[agrees]:
            lines.append(f"Significant, {words} the paper: {', '.join(significant[agrees])}.")
    if significant[False]:
        return [*lines, "The paper's ranking does not hold at this budget."]
    if significant[True]:
        return [*lines, "All significant differences at this budget are as in the paper."]
    return [*lines, "This budget is too small to confirm or refute the paper's ranking."]


def draw(results: Sequence[Result], title: str) -> Figure:
    """Accuracy of each seed and the mean, next to the paper's accuracy; one row per network."""
    figure = Figure(figsize=(9, 1.4 + 0.34 * len(results)), layout="constrained")
    here, paper = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    rows = range(len(results))[::-1]
    for row, result in zip(rows, results, strict=True):
        here.plot([100 * top1 for top1 in result.top1], [row] * len(result.top1), "o", color="tab:blue", alpha=0.4)
        here.plot(100 * result.mean, row, "|", color="tab:blue", markersize=16, markeredgewidth=2.5)
        paper.plot(float(result.published.score), row, "o", color="tab:orange")
    here.set_yticks(rows, [result.name for result in results])
    here.set(xlabel="top-1 (%): seeds (dots) and mean (bar)", title="this study")
    paper.set(xlabel="top-1 (%)", title=f"paper ({'S, ' * _smaller(results)}ImageNet-1k)")
    for axes in (here, paper):
        axes.grid(alpha=0.3)
        axes.set_ylim(-0.6, len(results) - 0.4)
    figure.suptitle("\n".join(wrap(title, 110)), fontsize=9)
    return figure


def _smaller(results: Sequence[Result]) -> bool:
    """Whether smaller networks than the paper's were trained in their place."""
    return any(result.name != result.published.network for result in results)


def label(model: Model) -> str:
    """The network in the table's column "model": its name, and its arguments where it has any."""
    return " ".join((model.name, *model.args))


def table_of(results: Sequence[Result], markdown: bool) -> str:
    """The table of a study: a row per network, with the accuracy of each seed."""
    published = "published %, of S" if _smaller(results) else "published %"
    columns = ("<network", "<model", "params M", "MACs G", "lr", "top-1 %", "std", "seeds", published)
    cells = []
    for result in results:
        std = "" if result.spread is None else f"{100 * result.spread:.2f}"
        seeds = " ".join(f"{100 * top1:.1f}" for top1 in result.top1)
        sizes = (f"{result.counts.params / 1e6:.2f}", f"{result.counts.macs / 1e9:.3f}", f"{result.lr:g}")
        cells.append(
            (result.name, label(result.model), *sizes, f"{100 * result.mean:.2f}", std, seeds, result.published.score)
        )
    return table_text(columns, [cells], markdown)
