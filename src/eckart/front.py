"""The Pareto front: what nothing else beats in both of two figures."""

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell of each point (cost, loss) whether no other is at most as large in both and smaller in one.

    Of equal points all are on the front, or none.
    """
    order = sorted(range(len(points)), key=lambda place: points[place])
    found = [False] * len(points)
    least = float("inf")
    previous: tuple[float, float] | None = None
    for place in order:
        point = points[place]
        if point[1] < least or (point == previous and point[1] == least):
            found[place], least, previous = True, point[1], point
    return found
