"""The file that training exports, best.safetensors: weights and everything needed to use them, without pickle.

A safetensors file whose tensors are the timm model's plain state dict, so that `timm.create_model(name,
checkpoint_path=...)` reads it too, and whose metadata describes network, classes and preprocessing in JSON. Its entry
`sha256` is the checksum of all of that.
"""

import hashlib
import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import adapt_input_conv, load_state_dict
from torch import Tensor, nn

from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.files import atomic_write
from dualtoken_vit.header import check_header, check_path, unreadable
from dualtoken_vit.models.backbone import layer_names, pretrained_cfg

FORMAT = "dualtoken-vit checkpoint 1"
CHECKSUM = "sha256"  # its key in the metadata; files of early versions lack it


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a best.safetensors."""

    task: str
    """Name of the task, for example "classification"."""
    model: str
    """timm's name of the architecture, or of the backbone's."""
    model_args: dict[str, Any]
    """The other arguments of timm.create_model, `create_detector` or `create_segmenter`, among them num_classes and
    in_chans."""
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    """timm's data config: input_size, interpolation, mean, std, crop_pct."""
    recipe: dict[str, Any]
    """`recipes.to_dict` of the recipe that trained it."""
    metrics: dict[str, Any]
    state_dict: dict[str, Tensor]
    category_ids: tuple[int, ...] = ()
    """Detection: the number of each class in the COCO json."""
    license: str | None = None
    """Of the weights from which the training started, as the Hub names it, if they have one: see `license_of`."""


_REQUIRED = ("task", "model", "model_args", "class_names", "preprocessing", "recipe", "metrics")
_FIELDS = (*_REQUIRED, "category_ids", "license")  # the latter two are not in older files


def own_weights(name: str) -> str | None:
    """The timm name, with its tag, of the weights that come with the installed package for a network; None: none."""
    if set("*?[") & set(name):  # timm takes patterns
        return None
    architecture, _, tag = name.partition(".")
    for candidate in timm.list_pretrained(f"{architecture}.{tag or '*'}"):
        if timm.get_pretrained_cfg(candidate).file:  # type: ignore[union-attr]  # the name is timm's own
            return candidate
    return None


def locate(path: str | Path) -> Path:
    """The file that is meant: the path itself, or the weights in the installed package that the path names.

    Raises:
        InputError: if there is neither.
    """
    path = Path(path)
    if path.exists():
        return path
    if len(path.parts) == 1 and (name := own_weights(path.name)) is not None:
        return Path(timm.get_pretrained_cfg(name).file)  # type: ignore[union-attr, arg-type]  # it has a file
    known = ", and no weights of this network come with the package" * timm.is_model(str(path))
    raise InputError(f"{path}: no such checkpoint{known}")


def license_of(path: str | Path) -> str | None:
    """The licence of weights: those of the package by their name or file, or what was trained from them; or None.

    Raises:
        InputError: as `locate`, and for a damaged file.
    """
    path = locate(path)
    for name in timm.list_pretrained():
        cfg: Any = timm.get_pretrained_cfg(name)
        if cfg.file and Path(cfg.file).exists() and path.samefile(cfg.file):
            return cfg.license
    try:
        found = _metadata(path) if path.suffix == ".safetensors" else {}
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(unreadable(path)) from error
    if "license" in found:
        return found["license"]
    model = found.get("recipe", {}).get("model", {})  # of an older file
    start = own_weights(str(model.get("checkpoint") or (model.get("name") if model.get("pretrained") else "")))
    return timm.get_pretrained_cfg(start).license if start else None  # type: ignore[union-attr]  # a name of timm's


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    task: str,
    class_names: tuple[str, ...] | list[str],
    preprocessing: dict[str, Any],
    recipe: dict[str, Any],
    metrics: dict[str, Any],
    model_args: dict[str, Any] | None = None,
    category_ids: Sequence[int] = (),
    license: str | None = None,
) -> None:
    """Write a network as one safetensors file that `load_model` reads, and a timm model's `timm.create_model` too.

    Args:
        path: the file; replaced atomically
        model: of timm.create_model, `create_detector` or `create_segmenter`
        model_args: of the same function, beside num_classes and in_chans
        task, class_names, preprocessing, recipe, metrics, category_ids, license: as in `Checkpoint`

    Raises:
        InputError: where the file cannot be written.
    """
    args = {"num_classes": len(class_names), "in_chans": preprocessing["input_size"][0], **(model_args or {})}
    name = pretrained_cfg(model)["architecture"]
    values = (task, name, args, list(class_names), preprocessing, recipe, metrics, list(category_ids), license)
    metadata = {"format": FORMAT} | {key: json.dumps(value) for key, value in zip(_FIELDS, values, strict=True)}
    # safetensors takes neither channels-last strides nor tensors that share memory.
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    with atomic_write(path) as file:
        file.writelines(_encode(tensors, metadata))


