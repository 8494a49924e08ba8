"""How many tokens a step may still compute, whose prompt is next, and which adapters crowd others.

Plain numbers and keys. It does not know what a sequence, an adapter or a block is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass
class Budget:
    """What is left of one step.

    A single token costs about the same for a stream and for the end of a prompt, so that
    only longer chunks are counted as prompt.

    Attributes:
        tokens: tokens of any kind.
        prompt_tokens: tokens in chunks of more than one.
        streams: whether any stream waits for the step to end.
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

    def allows_more(self, size: int, placed: int) -> bool:
        """Whether a chunk of `placed` tokens may grow by `size`."""
        return size <= self.tokens and size + (placed == 1) <= self.prompt_tokens

    def take_more(self, size: int, placed: int) -> None:
        """It grew. A single token that grows is counted as prompt from now on, itself as well."""
        self.tokens -= size
        self.prompt_tokens -= size + (placed == 1)


class Turns:
    """Keys in the order of their turns.

    A new key joins at the end, and returns there once served. So a waiting key is passed by
    each of the others once at most, however often they leave and come back.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[str | None, None] = OrderedDict()

    def order(self, present: Iterable[str | None]) -> list[str | None]:
        """The present keys, the next one first; absent ones are dropped."""
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


def crowd(
    running: Mapping[str | None, int], waiting: Collection[str | None], places: int
) -> Collection[str | None]:
    """The key that has more than half of what runs, and a quarter of the places, while others are there.

    Below a quarter, a step with its rows costs hardly more than one without them.

    Args:
        running: how many each key has running.
        waiting: keys that want a place.
        places: how many may run.

    Returns:
        That key, or nothing.
    """
    if len({*running, *waiting}) < 2 or not running:
        return ()
    key = max(running, key=lambda other: running[other])
    most = running[key]
    return (key,) if 2 * most > sum(running.values()) and 4 * most >= places else ()
