"""Prompts of OpenAI's routes: strings, token ids and rows become ids, one prompt or many.

Strings get the special tokens that the tokenizer adds; ids are taken as they are. Knows no options
and no reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from server.api.error_replies import both_given, invalid, quoted
from server.api.schemas import BodyRow
from server.generation.generator import Generator, Prompt
from server.store.registry import AdapterRecord
from server.text.detokenizer import IncrementalDetokenizer
from server.text.tokenizer import TextTokenizer

# Prompts of ids that become text at a time.
_PIECE_PROMPTS = 16


@dataclass(frozen=True)
class Given:
    """A prompt and what it was given as.

    Attributes:
        prompt: text and ids.
        kind: "text" (a string), "ids", "row" (rendered by the adapter's template) or "chat" (by the
            base's chat template).
    """

    prompt: Prompt
    kind: Literal["text", "ids", "row", "chat"]


def require_one(
    prompt: object, row: BodyRow | None, field: str, expected: str = "a prompt, or a row"
) -> None:
    """Refuse a request with both a prompt and a row, or with neither.

    Raises:
        Contradiction: both.
        RequestInvalid: neither.
    """
    if prompt is not None and row is not None:
        raise both_given(field, "row")
    if prompt is None and row is None:
        raise invalid(field, expected, "nothing")


async def encode_all(
    generator: Generator, value: Any, check_length: Callable[[int], object]
) -> list[Given]:
    """Every prompt of a completion, from what `CompletionBody.prompt` holds.

    Args:
        generator: knows the tokenizer.
        value: one prompt or several, all of one kind.
        check_length: called with the number of tokens before ids are looked at; refuses it or not.

    Raises:
        RequestInvalid: an id that is not in the vocabulary.
        TooLong: a text of more characters than may be tokenised, or what `check_length` refuses.
    """
    one_alone = isinstance(value, str) or isinstance(value[0], int)
    values = [value] if one_alone else value
    if isinstance(values[0], str):
        return [Given(one, "text") for one in await generator.encode_all(values, field="prompt")]
    for ids in values:
        check_length(len(ids))
        _check_ids(ids, generator.vocab_size)
    given: list[Given] = []
    for start in range(0, len(values), _PIECE_PROMPTS):
        work = partial(_from_ids, generator.tokenizer, values[start : start + _PIECE_PROMPTS])
        given += await generator.run_aside(work)
    return given


async def from_row(generator: Generator, row: BodyRow, adapter: AdapterRecord | None) -> Given:
    """The prompt that the adapter's stored template makes of a row.

    Raises:
        RequestInvalid: it has no template.
        TemplateInvalid: the row does not fit it.
    """
    return Given(await generator.encode_row(row, adapter), "row")


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for wrong in (min(ids), max(ids)):
        if not 0 <= wrong < vocab_size:
            raise invalid("prompt", f"token ids from 0 to {vocab_size - 1}", quoted(wrong))


def _from_ids(tokenizer: TextTokenizer, values: Sequence[Sequence[int]]) -> list[Given]:
    return [Given(Prompt(tokenizer.decode(ids), tuple(ids)), "ids") for ids in values]


async def token_offsets(generator: Generator, given: Given) -> list[int]:
    """Where in the prompt's text each of its tokens begins, in characters."""
    text, ids = given.prompt.text, given.prompt.token_ids
    tokenizer = generator.tokenizer
    if given.kind == "text":
        return [span.start for span in await generator.spans(text, add_special_tokens=True)]
    if given.kind == "row":
        _, ranges = await generator.run_aside(
            lambda: tokenizer.encode_with_offsets(text, add_special_tokens=True)
        )
        return [start for start, _ in ranges]
    return await generator.run_aside(lambda: _offsets_of_ids(tokenizer, ids))


def _offsets_of_ids(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[int]:
    detokenizer = IncrementalDetokenizer(tokenizer.decode)
    offsets, length = [], 0
    for token_id in ids:
        offsets.append(length)
        length += len(detokenizer.feed(token_id))
    return offsets
