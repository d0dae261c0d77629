"""Studies: what their verdicts say of numbers worked out by hand, and the command on real runs of small networks."""

import json
import math

import pytest

from dualtoken_vit import cli, study
from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Model
from dualtoken_vit.study import PRESETS, STUDIES, Result, networks, pooled, verdict
from dualtoken_vit.tables import PUBLISHED, Published


def result(name, published, *top1):
    return Result(Published("Table 0", name, name, "1", "1", str(published)), name, Model(), top1)


def test_spread_is_pooled_within_networks():
    results = [result("a", 70, 0.50, 0.54), result("b", 71, 0.60, 0.60, 0.66)]
    squares = 2 * 0.02**2 + (2 * 0.02**2 + 0.04**2)  # means 0.52 and 0.62; five runs, two means
    assert pooled(results) == pytest.approx(math.sqrt(squares / 3))
    assert results[0].spread == pytest.approx(0.02 * math.sqrt(2))
    assert pooled([result("a", 70, 0.5), result("b", 71, 0.6)]) is None


def test_verdict():
    # standard deviation 0.01 * sqrt(2) pooled, so two standard errors of a difference of means are 0.0283
    better = [result("a", 70, 0.50, 0.52), result("b", 71, 0.60, 0.62), result("c", 72, 0.70, 0.72)]
    lines = verdict(better)
    assert lines[0] == "Best here: c, 71.0%; in the paper: c, 72 %."
    assert lines[1] == "Of 3 pairs of networks 3 come out in the paper's order, 0 the other way round."
    assert "1.41%): 3 in the paper's order, 0 the other way round" in lines[2]
    assert lines[-1] == "The paper's order holds."
    lines = verdict([result("a", 70, 0.50, 0.52), result("b", 71, 0.47, 0.49), result("c", 72, 0.51, 0.53)])
    assert "2 come out in the paper's order, 1 the other way round" in lines[1]
    assert "Clearly against it: b over a (-3.0%)." in lines
    assert lines[-1] == "The paper's order does not hold at this budget."
    lines = verdict([result("a", 70, 0.50, 0.52), result("b", 71, 0.48, 0.50)])
    assert lines[-1] == "This budget does not decide about the paper's order."
    lines = verdict([result("a", 70, 0.50), result("b", 71, 0.60)])
    assert "One seed: what is chance cannot be told." in lines
    lines = verdict([result("a", 79.2, 0.50, 0.52), result("b", 79.2, 0.60, 0.62)])  # the paper has no order
    assert lines[1].startswith("Of 0 pairs")


def test_networks_are_the_papers():
    counts = {"global-tokens": 3, "token-count": 7, "local-attention": 2, "downsampling": 2, "mlp": 2, "peers": 11}
    assert {name: len(networks(name, "small")) for name in STUDIES} == counts
    for name in STUDIES:
        assert all(row.table == STUDIES[name][0] for row, _ in networks(name, "small"))
    small, tiny = (dict(zip("ab", networks("local-attention", base), strict=True)) for base in ("small", "tiny"))
    assert small["a"][1] == Model(name="dualtoken_vit_small_mix", args=("local_attention=window",))
    assert tiny["a"][1] == Model(name="dualtoken_vit_tiny_mix", args=("local_attention=window",))
    assert networks("peers", "tiny") == networks("peers", "small")
    for preset in PRESETS.values():
        assert preset.seeds > 1
    with pytest.raises(InputError, match="there is no study 'tokens'"):
        networks("tokens", "small")


@pytest.fixture
def small(monkeypatch):
    """Two shallow networks in place of a study's."""
    rows = [row for row in PUBLISHED if row.key in ("in1k-small-mix", "in1k-small")]
    args = ("depths=(1,1,1)", "dims=(8,16,24)", "num_heads=(1,2,3)")
    names = ("dualtoken_vit_tiny_mix", "dualtoken_vit_tiny")
    chosen = [(row, Model(name=name, args=args)) for row, name in zip(rows, names, strict=True)]
    monkeypatch.setattr(study, "networks", lambda name, base: chosen)


def run(photos, out, *more):
    args = ("--data.root", photos, "--data.image-size", 32, "--data.workers", 0, "--optim.batch-size", 4, "--out", out)
    return cli.run(["study", "mlp", *map(str, (*args, *more))])


@pytest.mark.slow
def test_the_command(photos, tmp_path, small, capsys):
    out = tmp_path / "study"
    assert run(photos, out, "--seeds", 2) == 0
    said = capsys.readouterr().out
    record = json.loads((out / "study-mlp.json").read_text())
    assert record["budget"]["seeds"] == 2
    assert record["budget"]["data.image_size"] == 32
    assert "1 epoch of 36 pictures, 2 seeds" in record["budget"]["text"]
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
    assert record["verdict"][0] in said
    assert (out / "study-mlp.png").read_bytes().startswith(b"\x89PNG")

    # a second call trains only what is missing
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.csv")}
    missing = next(iter(before))
    missing.unlink()
    (missing.parent / "best.safetensors").unlink()
    assert run(photos, out, "--seeds", 2) == 0
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.csv")}
    assert {path for path in before if before[path] != after[path]} == {missing}
    assert json.loads((out / "study-mlp.json").read_text())["networks"] == record["networks"]  # the same, bit by bit

    # accuracies stand in the paper's tables
    capsys.readouterr()
    assert cli.run(["tables", "--results", str(tmp_path)]) == 0
    tables = capsys.readouterr().out
    assert f"{100 * record['networks'][1]['mean']:.1f} (a)" in tables
    assert record["budget"]["text"] in tables

    with pytest.raises(InputError, match=r"--optim.epochs is 1 in the run in .*not 2"):
        run(photos, out, "--optim.epochs", 2)


def test_a_run_that_fails_is_named(photos, tmp_path, small):
    with pytest.raises(InputError, match=r"seed-0: --optim\.optimizer nothing.*see .*train\.log"):
        run(photos, tmp_path / "study", "--optim.optimizer", "nothing", "--jobs", 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("token-cuont",), "there is no study 'token-cuont'; did you mean token-count"),
        (("mlp", "--seeds", "0"), "--seeds 0: must be at least 1"),
        (("mlp", "--model.name", "resnet18"), "the study chooses the networks"),
        (("mlp", "--data.root", "nowhere"), "nowhere"),
    ],
)
def test_mistakes(args, message, tmp_path):
    with pytest.raises(InputError, match=message):
        cli.run(["study", *args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_presets_are_defaults(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("dualtoken_vit.study.study", lambda *args: seen.append(args))
    cli.run(["study", "mlp", "--preset", "gpu", "--optim.epochs", "3"])
    cli.run(["study", "mlp"])
    for (name, recipe, base, seeds, *_), preset, epochs in zip(seen, ("gpu", "cpu"), (3, 1), strict=True):
        assert (name, base, seeds) == ("mlp", PRESETS[preset].base, PRESETS[preset].seeds)
        assert recipe.optim.epochs == epochs
        assert recipe.data == PRESETS[preset].recipe.data


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "study-x.json").write_text("{")
    with pytest.raises(InputError, match=r"study-x\.json is not what `study` writes"):
        cli.run(["tables", "--results", str(tmp_path)])
