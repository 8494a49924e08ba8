"""What an OpenAI body says about sampling, as the engine's options.

Knows no prompt, no adapter and no reply.
"""

from __future__ import annotations

from adapters.metadata import AdapterMetadata
from server.api.error_replies import invalid, quoted
from server.api.generation.openai.bodies import OpenAIBody
from server.api.generation.sampling import sampling_of
from server.errors import Contradiction
from server.generation.generator import Options
from server.generation.grammars import grammar_from


def options_of(
    body: OpenAIBody,
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    num_logprobs: int | None,
    prompt_logprobs: bool = False,
    prompt_field: str,
    vocab_size: int,
    adapter: AdapterMetadata | None,
) -> Options:
    """The options of the first sample of every prompt.

    Args:
        body: the request.
        max_tokens: as given; `max_completion_tokens` in the body means the same.
        default_max_tokens: what is taken if neither is given; None is all that fits.
        num_logprobs: see SamplingParams.
        prompt_logprobs: see SamplingParams.
        prompt_field: what this route calls the prompt.
        vocab_size: of the base; a logit bias names a smaller id.
        adapter: has a default temperature where it was trained on labels; None is the base.

    Raises:
        Contradiction: two fields disagree.
        RequestInvalid: a value that does not fit.
    """
    if body.temperature is None and adapter is not None:
        body = body.model_copy(update={"temperature": adapter.default_temperature})
    return Options(
        sampling=sampling_of(
            body,
            do_sample=body.temperature != 0,
            ignore_eos=bool(body.ignore_eos),
            num_logprobs=num_logprobs,
            prompt_logprobs=prompt_logprobs,
            logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
            grammar=grammar_from(
                response_format=body.response_format,
                structured_outputs=body.structured_outputs,
                guided_json=body.guided_json,
                guided_regex=body.guided_regex,
                guided_choice=body.guided_choice,
            ),
        ),
        max_new_tokens=_max_tokens(body, max_tokens),
        default_new_tokens=default_max_tokens,
        stop=tuple(body.stop or ()),
        include_stop=bool(body.include_stop_str_in_output),
        prompt_field=prompt_field,
        length_field="max_tokens"
        if body.max_completion_tokens is None
        else "max_completion_tokens",
    )


def samples_of(n: int | None, best_of: int | None, max_best_of: int) -> tuple[int, int]:
    """How many samples to return and to draw for every prompt.

    Raises:
        RequestInvalid: more than `max_best_of`, or fewer drawn than returned.
    """
    wanted = n or 1
    drawn = wanted if best_of is None else best_of
    for name, value in (("n", wanted), ("best_of", drawn)):
        if value > max_best_of:
            raise invalid(name, f"at most {max_best_of}", value)
    if drawn < wanted:
        raise invalid("best_of", f"at least n, which is {wanted}", drawn)
    return wanted, drawn


def _max_tokens(body: OpenAIBody, max_tokens: int | None) -> int | None:
    newer = body.max_completion_tokens
    if newer is not None and max_tokens is not None and newer != max_tokens:
        raise Contradiction(
            f"max_tokens says {max_tokens} and max_completion_tokens says {newer}",
            field="max_completion_tokens",
            expected=str(max_tokens),
            came=str(newer),
        )
    return max_tokens if newer is None else newer


def _logit_bias(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    known: dict[int, float] = {}
    for key, bias in biases.items():
        # str.isdigit takes other scripts' digits too; so does int().
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise invalid("logit_bias", f"token ids from 0 to {vocab_size - 1}", quoted(key))
        known[int(key)] = bias
    return tuple(known.items())
