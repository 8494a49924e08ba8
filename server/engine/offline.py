"""The engine from Python, without HTTP: a base, some adapters, prompts in, texts out.

For scripts and notebooks. Everything runs in the calling thread and process; the server runs the same
engine in a process of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from adapters.checkpoint.archive import stage_upload
from adapters.checkpoint.folder import CheckedCheckpoint, check_checkpoint, load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from adapters.parts import ServingForm
from server.base.load import load_base
from server.base.tokenizer import load_tokenizer
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.errors import EngineError
from server.engine.grammar_compiler import Vocabulary
from server.engine.python_calls import (
    Choice,
    GenerationFailed,
    InvalidCall,
    Prompt,
    Prompts,
    Sampling,
    UnknownAdapter,
    check_options,
    check_targets,
    choice_of,
    prompts_of,
)
from server.engine.request import (
    AdapterRef,
    Event,
    FailedEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from server.engine.scoring import score_of, scoring
from server.text.detokenizer import IncrementalDetokenizer
from server.text.stop import StopStrings

__all__ = [
    "EngineError",
    "GenerationFailed",
    "InvalidCall",
    "OfflineEngine",
    "Target",
    "UnknownAdapter",
]

# A target to be scored: the adapter's name (None: the base), the ids of a prompt, those of the target.
Target = tuple[str | None, Sequence[int], Sequence[int]]

# Enough to fill the scheduler's batches; each holds its log-probabilities meanwhile.
_IN_FLIGHT = 256
# One token is generated and thrown away: the engine reports a prompt's log-probabilities with it.


class _Output:
    """The text of one request as it grows.

    Args:
        decode: ids -> text, without special tokens.
        prompt_ids: what the output follows.
        stop: texts that end it.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(decode, prompt_ids)
        self._stops = StopStrings(stop, include=False)
        self._has_stopped = False
        self.text = ""

    def feed(self, token_id: int) -> bool:
        """Add a token; True once a stop text has ended the output."""
        piece, self._has_stopped = self._stops.feed(self._detokenizer.feed(token_id))
        self.text += piece
        return self._has_stopped

    def end(self) -> None:
        """Add what was held back."""
        if not self._has_stopped:
            piece, stopped = self._stops.feed(self._detokenizer.flush())
            self.text += piece + ("" if stopped else self._stops.flush())


