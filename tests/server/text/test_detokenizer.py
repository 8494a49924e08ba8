"""Text must only ever grow, and never by half a character."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.text.detokenizer import IncrementalDetokenizer
from server.text.tokenizer import TextTokenizer
from tests.server.http_server import byte_level_tokenizer

TOKENIZER = TextTokenizer(byte_level_tokenizer())
BYTE_IDS = list(range(3, 259))


def pieces(ids, context=()):
    detokenizer = IncrementalDetokenizer(TOKENIZER.decode, context)
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.flush()]


@given(st.text(max_size=40), st.text(max_size=10))
def test_pieces_join_to_the_text(text, before):
    ids = TOKENIZER.encode(text)
    assert "".join(pieces(ids, TOKENIZER.encode(before))) == text


@given(st.text(alphabet="aé漢🙂€", max_size=30))
def test_no_piece_holds_half_a_character(text):
    assert all("�" not in piece for piece in pieces(TOKENIZER.encode(text)))


@settings(max_examples=300)
@given(st.lists(st.sampled_from(BYTE_IDS), max_size=40))
def test_any_bytes_join_to_what_decoding_them_at_once_gives(ids):
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids)


def test_bytes_that_are_no_text_do_not_hold_the_rest_back():
    lead = TOKENIZER.encode("é")[0]  # the first byte of a character, again and again
    given_out = pieces([lead] * 12)
    assert "".join(given_out[:-1]).count("�") >= 10


def test_an_incomplete_end_is_replaced_once():
    ids = next(
        ids for text in "🙃🙁🤖ß" if len(ids := TOKENIZER.encode(text)) > 1
    )  # a character of several tokens
    assert pieces(ids[:-1])[-1] == "�"


def test_a_leading_space_is_kept_after_a_prompt():
    # SentencePiece's decoder drops the first token's space: with context, it is not the first.
    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}, unk_token="s"))
    backend.decoder = decoders.Metaspace()
    detokenizer = IncrementalDetokenizer(backend.decode, [0])
    assert [detokenizer.feed(token_id) for token_id in (1, 2, 0)] == [" cat", "s", " the"]
