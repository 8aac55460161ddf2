"""Where models and texts come from: their names, licences and terms, as far as they say."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, RepoCard, snapshot_download

CARD = "README.md"
NOT_STATED = "not stated"
_TERMS = ("license*", "licence*", "copying*", "notice*", "use_policy*", "*acceptable_use*", "*terms_of_use*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPDX = re.compile(r"SPDX-License-Identifier:\s*(\S.*?)\s*$", re.MULTILINE)
_HUB = "https://huggingface.co/"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Origin:
    """A model that another was made of.

    Args:
        name: what it is called on the hub, else the name of its folder or file.
        licence: as its card has it; `licence_name` and `licence_link` where that is "other". None: unstated.
        languages: that its card names.
        terms: files with licence and terms that stand beside it.
        done_by_eckart: whether its card is one of ours; then `name` is what *it* was made of.
        relation: of such a folder to that.
    """

    name: str
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()
    terms: tuple[Path, ...] = ()
    done_by_eckart: bool = False
    relation: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A text that a model was made with: what for, its licence, and for a file the SHA-256 of its bytes."""

    name: str
    use: str
    licence: str
    sha256: str | None
    hub: bool = False


def _card(text: str, kind: type[RepoCard]) -> Any:
    """Return the metadata of a card, None where there are none or they cannot be read."""
    try:
        return kind(text, ignore_metadata_errors=True).data
    except (ValueError, TypeError, yaml.YAMLError):
        return None


def _words(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),) if value else ()


def of_model(source: str | Path) -> Origin:
    """Return what is known of the model at `source`: a folder, a GGUF file, or a hub id (cache, hub)."""
    path = Path(source)
    if path.is_file():
        return _of_gguf(path)
    folder = path if path.is_dir() else _fetched(str(source), "model")
    if folder is None:
        return Origin(str(source))
    own, text = str(source), folder / CARD
    if path.is_dir():
        own = _named(folder) or path.resolve().name
    data = _card(text.read_text(encoding="utf-8"), ModelCard) if text.is_file() else None
    terms = tuple(sorted(file for file in folder.iterdir() if file.is_file() and _is_terms(file.name)))
    if data is None:
        return Origin(own, terms=terms)
    ours = "eckart" in (data.tags or ())
    derived = ours or (folder / "adapter_config.json").is_file()
    bases = _words(data.base_model)
    licence = _words(data.license)
    return Origin(
        bases[0] if derived and bases else own,
        licence[0] if licence else None,
        data.license_name,
        data.license_link,
        _words(data.language),
        terms,
        ours,
        getattr(data, "base_model_relation", None) if ours else None,
    )


def _is_terms(name: str) -> bool:
    return any(Path(name.lower()).match(pattern) for pattern in _TERMS)


def _named(folder: Path) -> str | None:
    """Return the hub id that a folder was saved from, where its config or the path of a cache says so."""
    for part in folder.resolve().parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    config = folder / "config.json"
    try:
        name = (
            json.loads(config.read_text(encoding="utf-8")).get("_name_or_path") if config.is_file() else None
        )
    except (ValueError, AttributeError):
        return None
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _fetched(source: str, kind: str) -> Path | None:
    """Return the folder with card and terms of a repository of the hub; None where they cannot be had."""
    if not _HUB_ID.fullmatch(source):
        return None
    wanted = [CARD, *_TERMS, *(pattern.upper() for pattern in _TERMS), "LICENSE*", "Notice*"]
    try:
        return Path(snapshot_download(source, repo_type=kind, allow_patterns=wanted))
    except (OSError, ValueError):
        return None


def _of_gguf(path: Path) -> Origin:
    try:
        from gguf import GGUFReader
    except ImportError:
        return Origin(path.name)
    try:
        fields = GGUFReader(path).fields
    except (OSError, ValueError, IndexError):
        return Origin(path.name)

    def said(key: str) -> str | None:
        found = fields.get(f"general.{key}")
        value = None if found is None else found.contents()
        return value if isinstance(value, str) and value else None

    base = said("base_model.0.repo_url") or said("source.huggingface.repository") or said("source.url") or ""
    name = base.removeprefix(_HUB)
    return Origin(
        name if _HUB_ID.fullmatch(name) else path.name,
        said("license"),
        said("license.name"),
        said("license.link"),
    )


def carry_terms(folder: Path, found: Sequence[Origin]) -> list[str]:
    """Copy the files with licences and terms of `found` into `folder`; return their names there.

    Of two files that are called alike and differ, the second is named after its model as well.
    """
    names: list[str] = []
    for origin in found:
        for file in origin.terms:
            target = folder / file.name
            if target.exists() and target.read_bytes() != file.read_bytes():
                target = folder / f"{file.stem}-{origin.name.rpartition('/')[2]}{file.suffix}"
            if not target.exists():
                shutil.copyfile(file, target)
            names.append(target.name)
    return list(dict.fromkeys(names))


def of_text(source: str | Path, use: str, licence: str | None = None) -> Text:
    """Return what is known of a text that was used for `use`.

    The licence is `licence` where it is given; of a file, what `FILE.license` beside it says (REUSE,
    SPDX-License-Identifier); of a dataset, what its card says, in its folder, the cache, or on the hub.
    """
    path = Path(source)
    if path.is_file():
        return Text(path.name, use, licence or _beside(path) or NOT_STATED, _digest(path))
    name, _, _ = str(source).partition(":")
    name, _, _ = name.partition("@")
    local = Path(name).is_dir()
    folder = Path(name) if local else _fetched(name, "dataset")
    card = None if folder is None else folder / CARD
    data = (
        _card(card.read_text(encoding="utf-8"), DatasetCard) if card is not None and card.is_file() else None
    )
    stated = ", ".join(_words(getattr(data, "license", None)))
    shown = Path(name).name if local else str(source)
    return Text(
        shown, use, licence or stated or NOT_STATED, None, hub=not local and bool(_HUB_ID.fullmatch(name))
    )


def _beside(path: Path) -> str | None:
    sidecar = path.with_name(f"{path.name}.license")
    found = _SPDX.search(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else None
    return found[1] if found else None


def _digest(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            made.update(chunk)
    return made.hexdigest()
