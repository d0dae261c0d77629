"""Trained networks as repositories of the Hugging Face Hub: weights, configuration and model card.

The weights are the best.safetensors itself, as model.safetensors: timm reads it (`hf-hub:USER/NAME`) as well as
`load_predictor`.
"""

import shutil
from pathlib import Path
from sys import float_info
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from timm.models import save_for_hf

from dualtoken_vit.checkpoint import Checkpoint, license_of, locate
from dualtoken_vit.errors import InputError, reason
from dualtoken_vit.files import atomic_folder, printable
from dualtoken_vit.predictors import load_model
from dualtoken_vit.tasks.networks import reaches

WEIGHTS = "model.safetensors"  # timm's name for them
KINDS = {  # task: the Hub's name, the metric of `Checkpoint.metrics` for the card, and its name there
    "classification": ("image-classification", "val_top1", "accuracy"),
    "multilabel": ("image-classification", "val_map", "mean_average_precision"),
    "detection": ("object-detection", "val_box_AP", "mean_average_precision"),
    "segmentation": ("image-segmentation", "val_miou", "mean_iou"),
}
CLASSIFIERS = ("classification", "multilabel")  # whole timm models
CARD = """---
{data}
---

# {name}

{about}

## Details

- network: {model}
- input: {width}x{height} pixels
- classes: {classes}
{metrics}
## Use

```python
from huggingface_hub import hf_hub_download
from dualtoken_vit import load_predictor

predictor = load_predictor(hf_hub_download("{repo}", "{weights}"))
result = predictor("image.jpg")
```
{timm}
## Limits

The metrics are those of the validation images of its training, by which the epoch was selected. On images of another
kind, expect other results.
"""
TIMM = """
As a timm model:

```python
import timm
import dualtoken_vit  # registers the models

model = timm.create_model("hf-hub:{repo}", pretrained=True)
```
"""


def model_card(checkpoint: Checkpoint, repo: str, about: str = "", license: str | None = None) -> str:
    """The model card of a network, in the Hub's format: metadata in YAML, then text.

    Args:
        checkpoint: of `load_model`
        repo: USER/NAME on the Hub
        about: what the network was trained on, and for what; Markdown
        license: of the weights, as the Hub names it; by default that of the weights from which they were trained
    """
    kind, metric, metric_name = KINDS.get(checkpoint.task, ("", "", ""))
    metrics = {key: value for key, value in checkpoint.metrics.items() if key.startswith("val_") and _is_finite(value)}
    results = []
    if metric in metrics:
        value = round(float(metrics[metric]), 6)
        results = [EvalResult(kind, "custom", "validation images of the training", metric_name, value)]
    data = ModelCardData(
        license=license or checkpoint.license,
        library_name="timm" if checkpoint.task in CLASSIFIERS else "dualtoken-vit",
        pipeline_tag=kind or None,
        tags=["dualtoken-vit", "arxiv:2309.12424"],
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )
    names, (_, height, width) = list(map(_code, checkpoint.class_names)), checkpoint.preprocessing["input_size"]
    shown = ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")
    return CARD.format(
        data=data.to_yaml(),
        name=repo.rpartition("/")[2],
        about=about or f"A network for {checkpoint.task}, trained with dualtoken-vit.",
        model=_code(checkpoint.model),
        width=width,
        height=height,
        classes=shown,
        metrics="".join(f"- {_code(key)}: {value:.4g}\n" for key, value in metrics.items()),
        repo=repo,
        weights=WEIGHTS,
        timm=TIMM.format(repo=repo) if checkpoint.task in CLASSIFIERS else "",
    )


def _code(name: str) -> str:
    """A name from a file as Markdown shows it literally: others could be headings, links or HTML."""
    return f"`{printable(name).replace('`', '')}`"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= float_info.max  # math.isfinite fails on huge integers


def save_for_hub(path: str | Path, folder: str | Path, repo: str, about: str = "", license: str | None = None) -> None:
    """Write a network as the files of a Hub repository into a new folder: weights, README.md, and timm's config.json.

    Args:
        path: a best.safetensors
        folder: the new folder
        repo, about, license: as in `model_card`

    Raises:
        InputError: for a file that is not a network, or a folder that is not empty.
    """
    model, checkpoint = load_model(path)
    with atomic_folder(folder) as target:
        if checkpoint.task in CLASSIFIERS:
            prepared = checkpoint.preprocessing
            names: dict[str, Any] = {"label_names": list(checkpoint.class_names)}
            if descriptions := prepared.get("label_descriptions"):
                names["label_descriptions"] = dict(zip(checkpoint.class_names, descriptions, strict=True))
            known = "input_size", "mean", "std", "crop_pct", "interpolation"
            config = {key: prepared[key] for key in known if key in prepared}
            args = {
                key: value for key, value in checkpoint.model_args.items() if key not in ("num_classes", "in_chans")
            }
            save_for_hf(model, str(target), names, args or None, safe_serialization=True, data_config=config)
        shutil.copyfile(locate(path), target / WEIGHTS)
        card = model_card(checkpoint, repo, about, license or license_of(path))
        (target / "README.md").write_text(card, encoding="utf-8")


def push_to_hub(
    path: str | Path,
    repo: str,
    about: str = "",
    license: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a network to the Hugging Face Hub; creates the repository if it does not exist.

    Args:
        path, repo, about, license: as in `save_for_hub`
        private: create a private repository
        token: of the Hub; by default that of `hf auth login`

    Returns:
        The address of the commit.

    Raises:
        InputError: for a file that is not a network, or where the Hub cannot be reached or refuses the upload.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary, "repository")
        save_for_hub(path, folder, repo, about, license)
        api = HfApi(token=token)
        if not reaches(api.endpoint):
            raise InputError(f"{repo}: cannot upload: {api.endpoint} cannot be reached; check network and proxy")
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload model"))
        except Exception as error:  # the transport of the Hub's client has errors of its own
            raise InputError(f"{repo}: cannot upload: {reason(error)}") from error
