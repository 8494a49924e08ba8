"""How many tokens a step may still compute, and whose prompt is next.

Plain numbers and keys. It does not know what a sequence, an adapter or a block is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Budget:
    """What is left of one step.

    A single token costs about the same whether a stream or the end of a prompt asks for it, so that
    only longer chunks are counted as prompt.

    Attributes:
        tokens: tokens of any kind.
        prompt_tokens: tokens in chunks of more than one.
        streams: whether anybody's stream waits for the step to end.
    """

    tokens: int
    prompt_tokens: int
    streams: bool = False

    def allows(self, size: int) -> bool:
        """Whether a chunk of `size` tokens has a place."""
        return size <= self.tokens and (size == 1 or size <= self.prompt_tokens)

    def take(self, size: int) -> None:
        """A chunk of `size` tokens has its place."""
        self.tokens -= size
        if size > 1:
            self.prompt_tokens -= size


class Turns:
    """Keys in the order of their turns.

    Who comes joins at the end, and goes there again once served. So whoever waits is passed by
    each of the others once at most, however often they leave and come back.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[str | None, None] = OrderedDict()

    def order(self, present: Iterable[str | None]) -> list[str | None]:
        """Those present, the next one first; who is not among them is forgotten."""
        wanted = dict.fromkeys(present)
        kept = [key for key in self._keys if key in wanted]
        self._keys = OrderedDict.fromkeys([*kept, *wanted])
        return list(self._keys)

    def served(self, key: str | None) -> None:
        """`key` had its turn."""
        if key in self._keys:
            self._keys.move_to_end(key)

    def __len__(self) -> int:
        return len(self._keys)
