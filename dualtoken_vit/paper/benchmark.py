"""Speed, memory and size of networks, side by side in one run on one machine.

Only ratios within a run are comparable: speed differs between machines, and on one machine from hour to hour.
Therefore the models take turns, with one short visit per round, so that drift affects all of them alike. The figures
are medians over the rounds.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain, product
from json import dumps
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Literal

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet

import dualtoken_vit  # noqa: F401  registers the models
from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.machine import describe, pick_device, tune_cpu
from dualtoken_vit.models.detectors import DETECTORS, create_detector
from dualtoken_vit.models.segmenters import SEGMENTERS, create_segmenter
from dualtoken_vit.paper.counting import Counts, count
from dualtoken_vit.predictors import read_header
from dualtoken_vit.recipes import Device
from dualtoken_vit.runtime.session import RUNTIMES, ExportedModel, read_description
from dualtoken_vit.show.console import table_text
from dualtoken_vit.show.plots import save_growth
from dualtoken_vit.tasks.registry import get_task

__all__ = ["Result", "benchmark", "take_turns"]

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
    "cuda": "peak memory allocated by PyTorch in a forward pass, plus the weights",
}


@dataclass(frozen=True)
class Result:
    """One model in one mode at one input and batch size."""

    model: str
    mode: Mode
    input_size: str
    """WIDTHxHEIGHT in pixels."""
    batch_size: int
    images_per_second: float
    ratio: float
    """Latency of the first model divided by the latency of this one."""
    latency_ms: float
    """Forward pass of the whole batch, median over the rounds."""
    spread_percent: float
    """Interquartile range over the rounds, in percent of the median."""
    memory_mib: float | None
    """Peak memory (see `HOW_MEMORY_IS_MEASURED`), None if not measured."""
    params: int
    macs: int
    """Multiply-accumulates for one image."""


TORCHVISION_DETECTORS = torchvision.models.list_models(module=torchvision.models.detection)


def _timm(name: str, size: tuple[int, int]) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name)
    kwargs: dict[str, Any] = {"img_size": size} if cfg and cfg.fixed_input_size else {}
    return timm.create_model(name, **kwargs)


def _torchvision(name: str, size: tuple[int, int]) -> nn.Module:
    kwargs = {"min_size": min(size), "max_size": max(size)} if name in TORCHVISION_DETECTORS else {}
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, **kwargs)


def _detector(kind: str, name: str, size: tuple[int, int]) -> nn.Module:
    return create_detector(kind, name, 80, image_size=min(size), max_size=max(size))


def _segmenter(kind: str, name: str, size: tuple[int, int]) -> nn.Module:
    return create_segmenter(kind, name, 150)


class ExportedNetwork(nn.Module):
    """The network of an exported file, on the CPU."""

    def __init__(self, runtime: str, file: str, size: tuple[int, int]):
        super().__init__()
        self.run = ExportedModel(file, runtime, torch.get_num_threads())

    @torch.compiler.disable
    def forward(self, x: Tensor) -> object:
        return self.run(x.numpy())


BUILDERS: dict[str, Callable[[str, tuple[int, int]], nn.Module]] = {
    "": _timm,
    **{kind: partial(_detector, kind) for kind in DETECTORS},
    **{kind: partial(_segmenter, kind) for kind in SEGMENTERS},
    "torchvision": _torchvision,
    **{runtime: partial(ExportedNetwork, runtime) for runtime in RUNTIMES},
}
"""KIND in KIND:NAME -> function that builds NAME for images of (height, width), with random weights."""


@dataclass(frozen=True)
class Setting:
    """What all models of a comparison share."""

    size: tuple[int, int]
    """Height and width of the images."""
    device: torch.device
    precision: Precision

    def __str__(self) -> str:
        height, width = self.size
        return f"{width}x{height}"

    def build(self, name: str) -> nn.Module:
        """The model of this name (see `benchmark`) for images of this size, with random weights."""
        kind, _, inner = name.rpartition(":")
        model = BUILDERS[kind](inner, self.size).eval()
        return model.to(self.device, getattr(torch, self.precision)).to(memory_format=torch.channels_last)

    def images(self, batch_size: int) -> Tensor:
        """A batch of noise (B, 3, H, W) in [0, 1], channels-last."""
        x = torch.rand((batch_size, 3, *self.size), dtype=getattr(torch, self.precision), device=self.device)
        return x.contiguous(memory_format=torch.channels_last)


def forward(model: nn.Module, x: Tensor) -> object:
    """The model's output for a batch; a detector takes a list of images."""
    return model(list(x)) if detects(model) else model(x)


