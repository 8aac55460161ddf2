"""Adapter folders as models: the base that they belong to, stored as it was, with the adapter on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..errors import ModelError
from . import apply, attach, quantised, store


def is_adapter(source: str | Path) -> bool:
    """Tell whether `source` is a folder with an adapter and no model."""
    folder = Path(source)
    return (folder / store.CONFIG).is_file() and not (folder / "config.json").is_file()


def load(
    source: str | Path,
    *,
    base: str | None = None,
    compute: torch.dtype | None = None,
    place: torch.device | None = None,
    trust_remote_code: bool = False,
) -> hub.Loaded:
    """Load an adapter on its base; `model` is PEFT's.

    Args:
        source: the folder of the adapter.
        base: the model that it was trained on; default: what the adapter names.
        compute, place, trust_remote_code: as in eckart.hub.load.

    Raises:
        ModelError: the base cannot be read, or the two do not belong together.
        StoreError: the adapter is damaged.
    """
    adapter = store.read(source)
    name = base or adapter.base
    if name is None:
        raise ModelError(f"{source} does not say what it was trained on: load that model, and PEFT on it")
    if adapter.storage is not None:
        compute = torch.float32  # in which it was quantised: elsewhere the codes would differ
    try:
        loaded = hub.load(name, compute=compute, place=place, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{source} is an adapter for {name}, which cannot be loaded: {error}") from error
    return replace(loaded, model=put(loaded.model, source, adapter))


def put(model: Any, source: str | Path, adapter: store.Adapter) -> Any:
    """Return `model`, quantised in place if the adapter says so, with the adapter at `source` on it."""
    apply.check(model, adapter)
    if adapter.storage is not None:
        for name in adapter.storage.targets:
            quantised.quantise(model, name, double=adapter.storage.double, compute=model.dtype)
    with attach.known_warnings():
        return attach.peft_package().PeftModel.from_pretrained(model, str(source)).eval()
