"""Whether a soak went well: memory, books and counters. Faults of single replies are in the tally."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.soak.figures import Samples, Snapshot, replies, total
from tests.soak.tally import Tally

if TYPE_CHECKING:
    from tests.soak.run import Outcome, Plan

# The server's word for a reply that nobody read.
CLIENT_GONE = 499
# Threads and descriptors that come and go by themselves: pool threads, the last connections.
_SLACK = 45
_AT_REST = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "graftwork_adapter_requests_waiting",
    "graftwork_adapter_requests_in_flight",
)


def judge(outcome: Outcome, plan: Plan, before: Snapshot, samples: Samples) -> None:
    """Hold the end against the beginning, and the server's books against the clients'."""
    faults = outcome.faults
    for name in _AT_REST:
        if (left := total(samples, name)) != 0:
            faults.append(f"{name} is {left} at the end")
    faults += _memory(outcome, plan)
    after = outcome.memory[-1]
    for field in ("threads", "descriptors"):
        for process in ("server", "engine"):
            was, now = (getattr(getattr(at, process), field) for at in (before, after))
            if now > was + _SLACK:
                faults.append(f"{process}: {field} were {was} and are {now}")
    faults += _replies(outcome.tally, samples)
    faults += _generations(outcome.tally, samples)


def _memory(outcome: Outcome, plan: Plan) -> list[str]:
    first, last = outcome.memory[0], outcome.memory[-1]
    faults = []
    for field in ("rss", "pss", "anonymous"):
        was, now = first.total(field), last.total(field)
        share = now / was - 1
        outcome.notes[f"{field} of both, end to first look"] = (
            f"{was / 1024:.1f} to {now / 1024:.1f} MiB, {share:+.2%}"
        )
        # A PSS grows when somebody else's process ends who mapped the same libraries: told, not judged.
        if field == "pss" or plan.memory_share is None:
            continue
        if share > plan.memory_share:
            faults.append(f"memory ({field}) grew by {share:.2%}: {was} KiB, then {now} KiB")
    return faults


def _replies(tally: Tally, samples: Samples) -> list[str]:
    """Every reply that a client saw was counted, and none besides but for clients that left."""
    faults = []
    counted = replies(samples)
    by_route: Counter[tuple[str, str]] = Counter()
    for (method, route, status), number in counted.items():
        by_route[method, route] += number
        seen = tally.replies[method, route, status]
        left = tally.left[method, route]
        if (method, route) in tally.sent and not seen <= number <= seen + left:
            faults.append(
                f"{method} {route} {status}: {number} counted, {seen} seen, {left} left before"
            )
    for route, sent in tally.sent.items():
        if not sent - tally.left[route] <= by_route[route] <= sent:
            faults.append(f"{route}: {sent} sent, {by_route[route]} counted")
    return faults


def _generations(tally: Tally, samples: Samples) -> list[str]:
    """Generations that began have ended, and what clients were told of is among them."""
    faults = []
    began = total(samples, "graftwork_adapter_requests_total")
    ended = total(samples, "vllm:request_success_total")
    if began != ended:
        faults.append(f"{began} generations began, {ended} ended")
    whole = sum(
        total(samples, "vllm:request_success_total", finished_reason=reason)
        for reason in ("stop", "length")
    )
    if whole < tally.sequences:
        faults.append(f"clients saw {tally.sequences} sequences, {whole} were counted")
    # A grammar that cannot be compiled is a refusal of the engine; nothing else may fail there.
    errors = total(samples, "vllm:request_success_total", finished_reason="error")
    errors -= total(samples, "graftwork_adapter_failures_total", code="grammar_invalid")
    if errors:
        faults.append(f"{errors} generations ended in an error")
    tokens = total(samples, "vllm:generation_tokens_total")
    if tokens < tally.tokens:
        faults.append(f"clients saw {tally.tokens} tokens, {tokens} were counted")
    refused = sum(n for (_, _, status), n in tally.replies.items() if status == 429)
    counted = total(samples, "graftwork_adapter_failures_total", code="overloaded")
    left = sum(tally.left.values())
    if not refused <= counted <= refused + left:
        faults.append(f"{refused} requests saw 429, {counted} were counted")
    return faults
