"""The requests for tokens: what is asked, and what a whole answer must look like.

An ask of the pool is greedy and goes to an adapter that never changes, so that its answer under load is
its answer alone. Every other ask is random, and checked for its form only. Knows no connection.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Reply = Any
Frames = list[Any]

_WORDS = (
    "the tweet is",
    "no complaint at all",
    "Übergrößen kosten 5 €",
    "naïve 漢字 🙂",
    "Label :",
)
_COLOURS = ["red", "green", "dark blue"]
_SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["sure", "kind"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        kind: for the table.
        path: route, without the query.
        body: JSON.
        adapter: `?adapter=`, where the route takes it there.
        expected: statuses that are in order besides 429.
        answer: whole reply -> what must be the same each time, and how many sequences and tokens it
            tells of; raises where the reply is not what was asked for.
        key: names the answer in the solo answers; None for one that is not compared.
    """

    kind: str
    path: str
    body: dict[str, Any]
    answer: Callable[[Reply], Answer]
    adapter: str | None = None
    expected: tuple[int, ...] = (200,)
    key: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the reply is a stream of events."""
        return bool(self.body.get("stream")) or self.path == "/generate_stream"


@dataclass(frozen=True)
class Answer:
    """What a reply says: `text` is compared."""

    text: Any
    sequences: int = 1
    tokens: int = 0


def _require(condition: bool, what: Any) -> None:
    if not condition:
        raise ValueError(f"not what was asked for: {str(what)[:400]}")


# --- what the replies say ------------------------------------------------------------------


def tgi(reply: Reply) -> Answer:
    """A whole reply of /generate with details, or the frames of a stream."""
    if isinstance(reply, list):
        _require([frame.get("index") for frame in reply] == list(range(1, len(reply) + 1)), reply)
        ids, last = [frame["token"]["id"] for frame in reply], reply[-1]
        text, details = last["generated_text"], last["details"]
        told = "".join(f["token"]["text"] for f in reply if not f["token"]["special"])
        # An output that ends inside a character has a replacement for it, with the end of sequence;
        # and before it what was held back, since no token after it ended between characters.
        whole = text == told or (text.startswith(told) and text.endswith("\ufffd"))
        _require(whole, (told, text))
    else:
        text, details = reply["generated_text"], reply["details"]
        ids = [token["id"] for token in details["tokens"]]
    _require(isinstance(text, str) and len(ids) == details["generated_tokens"], reply)
    return Answer([text, ids, details["finish_reason"]], 1, len(ids))


def completion(reply: Reply, n: int = 1) -> Answer:
    """A reply of /v1/completions or its frames, one prompt."""
    return _openai(reply, n, lambda choice: choice.get("text") or "")


def chat(reply: Reply, n: int = 1) -> Answer:
    """A reply of /v1/chat/completions or its frames."""

    def text(choice: dict[str, Any]) -> str:
        part = choice.get("delta") or choice.get("message") or {}
        return part.get("content") or ""

    return _openai(reply, n, text)


def _openai(reply: Reply, n: int, text_of: Callable[[dict[str, Any]], str]) -> Answer:
    if isinstance(reply, list):
        _require(reply[-1] == "[DONE]" and reply[-2]["choices"] == [], reply[-2:])
        usage = reply[-2]["usage"]
        parts = [choice for frame in reply[:-2] for choice in frame["choices"]]
    else:
        usage, parts = reply["usage"], reply["choices"]
    texts = ["".join(text_of(part) for part in parts if part["index"] == i) for i in range(n)]
    ends = [[p["finish_reason"] for p in parts if p["index"] == i][-1] for i in range(n)]
    _require(all(end in ("stop", "length") for end in ends), ends)
    _require(len({part["index"] for part in parts}) == n, parts)
    return Answer([texts, ends, usage["completion_tokens"]], n, usage["completion_tokens"])


def ranked(reply: Reply) -> Answer:
    """A reply of /classify for one text."""
    _require(abs(sum(reply["scores"].values()) - 1) < 1e-3, reply)
    rounded = {label: round(value, 3) for label, value in reply["logprobs"].items()}
    return Answer([reply["label"], rounded], len(rounded), 0)


def one_of_colours(reply: Reply) -> Answer:
    """A guided choice that ended."""
    answer = completion(reply)
    _require(answer.text[0][0] in _COLOURS, answer.text)
    return answer


def follows_schema(reply: Reply) -> Answer:
    """A guided object that ended, or was cut off."""
    answer = chat(reply)
    (text,), (end,), _ = answer.text
    if end == "stop":
        told = json.loads(text)
        _require(set(told) == {"sure", "kind"} and isinstance(told["sure"], bool), text)
    return answer


def refused(reply: Reply) -> Answer:
    """A refusal in words, whichever protocol's."""
    error = reply["error"]
    _require(bool(error["message"] if isinstance(error, dict) else error), reply)
    return Answer(None, 0, 0)


# --- what is asked -------------------------------------------------------------------------


