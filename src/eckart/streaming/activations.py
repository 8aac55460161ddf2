"""Hidden states in files: written once, window by window, and read window by window."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import appearing
from ..errors import StoreError


@dataclass(frozen=True, slots=True)
class Activations:
    """A file of equal windows, which appears by rename when the last of them is written.

    Plain reads and writes, not a mapping: mapped pages would count as memory of the process.

    Args:
        file: the file.
        shape: of one window, such as (1, seq_len, d).
        dtype: of its entries.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def window_bytes(self) -> int:
        """Bytes of one window."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def exists(self) -> bool:
        """Tell whether all of it was written."""
        return self.file.exists()

    def read(self, index: int) -> Tensor:
        """Return window number `index`, on the CPU.

        Raises:
            StoreError: the file is missing or too short.
        """
        try:
            with self.file.open("rb") as opened:
                opened.seek(index * self.window_bytes)
                data = bytearray(opened.read(self.window_bytes))
        except OSError as error:
            raise StoreError(f"{self.file} cannot be read ({error}): delete the work folder") from error
        if len(data) != self.window_bytes:
            raise StoreError(f"{self.file} ends before window {index}: delete the work folder")
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)

    @contextmanager
    def written(self) -> Iterator[Callable[[Tensor], None]]:
        """Give what appends a window; the file appears when the body ends well.

        Raises:
            StoreError: it cannot be written.
        """
        with appearing(self.file) as partial, partial.open("wb") as opened:

            def append(window: Tensor) -> None:
                data = window.detach().to(device="cpu", dtype=self.dtype).contiguous()
                opened.write(data.view(torch.uint8).numpy().data)

            yield append

    def delete(self) -> None:
        """Delete the file."""
        self.file.unlink(missing_ok=True)
