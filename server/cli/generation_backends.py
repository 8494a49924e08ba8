"""The two places where the command line generates: an engine of its own, or a running server.

    GenerationPlace       what both can do, with TGI's parameters
    |-- LocalGeneration   starts an engine; adapters of a data directory or PEFT folders
    `-- RemoteGeneration  POST /generate and /generate_stream

Raises the library's errors, those of `server.errors` and of the engine, and `ServerRefused`; prints
nothing.
"""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from server.cli.http_client import RemoteServer, ServerRefused
from server.config.settings import Settings

if TYPE_CHECKING:
    from server.cli.named_adapters import FoundAdapter
    from server.generation.generator import Generation, Generator
    from server.store.registry import AdapterRecord
    from server.text.tokenizer import TextTokenizer

# TGI's, such as {"max_new_tokens": 8}.
Parameters: TypeAlias = Mapping[str, Any]

# Requests in flight at a server, where there are many prompts.
_AT_ONCE = 16
# The one adapter of an engine that is started for a command.
_ONLY = "adapter"


@dataclass(frozen=True)
class Ask:
    """One thing to generate from: a prompt as it is, or a row for the adapter's own template."""

    prompt: str | None = None
    row: dict[str, str] | None = None

    def body(self) -> dict[str, Any]:
        """As TGI's routes take it."""
        return {"inputs": self.prompt} if self.row is None else {"row": self.row}


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        text: the output.
        finish_reason: "length", "eos_token" or "stop_sequence".
        num_tokens: tokens of the output, the end of sequence among them.
        seed: of a sampled output.
    """

    text: str
    finish_reason: str
    num_tokens: int
    seed: int | None


class GenerationPlace(Protocol):
    """Where to generate, with the adapter that it was made for; `parameters` are TGI's."""

    def answers(self, asks: Sequence[Ask], parameters: Parameters) -> Iterator[Answer]:
        """All of them together, in their order."""
        ...

    def pieces(self, ask: Ask, parameters: Parameters) -> Iterator[str]:
        """One output, as it comes."""
        ...

    def close(self) -> None:
        """Stop what was started."""
        ...


class RemoteGeneration:
    """A running server.

    Args:
        server: closed together with this.
        adapter: NAME, NAME@VERSION or an alias; None is the base.
    """

    def __init__(self, server: RemoteServer, adapter: str | None) -> None:
        self._server = server
        self._adapter = adapter

    def close(self) -> None:
        """Close all connections."""
        self._server.close()

    def answers(self, asks: Sequence[Ask], parameters: Parameters) -> Iterator[Answer]:
        """See `GenerationPlace`."""
        with ThreadPoolExecutor(min(_AT_ONCE, len(asks))) as pool:
            try:
                yield from pool.map(lambda ask: self._answer(ask, parameters), asks)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def pieces(self, ask: Ask, parameters: Parameters) -> Iterator[str]:
        """See `GenerationPlace`."""
        body = {**ask.body(), "parameters": {**parameters, "details": True}}
        frames = self._server.events("POST", "/generate_stream", body, adapter=self._adapter)
        for _, frame in frames:
            if "error" in frame:
                raise ServerRefused(str(frame["error"]))
            if not frame["token"]["special"]:
                yield frame["token"]["text"]

    def _answer(self, ask: Ask, parameters: Parameters) -> Answer:
        body = {**ask.body(), "parameters": {**parameters, "details": True}}
        reply = self._server.post("/generate", body, adapter=self._adapter)
        details = reply["details"]
        return Answer(
            reply["generated_text"],
            details["finish_reason"],
            details["generated_tokens"],
            details["seed"],
        )