@dataclass
class Asks:
    """Random asks, from a seed.

    Attributes:
        base: the base's name.
        stable: adapters that never change; None is the base.
        volatile: names of adapters that come and go.
        draw: the source of chance.
        max_new_tokens: of an ask at most.
    """

    base: str
    stable: Sequence[str | None]
    volatile: Sequence[str]
    draw: random.Random
    max_new_tokens: int = 96
    pool: list[Ask] = field(init=False)

    def __post_init__(self) -> None:
        self.pool = list(self._pool())

    def next(self) -> Ask:
        """Some ask; two in five are of the pool."""
        if self.draw.random() < 0.4:
            return self.draw.choice(self.pool)
        makers = (
            self._sampled,
            self._volatile,
            self._guided,
            self._several,
            self._scored,
            self._bad,
        )
        weights = (30, 20, 12, 10, 8, 4)
        return self.draw.choices(makers, weights)[0]()

    def _pool(self) -> Iterable[Ask]:
        lengths = (4, 16, self.max_new_tokens)
        for index, adapter in enumerate(self.stable):
            model = adapter or self.base
            for number, prompt in enumerate(_WORDS[:3]):
                length, key = lengths[(index + number) % 3], f"{model}/{number}"
                yield from self._tgi_pair(adapter, prompt, length, f"tgi/{key}")
                yield from self._completion_pair(model, prompt, length, f"completions/{key}")
            chat_body = {
                "model": model,
                "messages": [{"role": "user", "content": _WORDS[0]}],
                "temperature": 0,
                "max_tokens": 12,
            }
            chat_key = f"chat/{model}"
            yield Ask("chat", "/v1/chat/completions", chat_body, chat, key=chat_key)
            streamed = chat_body | _STREAMED
            yield Ask("chat stream", "/v1/chat/completions", streamed, chat, key=chat_key)
            ranking = {"inputs": _WORDS[0], "labels": _COLOURS}
            yield Ask("classify", "/classify", ranking, ranked, adapter, key=f"classify/{model}")

    def _tgi_pair(self, adapter: str | None, prompt: str, length: int, key: str) -> Iterable[Ask]:
        parameters = {"max_new_tokens": length, "details": True}
        body = {"inputs": prompt, "parameters": parameters}
        yield Ask("generate", "/generate", body, tgi, adapter, key=key)
        yield Ask("generate stream", "/generate_stream", body, tgi, adapter, key=key)

    def _completion_pair(self, model: str, prompt: str, length: int, key: str) -> Iterable[Ask]:
        body = {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0}
        yield Ask("completions", "/v1/completions", body, completion, key=key)
        streamed = body | _STREAMED
        yield Ask("completions stream", "/v1/completions", streamed, completion, key=key)

    def _prompt(self) -> str:
        count = int(self.draw.expovariate(1 / 12)) + 1
        words = ("".join(self.draw.choices(string.ascii_lowercase, k=4)) for _ in range(count))
        return " ".join(words)[:200]

    def _length(self) -> int:
        return self.draw.randint(1, self.max_new_tokens)

    def _sampled(self) -> Ask:
        parameters = {
            "max_new_tokens": self._length(),
            "do_sample": True,
            "temperature": self.draw.choice([0.3, 1.0, 2.0]),
            "top_p": self.draw.choice([0.5, 0.95]),
            "seed": self.draw.randrange(2**31),
            "details": True,
        }
        body = {"inputs": self._prompt(), "parameters": parameters}
        path = self.draw.choice(["/generate", "/generate_stream"])
        return Ask("sampled", path, body, tgi, self.draw.choice(self.stable))

    def _volatile(self) -> Ask:
        parameters = {"max_new_tokens": self._length(), "details": True}
        body = {"inputs": self._prompt(), "parameters": parameters}
        path = self.draw.choice(["/generate", "/generate_stream"])
        name = self.draw.choice(self.volatile)
        return Ask("changing adapter", path, body, tgi, name, expected=(200, 404))

    def _guided(self) -> Ask:
        model = self.draw.choice(self.stable) or self.base
        if self.draw.random() < 0.5:
            body = {"model": model, "prompt": self._prompt(), "guided_choice": _COLOURS}
            stream = self.draw.choice([{}, _STREAMED])
            body |= {"max_tokens": 64, "temperature": 0.7} | stream
            return Ask("guided choice", "/v1/completions", body, one_of_colours)
        format_ = {"type": "json_schema", "json_schema": {"name": "it", "schema": _SCHEMA}}
        message = [{"role": "user", "content": self._prompt()}]
        body = {"model": model, "messages": message, "response_format": format_, "max_tokens": 60}
        return Ask("guided JSON", "/v1/chat/completions", body, follows_schema)

    def _several(self) -> Ask:
        n = self.draw.randint(2, 4)
        body = {
            "model": self.draw.choice(self.stable) or self.base,
            "prompt": self._prompt(),
            "n": n,
            "max_tokens": self.draw.randint(1, 24),
            "seed": self.draw.randrange(1000),
            "stop": ["zzzz", "\n\n\n\n"],
        } | self.draw.choice([{}, _STREAMED])
        return Ask("n", "/v1/completions", body, lambda reply: completion(reply, n))

    def _scored(self) -> Ask:
        body = {
            "model": self.draw.choice(self.stable) or self.base,
            "prompt": self._prompt(),
            "max_tokens": self.draw.randint(1, 8),
            "logprobs": 5,
            "echo": self.draw.random() < 0.5,
        }

        def check(reply: Reply) -> Answer:
            for choice in reply["choices"]:
                told = choice["logprobs"]
                _require(len(told["tokens"]) == len(told["token_logprobs"]), told)
            return completion(reply)

        return Ask("logprobs", "/v1/completions", body, check)

    def _bad(self) -> Ask:
        body, path = self.draw.choice(
            [
                ({"inputs": "x", "parameters": {"max_new_tokens": 10**9}}, "/generate"),
                ({"inputs": "x", "parameters": {"temperature": -1}}, "/generate"),
                ({"inputs": "", "parameters": {}}, "/generate_stream"),
                ({"model": self.base, "prompt": "x", "guided_regex": "("}, "/v1/completions"),
                ({"model": self.base, "messages": []}, "/v1/chat/completions"),
            ]
        )
        return Ask("invalid", path, body, refused, expected=(400, 422))


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
