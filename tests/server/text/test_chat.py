"""The base's chat template: what transformers makes of it, and what it cannot be made to do."""

from __future__ import annotations

import pytest

from server.text.chat import ChatTemplate, ConversationRefused
from tests.server.http_server import byte_level_tokenizer

LINES = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
USER = [{"role": "user", "content": "hello"}]


def template_of(text):
    fast = byte_level_tokenizer()
    fast.chat_template = text
    return ChatTemplate.of(fast)


def test_a_base_without_a_template_has_none():
    assert template_of(None) is None
    assert template_of("") is None


def test_what_a_message_says_is_never_a_template():
    content = "{{ 7 * 7 }} {% raw %} {# no #}"
    template = template_of(LINES)
    assert template is not None
    assert template.render([{"role": "user", "content": content}]) == f"user: {content}\n"


def test_the_prompt_ends_where_it_is_told():
    template = template_of(LINES + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert template.render(USER) == "user: hello\nassistant:"
    assert template.render(USER, add_generation_prompt=False) == "user: hello\n"
    goes_on = template.render(USER, add_generation_prompt=False, continue_final_message=True)
    assert goes_on == "user: hello"


def test_of_several_templates_the_one_called_default_is_used():
    template = template_of({"default": LINES, "tool_use": "no"})
    assert template.render(USER) == "user: hello\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 5 }}", "str"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected"),
    ],
    ids=["refusal", "wrong type", "missing", "sandbox", "syntax"],
)
def test_a_template_that_stumbles_says_over_what(text, said):
    with pytest.raises(ConversationRefused, match=said):
        template_of(text).render(USER)


def test_no_messages_are_refused():
    with pytest.raises(ConversationRefused):
        template_of(LINES).render([])
