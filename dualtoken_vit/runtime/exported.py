"""What the predictors of exported files share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dualtoken_vit.errors import InputError, OutOfMemory, naming_memory
from dualtoken_vit.header import MOST_SIDE
from dualtoken_vit.runtime.arrays import to_array
from dualtoken_vit.runtime.base import BasePredictor, Result
from dualtoken_vit.runtime.session import ExportedModel, InputFailed

LEAST_SIDE = 32  # of images, in pixels
SIDES = f"from {LEAST_SIDE} to {MOST_SIDE}"


def require(holds: bool, name: str, value: Any, what: str) -> None:
    if not holds:
        raise InputError(f"--{name.replace('_', '-')} {value}: must be {what}")


class ExportedPredictor(BasePredictor[Result]):
    """The predictor of an exported file.

    Args:
        model: the network
        options: of `Options`, checked
    """

    def __init__(self, model: ExportedModel, options: Any):
        about = model.description
        super().__init__(about["class_names"], about["preprocessing"], options)
        self.model, self.export = model, about["export"]
        self.category_ids = tuple(about["category_ids"])

    @classmethod
    def stored_options(cls, description: dict[str, Any]) -> dict[str, Any]:
        """The options that the network was validated with."""
        known = cls.Options.__dataclass_fields__  # type: ignore[attr-defined]
        given = description["recipe"].get("data", {}) | description["preprocessing"]
        return {name: given[name] for name in known if name in given}

    def preprocess(self, image: Image.Image) -> np.ndarray:  # -> (C, H, W) uint8
        return to_array(image)

    def _run(self, inputs: list[np.ndarray]) -> Sequence[Result | InputError]:
        """The result of each image, or what went wrong with it: where a batch fails, one at a time."""
        try:
            with naming_memory(self.memory_hint):
                return super()._run(inputs)
        except (InputFailed, OutOfMemory) as error:
            problem = str(error)  # the error itself would keep the batch in memory
        if len(inputs) > 1:
            return [result for one in inputs for result in self._run([one])]
        return [InputError(problem)]
