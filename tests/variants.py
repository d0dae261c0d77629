"""The networks that the tests of the models share, and what measures them."""

NAMES = ["dualtoken_vit_tiny", "dualtoken_vit_tiny_mix", "dualtoken_vit_small", "dualtoken_vit_small_mix"]
LIGHTVIT = dict(name="lightvit_tiny")
ABLATIONS = [
    dict(token_mlp="mix"),
    dict(token_grid=0),
    dict(token_grid=5),
    dict(global_tokens="normal"),
    dict(global_tokens="normal_star"),
    dict(local_attention="window"),
    dict(downsampling="onestep"),
]
VARIANTS = [{}, *ABLATIONS, dict(grid_resize="antialias"), LIGHTVIT]
NARROW = dict(dims=(8, 16, 24), num_heads=(1, 2, 3), head_hidden_size=32)  # for tests of structure


def pyramid(model, x):
    return model.forward_intermediates(x, intermediates_only=True)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
