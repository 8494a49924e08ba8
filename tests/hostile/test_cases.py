"""Every hostile case has its own status, code and message, and leaves the server as it was."""

from __future__ import annotations

import pytest

from tests.hostile import requests, uploads
from tests.hostile.case import EXPECTED, Case

CASES = [*uploads.CASES, *requests.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_in_its_own_words(case: Case, unharmed):
    answer = case.send(unharmed)
    status, code, message = EXPECTED[case.name]
    assert answer.content_type != "text/html"
    assert [answer.status, answer.code] == [status, code]
    if message.endswith("..."):
        assert answer.message.startswith(message[:-3])
    else:
        assert answer.message == message


def test_every_case_has_an_answer_and_every_answer_a_case():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert set(names) == set(EXPECTED)


def test_no_answer_is_the_servers_own_fault():
    assert not [name for name, (status, _, _) in EXPECTED.items() if status >= 500]
