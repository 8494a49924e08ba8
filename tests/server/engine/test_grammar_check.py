"""A real checking process: what it survives, what it does not, and what comes after."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from server.engine.grammar_check import GrammarChecker, GrammarRefused, source_of
from server.engine.request import Grammar
from tests.server.engine.test_grammar import ENDLESS_SCHEMA, chain

DEEP = chain(1400, lambda ref: {"allOf": [ref]})


@pytest.fixture
def checker():
    one = GrammarChecker()
    yield one
    one.close()


def check(checker, schema):
    grammar = Grammar("json_schema", json.dumps(schema))
    checker.check(grammar, source_of(grammar))


def test_it_goes_on_after_every_way_to_fail(checker):
    for schema, words in (
        ({"type": "wrong"}, "Invalid type"),
        (DEEP, "nests too deeply"),
        (ENDLESS_SCHEMA, "more than 2 seconds"),
        ({"enum": []}, "cannot be followed"),
    ):
        with pytest.raises(GrammarRefused, match=words) as caught:
            check(checker, schema)
        assert caught.value.lasting
        check(checker, {"type": "object"})


def test_a_check_that_is_stopped_is_not_held_against_the_grammar(checker):
    check(checker, {})  # it runs
    stopping = threading.Timer(0.3, checker.kill)
    stopping.start()
    with pytest.raises(GrammarRefused) as caught:
        check(checker, ENDLESS_SCHEMA)
    stopping.join()
    assert not caught.value.lasting
    check(checker, {})


def test_a_checker_nobody_asked_has_no_process():
    GrammarChecker().close()


def test_the_process_ends_with_its_asker():
    command = [sys.executable, "-m", "server.engine.grammar_check"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        source = source_of(Grammar("json_schema", json.dumps(ENDLESS_SCHEMA)))
        process.stdin.write(json.dumps(source).encode() + b"\n")
        process.stdin.close()
        # In the middle of its work nobody could tell it: its own limit does.
        deadline = time.monotonic() + 30
        while process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_process_loads_no_torch():
    words = "import server.engine.grammar_check, sys; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_an_option_of_the_library_may_stand_in_the_schema(checker):
    check(checker, {"oneOf": [{"type": "string"}, {"type": "integer"}]})  # never both
    several = {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}
    with pytest.raises(GrammarRefused, match="coerce_one_of"):
        check(checker, several)
    check(checker, {**several, "x-guidance": {"coerce_one_of": True}})
