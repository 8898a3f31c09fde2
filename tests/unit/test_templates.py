"""Chat templates of strangers: rendered as transformers renders them, in bounded time and memory."""

from __future__ import annotations

import os
import resource
import threading
import time
from typing import Any

import pytest
from tokenizer_samples import small_tokenizer

from minitron.assets import chat_template
from minitron.templates import ChatTemplateError, conversation_ids, render_conversation

TOKENIZER: Any = small_tokenizer()
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hey \u00e9 <&>"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]

HANGS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a sum": "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power that is folded": "{% set x = 7 ** 99999999 %}{{ x % 3 }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "lorem ipsum": "{{ lipsum(n=9999999) }}",
    "replacing": "{% set x = 'a' * 99999 %}{% for i in range(9999) %}{% set y = x | replace('a', 'bb') %}{% endfor %}",
    "many messages": "{% for a in messages * 9999 %}{% for b in messages * 9999 %}{{ b }}{% endfor %}{% endfor %}",
}
SWELLS = {
    "repetition": "{{ 'x' * 9999999999 }}",
    "a list": "{{ ([1] * 999999999) | length }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "centre": "{{ 'x' | center(9999999999) }}",
    "a format": "{{ '%9999999999d' | format(1) }}",
    "a method": "{{ 'x'.ljust(9999999999) }}",
    "a long text": "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "indent": "{{ messages | tojson(indent=999999999) }}",
}


def with_template(template: str) -> Any:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [*HANGS.values(), *SWELLS.values()], ids=[*HANGS, *SWELLS])
def test_templates_that_do_not_end(template: str) -> None:
    tokenizer = with_template(template)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ChatTemplateError, match=r"and was stopped|cannot be rendered"):
        render_conversation(tokenizer, MESSAGES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    # The next conversation is rendered as ever.
    assert render_conversation(with_template("{{ messages[1].content }}"), MESSAGES) == MESSAGES[1]["content"]


def test_a_hang_is_told_as_one() -> None:
    begin = time.process_time()
    with pytest.raises(ChatTemplateError, match=r"took more than 1.0 s for one conversation and was stopped"):
        render_conversation(with_template(HANGS["nested loops"]), MESSAGES)
    assert time.process_time() - begin < 1  # the time was spent elsewhere
    with pytest.raises(ChatTemplateError, match="needs more than"):
        render_conversation(with_template(SWELLS["doubling"]), MESSAGES)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% for x in %}", "TemplateSyntaxError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without an end"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set n = namespace(__class__=1) %}", "underscore"),
    ],
)
def test_what_a_template_refuses_or_may_not(template: str, sentence: str) -> None:
    with pytest.raises(ChatTemplateError, match=sentence):
        render_conversation(with_template(template), MESSAGES)


TEMPLATES = {
    "ours": chat_template(),
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\nU: {{ m.content }}\n  {% endif %}\n{% endfor %}\n",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "specials": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }} {% endgeneration %}{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ add_generation_prompt }}{{ documents }}",
    "namespace": "{% set n = namespace(c=0) %}{% for m in messages %}{% set n.c = n.c + 1 %}{% endfor %}{{ n.c }}",
    "dict": "{{ dict(a=1) | tojson }}{{ messages | map(attribute='role') | join(',') }}{{ none | default('x', true) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_of_transformers(name: str, prompt: bool) -> None:
    tokenizer = with_template(TEMPLATES[name])
    for tools in (None, [{"name": "f", "parameters": {"x": [1, None, True, "\u00e9"]}}]):
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert render_conversation(tokenizer, MESSAGES, **options) == text
        ids = tokenizer.apply_chat_template(MESSAGES, return_dict=False, **options)
        assert conversation_ids(tokenizer, MESSAGES, **options) == ids


def test_a_message_to_be_continued() -> None:
    tokenizer = with_template(chat_template())
    for final in ("Hel", "Hello "):
        messages = [*MESSAGES[:2], {"role": "assistant", "content": final}]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert render_conversation(tokenizer, messages, continue_final_message=True).rstrip() == expected.rstrip()


def test_threads_and_forks_do_not_mix() -> None:
    tokenizer = with_template("{{ messages[0].content }}")
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(5):
            found[number] = render_conversation(tokenizer, [{"role": "user", "content": str(number)}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: str(number) for number in range(4)}
    child = os.fork()
    if not child:
        os._exit(render_conversation(tokenizer, [{"role": "user", "content": "child"}]) != "child")
    assert render_conversation(tokenizer, [{"role": "user", "content": "parent"}]) == "parent"
    assert os.waitpid(child, 0)[1] == 0


def test_long_conversations_are_rendered() -> None:
    messages = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "word " * 2000}] * 100
    tokenizer = with_template(chat_template())
    assert len(render_conversation(tokenizer, messages)) > 2_000_000
