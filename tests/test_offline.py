"""Pretrained weights of timm without a network."""

import socket
import time
from dataclasses import replace

import pytest
import timm
from huggingface_hub import constants

from dualtoken_vit.errors import InputError
from dualtoken_vit.recipes import Model
from dualtoken_vit.tasks import networks
from dualtoken_vit.tasks.networks import create_network

PEER = Model("mobilevit_xxs", pretrained=True)


def unresolved(*args):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setattr(networks, "getproxies", dict)


@pytest.mark.parametrize("model", [PEER, replace(PEER, name="hf-hub:timm/mobilevit_xxs.cvnets_in1k", pretrained=False)])
def test_without_a_network_one_line_and_no_second_try(monkeypatch, tmp_path, no_proxy, model):
    """huggingface_hub sleeps between its tries."""
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tries again"))
    reason = "cannot be reached, and the cache of huggingface_hub does not have these weights; connect once, or copy"
    with pytest.raises(InputError, match=f"^--model.name {model.name}: {constants.ENDPOINT} {reason}") as caught:
        create_network(model, 3)
    assert "\n" not in str(caught.value)
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("model", "proxies", "resolve", "offline"),
    [
        (PEER, {}, unresolved, True),
        (PEER, {}, lambda *args: ["an address"], False),
        (PEER, {"https": "http://proxy:3128"}, unresolved, False),
        (PEER, {"no": "localhost"}, unresolved, True),
        (replace(PEER, pretrained=False), {}, None, False),  # asks for no address
        (Model("dualtoken_vit_tiny_mix", pretrained=True), {}, None, False),  # comes with the package
    ],
)
def test_the_cache_alone_is_used_only_without_a_network(monkeypatch, model, proxies, resolve, offline):
    seen = []
    monkeypatch.setattr(networks, "getproxies", lambda: proxies)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: seen.append(constants.HF_HUB_OFFLINE))
    create_network(model, 3)
    assert (seen, constants.HF_HUB_OFFLINE) == ([offline], False)
