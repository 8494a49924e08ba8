"""The engine from Python: what it takes as prompts and options, and in which words it refuses."""

from __future__ import annotations

import pytest

import graftwork
from graftwork import EngineError, GenerationFailed, InvalidCall, UnknownAdapter
from server.engine.python_calls import choice_of
from server.engine.request import SamplingParams
from tests.server.http_server import save_prefix_adapter, save_tiny_base

TEXT = "the tweet"
EOS = (2,)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    adapters = {
        name: save_prefix_adapter(root / name, seed=n) for n, name in enumerate(("one", "two"))
    }
    long = save_prefix_adapter(root / "long", n=511)
    return {"base": save_tiny_base(root / "base"), "long": long, **adapters}


@pytest.fixture(scope="module")
def engine(folders):
    with graftwork.Engine(folders["base"], dtype="float32", threads=1, kv_bytes=1 << 24) as engine:
        for name in ("one", "two"):
            engine.add_adapter(name, folders[name])
        yield engine


def test_texts_ids_and_pairs_are_prompts(engine):
    ids = engine.tokenizer(TEXT)["input_ids"]
    base, one, two = (
        engine.generate([(name, TEXT)], max_new_tokens=8)[0] for name in (None, "one", "two")
    )
    assert len({base, one, two}) == 3
    assert engine.adapters == ("one", "two")
    assert engine.generate(TEXT, max_new_tokens=8) == [base]
    assert engine.generate([TEXT, ids, tuple(ids)], max_new_tokens=8) == [base] * 3
    assert engine.generate(TEXT, adapter="one", max_tokens=8) == [one]
    assert engine.generate([TEXT, ("one", ids)], adapter="one", max_new_tokens=8) == [one] * 2
    mixed = [("two", TEXT), ["one", TEXT], (None, TEXT), TEXT]
    assert engine.generate(iter(mixed), max_tokens=8) == [two, one, base, base]
    assert engine.generate([], max_tokens=8) == []


def test_a_stop_text_ends_an_output_and_is_left_out(engine):
    whole = engine.generate(TEXT, adapter="two", max_tokens=24, ignore_eos=True)[0]
    stop = whole[6:9]
    cut = whole[: whole.index(stop)]
    stopped = engine.generate([TEXT] * 2, adapter="two", max_tokens=24, ignore_eos=True, stop=stop)
    assert stopped == [cut, cut]
    either = engine.generate(
        [TEXT, (None, TEXT)][:1], adapter="two", max_tokens=24, ignore_eos=True, stop=["\0no", stop]
    )
    assert either == [cut]
    # The last characters may begin a stop text that never comes.
    held = engine.generate(
        TEXT, adapter="two", max_tokens=24, ignore_eos=True, stop=[whole[-1] + "\0"]
    )
    assert held == [whole]
    assert engine.generate(TEXT, adapter="two", max_tokens=24, ignore_eos=True) == [whole]


def test_a_length_that_is_left_out_is_at_most_what_fits(engine):
    ids = engine.tokenizer("a" * 505)["input_ids"]
    assert len(ids) > 500
    room = 513 - 4 - len(ids)
    (short,) = engine.generate([ids], adapter="one", ignore_eos=True)
    assert short == engine.generate([ids], adapter="one", max_tokens=room, ignore_eos=True)[0]
    with pytest.raises(GenerationFailed, match=r"prompt 1: .* the base has 512 positions"):
        engine.generate([TEXT, ids], adapter="one", max_tokens=room + 1)
    # What was queued beside it is gone.
    assert engine.generate([TEXT], max_tokens=2) == engine.generate(TEXT, max_tokens=2)


