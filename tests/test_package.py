"""The package as it is published: what the wheel holds, and that each extra names all that its part needs."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dualtoken_vit

ROOT = Path(__file__).parents[1]
DIST = "dualtoken-vit"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the source archive of the files that git knows."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a clone")
    for name in names.stdout.splitlines():
        if name.startswith(("dualtoken_vit", "pyproject", "README", "LICENSE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    subprocess.run(build, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory):
    """The wheel's files, unpacked into an otherwise empty folder, as pip installs them."""
    folder = tmp_path_factory.mktemp("installed")
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.slow
def test_the_archives_are_valid_and_complete(built, wheel):
    checked = [sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2
    assert sorted(path.name for path in built.iterdir()) == [
        f"dualtoken_vit-{dualtoken_vit.__version__}-py3-none-any.whl",
        f"dualtoken_vit-{dualtoken_vit.__version__}.tar.gz",
    ]
    listed = subprocess.run(["git", "ls-files", "dualtoken_vit*"], cwd=ROOT, capture_output=True, text=True)
    packed = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in packed if ".dist-info" not in name} == {
        name for name in listed.stdout.splitlines() if (ROOT / name).is_file()
    }
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def requirements(wheel, extra):
    """Names of all packages that the wheel with an extra requires, theirs included."""
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    lines = re.findall(r"^Requires-Dist: (.*)", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    todo, found = [(DIST, (extra,))], set()
    while todo:
        name, extras = todo.pop()
        for line in lines if name == DIST else distribution(name).requires or ():
            wanted = Requirement(line)
            marker = wanted.marker
            if marker and not any(marker.evaluate({"extra": each}) for each in (*extras, "")):
                continue
            entry = canonicalize_name(wanted.name), tuple(sorted(wanted.extras))
            if entry not in found:
                found.add(entry)
                todo.append(entry)
    return {name for name, _ in found} - {DIST}


# `sitecustomize` is imported at the start of Python: other packages than those of the extra are then unknown to it.
LIMIT = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


@classmethod
def limited(cls, name, path=None, target=None):
    if path is None and name in {blocked!r}:
        return None
    return find_spec(name, path, target)


PathFinder.find_spec = limited
"""
TINY = "--model.args", "dims=(16,32,32)", "depths=(1,1,1)", "head_hidden_size=32", "--run.device", "cpu"
SMOKE = {
    "": ["env"],
    "models": """
import timm, torch, dualtoken_vit
assert timm.create_model("dualtoken_vit_tiny", num_classes=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
""",
    "train": ["train", "folder", "--data.root", "photos", "--data.image-size", "32", "--optim.epochs", "1", *TINY],
    "export": ["export", "runs/folder/best.safetensors"],
    "runtime": ["predict", "runs/folder/model.onnx", "photos/val/red/0.jpg", "--json"],
}


@pytest.mark.slow
def test_each_extra_is_enough_for_its_part(wheel, photos, tmp_path):
    """The wheel with an extra's packages, and no others: in a process that cannot import them.

    The packages are those of the environment of the tests: `test_each_extra_installs` installs them anew.
    """
    modules = packages_distributions()
    for extra, smoke in SMOKE.items():
        allowed = requirements(wheel, extra)
        blocked = {m for m, names in modules.items() if not {canonicalize_name(name) for name in names} & allowed}
        blocked -= {"dualtoken_vit", "dualtoken_vit_command", "_distutils_hack", "pkg_resources"}
        site = tmp_path / f"site-{extra}"
        site.mkdir()
        (site / "sitecustomize.py").write_text(LIMIT.format(blocked=blocked))
        if isinstance(smoke, list):
            args = ["dualtoken-vit", *smoke]
            smoke = f"import sys, dualtoken_vit_command\nsys.argv = {args!r}\ndualtoken_vit_command.main()"
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, wheel))), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", smoke]
        done = subprocess.run(command, capture_output=True, text=True, cwd=photos.parent, env=env)
        assert done.returncode == 0, (extra, done.stderr)
        if extra == "runtime":
            assert "torch" in blocked
            assert '"class": ' in done.stdout
        if extra == "":
            assert "numpy" in blocked
            assert f"{dualtoken_vit.__version__}" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("DUALTOKEN_INSTALL" not in os.environ, reason="downloads torch: make test-wheel")
def test_each_extra_installs(built, photos, tmp_path):
    """By pip into an empty environment, one after the other, as each includes those before it; runtime into its own."""
    (file,) = built.glob("*.whl")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for extra, smoke in SMOKE.items():
        if extra in ("", "runtime"):
            venv.create(tmp_path / "env", clear=True, with_pip=True)
        (programs,) = (path for path in (tmp_path / "env").iterdir() if path.name in ("bin", "Scripts"))
        install = ["-m", "pip", "install", "--quiet", f"{file}[{extra}]" if extra else file]
        subprocess.run([programs / "python", *install], check=True, env=env)
        program, *args = ["dualtoken-vit", *smoke] if isinstance(smoke, list) else ["python", "-c", smoke]
        done = subprocess.run([programs / program, *args], capture_output=True, text=True, cwd=photos.parent, env=env)
        assert done.returncode == 0, (extra, done.stderr)
        print(f"-- {extra or 'core'}:\n{done.stdout}")  # for `make test-wheel`, which shows it
        if extra == "":
            assert dualtoken_vit.__version__ in done.stdout
        if extra == "runtime":
            assert '"class": ' in done.stdout
    shutil.rmtree(tmp_path / "env")  # gigabytes, with CUDA
