"""How likely a given continuation is: what to ask the engine, and what to read from its answer.

The engine reports the log-probabilities of a prompt, so prompt and continuation are sent as one.
Knows no label, no adapter and no text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from server.engine.request import SamplingParams, TokenLogprob


def scoring(num_prompt_tokens: int) -> SamplingParams:
    """What to ask for prompt and continuation; the one token that is generated is thrown away.

    Args:
        num_prompt_tokens: tokens before the continuation, at least one.
    """
    return SamplingParams(
        max_new_tokens=1,
        ignore_eos=True,
        prompt_logprobs=True,
        prompt_logprobs_from=num_prompt_tokens,
    )


def score_of(prompt_logprobs: Sequence[TokenLogprob | None] | None, num_tokens: int) -> float:
    """Log-likelihood of a continuation of `num_tokens` tokens, at least one."""
    entries = (prompt_logprobs or ())[-num_tokens:]
    return math.fsum(entry.logprob for entry in entries if entry is not None)
