"""Pytest plugin that restricts timm's model tests to our models; `test_timm_suite.py` loads it with `-p`."""

import timm

import dualtoken_vit  # noqa: F401  registers the models before timm's tests list them

PATTERNS = ["dualtoken_vit*", "lightvit*"]
_list_models = timm.list_models


def _list_ours(*args, **kwargs) -> list[str]:
    """`timm.list_models` restricted to our models, without its `module` filter, which knows timm's modules only."""
    kwargs.pop("module", None)
    ours = {*_list_models(PATTERNS), *_list_models(PATTERNS, include_tags=True)}
    return [name for name in _list_models(*args, **kwargs) if name in ours]


timm.list_models = _list_ours  # before the tests import it by name


def pytest_collection_modifyitems(config, items):
    """Deselect the tests of models that timm's tests name explicitly, and those without a model."""

    def is_ours(item) -> bool:
        callspec = getattr(item, "callspec", None)
        return callspec is not None and str(callspec.params.get("model_name", "")).startswith(
            ("dualtoken_vit", "lightvit")
        )

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]
