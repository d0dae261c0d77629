"""Studies: verdicts on results computed by hand, and the command with real runs of small networks."""

import asyncio
import csv
import hashlib
import json
import math
import os
import signal
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import timm

from dualtoken_vit import cli
from dualtoken_vit.data.classification import ImageDataset, build_datasets
from dualtoken_vit.data.folders import image_files
from dualtoken_vit.errors import InputError
from dualtoken_vit.paper import study
from dualtoken_vit.paper.comparison import Result, chance, table_of, verdict
from dualtoken_vit.paper.counting import Counts
from dualtoken_vit.paper.study import PRESETS, STUDIES, networks
from dualtoken_vit.paper.tables import PUBLISHED, Published
from dualtoken_vit.recipes import RECIPES, ClassificationData, Model, flatten
from dualtoken_vit.tasks.run_folder import in_use, write_recipe


def result(name, published, *top1):
    counts = Counts(params=1, macs=1, flops=1)
    return Result(Published("Table 0", name, name, "1", "1", str(published)), name, Model(), 1e-3, counts, top1)


def test_spread():
    assert result("a", 70, 0.50, 0.54).spread == pytest.approx(0.02 * math.sqrt(2))
    assert result("a", 70, 0.50, 0.54).mean == pytest.approx(0.52)
    assert result("a", 70, 0.50).spread is None


def judged(results):
    """The verdict where chance is far below."""
    return verdict(results, chance=0.1, images=1000)


def test_the_accuracy_is_that_after_the_last_epoch(tmp_path):
    """Not that of the best one, which would be chosen on the validation images."""
    (tmp_path / "metrics.csv").write_text("epoch,val_top1,val_loss\n1,0.9,1\n2,0.5,2\n")
    job = study._Job("key", RECIPES["folder"], tmp_path)
    assert (job.epochs, job.top1, job.score) == (2, 0.5, (0.5, -2.0))


def test_verdict():
    """For three networks and two seeds 0.02 apart, Tukey's bound is q(3 means, 3 df) = 5.91 times 0.01, or 0.0591."""
    lines = judged([result("a", 70, 0.50, 0.52), result("b", 71, 0.57, 0.59), result("c", 72, 0.64, 0.66)])
    assert lines[0] == "Best network: c, 65.0 %; in the paper: c, 72.0 %."
    assert lines[1] == "Pairs ranked as in the paper: 3 of 3."
    assert "5 %): 3 as in the paper, 0 contrary to it." in lines[3]
    assert "1,000 validation images adds a standard error of up to 1.6 points" in lines[2]  # sqrt(0.51 * 0.49 / 1000)
    assert lines[-1] == "All significant differences at this budget are as in the paper."
    lines = judged([result("a", 70, 0.50, 0.52), result("b", 71, 0.555, 0.575), result("c", 72, 0.61, 0.63)])
    assert "5 %): 1 as in the paper, 0 contrary to it." in lines[3]  # 0.055 is within the bound, 0.11 is not
    assert "Significant, as in the paper: c over a by 11.0." in lines
    lines = judged([result("a", 72, 0.50, 0.52), result("b", 71, 0.57, 0.59), result("c", 70, 0.51, 0.53)])
    assert lines[1] == "Pairs ranked as in the paper: 1 of 3."
    assert "Significant, contrary to the paper: b over a by 7.0." in lines
    assert "Significant, as in the paper: b over c by 6.0." in lines
    assert lines[-1] == "The paper's ranking does not hold at this budget."
    lines = judged([result("a", 70, 0.50, 0.52), result("b", 71, 0.53, 0.55)])  # q(2 means, 2 df) = 6.08: 0.0608
    assert lines[-1] == "This budget is too small to confirm or refute the paper's ranking."
    lines = judged([result("a", 70, 0.50, 0.52), result("b", 71, 0.565, 0.585)])
    assert lines[-1] == "All significant differences at this budget are as in the paper."
    lines = judged([result("a", 70, 0.50), result("b", 71, 0.60)])
    assert lines[-1] == "One seed per network: significance cannot be tested."
    lines = judged([result("a", 70, 0.50, 0.50), result("b", 71, 0.55, 0.55)])
    assert lines[-1] == "All seeds of each network are equal: significance cannot be tested."
    lines = judged([result("a", 79.2, 0.50, 0.52), result("b", 79.2, 0.60, 0.62)])  # equal in the paper
    assert lines[1] == "Pairs ranked as in the paper: 0 of 0."
    lines = judged([result("a", 70, 0.50, 0.52), result("b", 71, 0.52, 0.50)])  # equal in the study
    assert lines[1] == "Pairs ranked as in the paper: 0 of 0."


