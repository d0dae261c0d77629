"""The report of `benchmark`, not the speed of anything."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import sleep

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from matplotlib.axes import Axes

from dualtoken_vit.errors import InputError
from dualtoken_vit.models.detectors import DETECTORS
from dualtoken_vit.models.segmenters import SEGMENTERS
from dualtoken_vit.paper import benchmark as module
from dualtoken_vit.paper import turns
from dualtoken_vit.paper.benchmark import Result, Setting, benchmark
from dualtoken_vit.paper.named import split
from dualtoken_vit.paper.processes import Processes
from dualtoken_vit.paper.turns import take_turns
from dualtoken_vit.show.plots import save_growth

MODELS = ("test_vit", "test_resnet")  # timm's smallest
QUICK = dict(input_sizes=("32",), batch_sizes=(1, 2), rounds=2, visit_seconds=1e-3, device="cpu", threads=(1,))


@pytest.fixture
def _global_state():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


pytestmark = pytest.mark.usefixtures("_global_state")


def test_results(capsys):
    results = benchmark(MODELS, **QUICK, modes=("eager",), memory=False, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert [Result(**r) for r in printed["results"]] == results
    assert [(r.batch_size, r.model) for r in results] == [(b, m) for b in (1, 2) for m in MODELS]
    for first, second in (results[:2], results[2:]):
        assert first.ratio == 1
        assert second.ratio == pytest.approx(first.latency_ms / second.latency_ms)
    for r in results:
        assert r.images_per_second == pytest.approx(1e3 * r.batch_size / r.latency_ms)
        assert r.memory_mib is None
    vit, resnet = timm.create_model("test_vit", img_size=32), timm.create_model("test_resnet").eval()
    assert [r.params for r in results] == 2 * [sum(p.numel() for p in model.parameters()) for model in (vit, resnet)]
    analysis = FlopCountAnalysis(resnet, torch.zeros(1, 3, 32, 32)).unsupported_ops_warnings(False)
    by_operator = analysis.by_operator()
    assert results[1].macs == by_operator["conv"] + by_operator["linear"]
    assert printed["machine"]["cores"].endswith("threads used: 1")
    assert "denormals flushed" in printed["machine"]["precision"]
    assert MODELS[0] in printed["about"]["ratio"]


def test_statistics_of_a_cell(monkeypatch):
    times = {"test_vit": [0.2, 0.1, 0.4, 0.3, 0.5], "test_resnet": [0.1, 0.2, 0.1, 0.1, 9.0]}
    monkeypatch.setattr(module, "take_turns", lambda calls, **kwargs: {key: times[key[1]] for key in calls})
    first, second = benchmark(MODELS, **QUICK | dict(batch_sizes=(4,), rounds=5), modes=("eager",), memory=False)
    assert first.latency_ms == pytest.approx(300)
    assert first.images_per_second == pytest.approx(4 / 0.3)
    assert first.spread_percent == pytest.approx(100 * (0.4 - 0.2) / 0.3)
    assert second.ratio == pytest.approx(0.3 / 0.1)
    assert second.latency_ms == pytest.approx(1e3 * median(times["test_resnet"]))


def test_compiled_table(capsys, monkeypatch):
    limits, compiled = [], torch.compile

    def compile(*args, **kwargs):
        limits.append(torch._dynamo.config.recompile_limit)
        return compiled(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    (result,) = benchmark(
        ("test_resnet",), **QUICK | dict(batch_sizes=(1,)), modes=("compiled",), memory=False, markdown=True
    )
    out = capsys.readouterr().out
    assert result.mode == "compiled"
    assert limits == [8]  # PyTorch's own limit or more
    assert out.index("threads used: 1") < out.index("| mode")  # the machine is described first
    row = next(line for line in out.splitlines() if line.startswith("| compiled"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:7] == ["compiled", "float32", "1", "1", "32x32", "1", "test_resnet"]
    assert cells[7] == f"{result.images_per_second:.1f}"
    assert cells[8] == "1.00"
    assert cells[-2] == f"{result.params / 1e6:.2f}"


def test_memory_of_a_fresh_process():
    small, large = (
        benchmark(("test_vit",), **QUICK | dict(input_sizes=("160",), batch_sizes=(b,)), modes=("eager",))[0]
        for b in (1, 64)
    )
    images = 63 * 3 * 160 * 160 * 4 / 2**20  # MiB by which the larger batch exceeds the smaller
    assert small.memory_mib > 0
    assert large.memory_mib - small.memory_mib > images


def test_memory_of_a_process_that_is_killed(monkeypatch):
    def killed(*args):
        raise BrokenProcessPool

    monkeypatch.setattr(module.ProcessPoolExecutor, "submit", killed)
    (result,) = benchmark(("test_resnet",), **QUICK | dict(batch_sizes=(1,)), modes=("eager",))
    assert result.memory_mib is None
    assert result.latency_ms > 0


def test_settings_side_by_side(monkeypatch):
    """Every combination has its own first model as the reference."""
    names = [("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]
    seen = []

    def times(calls, **kwargs):
        seen.extend((setting.precision, setting.threads, name) for setting, name in calls)
        return {key: [1.0 + index, 1.0 + index] for index, key in enumerate(calls)}

    monkeypatch.setattr(module, "take_turns", times)
    options = dict(batch_sizes=(2,), precision=("float32", "bfloat16"), threads=(1, 2), modes=("eager",), memory=False)
    results = benchmark(MODELS, **QUICK | options)
    assert seen == [(*name, model) for name in names for model in MODELS]  # all in one run of turns
    assert [(r.precision, r.threads, r.model) for r in results] == seen
    assert [r.latency_ms for r in results] == [1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000]
    assert [r.ratio for r in results] == pytest.approx([1, 1 / 2, 1, 3 / 4, 1, 5 / 6, 1, 7 / 8])


def test_one_process_and_two():
    options = dict(batch_sizes=(3,), processes=(1, 2), modes=("eager",), memory=False)
    alone, both = benchmark(("test_resnet",), **QUICK | options)
    assert (alone.processes, both.processes) == (1, 2)
    assert alone.images_per_second == pytest.approx(1e3 * 3 / alone.latency_ms)
    assert both.images_per_second == pytest.approx(2 * 1e3 * 3 / both.latency_ms)


def meet(folder):
    """What the processes of the test import and do: it ends when two are there."""
    number = len(list(folder.glob(f"{os.getpid()}-*")))
    (folder / f"{os.getpid()}-{number}").touch()
    for _ in range(30000):
        if len(list(folder.glob(f"*-{number}"))) == 2:
            return
        sleep(0.01)
    raise TimeoutError


def fail(error):
    raise error


def test_processes_run_at_the_same_time(tmp_path):
    with Processes(2) as processes:
        for _ in range(3):
            processes.run(partial(meet, tmp_path))
        met = [path.name.split("-") for path in tmp_path.iterdir()]
        assert sorted(number for _, number in met) == ["0", "0", "1", "1", "2", "2"]
        assert {int(pid) for pid, _ in met} == {process.pid for process, _ in processes.workers}
        for kind in (ValueError, FileNotFoundError, InputError):
            with pytest.raises(RuntimeError, match=r"^first line$"):
                processes.run(partial(fail, kind("first line\nsecond line")))
        for _ in range(2):  # during a call, and before one
            with pytest.raises(InputError, match="processes: one of 2 ended; give fewer if memory was short"):
                processes.run(partial(os._exit, 1))
    with Processes(1) as processes:
        assert processes.workers[0][0].is_alive()
    assert not processes.workers[0][0].is_alive()


@pytest.mark.skipif(os.name != "posix", reason="the signal is one of POSIX")
def test_processes_leave_ctrl_c_to_the_command():
    """Also before they have imported what they need."""
    with Processes(1) as processes:
        os.kill(processes.workers[0][0].pid, signal.SIGINT)
        processes.run(os.getpid)


def test_a_process_that_does_not_start(monkeypatch):
    context, started = get_context("spawn"), []

    def start(process):
        if started:
            raise BlockingIOError("no more processes")
        started.append(process)

    monkeypatch.setattr(context.Process, "start", start)
    monkeypatch.setattr(context.Process, "terminate", lambda process: started.remove(process))
    monkeypatch.setattr(context.Process, "join", lambda process: None)
    with pytest.raises(InputError, match=re.escape("processes: 1 of 2 started; give fewer (no more processes)")):
        Processes(2)
    assert not started


def runs(pid):
    """Whether there is such a process that has not ended."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_processes_end_with_the_command(tmp_path):
    """Even where it is killed."""
    code = (
        "from dualtoken_vit.paper.processes import Processes\n"
        "import os, signal\n"
        "if __name__ == '__main__':\n"
        "    with Processes(2) as processes:\n"
        "        print(*(process.pid for process, _ in processes.workers), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "killed.py").write_text(code)
    with open(tmp_path / "numbers", "w") as numbers:  # a pipe would end with the processes that have it too
        done = subprocess.run([sys.executable, tmp_path / "killed.py"], stdout=numbers, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    numbers = (tmp_path / "numbers").read_text().split()
    assert len(numbers) == 2
    for _ in range(6000):
        if not any(map(runs, numbers)):
            break
        sleep(0.01)
    else:
        pytest.fail("the processes are still there")


def test_processes_share_no_gpu(monkeypatch):
    monkeypatch.setattr(module, "pick_device", torch.device)
    with pytest.raises(InputError, match="processes: 2 processes share a CPU only; give --device cpu"):
        benchmark(MODELS, **QUICK | dict(processes=(2,), device="meta"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step(monkeypatch, precision):
    """Equals a step of torch's own AdamW on the same weights, batch and targets."""
    setting = Setting((32, 32), torch.device("cpu"), precision, train=True)
    model = setting.build("test_resnet")
    twin = timm.create_model("test_resnet", num_classes=1000).train()
    twin.load_state_dict(model.state_dict())
    x = setting.images(4)
    monkeypatch.setattr(Setting, "build", lambda self, name: model)
    monkeypatch.setattr(Setting, "images", lambda self, batch_size: x)
    setting.call("test_resnet", 4)()

    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in twin.parameters() if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in twin.parameters() if p.ndim >= 2], "weight_decay": 0.05},
        ],
        lr=1e-3,
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        loss = torch.nn.functional.cross_entropy(twin(x), torch.arange(4))
    loss.backward()
    optimizer.step()
    for (name, value), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_torchvision_s_classifiers_and_paths_with_colons():
    assert type(Setting((32, 32), torch.device("cpu"), "float32").build("torchvision:resnet18")).__name__ == "ResNet"
    assert split("onnxruntime:runs/10:30/model.onnx") == ("onnxruntime", "runs/10:30/model.onnx")
    assert split("test_resnet.r160_in1k") == ("", "test_resnet.r160_in1k")


def test_models_run_with_their_threads(monkeypatch, one_thread):
    seen = []
    monkeypatch.setattr(module, "forward", lambda network, x: seen.append(torch.get_num_threads()))
    calls = [Setting((32, 32), torch.device("cpu"), "float32", count).call("test_resnet", 1) for count in (1, 2)]
    for call in calls:
        call()
    assert seen == [1, 2]


def test_training_table(capsys):
    options = dict(batch_sizes=(2,), modes=("eager",), train=True, json=True)
    first, second = benchmark(MODELS, **QUICK | options)
    about = json.loads(capsys.readouterr().out)["about"]
    assert about["latency"].startswith("training step of a whole batch")
    assert first.memory_mib > 0
    assert second.ratio == pytest.approx(first.latency_ms / second.latency_ms)


def test_size_is_passed_to_models_built_for_a_fixed_size():
    model = Setting((64, 64), torch.device("cpu"), "bfloat16").build("test_vit")
    assert model.patch_embed.img_size == (64, 64)
    assert model.head.weight.dtype == torch.bfloat16
    assert not model.training


@pytest.mark.parametrize("name", ["deeplabv3:test_resnet", "lraspp:dualtoken_vit_tiny_mix"])
def test_segmenters(name):
    setting = Setting((64, 96), torch.device("cpu"), "bfloat16")
    with torch.inference_mode():
        assert module.forward(setting.build(name), setting.images(2)).shape == (2, 150, 64, 96)


def test_torchvisions_segmenters_have_as_many_classes():
    setting = Setting((64, 96), torch.device("cpu"), "float32")
    with torch.inference_mode():
        found = setting.build("torchvision:lraspp_mobilenet_v3_large")(setting.images(1))
    assert found["out"].shape == (1, 150, 64, 96)


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_torchvisions_detectors_have_as_many_classes(name):
    """80 of COCO; Faster R-CNN has one more, the background."""
    with torch.device("meta"):
        model = Setting((64, 96), torch.device("meta"), "float32").build(f"torchvision:{name}")
    if name.startswith("retinanet"):
        assert model.head.classification_head.num_classes == 80
    else:
        assert model.roi_heads.box_predictor.cls_score.out_features == 81


def test_every_detector_and_segmenter_is_a_kind():
    assert set(module.BUILDERS) == {"", "torchvision", "onnxruntime", "openvino", *DETECTORS, *SEGMENTERS}


@pytest.mark.parametrize(
    "name", ["retinanet:dualtoken_vit_tiny_mix", "ssdlite:test_resnet", "torchvision:retinanet_resnet50_fpn"]
)
def test_detectors_take_a_list_of_images(name):
    setting = Setting((64, 96), torch.device("cpu"), "float32")
    model = setting.build(name)
    with torch.inference_mode():
        assert [set(found) for found in module.forward(model, setting.images(2))] == [{"boxes", "labels", "scores"}] * 2
    assert model.transform.min_size[-1] == 64
    assert model.transform.max_size == 96


def test_detectors_that_resize_their_images():
    setting = Setting((96, 128), torch.device("cpu"), "float32")
    model = setting.build("ssdlite:test_resnet@48")
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    with torch.inference_mode():
        module.forward(model, setting.images(1))
        fixed = setting.build("torchvision:ssdlite320_mobilenet_v3_large")
        fixed.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
        module.forward(fixed, setting.images(1))
    assert seen == [(1, 3, 64, 64), (1, 3, 320, 320)]  # 48x64, padded


def test_sizes_and_the_plot_of_growth(tmp_path):
    sizes = {"input_sizes": ("32", "64x32"), "batch_sizes": (1,), "plot": tmp_path / "growth.png"}
    results = benchmark(("test_resnet",), **QUICK | sizes, modes=("eager",), memory=False)
    assert [r.input_size for r in results] == ["32x32", "64x32"]
    assert results[1].macs == pytest.approx(2 * results[0].macs, rel=0.02)  # except the classifier
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_a_panel_for_each_number_of_processes(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, y, *args, **kw: drawn.append((x, y)) or plot(axes, x, y, *args, **kw)
    )
    one = Result("a", "eager", "float32", 1, 1, "32x32", 1, 1.0, 1.0, 5.0, 0.0, None, 1, 1)
    cases = ("32x32", 1, 5), ("64x32", 1, 9), ("32x32", 2, 6), ("64x32", 2, 11)
    results = [replace(one, input_size=size, processes=count, latency_ms=ms) for size, count, ms in cases]
    save_growth(results, tmp_path / "growth.png")
    assert drawn == [((1024, 2048), (5, 9)), ((1024, 2048), (6, 11))]


def test_rounds_take_turns():
    visited = []
    calls = {name: lambda repeats, name=name: visited.extend(repeats * name) for name in "abc"}
    after = []
    seconds = take_turns(calls, rounds=4, visit_seconds=1e-12, after_visit=lambda: after.append(visited[-1]))
    assert visited[:9] == list("aaabbbccc")  # warm-up
    assert visited[9:] == after
    rounds = ["".join(visited[start : start + 3]) for start in range(9, 21, 3)]
    assert all(sorted(each) == list("abc") for each in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_visit_repeats_and_reports_the_time_of_one_call(monkeypatch):
    """Without the pause before it."""
    now = 0.0

    def work(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(turns, "perf_counter", lambda: now)
    monkeypatch.setattr(turns, "sleep", work)
    assert take_turns({"work": lambda repeats: work(0.25 * repeats)}, rounds=2, visit_seconds=1.0) == {
        "work": [0.25, 0.25]
    }
    assert now == pytest.approx(0.25 * (2 + 1 + 2 * 4) + 2 * 0.1)


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (("dualtoken_vit_smal",), {}, "no model 'dualtoken_vit_smal'; did you mean dualtoken_vit_small"),
        (("qqqqqqqq",), {}, "timm.list_models"),
        (("torchvision:resnet19",), {}, "torchvision has no model 'resnet19'; did you mean resnet1"),
        (("yolo:test_vit",), {}, "yolo:test_vit: 'yolo' is not a kind of model; use one of retinanet, mask-rcnn"),
        (
            ("mask-rcnn:test_resnet",),
            {"precision": ("bfloat16",)},
            "mask-rcnn:test_resnet does not run (eager, batch 1, bfloat16 on cpu)",
        ),
        (
            ("resnet10t",),
            {"train": True},
            "resnet10t does not run (eager, batch 1, float32 on cpu): Expected more than 1",
        ),
        (("fcos:test_resnet@small",), {}, "fcos:test_resnet@small: give the short side of resized images as @320"),
        (("test_vit",), {"input_sizes": ("640*480",)}, "--input-sizes 640*480: give pixels as 224"),
        ((), {}, "none given"),
        (("test_vit", "test_vit"), {}, "test_vit is given twice"),
        (("convnext_atto",), {"input_sizes": ("16",)}, "convnext_atto does not accept images of 16x16 pixels"),
        (("test_vit",), {"batch_sizes": (1, 0)}, "batch_sizes: 0 is too small"),
        (("test_vit",), {"batch_sizes": ()}, "batch_sizes"),
        (("test_vit",), {"rounds": 0}, "rounds: 0 is too small"),
        *((("test_vit",), {"visit_seconds": each}, "is no duration") for each in (-1.0, math.nan, math.inf)),
        (("test_vit",), {"threads": (1, 0)}, "threads: 0 is too small"),
        (("test_vit",), {"processes": (2, 0)}, "processes: 0 is too small"),
        (("test_vit",), {"processes": ()}, "processes: 0 is too small"),
        (("test_vit",), {"precision": ()}, "precision: none given"),
        (("retinanet:test_resnet",), {"train": True}, "retinanet:test_resnet: only timm names can be trained"),
    ],
)
def test_bad_input(models, options, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        benchmark(models, **QUICK | options)
    assert "\n" not in str(error.value)


def test_an_error_leaves_what_was_measured_before_it(capsys):
    options = QUICK | dict(batch_sizes=(2, 1), modes=("eager",), train=True, memory=False, json=True)
    with pytest.raises(InputError, match="resnet10t does not run"):
        benchmark(("resnet10t",), **options)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["model"], result["batch_size"], result["ratio"]) == ("resnet10t", 2, 1)


def test_ctrl_c_leaves_what_was_measured_before_it(capsys, monkeypatch):
    measure = module._measure

    def interrupted(counts, settings, batch_size, **options):
        if batch_size == 2:
            raise KeyboardInterrupt
        return measure(counts, settings, batch_size, **options)

    monkeypatch.setattr(module, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark(MODELS, **QUICK, modes=("eager",), memory=False, json=True)
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(one["batch_size"], one["model"]) for one in results] == [(1, name) for name in MODELS]


def test_no_such_device():
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(InputError, match=f"device.*{missing}"):
        benchmark(MODELS, **QUICK | dict(device=missing))
