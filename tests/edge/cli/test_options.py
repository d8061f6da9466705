"""An error of the SDK names settings as the SDK does, and the command as its options. Parsing is `test_cli.py`'s matter."""

from __future__ import annotations

import pytest

from fedsoda_edge.cli.options import as_options, named_as_options
from fedsoda_edge.edge import Edge
from fedsoda_edge.errors import DeviceTooSmall, HubUnreachable, UsageProblem


@pytest.mark.parametrize(
    ("in_python", "on_the_command_line"),
    [
        ("device='gpu' is not known", "--device gpu is not known"),
        ("max_ram allows 6 GiB, or train with device='cpu'", "--max-ram allows 6 GiB, or train with --device cpu"),
        ("pause_on='battery' never pauses here", "--pause-on battery never pauses here"),
        ("name its file with token_file (- reads stdin)", "name its file with --token-file (- reads stdin)"),
        ("the pin='sha256/...' to give with it", "the --pin sha256/... to give with it"),
        ("the pin that it prints, or insecure_http where", "the pin that it prints, or --insecure-http where"),
        ("the token file /etc/token_file.txt cannot be read", "the token file /etc/token_file.txt cannot be read"),
        ("this device has 6 GiB of memory free", "this device has 6 GiB of memory free"),
    ],
)
def test_settings_become_options(in_python: str, on_the_command_line: str) -> None:
    assert as_options(in_python) == on_the_command_line


def test_only_sentences_about_this_device_are_rewritten() -> None:
    with pytest.raises(DeviceTooSmall, match=r"^--max-vram allows 1 GiB$"), named_as_options():
        raise DeviceTooSmall("max_vram allows 1 GiB")
    with pytest.raises(HubUnreachable, match=r"^max_vram$"), named_as_options():
        raise HubUnreachable("max_vram", "TCP")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"cache": "fp8"}, "cache='fp8' is not known; choose bf16 or int8"),
        ({"device": "gpu"}, "device='gpu' is not known; choose auto, cpu, cuda or cuda:N"),
    ],
)
def test_python_is_answered_in_pythons_words(setting: dict[str, str], sentence: str) -> None:
    with pytest.raises(UsageProblem) as refused:
        Edge("http://hub.example.org", **setting)  # type: ignore[arg-type]
    assert str(refused.value) == sentence