def test_networks_at_chance_are_not_compared():
    """Of 300 images, P(X >= 114) is 5.1 % and P(X >= 115) 4.0 % for the share 1 / 3 (exact binomial sums)."""
    tail = [sum(math.comb(300, k) * 2 ** (300 - k) for k in range(least, 301)) / 3**300 for least in (114, 115)]
    assert tail[0] > 0.05 > tail[1]
    same = [result(name, score, 1 / 3, 1 / 3) for name, score in (("a", 70), ("b", 71), ("c", 72))]
    assert verdict(same, 1 / 3, 300) == [
        "Not above chance (33.3 %), so not compared: a, b, c.",
        "No network learned at this budget: it says nothing about the paper's ranking.",
    ]
    below, above = result("d", 73, 114 / 300, 114 / 300), result("e", 74, 115 / 300, 115 / 300)
    lines = verdict([*same, below, above], 1 / 3, 300)
    assert lines == [
        "Not above chance (33.3 %), so not compared: a, b, c, d.",
        "Only e learned at this budget: it says nothing about the paper's ranking.",
    ]
    better = result("f", 72, 0.9, 0.9), result("g", 72, 0.9, 0.9)
    lines = verdict([below, above, *better], 1 / 3, 300)
    assert lines[1] == "Best network: f and g, 90.0 %; in the paper: e, 74.0 %."
    assert lines[2] == "Pairs ranked as in the paper: 0 of 2."


def test_chance_is_the_share_of_the_most_frequent_class():
    images = ImageDataset([None] * 4, [0, 1, 1, 1], ("a", "b"), list("wxyz"))
    assert chance(images) == 0.75


def test_networks_are_the_papers():
    counts = {"global-tokens": 3, "token-count": 7, "local-attention": 2, "downsampling": 2, "mlp": 2, "peers": 12}
    assert {name: len(networks(name, "small")) for name in STUDIES} == counts
    for name in STUDIES:
        assert all(row.table == STUDIES[name][0] for row, _ in networks(name, "small"))
    small, tiny = (dict(zip("ab", networks("local-attention", base), strict=True)) for base in ("small", "tiny"))
    assert small["a"][1] == Model(name="dualtoken_vit_small_mix", args=("local_attention=window",))
    assert tiny["a"][1] == Model(name="dualtoken_vit_tiny_mix", args=("local_attention=window",))
    assert networks("peers", "tiny") == networks("peers", "small")
    some = networks("token-count", "tiny", ("dualtoken_vit_tiny", "dualtoken_vit_tiny token_grid=3"))
    assert [model.args for _, model in some] == [("token_grid=3",), ()]  # in the paper's order
    assert all(preset.seeds > 1 for _, preset in PRESETS.values())


RESULTS = Path(__file__).parent.parent / "results" / "study"
BUDGET = {
    "image_size",
    "epochs",
    "warmup_epochs",
    "batch_size",
    "precision",
    "validate_every",
    "device",
    "devices",
    "workers",
}


def test_presets_train_alike():
    """By what the paper states (section 4.1: AdamW, 1e-3, a cosine), whatever `folder` does, and in `cpu` as in the
    results that the repository has; the presets differ in the budget alone.
    """
    recipes = {name: json.loads(json.dumps(flatten(preset.recipe))) for name, (_, preset) in PRESETS.items()}
    for recipe in recipes.values():
        assert {key.rpartition(".")[2] for key in recipe if recipe[key] != recipes["cpu"][key]} <= BUDGET
        assert (recipe["optim.optimizer"], recipe["optim.lr"], recipe["optim.schedule"]) == ("adamw", 1e-3, "cosine")
    assert RECIPES["folder"].optim.optimizer == "muon"
    paths = [*RESULTS.glob("study-*.json")]
    assert paths
    for path in paths:
        stored = json.loads(path.read_text())["budget"]
        assert len(shared := stored.keys() & recipes["cpu"].keys() - {"data.root"}) > 40
        assert {key: stored[key] for key in shared} == {key: recipes["cpu"][key] for key in shared}


