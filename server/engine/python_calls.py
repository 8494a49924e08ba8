"""What a Python caller of the engine may pass, and the errors that it gets when it passes something else.

Turns prompts and options, also by vLLM's names, into the engine's own. Independent of models and
tokenizers.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from server.engine.config import EngineConfig
from server.engine.errors import EngineError
from server.engine.request import Grammar, SamplingParams

# A text, or its token ids.
Prompt: TypeAlias = str | Sequence[int]
# With the name of an adapter; None is the base itself.
AdapterPrompt: TypeAlias = tuple[str | None, Prompt]
Prompts: TypeAlias = str | Iterable[Prompt | AdapterPrompt]

_SHOWN_NAMES = 10
_SHOWN_CHARACTERS = 60
_ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_OTHERS = {
    "best_of": "give the prompt several times, each call with another seed",
    "logprobs": "texts are returned; Engine.score gives the log-likelihood of a target",
    "lora_request": "name an added adapter with adapter=",
    "model": "name an added adapter with adapter=",
    "n": "give the prompt several times, each call with another seed",
    "stream": "texts are returned when all are complete; a server streams",
}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _share(value: Any) -> bool:
    return _number(value) and 0 < value <= 1


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


# Option -> whether a value is one of it, and the words for those that are.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (_flag, "True or False"),
    "frequency_penalty": (_number, "a number"),
    "grammar": (lambda value: isinstance(value, Grammar), "a Grammar"),
    "ignore_eos": (_flag, "True or False"),
    "max_new_tokens": (lambda value: _whole(value) and value >= 1, "a whole number of at least 1"),
    "min_p": (lambda value: _number(value) and 0 <= value < 1, "0 or more, and less than 1"),
    "presence_penalty": (_number, "a number"),
    "repetition_penalty": (lambda value: _number(value) and value > 0, "a number of more than 0"),
    "seed": (_whole, "a whole number"),
    "temperature": (lambda value: _number(value) and value >= 0, "a number of at least 0"),
    # -1 is vLLM's word for all.
    "top_k": (lambda value: _whole(value) and value >= -1, "a whole number of at least 0"),
    "top_p": (_share, "more than 0 and at most 1"),
    "typical_p": (_share, "more than 0 and at most 1"),
}


class InvalidCall(EngineError, ValueError):
    """An argument that the engine does not take; the message says what it expected."""


class UnknownAdapter(EngineError, LookupError):
    """An adapter that was not added; the message lists those that were."""


class GenerationFailed(EngineError):
    """The engine gave a request up; the message says why."""


class SamplingOptions(dict[str, Any]):
    """Options of `OfflineEngine.generate` to use for several calls, checked when they are made.

    Args:
        options: see `choice_of`.

    Raises:
        InvalidCall: as `choice_of`.
    """

    def __init__(self, **options: Any) -> None:
        choice_of(None, options, ())
        super().__init__(options)

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={value!r}" for name, value in self.items())
        return f"SamplingParams({listed})"


# The engine's own, where a value has its meaning already, or options by name.
Sampling: TypeAlias = SamplingParams | Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """How the outputs of one call are chosen.

    Attributes:
        sampling: without regard to the length of a prompt.
        stop: texts that end an output and are left out of it.
        is_length_given: whether the caller set `max_new_tokens`; else it is at most what fits.
    """

    sampling: SamplingParams
    stop: tuple[str, ...]
    is_length_given: bool


def prompts_of(
    prompts: Prompts, adapter: str | None, known: Collection[str]
) -> list[AdapterPrompt]:
    """Every prompt with its adapter.

    Args:
        prompts: see `Prompts`.
        adapter: that of the prompts that name none.
        known: the adapters that were added.

    Raises:
        InvalidCall: not a prompt, or a prompt that names another adapter than `adapter`.
        UnknownAdapter: an adapter that was not added.
    """
    if adapter is not None:
        check_adapter(adapter, known)
    if isinstance(prompts, str):
        return [(adapter, prompts)]
    if isinstance(prompts, tuple) and len(prompts) == 2 and isinstance(prompts[1], str):
        raise InvalidCall(
            "prompts is a tuple of two: write [(adapter, prompt)] for one prompt of an adapter, or a "
            "list of texts for two prompts"
        )
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InvalidCall(
            f"prompts is {_kind(prompts)}, expected a text, or a list of texts, of token ids or of "
            "(adapter, prompt)"
        )
    return [_pair(number, item, adapter, known) for number, item in enumerate(prompts)]


def _pair(number: int, item: Any, adapter: str | None, known: Collection[str]) -> AdapterPrompt:
    if _is_prompt(item):
        return adapter, item
    if not (isinstance(item, tuple | list) and len(item) == 2 and _is_prompt(item[1])):
        if isinstance(item, Mapping) and "role" in item:
            raise InvalidCall(
                f"prompt {number} is a message of a chat: make a text of them with "
                "engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
            )
        raise InvalidCall(
            f"prompt {number} is {_kind(item)}, expected a text, token ids, or (adapter, prompt) with "
            "None for the base"
        )
    name = item[0]
    if name is not None:
        if name not in known and isinstance(item[1], str) and item[1] in known:
            raise InvalidCall(
                f"prompt {number}: the adapter comes first, write ({item[1]!r}, text)"
            )
        check_adapter(name, known)
    if adapter is not None and name != adapter:
        raise InvalidCall(
            f"prompt {number} names {name!r} and adapter= says {adapter!r}: leave one of them out"
        )
    return name, item[1]


def check_adapter(name: object, known: Collection[str]) -> None:
    """Refuse a name that was not added.

    Raises:
        UnknownAdapter: with the names that were.
    """
    if isinstance(name, str) and name in known:
        return
    names = sorted(known)
    listed = ", ".join(names[:_SHOWN_NAMES]) or "none"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    raise UnknownAdapter(
        f"no adapter is called {name!r:.{_SHOWN_CHARACTERS}}; added are: {listed}{more}. "
        "Add it with add_adapter(name, folder), or name none for the base"
    )


def _is_prompt(item: object) -> bool:
    if isinstance(item, str):
        return True
    is_list = isinstance(item, Sequence) and not isinstance(item, bytes) and len(item) > 0
    return is_list and all(type(one) is int for one in cast("Sequence[object]", item))


def _kind(value: object) -> str:
    return "None" if value is None else f"of the type {type(value).__name__}"


def check_targets(targets: Sequence[Any], known: Collection[str]) -> None:
    """Refuse targets that cannot be scored.

    Raises:
        InvalidCall: not (adapter, ids of a prompt, ids of a target), or one without a token.
        UnknownAdapter: an adapter that was not added.
    """
    for number, item in enumerate(targets):
        if not isinstance(item, tuple | list) or len(item) != 3:
            raise InvalidCall(
                f"target {number} is {_kind(item)}, expected (adapter, ids of a prompt, ids of a target)"
            )
        name, *parts = item
        for part in parts:
            if isinstance(part, str) or not _is_prompt(part):
                raise InvalidCall(
                    f"target {number}: expected a prompt and a target of at least one token id each; "
                    "engine.tokenizer(text)['input_ids'] gives those of a text"
                )
        if name is not None:
            check_adapter(name, known)


def check_options(options: Iterable[str]) -> None:
    """Refuse what `EngineConfig` does not have.

    Raises:
        InvalidCall: with the nearest name.
    """
    known = sorted(
        {field.name for field in dataclasses.fields(EngineConfig)} - {"base", "blobs_dir", "device"}
    )
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(known)}"
            raise InvalidCall(f"the engine has no option {option}; {hint}")


def choice_of(
    sampling: Sampling | None, options: Mapping[str, Any], eos: tuple[int, ...]
) -> Choice:
    """The options of a call over those of `sampling`.

    A temperature of 0 is greedy; another one, or a filter, draws, as on the server's routes.

    Args:
        sampling: the caller's, or None.
        options: fields of `SamplingParams`, `max_tokens`, `stop` and `stop_token_ids`. None leaves a
            field as it is.
        eos: the base's end of sequence, where the caller names none.

    Raises:
        InvalidCall: an unknown option, one given twice, or a value out of bounds.
    """
    given = _fields(options)
    if isinstance(sampling, Mapping):
        given = {**_fields(sampling), **given}
        sampling = None
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise InvalidCall(f"sampling is {_kind(sampling)}, expected SamplingParams")
    stop = _stops(given.pop("stop", ()))
    start = sampling or SamplingParams()
    ends = _ids("eos_token_ids", given.pop("eos_token_ids", start.eos_token_ids)) or eos
    ends = (*ends, *_ids("stop_token_ids", given.pop("stop_token_ids", ())))
    for name, value in given.items():
        _check_value(name, value)
    if isinstance(biases := given.get("logit_bias"), Mapping):
        given["logit_bias"] = tuple((int(token), float(bias)) for token, bias in biases.items())
    if given.get("top_k") == -1:
        given["top_k"] = 0
    given.update(_drawn(given))
    params = dataclasses.replace(start, **given, eos_token_ids=ends)
    return Choice(params, stop, sampling is not None or "max_new_tokens" in given)


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say something, by the names of `SamplingParams`."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    known = [*names, *_ALIASES, "stop", "stop_token_ids"]
    given: dict[str, Any] = {}
    for option, value in options.items():
        name = _ALIASES.get(option, option)
        if name in given:
            raise InvalidCall(
                f"{option} and another name of {name} are given: leave one of them out"
            )
        if option in _OTHERS:
            raise InvalidCall(f"there is no option {option}: {_OTHERS[option]}")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(known)}"
            raise InvalidCall(f"there is no option {option}; {hint}")
        if value is not None:
            given[name] = value
    return given


def _stops(stop: object) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if isinstance(stops, Sequence) and all(isinstance(one, str) and one for one in stops):
        return tuple(stops)
    raise InvalidCall(
        f"stop is {_kind(stop)}, expected a text or a list of texts, none of them empty"
    )


def _ids(name: str, value: object) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, int) else value
    if isinstance(ids, Sequence) and all(_whole(one) for one in ids):
        return tuple(ids)
    raise InvalidCall(f"{name} is {_kind(value)}, expected a token id or a list of them")


def _check_value(name: str, value: Any) -> None:
    is_one, words = _VALUES.get(name, (lambda _: True, ""))
    if not is_one(value):
        raise InvalidCall(f"{name} is {value!r:.{_SHOWN_CHARACTERS}}, expected {words}")


def _drawn(given: Mapping[str, Any]) -> dict[str, Any]:
    """Whether tokens are drawn, where `do_sample` was not given but a temperature or a filter.

    Raises:
        InvalidCall: drawing at a temperature of 0.
    """
    if given.get("temperature") == 0:
        if given.get("do_sample"):
            raise InvalidCall("temperature is 0 and do_sample is True: leave one of them out")
        return {"do_sample": False, "temperature": 1.0}
    if "do_sample" in given:
        return {}
    draws = (
        "temperature" in given
        or given.get("top_k", 0) > 0
        or given.get("top_p", 1.0) != 1.0
        or given.get("typical_p", 1.0) != 1.0
        or given.get("min_p", 0.0) > 0
    )
    return {"do_sample": True} if draws else {}