class OfflineEngine:
    """A base model with adapters, for use from Python.

    Args:
        base: a Hugging Face directory, or a hub id together with `revision`.
        revision: pinned revision of a hub id.
        dtype: "bfloat16", "float32", or None to choose by the hardware.
        device: "cpu", "cuda".
        threads: threads within one operation; None leaves torch's choice.
        options: other fields of `EngineConfig`, such as `kv_bytes`.

    A context closes it.

    Raises:
        BaseUnsupported: the base cannot be served, with the reason.
        InvalidCall: an option that `EngineConfig` does not have.
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
        check_options(options)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_adapter(self, name: str, directory: str | Path) -> CheckedCheckpoint:
        """Check a PEFT checkpoint against the base and make it usable as `name`.

        Args:
            name: any text that is not empty; one that is in use changes its meaning.
            directory: the folder that PEFT saved, or a .zip or .tar of it.

        Raises:
            CheckpointError: it is not acceptable or does not fit this base.
            InvalidCall: nothing is there, the name is no text, or no request could use the adapter.
        """
        if not isinstance(name, str) or not name:
            raise InvalidCall(f"name is {name!r:.60}, expected a text that is not empty")
        folder = Path(tempfile.mkdtemp(dir=self._staging.name))
        # Checked as an upload is: other files that PEFT or its user left in the folder are not read.
        files = _files_of(Path(directory))
        stage_upload([(path.name, path) for path in files], folder, self._limits)
        checked = check_checkpoint(folder, self.spec, self._limits)
        facts = checked.facts
        ref = AdapterRef(checked.digest, facts.num_virtual_tokens, facts.uses_scales)
        shortest = GenerationRequest("", (0,), SamplingParams(max_new_tokens=1), ref)
        if (reason := self._engine.scheduler.refusal(shortest)) is not None:
            raise InvalidCall(f"no request could use the adapter {name!r}: {reason}")
        self._directories[checked.digest] = folder
        self._adapters[name] = ref
        return checked

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that were added, sorted."""
        return tuple(sorted(self._adapters))

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling | None = None,
        *,
        adapter: str | None = None,
        **options: Any,
    ) -> list[str]:
        """Generate for all prompts together.

        Args:
            prompts: a text, or a list of texts, of token ids, or of pairs of an adapter's name (None:
                the base itself) and one of these.
            sampling: how to choose tokens: options by name, or the engine's own parameters; greedy if
                left out.
            adapter: the adapter of the prompts that name none; None is the base.
            options: fields of `SamplingParams` in place of `sampling`'s; also `max_tokens`,
                `stop` (a text or several, left out of the output) and `stop_token_ids`. A temperature
                other than 0 draws tokens. Without a length an output has 64 tokens, or what fits.

        Returns:
            One text a prompt, in their order.

        Raises:
            UnknownAdapter: an adapter that was not added.
            InvalidCall: an argument that is not taken.
            GenerationFailed: a prompt is too long, its adapter cannot be read, or the grammar was refused.
        """
        choice = choice_of(sampling, options, self._eos)
        pairs = prompts_of(prompts, adapter, self._adapters)
        outputs: dict[str, _Output] = {}
        running: dict[str, int] = {}
        try:
            for number, (name, prompt) in enumerate(pairs):
                ids = self._ids_of(number, prompt)
                request_id = self._next_id()
                outputs[request_id] = _Output(self._decode, ids, choice.stop)
                running[request_id] = number
                self._submit(request_id, name, ids, self._params(choice, name, ids), number)
            while running:
                for event in self._engine.step():
                    self._take(event, outputs, running)
        finally:
            for request_id in running:
                self._engine.abort(request_id)
        return [output.text for output in outputs.values()]

    def score(
        self, targets: Sequence[Target], on_done: Callable[[int], None] = lambda _: None
    ) -> list[float]:
        """Log-likelihood of every target after its prompt, all of them in one mixed batch.

        Args:
            targets: see `Target`; a prompt and a target have at least one token each.
            on_done: called with the number of targets that are done, whenever it grows.

        Raises:
            UnknownAdapter: an adapter that was not added.
            InvalidCall: not such targets, or an empty prompt or target.
            GenerationFailed: prompt and target are too long, or an adapter cannot be read.
        """
        check_targets(targets, self._adapters)
        scores = [0.0] * len(targets)
        in_flight: dict[str, int] = {}
        waiting = 0  # the first target that was not submitted
        done = 0
        try:
            while done < len(targets):
                while waiting < len(targets) and len(in_flight) < _IN_FLIGHT:
                    name, prompt, target = targets[waiting]
                    params = scoring(len(prompt))
                    request_id = self._next_id()
                    in_flight[request_id] = waiting
                    self._submit(request_id, name, (*prompt, *target), params, waiting)
                    waiting += 1
                for event in self._engine.step():
                    if isinstance(event, FailedEvent):
                        raise _failed(in_flight[event.request_id], event)
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

    def _next_id(self) -> str:
        self._count += 1
        return str(self._count)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _ids_of(self, number: int, prompt: Prompt) -> list[int]:
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InvalidCall(f"prompt {number} has no tokens, expected at least one")
        size = self.spec.vocab_size
        if stray := next((token for token in ids if not 0 <= token < size), None):
            raise InvalidCall(
                f"prompt {number} holds the token id {stray}, expected ids of 0 to {size - 1}"
            )
        return list(ids)

    def _params(self, choice: Choice, name: str | None, ids: Sequence[int]) -> SamplingParams:
        """The sampling of one prompt: a length that was not given is at most what fits."""
        virtual = 0 if name is None else self._adapters[name].num_virtual_tokens
        room = min(self.spec.max_positions - virtual, self._engine.limits.room(virtual))
        fits = room + 1 - len(ids)
        length = choice.sampling.max_new_tokens
        if choice.is_length_given or fits >= length:
            return choice.sampling
        return dataclasses.replace(choice.sampling, max_new_tokens=max(1, fits))

    def _submit(
        self,
        request_id: str,
        name: str | None,
        ids: Sequence[int],
        params: SamplingParams,
        number: int,
    ) -> None:
        adapter = None if name is None else self._adapters[name]
        for event in self._engine.submit(
            GenerationRequest(request_id, tuple(ids), params, adapter)
        ):
            if isinstance(event, FailedEvent):
                raise _failed(number, event)

    def _take(self, event: Event, outputs: Mapping[str, _Output], running: dict[str, int]) -> None:
        if isinstance(event, FailedEvent):
            raise _failed(running.pop(event.request_id), event)
        if not isinstance(event, TokenEvent) or event.request_id not in running:
            return  # a stop text has ended it within this step
        output = outputs[event.request_id]
        if output.feed(event.token_id):
            self._engine.abort(event.request_id)
        elif event.finish_reason is None:
            return
        else:
            output.end()
        del running[event.request_id]

    def _read(self, digest: str) -> ServingForm:
        return load_serving_form(self._directories[digest], self.spec, self._limits)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InvalidCall(f"nothing is at {str(path)!r}, expected a folder that PEFT saved")
    return sorted(file for file in path.iterdir() if file.is_file())


def _failed(number: int, event: FailedEvent) -> GenerationFailed:
    return GenerationFailed(f"prompt {number}: {event.message}")
