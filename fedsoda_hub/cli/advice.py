"""Say what a run's settings will do that its owner may not expect. Nothing here refuses."""

from __future__ import annotations

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.errors import FedSODAError
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES
from fedsoda_edge.protocol.template import DEFAULT_COMPLETION, DEFAULT_PROMPT
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.run import RunSettings

_TALK = ({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."})


def advice_on(settings: RunSettings) -> list[str]:
    """List what the owner of a run should know, a sentence each."""
    return [sentence for sentence in (_of_prompt(settings), _of_text(settings), _of_chat(settings)) if sentence]


def _of_prompt(settings: RunSettings) -> str:
    advice = settings.prompt.advice
    return f"[task] prompt: {advice}" if advice else ""


def _of_text(settings: RunSettings) -> str:
    """Say what unlabelled rows of users are worth, where layers are removed and healed without any (results.md 5)."""
    if not settings.align.heal or settings.method.emulator == "full" or settings.like_task is not None:
        return ""
    return (
        "the full LLM writes the rows on which layers are healed; a few hundred unlabelled rows of users leave its answers far "
        "less one-sided: name a file of them as [public] like_task"
    )


def _of_chat(settings: RunSettings) -> str:
    """Say that conversations of edges would be refused, where the run takes some."""
    if (settings.task.prompt, settings.task.completion) != (DEFAULT_PROMPT, DEFAULT_COMPLETION):
        return ""
    bundle, model = RunDirectory(settings.run_dir).bundle, settings.directory / settings.model
    directory = bundle if bundle.is_dir() else model
    files = {name: directory / name for name in TOKENIZER_FILES if (directory / name).is_file()}
    try:
        chat = ChatTemplate.read(files)
        if chat is not None:
            for begins in (False, True):
                chat.rendered(_TALK[: 1 if begins else 2], add_generation_prompt=begins)
    except FedSODAError as error:
        return f"rows that are conversations will be refused: {error}"
    return ""
