"""Templates of the shapes that public models have render as `apply_chat_template` does, in text, ids and masks."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.examples import ChatExample
from fedsoda_edge.data.samples import Renderer, Sample, SampleTokenizer
from fedsoda_edge.data.sandbox import TODAY
from fedsoda_edge.errors import DataProblem
from fedsoda_edge.protocol.template import TextTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ASK = {"role": "user", "content": "where is <room> 1 & 2 \u2603?"}
SAY = {"role": "assistant", "content": "down  the hall\n"}
SYSTEM = {"role": "system", "content": " be brief "}
THOUGHT = {"role": "assistant", "content": "left", "reasoning": "the room\nis left"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "K\u00f6ln", "n": 1.5}}}],
}
RESULT = {"role": "tool", "content": "sun", "tool_call_id": None}
WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "says <how> it is",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["K\u00f6ln"]}}},
        },
    }
]
DOCUMENTS = [{"title": "Plan", "text": "Room 1 is left."}]
TALKS: dict[str, tuple[list[dict[str, Any]], Any, Any]] = {
    "plain": ([ASK, SAY], None, None),
    "turns": ([ASK, SAY, ASK, THOUGHT], None, None),
    "system": ([SYSTEM, ASK, SAY], None, None),
    "tools": ([SYSTEM, ASK, CALL, RESULT, SAY], WEATHER, None),
    "documents": ([ASK, SAY], None, DOCUMENTS),
}
TEMPLATES = {
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' "
    "+ (message['content'] or '') + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama-3": "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
    '        {%- set date_string = "none" %}\n    {%- endif %}\n{%- endif %}\n'
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "{%- if tools is not none %}\n    {%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n"
    '        {{- "\\n\\n" }}\n    {%- endfor %}\n{%- endif %}\n{{- system_message }}<|eot_id|>\n'
    "{%- for message in messages %}\n    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}\n"
    "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim "
    "+ '<|eot_id|>' }}\n    {%- elif 'tool_calls' in message %}\n"
    "        {%- if not message.tool_calls|length == 1 %}\n            {{- raise_exception('one call at once') }}\n"
    "        {%- endif %}\n        {%- set tool_call = message.tool_calls[0].function %}\n"
    "        {{- '{\"name\": \"' + tool_call.name + '\", ' }}\n        {{- '\"parameters\": ' }}\n"
    "        {{- tool_call.arguments | tojson }}\n        {{- '}' }}\n    {%- else %}\n"
    "        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}\n"
    "        {%- if message.content is mapping or message.content is iterable %}\n"
    "            {{- message.content | tojson }}\n        {%- endif %}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n",
    "mistral": "{%- set loop_messages = messages %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages | rejectattr('role', 'equalto', 'tool') %}"
    "{%- if message['role'] == 'user' %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in message.tool_calls %}{%- set out = call.function|tojson %}{{- out[:-1] }}"
    "{{- ', \"id\": \"' + loop.index0|string + '\"}' }}{%- endfor %}{{- ']' + eos_token }}{%- else %}"
    "{{- ' ' + message['content']|trim + eos_token }}{%- endif %}{%- endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "qwen-3": "{%- if tools %}\n    {{- '<|im_start|>system\n' }}\n    {{- '<tools>' }}\n    {%- for tool in tools %}\n"
    '        {{- "\\n" }}\n        {{- tool | tojson }}\n    {%- endfor %}\n    {{- "\\n</tools><|im_end|>\\n" }}\n'
    "{%- endif %}\n{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
    "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n"
    '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}\n'
    "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n"
    "    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n    {%- if message.content is string %}\n"
    "        {%- set content = message.content %}\n    {%- else %}\n        {%- set content = '' %}\n    {%- endif %}\n"
    "    {%- if message.role == \"assistant\" %}\n        {%- set reasoning_content = '' %}\n"
    "        {%- if message.reasoning_content is string %}\n"
    "            {%- set reasoning_content = message.reasoning_content %}\n        {%- else %}\n"
    "            {%- if '</think>' in content %}\n"
    "                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}\n"
    "                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
    "            {%- endif %}\n        {%- endif %}\n        {%- if loop.index0 > ns.last_query_index %}\n"
    "            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n'"
    " + content.lstrip('\\n') }}\n        {%- else %}\n            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
    "        {%- endif %}\n        {%- if message.tool_calls %}\n            {%- for tool_call in message.tool_calls %}\n"
    "                {%- if tool_call.function %}\n                    {%- set tool_call = tool_call.function %}\n"
    '                {%- endif %}\n                {{- \'<tool_call>\\n{"name": "\' }}\n                {{- tool_call.name }}\n'
    '                {{- \'", "arguments": \' }}\n                {%- if tool_call.arguments is string %}\n'
    "                    {{- tool_call.arguments }}\n                {%- else %}\n"
    "                    {{- tool_call.arguments | tojson }}\n                {%- endif %}\n"
    "                {{- '}\\n</tool_call>' }}\n            {%- endfor %}\n        {%- endif %}\n"
    "        {{- '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n{%- endif %}",
    "phi": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' "
    "+ message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] "
    "+ '<|end|>\n'}}{% elif message['role'] == 'assistant' and message['content'] %}{{'<|assistant|>\n' "
    "+ message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "grounded": "{%- macro doc(d) %}{{ d['title'] ~ ': ' ~ d['text'] }}{% endmacro %}"
    "{% for d in documents or [] %}{{ doc(d) }}\n{% endfor %}{% for m in messages if m.content %}"
    "{% if loop.index > 6 %}{% break %}{% endif %}{{ m.role | upper }}: {{ m.content | replace('\n', ' ') }}"
    "{{ '%s|%5.2f' | format(m.role, 1.5) }}{{ dict(a=m.role).items() | list }}\n{% endfor %}",
    "json": "{{ messages | tojson(indent=2, separators=(',', ' : '), sort_keys=true) }}"
    "{{ tools | tojson(ensure_ascii=true) }}{{ [1, 2] | map('string') | join('-') }}",
    "generation": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[assistant] {% generation %}"
    "{{ m.content or '' }}{% for t in m.tool_calls or [] %}<{{ t.function.name }}>{% endfor %}{{ eos_token }}"
    "{% endgeneration %}\n{% else %}[{{ m.role }}] {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}",
    "generation of a header": "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%}"
    "<|assistant|>{{ m.content }}{{ eos_token }}{%- endgeneration -%}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}"
    "{% endfor %}",
}


def theirs(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


# What ours is held against: releases before it hand other text to a template with tools or thoughts. Ours renders by itself.
like_the_newest = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23), reason="apply_chat_template rendered otherwise"
)


@like_the_newest
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_apply_chat_template(
    tiny_llama: Path, name: str, talk: str, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Fixed:
            return cls(2024, 7, 26)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)
    messages, tools, documents = TALKS[talk]

    def of_transformers() -> str:
        return str(
            theirs(tiny_llama).apply_chat_template(
                messages,
                tools=tools,
                documents=documents,
                chat_template=TEMPLATES[name],
                tokenize=False,
                add_generation_prompt=begins,
            )
        )

    def ours() -> str:
        chat = ChatTemplate(TEMPLATES[name], TOKENS | {"pad_token": "<pad>"})
        return chat.rendered(messages, add_generation_prompt=begins, tools=tools, documents=documents).text

    expected = problem = ""
    try:
        expected = of_transformers()
    except Exception as error:  # what a template raises
        problem = str(error)
    if not problem:
        assert ours() == expected
        return
    with pytest.raises(DataProblem, match=r"refuses these messages") as refused:
        ours()
    assert problem in str(refused.value)


def sample_of(tiny_llama: Path, source: str, told: ChatExample) -> Sample:
    renderer = Renderer(TextTemplate("{prompt}"), TextTemplate("{completion}"), ChatTemplate(source, TOKENS))
    made = renderer.sample(told, SampleTokenizer(tiny_llama / "tokenizer.json", 2))
    assert isinstance(made, Sample)
    return made


@like_the_newest
@pytest.mark.parametrize("talk", ["plain", "turns", "system", "tools"])
@pytest.mark.parametrize("name", ["generation", "generation of a header"])
def test_what_is_supervised_is_what_the_template_marks(tiny_llama: Path, name: str, talk: str) -> None:
    messages, tools, _ = TALKS[talk]
    found = theirs(tiny_llama).apply_chat_template(
        messages,
        tools=tools,
        chat_template=TEMPLATES[name],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask, ids = found["assistant_masks"], found["input_ids"]
    end = len(mask) - mask[::-1].index(1)
    start = max(at for at in range(end) if mask[at] and (at == 0 or not mask[at - 1]))  # of the last answer
    made = sample_of(tiny_llama, TEMPLATES[name], ChatExample(messages, tools))
    assert list(made.ids) == ids[:end]
    assert made.start == start
    assert made.ids[-1] == 2


@pytest.mark.parametrize(
    ("end", "tail"), [("</s>", 1), ("</s>\n", 1), ("\n", 2), ("", 1), ("</s></s>\n\n", 1), ("</s> and more", 10)]
)
def test_a_conversation_ends_in_one_end_token(tiny_llama: Path, end: str, tail: int) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + end + "{% endfor %}"
    answer = {"role": "assistant", "content": "</s> is an end"}
    made = sample_of(tiny_llama, source, ChatExample([ASK, answer]))
    assert made.ids[-1] == 2
    assert made.ids[-2] != 2
    tokenizer = SampleTokenizer(tiny_llama / "tokenizer.json", 2)
    assert tokenizer.decode(made.ids[:-tail]).endswith("is an end")


def test_a_template_is_read_by_name_and_compiled_when_it_is_used(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    config.write_text("\ufeff" + json.dumps({"chat_template": named}), encoding="utf-8")
    chat = ChatTemplate.read({config.name: config})
    assert chat is not None
    assert chat.rendered([ASK], add_generation_prompt=True).text == "plain"
    assert chat.rendered([ASK], add_generation_prompt=True, tools=[{"name": "weather"}]).text == "weather"
    config.write_text(json.dumps({"chat_template": [{"name": "chat", "template": "x"}]}))
    chat = ChatTemplate.read({config.name: config})  # a run that has no conversations needs none
    assert chat is not None
    with pytest.raises(Exception, match="has the chat templates chat, but none named default"):
        chat.rendered([ASK], add_generation_prompt=True)
    config.write_text(json.dumps({"chat_template": "{% for %}"}))
    chat = ChatTemplate.read({config.name: config})
    assert chat is not None
    with pytest.raises(Exception, match="cannot be read"):
        chat.rendered([ASK], add_generation_prompt=True)


def test_the_date_is_that_of_the_standard_library() -> None:
    day = datetime.datetime(2024, 7, 26)
    assert {letter: day.strftime(f"%{letter}") for letter in TODAY} == TODAY