def detects(model: nn.Module) -> bool:
    """Whether this is a detector, compiled or not."""
    return isinstance(getattr(model, "_orig_mod", model), (GeneralizedRCNN, RetinaNet, *DETECTORS.values()))


def take_turns(
    calls: dict[str, Callable[[], object]],
    *,
    rounds: int,
    visit_seconds: float,
    synchronize: Callable[[], object] = lambda: None,
    after_visit: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time callables against each other: seconds per call by name, one value per round.

    Each round visits all of them, starting with a different one. A visit repeats one callable for about
    `visit_seconds`, at least once; `synchronize` waits for the device before and after, `after_visit` follows.
    """

    def visit(call: Callable[[], object], repeats: int) -> float:
        synchronize()
        start = perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        return (perf_counter() - start) / repeats

    repeats = {}
    for name, call in calls.items():
        visit(call, 2)  # warm up
        repeats[name] = max(1, round(visit_seconds / visit(call, 1)))
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(visit(calls[name], repeats[name]))
            after_visit()
    return seconds


def _count(name: str, setting: Setting) -> Counts:
    """Parameters and MACs of a model, which do not depend on device and precision.

    Raises:
        InputError: for a model that does not accept images of this size.
    """
    kind, _, inner = name.rpartition(":")
    try:
        if kind in RUNTIMES:
            header = read_header(inner)
            model = get_task(header.task).rebuild(header).eval()
        else:
            model = replace(setting, device=torch.device("cpu"), precision="float32").build(name)
        return count(model, (3, *setting.size), forward, device="cpu" if detects(model) else "meta")
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(f"{name} does not accept images of {setting} pixels: {first_line(e)}") from e


def _peak_resident_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def _cpu_memory(name: str, batch_size: int, setting: Setting, threads: int) -> int:
    """Bytes needed to build and run a model. Call it in a fresh process."""
    torch.set_num_threads(threads)
    before = _peak_resident_bytes()
    model, x = setting.build(name), setting.images(batch_size)
    with torch.inference_mode():
        for _ in range(3):
            forward(model, x)
    return _peak_resident_bytes() - before


def _peak_memory(
    name: str, model: nn.Module, call: Callable[[], object], setting: Setting, mode: Mode, batch_size: int
) -> int | None:
    """Bytes (see `HOW_MEMORY_IS_MEASURED`), None if they cannot be measured."""
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        return torch.cuda.max_memory_allocated() - before + weights
    if setting.device.type == "cpu" and mode == "eager" and Path("/proc/self/status").exists():
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh_process:
            return fresh_process.submit(_cpu_memory, name, batch_size, setting, torch.get_num_threads()).result()
    return None


def _measure(
    counts: dict[str, Counts],
    setting: Setting,
    mode: Mode,
    batch_size: int,
    *,
    rounds: int,
    visit_seconds: float,
    memory: bool,
    done: Callable[[str], object],
) -> list[Result]:
    """Time the models (the keys of `counts`) against each other in one mode at one batch size."""
    x = setting.images(batch_size)
    calls: dict[str, Callable[[], object]] = {}
    peaks: dict[str, int | None] = {}
    torch.compiler.reset()
    with torch.inference_mode():
        for name in counts:
            model = setting.build(name)
            network: Any = torch.compile(model, dynamic=False) if mode == "compiled" else model
            calls[name] = partial(forward, network, x)
            try:
                calls[name]()  # compiles
            except RuntimeError as e:
                where = f"{mode}, batch {batch_size}, {setting.precision} on {setting.device.type}"
                raise InputError(f"{name} does not run ({where}): {first_line(e)}") from e
            peaks[name] = _peak_memory(name, model, calls[name], setting, mode, batch_size) if memory else None
            done(f"{mode}, batch {batch_size}: {name} built")
        seconds = take_turns(
            calls,
            rounds=rounds,
            visit_seconds=visit_seconds,
            synchronize=(lambda: None) if setting.device.type == "cpu" else torch.accelerator.synchronize,
            after_visit=lambda: done(f"{mode}, batch {batch_size}: {rounds} rounds"),
        )
    latency = {name: median(times) for name, times in seconds.items()}
    results = []
    for name, peak in peaks.items():
        quartiles = quantiles(seconds[name], n=4, method="inclusive") if rounds > 1 else 3 * seconds[name]
        results.append(
            Result(
                model=name,
                mode=mode,
                input_size=str(setting),
                batch_size=batch_size,
                images_per_second=batch_size / latency[name],
                ratio=next(iter(latency.values())) / latency[name],
                latency_ms=1e3 * latency[name],
                spread_percent=100 * (quartiles[2] - quartiles[0]) / latency[name],
                memory_mib=None if peak is None else peak / 2**20,
                params=counts[name].params,
                macs=counts[name].macs,
            )
        )
    return results


def _check_models(models: tuple[str, ...]) -> None:
    if not models:
        raise InputError("models: none given; name one or more timm models")
    for name in models:
        kind, colon, inner = name.rpartition(":")
        if colon and kind not in BUILDERS:
            kinds = ", ".join(filter(None, BUILDERS))
            raise InputError(f"models: {name}: {kind!r} is not a kind of model; use one of {kinds}, or a timm name")
        if kind in RUNTIMES:
            read_description(inner)
            continue
        library = torchvision.models if kind == "torchvision" else timm
        names = library.list_models()
        if inner not in names and not (library is timm and timm.is_model(inner)):  # timm also accepts names with a tag
            near = get_close_matches(inner, names)
            hint = f"did you mean {' or '.join(near)}?" if near else f"{library.__name__}.list_models() lists them"
            raise InputError(f"models: {kind or 'timm'} has no model {inner!r}; {hint}")
        if models.count(name) > 1:
            raise InputError(f"models: {name} is given twice; give it once")


def _size(text: str) -> tuple[int, int]:
    """Height and width from "224" or "640x480" (width x height)."""
    width, cross, height = text.partition("x")
    if not width.isdecimal() or (cross and not height.isdecimal()) or int(width) < 1 or int(height or 1) < 1:
        raise InputError(f"input_sizes: {text!r} is not a size; give pixels as 224, or WIDTHxHEIGHT as 640x480")
    return int(height or width), int(width)


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
    precision: Precision = "float32",
    threads: int | None = None,
    memory: bool = True,
    json: bool = False,
    markdown: bool = False,
    plot: Path | None = None,
) -> list[Result]:
    """Compare speed, memory and size of models in one run.

    Prints a description of the machine, then the table. Weights are random and images are noise, both channels-last.
    Flushes denormals to zero and keeps freed memory; these settings and the number of threads persist in the process.

    Args:
        models: timm names; retinanet:NAME and mask-rcnn:NAME for a detector over a timm model (80 classes),
            deeplabv3:NAME and pspnet:NAME for a segmenter (150 classes); torchvision:NAME for a torchvision model;
            onnxruntime:FILE and openvino:FILE for a file that export wrote.
            The first one is the reference for the ratios.
        input_sizes: image sizes in pixels, as 224 or 640x480 (width x height), the same for all models.
        batch_sizes: images per forward pass.
        modes: eager, or compiled by torch.compile with its default settings (compiling takes minutes).
        rounds: visits to each model.
        visit_seconds: approximate duration of a visit in seconds.
        device: auto uses the accelerator if there is one, otherwise the CPU.
        precision: data type of weights and images.
        threads: CPU threads; None uses PyTorch's default.
        memory: also measure the peak memory.
        json: print one JSON object.
        markdown: print the table as Markdown.
        plot: PNG file for a plot of latency against image size.

    Returns:
        One result for each mode, input size, batch size and model, in this order.

    Raises:
        InputError: for an unknown model, a model that does not accept this size, or an unavailable device.
    """
    _check_models(models)
    least = {"batch_sizes": min(batch_sizes, default=0), "rounds": rounds}
    for name, value in (least | {"threads": 1 if threads is None else threads}).items():
        if value < 1:
            raise InputError(f"{name}: {value} is too small; give 1 or more")
    settings = [Setting(_size(text), pick_device(device), precision) for text in input_sizes]
    if not settings:
        raise InputError("input_sizes: none given; give one or more, as 224 or 640x480")
    if threads is not None:
        torch.set_num_threads(threads)
    tune_cpu()
    described = describe(settings[0].device)
    described["precision"] = f"{precision}, denormals flushed to zero, freed memory kept (glibc)"
    if hasattr(os, "getloadavg"):
        load = ", ".join(f"{x:.2f}" for x in os.getloadavg())
        described["load"] = f"{load} (average over 1, 5, 15 minutes)"
    if not json:
        lines = [f"{key:<10} {value}" for key, value in described.items()]
        print("\n".join(["```", *lines, "```"] if markdown else lines), flush=True)

    cells = list(product(modes, settings, batch_sizes))
    results: list[list[Result]] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(models) * (len(settings) + len(cells) * (1 + rounds)))

        def done(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        counts: dict[Setting, dict[str, Counts]] = {setting: {} for setting in settings}
        for setting, name in product(settings, models):
            counts[setting][name] = _count(name, setting)
            done(f"{name} counted")
        for mode, setting, batch_size in cells:
            options: dict[str, Any] = dict(rounds=rounds, visit_seconds=visit_seconds, memory=memory, done=done)
            results.append(_measure(counts[setting], setting, mode, batch_size, **options))

    flat = list(chain.from_iterable(results))
    about = {
        "size": "of the images, width x height in pixels",
        "latency": f"of a whole batch, median over {rounds} rounds; spread is the interquartile range",
        "ratio": f"speed relative to {models[0]}; above 1 is faster",
        "memory": HOW_MEMORY_IS_MEASURED.get(settings[0].device.type, "not measured on this device"),
        "MACs": "multiply-accumulates of convolutions, linear layers and attention products, for one image",
    }
    if any(kind in DETECTORS or name in TORCHVISION_DETECTORS for kind, _, name in (m.rpartition(":") for m in models)):
        about["detectors"] = (
            "untrained, on noise: they detect little or nothing, so speed, memory and MACs exclude mask heads and most "
            "of the suppression of boxes and pasting of masks"
        )
    if json:
        print(dumps({"machine": described, "about": about, "results": [asdict(r) for r in flat]}, indent=2))
    else:
        head = ("<mode", "size", "batch", "<model", "img/s", "ratio", "latency ms", "spread %", "memory MiB")
        print(table_text((*head, "params M", "MACs G"), [map(_cells, cell) for cell in results], markdown))
        print("\n".join(f"{'- ' if markdown else ''}{key}: {value}" for key, value in about.items()))
    if plot is not None:
        save_growth(flat, plot)
    return flat


def _cells(r: Result) -> tuple[str, ...]:
    memory = "" if r.memory_mib is None else f"{r.memory_mib:.0f}"
    speed = (f"{r.images_per_second:.1f}", f"{r.ratio:.2f}", f"{r.latency_ms:.1f}", f"{r.spread_percent:.0f}")
    size = (f"{r.params / 1e6:.2f}", f"{r.macs / 1e9:.3f}")
    return (r.mode, r.input_size, str(r.batch_size), r.model, *speed, memory, *size)
