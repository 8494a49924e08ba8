"""Rates and token quotas, by their own clock: `limits` asks the time module."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from server.api.error_replies import retry_after
from server.engine.request import GenerationRequest
from server.errors import QuotaExceeded, RateLimited
from server.generation.quotas import Quotas
from server.store.caller import UNRESTRICTED, Caller
from server.store.key import Key
from server.store.rates import checked_limit

# A whole hour, so that windows of an hour begin with it.
START = 1_795_348_800.0


def a_key(number: int = 1, **limits: str) -> Key:
    said = {name: checked_limit(name, text, 10**6) for name, text in limits.items()}
    facts = {"rate": None, "tokens": None, **said}
    now = datetime.now(UTC)
    return Key(f"key-{number}", "a", b"", frozenset({"generate"}), None, None, created_at=now,
               expires_at=None, last_used_at=None, revoked_at=None, **facts)  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = START

    monkeypatch.setattr("time.time", lambda: Clock.now)
    return Clock


@pytest.fixture
def quotas() -> Quotas:
    return Quotas()


def test_requests_move_out_of_their_window_one_by_one(quotas, clock):
    key = a_key(rate="3/minute")
    for seconds in (0, 10, 20):
        clock.now = START + seconds
        quotas.count_request(key)
    clock.now = START + 30
    with pytest.raises(RateLimited, match="key-1 may ask 3 per 1 minute") as caught:
        quotas.count_request(key)
    assert caught.value.retry_after_seconds == pytest.approx(30)
    quotas.count_request(a_key(2, rate="3/minute"))  # somebody else's are not counted
    clock.now = START + 60.5
    quotas.count_request(key)
    with pytest.raises(RateLimited) as caught:
        quotas.count_request(key)
    assert caught.value.retry_after_seconds == pytest.approx(9.5)


def test_a_key_without_a_limit_has_none(quotas):
    key = a_key()
    for _ in range(1000):
        quotas.count_request(key)
        quotas.count_tokens(key, 10**9)
        quotas.check_tokens(Caller(key))


def test_tokens_are_counted_above_the_quota_and_slide_out(quotas, clock):
    key = a_key(tokens="100/hour")
    quotas.check_tokens(Caller(key))
    quotas.count_tokens(key, 99)
    quotas.check_tokens(Caller(key))
    quotas.count_tokens(key, 101)  # a sequence that had begun
    clock.now = START + 600
    with pytest.raises(QuotaExceeded, match="100 per 1 hour tokens") as caught:
        quotas.check_tokens(Caller(key))
    # The window ends in 50 minutes, and half of the 200 has to slide out of the next.
    wait = caught.value.retry_after_seconds
    assert wait == pytest.approx(50 * 60 + 30 * 60)
    clock.now += wait - 60
    with pytest.raises(QuotaExceeded) as caught:
        quotas.check_tokens(Caller(key))
    assert caught.value.retry_after_seconds == pytest.approx(60)
    clock.now += retry_after(caught.value.retry_after_seconds) + 1
    quotas.check_tokens(Caller(key))
    quotas.check_tokens(Caller(a_key(2, tokens="100/hour")))
    quotas.check_tokens(UNRESTRICTED)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 40])
def test_a_generation_counts_its_prompt_and_its_tokens(num_tokens, quotas, clock):
    key = a_key(tokens=f"{10 + num_tokens + 1}/day")
    watch = quotas.began(GenerationRequest("r", tuple(range(10))), Caller(key))
    # Its tokens are read by whoever reads them.
    watch.first_token(0.1, 0.0)
    for _ in range(num_tokens - 1):
        watch.token(0.1)
    watch.ended("length", 1.0, None)
    quotas.check_tokens(Caller(key))
    quotas.count_tokens(key, 1)
    with pytest.raises(QuotaExceeded):
        quotas.check_tokens(Caller(key))


def test_a_running_generation_is_counted_before_it_ends(quotas, clock):
    key = a_key(tokens="20/day")
    watch = quotas.began(GenerationRequest("r", (1, 2, 3, 4)), Caller(key))
    watch.first_token(0.1, 0.0)
    for _ in range(15):
        watch.token(0.1)
    with pytest.raises(QuotaExceeded):
        quotas.check_tokens(Caller(key))