@pytest.mark.parametrize("name", ["peers", "global-tokens", "local-attention", "mlp"])
def test_networks_of_a_study_differ_in_the_network_alone(name, tmp_path):
    preset = PRESETS["equal"][1]
    recipes = {row.key: study._with(preset.recipe, model) for row, model in networks(name, preset.base)}
    jobs = study._plan(recipes, preset.seeds, tmp_path)
    assert len(jobs) == 3 * len(recipes)
    for job in jobs:
        values = flatten(job.recipe) | {"run.seed": 0}
        changed = {key for key, value in flatten(preset.recipe).items() if values[key] != value}
        assert changed <= {"model.name", "model.args"}
        assert name == "peers" or job.recipe.model.name.startswith("dualtoken_vit_tiny")


KWARGS = dict(depths=(1, 1, 1), dims=(8, 16, 24), num_heads=(1, 2, 3))


@pytest.fixture
def small(monkeypatch):
    """Replaces the networks of every study by two shallow ones."""
    rows = [row for row in PUBLISHED if row.key in ("in1k-small-mix", "in1k-small")]
    args = tuple(f"{key}={value}".replace(" ", "") for key, value in KWARGS.items())
    names = ("dualtoken_vit_tiny_mix", "dualtoken_vit_tiny")
    chosen = [(row, Model(name=name, args=args)) for row, name in zip(rows, names, strict=True)]
    monkeypatch.setattr(study, "networks", lambda *args: chosen)


def run(photos, out, *more):
    args = ("--data.root", photos, "--data.image-size", 32, "--data.workers", 0, "--optim.batch-size", 4, "--out", out)
    return cli.run(["study", "mlp", *map(str, (*args, *more))])


@pytest.mark.slow
def test_command(photos, tmp_path, small, capsys):
    out = tmp_path / "study"
    assert run(photos, out, "--seeds", 2) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "study-mlp.json").read_text())
    assert record["budget"]["seeds"] == 2
    assert record["budget"]["data.image_size"] == 32
    assert "1 epoch of 36 images, 2 seeds" in record["budget"]["text"]
    trained = "Every network: optimizer adamw, lr 0.001, schedule cosine, min_lr 1e-06, warmup_epochs 0.2, epochs 1, "
    assert trained in printed
    assert trained in (out / "study-mlp.md").read_text()
    assert [network["key"] for network in record["networks"]] == ["in1k-small-mix", "in1k-small"]
    for network in record["networks"]:
        runs = sorted((out / "runs").glob(f"{network['model']['name']}-depths*/seed-*"))
        rows = [(run / "metrics.csv").read_text().splitlines() for run in runs]
        top1 = [float(dict(zip(head.split(","), last.split(","), strict=True))["val_top1"]) for head, *_, last in rows]
        assert network["top1"] == top1
        assert len(top1) == 2
        assert network["mean"] == pytest.approx(sum(top1) / 2, abs=1e-6)
        assert [json.loads((run / "recipe.json").read_text())["run"]["seed"] for run in runs] == [0, 1]
        assert not any((run / "last.ckpt").exists() for run in runs)
        model = timm.create_model(network["model"]["name"], num_classes=3, **KWARGS)
        assert network["counts"]["params"] == sum(p.numel() for p in model.parameters())
    assert record["verdict"][0] in printed
    assert (out / "study-mlp.png").read_bytes().startswith(b"\x89PNG")

    # repeating the command trains only what is missing
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.csv")}
    missing = next(iter(before))
    missing.unlink()
    (missing.parent / "best.safetensors").unlink()
    assert run(photos, out, "--seeds", 2) == 0
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.csv")}
    assert {path for path in before if before[path] != after[path]} == {missing}
    assert json.loads((out / "study-mlp.json").read_text())["networks"] == record["networks"]  # bit for bit

    # `tables` lists the study, but no row of the paper has these networks
    capsys.readouterr()
    assert cli.run(["tables", "--results", str(tmp_path)]) == 0
    tables = capsys.readouterr().out
    assert f"(1) {record['budget']['text']}" in tables
    assert "(1)" not in tables.split("Parameters", 1)[0]
    assert (out / "study-mlp.md").read_text().count("\n| DualToken-ViT-T") == 2

    # another budget or other data is rejected
    kept = (out / "study-mlp.json").read_bytes()
    for more, message in (
        (
            ("--seeds", 2, "--optim.epochs", 2),
            r"--optim\.epochs is 1 in .*seed-0, not 2: .* share one budget",
        ),
        (
            ("--seeds", 2, "--distill.teacher", "best.safetensors"),
            r"--distill\.teacher is None in .*seed-0, not best\.safetensors",
        ),
        (("--seeds", 1), r"--seeds is 2 in .*study-mlp\.json, not 1"),
    ):
        with pytest.raises(InputError, match=message):
            run(photos, out, *more)
    (photos / "val" / "red" / "0.jpg").rename(photos / "val" / "red" / "another.jpg")
    with pytest.raises(InputError, match=r"runs used other images \(see data\.json\)"):
        run(photos, out, "--seeds", 2)
    assert (out / "study-mlp.json").read_bytes() == kept


