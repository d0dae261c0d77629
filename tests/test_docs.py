"""README and documentation are true: every command and every Python block runs, every link leads somewhere.

Commands run as they are written, on small data of the names that the pages use, with the settings of `shrink`, which
make networks tiny and runs short. The results pages are records of measurements: theirs are not run.
"""

import re
import shlex
import shutil
from dataclasses import replace
from functools import wraps
from pathlib import Path
from statistics import mean

import nbformat
import numpy as np
import pytest
import timm
import torch
from helpers import save_scenes
from nbclient import NotebookClient
from PIL import Image
from timm.data import create_transform, resolve_data_config

from dualtoken_vit import cli
from dualtoken_vit.cli_help import EXAMPLES
from dualtoken_vit.data import detection, tables
from dualtoken_vit.data.shapes import CLASSES
from dualtoken_vit.paper.tables import PUBLISHED
from dualtoken_vit.recipes import RECIPES, SplitData
from dualtoken_vit.show.video import VideoWriter
from dualtoken_vit.tasks import trainer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("[!_]*/**/*.md")), ROOT / "docs/index.md"]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "REPRODUCTION.md", "SECURITY.md", "results/README.md")]
TINY = ("dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32")
FILES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in (*PAGES, *OTHERS)}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The lines of shell blocks, continued lines joined, comments removed."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip() and not line.startswith("#")]


def ours(command):
    """The arguments of `dualtoken-vit` in a command, or None; of torchrun and srun, those of one process."""
    found = re.search(r"(?:^|-m |\d )dualtoken[-_]vit(?:\.cli)? (.*)", command)
    return shlex.split(found[1].partition(" > ")[0]) if found else None


COMMANDS = {
    name: [args for command in commands(text) if (args := ours(command))]
    for name, text in FILES.items()
    if "results" not in name
}
COMMANDS["--help"] = [shlex.split(example.partition(" > ")[0]) for each in EXAMPLES.values() for example in each]


