"""Known shapes of rows, by the columns that public data sets have, and the template that goes with each.

A shape of columns has a template and a target. A shape of conversations becomes messages, whose prompts the
base's chat template makes. Knows no files, no tokens and no jobs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from adapters.errors import DataInvalid, JobInvalid

Format = Literal["columns", "alpaca", "adgen", "prompt_completion", "chat", "sharegpt"]
FORMATS: tuple[Format, ...] = get_args(Format)
CHATS: tuple[Format, ...] = ("chat", "sharegpt")
MESSAGES = "messages"
_CONVERSATIONS = ("conversations", "conversation", MESSAGES)

# The pairs of columns of `prompt_completion`. OpenAI's own form has nothing between the two.
_PAIRS: tuple[tuple[str, str, str], ...] = (
    ("prompt", "completion", ""),
    ("prompt", "response", "\n"),
    ("prompt", "output", "\n"),
    ("question", "answer", "\n"),
    ("query", "response", "\n"),
    ("query", "answer", "\n"),
    ("input", "output", "\n"),
    ("input", "target", "\n"),
)
_INSTRUCTION = "instruction"
_INPUTS = ("input", "context")
_OUTPUTS = ("output", "response")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Shape:
    """A shape of rows of columns.

    Attributes:
        format: its name.
        template: makes a prompt of a row.
        target: the column to answer.
        separator: stands between the two; None leaves it to the template.
    """

    format: Format
    template: str
    target: str
    separator: str | None = None


def find_format(columns: Collection[str], row: Mapping[str, Any]) -> Format | None:
    """The shape that a first row plainly has; None if it has none.

    Args:
        columns: the names of its columns.
        row: the row; of conversations its messages are looked at.
    """
    for name in _CONVERSATIONS:
        if name in columns and isinstance(row.get(name), list):
            return _format_of_list(name, row[name])
    for candidate in (_alpaca, _adgen, _pair):
        if (shape := candidate(columns)) is not None:
            return shape.format
    return None


def shape_of(name: Format, columns: Collection[str]) -> Shape:
    """The template and the target of a shape of columns.

    Args:
        name: one that is neither "columns" nor a shape of conversations.
        columns: those that the rows have.

    Raises:
        JobInvalid: the rows have other columns.
    """
    find = {"alpaca": _alpaca, "adgen": _adgen, "prompt_completion": _pair}[name]
    shape = find(columns)
    if shape is None:
        listed = ", ".join(repr(column[:80]) for column in list(columns)[:20]) or "none"
        raise JobInvalid(
            f"format: {name} has {_EXPECTED[name]}; the rows have the columns {listed}",
            field="format",
            expected=_EXPECTED[name],
            came=listed,
        )
    return shape


_EXPECTED: dict[str, str] = {
    "alpaca": "the columns instruction, output (or response) and perhaps input (or context)",
    "adgen": "the columns content and summary",
    "prompt_completion": "one of the pairs of columns "
    + ", ".join(f"{prompt} and {answer}" for prompt, answer, _ in _PAIRS),
}


def known_shapes() -> str:
    """The shapes that are found by their columns, for a message."""
    return "messages; conversations; instruction with output; content with summary; " + "; ".join(
        f"{prompt} with {answer}" for prompt, answer, _ in _PAIRS
    )


def _format_of_list(name: str, messages: Iterable[Any]) -> Format:
    first = next(iter(messages), None)
    is_openai = isinstance(first, Mapping) and "role" in first
    return "chat" if name == MESSAGES and (is_openai or first is None) else "sharegpt"


def _alpaca(columns: Collection[str]) -> Shape | None:
    target = next((name for name in _OUTPUTS if name in columns), None)
    if _INSTRUCTION not in columns or target is None:
        return None
    other = next((name for name in _INPUTS if name in columns), None)
    more = "" if other is None else f"\n{{?{other}}}"
    template = f"### Instruction:\n{{{_INSTRUCTION}}}{more}\n\n### Response:\n"
    return Shape("alpaca", template, target)


def _adgen(columns: Collection[str]) -> Shape | None:
    if not {"content", "summary"} <= {*columns}:
        return None
    return Shape("adgen", "{content}\n", "summary")


def _pair(columns: Collection[str]) -> Shape | None:
    for prompt, answer, separator in _PAIRS:
        if prompt in columns and answer in columns:
            return Shape("prompt_completion", f"{{{prompt}}}", answer, separator)
    return None


# --- conversations ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """A row as messages.

    Attributes:
        messages: role and content of each.
        num_dropped: messages that no prompt can be made with: an assistant's before any other, and
            those after the last of the assistant.
    """

    messages: list[dict[str, Any]]
    num_dropped: int


def conversation_of(row: Mapping[str, Any], place: str, number: int) -> Conversation:
    """The conversation of a row of ShareGPT's shape.

    Accepts `from` and `value`, `role` and `content`, and pairs of `human` and `assistant`; a column
    `system` beside them is the system's message.

    Args:
        row: as it was read.
        place: its name in messages.
        number: of the row.

    Raises:
        DataInvalid: it has no such list, a message of another shape, or nothing to learn.
    """
    name = next((name for name in _CONVERSATIONS if row.get(name) is not None), None)
    turns = None if name is None else row[name]
    if name is None or not isinstance(turns, list) or not turns:
        raise _wrong(place, number, "a list of messages under 'conversations'", _kind(turns))
    messages = [one for turn in turns for one in _messages(turn, f"{place}, {name}", number)]
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    kept = _answered(messages)
    if not kept:
        raise _wrong(place, number, "a message of the user and an answer of the assistant", "none")
    return Conversation(kept, len(messages) - len(kept))


def _messages(turn: Any, place: str, number: int) -> list[dict[str, Any]]:
    if not isinstance(turn, Mapping):
        raise _wrong(place, number, "messages with from and value", _kind(turn))
    if "human" in turn and "assistant" in turn:
        pairs = (("user", turn["human"]), ("assistant", turn["assistant"]))
        return [{"role": role, "content": _text(text, place, number)} for role, text in pairs]
    role = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        expected = "a message from human, gpt or system (tools are not supported)"
        raise _wrong(place, number, expected, _kind(role) if role is None else repr(role)[:80])
    return [{"role": known, "content": _text(text, place, number)}]


def _text(value: Any, place: str, number: int) -> str:
    if not isinstance(value, str):
        raise _wrong(place, number, "a text as a message's value", _kind(value))
    return value


def _answered(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the first message of the user, or the system's before it, to the last of the assistant."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        return []
    begin = roles.index("user")
    answers = [index for index, role in enumerate(roles) if role == "assistant" and index > begin]
    if not answers:
        return []
    system = [message for message in messages[:begin] if message["role"] == "system"]
    return system + messages[begin : answers[-1] + 1]


def _kind(value: Any) -> str:
    kinds = {
        list: "a list",
        dict: "an object",
        str: "a text",
        type(None): "nothing",
        bool: "a boolean",
    }
    return kinds.get(type(value), "a number")


def _wrong(place: str, number: int, expected: str, came: str) -> DataInvalid:
    return DataInvalid(
        f"{place}: expected {expected}; came {came}",
        row=number,
        field=place,
        expected=expected,
        came=came,
    )
