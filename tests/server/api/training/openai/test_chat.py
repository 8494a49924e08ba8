"""Conversations to train on: the tokens of training are those that the chat route asks with."""

from __future__ import annotations

import json

import openai
import pytest

from tests.server.api.training.openai.conftest import WORDS, ended, lines, openai_of, upload

ANSWERS = ["I am sorry", "thank you"]
SYSTEM = {"role": "system", "content": "You answer tweets </s> kindly."}


def conversation(word, which):
    user = {"role": "user", "content": [{"type": "text", "text": f"it was {word}"}]}
    return [SYSTEM, user, {"role": "assistant", "content": ANSWERS[which]}]


CHATS = [{"messages": conversation(word, which)} for word, which in WORDS]
LONGER = {
    "messages": [
        *conversation("late", 0),
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "not learned", "weight": 0},
        {"role": "user", "content": "and again"},
        {"role": "assistant", "content": "Sorry, really", "weight": 1},
    ]
}


@pytest.fixture(scope="module")
def trained(client):
    file = upload(client, [*CHATS, LONGER])
    job = client.fine_tuning.jobs.create(
        model="tiny-base",
        training_file=file.id,
        suffix="kind",
        method={
            "type": "prefix_tuning",
            "prefix_tuning": {
                "config": {"num_virtual_tokens": 4},
                "hyperparameters": {"n_epochs": 4, "learning_rate_multiplier": 10},
            },
        },
    )
    job = ended(client, job)
    assert job.status == "succeeded", job.error
    return job


def examples_of(tuning_server, job_id):
    """What the worker trained on."""
    services = tuning_server.app_services()
    return services.jobs.examples(job_id).train


def test_training_and_chat_have_the_same_tokens(client, tuning_server, trained):
    examples = examples_of(tuning_server, trained.id)
    assert len(examples) == len(CHATS) + 2
    tokenizer = tuning_server.app_services().need_generator().tokenizer
    last = LONGER["messages"]
    asked = [chat["messages"][:-1] for chat in CHATS] + [last[:2], last[:-1]]
    for example, messages in zip(examples, asked, strict=True):
        answer = client.chat.completions.create(
            model="kind", messages=messages, max_tokens=2, temperature=0, logprobs=True
        )
        assert answer.usage.prompt_tokens == len(example.prompt_ids)
        told = [token.logprob for token in answer.choices[0].logprobs.content]
        by_ids = client.completions.create(
            model="kind", prompt=list(example.prompt_ids), max_tokens=2, temperature=0, logprobs=0
        )
        # Not to the last bit: how many of the tokens are cached changes the sums' order.
        assert told == pytest.approx(by_ids.choices[0].logprobs.token_logprobs, abs=1e-5)
    # One <s> at the beginning, the names in a message are tokens as well, and the end is the base's.
    first = tokenizer.decode(examples[0].prompt_ids)
    assert first.startswith("<s><s>system\nYou answer tweets </s> kindly.</s>\n<s>user\nit was")
    assert first.endswith("</s>\n<s>assistant\n")
    assert examples[0].prompt_ids.count(1) == 4
    assert tokenizer.decode(examples[0].target_ids) == f"{ANSWERS[0]}</s>"
    assert tokenizer.decode(examples[-1].target_ids) == "Sorry, really</s>"


