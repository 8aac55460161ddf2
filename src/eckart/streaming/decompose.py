"""The way through the blocks and back: measure the dense model, gather statistics, decompose, keep."""

from collections.abc import Sequence

import torch

from .. import models, routing
from ..calibrate import Calibrated
from ..factorize import factor_block
from ..linalg import Metric, check_matrix
from ..models import Target
from ..stats import Moment, Stats, collect
from . import parts
from .job import ENDS, Job
from .parts import Kept
from .passes import Slopes, Track, Watch, forward, gather, gather_at_entrance, losses
from .team import by_cost

_ENTRANCE, _EXIT = "entrance", "exit"


def measured(job: Job, tracks: Sequence[Track], what: str, watch: Watch) -> dict[str, list[float]]:
    """Bring `tracks` and the calibration through the dense model; return the losses of the former by name.

    They are kept under the name `what`; the gradients that the way back starts from are as well.
    """
    if not job.work.has(f"{what}.json"):
        calibration, slopes = job.calibration(), job.slopes()
        forward(job.stream, [*tracks, calibration], watch)
        with job.stream.exit():
            found = {track.name: losses(job.stream, track) for track in tracks}
            _start(job, calibration, slopes)
        everywhere = job.team.gathered(found)
        job.team.wait()
        if job.team.rank == 0:
            job.work.write_json(what, {name: in_order([own[name] for own in everywhere]) for name in found})
        job.team.wait()
        for track in tracks:
            track.delete(job.count)
    return dict(job.work.read_json(what))


def in_order(shares: Sequence[Sequence[float]]) -> list[float]:
    """Return the values of windows that were dealt out one by one, in their order."""
    total = sum(map(len, shares))
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]


def _start(job: Job, calibration: Track, slopes: Slopes | None) -> None:
    """Run the exit on the calibration text: gradients to go back with, statistics of an output head."""
    heads = [name for target in job.targets(None) for name in target.modules if name != job.stream.table]
    generator = torch.Generator().manual_seed(job.recipe.seed + job.team.rank)
    with collect(job.stream.model, heads, job.recipe.statistics()) as stats:
        if slopes is not None:
            slopes.start(job.stream, job.recipe.labels, generator)
        if heads:
            last, chosen = calibration.at(job.count), set() if slopes is None else set(slopes.chosen)
            with torch.no_grad():
                for number in range(len(calibration.rows)):
                    if number not in chosen:
                        job.stream.leave(last.read(number).to(job.stream.place))
    if heads:
        job.team.add(stats)
        _keep(job, _EXIT, stats)


def _keep(job: Job, name: str, stats: Stats) -> None:
    if job.team.rank == 0:
        tensors = {f"{kind}|{module}": moment.total for (kind, module), moment in stats.moments.items()}
        counts = {f"{kind}|{module}": str(moment.count) for (kind, module), moment in stats.moments.items()}
        job.work.write_tensors(f"statistics/{name}", tensors, counts)
    job.team.wait()


def _known(job: Job, name: str) -> Stats:
    if not job.work.has(f"statistics/{name}.safetensors"):
        return Stats()
    tensors, counts = job.work.read_tensors(f"statistics/{name}")
    stats = Stats()
    for key, total in tensors.items():
        kind, _, module = key.partition("|")
        stats.leaders[module] = module
        stats.moments[kind, module] = Moment(total.to(job.stream.place), int(counts[key]))  # type: ignore[index]
    return stats


def at_ends(job: Job) -> Calibrated:
    """Return the statistics of the embeddings and the output head, which were gathered on both ways."""
    stats = _known(job, _EXIT)
    entrance = _known(job, _ENTRANCE)
    stats.moments |= entrance.moments
    stats.leaders |= entrance.leaders
    return Calibrated(stats, *job.tokens())


def in_block(job: Job, index: int) -> tuple[Calibrated, list[str]]:
    """Return the statistics of the targets of block number `index`, which is in memory, and warnings."""
    names = [name for target in job.targets(index) for name in target.modules]
    found = gather(job.stream, index, job.calibration(), job.slopes(), names, job.recipe.statistics())
    job.team.add(found)
    lacking = routing.fill(job.stream.model, job.targets(index), found)
    return Calibrated(found, *job.tokens()), lacking


def decompose(job: Job, watch: Watch) -> None:
    """Decompose all targets, the last block first; what is finished is skipped."""
    steps = job.steps()
    blocks = [index for index in reversed(range(job.count)) if _needed(job, index)]
    for done, index in enumerate(blocks):
        if not all(job.team.gathered(_finished(job, index))):
            with job.stream.block(index):
                _decompose(job, str(index), job.targets(index), *in_block(job, index))
            if not job.recipe.stores:
                _forget(job, index)
        watch(done + 1, len(blocks))
    if ENDS in steps and not parts.curves_kept(job.work, ENDS):
        with job.stream.entrance():
            for name in {name for target in job.targets(None) for name in target.modules}:
                if name == job.stream.table:
                    found = gather_at_entrance(
                        job.stream, job.calibration(), job.slopes(), name, job.recipe.statistics()
                    )
                    job.team.add(found)
                    _keep(job, _ENTRANCE, found)
            with job.stream.exit():
                _decompose(job, ENDS, job.targets(None), at_ends(job), [])


def _needed(job: Job, index: int) -> bool:
    """Tell whether the way back has to come to block number `index`: only what lies before matters then."""
    first = min((i for i in range(job.count) if job.targets(i)), default=job.count)
    return index >= first or bool(job.targets(None))


def _finished(job: Job, index: int) -> bool:
    """Tell whether the way back has passed block number `index`: what only it needs is deleted by then."""
    kept, slopes = [parts.curves_kept(job.work, str(i)) for i in range(index + 1)], job.slopes()
    return kept[index] and (slopes is None or slopes.at(index).exists() or any(kept[:index]))


def _forget(job: Job, index: int) -> None:
    """Delete what nothing before block number `index` needs."""
    job.calibration().at(index + 1).delete()
    slopes = job.slopes()
    if slopes is not None:
        slopes.at(index + 1).delete()


def _decompose(
    job: Job, step: str, targets: Sequence[Target], calibrated: Calibrated, warnings: Sequence[str]
) -> None:
    """Decompose this process's share of `targets`, which are in memory, and keep all that is found."""
    recipe, model = job.recipe, job.stream.model
    owners = by_cost([target.size * min(target.shape) for target in targets], job.team.size)
    own: dict[str, Kept] = {}
    short: dict[str, int] = {}
    shared: dict[str, Metric] = {}
    for target, owner in zip(targets, owners, strict=True):
        if owner == job.team.rank:
            check_matrix(models.weight(model, target), target.name)
            if calibrated.stats.leader(target.name) not in shared:
                shared.clear()  # those that read one input stand together, and a root is large
            made = factor_block(
                recipe, model, [target], job.dimensions([target]), [], calibrated, short, shared
            )
            for name in list(made):
                parts.keep_factors(job.work, name, made[name])
                own[name] = parts.without_factors(job.work, name, made.pop(name))
        calibrated.stats.forget(target.modules)
    everywhere = job.team.gathered((own, short))
    if job.team.rank == 0:
        together: dict[str, Kept] = {}
        lacking: dict[str, int] = {}
        for found, need in everywhere:
            together |= found
            lacking |= {kind: max(lacking.get(kind, 0), need[kind]) for kind in need}
        parts.keep_curves(job.work, step, together, lacking, warnings)
    job.team.wait()
