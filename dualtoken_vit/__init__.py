"""DualToken-ViT (arXiv 2309.12424). Importing this package registers its models with timm.

The other public names are loaded when they are first used: the import needs torch and timm only. Without these there
are no models, and `load_predictor` opens exported files only.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

# The installed command imports the models where it needs them: its help would take seconds. While Python looks for the
# module that it runs by `-m`, the name of the program is "-m"; another module needs the models.
by_name = sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv) :][:1] in ([__name__], [f"-m{__name__}"])
command = by_name or "dualtoken_vit_command" in sys.modules
if not command and find_spec("torch") and find_spec("timm"):
    import_module(f"{__name__}.models")
del by_name, command

if TYPE_CHECKING:
    from dualtoken_vit.deploy.export import export as export
    from dualtoken_vit.errors import InputError as InputError
    from dualtoken_vit.evaluation import evaluate as evaluate
    from dualtoken_vit.models.detectors import create_detector as create_detector
    from dualtoken_vit.models.dualtoken import DualTokenViT as DualTokenViT
    from dualtoken_vit.models.lightvit import LightViT as LightViT
    from dualtoken_vit.models.segmenters import create_segmenter as create_segmenter
    from dualtoken_vit.predictors import load_model as load_model
    from dualtoken_vit.predictors import load_predictor as load_predictor
    from dualtoken_vit.recipes import RECIPES as RECIPES
    from dualtoken_vit.tasks.trainer import train as train

__version__ = "0.2.0"
_LAZY = {
    "DualTokenViT": "models.dualtoken",
    "InputError": "errors",
    "LightViT": "models.lightvit",
    "RECIPES": "recipes",
    "create_detector": "models.detectors",
    "create_segmenter": "models.segmenters",
    "evaluate": "evaluation",
    "export": "deploy.export",
    "load_model": "predictors",
    "load_predictor": "predictors" if find_spec("lightning") else "runtime.predictor",
    "train": "tasks.trainer",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
