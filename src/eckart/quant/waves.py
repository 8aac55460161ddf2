"""Rounding in turn, with errors carried along both sides of a matrix.

The matrix is cut into tiles. Those on one anti-diagonal do not wait for one another, so that they are
treated at once, column by column, all rows of a tile together.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def places_in_waves(
    weight: Tensor,
    levels: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    along: Tensor,
    down: Tensor | None,
    *,
    rows: int,
    columns: int,
) -> Tensor:
    """Return which of the `levels` each entry gets, int64 (m, n).

    Values are (level - zero) * scale. With E = W - Q, the rows of a block B are moved to
    G_B = W_B + A^-T sum over the blocks S before it of down[S, B]^T E_S, where A = down[B, B], and
    column j of it is rounded to the values nearest to g_j + sum over j' < j of (g_j' - q_j') along[j', j].

    Args:
        weight: (m, n).
        levels: (L,) ascending.
        scale, zero: (m, n).
        along: (n, n) upper triangular, ones on the diagonal.
        down: (m, m) likewise; None for the identity, with which `rows` is m.
        rows, columns: of a tile.
    """
    goal, width = _tiles(weight, rows, columns), _tiles(scale, rows, columns)
    shift = None if zero is None else _tiles(zero, rows, columns)
    blocks, chunks = goal.shape[:2]
    back = _whole(along, chunks * columns).T.contiguous()
    inner = torch.stack(_diagonal(back, columns))
    means = None if down is None else _conditional_means(_whole(down, blocks * rows), rows)
    wrong, errors = torch.zeros_like(goal), torch.zeros_like(goal)
    found = torch.zeros_like(goal, dtype=torch.int64)
    for wave in range(blocks + chunks - 1):
        block = torch.arange(max(0, wave - chunks + 1), min(blocks, wave + 1), device=goal.device)
        chunk = wave - block
        target = goal[block, chunk]
        moved = torch.empty_like(target)
        for place, (i, j) in enumerate(zip(block.tolist(), chunk.tolist(), strict=True)):
            if i and means is not None:
                before = errors[:i, j].permute(1, 0, 2).flatten(1)
                target[place] += before @ means[: i * rows, i * rows : (i + 1) * rows]
            carried = back[j * columns : (j + 1) * columns, : j * columns] @ wrong[i, :j].flatten(0, 1)
            torch.add(target[place], carried, out=moved[place])
        own = None if shift is None else shift[block, chunk]
        which, values = _in_turn(target, moved, inner[chunk], levels, width[block, chunk], own)
        found[block, chunk] = which
        wrong[block, chunk] = target - values
        errors[block, chunk] = goal[block, chunk] - values
    return found.permute(0, 3, 1, 2).reshape(blocks * rows, chunks * columns)[: len(weight), : len(along)]


def _in_turn(
    target: Tensor, moved: Tensor, inner: Tensor, levels: Tensor, width: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return places among the levels, and values, of tiles (k, columns, rows), columns in turn."""
    between = (levels[1:] + levels[:-1]) / 2
    divisor = torch.where(width == 0, torch.inf, width)
    which = torch.empty_like(target, dtype=torch.int64)
    wrong, values = torch.empty_like(target), torch.empty_like(target)
    for column in range(target.shape[1]):
        own = slice(column, column + 1)
        place = torch.baddbmm(moved[:, own], inner[:, own, :column], wrong[:, :column])
        place.div_(divisor[:, own])
        if shift is not None:
            place.add_(shift[:, own])
        which[:, own] = torch.bucketize(place, between)
        value = levels[which[:, own]]
        if shift is not None:
            value.sub_(shift[:, own])
        values[:, own] = value.mul_(width[:, own])
        wrong[:, own] = target[:, own] - value
    return which, values


def _tiles(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return `matrix` as (blocks of rows, chunks of columns, columns, rows), filled up with zeros."""
    m, n = matrix.shape
    full = pad(matrix, (0, -n % columns, 0, -m % rows))
    tiles = full.reshape(len(full) // rows, rows, full.shape[1] // columns, columns)
    return tiles.permute(0, 2, 3, 1).contiguous()


def _whole(mix: Tensor, size: int) -> Tensor:
    """Return `mix` filled up to (size, size) with the identity."""
    full = torch.eye(size, dtype=mix.dtype, device=mix.device)
    full[: len(mix), : len(mix)] = mix
    return full


def _diagonal(matrix: Tensor, size: int) -> list[Tensor]:
    return [matrix[at : at + size, at : at + size] for at in range(0, len(matrix), size)]


def _conditional_means(mix: Tensor, size: int) -> Tensor:
    """Return, in the columns of each block, by what the errors of all rows before it move its rows."""
    means = mix.clone()
    for block, own in enumerate(_diagonal(mix, size)):
        at = slice(block * size, (block + 1) * size)
        means[:, at] = torch.linalg.solve_triangular(own, mix[:, at], upper=True, left=False)
    return means
