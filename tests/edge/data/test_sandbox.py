"""A template from a stranger makes nothing large, runs no code and sees nothing but the conversation."""

from __future__ import annotations

import tracemalloc

import pytest

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.errors import DataProblem, FedSODAError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TWICE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = "
HOSTILE = [
    TWICE + "ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    TWICE + "ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    TWICE + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    TWICE + "[ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson | length }}",
    TWICE + "[ns.x, ns.x] %}{% endfor %}{{ (ns.x | string) | length }}",
    TWICE + "ns.x.replace('a', ns.x) %}{% endfor %}{{ ns.x }}",
    TWICE + "ns.x.join([ns.x, ns.x, ns.x]) %}{% endfor %}{{ ns.x }}",
    TWICE + "'%s%s' % (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    TWICE + "'{0}{0}'.format(ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{{ 'a' * 999999999 }}",
    "{{ [1] * 999999999 }}",
    "{{ 'a'.center(999999999) }}",
    "{{ 'a' | center(999999999) }}",
    "{{ 'a'.ljust(width=999999999) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '{x:999999999}'.format_map({'x': 1}) }}",
    "{{ [[1]] | tojson(indent=999999999) }}",
    "{{ ('\n' | center(60000)) | indent(60000) }}",
    "{{ (range(99999) | map('center', 60000) | join) | length }}",
    "{{ 'a'.join(range(99999) | map('center', 60000)) | length }}",
    "{{ range(99999) | batch(2, 'x' * 60000) | list }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ lipsum(n=100000) }}",
    "{{ messages | random }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ (messages | attr('append'))('x') }}",
    "{{ messages[0].update(role='x') }}",
    "{{ dict.mro() }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{{ raise_exception.__globals__['x'] }}",
    "{{ self.__init__.__globals__ }}",
    "{% import 'os' as os %}",
    "{% for i in range(30) %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_what_is_hostile_ends_in_a_sentence_and_takes_no_memory(number: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FedSODAError, match=r"refuses these messages|more than|took more|cannot be read"):
            print(
                len(
                    ChatTemplate(HOSTILE[number], {}, render_seconds=1.0)
                    .rendered(TALK, add_generation_prompt=False)
                    .text
                )
            )
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '-' * 5 }}{{ 2 * 3 }}{{ 7 % 4 }}{{ 'a' + 'b' ~ 3 ~ none }}", "-----63ab3None"),
        ("{{ 'a'.center(5) }}{{ '%03d' % 7 }}{{ '{:>4}'.format('x') }}", "  a  007   x"),
        ("{{ messages[0].content.replace('h', 'HH') }}{{ 'x'.join(['1', '2']) }}", "HHi1x2"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ namespace(a=1).a }}{{ dict(a=1)['a'] }}{{ dict.fromkeys('ab') | length }}", "112"),
        ("{{ strftime_now('%Y-%m-%d %%Q %Q') }}", "2024-07-26 %Q %Q"),
    ],
)
def test_what_is_harmless_works(template: str, text: str) -> None:
    assert ChatTemplate(template, {}).rendered(TALK, add_generation_prompt=False).text == text


def test_a_compilation_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(FedSODAError, match=r"took more|cannot be read|more than"):
        ChatTemplate("{{ range(99999) | map('string') | list | sort | join }}" * 200, {}, render_seconds=0.2).rendered(
            TALK, add_generation_prompt=False
        )


def test_a_problem_is_named_in_short() -> None:
    with pytest.raises(DataProblem) as refused:
        ChatTemplate("{{ raise_exception('no ' * 2000) }}", {}).rendered(TALK, add_generation_prompt=False)
    assert len(str(refused.value)) < 400
