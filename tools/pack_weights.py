"""Pack a run's best.safetensors for the package: `python tools/pack_weights.py RUN/best.safetensors NAME.TAG`.

Writes dualtoken_vit/weights/NAME.TAG.safetensors: the same checkpoint in float16, and the names of its classes beside
it, which the cfg of the weights lists. Of the paths in its recipe only the names are kept.
"""

import sys
from pathlib import Path

from dualtoken_vit import load_model
from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.files import atomic_write
from dualtoken_vit.tasks.classification import label_descriptions

WEIGHTS = Path(__file__).parents[1] / "dualtoken_vit" / "weights"


def pack(path: Path, name: str) -> Path:
    """Write the file, and return its path."""
    model, about = load_model(path)
    recipe = about.recipe
    for section, key in (("data", "root"), ("model", "checkpoint"), ("distill", "teacher")):
        if recipe[section][key]:
            recipe = recipe | {section: recipe[section] | {key: Path(recipe[section][key]).name}}
    save_checkpoint(
        file := WEIGHTS / f"{name}.safetensors",
        model.half(),
        preprocessing=about.preprocessing | label_descriptions(about.class_names),
        recipe=recipe,
        **{key: getattr(about, key) for key in ("task", "class_names", "metrics", "model_args")},
    )
    with atomic_write(WEIGHTS / f"{name.partition('.')[2]}.txt", "w") as labels:
        labels.write("\n".join(about.class_names) + "\n")
    return file


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), sys.argv[2]))
