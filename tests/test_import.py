import json
import subprocess
import sys

import pytest

HEAVY = ["lightning", "tyro", "torchmetrics", "matplotlib", "tensorboard", "rich", "dualtoken_vit.cli"]


@pytest.fixture(scope="module")
def fresh():
    """What a new interpreter knows after nothing but `import dualtoken_vit`."""
    code = (
        "import sys, json, dualtoken_vit, timm;"
        "print(json.dumps([sorted(sys.modules), timm.list_models('dualtoken_vit*'), dualtoken_vit.__version__]))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def test_import_loads_no_training_package(fresh):
    modules, _, _ = fresh
    assert "dualtoken_vit.models.dualtoken" in modules
    assert [name for name in HEAVY if name in modules] == []
    assert [name for name in modules if name.startswith(("dualtoken_vit.tasks", "dualtoken_vit.data"))] == []


def test_import_registers_the_models(fresh):
    _, models, version = fresh
    assert models == [
        "dualtoken_vit_small",
        "dualtoken_vit_small_mix",
        "dualtoken_vit_tiny",
        "dualtoken_vit_tiny_mix",
    ]
    assert version.count(".") == 2
