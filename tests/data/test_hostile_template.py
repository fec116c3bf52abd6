"""Chat templates that somebody made to do harm: each ends in one sentence, and the next conversation is rendered."""

import json
import os
import signal

import pytest

from bigbase_jax.core import UserError
from bigbase_jax.runtime import limits, untrusted
from bigbase_jax.text import chat_template
from bigbase_jax.text.chat_template import ChatTemplate

LOOP, STOP = "{% for i in range(100000) %}", "{% endfor %}"
TIME, MEMORY = (
    r"takes more than 1 seconds; .* BIGBASE_LIMITS=2",
    r"takes more than .* bytes of memory.* BIGBASE_LIMITS=2",
)
REFUSED = "refuses a conversation"
TEMPLATES = {
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", REFUSED),
    "loops in loops": (LOOP * 4 + STOP * 4, TIME),
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        TIME,
    ),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", REFUSED),
    "a long text": ("{{ 'a' * 10**10 }}", MEMORY),
    "a long text at compilation": ("{{ 'a' | center(10000000000) }}", MEMORY),
    "a text of the conversation": ("{{ messages[0].content * 10**9 }}", MEMORY),
    "a wide number": ("{{ '%10000000000d' % 1 }}{{ '{:10000000000}'.format(1) }}", MEMORY),
    "what doubles": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        f"({MEMORY}|{TIME})",  # on a slow machine, the time ends first
    ),
    "a list": ("{{ [1] | batch(10**10, 1) | list }}", MEMORY),
    "what is written": (LOOP + "x" * 1000 + STOP, MEMORY),
    "many brackets": ("{{" + "(" * 10**5 + "1" + ")" * 10**5 + "}}", REFUSED),
    "a file": ("{% include '/etc/passwd' %}", REFUSED),
    "half a character": (r"{{ '\ud800' }}", REFUSED),
    "code": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", REFUSED),
}
ASKED = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_one_sentence(name, monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, "0.5")
    jinja, sentence = TEMPLATES[name]
    with pytest.raises(UserError, match=f"^the chat template of WHERE {sentence}") as caught:
        ChatTemplate(jinja, {}, "WHERE").render(ASKED)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert ChatTemplate("{{ messages[0].content }}").render(ASKED) == "hi"


def test_the_words_of_a_template_are_not_the_conversation():
    assert ChatTemplate("{{ messages[0].content }}{{ x }}", {"messages": "evil", "x": "y"}).render(ASKED) == "hiy"


def test_a_process_that_dies_or_is_left_by_a_fork_is_replaced():
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(ASKED) == "hi"
    process = untrusted._process[2]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert template.render(ASKED) == "hi"
    untrusted._process = (-1, *untrusted._process[1:])  # as in the child of a fork
    assert template.render(ASKED) == "hi" and untrusted._process[0] == os.getpid()


@pytest.mark.parametrize(
    "state", ["", "[" * 10**5, "[]", "{}", '{"jinja": 1, "tokens": {}, "name": ""}', '{"evil": 1}']
)
def test_a_state_that_is_none_is_one_sentence(state):
    with pytest.raises(UserError, match="state"):
        chat_template.load(state)
    good = ChatTemplate("x", {"bos_token": "y"}, "z")
    assert chat_template.load(good.state()) == good and json.loads(good.state())
