"""Pretrained weights of timm without a network."""

import socket
import time
from contextlib import nullcontext
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


def refused(*args):
    raise ConnectionRefusedError(111, "Connection refused")


def dropped(*args):
    raise TimeoutError("timed out")


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setattr(networks, "getproxies", dict)


@pytest.mark.parametrize("model", [PEER, replace(PEER, name="hf-hub:timm/mobilevit_xxs.cvnets_in1k", pretrained=False)])
@pytest.mark.parametrize("there", [False, True])
def test_without_a_network_one_line_and_no_second_try(monkeypatch, tmp_path, no_proxy, closed, model, there):
    """No address, or one that nobody listens at; huggingface_hub sleeps between its tries."""
    if there:
        monkeypatch.setattr(constants, "ENDPOINT", closed)
    else:
        monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("tries again"))
    reason = "cannot be reached, and the cache of huggingface_hub does not have these weights; connect once, or copy"
    with pytest.raises(InputError, match=f"^--model.name {model.name}: {constants.ENDPOINT} {reason}") as caught:
        create_network(model, 3)
    assert str(caught.value).endswith(" or --model.pretrained false") == model.pretrained
    assert "\n" not in str(caught.value)
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("model", "proxies", "connect", "asked", "offline"),
    [
        (PEER, {}, unresolved, ("huggingface.co", 443), True),
        (PEER, {}, dropped, ("huggingface.co", 443), True),
        (PEER, {}, nullcontext, ("huggingface.co", 443), False),
        (PEER, {"https": "http://proxy:3128"}, nullcontext, ("proxy", 3128), False),
        (PEER, {"https": "proxy:3128"}, refused, ("proxy", 3128), True),
        (PEER, {"all": "socks5://proxy"}, nullcontext, ("proxy", 1080), False),
        (PEER, {"https": "http://proxy:3128", "no": ".co"}, nullcontext, ("huggingface.co", 443), False),
        (PEER, {"no": "localhost"}, refused, ("huggingface.co", 443), True),
        (PEER, {"https": "http://me:a/b@proxy:3128"}, None, None, True),  # no port: "/" must be %2F
        (replace(PEER, pretrained=False), {}, None, None, False),  # asks for no address
        (Model("local-dir:folder"), {}, None, None, False),
        (Model("dualtoken_vit_tiny_mix", pretrained=True), {}, None, None, False),  # comes with the package
    ],
)
def test_the_cache_alone_is_used_only_without_a_network(monkeypatch, model, proxies, connect, asked, offline):
    seen, addresses = [], []

    def create_connection(address, timeout):
        addresses.append(address)
        assert 0 < timeout <= 5
        return connect()

    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, proxies.get("no", ""))
    monkeypatch.setattr(networks, "getproxies", lambda: proxies)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: seen.append(constants.HF_HUB_OFFLINE))
    create_network(model, 3)
    assert (seen, constants.HF_HUB_OFFLINE) == ([offline], False)
    assert addresses == [asked] * bool(asked)
