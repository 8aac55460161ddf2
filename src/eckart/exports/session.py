"""Exported models that run: one loop for both engines, no transformers, no forward of PyTorch."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from .options import GRAPHS, ONNX, OPENVINO, need_to_run

REPORT = "eckart.json"


class Engine(Protocol):
    """A loaded graph with the keys and values of the tokens that it was fed."""

    def reset(self) -> None:
        """Forget the tokens fed so far."""

    def feed(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Append `ids` (n,); return the logits (k, vocabulary) at the places `keep` (k,) among them."""


class OnnxEngine:
    """onnxruntime; keys and values stay in its own values.

    Args:
        path: the graph.
        threads: of the CPU.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import numpy as np
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        settings.log_severity_level = 3
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.outputs = [port.name for port in self.session.get_outputs()]
        shapes = {port.name: port.shape for port in self.session.get_inputs() if "past_" in port.name}
        self.nothing = {
            name: np.zeros((1, shape[1], 0, shape[3]), dtype=np.float32) for name, shape in shapes.items()
        }
        self.reset()

    def reset(self) -> None:
        """Forget the tokens fed so far."""
        self.past = [self.value(nothing) for nothing in self.nothing.values()]

    def feed(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Append `ids` (n,); return the logits (k, vocabulary) at the places `keep` (k,) among them."""
        given = {"input_ids": self.value(ids[None].numpy()), "keep": self.value(keep.numpy())}
        given |= dict(zip(self.nothing, self.past, strict=True))
        logits, *self.past = self.session.run_with_ort_values(self.outputs, given)
        return torch.from_numpy(logits.numpy()[0])


class OpenvinoEngine:
    """OpenVINO on the CPU, computing in float32; keys and values are its internal state.

    Args:
        path: the graph.
        threads: of the CPU.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def reset(self) -> None:
        """Forget the tokens fed so far."""
        self.request.reset_state()

    def feed(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Append `ids` (n,); return the logits (k, vocabulary) at the places `keep` (k,) among them."""
        made = self.request.infer({"input_ids": ids[None].numpy(), "keep": keep.numpy()})
        return torch.from_numpy(made["logits"][0].copy())


ENGINES: dict[str, Callable[[Path, int], Engine]] = {ONNX: OnnxEngine, OPENVINO: OpenvinoEngine}


@dataclass(slots=True)
class Session:
    """An exported model, ready to be fed.

    It holds one sequence. `length` is how many tokens were fed since the last `reset`.

    Args:
        engine: what runs it.
        target: onnx or openvino.
        stops: tokens that end a text.
        positions: how many tokens it has positions for, None where there is no limit.
    """

    engine: Engine
    target: str
    stops: tuple[int, ...] = ()
    positions: int | None = None
    length: int = 0

    def reset(self) -> None:
        """Forget the tokens fed so far."""
        self.engine.reset()
        self.length = 0

    def feed(self, ids: Tensor, every: bool = False) -> Tensor:
        """Append `ids` (n,), n >= 1; return the logits of the last one (1, vocabulary), or of `every` one.

        Raises:
            ConfigError: there are no ids, or more than there are positions left for.
        """
        ids = ids.to(torch.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise ConfigError(f"token ids of shape {tuple(ids.shape)}: give one row of at least one token")
        if self.positions is not None and self.length + len(ids) > self.positions:
            raise ConfigError(
                f"{self.length} tokens and {len(ids)} more: the model has {self.positions} positions; reset()"
            )
        found = self.engine.feed(ids, torch.arange(0 if every else len(ids) - 1, len(ids)))
        self.length += len(ids)
        return found

    def generate(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stops: Collection[int] | None = None,
    ) -> Tensor:
        """Return the tokens (k,) that the model goes on with behind `prompt`, k <= `max_new_tokens`.

        Args:
            prompt: token ids; what was fed before is forgotten.
            max_new_tokens: how many at most, at least 1.
            temperature: 0 takes always the likeliest token, above 0 tokens are drawn.
            top_k: draw among so many of the likeliest.
            top_p: draw among the likeliest that together have this probability.
            generator: of the draws, on the CPU; default: seed 0.
            stops: tokens that end the text, which are the last then; default: the model's own; () for none.

        Raises:
            ConfigError: an option is not legal, or there are too few positions.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        generator = generator or torch.Generator().manual_seed(0)
        ends = set(self.stops if stops is None else stops)
        self.reset()
        fed, found = torch.as_tensor(prompt, dtype=torch.int64), []
        while True:
            logits = self.feed(fed)[-1]
            token = choose(logits, temperature, top_k, top_p, generator)
            found.append(token)
            if len(found) == max_new_tokens or token in ends:
                return torch.tensor(found)
            fed = torch.tensor([token])


def check_sampling(new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ConfigError unless the options of `Session.generate` are legal."""
    if new_tokens < 1:
        raise ConfigError(f"max_new_tokens {new_tokens}: give at least 1")
    if temperature < 0:
        raise ConfigError(f"temperature {temperature:g}: give 0, for the likeliest token, or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k {top_k}: give at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p {top_p:g}: must lie in (0, 1]")


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """Return a token by its `logits` (vocabulary,): the likeliest one at temperature 0, else one drawn."""
    if temperature == 0:
        return int(logits.argmax())
    ranked, tokens = (logits.float() / temperature).sort(descending=True)
    chances = ranked[:top_k].softmax(-1)
    if top_p is not None:
        before = chances.cumsum(-1) - chances
        chances = chances.where(before < top_p, 0.0)
    return int(tokens[torch.multinomial(chances, 1, generator=generator)])


def start(folder: Path, target: str, threads: int | None = None) -> Session:
    """Return a session on the graph for `target` in `folder`."""
    need_to_run(target)
    engine = ENGINES[target](folder / GRAPHS[target], threads or torch.get_num_threads())
    return Session(engine, target, _stops(folder), _positions(folder))


def open_export(folder: str | Path, threads: int | None = None) -> Session:
    """Open a folder that `eckart export --to onnx` or `openvino` wrote, to generate with.

    Args:
        folder: what was written.
        threads: of the CPU; default: as many as torch has.

    Raises:
        ConfigError: the engine is not installed.
        ModelError: there is no such folder, or no exported model in it.
    """
    folder = Path(folder)
    target = next((name for name, graph in GRAPHS.items() if (folder / graph).is_file()), None)
    if target is None:
        raise ModelError(f"no {' or '.join(GRAPHS.values())} in {folder}: give what `eckart export` wrote")
    return start(folder, target, threads)


def _stops(folder: Path) -> tuple[int, ...]:
    found = _values(folder / "generation_config.json").get("eos_token_id")
    found = _values(folder / "config.json").get("eos_token_id") if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (found,)


def _positions(folder: Path) -> int | None:
    found: int | None = _values(folder / REPORT).get("positions")
    return found


def _values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