def shrink(recipe):
    """The recipe with a tiny network, small images, and one step or two."""
    model = recipe.model
    if model.name.startswith("dualtoken"):
        args = [arg for arg in model.args if not arg.startswith(("dims", "depths"))]
        model = replace(model, args=(*args, *TINY))
    model = replace(model, pretrained=False)
    data = replace(recipe.data, workers=0)
    sizes = {
        "image_size": 64,
        "max_size": 96,
        "crop_size": (64, 64),
        "limit": 4,
        "start_size": None,
        "val_split": "val",
    }
    data = replace(data, **{key: value for key, value in sizes.items() if hasattr(data, key)})
    optim = replace(recipe.optim, epochs=1, batch_size=4, warmup_epochs=0, warmup_steps=0, milestones=())
    run = replace(recipe.run, device="cpu", devices=1, nodes=1, precision="32-true", max_minutes=None)
    return replace(recipe, model=model, data=data, optim=optim, run=run)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the data and runs that the pages use, and the settings of `shrink`."""
    root = tmp_path_factory.mktemp("workspace")
    rng = np.random.default_rng(0)

    def image(path, side=48):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)

    for split, count in (("train", 5), ("val", 4)):
        for name in ("cat", "dog"):
            for number in range(count):
                image(root / "photos" / split / name / f"{number}.jpg")
        for number in range(4):
            image(root / "labelled" / split / f"{number}.jpg")
    rows = [
        f"{split}/{n}.jpg,{split},{'cat' if n % 2 else 'cat,dog'!r}" for split in ("train", "val") for n in range(4)
    ]
    (root / "labelled/labels.csv").write_text("\n".join(["file,split,labels", *rows]).replace("'", '"'))
    save_scenes(root / "scenes", 64, train=4, val=3)
    detection.save_scenes(root / "cells", 64, train=4, val=3)
    shutil.copytree(root / "photos/val/cat", root / "new-photos")
    shutil.copy(root / "photos/val/cat/0.jpg", root / "image.jpg")
    with VideoWriter(root / "clip.mp4", 5) as clip:
        for number in range(2):
            clip.add(number / 5, Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)))
    folder = shrink(RECIPES["folder"])
    data = replace(folder.data, root=str(root / "photos"))
    for name, args in (("photos", ()), ("large", ()), ("position", ()), ("normal", ("global_tokens=normal",))):
        network = "dualtoken_vit_tiny" if args else folder.model.name
        model = replace(folder.model, name=network, args=(*TINY, *args))
        trainer.train(replace(folder, model=model, data=data), root / "runs" / name)
    lite = shrink(RECIPES["coco-lite"])
    trainer.train(replace(lite, data=replace(lite.data, root=str(root / "cells"))), root / "runs/objects")
    masks = shrink(RECIPES["masks-lite"])
    trainer.train(replace(masks, data=replace(masks.data, root=str(root / "scenes"))), root / "runs/masks")
    return root


@pytest.fixture
def inside(workspace, monkeypatch):
    """Work in the workspace, with trainings and measurements as short as they can be."""
    train = trainer.train
    benchmark = cli.function("benchmark")

    @wraps(benchmark)
    def short(*models, **options):
        options |= {"rounds": 1, "visit_seconds": 0.01, "modes": ("eager",), "batch_sizes": (1,), "memory": False}
        options |= {"input_sizes": ("64",), "precision": ("float32",)}
        return benchmark(*models, **options)

    def small(recipe, out, resume, name):
        train(recipe if resume else shrink(recipe), out, resume, name)

    monkeypatch.setattr(trainer, "train", small)
    monkeypatch.setattr("dualtoken_vit.paper.benchmark.benchmark", short)
    monkeypatch.setattr("dualtoken_vit.paper.tables.PUBLISHED", PUBLISHED[:4])
    monkeypatch.setattr("dualtoken_vit.evaluation.fit_temperature", lambda *found: 1.5)  # so short a run is at chance
    monkeypatch.chdir(workspace)
    return workspace


@pytest.fixture(scope="module")
def ran():
    """The commands that ran for a page before: many are on several pages."""
    return set()


def runs(args):
    """Whether the command can be run: studies start many processes, and some data are not here."""
    return args[0] != "study" and not {"imagenet", "tiny-imagenet-200", "RECIPE"} & {*args}


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, found in COMMANDS.items() if any(map(runs, found))])
def test_the_commands_of_the_documentation_run(page, inside, ran):
    for args in COMMANDS[page]:
        if not runs(args) or tuple(args) in ran:
            continue
        ran.add(tuple(args))
        out = Path(args[args.index("--out") + 1]) if "--out" in args else None
        if "--calibrate" in args:  # changes the file
            args = [args[0], shutil.copy(args[1], "calibrated.safetensors"), *args[2:]]
        if args[0] == "convert":
            shutil.rmtree(args[2], ignore_errors=True)
        if args[0] == "train" and "--resume" not in args:
            shutil.rmtree(out or Path("runs", args[1]), ignore_errors=True)
        if args[0] == "completion":  # tyro prints the script and exits
            with pytest.raises(SystemExit) as ended:
                cli.run(args)
            assert not ended.value.code
            continue
        assert cli.run(args) == 0, args
        assert out is None or out.exists(), args


@pytest.mark.slow
def test_the_python_commands_of_the_readme_run(inside, capfd):
    cli.run(["export", "runs/photos/best.safetensors", "--out", "model.onnx"])
    lines = "".join(blocks(FILES["README.md"], "sh")).splitlines()
    codes = [shlex.split(line)[2] for line in lines if line.startswith("python -c")]
    for code in codes:
        exec(code, {})
    assert capfd.readouterr().out.split()[-1] in ("cat", "dog")
    assert len(codes) == 1


@pytest.mark.parametrize("page", COMMANDS)
def test_the_commands_of_the_documentation_are_understood(page, monkeypatch, tmp_path):
    """Of `train` and `study`; commands on checkpoints need these, and run in the slow test."""
    parsed = []
    monkeypatch.setattr(trainer, "train", lambda recipe, *args, **kwargs: parsed.append(recipe))
    monkeypatch.setattr("dualtoken_vit.paper.study.study", lambda name, study: parsed.append(study))
    monkeypatch.setattr("dualtoken_vit.tasks.run_folder.stored_recipe", lambda out, named: RECIPES[named])
    monkeypatch.setattr(cli, "check_path", lambda path: None)  # checkpoints
    monkeypatch.setattr(SplitData, "check_place", lambda data: None)
    monkeypatch.chdir(tmp_path)
    args = [each for each in COMMANDS[page] if each[0] in ("train", "study") and each[1:2] != ["RECIPE"]]
    for each in args:
        cli.run(each)
    assert len(parsed) == len(args)
    assert all(each[0] in cli.COMMANDS for each in COMMANDS[page])


@pytest.mark.parametrize("page", [name for name, text in FILES.items() if blocks(text, "python")])
def test_the_python_of_the_documentation_runs(page):
    names = {}
    for block in blocks(FILES[page], "python"):
        if "runs/" not in block:  # needs a trained network, see below
            exec(block, names)
    if page == "README.md":
        assert [tuple(m.shape) for m in names["maps"]] == [(1, 48, 20, 28), (1, 96, 10, 14), (1, 192, 5, 7)]
        assert names["model"](torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    if page == "docs/guides/python.md":
        assert names["logits"].shape == (2, 10)
        assert names["backbone"].feature_info.channels() == [48, 96, 192]
        assert names["unet"](torch.zeros(2, 3, 64, 96)).shape == (2, 2, 64, 96)
        assert names["labels"].shape == (200, 300)
        assert set(names["detections"][0]) == {"boxes", "labels", "scores", "masks"}
    if page == "docs/guides/attention.md":
        assert names["attended"]["stages.2.blocks.5"].shape == (2, 7, 7, 7, 7)


@pytest.mark.slow
def test_the_python_of_the_documentation_runs_on_a_trained_network(inside):
    cli.run(["export", "runs/photos/best.safetensors"])
    cli.run(["export", "runs/objects/best.safetensors", "--images", "cells/images"])
    shutil.rmtree("runs/photos/hub", ignore_errors=True)
    for text in FILES.values():
        for block in blocks(text, "python"):
            if "runs/" in block and "checkpoint_path" not in block:
                names = {}
                exec(block, names)
                assert "result" not in names or names["result"].name in ("cat", "dog")


def test_the_tables_of_the_documentation_are_read(tmp_path):
    """The examples as they are printed, and the names of columns, all of them and no others."""
    text = FILES["docs/guides/data.md"]
    images = [f"{place}.jpg" for place in ("cats/1", "dogs/7", "1", "2")]
    for name in images:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = []
    for table in re.findall(r"^```\n(file,.*?)^```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / "labels.csv").write_text(table)
        for split in ("train", "val"):
            one = tables.read_labels(tmp_path, split, "," if "labels" in table else None)
            files = [Path(file).relative_to(tmp_path).as_posix() for file in one.files]
            found.append((split, files, [tuple(one.class_names[label] for label in each) for each in one.labels]))
    assert found == [
        ("train", images[:1], [("cat",)]),
        ("val", images[1:2], [("dog",)]),
        ("train", images[2:3], [("cat", "dog")]),
        ("val", images[3:], [("cat",)]),
    ]
    listed = [set(re.findall(r"`(\w+)`", row.split("|")[2])) for row in text.splitlines() if "|" in row]
    assert all(set(names) in listed for names in (tables.FILE, tables.CLASS, tables.SPLIT))


def test_the_make_targets_and_extras_of_the_documentation_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for text in FILES.values():
        for target in re.findall(r"^make ([\w-]+)", "\n".join(commands(text)), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for extra in re.findall(r"pip install .*\[(\w+)\]", text):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def anchors(text):
    """The anchors of the headings of a page, as GitHub and MyST name them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page, text):
    """(link, file, anchor) of each link of a page that does not leave the repository."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for link in (a or b for a, b in found):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            yield link, (ROOT / page).parent / path if path else ROOT / page, anchor


CARDS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("dualtoken_vit/weights/*.md"))]
LINKED = [*FILES, *CARDS, "CHANGELOG.md", "web/README.md"]


@pytest.mark.parametrize("page", LINKED)
def test_the_links_of_the_documentation_lead_somewhere(page):
    """On GitHub, which does not include files: an anchor is a heading of the very file."""
    for link, target, anchor in links(page, (ROOT / page).read_text(encoding="utf-8")):
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_links_of_the_site_lead_to_the_pages_that_include_files_of_the_repository(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs/_ext"))
    from pages import INCLUDED, for_site

    assert len(INCLUDED) == 5
    for page in PAGES[1:]:
        name = page.relative_to(ROOT).as_posix()
        text = for_site(page, FILES[name])
        assert "On GitHub" not in text
        for link, target, anchor in links(name, text):
            assert target.suffix != ".md" or target.resolve().is_relative_to(ROOT / "docs"), link
            if anchor and (included := re.search(r"\{include\} (\S+)", target.read_text(encoding="utf-8"))):
                assert anchor in anchors((target.parent / included[1]).read_text(encoding="utf-8")), link
    tutorial = ROOT / "docs/tutorials/classification.md"
    assert "](../results/index.md#wrong-labels)" in for_site(tutorial, "](../../results/README.md#wrong-labels)")
    included = for_site(ROOT / "results/README.md", "](../REPRODUCTION.md#the-ablations) [](../docs/guides/data.md)")
    assert included == "](../explanation/reproduction.md#the-ablations) [](../docs/guides/data.md)"


def test_the_reference_has_every_recipe_and_command():
    for recipe in RECIPES.values():
        page = f"docs/reference/recipes/{recipe.task}.md"
        if page in FILES:  # other tests may register more tasks
            assert f"{{flags}} train {recipe.task}" in FILES[page]
    assert {recipe.task for recipe in RECIPES.values()} >= {"classification", "multilabel", "detection", "segmentation"}
    for command in cli.COMMANDS:
        assert f"\n## {command}\n" in FILES["docs/reference/command-line.md"] or command == "completion"


def test_the_figures_are_those_of_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import network_figure
    import plots

    for theme in ("light", "dark"):
        file = ROOT / "docs/images" / f"network-{theme}.svg"
        assert file.read_text(encoding="utf-8") == network_figure.draw(theme)
    found = {name: (round(ms), round(mean(top1), 2)) for name, ms, top1 in plots.points()}
    assert found["DualToken-ViT-T (mix)"] == (32, 70.0)  # of the tables in results/
    assert found["XCiT-T12"] == (38, 72.82)
    assert all((ROOT / "docs/images" / f"{name}.png").is_file() for name in plots.FIGURES)


def test_the_figure_of_the_stages_shows_what_the_network_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import stages_figure

    x, downsampled, attention, g = stages_figure.follow()
    model = timm.create_model("dualtoken_vit_tiny_mix", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4))
    transform = create_transform(**resolve_data_config({"input_size": (3, 224, 224)}, model=model), is_training=False)
    with torch.inference_mode():
        pyramid = model.eval()(transform(stages_figure.IMAGE)[None])
    for found, expected in zip((x[0], *x[2:]), pyramid, strict=True):  # without the last map of the stem
        torch.testing.assert_close(found, expected[0].permute(1, 2, 0), atol=1e-4, rtol=1e-4)
    assert [tuple(each.shape) for each in downsampled] == [(7, 7, 48), (7, 7, 96), (7, 7, 192)]
    assert [tuple(each.shape) for each in g] == [(7, 7, 48), (7, 7, 48), (7, 7, 96), (7, 7, 192)]
    for each in attention:
        torch.testing.assert_close(each.sum((2, 3)), torch.ones(each.shape[:2]))
    tokens = x[2].flatten(0, 1).numpy()
    _, directions = np.linalg.eigh(np.cov(tokens.T))  # the last ones have the largest variance
    components = (tokens - tokens.mean(0)) @ directions[:, :-4:-1]
    expected = np.abs(components / components.std(0, ddof=1) / 4).clip(0, 0.5)
    assert np.abs(stages_figure.colours(x[2]).flatten(0, 1).numpy() - 0.5) == pytest.approx(expected, abs=1e-3)
    assert (ROOT / "docs/images/stages.png").is_file()


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    """With one epoch of fewer images."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "docs/notebooks/demo.ipynb", as_version=4)
    assert all(cell.cell_type == "markdown" or not cell.outputs for cell in notebook.cells)  # kept without outputs
    text = nbformat.writes(notebook).replace("epochs = 6", "epochs = 1").replace("workers=0", "workers=0, per_class=16")
    done = NotebookClient(nbformat.reads(text, as_version=4), timeout=300).execute()
    printed = "".join(each.get("text", "") for cell in done.cells for each in cell.get("outputs", ()))
    assert re.search(r"top-1 \d+\.\d\d%", printed)
    shown = re.findall(r"^(\w+) \((.*)\) \[", printed, re.MULTILINE)
    assert len(shown) == 4
    assert {name for name, _ in shown} <= {*CLASSES}
    assert any("image/png" in each.get("data", {}) for each in done.cells[-1].outputs)