def _encode(tensors: dict[str, Tensor], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """The parts of a safetensors file, the same for the same content."""
    content = safetensors.torch.save(tensors, metadata | {CHECKSUM: _checksum(tensors, metadata)})
    # safetensors writes the metadata in an order by chance.
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return [len(header).to_bytes(8, "little"), header, memoryview(content)[end:]]


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the metadata, but for the checksum itself, and of the tensors with their names, types and shapes."""
    about = sorted((key, value) for key, value in metadata.items() if key != CHECKSUM)
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _verify(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise an InputError where a file's content is not what was saved: a flipped bit is another network."""
    metadata = _raw_metadata(path)
    if metadata.get(CHECKSUM) not in (None, _checksum(tensors, metadata)):
        raise InputError(f"{path} is damaged: its content does not match its checksum; copy it again from its source")


def read_checkpoint(path: str | Path, weights: bool = True) -> Checkpoint:
    """Read a best.safetensors; nothing in it is executed.

    Args:
        path: the file, or a network's name for the weights that come with the package
        weights: read the weights too, and verify the checksum; else `state_dict` is empty

    Raises:
        InputError: for a file that is missing, truncated, damaged or of another kind.
    """
    path = locate(path)
    check_path(path)
    try:
        metadata = _metadata(path)
        state_dict = safetensors.torch.load_file(path) if weights else {}
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(unreadable(path)) from error
    except (ValueError, RecursionError) as error:  # not JSON, or of too many levels
        raise InputError(f"{path} was written by another version of dualtoken-vit ({error})") from error
    if not metadata:
        raise InputError(
            f"{path} has weights, but no description of network, classes and preprocessing; "
            "give the best.safetensors of a run, or fine-tune from it with --model.checkpoint"
        )
    if missing := [key for key in _REQUIRED if key not in metadata]:
        raise InputError(f"{path} was written by another version of dualtoken-vit: it lacks {', '.join(missing)}")
    check_header(metadata, path)
    if weights:
        _verify(path, state_dict)
    return Checkpoint(**metadata, state_dict=state_dict)


def store_preprocessing(path: str | Path, of: str | None = None, **values: Any) -> None:
    """Set entries of `preprocessing` in a best.safetensors, which is replaced atomically.

    Args:
        path: the file
        of: the `checksum` of the file that the values are for

    Raises:
        InputError: as `read_checkpoint`; where the file cannot be written, or is not the one that the values are for.
    """
    before, checkpoint = checksum(path), read_checkpoint(path)
    metadata = _raw_metadata(path)
    metadata["preprocessing"] = json.dumps(checkpoint.preprocessing | values)
    content = _encode(checkpoint.state_dict, metadata)
    del checkpoint  # its weights are the mapped file, which Windows would not replace
    with atomic_write(path) as file:
        if checksum(path) != before or (of is not None and before != of):
            raise InputError(f"{path} was replaced meanwhile, perhaps by a training; repeat this when it has ended")
        file.writelines(content)


def _raw_metadata(path: str | Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def checksum(path: str | Path) -> str | None:
    """The checksum that a best.safetensors states; files of early versions have none."""
    return _raw_metadata(path).get(CHECKSUM)


def _metadata(path: Path) -> dict[str, Any]:
    """The fields of `Checkpoint` in a safetensors file's metadata; empty for files of other programs."""
    metadata = _raw_metadata(path)
    if metadata.get("format") != FORMAT:
        return {}
    fields = {key: json.loads(metadata[key]) for key in _FIELDS if key in metadata}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` loaded, by tensor names."""

    path: Path
    loaded: tuple[str, ...]  # loaded from the file, including the adapted ones
    adapted: tuple[str, ...]  # loaded after a change of shape: first convolution, grid of tokens or positions
    new: tuple[str, ...]  # re-initialised: not in the file, or of another shape there
    ignored: tuple[str, ...]  # in the file, but unused
    classes: str = ""  # how the classifier was loaded, where the file's classes differ from the model's
    network: str = ""  # the file's network, where it differs from the model

    def __str__(self) -> str:
        lines = [f"{self.path}: loaded {len(self.loaded)} of {len(self.loaded) + len(self.new)} tensors"]
        lines += [f"  {note}" for note in (self.network, self.classes) if note]
        parts = {"adapted": self.adapted, "re-initialised": self.new, "unused in the file": self.ignored}
        for title, names in parts.items():
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"  {title}: {', '.join(names[:8])}{more}")
        return "\n".join(lines)


def load_weights(model: nn.Module, path: str | Path, class_names: tuple[str, ...] = ()) -> LoadReport:
    """Load weights from a file of this project or any timm checkpoint, possibly of other classes, size or channels.

    Tensors of another shape are adapted (first convolution, grids of tokens and positions, by timm's own functions) or
    left as initialised, such as a classifier of other classes. Where the file names its classes, as a best.safetensors
    does, a classifier of the same `class_names` in another order is reordered, and one of other names is left as
    initialised, even if their number is the same. A detector or segmenter loads a file of its kind entirely; between
    different kinds only the backbone is loaded. Pickled files are read with `weights_only`.

    Raises:
        InputError: for a file that is missing, damaged, cannot be read, or belongs to another network.
    """
    path = locate(path)
    check_path(path)
    if path.suffix in (".onnx", ".tflite"):
        raise InputError(f"{path} is an exported file, which cannot be trained; give the best.safetensors of a run")
    try:
        found = {key: value for key, value in load_state_dict(str(path)).items() if isinstance(value, Tensor)}
        metadata = _metadata(path) if path.suffix == ".safetensors" else {}
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    except (AttributeError, ValueError) as error:  # an array, a list, ... instead of a state dict
        raise InputError(f"{path} has no state dict") from error
    if metadata:
        check_header(metadata, path)
        _verify(path, found)
    if all(key.startswith("model.") for key in found):  # Lightning's
        found = {key.removeprefix("model."): value for key, value in found.items()}

    if not found.keys() & model.state_dict().keys():  # of another task: from backbone to backbone
        if (network := getattr(model, "network", None)) is not None:
            model, class_names = network, ()
        first = next(iter(model.state_dict()))
        prefix = next((key.removesuffix(first) for key in found if key.endswith(f".{first}")), "")  # in another model
        found = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    state_dict, own = dict(found), model.state_dict()
    for name in layer_names(model, "first_conv"):
        key = f"{name}.weight"
        if key in state_dict and key in own and state_dict[key].shape != own[key].shape and own[key].ndim == 4:
            in_chans = getattr(getattr(model, "network", model), "in_chans", own[key].shape[1])
            base_chans = state_dict[key].shape[1] * in_chans // own[key].shape[1]  # a stem may fold space into channels
            state_dict[key] = adapt_input_conv(in_chans, state_dict[key], base_chans)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filter_fn is not None and state_dict.keys() & own.keys():
        state_dict = filter_fn(state_dict, model)

    fitting = {key: value for key, value in state_dict.items() if key in own and value.shape == own[key].shape}
    name = pretrained_cfg(model)["architecture"]
    source = metadata.get("model", name).partition(".")[0]  # without timm's tag of pretrained weights
    if 2 * len(fitting) < len(own):  # a few tensors of another network always fit by chance
        other = f" is a {source} and" if source != name else ""
        hint = f": give --model.name {source}" if source != name else ""
        raise InputError(
            f"{path}{other} has only {len(fitting)} of the {len(own)} tensors of {name}; "
            f"--model.checkpoint must be of the same architecture{hint}"
        )
    network = f"a {source}, not a {name}: only the tensors that both have are loaded" if source != name else ""
    theirs = metadata.get("class_names", class_names)
    layers = layer_names(model, "classifier")
    classifier = [key for key in fitting if key.rpartition(".")[0] in layers]
    classes = ""
    if class_names and theirs != class_names:
        rowwise = all(len(fitting[key]) == len(class_names) for key in classifier)  # not so in a detector
        if sorted(theirs) == sorted(class_names) and rowwise:
            classes = "the same classes in another order: the classifier is reordered"
            rows = [theirs.index(name) for name in class_names]
            fitting |= {key: fitting[key][rows] for key in classifier}
        else:
            differ = f"its {len(theirs)} classes differ from the {len(class_names)} here, or in their order"
            classes = f"{differ}: the classifier is re-initialised"
            fitting = {key: value for key, value in fitting.items() if key not in classifier}
    model.load_state_dict(fitting, strict=False)
    return LoadReport(
        path=path,
        loaded=tuple(key for key in own if key in fitting),
        adapted=tuple(key for key in own if key in fitting and key in found and found[key].shape != own[key].shape),
        new=tuple(key for key in own if key not in fitting),
        ignored=tuple(key for key in state_dict if key not in fitting),
        classes=classes,
        network=network,
    )
