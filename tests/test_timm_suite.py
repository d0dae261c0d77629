"""timm's own model tests (`tests/test_models.py` of its source distribution) on our five architectures."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

# A lower count means that the plugin or an import failed, even if all tests pass.
TESTS_PER_MODEL, MODELS = 11, 5
TESTS_PER_WEIGHTS, WEIGHTS = 3, 2  # the cfg of their tag, loading them, and features from them


def _download(version: str, folder: Path) -> None:
    """Extract `tests/` and `pyproject.toml` of timm's sources to `folder`; `timm/` would shadow the installed one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as tmp:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", "--dest", tmp]
        subprocess.run([*command, f"timm=={version}"], check=True, capture_output=True, text=True, timeout=120)
        (archive,) = Path(tmp).glob("timm-*.tar.gz")
        root = f"timm-{version}"
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar if m.name.startswith((f"{root}/tests/", f"{root}/pyproject.toml"))]
            tar.extractall(tmp, members=wanted, filter="data")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(tmp) / root).rename(folder)


@pytest.fixture(scope="module")
def timm_tests(tmp_path_factory) -> Path:
    """A folder with timm's `tests/`: from `DUALTOKEN_TIMM_TESTS`, or downloaded once to the user's cache."""
    if given := os.environ.get("DUALTOKEN_TIMM_TESTS"):
        folder = tmp_path_factory.mktemp("timm")
        shutil.copytree(Path(given) / "tests", folder / "tests")
        shutil.copy(Path(given) / "pyproject.toml", folder)
        return folder
    version = importlib.metadata.version("timm")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "dualtoken-vit" / f"timm-{version}"
    if not (folder / "tests" / "test_models.py").exists():
        try:
            _download(version, folder)
        except (subprocess.SubprocessError, OSError) as error:
            reason = (
                f"cannot download the source distribution of timm {version}: {getattr(error, 'stderr', '') or error}"
            )
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(f"{reason}\n(set DUALTOKEN_TIMM_TESTS to a folder that contains its tests/ and pyproject.toml)")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_timm_model_suite(timm_tests):
    # GITHUB_ACTIONS would skip three of the tests.
    env = {key: value for key, value in os.environ.items() if key != "GITHUB_ACTIONS"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env.pop("PYTEST_ADDOPTS", None)
    plugins = ["-p", "timm_plugin", "-p", "no:cacheprovider", "-p", "no:timeout"]  # a slow machine must not fail
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "-c", "pyproject.toml", "tests/test_models.py"]
    run = subprocess.run(command, cwd=timm_tests, env=env, capture_output=True, text=True)
    report = run.stdout + run.stderr
    assert run.returncode == 0, report
    summary = re.search(r"(\d+) passed.*", run.stdout)
    assert summary is not None, report
    assert int(summary[1]) == TESTS_PER_MODEL * MODELS + TESTS_PER_WEIGHTS * WEIGHTS, report
    assert "skipped" not in summary[0], report
