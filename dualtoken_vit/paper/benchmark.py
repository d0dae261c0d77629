"""Speed, memory and size of networks, side by side in one run on one machine.

Only ratios within a run are comparable: speed differs between machines, and on one machine from hour to hour.
Therefore the models take turns, with one short visit per round, in shuffled order with pauses, so that drift affects
all of them alike. The same holds for modes, precisions and numbers of threads and processes. The figures are medians
over the rounds.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from json import dumps
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from dualtoken_vit.bounds import parse_size
from dualtoken_vit.data.threads import Rate
from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.files import kept
from dualtoken_vit.machine import describe, pick_device, tune_cpu
from dualtoken_vit.models.detectors import DETECTORS
from dualtoken_vit.paper.counting import Counts, count
from dualtoken_vit.paper.named import BUILDERS, TORCHVISION_DETECTORS, check_models, detects, split
from dualtoken_vit.paper.processes import Processes
from dualtoken_vit.paper.turns import take_turns
from dualtoken_vit.predictors import read_header
from dualtoken_vit.recipes import Device, Optim
from dualtoken_vit.runtime.session import RUNTIMES
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_growth
from dualtoken_vit.tasks.optim import build_optimizer
from dualtoken_vit.tasks.registry import get_task

PEERS = (
    "dualtoken_vit_small",
    "dualtoken_vit_tiny_mix",
    "xcit_tiny_12_p16_224",
    "deit_tiny_patch16_224",
    "mobilevit_xs",
    "pvt_v2_b0",
)

Mode = Literal["eager", "compiled"]
Precision = Literal["float32", "bfloat16", "float16"]

HOW_MEMORY_IS_MEASURED = {
    "cpu": "peak resident memory of a fresh process that builds the model and runs it three times (eager only), minus "
    "its memory before",
    "cuda": "peak memory allocated by PyTorch while the model runs, minus that before it was built",
}


@dataclass(frozen=True)
class Result:
    """One model in one mode at one input and batch size."""

    model: str
    mode: Mode
    precision: Precision
    threads: int
    """CPU threads of a process."""
    processes: int
    """Processes that run the model at the same time, each on batches of its own."""
    input_size: str
    """WIDTHxHEIGHT in pixels."""
    batch_size: int
    images_per_second: float
    """Of all processes."""
    ratio: float
    """Latency of the first model divided by the latency of this one, all else equal."""
    latency_ms: float
    """Forward pass, or training step, of the whole batch, median over the rounds."""
    spread_percent: float
    """Interquartile range over the rounds, in percent of the median."""
    memory_mib: float | None
    """Peak memory (see `HOW_MEMORY_IS_MEASURED`) of one process, None if not measured."""
    params: int
    macs: int
    """Multiply-accumulates for one image."""


@dataclass(frozen=True)
class Setting:
    """How models run."""

    size: tuple[int, int]
    """Height and width of the images."""
    device: torch.device
    precision: Precision
    threads: int = 1
    processes: int = 1
    mode: Mode = "eager"
    train: bool = False
    """Training steps, with autocast to `precision`, in place of forward passes."""

    def __str__(self) -> str:
        height, width = self.size
        return f"{width}x{height}"

    def build(self, name: str) -> nn.Module:
        """The model of this name (see `benchmark`) for images of this size, with random weights."""
        kind, inner = split(name)
        model = BUILDERS[kind](inner, self.size).train(self.train)
        return model.to(self.device, self.dtype).to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images."""
        return torch.float32 if self.train else getattr(torch, self.precision)

    def images(self, batch_size: int) -> Tensor:
        """A batch of noise (B, 3, H, W) in [0, 1], channels-last."""
        x = torch.rand((batch_size, 3, *self.size), dtype=self.dtype, device=self.device)
        return x.contiguous(memory_format=torch.channels_last)

    def call(self, name: str, batch_size: int) -> Callable[[], object]:
        """A forward pass, or a training step with AdamW, of the model of this name and one batch."""
        torch.set_num_threads(self.threads)  # an exported file has them for good
        model, x = self.build(name), self.images(batch_size)
        network: Any = torch.compile(model, dynamic=False) if self.mode == "compiled" else model

        @torch.inference_mode()
        def predict() -> object:
            torch.set_num_threads(self.threads)
            return forward(network, x)

        if not self.train:
            return predict
        optimizer = build_optimizer(model, Optim())
        target = torch.arange(batch_size, device=self.device)

        def step() -> None:
            torch.set_num_threads(self.threads)
            with torch.autocast(self.device.type, getattr(torch, self.precision), self.precision != "float32"):
                logits = network(x)
                loss = F.cross_entropy(logits, target % logits.shape[-1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step


def forward(model: nn.Module, x: Tensor) -> object:
    """The model's output for a batch; a detector takes a list of images."""
    return model(list(x)) if detects(model) else model(x)


def repeat(call: Callable[[], object], repeats: int) -> None:
    """Call it `repeats` times."""
    for _ in range(repeats):
        call()


@cache
def _call_in_process(setting: Setting, name: str, batch_size: int) -> Callable[[], object]:
    """`Setting.call` in one of `Processes`, set up as the main process."""
    tune_cpu()
    if setting.mode == "compiled":
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = sys.maxsize  # see `benchmark`
    return setting.call(name, batch_size)


def _repeat_in_process(setting: Setting, name: str, batch_size: int, repeats: int) -> None:
    repeat(_call_in_process(setting, name, batch_size), repeats)


def _repeat_in_all(processes: Processes, setting: Setting, name: str, batch_size: int, repeats: int) -> None:
    processes.run(partial(_repeat_in_process, setting, name, batch_size, repeats))


def _count(name: str, setting: Setting) -> Counts:
    """Parameters and MACs of a model, which do not depend on device and precision.

    Raises:
        InputError: for a model that does not accept images of this size.
    """
    kind, inner = split(name)
    try:
        if kind in RUNTIMES:
            header = read_header(inner)
            model = get_task(header.task).rebuild(header).eval()
        else:
            model = replace(setting, device=torch.device("cpu"), precision="float32", train=False).build(name)
        return count(model, (3, *setting.size), forward, device="cpu" if detects(model) else "meta")
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(f"{name} does not accept images of {setting} pixels: {first_line(e)}") from e


def _peak_resident_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def _cpu_memory(name: str, batch_size: int, setting: Setting) -> int:
    """Bytes needed to build and run a model. Call it in a fresh process."""
    before = _peak_resident_bytes()
    call = setting.call(name, batch_size)
    for _ in range(3):
        call()
    return _peak_resident_bytes() - before


def _peak_memory(name: str, batch_size: int, setting: Setting, call: Callable[[], object], before: int) -> int | None:
    """Bytes (see `HOW_MEMORY_IS_MEASURED`), None if they cannot be measured; `before`: allocated before the model."""
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if setting.device.type == "cpu" and setting.mode == "eager" and Path("/proc/self/status").exists():
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh_process, suppress(BrokenProcessPool):  # killed
            return fresh_process.submit(_cpu_memory, name, batch_size, setting).result()
    return None


def _measure(
    counts: dict[str, Counts],
    settings: list[Setting],
    batch_size: int,
    *,
    rounds: int,
    visit_seconds: float,
    memory: bool,
    done: Callable[[str], object],
) -> list[Result]:
    """Time the models (the keys of `counts`) against each other in all settings, of one size, at one batch size."""
    calls: dict[tuple[Setting, str], Callable[[int], object]] = {}
    peaks: dict[tuple[Setting, str], int | None] = {}
    device = settings[0].device
    torch.compiler.reset()
    if device.type == "cuda":  # cuBLAS's workspaces, which would count as memory of the first model
        x = torch.ones(8, 8, device=device, requires_grad=True)
        F.linear(x, x, x[0]).sum().backward()
    with ExitStack() as stack:
        numbers = dict.fromkeys(setting.processes for setting in settings)
        several = {number: stack.enter_context(Processes(number)) for number in numbers if number > 1}

        synchronize = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
        for setting, name in product(settings, counts):
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            if setting.processes > 1:
                run = partial(_repeat_in_all, several[setting.processes], setting, name, batch_size)
            else:
                run = partial(repeat, setting.call(name, batch_size))
            calls[setting, name] = run
            try:
                run(1)  # compiles
                synchronize()
            except (RuntimeError, ValueError) as e:  # ValueError: batch normalisation of a single value in training
                where = f"{setting.mode}, batch {batch_size}, {setting.precision} on {device.type}"
                raise InputError(f"{name} does not run ({where}): {first_line(e)}") from e
            peaks[setting, name] = _peak_memory(name, batch_size, setting, partial(run, 1), before) if memory else None
            done(f"{setting.mode}, batch {batch_size}: {name} built")
        seconds = take_turns(
            calls,
            rounds=rounds,
            visit_seconds=visit_seconds,
            synchronize=synchronize,
            after_visit=lambda: done(f"batch {batch_size}: {rounds} rounds"),
        )
    latency = {key: median(times) for key, times in seconds.items()}
    first = next(iter(counts))
    results = []
    for (setting, name), peak in peaks.items():
        times, own = seconds[setting, name], latency[setting, name]
        quartiles = quantiles(times, n=4, method="inclusive") if rounds > 1 else 3 * times
        results.append(
            Result(
                model=name,
                mode=setting.mode,
                precision=setting.precision,
                threads=setting.threads,
                processes=setting.processes,
                input_size=str(setting),
                batch_size=batch_size,
                images_per_second=setting.processes * batch_size / own,
                ratio=latency[setting, first] / own,
                latency_ms=1e3 * own,
                spread_percent=100 * (quartiles[2] - quartiles[0]) / own,
                memory_mib=None if peak is None else peak / 2**20,
                params=counts[name].params,
                macs=counts[name].macs,
            )
        )
    return results


def benchmark(
    models: tuple[str, ...] = PEERS,
    /,
    *,
    input_sizes: tuple[str, ...] = ("224",),
    batch_sizes: tuple[int, ...] = (1, 16),
    modes: tuple[Mode, ...] = ("eager", "compiled"),
    rounds: int = 15,
    visit_seconds: float = 0.3,
    device: Device = "auto",
    precision: tuple[Precision, ...] = ("float32",),
    threads: tuple[int, ...] = (),
    processes: tuple[int, ...] = (1,),
    train: bool = False,
    memory: bool = True,
    json: bool = False,
    markdown: bool = False,
    plot: Path | None = None,
) -> list[Result]:
    """Compare speed, memory and size of models in one run (random weights, noise).

    Args:
        models: timm names, the first being the reference of the ratios; KIND:NAME for a detector (retinanet,
            mask-rcnn, fcos, ssdlite; NAME@320: with this short side) or segmenter (deeplabv3, pspnet, lraspp) over it;
            torchvision:NAME; onnxruntime:FILE or openvino:FILE for a file that export wrote.
        input_sizes: in pixels, 224 or 640x480.
        batch_sizes: images at a time.
        modes: eager, or compiled by torch.compile, which takes minutes.
        rounds: visits to each model, shuffled, with pauses.
        visit_seconds: approximate duration of a visit.
        device: auto: an accelerator if there is one and no exported file, else the CPU.
        precision: data types (training: autocast).
        threads: numbers of CPU threads; none: PyTorch's.
        processes: processes at the same time (CPU only).
        train: measure training steps, with AdamW.
        memory: whether to measure the peak memory.
        json: print one JSON object.
        markdown: print the table as Markdown.
        plot: PNG file: latency against image size.

    Returns:
        One result for each mode, input size, batch size, precision, number of threads, of processes and model, in this
        order. The process keeps flushing denormals to zero and reusing freed memory, and the last number of threads.
        Weights and images are channels-last; detectors have 80 classes, segmenters 150.

    Raises:
        InputError: for an unknown model, a model that does not accept this size, or an unavailable device. What was
            measured before is printed, as on Ctrl-C.
    """
    check_models(models, train)
    least = {
        "batch_sizes": min(batch_sizes, default=0),
        "rounds": rounds,
        "threads": min(threads, default=1),
        "processes": min(processes, default=0),
    }
    for name, value in least.items():
        if value < 1:
            raise InputError(f"{name}: {value} is too small; give 1 or more")
    if not 0 <= visit_seconds < math.inf:
        raise InputError(f"visit_seconds: {visit_seconds} is no duration; give 0 or more")
    for name, given in {"input_sizes": input_sizes, "precision": precision, "modes": modes}.items():
        if not given:
            raise InputError(f"{name}: none given; give one or more")
    exported = [name for name in models if split(name)[0] in RUNTIMES]
    device = "cpu" if exported and device == "auto" else device
    counted = [
        Setting(parse_size(text, "--input-sizes"), pick_device(device), precision[0], train=train)
        for text in input_sizes
    ]
    if counted[0].device.type != "cpu" and max(processes) > 1:
        raise InputError(f"processes: {max(processes)} processes share a CPU only; give --device cpu")
    if exported and (counted[0].device.type != "cpu" or precision != ("float32",)):
        raise InputError(
            f"models: {exported[0]}: exported files run on the CPU in a precision of their own; leave out --device and "
            "--precision"
        )
    threads = threads or (torch.get_num_threads(),)
    tune_cpu()
    described = describe(counted[0].device, ", ".join(map(str, threads)))
    described["precision"] = f"{', '.join(precision)}, denormals flushed to zero, freed memory kept (glibc)"
    if hasattr(os, "getloadavg"):
        load = ", ".join(f"{x:.2f}" for x in os.getloadavg())
        described["load"] = f"{load} (average over 1, 5, 15 minutes)"
    about = {
        "size": "of the images, width x height in pixels",
        "latency": f"{'training step' if train else 'forward pass'} of a whole batch, median over {rounds} rounds; "
        "spread is the interquartile range; with several processes until the last one ends; images/s are those of all",
        "ratio": f"speed relative to {models[0]}, all else equal; above 1 is faster",
        "memory": "of one process: " * (max(processes) > 1)
        + HOW_MEMORY_IS_MEASURED.get(counted[0].device.type, "not measured on this device"),
        "MACs": "multiply-accumulates of convolutions, linear layers and attention products, for one image",
    }
    if any(kind in DETECTORS or name in TORCHVISION_DETECTORS for kind, name in map(split, models)):
        about["detectors"] = (
            "untrained, on noise: they detect little or nothing, so speed, memory and MACs exclude mask heads and most "
            "of the suppression of boxes and pasting of masks"
        )
    if not json:
        lines = [f"{key:<10} {value}" for key, value in described.items()]
        print("\n".join(["```", *lines, "```"] if markdown else lines), flush=True)

    varied: dict[str, tuple] = dict(mode=modes, precision=precision, threads=threads, processes=processes)
    combinations = [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]
    cells = [
        ([replace(size, **values) for values in combinations], size, batch)
        for size, batch in product(counted, batch_sizes)
    ]
    columns = (BarColumn(), MofNCompleteColumn(), Rate(), TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, TextColumn("{task.description}", markup=False), console=Console(stderr=True))
    results: list[Result] = []
    finish = partial(_print, results, described, about, models, modes, json, markdown)
    with kept(finish, results), bars as progress:
        bar = progress.add_task("", total=len(models) * (len(counted) + len(cells) * len(cells[0][0]) * (1 + rounds)))

        def done(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        counts: dict[Setting, dict[str, Counts]] = {size: {} for size in counted}
        for size, name in product(counted, models):
            counts[size][name] = _count(name, size)
            done(f"{name} counted")
        # A compiled model is one more version of its class's code, of which torch.compile keeps 8 by default.
        dynamo: Any = torch._dynamo.config
        with dynamo.patch(recompile_limit=max(8, len(models) * len(cells[0][0]))):
            for settings, size, batch_size in cells:
                options: dict[str, Any] = dict(rounds=rounds, visit_seconds=visit_seconds, memory=memory, done=done)
                results += _measure(counts[size], settings, batch_size, **options)
    finish()
    if plot is not None:
        save_growth(results, plot)
    return results


def _print(
    results: list[Result],
    described: dict[str, str],
    about: dict[str, str],
    models: Sequence[str],
    modes: Sequence[str],
    json: bool,
    markdown: bool,
) -> None:
    """Print the results in the order of `modes`."""
    results.sort(key=lambda r: modes.index(r.mode))
    if json:
        print(dumps({"machine": described, "about": about, "results": [asdict(r) for r in results]}, indent=2))
        return
    head = ("<mode", "<precision", "threads", "processes", "size", "batch", "<model", "img/s", "ratio", "latency ms")
    groups = [map(_cells, results[i : i + len(models)]) for i in range(0, len(results), len(models))]
    print(table_text((*head, "spread %", "memory MiB", "params M", "MACs G"), groups, markdown))
    print("\n".join(f"{'- ' if markdown else ''}{key}: {value}" for key, value in about.items()))


def _cells(r: Result) -> tuple[str, ...]:
    memory = "" if r.memory_mib is None else f"{r.memory_mib:.0f}"
    speed = (f"{r.images_per_second:.1f}", f"{r.ratio:.2f}", f"{r.latency_ms:.1f}", f"{r.spread_percent:.0f}")
    size = (f"{r.params / 1e6:.2f}", f"{r.macs / 1e9:.3f}")
    where = (r.mode, r.precision, str(r.threads), str(r.processes), r.input_size, str(r.batch_size), r.model)
    return (*where, *speed, memory, *size)
