"""What the README and docs/ say is so: links and citations resolve, code and commands run, settings and rooms are there."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedsoda_edge", "fedsoda_hub")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MAX_README_BYTES = 9_000
HUB_OF_THE_README = 'Edge("https://hub.example.org", token_file="clinic-7.token")'


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


# --- the README is short, links and anchors resolve --------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= MAX_README_BYTES


def named_anchors(text: str) -> list[str]:
    """Anchors that are written out, `<a id="m3-sgp"></a>`."""
    return re.findall(r'<a id="([\w-]+)"></a>', prose(text))


def anchors(text: str) -> set[str]:
    """Those and the ones that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return {*named_anchors(text), *made}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):  # another place's
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            lost.append(target)
    assert not lost, f"{page.name} links to what is not there: {lost}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_anchor_is_written_once(page: Path) -> None:
    twice = [name for name, count in Counter(named_anchors(page.read_text(encoding="utf-8"))).items() if count > 1]
    assert not twice


# --- what the code cites -------------------------------------------------------------------------------------------


def sources() -> Iterator[tuple[str, str]]:
    """(path, text) of all code but this file, which has to spell what it forbids."""
    for room in (*PACKAGES, "tests", "scripts"):
        for path in sorted((ROOT / room).rglob("*")):
            is_text = path.suffix in (".py", ".toml", ".sh") or (path.parent == ROOT / "scripts" and not path.suffix)
            if path.is_file() and is_text and path != Path(__file__).resolve():
                yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_every_citation_in_the_code_has_its_anchor() -> None:
    """`docs/methods.md (m3-sgp)`, or `docs/methods.md (m3-sgp, m5-losses)`; a line may end before the bracket."""
    lost = []
    for path, text in sources():
        for page, _, cited in re.findall(r"\bdocs/(\w+\.md)([\s#]*\(([^)]*)\))?", text):
            known = named_anchors(text_of(f"docs/{page}")) if (ROOT / "docs" / page).exists() else None
            names = [name.strip(" #\n") for name in cited.split(",")] if cited else []
            lost += [
                f"{path}: docs/{page} ({name})" for name in names or [""] if known is None or name not in ["", *known]
            ]
    assert not lost, "cited and not there:\n" + "\n".join(lost)


