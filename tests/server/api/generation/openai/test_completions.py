"""`/v1/completions` as JSON: shapes, options, usage."""

from __future__ import annotations

import pytest

from tests.server.api.generation.openai.conftest import BASE, complete, frames
from tests.server.http_server import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer(bos=True)


def ids_of(text: str, *, bos: bool = True) -> list[int]:
    """A text's tokens, with the `<s>` that the tokenizer puts before texts, or without."""
    return TOKENIZER(text, add_special_tokens=bos)["input_ids"]


def generate(server, adapter=None, **parameters):
    """The same through TGI's route: another way to the same engine."""
    query = f"?adapter={adapter}" if adapter else ""
    body = {"inputs": "the tweet", "parameters": {"details": True, **parameters}}
    return server.post(f"/generate{query}", json=body).json()


def test_a_completion(chatting):
    reply = complete(chatting, max_tokens=12)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    want = generate(chatting, max_new_tokens=12)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == BASE
    assert body["choices"] == [
        {"index": 0, "text": want["generated_text"], "logprobs": None, "finish_reason": "length"}
    ]
    prompt = len(ids_of("the tweet"))
    usage = body["usage"]
    assert 0 <= usage.pop("prompt_tokens_details")["cached_tokens"] < prompt
    assert usage == {
        "prompt_tokens": prompt,
        "completion_tokens": 12,
        "total_tokens": prompt + 12,
    }
    assert reply.headers["x-adapter-id"] == BASE
    assert int(reply.headers["x-time-to-first-token"]) >= 0
    assert int(reply.headers["x-queue-time"]) >= 0


def cached(usage):
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_usage_tells_how_much_of_the_prompts_was_cached(chatting):
    prompts = [[7 + number, *range(40, 100)] for number in (0, 1)]
    first = complete(chatting, prompt=prompts, n=2, temperature=0, max_tokens=2).json()["usage"]
    assert cached(first) == 0  # neither of each other nor of the second sample of each
    assert first["prompt_tokens"] == 122
    one = complete(chatting, prompt=prompts[0], max_tokens=2).json()["usage"]
    # All but the last token, whose logits are needed, in whole blocks or not.
    assert 30 < cached(one) < 61
    again = complete(chatting, prompt=prompts, n=2, max_tokens=2).json()["usage"]
    assert cached(again) == 2 * cached(one)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = complete(chatting, prompt=prompts, n=2, max_tokens=2, **options)
    assert frames(streamed)[-1]["usage"] == again
    beyond = complete(chatting, prompt=prompts[0], max_tokens=2, echo=True, logprobs=0).json()
    assert cached(beyond["usage"]) == 0  # the log-probabilities of a prompt are computed


def test_max_tokens_is_16_or_what_fits(chatting):
    assert complete(chatting).json()["usage"]["completion_tokens"] == 16
    long = complete(chatting, prompt=[5] * 505)
    assert long.json()["usage"]["completion_tokens"] == 8  # the last takes no position


@pytest.mark.parametrize("name", ["complaints", "complaints@1"])
def test_model_names_an_adapter(chatting, name):
    reply = complete(chatting, model=name, max_tokens=8)
    want = generate(chatting, "complaints", max_new_tokens=8)["generated_text"]
    assert reply.json()["choices"][0]["text"] == want
    assert reply.json()["choices"][0]["text"] != complete(chatting).json()["choices"][0]["text"]
    assert reply.headers["x-adapter-id"] == "complaints"
    assert reply.headers["x-adapter-version"] == "1"
    assert reply.json()["model"] == name


@pytest.mark.parametrize("name", ["tgi", "dummy"])
def test_names_for_the_only_model_mean_the_base(chatting, name):
    reply = complete(chatting, model=name)
    assert reply.json()["choices"] == complete(chatting).json()["choices"]
    assert reply.headers["x-adapter-id"] == BASE


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"typical_p": 0.5},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 1.7},
        {"ignore_eos": True},
    ],
    ids=lambda parameters: "-".join(parameters),
)
def test_every_way_to_sample_is_that_of_the_engine(chatting, parameters):
    shared = {"temperature": 1.0, "seed": 11, **parameters}
    mine = complete(chatting, max_tokens=20, **shared).json()
    theirs = generate(chatting, max_new_tokens=20, do_sample=True, **shared)
    assert mine["choices"][0]["text"] == theirs["generated_text"]
    assert mine["usage"]["completion_tokens"] == theirs["details"]["generated_tokens"]