def test_its_adapter_has_no_template_of_its_own(client, tuning_server, trained):
    adapter = tuning_server.get("/adapters/kind").json()
    assert (adapter["template"], adapter["target_separator"]) == (None, "")
    messages = CHATS[0]["messages"][:-1]
    answers = {
        client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
        .choices[0]
        .message.content
        for model in ("kind", "tiny-base")
    }
    assert len(answers) == 2


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"messages": []}, "(line 2): expected a list of messages"),
        ({"messages": [USER]}, "an assistant's message at the end; came a user's"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages.1: expected the"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages.1.content"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": ["x"]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "before the assistant's first"),
        (
            {"messages": [USER, {"role": "assistant", "content": "x", "weight": 2}]},
            "messages.1.weight: expected 0 or 1",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "x", "weight": 0}]},
            "weight 0 only",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "tools are not supported",
        ),
        ({"messages": CHATS[0]["messages"], "tools": [{}]}, "no tools"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "x", "weight": 0},
                    *CHATS[0]["messages"],
                ]
            },
            "the user speaks first",
        ),
        ({"prompt": "x", "completion": "y"}, "messages"),
    ],
)
def test_lines_that_are_no_conversation_to_learn(client, line, words):
    file = upload(client, [CHATS[0], line])
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id)
    error = caught.value
    assert (error.param, error.code) == ("training_file", "data_invalid")
    assert error.body["message"].startswith("training_file, row 2 (line 2)")
    assert words in error.body["message"]


def test_a_line_that_is_too_long_is_named_by_its_file(client):
    files = [upload(client, CHATS), upload(client, [CHATS[0], LONGER])]
    block = {"max_length": 110}
    for training, validation, name in ((1, 0, "training_file"), (0, 1, "validation_file")):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            client.fine_tuning.jobs.create(
                model="tiny-base",
                training_file=files[training].id,
                validation_file=files[validation].id,
                method={"type": "ia3", "ia3": block},
            )
        assert caught.value.param == name
        assert caught.value.body["message"].startswith(f"{name}, row ")


@pytest.mark.parametrize("name", ["target_separator", "tokenization"])
def test_what_the_chat_template_decides_is_not_asked_for(client, name):
    file = upload(client, CHATS)
    value = "as_written" if name == "tokenization" else " "
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(
            model="tiny-base", training_file=file.id, method={"type": "ia3", "ia3": {name: value}}
        )
    assert caught.value.param == f"method.ia3.{name}"


def test_files_of_different_forms(client):
    pairs = upload(client, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.fine_tuning.jobs.create(
            model="tiny-base", training_file=upload(client, CHATS).id, validation_file=pairs.id
        )
    assert caught.value.param == "validation_file"


def test_a_base_without_a_chat_template(server):
    with openai_of(server) as client:
        file = upload(client, CHATS)
        with pytest.raises(openai.UnprocessableEntityError, match="no chat template") as caught:
            client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id)
        assert caught.value.param == "training_file"


# --- the same rows at /train -------------------------------------------------------------------


def dry_run(server, data, **job):
    words = json.dumps({"adapter": "mine", "method": "ia3", **job})
    return server.post("/train?dry_run=true", data={"job": words}, files={"data": ("data", data)})


SHAPES = {
    "sharegpt": [{"id": "1", "conversations": [{"from": "gpt", "value": "hi"},
                                              {"from": "human", "value": "Who?"},
                                              {"from": "gpt", "value": "Me."},
                                              {"from": "human", "value": "Ok"}]}],
    "chat": [{"messages": [{"role": "user", "content": "Who?"},
                           {"role": "assistant", "content": "Me."}]}],
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_chats_are_rendered_by_the_chat_template(tuning_server, name):
    rows = SHAPES[name]
    preview = [{"prompt": "<s><s>user\nWho?</s>\n<s>assistant\n", "target": "Me."}]
    for data in (lines(rows), json.dumps(rows).encode()):
        body = dry_run(tuning_server, data).json()
        assert (body["format"], body["prompts"]) == (name, "chat")
        assert [{key: row[key] for key in preview[0]} for row in body["preview"]] == preview
    assert ("2 messages are left out" in str(body["warnings"])) is (name == "sharegpt")
    both = dry_run(tuning_server, data, template="{messages}", target="x", format=name)
    assert (both.status_code, both.json()["field"]) == (400, "template")
    tools = [{"conversations": [{"from": "function_call", "value": "x"}]}]
    told = dry_run(tuning_server, lines(tools)).json()
    assert (
        "row 1 (line 1), conversations: expected a message from human, gpt or system"
        in told["error"]
    )
