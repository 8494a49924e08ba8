"""Names of adapters: any text has a name that would do, and a refusal says which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import NameInvalid
from server.store.adapter_names import check_name, is_name, slug_of


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("Complaints EN", "complaints-en"),
        ("投诉分类", "tou-su-fen-lei"),
        ("жалобы", "zhaloby"),
        ("Übergröße v2.1", "ubergrosse-v2.1"),
        ("MyAdapter", "my-adapter"),
        ("checkpoint-500", "checkpoint-500"),
        ("../../etc", "etc"),
        ("a..b", "a.b"),
        ("---", None),
        ("", None),
    ],
)
def test_the_slug_of_a_text(text, slug):
    assert slug_of(text) == slug


@given(st.text(max_size=300))
def test_every_slug_is_a_name_and_every_name_its_own_slug(text):
    slug = slug_of(text)
    assert slug is None or (is_name(slug) and slug_of(slug) == slug)


@pytest.mark.parametrize(
    "text", ["Complaints EN", "投诉", "a" * 64, "a..b", "-a", "a/b", "\ud800a"]
)
def test_a_refusal_says_what_would_do_and_shows_no_pattern(text):
    with pytest.raises(NameInvalid) as caught:
        check_name(text)
    assert caught.value.message.endswith(f"; try {slug_of(text)!r}")
    assert "[a-z" not in caught.value.message
    check_name(slug_of(text))
