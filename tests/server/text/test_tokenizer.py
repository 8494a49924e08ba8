"""The tokenizer's own backends give the ids of transformers' own call."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken

from server.text.tokenizer import TextTokenizer, read_eos_token_ids
from tests.server.http_server import byte_level_tokenizer

TEXTS = ["a complaint", "  spaces ", "Übergröße 漢字 🙂", "</s> typed <s>", ""]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(bos, text):
    fast = byte_level_tokenizer(bos=bos)
    ours = TextTokenizer(fast)
    assert list(ours.encode(text)) == fast(text)["input_ids"]
    assert (
        list(ours.encode(text, add_special_tokens=False))
        == (fast(text, add_special_tokens=False)["input_ids"])
    )
    assert [span.id for span in ours.spans(text)] == fast(text)["input_ids"]


def test_truncation_left_in_the_file_is_off():
    fast = byte_level_tokenizer()
    fast.backend_tokenizer.enable_truncation(2)
    fast.backend_tokenizer.enable_padding(length=50)
    assert TextTokenizer(fast).decode(TextTokenizer(fast).encode("a b c d e f")) == "a b c d e f"


def test_what_others_switch_on_later_stays_with_them():
    fast = byte_level_tokenizer()
    ours = TextTokenizer(fast)
    fast.backend_tokenizer.enable_truncation(2)
    fast.backend_tokenizer.enable_padding(length=50)
    fast.backend_tokenizer.encode_special_tokens = True
    assert ours.decode(ours.encode("a b c d e f")) == "a b c d e f"
    assert 2 in ours.encode("</s>")


def test_tokens_that_were_added_keep_their_ids_and_kinds():
    fast = byte_level_tokenizer()
    fast.add_tokens(["later", AddedToken("once", single_word=True, lstrip=True)])
    fast.add_special_tokens({"additional_special_tokens": ["<|last|>"]})
    text = "later laterally once onceagain <|last|> </s>"
    ours = TextTokenizer(fast)
    assert list(ours.encode(text)) == fast(text)["input_ids"]
    assert ours.vocab_size == len(fast)
    assert fast.convert_tokens_to_ids("<|last|>") in ours.special_ids
    assert fast.convert_tokens_to_ids("later") not in ours.special_ids


def test_special_tokens_typed_in_a_row_are_plain_text():
    ours = TextTokenizer(byte_level_tokenizer(bos=True))
    assert 2 in ours.encode("</s>")
    plain = ours.encode("</s>", plain=True)
    assert 2 not in plain
    assert plain[0] == 1  # what the tokenizer adds is still added
    assert ours.decode(plain[1:]) == "</s>"


def test_spans_cover_the_text():
    ours = TextTokenizer(byte_level_tokenizer())
    assert "".join(span.text for span in ours.spans("the tweet")) == "the tweet"


def test_eos_ids_are_read_from_the_base(tmp_path):
    assert read_eos_token_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert read_eos_token_ids(tmp_path) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert read_eos_token_ids(tmp_path) == (5, 6)
    ours = TextTokenizer(byte_level_tokenizer(), (5, 2))
    assert ours.eos_token_ids == (5, 2)
    assert {0, 1, 2, 5} == ours.special_ids