@pytest.mark.slow
def test_search_of_the_learning_rate(photos, tmp_path, small, capsys):
    out = tmp_path / "study"
    rates = 1e-9, 1e-2
    assert run(photos, out, "--seeds", 1, "--search-lr", *rates) == 0
    record = json.loads((out / "study-mlp.json").read_text())
    assert "the best of 1e-09, 0.01" in record["budget"]["text"]
    assert "optimizer adamw, lr 1e-09 or 0.01, schedule cosine" in (out / "study-mlp.md").read_text()
    for network in record["networks"]:
        (folder,) = (out / "search").glob(f"{network['model']['name']}-depths*")
        score = {}
        for lr in rates:
            recipe = json.loads((folder / f"lr-{lr:g}" / "recipe.json").read_text())
            assert recipe["data"]["holdout"] == 0.1
            assert recipe["optim"]["lr"] == lr
            assert "33 training and 3 validation images" in (folder / f"lr-{lr:g}" / "train.log").read_text()
            *_, last = csv.DictReader((folder / f"lr-{lr:g}" / "metrics.csv").read_text().splitlines())
            score[lr] = float(last["val_top1"]), -float(last["val_loss"])
        (chosen,) = (out / "runs").glob(f"{folder.name}/seed-0/recipe.json")
        chosen = json.loads(chosen.read_text())
        assert chosen["optim"]["lr"] == network["lr"] == max(rates, key=score.get)
        assert chosen["data"]["holdout"] == 0
    with pytest.raises(InputError, match=r"--search-lr 0\.0: must be at least 1e-12"):
        run(photos, out, "--search-lr", 0.0)
    with pytest.raises(InputError, match=r"--search-lr is \[1e-09, 0\.01\] in .*study-mlp\.json"):
        run(photos, out, "--seeds", 1, "--search-lr", 1e-9)


@pytest.mark.slow
def test_failed_run_is_reported_and_can_be_repeated(photos, tmp_path, small):
    with pytest.raises(
        InputError, match=r"seed-0: 36 training images cannot fill one batch of 40.*see .*train\.log \(and 1 more\)"
    ):
        run(photos, tmp_path / "study", "--optim.batch-size", 40, "--seeds", 1)
    assert run(photos, tmp_path / "study", "--seeds", 1) == 0  # with another budget, as no run had begun


