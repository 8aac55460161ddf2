"""Adapters in a few calls: extract, resize, merge; each writes a folder where it is told one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import hub, modelcard
from ..construct import parse_size
from ..report_healing import known
from ..stages import Watch
from . import cards, store
from . import extract as extraction
from . import merge as merging
from . import resize as resizing
from .extract import Carry, Extracted
from .merge import Merged
from .reading import reading
from .resize import Resized
from .store import Adapter

Sources = str | Path | Sequence[str | Path]


def _listed(given: Sources | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (str(given),) if isinstance(given, (str, Path)) else tuple(map(str, given))


def _check(out: str | Path | None, overwrite: bool, *sources: object) -> None:
    if out is None:
        return
    hub.check_output(Path(out), overwrite)
    for source in sources:
        if isinstance(source, (str, Path)):
            hub.check_output(Path(out), overwrite, str(source))


def _used(text: Sources | None, eval_text: Sources | None) -> list[tuple[str, str]]:
    """Return (source, what for) of the texts, for the card."""
    uses = (("calibration", text), ("measuring", eval_text))
    return [(source, use) for use, given in uses for source in _listed(given)]


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    out: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    params: int | None = None,
    noise: bool = False,
    carry: Carry = "small",
    text: Sources | None = None,
    eval_text: Sources | None = None,
    tokens: int = 32_768,
    eval_tokens: int = 12_288,
    seq_len: int = 512,
    bos: bool = False,
    damp: float = 1e-4,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    text_licence: str | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> tuple[Adapter, Extracted]:
    """Take a LoRA adapter out of a fully fine-tuned model: one of rank, energy, params, noise.

    Args:
        base, tuned, rank, energy, params, noise, carry, dtype, device, trust_remote_code, watch: as in
            eckart.adapt.extract.extract.
        out: a new folder for a standard PEFT adapter with card and report; default: nothing is written.
        text, eval_text, tokens, eval_tokens, seq_len, bos, damp: as in eckart.adapt.reading.reading.
        text_licence: of the texts, for the card.
        overwrite: replace the folder `out`.

    Raises:
        ConfigError, ModelError, RankError, NotFinite: as there.
        StoreError: `out` cannot be written.
    """
    _check(out, overwrite, base, tuned)
    read = reading(
        _listed(text), _listed(eval_text),
        tokens=tokens, eval_tokens=eval_tokens, seq_len=seq_len, bos=bos, damp=damp,
    )  # fmt: skip
    adapter, done = extraction.extract(
        base, tuned, rank=rank, energy=energy, params=params, noise=noise, carry=carry, reading=read,
        dtype=dtype, device=device, trust_remote_code=trust_remote_code, watch=watch,
    )  # fmt: skip
    if out is not None:
        with hub.new_folder(Path(out), overwrite) as folder:
            store.write(folder, adapter)
            done = replace(done, file_bytes=hub.weight_bytes(folder))
            facts = cards.extracted_facts(done, _used(text, eval_text), text_licence)
            modelcard.write(folder, Path(out).name, cards.extracted_documents(done), facts)
    return adapter, done


def resize(
    adapter: str | Path | Adapter,
    *,
    out: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    params: int | None = None,
    size: int | str | None = None,
    overwrite: bool = False,
) -> tuple[Adapter, Resized]:
    """Change the ranks of an adapter to the best approximation there: one of rank, energy, params, size.

    Args:
        adapter: a folder, a hub id, or what eckart.adapt.store.read returns.
        out: a new folder for a standard PEFT adapter with card and report; default: nothing is written.
        rank, energy, params: as in eckart.adapt.resize.resize.
        size: bytes of the weight file, or a text such as "2MB".
        overwrite: replace the folder `out`.

    Raises:
        ConfigError, ModelError, RankError: as there.
        StoreError: the adapter is damaged, or `out` cannot be written.
    """
    _check(out, overwrite, adapter)
    found = adapter if isinstance(adapter, Adapter) else store.read(adapter)
    limit = None if size is None else parse_size(size)
    made, done = resizing.resize(found, rank=rank, energy=energy, params=params, size=limit)
    if out is not None:
        values = {} if isinstance(adapter, Adapter) else known(adapter)
        with hub.new_folder(Path(out), overwrite) as folder:
            store.write(folder, made)
            done = replace(done, file_bytes=hub.weight_bytes(folder))
            facts = cards.resized_facts(made, done, None if isinstance(adapter, Adapter) else str(adapter))
            modelcard.write(folder, Path(out).name, cards.resized_documents(made, done, values), facts)
    return made, done


def merge(
    model: Any,
    adapter: str | Path | Adapter,
    *,
    out: str | Path | None = None,
    text: Sources | None = None,
    eval_text: Sources | None = None,
    tokens: int = 32_768,
    eval_tokens: int = 12_288,
    seq_len: int = 512,
    bos: bool = False,
    damp: float = 1e-4,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    text_licence: str | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> tuple[Any, Merged]:
    """Merge an adapter into a model, compressed or not.

    Args:
        model, adapter, tokenizer, dtype, device, trust_remote_code, watch: as in eckart.adapt.merge.merge.
        out: a new folder for the merged model with card and report; default: nothing is written.
        text, eval_text, tokens, eval_tokens, seq_len, bos, damp: as in eckart.adapt.reading.reading; what
            must be cut in low-rank modules is weighted and measured by them.
        text_licence: of the texts, for the card.
        overwrite: replace the folder `out`.

    Raises:
        ConfigError, ModelError, NotPositiveDefinite: as there.
        StoreError: the adapter is damaged, or `out` cannot be written.
    """
    _check(out, overwrite, model, adapter)
    read = reading(
        _listed(text), _listed(eval_text),
        tokens=tokens, eval_tokens=eval_tokens, seq_len=seq_len, bos=bos, damp=damp,
    )  # fmt: skip
    merged, done = merging.merge(
        model, adapter, reading=read, tokenizer=tokenizer, dtype=dtype, device=device,
        trust_remote_code=trust_remote_code, watch=watch,
    )  # fmt: skip
    if out is not None:
        named = isinstance(model, (str, Path))
        if named:
            tokenizer = hub.load_tokenizer(str(model), trust_remote_code=trust_remote_code)
        values = known(model if named else None)
        source = None if isinstance(adapter, Adapter) else str(adapter)
        with hub.new_folder(Path(out), overwrite) as folder:
            hub.write(folder, merged, tokenizer)
            facts = cards.merged_facts(done, source, _used(text, eval_text), text_licence)
            documents = cards.merged_documents(done, source or "adapter", values)
            modelcard.write(folder, Path(out).name, documents, facts)
    return merged, done
