"""Examples in rows of equal length: padded, or packed so that they do not see each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from .. import models
from ..errors import ModelError
from .examples import IGNORED, Example

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Collator:
    """Make a batch of rows {"input_ids", "labels"}, or of packed ones, which have "position_ids" as well.

    Rows are padded on the right. Causal models need no mask for that: nothing looks to the right.
    """

    pad: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> Batch:
        """Return tensors (b, longest row)."""
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad, "labels": IGNORED}
        batch = {
            key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
            for key, value in fill.items()
        }
        if "position_ids" in rows[0]:
            places = [row["position_ids"] + list(range(longest - len(row["position_ids"]))) for row in rows]
            batch["position_ids"] = torch.tensor(places)
        return batch


def pad_token(tokenizer: Any) -> int:
    """Return the id to pad with; nothing is learned from it, whatever it is."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return 0


def rows(examples: Sequence[Example]) -> list[dict[str, list[int]]]:
    """Return a row for each example; its first token has nothing before it to be learned from."""
    return [{"input_ids": example.ids, "labels": [IGNORED, *example.labels[1:]]} for example in examples]


def packed(examples: Sequence[Example], seq_len: int) -> list[dict[str, list[int]]]:
    """Return rows of at most `seq_len` tokens that hold one or several examples each.

    Positions begin anew with every example, by which attention keeps them apart. The first token of an
    example is never learned: in a row of its own nothing would come before it. The longest come first, each
    into the fullest row that has room (best fit decreasing: at most 11/9 of the fewest rows, and a few more).
    """
    made: list[dict[str, list[int]]] = []
    by_room: list[list[dict[str, list[int]]]] = [[] for _ in range(seq_len + 1)]
    for example in sorted(examples, key=lambda one: -len(one.ids)):
        size = len(example.ids)
        room = next((room for room in range(size, seq_len + 1) if by_room[room]), None)
        if room is None:
            made.append({"input_ids": [], "labels": [], "position_ids": []})
            row, room = made[-1], seq_len
        else:
            row = by_room[room].pop()
        row["input_ids"] += example.ids
        row["labels"] += [IGNORED, *example.labels[1:]]
        row["position_ids"] += range(size)
        by_room[room - size].append(row)
    return made


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Refuse a model in which examples of one row see each other although their positions begin anew.

    Raises:
        ModelError: by behaviour: the logits of an example depend on the one before it in the row.
    """
    ids = models.probe(model)
    places = torch.arange(ids.shape[1] // 2, device=ids.device).repeat(2)[None]
    other = ids.clone()
    other[:, : ids.shape[1] // 2] = ids[:, : ids.shape[1] // 2].flip(1)
    with evaluating(model):
        try:
            found = [
                model(input_ids=row, position_ids=places, use_cache=False).logits[:, ids.shape[1] // 2 :]
                for row in (ids, other)
            ]
        except TypeError as error:
            raise ModelError(
                f"{type(model).__name__} takes no positions: leave out --packing ({error})"
            ) from error
    if not torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[0].abs().max())):
        raise ModelError(
            f"{type(model).__name__} lets examples that are packed into one row see each other: leave out "
            "--packing"
        )


class Order(Sampler[int]):
    """The order of the rows, drawn for each epoch from the seed and its number alone: so a run can resume.

    Args:
        lengths: tokens of each row.
        batch: rows that are learned from together, over all devices.
        seed: of the draws.
        grouped: rows of similar length come together, so that little is padded.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, grouped: bool) -> None:
        self.lengths, self.batch, self.seed, self.grouped = list(lengths), batch, seed, grouped
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; Trainer does."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        if self.grouped:
            yield from get_length_grouped_indices(self.lengths, self.batch, generator=draws)
        else:
            yield from torch.randperm(len(self.lengths), generator=draws).tolist()


class evaluating:
    """Put a model into evaluation mode for the body, and every module back afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.modes = {module: module.training for module in model.modules()}
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode
