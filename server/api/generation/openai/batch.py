"""Every sequence of one request, side by side in the engine.

Tokens come out in the order in which they are made, whichever sequence they belong to. No more than
`max_parallel` sequences are in the engine at a time; the others follow as those end. Knows nothing
of JSON, choices or usage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from server.engine.request import GenerationRequest
from server.generation.generator import Generation, Generator, Options, Piece

# Between attempts to enter a full queue.
_RETRY_SECONDS = 0.05


class Batch:
    """The sequences of one request. Iterate `pieces` once; `abort` is safe at any time.

    Args:
        generator: the engine's front.
        requests: at least one, prepared with `options`.
        options: the same for all.
        max_parallel: sequences in the engine at a time.

    Attributes:
        generations: those that were begun, in the order of `requests`.
    """

    def __init__(
        self,
        generator: Generator,
        requests: Sequence[GenerationRequest],
        options: Options,
        max_parallel: int,
    ) -> None:
        self.generations: list[Generation] = []
        self._generator = generator
        self._requests = requests
        self._options = options
        self._max_parallel = max_parallel
        self._num_active = 0
        self._arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (index in `requests`, piece) until every sequence has ended.

        Raises:
            EngineOverloaded: the queue is full, and no sequence was begun yet.
            EngineUnavailable: a sequence could not be begun.
            RequestFailed: the engine gave one up; the others are given up with it.
        """
        try:
            self._begin_more()
            if len(self._requests) == 1:  # the common case needs no reader of its own
                async for piece in self.generations[0]:
                    yield 0, piece
                return
            num_ended = 0
            while num_ended < len(self._requests):
                while not self._num_active and self._arrived.empty():
                    # Others took the places: what was begun is not given up for that.
                    await asyncio.sleep(_RETRY_SECONDS)
                    self._begin_more()
                index, arrived = await self._arrived.get()
                if isinstance(arrived, Exception):
                    raise arrived
                if arrived.finish_reason is not None:
                    num_ended += 1
                    self._num_active -= 1
                    self._begin_more()
                yield index, arrived
        finally:
            self.abort()
            await asyncio.gather(*self._readers, return_exceptions=True)

    def abort(self) -> None:
        """Give every row back."""
        for reader in self._readers:
            reader.cancel()
        for generation in self.generations:
            generation.abort()

    def _begin_more(self) -> None:
        while len(self.generations) < len(self._requests) and self._num_active < self._max_parallel:
            index = len(self.generations)
            submit = self._generator.try_submit if index else self._generator.submit
            generation = submit(self._requests[index], self._options)
            if generation is None:
                return  # a full queue: this request's later sequences wait
            self.generations.append(generation)
            self._num_active += 1
            if len(self._requests) > 1:
                self._readers.append(asyncio.create_task(self._read(index, generation)))

    async def _read(self, index: int, generation: Generation) -> None:
        try:
            async for piece in generation:
                self._arrived.put_nowait((index, piece))
        except Exception as error:
            self._arrived.put_nowait((index, error))
