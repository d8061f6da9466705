"""A chat template from the hub is a program: it writes what Transformers would, and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.errors import DataProblem, UsageProblem

TALK = [{"role": "user", "content": "hi \u2603"}, {"role": "assistant", "content": "<yes>"}]
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim }}"
    "{{ '<|im_end|>\n' }}{% endfor %}\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "loops": "{{ bos_token }}{%- for m in messages -%}{%- if m.role == 'system' %}{% continue %}{% endif -%}\n"
    "    {{ m | tojson }}\n    {%- endfor %}{{ eos_token }}{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n * 2 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_it_writes_what_transformers_writes(tiny_llama: Path, name: str, add_generation_prompt: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    expected = tokenizer.apply_chat_template(
        TALK, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    ours = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.rendered(TALK, add_generation_prompt=add_generation_prompt).text == expected


def test_it_is_found_where_models_keep_it(tmp_path: Path) -> None:
    config, jinja = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}old"}))
    assert rendered({"tokenizer_config.json": config}) == "<s>old"
    jinja.write_text("{{ bos_token }}new")
    assert rendered({"tokenizer_config.json": config, "chat_template.jinja": jinja}) == "<s>new"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert rendered({"tokenizer_config.json": config}) == "yes"
    config.write_text("{}")
    assert ChatTemplate.read({"tokenizer_config.json": config}) is None


def rendered(files: dict[str, Path]) -> str:
    found = ChatTemplate.read(files)
    assert found is not None
    return found.rendered(TALK, add_generation_prompt=False).text


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{{ messages.append('x') }}", "refuses these messages"),
        ("{% include '/etc/passwd' %}", "refuses these messages"),
        ("{{ 'a' * 10 ** 9 }}", "not allowed"),
        ("{{ 10 ** 10 ** 10 }}", "not allowed"),
        ("{{ raise_exception('roles must alternate') }}", r"refuses these messages \(roles must alternate\)"),
        ("{% for i in range(90000) %}{{ 'abcdefgh' }}{% endfor %}", "more than 65536 characters"),
        ("{{ messages[7].content }}", "refuses these messages"),
        ("{% for i in range(1000000) %}{% endfor %}", "refuses these messages"),
    ],
)
def test_what_it_may_not_do_is_a_sentence(template: str, sentence: str) -> None:
    with pytest.raises(DataProblem, match=sentence):
        ChatTemplate(template, {}).rendered(TALK, add_generation_prompt=False)


def test_it_is_stopped_when_it_takes_too_long() -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    with pytest.raises(DataProblem, match=r"took more than 0\.2 s"):
        ChatTemplate(endless, {}, render_seconds=0.2).rendered(TALK, add_generation_prompt=False)
    assert time.monotonic() - started < 20
    # Nothing is left that could interrupt a later one.
    assert ChatTemplate("fine", {}).rendered(TALK, add_generation_prompt=False).text == "fine"


def test_a_template_that_is_none_is_the_hubs_mistake() -> None:
    with pytest.raises(UsageProblem, match="chat template cannot be read"):
        ChatTemplate("{% for %}", {})
