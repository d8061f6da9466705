"""What a chat template takes from a conversation is said, one kind a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.chat_losses import LOSSES, Loss, losses
from fedsoda_edge.data.examples import ChatExample
from fedsoda_edge.data.samples import Renderer
from fedsoda_edge.protocol.template import TextTemplate

EACH = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
BEGIN = "{% if add_generation_prompt %}[assistant] {% endif %}"
TOOLS = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
USER, ANSWER = {"role": "user", "content": "where?"}, {"role": "assistant", "content": " left\n"}
WEATHER = [{"type": "function", "function": {"name": "weather"}}]
CALL = {"role": "assistant", "content": "", "tool_calls": WEATHER}


@pytest.mark.parametrize(
    ("source", "messages", "tools", "lost"),
    [
        (EACH + BEGIN, (USER, ANSWER), None, ()),
        (EACH.replace("m.content", "m.content | trim") + BEGIN, (USER, ANSWER), None, ("answer",)),
        (EACH, (USER, ANSWER), None, ("no generation prompt",)),
        ("{% set messages = messages[1:] %}" + EACH + BEGIN, (USER, USER, ANSWER), None, ()),
        (
            "{% set messages = messages[1:] %}" + EACH + BEGIN,
            (USER | {"content": "x"}, USER, ANSWER),
            None,
            ("message",),
        ),
        (EACH + BEGIN, (USER, ANSWER), WEATHER, ("tools",)),
        (TOOLS + EACH + BEGIN, (USER, ANSWER), WEATHER, ()),
        (EACH + BEGIN, (USER, CALL, ANSWER), None, ("calls",)),
        (EACH + "{% if add_generation_prompt %}(now) {% endif %}", (USER, ANSWER), None, ("asked otherwise",)),
    ],
)
def test_what_is_lost_is_told(source: str, messages: Any, tools: Any, lost: tuple[Loss, ...]) -> None:
    renderer = Renderer(TextTemplate("{prompt}"), TextTemplate("{completion}"), ChatTemplate(source, {}))
    assert losses(renderer, ChatExample(messages, tools)) == lost
    assert set(lost) <= set(LOSSES)
