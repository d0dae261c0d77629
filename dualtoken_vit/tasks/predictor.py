"""A trained network as a function of images: what every task's predictor shares."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from dualtoken_vit.bounds import check_bounds
from dualtoken_vit.errors import InputError, OutOfMemory, naming_memory
from dualtoken_vit.runtime.base import BasePredictor

Result = TypeVar("Result")


class Predictor(BasePredictor[Result]):
    """A trained network in PyTorch; see `BasePredictor`.

    Args:
        model: the network, on its device; `load_predictor` puts it into evaluation mode
        others: see `BasePredictor`
    """

    def __init__(self, model: nn.Module, class_names: Sequence[str], preprocessing: dict[str, Any], options: Any):
        super().__init__(class_names, preprocessing, options)
        self.model = model

    @classmethod
    def create(
        cls, model: nn.Module, class_names: Sequence[str], preprocessing: dict[str, Any], data: Any, **options: Any
    ) -> Self:
        """A predictor with the options of a recipe's data section, except the given ones; see `make_options`."""
        chosen = cls.make_options(**cls.stored_options(data, preprocessing) | options)
        return cls(model, class_names, preprocessing, chosen)

    @classmethod
    def stored_options(cls, data: Any, preprocessing: dict[str, Any]) -> dict[str, Any]:
        """The options that a network was validated with: of its recipe's data section and its preprocessing."""
        return {field.name: getattr(data, field.name) for field in fields(cls.Options) if hasattr(data, field.name)}

    @classmethod
    def make_options(cls, **given: Any) -> Any:
        options = super().make_options(**given)
        check_bounds(options)
        return options

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters(), torch.empty(0)).device

    @torch.inference_mode()
    def _run(self, inputs: list[Tensor]) -> list[Result | InputError]:
        """The result of each image, or what went wrong with it: where a batch does not fit in memory, one at a time."""
        if not inputs:
            return []
        try:
            with naming_memory(self.memory_hint):
                return list(super()._run(inputs))
        except OutOfMemory as error:
            problem = str(error)  # the error itself would keep the batch in memory
        if len(inputs) > 1:
            return [result for one in inputs for result in self._run([one])]
        height, width = inputs[0].shape[-2:]
        return [InputError(f"{width}x{height} pixels: {problem}")]
