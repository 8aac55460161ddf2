"""Put an output folder on a hub: checked, listed, and only when it is asked for."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from safetensors import SafetensorError, safe_open

from . import origins, render
from .errors import ConfigError, ModelError, StoreError
from .hub import MB
from .modelcard import REPORT

if TYPE_CHECKING:
    from rich.console import RenderableType

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_UNFINISHED = (".partial", ".old", ".healing", ".tuning", ".sharing")
_NOT_SENT = (".git", ".cache", "__pycache__")
_NAMING = ("recipe.yaml", REPORT, "adapter_config.json", origins.CARD)
_ABSOLUTE = re.compile(r"""["'\s:](/(?:[\w.@~+-]+/)+[\w.@~+-]+|[A-Za-z]:\\\\?[^"'\s]+)""")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Upload:
    """What is, or would be, uploaded.

    Args:
        folder, repo, revision, private: as given.
        files: (path inside the folder, bytes).
        notes: what the user should know before.
        url: where it is now; None where nothing was uploaded.
    """

    folder: str
    repo: str
    revision: str | None
    private: bool
    files: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]
    url: str | None = None

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(size for _, size in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {**asdict(self), "bytes": self.bytes}

    def __str__(self) -> str:
        """Show it as plain text tables."""
        return render.plain(self.__rich__())

    def __rich__(self) -> "RenderableType":
        """Show it as tables."""
        from rich.console import Group
        from rich.text import Text

        rows = [(name, f"{size:,}") for name, size in self.files]
        rows.append((f"{len(self.files)} files", f"{self.bytes:,}"))
        parts = (self.repo, self.revision, "private" if self.private else "public")
        where = ", ".join(part for part in parts if part)
        notes = [Text(f"note: {note}") for note in self.notes]
        size = Text(f"{self.bytes / MB:,.1f} MB")
        return Group(render.table(f"{self.folder} to {where}", ("file", "bytes"), rows), size, *notes)


def prepare(folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None) -> Upload:
    """Check a folder and list what would be uploaded; nothing is sent.

    Raises:
        ConfigError: `repo` is no OWNER/NAME.
        StoreError: the folder is not there, not eckart's, not finished, or damaged.
    """
    path = Path(folder)
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"repository {repo!r}: give OWNER/NAME")
    _check(path)
    files = tuple((str(file.relative_to(path)), file.stat().st_size) for file in _files(path))
    return Upload(str(path), repo, revision, private, files, tuple(_notes(path)))


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder).parts
        if file.is_file() and not set(inside) & set(_NOT_SENT):
            yield file


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise StoreError(f"no folder {folder}: give one that eckart wrote")
    if folder.resolve().name.endswith(_UNFINISHED):
        raise StoreError(f"{folder} is a run that is not finished: run the command that writes it to its end")
    kinds = [name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    if not kinds or not (folder / REPORT).is_file() or not (folder / origins.CARD).is_file():
        raise StoreError(
            f"{folder} is not a folder that eckart wrote (config, {origins.CARD} and {REPORT} are looked "
            "for): nothing else is uploaded"
        )
    partial = [file.name for file in _files(folder) if file.name.endswith(_UNFINISHED)]
    if partial:
        raise StoreError(
            f"{folder} holds {', '.join(partial)}, which is half written: write the folder again"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise StoreError(f"{folder} holds no weights (*.safetensors): write the folder again")
    _check_weights(folder, weights)


def _check_weights(folder: Path, weights: Sequence[Path]) -> None:
    for file in weights:
        try:
            with safe_open(file, framework="pt") as opened:  # compares the header with the size of the file
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{file} is damaged ({error}): write the folder again") from error
    for index in folder.glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(named - {file.name for file in weights})
        if missing:
            raise StoreError(f"{folder} lacks {', '.join(missing)}, which {index.name} names: write it again")


def _notes(folder: Path) -> Iterator[str]:
    for name in _NAMING:
        file = folder / name
        if not file.is_file():
            continue
        found = list(dict.fromkeys(_ABSOLUTE.findall(file.read_text(encoding="utf-8"))))
        if found:
            more = ", ..." if len(found) > _SHOWN else ""
            yield f"{name} names paths of this machine: {', '.join(found[:_SHOWN])}{more}"
    card = huggingface_hub.ModelCard.load(folder / origins.CARD)
    if not card.data.license:
        yield "the card states no licence: that of the base model is not known here; add it to the card"


def push(upload: Upload, *, api: Any = None) -> Upload:
    """Make the repository where it is missing, and upload; return `upload` with where it is.

    `api` is what talks to the hub, default huggingface_hub.HfApi().

    Raises:
        ConfigError: there is no token.
        ModelError: the hub refuses, or cannot be reached.
    """
    if api is None:
        if huggingface_hub.get_token() is None:
            raise ConfigError("no token for the hub: run `hf auth login`, or set HF_TOKEN")
        api = huggingface_hub.HfApi()
    try:
        api.create_repo(upload.repo, private=upload.private, repo_type="model", exist_ok=True)
        if upload.revision:
            api.create_branch(upload.repo, branch=upload.revision, exist_ok=True)
        done = api.upload_folder(
            folder_path=upload.folder,
            repo_id=upload.repo,
            repo_type="model",
            revision=upload.revision,
            commit_message="Upload by eckart",
            allow_patterns=[name for name, _ in upload.files],
        )
    except (OSError, ValueError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{upload.repo} was not uploaded: {said}") from error
    fields = {name: getattr(upload, name) for name in Upload.__dataclass_fields__}
    return Upload(**{**fields, "url": str(getattr(done, "commit_url", done))})