@pytest.fixture
def started(monkeypatch):
    """The processes that a study starts; each runs the command in `started.command` if that is set."""

    class Processes(list):
        command = None

    processes, create = Processes(), asyncio.create_subprocess_exec

    async def recorded(*command, **kwargs):
        processes.append(await create(*(processes.command or command), **kwargs))
        return processes[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", recorded)
    return processes


def test_killed_run_is_reported(photos, tmp_path, small, started):
    started.command = ["sh", "-c", "kill -9 $$"]
    with pytest.raises(InputError, match=r"seed-0: stopped by SIGKILL \(and 1 more\)"):
        run(photos, tmp_path / "study", "--seeds", 1)


def test_a_run_that_cannot_be_started_leaves_the_others_running(photos, tmp_path, small, started):
    """Where its folder belongs to another user; here, its log is a folder."""
    name = "-".join(("dualtoken_vit_tiny_mix", *(f"{key}={value}".replace(" ", "") for key, value in KWARGS.items())))
    (tmp_path / "study" / "runs" / name / "seed-0" / "train.log").mkdir(parents=True)
    started.command = ["sh", "-c", "sleep 1; exit 1"]
    with pytest.raises(InputError, match=r"seed-0: .*train\.log.* \(and 1 more\)"):
        run(photos, tmp_path / "study", "--seeds", 1, "--jobs", 2)
    assert [process.returncode for process in started] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_a_study_stops_its_runs(photos, tmp_path, small, started, number):
    """Each of two parallel runs signals this process and would then go on for minutes."""
    started.command = ["sh", "-c", f"kill -{int(number)} {os.getpid()}; exec sleep 300"]
    with pytest.raises(KeyboardInterrupt):
        run(photos, tmp_path / "study", "--seeds", 2, "--jobs", 2)
    assert {process.returncode for process in started} == {-signal.SIGTERM}


@pytest.mark.parametrize("jobs", [1, 2])
def test_number_of_parallel_runs(photos, tmp_path, small, started, jobs):
    """Each run records its start and end, and waits until at least as many runs have started as may run at once."""
    log = tmp_path / "log"
    wait = f"until [ $(grep -c + {log}) -ge {jobs} ]; do sleep 0.01; done"
    started.command = ["sh", "-c", f"echo +1 >> {log}; {wait}; echo -1 >> {log}; exit 1"]
    with pytest.raises(InputError, match=r"no output; see .* \(and 3 more\)"):
        run(photos, tmp_path / "study", "--seeds", 2, "--jobs", jobs)
    assert max(accumulate(map(int, log.read_text().split()))) == jobs


def test_one_study_at_a_time_in_a_folder(photos, tmp_path, small):
    with in_use(tmp_path), pytest.raises(InputError, match="is in use by another training"):
        run(photos, tmp_path)


def test_a_study_of_fewer_networks_keeps_the_record_of_more(photos, tmp_path, small):
    models = {"in1k-small": ("dualtoken_vit_tiny", []), "in1k-window": ("dualtoken_vit_tiny_mix", ["token_grid=3"])}
    rows = [{"key": key, "model": {"name": name, "args": args}} for key, (name, args) in models.items()]
    (record := tmp_path / "study-mlp.json").write_text(before := json.dumps({"budget": {}, "networks": rows}))
    with pytest.raises(InputError, match=r"--networks: .*mlp\.json also has 'dualtoken_vit_tiny_mix token_grid=3': "):
        run(photos, tmp_path, "--networks", "dualtoken_vit_tiny_mix", "dualtoken_vit_tiny")
    assert record.read_text() == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("token-cuont",), "study 'token-cuont' is unknown; did you mean token-count"),
        (("mlp", "--seeds", "0"), "--seeds 0: must be at least 1"),
        (("mlp", "--model.name", "resnet18"), r"--model\.name: a study trains its own networks"),
        (("peers", "--model.pretrained"), r"--model\.pretrained: a study"),
        (("peers", "--data.dataset", "shapes", "--data.image-size", "100"), "xcit_tiny_12_p16_224: `patch_size`"),
        (("mlp", "--data.dataset", "shapes", "--optim.optimizer", "nothing"), "--optim.optimizer nothing"),
        (("--preset", "gpu", "mlp"), "name the study first"),
        (("mlp", "--data.root", "nowhere"), "nowhere"),
        (
            ("peers", "--networks", "resnet18", "deit_tiny_patch16_224"),
            "--networks 'resnet18': not in this study; .*deit",
        ),
        (("peers", "--networks", "pvt_v2_b0", "pvt_v2_b0"), "--networks pvt_v2_b0: a study compares two or more"),
        (("mlp", "--preset", "equal", "--optim.lr", "0.01"), r"--optim\.lr: --search-lr chooses it"),
        (("mlp", "--preset", "equal", "--optim.lr", "0.01", "--search-lr", "--data.root", "nowhere"), "nowhere"),
        (
            ("mlp", "--preset", "equal", "--data.holdout", "0.1"),
            r"--data\.holdout 0\.1: --search-lr would choose the rates on the images that the study reports; name a",
        ),
        (("mlp", "--preset", "cpu", "--data.holdout", "0.1", "--data.root", "nowhere"), "nowhere"),
        (("mlp", "--data.balanced", "1", "--class-weights", "inverse"), r"--data\.balanced 1, --class-weights inverse"),
    ],
)
def test_mistakes(args, message, tmp_path):
    with pytest.raises(InputError, match=message):
        cli.run(["study", *args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_presets_are_defaults(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("dualtoken_vit.paper.study.study", lambda *args: seen.append(args))
    cli.run(["study", "mlp", "--preset=gpu", "--optim.epochs", "3"])
    cli.run(["study", "mlp"])
    for (name, chosen), preset, epochs in zip(seen, ("gpu", "cpu"), (3, 1), strict=True):
        default = PRESETS[preset][1]
        assert (name, chosen.base, chosen.seeds) == ("mlp", default.base, default.seeds)
        assert chosen.recipe.optim.epochs == epochs
        assert chosen.recipe.data == default.recipe.data


def test_damaged_result(tmp_path):
    with pytest.raises(InputError, match="--results nowhere: no such folder"):
        cli.run(["tables", "--results", "nowhere"])
    for text in ("{", '{"table": "Table 6", "budget": {}, "networks": [{}]}', 200_000 * "["):
        (tmp_path / "study-x.json").write_text(text)
        with pytest.raises(InputError, match=r"study-x\.json: not a result of `study`"):
            cli.run(["tables", "--results", str(tmp_path)])


def test_the_folder_of_the_images_may_be_written_in_any_way(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    found = []
    for root in (photos.name, f"{photos.name}/", f"./{photos.name}", str(photos)):
        train, val = build_datasets(ClassificationData(root=root), 3)
        found.append(study._fingerprint(train, val, root))
    assert found[0] == found[1] == found[2] == found[3]
    names = [
        f"/{path.relative_to(photos).as_posix()}" for part in ("train", "val") for path in sorted_files(photos / part)
    ]
    assert found[0]["names"] == hashlib.sha256("\n".join(names).encode()).hexdigest()


def sorted_files(folder):
    return [path for group in sorted(folder.iterdir()) for path in map(Path, image_files(group))]


def test_runs_that_no_rate_of_the_search_made_are_found_before_it(photos, tmp_path, small, monkeypatch):
    ((_, model), _) = study.networks()
    folder = tmp_path / "runs" / "-".join((model.name, *model.args)) / "seed-0"
    monkeypatch.setattr(study, "_run", lambda *args: pytest.fail("trained"))
    base = PRESETS["cpu"][1].recipe
    write_recipe(folder, replace(base, optim=replace(base.optim, lr=0.5)), "folder")
    (folder / "metrics.csv").write_text("epoch,val_top1,val_loss\n1,0.5,1\n")
    with pytest.raises(InputError, match=r"--.* is .* in .*seed-0"):
        run(photos, tmp_path, "--search-lr", "1e-3", "2e-3")


def test_a_rate_given_twice(photos, tmp_path, small):
    with pytest.raises(InputError, match=r"--search-lr 0\.001 0\.001: one is given twice"):
        run(photos, tmp_path, "--search-lr", "1e-3", "1e-3")


def test_a_damaged_record(photos, tmp_path, small):
    for text in ('{"budget": {', 200_000 * "["):
        (tmp_path / "study-mlp.json").write_text(text)
        with pytest.raises(InputError, match=r"study-mlp\.json: damaged \(.*\); repair or remove it"):
            run(photos, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"budget": {"seeds": "x"}, "networks": []}',
        '{"budget": {}, "networks": [3]}',
        '{"budget": [1], "networks": []}',
    ],
)
def test_a_record_of_something_else(photos, tmp_path, small, content):
    (tmp_path / "study-mlp.json").write_text(content)
    with pytest.raises(InputError, match=r"study-mlp\.json: not the results of a study; repair or remove it"):
        run(photos, tmp_path)


def test_the_paper_s_network_is_named_where_a_smaller_one_stands_for_it():
    small = Published("Table 6", "DualToken-ViT-S", "key", "1", "1", "79.5")
    tiny = replace(result("DualToken-ViT-T", 79.5, 0.5), published=small)
    lines = judged([tiny, result("other", 70, 0.4)])
    assert lines[0] == "Best network: DualToken-ViT-T, 50.0 %; in the paper: DualToken-ViT-S, 79.5 %."
    assert "published %, of S" in table_of([tiny], True)