class LocalGeneration:
    """An engine in a process of its own, started for this and stopped by `close`.

    What the data directory holds is only read, so that servers may run on it.

    Args:
        settings: the base, and how the engine runs.
        found: the adapter; None is the base.

    Raises:
        CheckpointError, BaseMismatch: the adapter does not fit the base.
        EngineError: the engine did not start, with the reason.
    """

    def __init__(self, settings: Settings, found: FoundAdapter | None) -> None:
        from server.engine.client import EngineClient
        from server.store.registry import Registry

        self._max_running = settings.max_running
        self._work = tempfile.TemporaryDirectory(prefix="graftwork-")
        own = settings.model_copy(update={"data_dir": Path(self._work.name)})
        self._registry = Registry(own.data_dir)
        self._client = EngineClient(own.engine_config())
        self._runner = asyncio.Runner()
        try:
            self._generator, self._record = self._runner.run(self._start(settings, found))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the engine."""
        self._runner.run(self._client.stop())
        self._runner.close()
        self._registry.close()
        self._work.cleanup()

    def answers(self, asks: Sequence[Ask], parameters: Parameters) -> Iterator[Answer]:
        """See `GenerationPlace`."""
        yield from self._runner.run(self._answer_all(asks, parameters))

    def pieces(self, ask: Ask, parameters: Parameters) -> Iterator[str]:
        """See `GenerationPlace`."""
        pieces = self._pieces(ask, parameters)
        try:
            while (piece := self._runner.run(_next(pieces))) is not None:
                yield piece
        finally:
            self._runner.run(pieces.aclose())

    async def _start(
        self, settings: Settings, found: FoundAdapter | None
    ) -> tuple[Generator, AdapterRecord | None]:
        from server.app import load_text_tokenizer
        from server.generation.generator import Generator

        tokenizer: TextTokenizer
        if Path(settings.base).is_dir():
            # Both import for seconds: side by side.
            reading = asyncio.to_thread(load_text_tokenizer, settings)
            failure, read = await asyncio.gather(
                self._client.start(), reading, return_exceptions=True
            )
            for one in (failure, read):
                if isinstance(one, BaseException):
                    raise one
            tokenizer = cast("TextTokenizer", read)
        else:
            await self._client.start()  # which fetches the base
            tokenizer = await asyncio.to_thread(load_text_tokenizer, settings)
        record = None if found is None else self._publish(found)
        return Generator(self._client, self._registry, tokenizer, ""), record

    def _publish(self, found: FoundAdapter) -> AdapterRecord:
        from adapters.metadata import AdapterMetadata
        from server.cli.adapter_backends import stage

        metadata = AdapterMetadata(
            template=found.words.get("template"),
            tokenization=found.words.get("tokenization") or "boundary",
            base_digest=found.base_digest,
        )
        with self._registry.staging_dir() as directory:
            stage(found.directory, directory)
            return self._registry.publish(_ONLY, directory, self._client.base, metadata).record

    async def _submit(self, ask: Ask, parameters: Parameters) -> Generation:
        from server.api.generation.tgi import options_from
        from server.api.schemas import GenerateParameters

        # For each anew: where no seed is given, every output draws its own, as at a server.
        options = options_from(GenerateParameters.model_validate(parameters), 1)
        generator = self._generator
        if ask.row is None:
            prompt = await generator.encode(ask.prompt or "")
        else:
            prompt = await generator.encode_row(ask.row, self._record)
        request = generator.prepare(prompt, self._record, options, uuid.uuid4().hex)
        return generator.submit(request, options)

    async def _pieces(self, ask: Ask, parameters: Parameters) -> AsyncGenerator[str, None]:
        async for piece in await self._submit(ask, parameters):
            if not piece.special:
                yield piece.text

    async def _answer_all(self, asks: Sequence[Ask], parameters: Parameters) -> list[Answer]:
        room = asyncio.Semaphore(self._max_running)

        async def one(ask: Ask) -> Answer:
            async with room:
                return await self._answer(ask, parameters)

        return await asyncio.gather(*(one(ask) for ask in asks))

    async def _answer(self, ask: Ask, parameters: Parameters) -> Answer:
        generation = await self._submit(ask, parameters)
        async for _ in generation:
            pass
        sampling = generation.request.sampling
        seed = sampling.seed if sampling.do_sample else None
        return Answer(generation.text, str(generation.finish_reason), generation.num_tokens, seed)


async def _next(pieces: AsyncGenerator[str, None]) -> str | None:
    return await anext(pieces, None)
