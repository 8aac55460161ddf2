"""Measure how fast models are: alone for memory and loading, in turn for everything else."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn

from .. import api, environment, fusing, hub, models
from ..adapt import loading
from ..errors import ConfigError, ModelError
from ..losses import dtype_of
from ..stages import Watch
from . import alone, compiled, decoding, layers, shapes
from .decoding import Pass
from .layers import Shape
from .options import KEEP, LAYER_TOKENS, LayerOptions, Options, Rounds, Setting, numbers
from .result import Figures, LayerSpeeds, Machine, Row, Speed, Subject
from .spread import Spread
from .timing import Clock, fixed_threads, in_turn, load_average


def bench(
    model: Any,
    *,
    against: Any = None,
    prompt_tokens: int | Sequence[int] = 128,
    new_tokens: int | Sequence[int] = 32,
    batch: int | Sequence[int] = 1,
    runs: int = 10,
    warmup: int = 2,
    loads: int = 3,
    threads: int | None = None,
    seed: int = 0,
    compile: bool = False,
    fuse: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> Speed:
    """Measure tokens per second of prompt and decoding, time to first token, load time, memory, file bytes.

    Prompts are random token ids of both vocabularies, the same for both models. Decoding is greedy, with a
    cache of keys and values, and ends after `new_tokens` whatever they are.

    Args:
        model, against: hub ids, folders, .gguf files or models; the two are run in turn in one process.
        prompt_tokens, new_tokens, batch: one or several; every combination is measured.
        runs: rounds that count, at least 3.
        warmup: rounds before them.
        loads: how often each model is loaded in a process of its own, for load time and memory; 0: never.
            Models that are given in memory are not.
        threads: of the CPU; default: as torch has it.
        seed: of the token ids.
        compile: run the models under torch.compile as well, with static caches, in the same rounds; how long
            compiling took is a figure of its own. It is done anew for every setting.
        fuse: fuse low-rank models first (eckart.fuse); those given in memory stay fused.
        dtype: to compute in; default: float32 on a CPU, else as stored.
        device: cuda, mps, cpu; default: the first that is there.
        trust_remote_code: run code that the models bring.
        watch: (stage, done, total).

    Raises:
        ConfigError: a number is too small, or there are fewer positions than prompt and new tokens need.
        ModelError: a model cannot be loaded, does not decode with a cache, or (`compile`) not compile.
        NotFinite: a logit is NaN or infinite.
    """
    rounds = Rounds(runs, warmup, threads)
    sizes = [numbers(given) for given in (prompt_tokens, new_tokens, batch)]
    options = Options(sizes[0], sizes[1], sizes[2], rounds, loads, seed, compile, fuse)
    given = {"model": model} | ({} if against is None else {"against": against})
    for source in given.values():
        _check(source, options, trust_remote_code)
    hub.device(device)
    if dtype is not None:
        hub.dtype(dtype)
    busy = load_average()
    with fixed_threads(threads) as count:
        request = partial(
            alone.Request, setting=options.largest(), loads=loads, threads=count, seed=seed, dtype=dtype,
            device=device, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        apart = {name: _alone(source, request, loads, watch) for name, source in given.items()}
        found = {
            name: api.loaded(source, None, dtype, device, trust_remote_code) for name, source in given.items()
        }
        if fuse:
            for one in found.values():
                fusing.fuse(one.model)
        rows = measure({name: one.model for name, one in found.items()}, options, watch=watch)
        machine = _machine(found["model"].model.device, dtype_of(found["model"].model), count, busy)
    subjects = {name: _subject(found[name], apart[name]) for name in given}
    return Speed(subjects["model"], subjects.get("against"), tuple(rows), options, machine)


def _check(source: Any, options: Options, remote: bool) -> None:
    """Refuse, before anything is loaded, what is no model, or has fewer positions than a setting needs."""
    if isinstance(source, (str, Path)):
        if loading.is_adapter(source):
            return
        config: Any = hub.load_config(str(source), trust_remote_code=remote)
    elif isinstance(source, nn.Module) and hasattr(source, "config"):
        config = source.config
    else:
        raise ModelError(f"got a {type(source).__name__}: give a hub id, a path or a model of transformers")
    decoding.check_length(config, _named(source), options.largest())


def _named(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _alone(
    source: Any, request: Callable[[str], alone.Request], loads: int, watch: Watch | None
) -> alone.Alone | None:
    if loads == 0 or not isinstance(source, (str, Path)):
        return None
    if watch is not None:
        watch(f"load {Path(source).name} alone", 0, 1)
    return alone.measure(request(str(source)))


def measure(
    given: Mapping[str, Any],
    options: Options,
    *,
    clock: Clock = time.perf_counter,
    watch: Watch | None = None,
    backend: str = "inductor",
) -> list[Row]:
    """Run the models in turn in every setting of `options`.

    Args:
        given: "model", and "against" where there is another one.
        options: settings and rounds.
        clock: what tells the seconds.
        watch: ("run", rounds done, rounds in all).
        backend: of torch.compile.

    Raises:
        ConfigError: a model has fewer positions than a setting needs.
        ModelError: a model does not decode with a cache, makes no tokens, or does not compile.
        NotFinite: a logit is NaN or infinite.
    """
    for model in given.values():
        decoding.check_length(model.config, type(model).__name__, options.largest())
        if options.compiled:
            compiled.check(model)
    vocabulary = min(models.vocabulary(model) for model in given.values())
    settings, each = options.settings(), options.rounds.warmup + options.rounds.runs
    rows = []
    for place, setting in enumerate(settings):
        ids = decoding.prompt(setting, vocabulary, options.seed)
        for model in given.values():
            decoding.check_tokens(
                decoding.greedy(model, ids, setting.new_tokens, finite=True),
                setting,
                models.vocabulary(model),
            )
        tick = partial(_tick, watch, place * each, len(settings) * each)
        ready = _compiled(given, options, setting, ids, clock, backend)
        tasks = {name: partial(_pass, model, ids, setting, clock) for name, model in given.items()}
        tasks |= {
            f"compiled {name}": partial(_compiled_pass, one, ids, setting, clock)
            for name, one in ready.items()
        }
        passes = in_turn(tasks, options.rounds, tick)
        figures = {name: _figures(done, setting) for name, done in passes.items()}
        rows.append(_row(setting, figures, {name: one.seconds for name, one in ready.items()}))
    return rows


def _row(setting: Setting, figures: Mapping[str, Figures], seconds: Mapping[str, float]) -> Row:
    model, against = figures["model"], figures.get("against")
    if not seconds:
        return Row(setting, model, against)
    inner = Row(setting, figures["compiled model"], figures.get("compiled against"))
    return Row(setting, model, against, inner, seconds)


def _compiled(
    given: Mapping[str, Any], options: Options, setting: Setting, ids: Tensor, clock: Clock, backend: str
) -> dict[str, compiled.Compiled]:
    if not options.compiled:
        return {}
    torch.compiler.reset()  # else sizes of other settings would count as so many tries of the same code
    return {
        name: compiled.prepare(model, setting, ids, backend=backend, clock=clock)
        for name, model in given.items()
    }


def _compiled_pass(one: compiled.Compiled, ids: Tensor, setting: Setting, clock: Clock) -> Pass:
    done = one.greedy(ids, setting.new_tokens, clock)
    return decoding.check_tokens(done, setting, models.vocabulary(one.model))


def _tick(watch: Watch | None, before: int, total: int, done: int, _: int) -> None:
    if watch is not None:
        watch("run", before + done, total)


def _pass(model: Any, ids: Tensor, setting: Setting, clock: Clock) -> Pass:
    done = decoding.greedy(model, ids, setting.new_tokens, clock=clock)
    return decoding.check_tokens(done, setting, models.vocabulary(model))


def _figures(passes: Sequence[Pass], setting: Setting) -> Figures:
    return Figures(
        prefill=Spread(tuple(done.prefill_rate(setting) for done in passes)),
        decode=Spread(tuple(done.decode_rate(setting) for done in passes)),
        first_token=Spread(tuple(done.first_token for done in passes)),
    )


def _subject(loaded: hub.Loaded, apart: alone.Alone | None) -> Subject:
    model = loaded.model
    size = loaded.bytes if loaded.bytes is not None else _cached_bytes(loaded.source)
    return Subject(
        source=loaded.source,
        kind=type(model).__name__,
        dtype=str(dtype_of(model)).removeprefix("torch."),
        parameters=models.parameter_count(model),
        vocabulary=models.vocabulary(model),
        file_bytes=size,
        alone=apart,
    )


def _cached_bytes(source: str) -> int | None:
    """Return the bytes of the weight files of a hub id that was downloaded."""
    try:
        folder = huggingface_hub.snapshot_download(source, local_files_only=True)
    except (OSError, ValueError):
        return None
    return hub.source_bytes(folder)


def _machine(device: torch.device, dtype: torch.dtype, threads: int, busy: float | None) -> Machine:
    name = str(dtype).removeprefix("torch.")
    return Machine(str(device), name, threads, busy, environment.describe())


def bench_layers(
    model: Any = None,
    *,
    keep: float = KEEP,
    shape: Sequence[str | Shape] = (),
    tokens: int | Sequence[int] = LAYER_TOKENS,
    runs: int = 10,
    warmup: int = 2,
    threads: int | None = None,
    fuse: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    watch: Watch | None = None,
) -> LayerSpeeds:
    """Time each distinct shape of the linear maps of a model: dense, as two factors, and pivoted.

    Weights are random, since time does not depend on them, and none of the model are read. Of a compressed
    model the shapes are those that its architecture has when it is dense. A form that is not smaller at
    `keep` is left out.

    Args:
        model: a hub id, a folder, a .gguf file or a model of transformers; None: only `shape`.
        keep: of the parameters of each map, in (0, 1).
        shape: others to time as well, (m, n) or "4096x14336": outputs by inputs.
        tokens: how many at once, one or several.
        runs, warmup, threads: as in `bench`.
        fuse: time low-rank forms as eckart.fuse makes them, too: run as their products alone, and, where
            pivots are folded, without putting outputs in order.
        dtype: of weights and inputs; default: float32 on a CPU, else as the model is stored, or float32.
        device: cuda, mps, cpu; default: the first that is there.
        trust_remote_code: run code that the model brings.
        watch: (stage, done, total).

    Raises:
        ConfigError: an option is not legal, or there is neither a model nor a shape.
        ModelError: the config cannot be read, the blocks hold matrices that are not understood, or a form
            computes something else than its map on this device.
    """
    options = LayerOptions(keep, numbers(tokens), Rounds(runs, warmup, threads), fuse)
    asked = {shapes.parse(one) if isinstance(one, str) else one: 0 for one in shape}
    own = {} if model is None else shapes.of_model(model, trust_remote_code=trust_remote_code)
    if not own and not asked:
        raise ConfigError("no map to time: give a model, or a shape as 4096x14336")
    place = hub.device(device)
    kind = hub.dtype(dtype) if dtype else hub.compute_dtype(_stored(model, trust_remote_code), place)
    busy = load_average()
    with fixed_threads(threads) as count:
        found = layers.measure(asked | own, options, place, kind, watch=watch)
        machine = _machine(place, kind, count, busy)
    source = "no model" if model is None else _named(model)
    return LayerSpeeds(source, tuple(found), options, machine)


def _stored(model: Any, remote: bool) -> torch.dtype:
    if model is None:
        return torch.float32
    if isinstance(model, (str, Path)):
        return hub.stored_dtype(str(model), trust_remote_code=remote)
    return dtype_of(model)