def test_the_code_cites_nothing_that_its_readers_do_not_have() -> None:
    found = []
    for path, text in sources():
        for match in re.finditer(r"(?<![\w/-])(method|federation|contract|facts|field|house|style)\.md\b", text):
            found.append(f"{path}:{text[: match.start()].count(chr(10)) + 1}: {match[0]}")
    assert not found, "cite docs/ instead:\n" + "\n".join(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """`model/streaming.py` lies in one of the packages, `tests/test_x.py` and `scripts/x` where they say."""
    text = prose(page.read_text(encoding="utf-8"))
    named = {*re.findall(r"`((?:\w+/)+\w+\.py)`", text), *re.findall(r"`(scripts/\w+)[ `]", text)}
    places = (ROOT, *(ROOT / package for package in PACKAGES))
    gone = sorted(name for name in named if not any((place / name).exists() for place in places))
    assert not gone, f"{page.name} names files that are not there: {gone}"


# --- code --------------------------------------------------------------------------------------------------------------


def python_blocks() -> list[tuple[str, str]]:
    return [(page, block) for page in ("README.md", "docs/guide.md") for block in blocks(text_of(page), "python")]


def test_the_scripts_use_what_the_sdk_has() -> None:
    assert {page for page, _ in python_blocks()} == {"README.md", "docs/guide.md"}
    for page, script in python_blocks():
        compile(script, page, "exec")
        for module, names in re.findall(r"^from ([\w.]+) import (.+)$", script, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{page}: {module} has no {name}"
    [script] = blocks(text_of("README.md"), "python")
    assert HUB_OF_THE_README in script


@pytest.mark.slow
@pytest.mark.parametrize(("page", "script"), python_blocks(), ids=[page for page, _ in python_blocks()])
def test_a_script_runs_against_a_scripted_hub(
    page: str, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedsoda_edge.testing import ScriptedHub

    rows = [{"prompt": f"visit {i}", "completion": "home" if i % 2 else "ward"} for i in range(8)]
    (tmp_path / "visits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"hub": ScriptedHub(rounds=2)}
    exec(compile(script.replace(HUB_OF_THE_README, "Edge(hub)"), page, "exec"), names)
    hub = names["hub"]
    assert [start.round for start in hub.updates] == list(range(1, hub.rounds + 1))
    assert {start.num_examples for start in hub.updates} == {8}
    lines = capsys.readouterr().out.splitlines()
    if page == "README.md":
        assert [line.split()[:2] for line in lines] == [["1", "8"], ["2", "8"]]
    else:
        assert len(lines) == 1


# --- settings ----------------------------------------------------------------------------------------------------------


def read_run(path: Path) -> Any:
    from fedsoda_hub.settings.run import read_settings

    return read_settings(path)


def read_comparison(path: Path) -> Any:
    from fedsoda_hub.compare.settings import read_comparison

    return read_comparison(path)


def tables_of_settings() -> dict[str, type]:
    """{"": the whole RUN.toml, "method": ..., "compare": ...}: structs whose fields are keys."""
    from msgspec import Struct
    from msgspec.structs import fields

    from fedsoda_hub.compare.settings import Compare
    from fedsoda_hub.settings.run import RunSettings

    tables = {field.name: field.type for field in fields(RunSettings)}
    found = {name: kind for name, kind in tables.items() if isinstance(kind, type) and issubclass(kind, Struct)}
    return {"": RunSettings, **found, "compare": Compare}


def toml_blocks() -> list[Any]:
    """All of the README and the guide, by page and their first words."""
    found = [(page, block) for page in ("README.md", "docs/guide.md") for block in blocks(text_of(page), "toml")]
    return [pytest.param(block, id=f"{page}: {block.splitlines()[0]}") for page, block in found]


@pytest.mark.parametrize("block", toml_blocks())
def test_a_settings_file_is_accepted(block: str, tmp_path: Path) -> None:
    raw = tomllib.loads(block)
    path = tmp_path / "settings.toml"
    path.write_text(block, encoding="utf-8")
    for name in re.findall(r'"([\w-]+\.(?:jsonl|txt))"', block):
        (tmp_path / name).touch()
    if "compare" in raw:
        comparison = read_comparison(path)
        assert set(comparison.settings) == set(raw["variants"])
        assert comparison.settings["unaligned"].align.steps == 0
    else:
        settings = read_run(path)
        assert settings.name == raw["name"]
        assert settings.method.groups == raw["method"]["groups"]


def test_the_run_of_the_readme_has_twelve_lines() -> None:
    [block] = blocks(text_of("README.md"), "toml")
    assert len(block.splitlines()) == 12


def tables_of_the_guide() -> dict[str, dict[str, str]]:
    """{table: {key: its default as it is written}} of the guide's tables of settings."""
    found: dict[str, dict[str, str]] = {}
    name = None
    for line in text_of("docs/guide.md").splitlines():
        if heading := re.match(r"### 2\.\d+ (?:\[(\w+)\]|(At the top))$", line):
            name = heading[1] or ""
        elif line.startswith("| key of [compare]"):
            name = "compare"
        elif line.startswith("#"):
            name = None
        elif name is not None and (row := re.match(r"\| `(\w+)` \| (.+?) \| ", line)):
            found.setdefault(name, {})[row[1]] = row[2]
    return found


def test_the_guide_names_every_key_with_its_default() -> None:
    from msgspec import NODEFAULT, to_builtins
    from msgspec.structs import fields

    described, tables = tables_of_the_guide(), tables_of_settings()
    assert set(described) == set(tables)
    for name, kind in tables.items():
        keys = {field.name: field for field in fields(kind) if field.name not in (*tables, "path")}
        assert set(described[name]) == set(keys), f"[{name}]"
        for key, default in described[name].items():
            field = keys[key]
            where = f"[{name}] {key}"
            if field.required:
                assert default == "required", where
            elif default.startswith("`"):
                real = field.default if field.default is not NODEFAULT else field.default_factory()
                assert tomllib.loads(f"value = {default.strip('`')}")["value"] == to_builtins(real), where
            else:  # in words
                assert field.default is None, where


# --- commands ----------------------------------------------------------------------------------------------------------


@functools.cache
def program(name: str) -> Any:
    """The command that pyproject.toml installs under this name."""
    module, _, function = tomllib.loads(text_of("pyproject.toml"))["project"]["scripts"][name].partition(":")
    main = getattr(importlib.import_module(module), function)
    return typer.main.get_command(sys.modules[main.__module__].app)


def find(words: list[str]) -> tuple[Any, list[str]]:
    """(the command, what follows its name) of a command line; a KeyError where there is no such command."""
    command, rest = program(words[0]), words[1:]
    while hasattr(command, "commands") and rest:
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def command_lines() -> list[str]:
    """Those of fenced blocks, without prompt, comment and redirection."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"), r"\w*")
        for line in block.splitlines()
    ]
    found = (re.match(r"(?:\$ )?(fedsoda-(?:hub|edge) [^#>]*)", line) for line in lines)
    return sorted({match[1].strip() for match in found if match})


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_parses(line: str) -> None:
    command, rest = find(shlex.split(line))
    command.make_context(line, rest)  # parses, and does nothing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_sentence_exist(page: Path) -> None:
    for line in re.findall(r"`(fedsoda-(?:hub|edge) [^`]+)`", prose(page.read_text(encoding="utf-8"))):
        command, rest = find(line.split())
        known = {option for parameter in getattr(command, "params", ()) for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_the_guide_names_every_command() -> None:
    def below(name: str, command: Any) -> Iterator[str]:
        if not hasattr(command, "commands"):
            yield name
        for word, inner in getattr(command, "commands", {}).items():
            yield from below(f"{name} {word}", inner)

    every = {path for name in ("fedsoda-edge", "fedsoda-hub") for path in below(name, program(name))}
    named = set(re.findall(r"^\| `(fedsoda-[^`]+)` \|", text_of("docs/guide.md"), re.MULTILINE))
    assert named == every


def test_the_guide_and_the_readme_show_the_scripts() -> None:
    shown = "".join(blocks(text_of("README.md"), "console"))
    for script in ("scripts/demo", "scripts/test"):
        assert f"$ {script}" in shown
        assert (ROOT / script).exists()


# --- the house ---------------------------------------------------------------------------------------------------------


def tree() -> dict[str, set[str]]:
    """{package: what the README's tree names in it}, folders with their slash."""
    [block] = [block for block in blocks(text_of("README.md"), "text") if block.startswith("fedsoda_edge/")]
    found: dict[str, set[str]] = {}
    for package, rooms in re.findall(r"^(\w+)/.*\n((?:  .*\n)*)", block, re.MULTILINE):
        found[package] = {line.split()[0] for line in rooms.splitlines()}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_names_the_rooms_that_there_are(package: str) -> None:
    named = {name.rstrip("/") for name in tree()[package] if name.endswith("/")}
    there = {path.name for path in (ROOT / package).iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert named == there
    files = {name for name in tree()[package] if not name.endswith("/")}
    assert {file for file in files if not (ROOT / package / file).exists()} == set()
