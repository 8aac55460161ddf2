"""What of a recipe's method, form and allocation does not go together."""

from typing import Any

from .errors import ConfigError


def check_method(recipe: Any) -> None:
    """Raise ConfigError if allocation, form and method of `recipe` (eckart.recipe.Recipe) do not fit."""
    method = recipe.resolved_method()
    if recipe.stock and recipe.form not in (None, "width"):
        raise ConfigError(f"stock is a matter of widths alone: form {recipe.form!r} needs eckart to load")
    if recipe.stock and recipe.split != "none":
        raise ConfigError(f"stock has the matrices of its architecture: leave out split {recipe.split!r}")
    if recipe.stock and recipe.overrides:
        raise ConfigError("stock has one width for all blocks: leave out overrides, or --stock")
    if recipe.form == "width" and not all(rule.dense for rule in recipe.overrides):
        raise ConfigError("form 'width' gives no matrix a rank: overrides can only say dense")
    ranked = [name for name in ("rank", "energy") if getattr(recipe, name) is not None]
    widths = recipe.form in ("width", "mixed") or method.low_rank is None or method.form == "shared"
    if ranked and (recipe.stock or recipe.depth or widths):
        raise ConfigError(
            f"{ranked[0]} is a rule for ranks: give keep or size with stock, depth or widths, or "
            "with shared bases"
        )
    if method.form == "shared" and method.allocation != "uniform":
        raise ConfigError("form 'shared' has uniform allocation: use method basis-sharing")
    if recipe.depth and method.allocation != "curvature":
        raise ConfigError(
            f"depth weighs blocks against ranks and widths by the loss of each: allocation "
            f"{method.allocation!r} does not; use method eckart"
        )
    if recipe.share_inputs:
        _check_share_inputs(recipe, method)
    if recipe.allocation == "curvature" and method.outputs != "gradient":
        raise ConfigError(
            f"allocation 'curvature' needs gradients to have one unit, and method {recipe.method!r} "
            "has none: use method eckart or io-svd"
        )


def _check_share_inputs(recipe: Any, method: Any) -> None:
    if method.allocation != "curvature" or method.low_rank is None or recipe.stores:
        raise ConfigError(
            "share_inputs weighs common right factors against others by the loss of each, stored in the "
            f"output dtype; allocation {method.allocation!r}, form {method.form!r} and storage "
            f"{recipe.matrices_storage!r} were given: use method eckart or io-svd, with storage float and "
            "no stock or width"
        )
    if recipe.timed:
        raise ConfigError(
            "share_inputs is for plans in bytes: tables of times have one map a row, and no stack of them; "
            "leave out latency and the objective, or share_inputs"
        )