def test_what_fits_counts_the_memory_for_keys_and_values(folders):
    """16 blocks of 16, one of which the prefix fills in part: its 4 tokens take all of it."""
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, float32
    options = {"dtype": "float32", "threads": 1, "kv_bytes": 16 * 16 * per_token}
    with graftwork.Engine(folders["base"], **options) as small:
        small.add_adapter("one", folders["one"])
        ids = [5] * 230
        (text,) = small.generate([ids], adapter="one", ignore_eos=True)
        assert text == small.generate([ids], adapter="one", max_tokens=11, ignore_eos=True)[0]
        with pytest.raises(GenerationFailed, match="need 17 KV blocks, the engine has 16"):
            small.generate([ids], adapter="one", max_tokens=12)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        ([("nope", TEXT)], {}, UnknownAdapter, "no adapter is called 'nope'; added are: one, two"),
        (TEXT, {"adapter": "on"}, UnknownAdapter, "no adapter is called 'on'"),
        (TEXT, {"adapter": ""}, UnknownAdapter, "no adapter is called ''"),
        ([(TEXT, "one")], {}, InvalidCall, r"the adapter comes first, write \('one', text\)"),
        (("one", TEXT), {}, InvalidCall, r"a tuple of two: write \[\(adapter, prompt\)\]"),
        ([(None, TEXT)], {"adapter": "one"}, InvalidCall, "prompt 0 names None and adapter= says"),
        (
            [("two", TEXT)],
            {"adapter": "one"},
            InvalidCall,
            "prompt 0 names 'two' and adapter= says",
        ),
        ([TEXT, 5], {}, InvalidCall, "prompt 1 is of the type int, expected a text, token ids, or"),
        ([{"prompt": TEXT}], {}, InvalidCall, "prompt 0 is of the type dict"),
        ([{"role": "user", "content": "hi"}], {}, InvalidCall, "a message of a chat: make a text"),
        ({"one": TEXT}, {}, InvalidCall, "prompts is of the type dict, expected a text, or a list"),
        (None, {}, InvalidCall, "prompts is None"),
        ([""], {}, InvalidCall, "prompt 0 has no tokens"),
        ([[5, 99999]], {}, InvalidCall, "token id 99999, expected ids of 0 to"),
        (TEXT, {"max_token": 5}, InvalidCall, "no option max_token; did you mean max_tokens"),
        (TEXT, {"max_tokens": 5, "max_new_tokens": 5}, InvalidCall, "leave one of them out"),
        (TEXT, {"max_tokens": 0}, InvalidCall, "max_new_tokens is 0, expected a whole number of"),
        (TEXT, {"max_tokens": 1.5}, InvalidCall, "max_new_tokens is 1.5, expected a whole number"),
        (
            TEXT,
            {"temperature": -1},
            InvalidCall,
            "temperature is -1, expected a number of at least 0",
        ),
        (TEXT, {"temperature": "hot"}, InvalidCall, "temperature is 'hot'"),
        (TEXT, {"top_p": 0}, InvalidCall, "top_p is 0, expected more than 0 and at most 1"),
        (TEXT, {"stop": [""]}, InvalidCall, "stop is of the type list, expected a text or a list"),
        (TEXT, {"stop": 5}, InvalidCall, "stop is of the type int"),
        (TEXT, {"n": 2}, InvalidCall, "no option n: give the prompt several times"),
        (TEXT, {"lora_request": 1}, InvalidCall, "name an added adapter with adapter="),
        (TEXT, {"sampling": {"top": 1}}, InvalidCall, "no option top; did you mean"),
        (
            TEXT,
            {"sampling": 5},
            InvalidCall,
            "sampling is of the type int, expected SamplingParams",
        ),
    ],
)
def test_calls_that_are_refused(engine, prompts, options, error, words):
    with pytest.raises(error, match=words) as refused:
        engine.generate(prompts, **options)
    assert isinstance(refused.value, EngineError)


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        ([("nope", (5,), (6,))], UnknownAdapter, "no adapter is called 'nope'"),
        ([((5,), (6,))], InvalidCall, r"target 0 is of the type tuple, expected \(adapter, ids"),
        ([(None, TEXT, (6,))], InvalidCall, "engine.tokenizer"),
        ([(None, (5,), ())], InvalidCall, "at least one token"),
    ],
)
def test_targets_that_are_refused(engine, targets, error, words):
    with pytest.raises(error, match=words):
        engine.score(targets)


def test_adapters_and_engines_that_are_refused(engine, folders, tmp_path):
    with pytest.raises(InvalidCall, match=r"nothing is at .*/nowhere', expected a folder"):
        engine.add_adapter("three", tmp_path / "nowhere")
    with pytest.raises(InvalidCall, match="name is None, expected a text"):
        engine.add_adapter(None, folders["one"])
    with pytest.raises(
        InvalidCall, match="the engine has no option kv_byte; did you mean kv_bytes"
    ):
        graftwork.Engine(folders["base"], kv_byte=5)
    small = graftwork.Engine(folders["base"], dtype="float32", threads=1, kv_bytes=1 << 17)
    with small, pytest.raises(InvalidCall, match=r"no request could use .* adapters may hold"):
        small.add_adapter("long", folders["long"])
    assert "three" not in engine.adapters


def test_options_by_vllms_names():
    def of(**options):
        return choice_of(None, options, EOS).sampling

    assert of() == SamplingParams(eos_token_ids=EOS)
    assert of(temperature=0, top_p=None) == SamplingParams(eos_token_ids=EOS)
    warm = of(temperature=0.7, top_k=-1, stop_token_ids=[9])
    assert (warm.do_sample, warm.temperature, warm.top_k) == (True, 0.7, 0)
    assert warm.eos_token_ids == (2, 9)
    assert of(top_p=0.9).do_sample
    assert of(top_k=5).do_sample
    assert not of(top_k=5, do_sample=False).do_sample
    # A caller's own parameters end at the base's end of sequence too, unless they name another.
    mine = SamplingParams(max_new_tokens=3, do_sample=True, temperature=2.0)
    assert choice_of(mine, {}, EOS).sampling.eos_token_ids == EOS
    assert choice_of(mine, {"eos_token_ids": (7,)}, EOS).sampling.eos_token_ids == (7,)
    assert not choice_of(mine, {"temperature": 0}, EOS).sampling.do_sample


def test_options_that_are_made_once(engine):
    greedy = graftwork.SamplingParams(max_tokens=8, temperature=0, stop="\0")
    assert repr(greedy) == "SamplingParams(max_tokens=8, temperature=0, stop='\\x00')"
    whole = engine.generate(TEXT, max_tokens=8)
    assert engine.generate(TEXT, greedy) == whole
    assert engine.generate([TEXT], {"max_tokens": 8}) == whole
    shorter = engine.generate(TEXT, greedy, max_new_tokens=3)
    assert shorter == engine.generate(TEXT, max_tokens=3)
    with pytest.raises(InvalidCall, match="did you mean temperature"):
        graftwork.SamplingParams(temprature=0)
