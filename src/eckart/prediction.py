"""From predicted losses to expected ones: a monotone correction through what was measured.

Curvature leaves out terms between tokens and between modules, so that strong compression costs more than
it says. What is missing grows smoothly with the prediction: the logarithm of measured / predicted is
interpolated linearly in the logarithm of the prediction.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Pair = tuple[float, float]
"""A predicted and a measured increase of the loss."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A monotone map of predicted increases of the loss, through `knots` (predicted, expected), ascending.

    Beyond the knots the ratio of the nearest one holds; without any, the prediction stands. 0 stays 0.
    """

    knots: tuple[Pair, ...] = ()

    def of(self, predicted: float) -> float:
        """Return what is expected where `predicted` is; never below what is expected of a smaller one."""
        if not self.knots or predicted <= 0:
            return max(predicted, 0.0)
        (first, low), (last, high) = self.knots[0], self.knots[-1]
        if predicted <= first:
            return predicted * low / first
        if predicted >= last:
            return predicted * high / last
        for (left, below), (right, above) in pairwise(self.knots):
            if predicted <= right:
                share = math.log(predicted / left) / math.log(right / left)
                return float(below * (above / below) ** share)
        raise AssertionError("knots ascend")


def fit(pairs: Iterable[Pair]) -> Correction:
    """Return the correction of measured pairs.

    Pairs that are not positive have no logarithm and are left out: an increase below the noise of the
    text says nothing of a ratio. Where measured values fall while predictions grow, their logarithms are
    pooled (isotonic regression by pool adjacent violators: Ayer et al. 1955), so that the map is monotone.
    """
    usable = sorted(pair for pair in pairs if pair[0] > 0 and pair[1] > 0)
    pools: list[tuple[list[float], float, int]] = []
    for predicted, measured in usable:
        places, total, count = [predicted], math.log(measured), 1
        while pools and (pools[-1][1] / pools[-1][2] > total / count or pools[-1][0][-1] == places[0]):
            earlier, mass, number = pools.pop()
            places, total, count = [*earlier, *places], total + mass, count + number
        pools.append((places, total, count))
    knots = [
        (place, math.exp(total / count)) for places, total, count in pools for place in dict.fromkeys(places)
    ]
    return Correction(tuple(knots))


def left_out(pairs: Sequence[Pair]) -> list[float | None]:
    """Return what the correction by all other pairs expects for each; None where there are no others.

    At a measured point the correction is what was measured; how good it is elsewhere, this says.
    """
    found: list[float | None] = []
    for place, (predicted, _) in enumerate(pairs):
        others = fit([*pairs[:place], *pairs[place + 1 :]])
        found.append(others.of(predicted) if others.knots else None)
    return found
