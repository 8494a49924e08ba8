"""An engine over a tiny model, run to the end in this thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from adapters.checkpoint.folder import load_serving_form, read_config
from adapters.checkpoint.limits import CheckpointLimits
from adapters.method import parse_config
from adapters.methods import method_of
from adapters.parts import ServingForm
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import (
    AdapterRef,
    FailedEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from tests.tiny_models import tiny_spec

TINY = EngineConfig(
    base="",
    blobs_dir="",
    kv_bytes=4 << 20,
    max_running=32,
    max_step_tokens=64,
    prefill_chunk=16,
    block_size=8,
)


def tiny_engine(
    model: PreTrainedModel,
    directories: dict[str, Path] | None = None,
    config: EngineConfig = TINY,
    read_form: Callable[[str], ServingForm] | None = None,
) -> Engine:
    """An engine whose adapters' digests are the keys of `directories`."""
    spec = tiny_spec(model)
    folders = directories or {}
    read = read_form or (lambda d: load_serving_form(folders[d], spec, CheckpointLimits()))
    return Engine(model, spec, config, read)


def adapter_ref(digest: str, directory: Path, engine: Engine) -> AdapterRef:
    """What the registry would tell the engine of a checkpoint."""
    raw = read_config(directory / "adapter_config.json", CheckpointLimits())
    method = method_of(raw)
    form = load_serving_form(directory, engine.spec, CheckpointLimits())
    assert parse_config(method.config_class, raw).peft_type == method.peft_type
    return AdapterRef(digest, form.num_virtual_tokens, method.peft_type == "IA3")


def request(
    request_id: str,
    prompt: Iterable[int],
    adapter: AdapterRef | None = None,
    max_new_tokens: int = 32,
    **sampling: object,
) -> GenerationRequest:
    """A greedy request unless `sampling` says otherwise."""
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)  # type: ignore[arg-type]
    return GenerationRequest(request_id, tuple(prompt), params, adapter)


def run(
    engine: Engine,
    requests: Iterable[GenerationRequest],
    on_step: Callable[[int], None] | None = None,
    max_steps: int = 5000,
) -> dict[str, list[TokenEvent]]:
    """Submit all at once and step until nothing is left; audits the scheduler after each step."""
    events: dict[str, list[TokenEvent]] = {}
    for one in requests:
        refused = engine.submit(one)
        assert not refused, refused
    for step in range(max_steps):
        if not engine.has_work:
            return events
        for event in engine.step():
            assert not isinstance(event, FailedEvent), event
            if isinstance(event, TokenEvent):
                events.setdefault(event.request_id, []).append(event)
        engine.scheduler.check_integrity()
        if on_step is not None:
            on_step(step)
    raise AssertionError(f"work is left after {max_steps} steps")


def tokens(events: list[TokenEvent]) -> list[int]:
    """The token ids of one request."""
    return [event.token_id for event in events]


def teacher_forced(
    engine: Engine, prompt: list[int], continuation: list[int], adapter: AdapterRef | None
) -> torch.Tensor:
    """Log-probabilities (len(continuation), V) of what follows the prompt, by one prefill."""
    vocabulary = engine.spec.vocab_size
    forced = request(
        "forced",
        [*prompt, *continuation],
        adapter,
        max_new_tokens=1,
        num_logprobs=vocabulary,
        prompt_logprobs=True,
    )
    (event,) = run(engine, [forced])["forced"]
    assert event.prompt_logprobs is not None
    out = torch.empty(len(continuation), vocabulary)
    for row, entry in zip(out, event.prompt_logprobs[len(prompt) :], strict=True):
        assert entry is not None
        for token, value in entry.top:
            row[token] = value
    return out
