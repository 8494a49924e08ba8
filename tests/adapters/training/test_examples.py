"""What ids a row becomes: boundaries, labels, types, length, and which rows are held out."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adapters.errors import DataInvalid, JobInvalid
from adapters.template import Template
from server.text.tokenizer import TextTokenizer
from tests.acceptance.real_base import BASE_DIR, needs_base
from tests.adapters.training.jobs import LABELS, ROWS, plan, spec, stored_and_read, tokenizer

EOS = 2


def refusal(**fields):
    with pytest.raises((DataInvalid, JobInvalid)) as caught:
        plan(**fields)
    return caught.value


def ids(text, *, bos=False, special=False):
    return tokenizer(bos=bos).encode(text, add_special_tokens=special, plain=True)


# --- token boundaries ------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_ids_are_those_of_prompt_then_separator_and_target_then_the_end(bos):
    examples = plan(labels=LABELS, encoder=tokenizer(bos=bos)).examples
    for row, example in zip(ROWS, examples.train, strict=True):
        prompt = f"Tweet text : {row['text']} Label :"
        assert example.prompt_ids == ids(prompt, bos=bos, special=True)
        assert example.target_ids == (*ids(f" {row['label']}"), EOS)
        assert example.label == LABELS.index(row["label"])
    assert examples.label_ids == [(*ids(f" {label}"), EOS) for label in LABELS]


# template, separator asked for, tokenization -> where the prompt ends, what stands before the target
BOUNDARIES = [
    ("{text} Label :", None, "boundary", " Label :", " "),
    ("{text} Label : ", None, "boundary", " Label :", " "),
    ("{text} Label :\n", None, "boundary", " Label :", "\n"),
    ("{text} Label :\n", " ", "boundary", " Label :", " "),
    ("{text} Label : ", "", "boundary", " Label :", ""),
    ("{text} Label : ", None, "as_written", " Label : ", ""),
    ("{text} Label : ", "\n", "as_written", " Label : ", "\n"),
]


@pytest.mark.parametrize(("template", "asked", "mode", "end", "separator"), BOUNDARIES)
def test_white_space_at_the_templates_end_moves_to_the_target(
    template, asked, mode, end, separator
):
    made = plan(template=template, target_separator=asked, tokenization=mode, append_eos=False)
    first = made.examples.train[0]
    assert made.job.target_separator == separator
    assert first.prompt_ids == ids("the tweet is" + end)
    assert first.target_ids == ids(separator + "complaint")


def test_names_of_special_tokens_in_a_row_are_plain_text():
    typed = plan().examples.train[3]
    assert tokenizer().encode("</s>") == (EOS,)
    assert EOS not in typed.prompt_ids
    assert tokenizer().decode(typed.prompt_ids) == "Tweet text : </s> typed <s> Label :"


def test_an_end_of_sequence_that_the_tokenizer_lacks():
    encoder = TextTokenizer.__new__(TextTokenizer)
    encoder.__dict__.update(tokenizer().__dict__, eos_token_id=None)
    error = refusal(encoder=encoder)
    assert error.field == "append_eos"
    assert plan(encoder=encoder, append_eos=False).job.append_eos is False


plain = st.text(alphabet=st.characters(exclude_characters="{}", exclude_categories=["Cs"]))
values = plain | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.booleans()


@settings(deadline=None)
@given(
    plain,
    plain,
    st.lists(st.tuples(values, plain.filter(bool)), min_size=1, max_size=3),
    st.sampled_from(["boundary", "as_written"]),
    st.booleans(),
)
def test_any_row_is_rendered_or_refused(before, after, rows, mode, bos):
    encoder = tokenizer(bos=bos)
    data = [{"x": value, "y": target} for value, target in rows]
    template = before + "{x}" + after
    try:
        made = plan(
            data, encoder=encoder, template=template, target="y", tokenization=mode, max_length=400
        )
    except DataInvalid:
        # One class, a prompt without tokens, or a row that is too long.
        return
    except JobInvalid:
        # 10,000 characters are a template's limit, and the strategies stay below it.
        raise AssertionError(template) from None
    parsed = Template.parse(template, keep_trailing_space=mode == "as_written")
    for row, example in zip(data, made.examples.train, strict=True):
        prompt = parsed.render({"x": row["x"]})
        target = made.job.target_separator + row["y"]
        assert example.prompt_ids == encoder.encode(prompt, plain=True)
        assert example.target_ids == (
            *encoder.encode(target, add_special_tokens=False, plain=True),
            EOS,
        )
        assert len(example.types) == example.num_tokens
    assert stored_and_read(made.job, made) == made.examples


# --- targets and labels ----------------------------------------------------------------------


def test_numbers_with_names_are_rendered_as_words():
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 2}, {"text": "c", "label": 1}]
    names = {"1": "complaint", "2": "no complaint"}
    for labels in (None, LABELS):
        made = plan(rows, labels=labels, label_names=names)
        assert made.job.labels == LABELS
        assert [example.label for example in made.examples.train] == [0, 1, 0]
        assert made.examples.train[0].target_ids == (*ids(" complaint"), EOS)


def test_a_value_without_a_name():
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 3}]
    error = refusal(rows=rows, label_names={"1": "complaint", "2": "no complaint"})
    assert (error.row, error.field) == (2, "label")
    assert "holds '3'" in error.message


def test_a_target_that_is_no_label_names_near_ones():
    rows = [*ROWS[:2], {"text": "a", "label": "no complain"}]
    error = refusal(rows=rows, labels=[*LABELS, "else"])
    assert error.row == 3
    assert "near ones are 'no complaint', 'complaint'" in error.message


@pytest.mark.parametrize(
    ("rows", "row", "words"),
    [
        ([{"text": "a"}], 1, "the target column, 'label', is missing; the row has 'text'"),
        ([*ROWS, {"Text": "a", "label": "b"}], 7, "template, 'text', is missing"),
        (
            [{"text": "a", "label": ""}, ROWS[0], {"text": "b", "label": ""}],
            1,
            "'label', the target, is empty in 2 of 3 rows (rows 1, 3); write an answer",
        ),
        ([ROWS[0], ROWS[3]], None, "all 2 rows have the same target, 'complaint'"),
    ],
)
def test_rows_that_cannot_be_trained_on(rows, row, words):
    error = refusal(rows=rows)
    assert isinstance(error, DataInvalid)
    assert error.row == row
    assert words in error.message


def test_double_braces_alone_name_no_column():
    told = refusal(template="{{text}} :").message
    assert "names no column" in told
    assert "write {column} in single braces" in told
    assert "single" not in refusal(template="text :").message


def test_a_prompt_without_tokens():
    rows = [{"text": "a", "label": "b"}, {"text": "", "label": "c"}]
    for bos in (False, True):
        error = refusal(rows=rows, template="{text}", encoder=tokenizer(bos=bos))
        assert (error.row, "the prompt has no tokens" in error.message) == (2, True)


def test_one_row_is_enough():
    assert len(plan(ROWS[:1]).examples.train) == 1


# --- types -----------------------------------------------------------------------------------


def types_as_text(example, encoder):
    """The type of each token beside its text."""
    tokens = (*example.prompt_ids, *example.target_ids)
    groups = []
    for token, kind in zip(tokens, example.types, strict=True):
        if groups and groups[-1][0] == kind:
            groups[-1][1].append(token)
        else:
            groups.append((kind, [token]))
    return [(kind, encoder.decode(group)) for kind, group in groups]


def test_types_follow_the_characters():
    example = plan(ROWS[:1], encoder=tokenizer(bos=True)).examples.train[0]
    assert types_as_text(example, tokenizer()) == [
        (0, "<s>"),
        (1, "Tweet text : "),
        (2, "the tweet is"),
        (3, " Label :"),
        (4, " complaint</s>"),
    ]


def test_types_of_several_columns():
    rows = [{"a": "kosten", "b": "漢字", "label": "x"}]
    example = plan(rows, template="1{a}2{b}3").examples.train[0]
    assert types_as_text(example, tokenizer()) == [
        (1, "1"),
        (2, "kosten"),
        (1, "2"),
        (2, "漢字"),
        (3, "3"),
        (4, " x</s>"),
    ]


def test_a_token_that_begins_with_the_space_before_a_value_is_the_values():
    rows = [{"a": "complaint", "label": "x"}]
    example = plan(rows, template="the {a} Label").examples.train[0]
    assert types_as_text(example, tokenizer())[:3] == [(1, "the"), (2, " complaint"), (3, " Label")]


# --- length ----------------------------------------------------------------------------------


def test_a_row_that_is_too_long_is_refused_with_its_number():
    lengths = [example.num_tokens for example in plan().examples.train]
    longest = lengths.index(max(lengths)) + 1
    error = refusal(max_length=max(lengths) - 1)
    assert error.row == longest
    assert f"max_length, {max(lengths) - 1}" in error.message
    assert error.came == f"{max(lengths)} tokens"
    assert plan(max_length=max(lengths)).examples == plan().examples


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [12, 20, 24])
def test_truncation_drops_the_beginning_of_the_prompt_and_keeps_the_target(bos, max_length):
    encoder = tokenizer(bos=bos)
    whole = plan(encoder=encoder).examples.train
    short = plan(encoder=encoder, max_length=max_length, on_too_long="truncate")
    assert any(example.num_tokens == max_length for example in short.examples.train)
    for before, after in zip(whole, short.examples.train, strict=True):
        assert after.target_ids == before.target_ids
        assert after.num_tokens == min(before.num_tokens, max_length)
        assert len(after.types) == after.num_tokens
        num_kept = len(after.prompt_ids) - bos
        assert after.prompt_ids[bos:] == before.prompt_ids[-num_kept:]
        assert after.prompt_ids[:bos] == before.prompt_ids[:bos]
        assert (
            after.types[-num_kept - len(after.target_ids) :]
            == before.types[-num_kept - len(after.target_ids) :]
        )


@pytest.mark.parametrize("bos", [False, True])
def test_a_target_that_leaves_no_room_is_refused_even_so(bos):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "complaint " * 20}]
    num_target = len(plan(rows).examples.train[1].target_ids)
    for max_length in (5, num_target, num_target + bos):
        error = refusal(
            rows=rows, encoder=tokenizer(bos=bos), max_length=max_length, on_too_long="truncate"
        )
        assert error.row == 2
        assert "the target is kept whole" in error.message
    fits = num_target + bos + 1
    made = plan(rows, encoder=tokenizer(bos=bos), max_length=fits, on_too_long="truncate")
    assert len(made.examples.train[1].prompt_ids) == bos + 1


def test_a_held_out_row_must_hold_every_label():
    labels = ["x", "z", "y" * 60]
    rows = [{"text": "a", "label": label} for label in ("x", "z", "x", "z")]
    longest = len(plan(rows, labels=labels).examples.label_ids[2])
    num_prompt = len(plan(rows, labels=labels).examples.train[0].prompt_ids)
    most = num_prompt + longest
    split = {"validation_split": 0.5}
    assert plan(rows, labels=labels, max_length=most - 1).examples.held_out == []
    error = refusal(rows=rows, labels=labels, max_length=most - 1, hyperparameters=split)
    assert f"{longest} of target (the longest label)" in error.message
    made = plan(rows, labels=labels, max_length=most, hyperparameters=split)
    assert len(made.examples.held_out) == 2


# --- the split -------------------------------------------------------------------------------


def many(counts):
    return [
        {"text": f"a {index}", "label": label}
        for label, count in counts.items()
        for index in range(count)
    ]


def test_the_split_gives_every_label_its_share_and_follows_the_seed():
    rows = many({"joy": 40, "anger": 20, "fear": 3})
    labels = ["joy", "anger", "fear"]

    def held_out(seed, given_labels=labels):
        hyperparameters = {"validation_split": 0.25, "seed": seed}
        examples = plan(rows, labels=given_labels, hyperparameters=hyperparameters).examples
        numbers = [example.row for example in examples.held_out]
        assert sorted(numbers + [example.row for example in examples.train]) == list(range(1, 64))
        assert numbers == sorted(numbers)
        return examples

    first = held_out(0)
    assert Counter(example.label for example in first.held_out) == {0: 10, 1: 5, 2: 1}
    assert held_out(0) == first
    assert held_out(1) != first
    assert len(held_out(0, None).held_out) == 16


def test_every_label_keeps_a_row_to_train_on():
    labels = ["joy", "anger"]
    made = plan(
        many({"joy": 9, "anger": 1}), labels=labels, hyperparameters={"validation_split": 0.9}
    )
    assert Counter(example.label for example in made.examples.train) == {0: 1, 1: 1}


def test_a_split_that_holds_out_nothing():
    for rows in (many({"joy": 1, "anger": 1}), many({"joy": 2, "anger": 2})):
        error = refusal(
            rows=rows, labels=["joy", "anger"], hyperparameters={"validation_split": 0.1}
        )
        assert error.field == "hyperparameters.validation_split"


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_no_row_is_lost_and_no_label_emptied(counts, share, seed):
    labels = [f"l{index}" for index in range(len(counts))]
    rows = many(dict(zip(labels, counts, strict=True)))
    try:
        made = plan(
            rows, labels=labels, hyperparameters={"validation_split": share, "seed": seed}
        ).examples
    except JobInvalid:
        assert round(sum(counts) * share) == 0 or max(counts) == 1
        return
    numbers = [example.row for example in (*made.train, *made.held_out)]
    assert sorted(numbers) == list(range(1, len(rows) + 1))
    assert {example.label for example in made.train} == set(range(len(labels)))
    wanted = round(sum(counts) * share)
    # Labels with too few rows to give their share make it less, by one row each at most.
    small = sum(count - 1 < math.ceil(count * share) for count in counts)
    assert wanted - small <= len(made.held_out) <= wanted


# --- the real tokenizer ----------------------------------------------------------------------


@needs_base
@pytest.mark.parametrize(("template", "joins"), [("boundary", True), ("as_written", False)])
def test_the_default_bases_tokens_join_where_the_white_space_moves(template, joins):
    encoder = TextTokenizer(AutoTokenizer.from_pretrained(BASE_DIR))
    made = plan(
        encoder=encoder,
        base=replace(spec(8192), vocab_size=encoder.vocab_size),
        template="Tweet text : {text} Label : ",
        tokenization=template,
        labels=LABELS,
    )
    for row, example in zip(ROWS, made.examples.train, strict=True):
        text = f"Tweet text : {row['text']} Label : {row['label']}"
        own = (*example.prompt_ids, *example.target_ids)
        assert (own == (*encoder.encode(text, plain=True), encoder.eos_token_id)) is joins
    if joins:
        assert [len(target) for target in made.examples.label_ids] == [2, 3]