def test_top_k_may_be_off_in_either_spelling(chatting):
    texts = {
        complete(chatting, temperature=1, seed=3, top_k=k).json()["choices"][0]["text"]
        for k in (None, 0, -1)
    }
    assert len(texts) == 1


def test_it_samples_unless_told_otherwise(chatting):
    replies = [complete(chatting, temperature=None, max_tokens=20) for _ in range(2)]
    texts = [reply.json()["choices"][0]["text"] for reply in replies]
    assert texts[0] != texts[1]


def test_n_samples_are_those_of_the_seeds_that_follow(chatting):
    many = complete(chatting, temperature=1.5, seed=7, n=3, max_tokens=10).json()
    alone = [
        complete(chatting, temperature=1.5, seed=7 + i, max_tokens=10).json() for i in range(3)
    ]
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in many["choices"]] == [
        one["choices"][0]["text"] for one in alone
    ]
    assert many["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert many["usage"]["completion_tokens"] == sum(
        one["usage"]["completion_tokens"] for one in alone
    )


def test_best_of_returns_the_likeliest(chatting):
    best = complete(chatting, temperature=1.5, seed=7, n=2, best_of=4, max_tokens=10).json()
    every = complete(chatting, temperature=1.5, seed=7, n=4, max_tokens=10, logprobs=0).json()

    def mean(choice):
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    ranked = sorted(every["choices"], key=mean, reverse=True)
    assert [choice["text"] for choice in best["choices"]] == [one["text"] for one in ranked[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None
    # what was drawn was computed
    assert best["usage"] == every["usage"]


def test_prompts_in_every_form(chatting):
    ids = ids_of("the tweet")
    as_text = complete(chatting).json()
    as_ids = complete(chatting, prompt=ids).json()
    assert as_ids["choices"] == as_text["choices"]
    assert as_ids["usage"] == as_text["usage"]
    texts = complete(chatting, prompt=["the tweet", "Label"]).json()
    lists = complete(chatting, prompt=[ids, ids_of("Label")]).json()
    assert texts["choices"] == lists["choices"]
    assert [choice["index"] for choice in texts["choices"]] == [0, 1]
    assert texts["choices"][0] == as_text["choices"][0]
    assert texts["usage"]["prompt_tokens"] == len(ids) + len(ids_of("Label"))


def test_more_prompts_than_run_at_once(chatting):
    prompts = [f"{number} complaint" for number in range(30)]
    many = complete(chatting, prompt=prompts, n=2, temperature=1, seed=5, max_tokens=4).json()
    assert [choice["index"] for choice in many["choices"]] == list(range(60))
    for number in (0, 13, 29):
        one = complete(
            chatting, prompt=prompts[number], n=2, temperature=1, seed=5, max_tokens=4
        ).json()
        texts = [choice["text"] for choice in one["choices"]]
        assert [many["choices"][2 * number + i]["text"] for i in (0, 1)] == texts


def test_a_row_fills_the_adapters_template(chatting):
    by_row = complete(chatting, model="pairs", prompt=None, row={"first": "a", "second": 2})
    by_text = complete(chatting, model="pairs", prompt="a and 2 :")
    assert by_row.json()["choices"] == by_text.json()["choices"]


def test_a_stop_string_is_not_part_of_the_text(chatting):
    text = complete(chatting, max_tokens=20).json()["choices"][0]["text"]
    stop = text[5:8]
    for form in (stop, [stop, "never there"], [None, stop]):
        choice = complete(chatting, max_tokens=20, stop=form).json()["choices"][0]
        assert choice["text"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
    kept = complete(chatting, max_tokens=20, stop=stop, include_stop_str_in_output=True).json()
    assert kept["choices"][0]["text"] == text[: text.index(stop) + len(stop)]


def test_a_stream_holds_back_what_may_be_a_stop(chatting):
    text = complete(chatting, max_tokens=20).json()["choices"][0]["text"]
    stop = text[5:8]
    for unmet in (stop[:-1] + "\x00", stop):
        stream = frames(complete(chatting, max_tokens=20, stop=unmet, stream=True))
        whole = complete(chatting, max_tokens=20, stop=unmet).json()["choices"][0]
        joined = "".join(frame["choices"][0]["text"] for frame in stream)
        assert joined == whole["text"]
        assert stream[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_the_end_of_sequence_is_counted_and_not_shown(chatting):
    eos = TOKENIZER.eos_token_id
    reply = complete(chatting, logit_bias={str(eos): 100}, logprobs=0).json()
    choice = reply["choices"][0]
    assert choice["text"] == ""
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == ["</s>"]
    assert reply["usage"]["completion_tokens"] == 1
    on = complete(chatting, logit_bias={str(eos): 100}, ignore_eos=True, max_tokens=3).json()
    assert on["usage"]["completion_tokens"] == 3
    assert on["choices"][0] == {**choice, "finish_reason": "length", "logprobs": None}


def test_logit_bias_forces_and_bans(chatting):
    token = ids_of("!", bos=False)[0]
    forced = complete(chatting, logit_bias={str(token): 100}, max_tokens=3, logprobs=1).json()
    assert forced["choices"][0]["text"] == "!!!"
    # what is reported is what the model said
    assert max(forced["choices"][0]["logprobs"]["token_logprobs"]) < -0.5
    first = complete(chatting, max_tokens=1, logprobs=2).json()["choices"][0]["logprobs"]
    plain = chatting.post(
        "/generate",
        json={"inputs": "the tweet", "parameters": {"max_new_tokens": 1, "details": True}},
    )
    banned = plain.json()["details"]["tokens"][0]["id"]
    other = complete(chatting, max_tokens=1, logprobs=2, logit_bias={str(banned): -100}).json()
    assert other["choices"][0]["logprobs"]["tokens"] == [list(first["top_logprobs"][0])[1]]


def test_nulls_and_unknown_fields(chatting):
    nulls = dict.fromkeys(
        ["n", "best_of", "stop", "logprobs", "echo", "seed", "logit_bias", "stream", "suffix"]
    )
    nulls |= dict.fromkeys(["stream_options", "response_format", "row", "guided_choice", "user"])
    assert complete(chatting, **nulls).json()["choices"] == complete(chatting).json()["choices"]
    reply = complete(chatting, user="someone", min_tokens=3, store=None)
    assert reply.status_code == 200
    assert reply.headers["x-ignored-parameters"] == "min_tokens, user"
    assert "x-ignored-parameters" not in complete(chatting).headers


# --- streams -------------------------------------------------------------------------------


def test_a_stream_says_what_the_whole_reply_says(chatting):
    whole = complete(chatting, max_tokens=20).json()
    stream = frames(complete(chatting, max_tokens=20, stream=True))
    assert len({frame["id"] for frame in stream}) == 1
    assert all(frame["object"] == "text_completion" for frame in stream)
    assert all("usage" not in frame for frame in stream)
    assert "".join(f["choices"][0]["text"] for f in stream) == whole["choices"][0]["text"]
    assert [f["choices"][0]["finish_reason"] for f in stream[:-1]] == [None] * (len(stream) - 1)
    assert stream[-1]["choices"][0]["finish_reason"] == "length"


def test_usage_comes_last_where_it_is_asked_for(chatting):
    usage = complete(chatting).json()["usage"]
    stream = frames(complete(chatting, stream=True, stream_options={"include_usage": True}))
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"] == usage
    assert all(frame["usage"] is None for frame in stream[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    steady = frames(complete(chatting, stream=True, stream_options=options))
    counts = [frame["usage"]["completion_tokens"] for frame in steady]
    assert counts == sorted(counts)
    assert steady[-1]["usage"] == usage


@pytest.mark.parametrize("seed", range(4))
def test_streams_of_many_prompts_and_samples(chatting, seed):
    asked = {"prompt": ["the tweet", "Label"], "n": 2, "temperature": 1, "max_tokens": 9}
    asked["seed"] = seed
    whole = complete(chatting, **asked).json()
    options = {"include_usage": True}
    stream = frames(complete(chatting, **asked, stream=True, stream_options=options))
    texts, reasons = dict.fromkeys(range(4), ""), {}
    for frame in stream[:-1]:
        [choice] = frame["choices"]
        assert choice["index"] not in reasons
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert [*texts.values()] == [choice["text"] for choice in whole["choices"]]
    assert [reasons[i] for i in range(4)] == [c["finish_reason"] for c in whole["choices"]]
    assert stream[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("seed", range(6))
def test_streams_never_hold_half_a_character(chatting, seed):
    asked = {"temperature": 2, "seed": seed, "max_tokens": 40}
    whole = complete(chatting, **asked).json()["choices"][0]["text"]
    for extra in ({}, {"logprobs": 1}):
        stream = frames(complete(chatting, **asked, **extra, stream=True))
        assert "".join(frame["choices"][0]["text"] for frame in stream) == whole
