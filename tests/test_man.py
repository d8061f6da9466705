"""The man pages: one for each command, with all its options, that man itself finds nothing wrong with."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from man import PROGRAMS, command_of, each, page, pages, text_of

MANDOC = shutil.which("mandoc")


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return pages()


def test_each_program_and_command_has_a_page_with_all_its_options(written: dict[str, str]) -> None:
    wanted = {}
    for program in PROGRAMS:
        wanted[f"{program}.1"] = command_of(program)
        wanted |= {f"{program} {path}.1".replace(" ", "-"): one for path, one in each(command_of(program))}
    assert written.keys() == wanted.keys()
    for name, command in wanted.items():
        plain = written[name].replace("\\-", "-")
        assert all(option in plain for one in command.params for option in one.opts if option.startswith("-")), name
        assert ".SH NAME" in plain
        example = re.search(r"Example: (.*)", command.epilog or "")
        assert example is None or example[1] in plain, name


def test_words_are_no_macros_and_no_escapes() -> None:
    assert text_of(".so /etc/passwd") == "\\&.so /etc/passwd"
    assert text_of("'br") == "\\&'br"
    assert text_of("a\\b --c") == "a\\eb \\-\\-c"
    assert text_of(r"\[align] heal") == "[align] heal"


def test_the_date_is_that_of_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert '1 "1970-01-02" "fedsoda ' in pages()["fedsoda-edge.1"].split("\n")[0]


@pytest.mark.skipif(MANDOC is None, reason="mandoc is not installed")
def test_a_reader_of_man_pages_finds_nothing_wrong(written: dict[str, str], tmp_path: Path) -> None:
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    assert MANDOC is not None
    lint = [MANDOC, "-Tlint", "-Wwarning"]
    said = subprocess.run([*lint, *sorted(tmp_path.iterdir())], capture_output=True, text=True, check=False)
    assert said.stdout + said.stderr == ""
    (tmp_path / "wrong.1").write_text(page("x", command_of("fedsoda-edge"), "1970-01-01") + ".SH\n.XYZ\n")
    assert subprocess.run([*lint, tmp_path / "wrong.1"], capture_output=True, check=False).stdout
