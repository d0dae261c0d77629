"""What the project promises outside its modules: the bare install, and a list of files that is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Files")[1].split("```")[1]
# A module that is None in sys.modules cannot be imported: as if the train extra were not installed.
BARE = """
import sys
for name in ("lightning", "matplotlib", "rich", "tensorboard", "torchmetrics", "tyro"):
    sys.modules[name] = None
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_models_need_torch_and_timm_only():
    done = python(
        BARE + "import dualtoken_vit, timm\n"
        "timm.create_model('dualtoken_vit_tiny', global_tokens='normal', local_attention='window')\n"
        "print(sorted(name for name in sys.modules if name.startswith('dualtoken_vit')))"
    )
    assert done.stderr == ""
    loaded = set(re.findall(r"'([\w.]+)'", done.stdout))
    models = {f"dualtoken_vit.models.{name}" for name in ("ablations", "dualtoken", "layers", "lightvit", "two_stream")}
    assert loaded == {"dualtoken_vit", "dualtoken_vit.models", *models}


def test_the_command_says_in_one_line_what_to_install():
    done = python(BARE + "sys.argv = ['dualtoken-vit', 'tables']\nfrom dualtoken_vit.cli import main\nmain()")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert 'pip install -e ".[train]"' in done.stderr


def test_contributing_lists_every_module_and_folder():
    listed = set(re.findall(r"^  (\S+) ", TREE, re.MULTILINE))
    package = ROOT / "dualtoken_vit"
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert listed == {path.name for path in package.glob("*.py")} | folders


def test_the_files_that_contributing_lists_are_those_of_the_repository():
    """In both directions: nothing kept is left out, nothing listed is not kept."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a clone")
    kept = set(done.stdout.splitlines()) - {"README.md", ".gitignore"}
    listed = re.findall(r"^([^\s/]\S*)(?: {2,}\S|$)", TREE, re.MULTILINE)
    assert {name for name in kept if not name.startswith(tuple(listed))} == set()
    assert [name for name in listed if not any(path.startswith(name) for path in kept)] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
