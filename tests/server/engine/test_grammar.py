"""Outputs that follow a grammar, in an engine of this process."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import engine as engine_module
from server.engine.kv_cache import KVBlocks
from server.engine.request import FailedEvent, TokenEvent
from tests.conformance.peft_oracle import make_adapter
from tests.engine_tools import TINY, adapter_ref, request, run, teacher_forced, tokens
from tests.server.engine.guided import (
    EOS,
    PERSON,
    conforms,
    finished,
    guided,
    guided_engine,
    said,
)
from tests.server.http_server import byte_level_tokenizer
from tests.tiny_models import tiny_model

VARIANTS = ("prefix", "p-tuning-mlp", "cpt", "prompt-tuning", "ia3")
PROMPT = range(5, 14)
# Compiles at once, and is too much at its first mask or at a later one.
GREEDY_REGEX = "(a{1000}){1000}"
# 2^n states to find out that nothing is excluded: an hour.
ENDLESS_SCHEMA = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(26)]}


def chain(length, link):
    """A schema whose definitions each refer to the next one."""
    links = {str(i): link({"$ref": f"#/$defs/{i + 1}"}) for i in range(length)}
    return {"$defs": {**links, str(length): {"type": "integer"}}, "$ref": "#/$defs/0"}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = {}
    for variant in VARIANTS:
        out[variant] = tmp_path_factory.mktemp(variant)
        make_adapter(tiny_model("llama"), "llama", variant, out[variant])
    return out


@pytest.fixture
def start(tokenizer, folders):
    """Makes engines that are closed in the end."""
    engines = []

    def make(**options):
        engines.append(guided_engine(tokenizer, folders, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def shared(tokenizer):
    """One engine for whatever leaves nothing behind."""
    engine = guided_engine(tokenizer)
    yield engine
    engine.close()


def refusal(events):
    """Why a request with a grammar failed; the words follow the code."""
    failed = events[-1]
    assert isinstance(failed, FailedEvent), failed
    assert failed.code == "grammar_invalid"
    return failed.message


# --- shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_an_output_has_the_shape_that_was_asked_for(shared, tokenizer, seed):
    sampling = {} if seed is None else {"do_sample": True, "seed": seed, "temperature": 1.5}
    choices = ["a", "ab", "ab c", "no", '"quoted"\n', "漢字 🙂"]
    load = [
        guided("schema", "json_schema", PERSON, **sampling),
        guided("regex", "regex", r"[a-c]{3}-\d{2}(é|🙂)|x{2,4}/\s", **sampling),
        guided("choice", "choice", choices, **sampling),
    ]
    texts = {key: said(tokenizer, events) for key, events in finished(shared, load).items()}
    assert conforms(json.loads(texts["schema"]), PERSON)
    assert re.fullmatch(r"[a-c]{3}-[0-9]{2}(é|🙂)|x{2,4}/\s", texts["regex"])
    assert texts["choice"] in choices


def test_a_choice_that_begins_another_can_be_either(shared, tokenizer):
    load = [
        guided(str(seed), "choice", ["a", "aa", "aaa"], do_sample=True, seed=seed)
        for seed in range(40)
    ]
    texts = {said(tokenizer, events) for events in finished(shared, load).values()}
    assert texts == {"a", "aa", "aaa"}


_leaf = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.tuples(st.integers(-999, 999), st.integers(0, 500)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.integers(0, 8).map(lambda most: {"type": "string", "maxLength": most}),
    st.lists(st.text(max_size=4) | st.integers(0, 9) | st.none(), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
)


def _inner(schemas):
    names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=3)
    return st.one_of(
        st.tuples(schemas, st.integers(0, 3)).map(
            lambda pair: {"type": "array", "items": pair[0], "maxItems": pair[1]}
        ),
        st.lists(schemas, min_size=1, max_size=3).map(lambda several: {"anyOf": several}),
        st.dictionaries(names, schemas, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:2],
                "additionalProperties": False,
            }
        ),
    )


@settings(max_examples=25, deadline=None)
@given(st.recursive(_leaf, _inner, max_leaves=5), st.integers(0, 3))
def test_every_output_of_a_schema_satisfies_it(shared, tokenizer, schema, seed):
    one = guided("one", "json_schema", schema, 450, do_sample=seed > 0, seed=seed)
    events = finished(shared, [one])["one"]
    if events[-1].finish_reason == "length":  # white space and long names have no other end
        return
    assert conforms(json.loads(said(tokenizer, events)), schema)


def test_the_end_comes_where_the_grammar_may_end(shared, tokenizer):
    # Without a bound it may end anywhere, and the bias says at once; or never, and the bias says so.
    bias = {"logit_bias": ((EOS, 100.0),)}
    load = [
        guided("early", "regex", "[a-z]*", **bias),
        guided("not before", "regex", "[a-z]{4}[a-z]*", **bias),
        guided("never", "regex", "[a-z]*", 30, logit_bias=((EOS, -100.0),)),
    ]
    events = finished(shared, load)
    assert said(tokenizer, events["early"]) == ""
    assert len(said(tokenizer, events["not before"])) >= 4
    assert [event.finish_reason for event in events["never"]] == [None] * 29 + ["length"]


def test_who_ignores_the_end_goes_on_as_long_as_the_grammar_does(shared, tokenizer):
    bias = {"logit_bias": ((EOS, 100.0),), "ignore_eos": True}
    load = [
        guided("open", "regex", "[a-z]*", 30, **bias),
        guided("closed", "regex", "[a-z]{2,5}", 30, **bias),
    ]
    events = finished(shared, load)
    assert len(events["open"]) == 30
    assert EOS not in tokens(events["open"])
    assert events["open"][-1].finish_reason == "length"
    assert re.fullmatch("[a-z]{5}", said(tokenizer, events["closed"]))


def test_a_grammar_ends_by_the_vocabularys_own_end(shared, tokenizer):
    one = guided("one", "choice", ["yes"], eos_token_ids=())
    assert said(tokenizer, finished(shared, [one])["one"]) == "yes"


def test_nothing_makes_a_forbidden_token_come(shared, tokenizer):
    forbidden = tokenizer.convert_tokens_to_ids("z")
    load = [
        guided("bias", "regex", "[ab]{9}", logit_bias=((forbidden, 100.0), (EOS, 100.0))),
        guided("all down", "regex", "[ab]{9}", logit_bias=tuple((i, -100.0) for i in range(300))),
        guided("penalties", "regex", "[ab]{9}", repetition_penalty=9.0, presence_penalty=2.0),
    ]
    filters = {"top_k": 1, "top_p": 0.01, "min_p": 0.9, "typical_p": 0.1}
    for name, value in filters.items():
        options = {"do_sample": True, "seed": 5, name: value}
        load.append(guided(name, "regex", "[ab]{9}", **options))
    for events in finished(shared, load).values():
        assert re.fullmatch("[ab]{9}", said(tokenizer, events))


def test_logprobs_are_those_of_the_model_itself(shared):
    one = guided("one", "json_schema", PERSON, num_logprobs=2)
    events = finished(shared, [one])["one"]
    reference = teacher_forced(shared, list(PROMPT), tokens(events), None)
    for event, row in zip(events, reference, strict=True):
        assert event.logprob.logprob == pytest.approx(float(row[event.token_id]), abs=1e-3)
        assert event.logprob.top[0][1] == pytest.approx(float(row.max()), abs=1e-3)
    # Somewhere the most likely token was not allowed, and is reported all the same.
    assert any(event.logprob.top[0][0] != event.token_id for event in events)


# --- company ---------------------------------------------------------------------------------


def mixed_load(engine, folders):
    """Every method and the base, each with and without a grammar, greedy and sampled."""
    refs = [None, *(adapter_ref(name, folder, engine) for name, folder in folders.items())]
    load = []
    for i, ref in enumerate(refs):
        sampling = {"do_sample": True, "seed": i} if i % 2 else {}
        load += [
            guided(f"schema{i}", "json_schema", PERSON, 200, ref, range(5, 20 + i), **sampling),
            guided(f"regex{i}", "regex", r"([a-f]{2} ){6}\.", 60, ref, range(9, 16), **sampling),
            request(f"free{i}", range(5, 20 + i), ref, 24, **sampling),
        ]
    return load


@pytest.fixture(scope="module")
def solo(tokenizer, folders):
    """What each request of the mixed load gives alone."""
    engine = guided_engine(tokenizer, folders)
    alone = {}
    for one in mixed_load(engine, folders):
        alone |= {key: tokens(events) for key, events in run(engine, [one]).items()}
    engine.close()
    return alone


def test_rows_with_and_without_a_grammar_keep_out_of_each_others_way(start, folders, solo):
    engine = start()
    load = mixed_load(engine, folders)
    assert {key: tokens(events) for key, events in run(engine, load).items()} == solo
    outputs = [tuple(solo[f"schema{i}"]) for i in range(len(VARIANTS) + 1)]
    assert len(set(outputs)) == len(outputs)


def test_rows_without_a_grammar_are_those_of_an_engine_without_any(start, folders, solo):
    engine = start()
    free = [one for one in mixed_load(engine, folders) if one.sampling.grammar is None]
    for key, events in run(engine, free).items():
        assert tokens(events) == solo[key]


def test_a_preempted_output_goes_on_where_it_was(start, folders, solo):
    engine = start()
    per_block = KVBlocks.bytes_per_block(engine.spec, TINY.block_size, torch.float32)
    engine = start(kv_bytes=48 * per_block)
    load = mixed_load(engine, folders)
    assert {key: tokens(events) for key, events in run(engine, load).items()} == solo
    assert engine.scheduler.num_preemptions > 0


def test_a_late_mask_delays_its_own_output_and_changes_nothing(start, folders, solo, monkeypatch):
    # Each of its masks walks through thousands of states: no step waits for them here.
    slow = guided("slow", "regex", "(a{1000}){100}", 6)
    monkeypatch.setattr(engine_module, "_MASK_WAIT_SECONDS", 30.0)
    patient = start()
    expected = tokens(run(patient, [slow])["slow"])
    monkeypatch.setattr(engine_module, "_MASK_WAIT_SECONDS", 0.0)
    engine = start()
    steps_of_slow = []

    def watch(step):
        if any(one.request is slow for one in engine.scheduler.running):
            steps_of_slow.append(step)

    got = run(engine, [slow, *mixed_load(engine, folders)], watch)
    assert tokens(got.pop("slow")) == expected
    assert {key: tokens(events) for key, events in got.items()} == solo
    assert len(steps_of_slow) > 2 * len(expected)


def test_samples_of_one_prompt_share_a_grammar(shared, tokenizer):
    load = [
        guided(f"{i}", "json_schema", PERSON, do_sample=True, seed=10 + i, temperature=2.0)
        for i in range(5)
    ]
    texts = [said(tokenizer, events) for events in finished(shared, load).values()]
    assert len(set(texts)) == 5
    assert all(conforms(json.loads(text), PERSON) for text in texts)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "[", "the regular expression cannot be followed: unclosed character class"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "(" * 300 + ")" * 300, "nested"),
        ("regex", r"[^\s\S]", "no output can satisfy it"),
        ("regex", GREEDY_REGEX, "too many expressions"),
        ("regex", "((((a{9}){9}){9}){9}){9}" * 20, "too many expressions"),
        ("json_schema", {"type": "wrong"}, "Invalid type: wrong"),
        ("json_schema", {"not": {"type": "null"}}, 'Unimplemented keys: ["not"]'),
        ("json_schema", {"allOf": [{"type": "null"}, {"type": "string"}]}, "Unsatisfiable schema"),
        ("json_schema", {"$ref": "#/nowhere"}, "'/nowhere' does not exist"),
        ("json_schema", {"$ref": "#"}, "no output can satisfy it"),
        ("json_schema", {"allOf": [{"type": "integer", "multipleOf": p} for p in (7919, 7907, 7901)]},
         "fuel exhausted"),
        ("json_schema", chain(1400, lambda ref: {"allOf": [ref]}), "nests too deeply"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_followed_is_refused_with_the_reason(shared, kind, text, words):
    events = finished(shared, [guided("bad", kind, text), request("good", PROMPT, None, 3)])
    assert words in refusal(events["bad"])
    assert len(events["good"]) == 3


def test_a_schema_without_end_is_given_up_while_others_go_on(shared):
    assert not shared.submit(guided("bad", "json_schema", ENDLESS_SCHEMA))
    for round_ in range(3):
        assert not shared.submit(guided(f"good{round_}", "json_schema", PERSON))
    good = {}
    failed_after = None
    while shared.has_work:
        for event in shared.step():
            if isinstance(event, FailedEvent):
                assert "takes more than 2 seconds to compile" in event.message
                failed_after = len(good)
            elif isinstance(event, TokenEvent) and event.finish_reason is not None:
                good[event.request_id] = event.finish_reason
    assert good == dict.fromkeys(["good0", "good1", "good2"], "eos")
    assert failed_after == 3  # they had all ended by then


def test_what_turns_out_to_be_too_much_in_the_middle_ends_its_own_output(shared, tokenizer):
    # Every level may end here: at the second token two thousand of them could have.
    deep = chain(1000, lambda ref: {"anyOf": [ref, {"type": "null"}]})
    load = [guided("bad", "json_schema", deep), guided("good", "json_schema", PERSON)]
    events = finished(shared, load)
    assert "Current row has" in refusal(events["bad"])
    assert len(events["bad"]) > 1
    assert conforms(json.loads(said(tokenizer, events["good"])), PERSON)


def test_aborts_at_every_moment_leave_nothing_behind(start):
    engine = start()
    for moment in range(6):
        assert not engine.submit(guided("gone", "json_schema", {**PERSON, "title": str(moment)}))
        assert not engine.submit(guided("stays", "json_schema", {**PERSON, "title": str(moment)}))
        for _ in range(moment * 3):
            engine.step()
        engine.abort("gone")
        said_by = set()
        while engine.has_work:
            said_by |= {
                event.request_id for event in engine.step() if isinstance(event, TokenEvent)
            }
        assert said_by == {"stays"}
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_a_waiting_grammar_counts_as_a_waiting_request(start):
    engine = start()
    assert not engine.submit(guided("one", "json_schema", PERSON))
    assert engine.stats().num_waiting == 1
    assert engine.has_work
    engine.abort("one")
    assert engine.stats().num_waiting == 0
    assert not engine.has_work


def test_a_base_without_an_end_has_no_grammars(start):
    engine = start(eos_token_ids=())
    events = finished(engine, [guided("one", "regex", "a"), request("other", PROMPT, None, 3)])
    assert "no end-of-sequence token" in refusal(events["one"])
    assert len(events["other"]) == 3
