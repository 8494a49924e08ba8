"""Templates substitute columns, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import TemplateInvalid
from adapters.template import MAX_TEMPLATE_CHARACTERS, Template, text_of

plain = st.text(alphabet=st.characters(exclude_characters="{}", exclude_categories=["Cs"]))
names = plain.filter(lambda name: name.strip() and not name.startswith("?"))


@given(st.lists(st.tuples(plain, names)), plain, st.data())
def test_rendering_puts_values_between_the_literals(parts, end, data):
    text = "".join(f"{literal}{{{name}}}" for literal, name in parts) + end
    row = {name: data.draw(st.text(max_size=5)) for _, name in parts}
    want = "".join(literal + row[name] for literal, name in parts) + end.rstrip()
    assert Template.parse(text).render(row) == want


@given(st.lists(st.tuples(st.text("aÜß:= \n"), names)), st.text("aÜß:= \n"), st.data())
def test_what_a_template_renders_it_recognises(parts, end, data):
    template = Template.parse("".join(f"{literal}{{{name}}}" for literal, name in parts) + end)
    row = {name: data.draw(st.text("ab:. \n", max_size=5)) for name in template.columns}
    assert template.recognises(template.render(row)) == template.has_words


@pytest.mark.parametrize(
    ("template", "text", "recognised"),
    [
        ("Tweet : {a} Label :", "tweet: late LABEL:", True),
        ("Tweet : {a} Label :", "Tweet : late", False),
        ("Tweet : {a} Label :", "late Label :", False),
        ("{a} then {b} then", "one then two then", True),
        ("{a} then {b} then", "one then", False),
        ("Label : {a} Label :", "Label :", False),  # once is not twice
        ("{a}?", "is it?", False),
        ("{a}", "anything", False),
    ],
)
def test_a_text_is_recognised_by_the_templates_own_words(template, text, recognised):
    assert Template.parse(template).recognises(text) == recognised


@given(st.text(alphabet="a{} ", max_size=12))
def test_escaped_text_renders_to_itself(text):
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert Template.parse(escaped).render({}) == text.rstrip()


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"i": "q", "in": "x"}, "Human: q\nx\n\nAssistant:"),
        ({"i": "q", "in": ""}, "Human: q\n\nAssistant:"),
        ({"i": "q", "in": " \n"}, "Human: q\n\nAssistant:"),
        ({"i": "q"}, "Human: q\n\nAssistant:"),
        ({"i": "", "in": ""}, "Human: \n\nAssistant:"),
    ],
)
def test_a_line_of_empty_optional_columns_is_left_out(row, prompt):
    template = Template.parse("Human: {i}\n{?in}\n\nAssistant: ")
    assert template.render(row) == prompt
    filled = template.fill(row)
    assert next(filled.text[slice(*span)] for span in filled.ranges) == row["i"]
    assert (template.columns, template.required, template.optional) == (
        ("i", "in"),
        ("i",),
        ("in",),
    )


def test_optional_columns_beside_others_and_at_the_ends():
    assert Template.parse("{?a} {b}").render({"b": "x"}) == " x"
    assert Template.parse("In: {?a} {?b}\n{c}").render({"c": "x"}) == "x"
    assert Template.parse("In: {?a} {?b}\n{c}").render({"b": "y", "c": "x"}) == "In:  y\nx"
    assert Template.parse("{c}\n{?a}").render({"c": "x"}) == "x"
    assert Template.parse("{?a}").render({"a": ""}) == ""
    assert Template.parse("{c}\n{?n}").render({"c": "x", "n": 0}) == "x\n0"
    with pytest.raises(TemplateInvalid, match="missing: 'c'"):
        Template.parse("{c}{?a}").render({"a": "x"})
    with pytest.raises(TemplateInvalid, match="without a name"):
        Template.parse("{?}")


@pytest.mark.parametrize(
    ("template", "column"),
    [
        ("{a}\n{?b}", "a"),
        ("{?b} :", "b"),
        ("{a} {a}", "a"),
        ("{a} {b}", None),
        ("{?a} {?b}", None),
        ("plain", None),
    ],
)
def test_the_column_that_one_text_can_fill(template, column):
    assert Template.parse(template).sole_column == column


def test_a_text_is_recognised_with_and_without_the_lines_that_may_go():
    template = Template.parse("Human: {i}\nInput: {?in}\n\nAssistant: ")
    for row in ({"i": "q"}, {"i": "q", "in": "x"}):
        assert template.recognises(template.render(row))
    assert not template.recognises("q")


def test_values_are_never_parsed():
    template = Template.parse("{a} {b}")
    assert template.render({"a": "{b}", "b": "{{x}}"}) == "{b} {{x}}"
    assert template.columns == ("a", "b")


def test_numbers_are_written_plainly_and_odd_names_are_only_names():
    assert Template.parse("{0} {x.y!r:>5}").render({"0": 1.5, "x.y!r:>5": 2}) == "1.5 2"


def test_white_space_at_the_end_belongs_to_the_target():
    assert Template.parse("{Tweet text} Label : \n").render({"Tweet text": "a "}) == "a  Label :"
    assert Template.parse("{a}").render({"a": "kept "}) == "kept "


def test_white_space_at_the_end_is_kept_where_the_recipe_was_written_so():
    text = "{a} Label : \n"
    template = Template.parse(text, keep_trailing_space=True)
    assert (template.render({"a": "x"}), template.dropped) == ("x Label : \n", "")
    assert Template.parse(text).dropped == " \n"


def test_filling_says_where_the_values_stand_and_leaves_other_columns_alone():
    filled = Template.parse("a {x}{y} b {x}").fill({"x": "漢字", "y": 7, "ID": "other"})
    assert filled.text == "a 漢字7 b 漢字"
    assert [filled.text[start:stop] for start, stop in filled.ranges] == ["漢字", "7", "漢字"]
    with pytest.raises(TemplateInvalid, match="missing: 'y'"):
        Template.parse("{x}{y}").fill({"x": "1"})


def test_booleans_are_written_as_in_json():
    assert [text_of(value) for value in (True, False, 1, 1.0, "True")] == [
        "true",
        "false",
        "1",
        "1.0",
        "True",
    ]


@pytest.mark.parametrize(
    "text", ["{", "}", "a {b", "a } b", "{}", "{ }", "{a{b}}", "{{{", "x" * 10_001]
)
def test_what_does_not_parse_is_refused(text):
    with pytest.raises(TemplateInvalid) as caught:
        Template.parse(text)
    assert caught.value.field == "template"


def test_a_row_must_fit():
    template = Template.parse("{a} {b}")
    with pytest.raises(TemplateInvalid, match="missing: 'b'; unknown: 'c'"):
        template.render({"a": "1", "c": "2"})
    assert MAX_TEMPLATE_CHARACTERS == 10_000
