"""Request and token quotas per key, using `limits`, in the memory of one server.

Requests are counted exactly, in a moving window. Tokens are counted in a sliding window of two counters,
since a moving window would store an entry per token; the previous window's count is weighted by the share
that still overlaps. Usage is known only as tokens are produced, so a running sequence is not interrupted;
the excess counts against later requests. Servers that share a data directory count separately, and a
restart resets the counters. Independent of HTTP.
"""

from __future__ import annotations

import time

import limits
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, SlidingWindowCounterRateLimiter

from server.engine.request import GenerationRequest
from server.errors import QuotaExceeded, RateLimited
from server.generation.observers import Ended, GenerationObserver
from server.store.caller import Caller
from server.store.key import Key

# Tokens of a running sequence are counted so many at a time.
_BUNCH = 16
# An unreachable limit: `limits` does not count hits beyond a limit.
_WITHOUT_END = 10**18


class Quotas:
    """Usage per key; an `Observer` of generations."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._requests = MovingWindowRateLimiter(self._storage)
        self._tokens = SlidingWindowCounterRateLimiter(self._storage)

    def count_request(self, key: Key) -> None:
        """Count a request.

        Raises:
            RateLimited: the request exceeds the limit; it is not counted.
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

    def check_tokens(self, caller: Caller) -> None:
        """Check that the caller has tokens left.

        Raises:
            QuotaExceeded: the quota is used up.
        """
        key = caller.key
        if key is None or key.tokens is None:
            return
        seconds = self._wait(key.id, key.tokens)
        if seconds > 0:
            raise QuotaExceeded(
                f"the key {key.id} may use {key.tokens} tokens, prompts included, and has; "
                "try again later",
                seconds,
            )

    def began(self, request: GenerationRequest, caller: Caller, /) -> GenerationObserver:
        """A request was submitted to the engine: count its prompt."""
        key = caller.key
        meter = _Meter(self, key if key is not None and key.tokens is not None else None)
        meter.add(len(request.prompt_token_ids))
        return meter

    def refused(self, adapter: str | None, code: str) -> None:
        """Refused generations are not counted."""

    def count_tokens(self, key: Key, number: int) -> None:
        """Count tokens, even beyond the quota."""
        if key.tokens is not None:
            self._tokens.hit(_ledger(key.tokens), key.id, cost=number)

    def _wait(self, key_id: str, tokens: str) -> float:
        """Seconds until a token is available; 0 if one is available now."""
        item = limits.parse(tokens)
        window = item.get_expiry()
        last, last_left, now, now_left = self._storage.get_sliding_window(
            _ledger(tokens).key_for(key_id), window
        )
        if last * last_left / window + now < item.amount:
            return 0.0
        if now < item.amount:  # wait until enough of the previous window has expired
            return last_left - (item.amount - now) * window / last
        # This window must end (its counter is stored for one more window), then slide out.
        return now_left - window + window * (1 - item.amount / now)


class _Meter:
    """One generation: `server.generation.observers.GenerationObserver`."""

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
    """The quota's window with an unreachable limit."""
    item = limits.parse(tokens)
    return type(item)(_WITHOUT_END, item.multiples, "tokens")
