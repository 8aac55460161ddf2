"""The smallest place at which a value is within a limit, by few evaluations."""

from collections.abc import Callable, Mapping

Guess = Callable[[Mapping[int, float]], int | None]
"""From what was tried (place -> value) to the place that is expected, None where nothing is."""


def smallest(
    value: Callable[[int], float], limit: float, least: int, most: int, guess: Guess, evaluations: int
) -> tuple[int | None, dict[int, float]]:
    """Return the smallest place of `least` .. `most` within `limit`, and the values of all that were tried.

    Bisection, started from guesses: each lies strictly inside of the bracket, and after two results on the
    same side the middle is taken. Values should fall with the place. What is returned was evaluated; unless
    evaluations ran out, or it is `least`, so was the place below it, and is above the limit. None: not even
    `most` is within it.

    Args:
        value: of a place, the expensive thing.
        limit: the largest value wanted.
        least, most: the legal places.
        guess: see `Guess`.
        evaluations: how many before the last of `most`, at least 1.
    """
    tried: dict[int, float] = {}
    below, above = least - 1, most + 1
    sides: list[bool] = []
    while above - below > 1 and len(tried) < evaluations:
        asked = guess(tried)
        if asked is None or (len(sides) > 1 and sides[-1] == sides[-2]):
            asked = (below + above) // 2
        asked = min(max(asked, below + 1), above - 1)
        tried[asked] = value(asked)
        sides.append(tried[asked] <= limit)
        below, above = (below, asked) if sides[-1] else (asked, above)
    if above > most and most not in tried:
        tried[most] = value(most)
        above = most if tried[most] <= limit else above
    return (above if above <= most else None), tried
