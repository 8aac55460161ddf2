"""Every command of eckart once, on tiny models: what it writes, and what it shows."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from eckart import terminal
from eckart.cli import app

from . import tiny

READ = ("--tokens", 1024, "--gradient-tokens", 512, "--seq-len", 64)
EVALUATE = ("--tokens", 640, "--seq-len", 64)
TUNED = ("--steps", 2, "--batch", 2, "--micro", 2, "--seq-len", 32, "--evaluations", 1, "--eval-limit", 4,
         "--precision", "float32", "--loose")  # fmt: skip
FROM = ("--data", "text.txt", "--vocabulary", 257, "--steps", 2, "--batch", 2, "--micro", 2, "--seq-len", 32,
        "--evaluations", 1, "--eval-limit", 4, "--keep", 0.6, "--of", "linears")  # fmt: skip
HEALED = ("--tokens", 256, "--fit-tokens", 256, "--hold-tokens", 128, "--seq-len", 32, "--refine", "closed")
WRITING: dict[str, tuple[Any, ...]] = {
    "compressed": ("compress", "dense", "--keep", 0.7, "--of", "linears", "--text", "text.txt", *READ),
    "streamed": (
        "compress",
        "dense",
        "--keep",
        0.7,
        "--of",
        "linears",
        "--method",
        "svd",
        "--memory",
        "2GB",
        "--text",
        "text.txt",
        *READ,
    ),
    "healed": ("heal", "compressed", "--teacher", "dense", "--text", "text.txt", *HEALED),
    "quantised": ("quantise", "compressed", "--storage", "int8", "--method", "svd"),
    "shared": ("share", "deep", "--groups", "0-1,2-3", "--method", "svd"),
    "untied": ("untie", "dense"),
    "tied": ("tie", "untied"),
    "exported": ("export", "compressed"),
    "adapter": ("tune", "dense", "--data", "text.txt", "--rank", 2, *TUNED),
    "tuned": ("tune", "dense", "--data", "text.txt", "--method", "full", *TUNED),
    "extracted": ("extract", "dense", "tuned", "--rank", 2),
    "resized": ("resize", "adapter", "--rank", 1),
    "merged": ("merge", "compressed", "adapter"),
    "pretrained": ("pretrain", "config", *FROM),
}
"""By the folder that comes out; each gets --out, and reads those before it."""
SHOWING: dict[str, tuple[Any, ...]] = {
    "plan": ("compress", "dense", "--keep", 0.7, "--dry-run"),
    "eval": ("eval", "compressed", "--text", "text.txt", *EVALUATE, "--against", "dense"),
    "diff": ("diff", "dense", "tuned"),
    "params": ("params", "compressed"),
    "params of published models": ("params",),
    "spectrum": ("spectrum", "dense", "--text", "text.txt", *READ),
    "bench": ("bench", "dense", "--against", "compressed", "--runs", 3, "--warmup", 1, "--loads", 0,
              "--prompt-tokens", 4, "--new-tokens", 2),
    "push": ("push", "compressed", "owner/name", "--dry-run"),
    "curve": ("curve", "dense", "--text", "text.txt", *READ, "--points", 3, "--measure", "0.8", "--cache",
              "kept", "--eval-tokens", 256),
    "sweep": ("sweep", "dense", "--text", "text.txt", *READ, "--out", "swept", "--methods", "svd", "--keeps",
              "0.8",
              "--eval-tokens", 256, "--cache", "kept"),
    "cache": ("cache", "--cache", "kept"),
    "compare": ("compare", "dense", "compressed", "--text", "text.txt", *EVALUATE, "--new-tokens", 2),
}  # fmt: skip


@dataclass(slots=True)
class Commanded:
    """What all commands did in `root`: `shown` is what each gave to the terminal, as rich objects."""

    root: Path
    shown: dict[str, list[Any]] = field(default_factory=dict)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_all(root: Path, dense: Path, text: Path, tokenizer: Any) -> Commanded:
    """Run every command in `root`, where the dense model is `dense`, with licence and terms."""
    shutil.copytree(dense, root / "dense")
    shutil.copyfile(text, root / "text.txt")
    (root / "text.txt.license").write_text("SPDX-License-Identifier: CC0-1.0\n")
    (root / "dense" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-licence\nlicense_link: https://example.org/tiny\n"
        "language: en\n---\n# dense\n"
    )
    for name in ("LICENSE", "USE_POLICY.md"):
        (root / "dense" / name).write_text(f"{name} of the dense model\n")
    tiny.build("llama", num_hidden_layers=4).save_pretrained(root / "deep")
    tokenizer.save_pretrained(root / "deep")
    tiny.build("llama").config.save_pretrained(root / "config")
    made = Commanded(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)

        class Recorder(Console):
            def print(self, *what: Any, **options: Any) -> None:
                if self.stderr:
                    super().print(*what, **options)
                else:
                    made.shown[name].extend(what)

        patch.setattr(terminal, "Console", Recorder)
        for name, arguments in (WRITING | SHOWING).items():
            made.shown[name] = []
            out = ("--out", name) if name in WRITING else ()
            found = invoke(*arguments, *out)
            assert found.exit_code == 0, (name, found.output, found.exception)
    return made
