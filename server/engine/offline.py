"""The engine from Python, without HTTP: a base, some adapters, prompts in, texts out.

For scripts and notebooks. Everything runs in the calling thread and process; the server runs the same
engine in a process of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.checkpoint.archive import stage_upload
from adapters.checkpoint.folder import CheckedCheckpoint, check_checkpoint, load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from adapters.parts import ServingForm
from server.base.load import load_base
from server.base.tokenizer import load_tokenizer
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.grammar_compiler import Vocabulary
from server.engine.request import (
    AdapterRef,
    Event,
    FailedEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from server.engine.scoring import score_of, scoring

# A target to be scored: the adapter's name (None: the base), the ids of a prompt, those of the target.
Target = tuple[str | None, Sequence[int], Sequence[int]]

# Enough to fill the scheduler's batches; each holds its log-probabilities meanwhile.
_IN_FLIGHT = 256
# One token is generated and thrown away: the engine reports a prompt's log-probabilities with it.


class GenerationFailed(Exception):
    """The engine gave a request up; the message says why."""


class OfflineEngine:
    """A base model with adapters, for use from Python.

    Args:
        base: a Hugging Face directory, or a hub id together with `revision`.
        revision: pinned revision of a hub id.
        dtype: "bfloat16", "float32", or None to choose by the hardware.
        device: "cpu", "cuda".
        threads: threads within one operation; None leaves torch's choice.
        options: other fields of `EngineConfig`, such as `kv_bytes`.

    Raises:
        BaseUnsupported: the base cannot be served, with the reason.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
        **options: Any,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = load_base(str(base), dtype=dtype, device=device, revision=revision)
        config = EngineConfig(base=str(base), blobs_dir="", device=device, **options)
        self.spec = loaded.spec
        self.tokenizer_dir = loaded.tokenizer_dir
        self.tokenizer = load_tokenizer(loaded.tokenizer_dir)
        self._eos = tuple(loaded.eos_token_ids)
        self._limits = CheckpointLimits()
        self._staging = tempfile.TemporaryDirectory(prefix="graftwork-")
        self._directories: dict[str, Path] = {}
        self._adapters: dict[str, AdapterRef] = {}
        vocabulary = Vocabulary.of(self.tokenizer, self._eos)
        self._engine = Engine(loaded.model, loaded.spec, config, self._read, lambda: vocabulary)
        self._count = 0

    def add_adapter(self, name: str, directory: str | Path) -> CheckedCheckpoint:
        """Check a PEFT checkpoint against the base and make it usable as `name`.

        Raises:
            CheckpointError: it is not acceptable or does not fit this base.
        """
        folder = Path(tempfile.mkdtemp(dir=self._staging.name))
        # Checked as an upload is: other files that PEFT or its user left in the folder are not read.
        files = sorted(path for path in Path(directory).iterdir() if path.is_file())
        stage_upload([(path.name, path) for path in files], folder, self._limits)
        checked = check_checkpoint(folder, self.spec, self._limits)
        self._directories[checked.digest] = folder
        facts = checked.facts
        self._adapters[name] = AdapterRef(
            checked.digest, facts.num_virtual_tokens, facts.uses_scales
        )
        return checked

    def generate(
        self,
        prompts: Iterable[tuple[str | None, str]],
        sampling: SamplingParams | None = None,
        **options: Any,
    ) -> list[str]:
        """Generate for all prompts together.

        Args:
            prompts: pairs of an adapter's name (None: the base itself) and a prompt.
            sampling: how to choose tokens; greedy if left out.
            options: fields of `SamplingParams`, such as `max_new_tokens`, in place of `sampling`'s.

        Raises:
            KeyError: an adapter that was not added.
            GenerationFailed: a prompt is too long, its adapter cannot be read, or the grammar was refused.
        """
        params = dataclasses.replace(sampling or SamplingParams(eos_token_ids=self._eos), **options)
        ids = [
            self._submit(name, self.tokenizer(prompt)["input_ids"], params)
            for name, prompt in prompts
        ]
        tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
        while self._engine.has_work:
            for event in self._engine.step():
                self._take(event, tokens)
        return [str(self.tokenizer.decode(tokens[i], skip_special_tokens=True)) for i in ids]

    def score(
        self, targets: Sequence[Target], on_done: Callable[[int], None] = lambda _: None
    ) -> list[float]:
        """Log-likelihood of every target after its prompt, all of them in one mixed batch.

        Args:
            targets: see `Target`; a prompt and a target have at least one token each.
            on_done: called with the number of targets that are done, whenever it grows.

        Raises:
            KeyError: an adapter that was not added.
            ValueError: an empty prompt or target.
            GenerationFailed: prompt and target are too long, or an adapter cannot be read.
        """
        if any(not prompt or not target for _, prompt, target in targets):
            raise ValueError("expected a prompt and a target of at least one token each, came none")
        scores = [0.0] * len(targets)
        in_flight: dict[str, int] = {}
        waiting = 0  # the first target that was not submitted
        done = 0
        try:
            while done < len(targets):
                while waiting < len(targets) and len(in_flight) < _IN_FLIGHT:
                    name, prompt, target = targets[waiting]
                    params = scoring(len(prompt))
                    in_flight[self._submit(name, (*prompt, *target), params)] = waiting
                    waiting += 1
                for event in self._engine.step():
                    if isinstance(event, FailedEvent):
                        raise GenerationFailed(event.message)
                    if isinstance(event, TokenEvent):
                        index = in_flight.pop(event.request_id)
                        scores[index] = score_of(event.prompt_logprobs, len(targets[index][2]))
                        done += 1
                        on_done(done)
        finally:
            for request_id in in_flight:
                self._engine.abort(request_id)
        return scores

    def close(self) -> None:
        """Stop the thread that reads adapters, and remove the copies of what was added."""
        self._engine.close()
        self._staging.cleanup()

    def _submit(self, name: str | None, ids: Sequence[int], params: SamplingParams) -> str:
        self._count += 1
        request = GenerationRequest(
            str(self._count),
            tuple(ids),
            params,
            None if name is None else self._adapters[name],
        )
        for event in self._engine.submit(request):
            self._take(event, {})
        return request.request_id

    def _take(self, event: Event, tokens: dict[str, list[int]]) -> None:
        if isinstance(event, FailedEvent):
            for request_id in tokens:
                self._engine.abort(request_id)
            raise GenerationFailed(event.message)
        if isinstance(event, TokenEvent):
            tokens[event.request_id].append(event.token_id)

    def _read(self, digest: str) -> ServingForm:
        return load_serving_form(self._directories[digest], self.spec, self._limits)
