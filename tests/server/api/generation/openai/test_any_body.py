"""Whatever a body says, the reply is a choice or a refusal that names what is wrong."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.generation.openai.bodies import ChatBody, CompletionBody
from server.api.generation.openai.responses.body import ResponsesBody
from tests.server.api.generation.openai.conftest import ADAPTERS, BASE, post

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "developer"]), "content": st.text()},
    optional={"name": st.text(max_size=3)},
)
# What is likely to be let in, so that the engine is reached with odd combinations.
LIKELY: dict[str, st.SearchStrategy] = {
    "best_of": st.integers(1, 3),
    "echo": st.booleans(),
    "guided_regex": st.sampled_from(["[ab]+", "x{3}"]),
    "ignore_eos": st.booleans(),
    "max_output_tokens": st.integers(1, 5),
    "logit_bias": st.dictionaries(st.integers(0, 319).map(str), st.integers(-100, 100)),
    "max_completion_tokens": st.integers(1, 9),
    "messages": st.lists(MESSAGE, max_size=3),
    "min_p": st.floats(0, 0.99),
    "n": st.integers(1, 3),
    "instructions": st.text(),
    "include": st.just(["message.output_text.logprobs"]),
    "input": st.text() | st.lists(MESSAGE, max_size=3),
    "presence_penalty": st.floats(-2, 2),
    "prompt": st.text()
    | st.lists(st.text(), max_size=3)
    | st.lists(st.integers(0, 319), max_size=5),
    "repetition_penalty": st.floats(0, 5),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(-1, 400),
    "top_logprobs": st.integers(0, 20),
    "top_p": st.floats(0, 1),
    "typical_p": st.floats(0, 1),
}


def bodies(model):
    fields = {name: LIKELY[name] if name in LIKELY else st.none() for name in model.model_fields}
    fields["model"] = st.sampled_from([BASE, *ADAPTERS])
    fields["max_tokens"] = st.integers(0, 5)
    fields["logprobs"] = st.booleans() if model is ChatBody else st.integers(0, 20)
    mild = st.fixed_dictionaries({}, optional=fields)
    odd = st.dictionaries(st.sampled_from(sorted(model.model_fields)), JSON, max_size=2)
    return st.tuples(mild, odd | st.just({})).map(
        lambda both: {"model": BASE, "max_tokens": 3, **both[0], **both[1]}
    )


def check(chatting, path, body):
    reply = post(chatting, path, body)
    if reply.status_code == 200:
        ended = ("data: [DONE]\n\n", "event: response.completed", "event: response.incomplete")
        said = any(one in reply.text for one in ended)
        assert said or reply.json().get("choices") or reply.json()["output"]
        return
    assert reply.status_code in (400, 404, 422), (reply.text, body)
    assert reply.json()["error"]["message"]


calm = settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])


@calm
@given(body=bodies(CompletionBody))
def test_completions(chatting, body):
    check(chatting, "/v1/completions", {"prompt": "x", **body})


@calm
@given(body=bodies(ChatBody))
def test_chat(chatting, body):
    check(
        chatting, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **body}
    )


@calm
@given(body=bodies(ResponsesBody))
def test_responses(chatting, body):
    check(chatting, "/v1/responses", {"input": "x", "max_output_tokens": 3, **body})
