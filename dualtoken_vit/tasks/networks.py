"""The timm network of a recipe."""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from dualtoken_vit.checkpoint import own_weights
from dualtoken_vit.errors import InputError, first_line
from dualtoken_vit.files import similar
from dualtoken_vit.models.backbone import check_size, constructor_arguments
from dualtoken_vit.recipes import Model, model_kwargs

CONNECT_SECONDS = 3  # for each address of a server; enough for a lost packet to be sent again


def choose_weights(recipe: Model) -> Model:
    """The recipe, whose `pretrained` "auto" becomes True if the package has weights of this network, else False."""
    if recipe.pretrained != "auto":
        return recipe
    return replace(recipe, pretrained=not (recipe.args or recipe.checkpoint) and own_weights(recipe.name) is not None)


def _known_cfg(name: str) -> Any:
    """timm's cfg of a network, None for a place (hf-hub:, local-dir:); an InputError for an unknown name or tag."""
    if ":" in name:
        return None
    if not timm.is_model(name):  # which takes any tag
        hint = similar(name, timm.list_models()) or "timm.list_models() lists them"
        raise InputError(f"--model.name {name}: timm has no such model; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        architecture = name.partition(".")[0]
        known = ", ".join(timm.list_pretrained(f"{architecture}.*")) or f"none of {architecture}"
        raise InputError(f"--model.name {name}: timm has no such weights; there are {known}") from error


def reaches(url: str) -> bool:
    """Whether a server, or the proxy before it, takes connections: huggingface_hub itself would wait for minutes."""
    target, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(target.scheme, proxies.get("all"))
    if proxy and not proxy_bypass(target.netloc):
        target = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    try:
        port = target.port or {"https": 443, "http": 80}.get(target.scheme, 1080)  # of SOCKS
        with socket.create_connection((target.hostname, port), CONNECT_SECONDS):
            return True
    except (OSError, ValueError):  # the latter for what is no port or no name
        return False


@contextmanager
def _cached_without_network() -> Iterator[None]:
    """Inside, where the Hub cannot be reached, huggingface_hub looks into its cache alone."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reaches(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def create_network(recipe: Model, num_classes: int | None, **args: Any) -> nn.Module:
    """The recipe's timm network; an InputError names the field that timm refuses.

    0 classes: no classifier; None: that of the pretrained weights.
    """
    _known_cfg(recipe.name)
    common: dict[str, Any] = dict(num_classes=num_classes, in_chans=recipe.in_chans)
    common["pretrained"] = recipe.pretrained is True  # "auto" that nobody decided: from scratch
    if recipe.drop_path_rate > 0:  # not every network takes it
        common["drop_path_rate"] = recipe.drop_path_rate
    try:
        hub = common["pretrained"] or ":" in recipe.name
        local = not hub or recipe.name.startswith("local-dir:") or own_weights(recipe.name)
        with nullcontext() if local else _cached_without_network():
            model: Any = timm.create_model(recipe.name, **common, **args)
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError, OSError) as error:
        raise InputError(_refusal(recipe, error)) from error
    if recipe.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except AssertionError as error:
            raise InputError(f"--model.grad-checkpointing: {recipe.name}: {first_line(error)}") from error
    return model


def check_sizes(model: nn.Module, in_chans: int, image_size: int, start_size: int | None) -> None:
    """Raise an InputError for a size of training images that the network refuses, as `data.transforms.train_size`."""
    check_size(model, in_chans, image_size)
    if start_size is None:
        return
    if start_size > image_size:
        raise InputError(f"--data.start-size {start_size}: must not be above --data.image-size {image_size}")
    check_size(model, in_chans, start_size, "--data.start-size")
    for size in range(start_size + 16, image_size, 16):
        check_size(model, in_chans, size, f"--data.start-size {start_size} grows in steps of 16 pixels, but")


def create_model(
    recipe: Model, num_classes: int | None, image_size: int, start_size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The recipe's classifier, and the arguments that make it again (`save_checkpoint`'s model_args), or an InputError.

    A network whose size is fixed (deit, vit, ...) is made for `image_size`. It must take all from `start_size` on.
    """
    args, cfg = model_kwargs(recipe), _known_cfg(recipe.name)
    if cfg is not None and cfg.fixed_input_size:
        args = {"img_size": image_size, **args}
    model = create_network(recipe, num_classes, **args)
    check_sizes(model, recipe.in_chans, image_size, start_size)
    return model.train().to(memory_format=torch.channels_last), args


def _refusal(recipe: Model, error: Exception) -> str:
    """Which field of the recipe made timm refuse the network with this error, and why."""
    name, args, reason = recipe.name, model_kwargs(recipe), first_line(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", reason)
    key = unknown[1] if unknown else None
    if key in args:
        with torch.device("meta"):
            known = constructor_arguments(type(timm.create_model(name)))
        hint = similar(key, known) or f"it has {', '.join(known)}"
        return f"--model.args {key}={args[key]}: {name} has no such argument; {hint}"
    if key == "drop_path_rate":
        return f"--model.drop-path-rate {recipe.drop_path_rate}: {name} has no stochastic depth; give 0"
    if args and recipe.pretrained and "loading state_dict" in reason:
        fault = f"the pretrained weights of {name} do not fit; leave it out, or give --model.pretrained false"
        return f"--model.args {' '.join(recipe.args)}: {fault}"
    if isinstance(error, LocalEntryNotFoundError):
        fault = f"{constants.ENDPOINT} cannot be reached, and the cache of huggingface_hub does not have these weights"
        remedy = "connect once, or copy the folder HF_HOME from a machine that has them"
        without = "" if ":" in name else ", or give --model.checkpoint FILE or --model.pretrained false"
        return f"--model.name {name}: {fault}; {remedy}{without}"
    fetched = recipe.pretrained or ":" in name
    if args and not (fetched and isinstance(error, RuntimeError | OSError)):
        return f"--model.args {' '.join(recipe.args)}: {reason}"
    return f"--model.name {name}: {reason}"
