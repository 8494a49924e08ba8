"""How many requests and tokens a key may have, by `limits`, in the memory of one server.

Requests are counted in a moving window, exactly. Tokens are counted in a sliding window of two counters,
since a moving one would keep an entry a token: what the last whole window used counts by the share of
it that is still inside. What a key uses is known only as it is used, so a sequence that has begun ends,
and what it took above the quota counts against what comes next. Several servers on one data directory
each count for themselves, and a restart begins anew. Knows no HTTP.
"""

from __future__ import annotations

import time

import limits
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from server.engine.request import GenerationRequest
from server.errors import QuotaExceeded, RateLimited
from server.generation.observers import Ended, Watch
from server.store.caller import caller
from server.store.key import Key

# Tokens of a running sequence are counted so many at a time.
_BUNCH = 16
# A limit that no count reaches: `limits` does not count what goes above one.
_WITHOUT_END = 10**18


class Quotas:
    """What every key has used; a `Watcher` of generations."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._requests = MovingWindowRateLimiter(self._storage)
        self._tokens = SlidingWindowCounterRateLimiter(self._storage)

    def count_request(self, key: Key) -> None:
        """Count a request.

        Raises:
            RateLimited: it is one too many, and does not count.
        """
        if key.rate is None:
            return
        item = limits.parse(key.rate)
        if self._requests.hit(item, key.id):
            return
        reset = self._requests.get_window_stats(item, key.id).reset_time
        raise RateLimited(
            f"the key {key.id} may ask {key.rate}; try again later", reset - time.time()
        )

    def check_tokens(self) -> None:
        """Whether the caller may have any more tokens.

        Raises:
            QuotaExceeded: it has had as many as it may.
        """
        key = caller()
        if key is None or key.tokens is None:
            return
        seconds = self._wait(key.id, key.tokens)
        if seconds > 0:
            raise QuotaExceeded(
                f"the key {key.id} may use {key.tokens} tokens, prompts included, and has; "
                "try again later",
                seconds,
            )

    def began(self, request: GenerationRequest) -> Watch:
        """A request was handed to the engine: its prompt counts from here on."""
        key = caller()
        meter = _Meter(self, key if key is not None and key.tokens is not None else None)
        meter.add(len(request.prompt_token_ids))
        return meter

    def refused(self, adapter: str | None, code: str) -> None:
        """What was not begun costs nothing."""

    def count_tokens(self, key: Key, number: int) -> None:
        """Count tokens, above the quota too."""
        if key.tokens is not None:
            self._tokens.hit(_ledger(key.tokens), key.id, cost=number)

    def _wait(self, key_id: str, tokens: str) -> float:
        """Seconds until a token may be had again; 0 for now."""
        item = limits.parse(tokens)
        window = item.get_expiry()
        last, last_left, now, now_left = self._storage.get_sliding_window(
            _ledger(tokens).key_for(key_id), window
        )
        if last * last_left / window + now < item.amount:
            return 0.0
        if now < item.amount:  # the last window has to slide out far enough
            return last_left - (item.amount - now) * window / last
        # This window has to end (its counter is kept for one window more), and then to slide out.
        return now_left - window + window * (1 - item.amount / now)


class _Meter:
    """One generation: `server.generation.observers.Watch`."""

    __slots__ = ("_key", "_pending", "_quotas")

    def __init__(self, quotas: Quotas, key: Key | None) -> None:
        self._quotas = quotas
        self._key = key
        self._pending = 0

    def add(self, number: int) -> None:
        if self._key is not None and number:
            self._quotas.count_tokens(self._key, number)

    def first_token(self, seconds: float, queue_seconds: float | None) -> None:
        self._one_more()

    def token(self, seconds: float) -> None:
        self._one_more()

    def ended(self, how: Ended, seconds: float, code: str | None) -> None:
        self.add(self._pending)
        self._pending = 0

    def _one_more(self) -> None:
        self._pending += 1
        if self._pending == _BUNCH:
            self.add(self._pending)
            self._pending = 0


def _ledger(tokens: str) -> limits.RateLimitItem:
    """The quota's window, without its limit."""
    item = limits.parse(tokens)
    return type(item)(_WITHOUT_END, item.multiples, "tokens")
