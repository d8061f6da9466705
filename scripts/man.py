"""Write man pages from what the programs' own parsers know: names, options, defaults, variables, examples, exit statuses.

One page for a program and one for each of its commands, in man(7)'s macros. scripts/release puts them into the wheel, so that
`man fedsoda-edge-join` works where the environment's share/man is looked at.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PROGRAMS = ("fedsoda-edge", "fedsoda-hub")


def command_of(program: str) -> Any:
    """Return the parser of a program."""
    import typer.main

    if program == "fedsoda-edge":
        from fedsoda_edge.cli.commands import app
    else:
        from fedsoda_hub.cli.commands import app
    return typer.main.get_command(app)


def text_of(words: object) -> str:
    """Write words as they stand on a page: without markup of rich, each line safe from being taken for a macro."""
    plain = re.sub(r"\\(?=\[)", "", str(words or ""))
    lines = []
    for line in plain.replace("\\", "\\e").replace("-", "\\-").split("\n"):
        lines.append(f"\\&{line.strip()}" if line.strip()[:1] in (".", "'") else line.strip())
    return "\n".join(line for line in lines if line)


def paragraphs(words: object) -> str:
    """Write several paragraphs, which empty lines part."""
    parts = [text_of(part) for part in re.split(r"\n\s*\n", str(words or "").strip())]
    return "\n.PP\n".join(part for part in parts if part)


def release() -> str:
    """Return the version of this tree."""
    found: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return found


def _metavar(parameter: Any) -> str:
    """Return what stands for a value: what the command names it, else the parameter's own name."""
    return str(parameter.metavar or str(parameter.name).upper())


def _sentence(words: str) -> str:
    return f"{words}." if words and words[-1] not in ".!?" else words


def _option(parameter: Any) -> str:
    names = ", ".join(f"\\fB{text_of(name)}\\fR" for name in (*parameter.opts, *parameter.secondary_opts))
    takes = "" if getattr(parameter, "is_flag", False) else f" \\fI{text_of(_metavar(parameter))}\\fR"
    more = []
    if parameter.required:
        more.append("Required.")
    default = parameter.default
    if (
        isinstance(default, str | int | float)
        and not isinstance(default, bool)
        and getattr(parameter, "show_default", True)
    ):
        more.append(f"Default: {text_of(default)}.")
    if parameter.envvar:
        more.append(f"Variable: {text_of(parameter.envvar)}.")
    said = " ".join([_sentence(text_of(parameter.help).replace("\n", " ")), *more]).strip()
    return f".TP\n{names}{takes}\n{said}"


def page(name: str, command: Any, date: str) -> str:
    """Write the page of a command.

    Args:
        name: as it is called: "fedsoda-edge cache list".
    """
    title = name.replace(" ", "-")
    about = text_of((command.help or "").split("\n")[0]).rstrip(".")
    lines = [f'.TH {text_of(title.upper())} 1 "{date}" "fedsoda {release()}" "FedSODA"']
    lines += [".SH NAME", f"{text_of(title)} \\- {about[:1].lower()}{about[1:]}", ".SH SYNOPSIS"]
    options = [one for one in command.params if one.param_type_name == "option"]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    inner = [text_of(_metavar(one)) for one in arguments]
    lines.append(" ".join([f"\\fB{text_of(name)}\\fR", "[\\fIoptions\\fR]", *(f"\\fI{one}\\fR" for one in inner)]))
    if hasattr(command, "commands"):
        lines[-1] += " \\fIcommand\\fR"
    lines += [".SH DESCRIPTION", paragraphs(command.help) or about]
    if hasattr(command, "commands"):
        lines.append(".SH COMMANDS")
        for path, one in each(command):
            said = text_of((one.help or "").split("\n")[0])
            lines.append(
                f".TP\n\\fB{text_of(path)}\\fR\n{said} See \\fB{text_of(f'{title} {path}'.replace(' ', '-'))}\\fR(1)."
            )
    if arguments:
        lines.append(".SH ARGUMENTS")
        for one in arguments:
            variable = f" Variable: {text_of(one.envvar)}." if one.envvar else ""
            help_of = text_of(getattr(one, "help", "") or "").replace("\n", " ")
            lines.append(f".TP\n\\fI{text_of(_metavar(one))}\\fR\n{_sentence(help_of)}{variable}".rstrip())
    if options:
        lines += [".SH OPTIONS", *(_option(one) for one in options)]
    epilog = str(command.epilog or "")
    example = re.match(r"Example: (.*)", epilog)
    if example:
        lines += [".SH EXAMPLES", ".nf", text_of(example[1]), ".fi"]
    status = re.search(r"Exit status: (.*)", epilog, re.DOTALL)
    if status:
        lines += [".SH EXIT STATUS", text_of(status[1])]
    lines += [".SH SEE ALSO", *_others(name)]
    return "\n".join(lines) + "\n"


def _others(name: str) -> list[str]:
    program = name.split(" ")[0]
    others = [one for one in PROGRAMS if one != name] if name in PROGRAMS else [program]
    return [", ".join(f"\\fB{text_of(one)}\\fR(1)" for one in others)]


def each(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command of a group with its words: "cache list"."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from each(command, *path, word)
        else:
            yield " ".join((*path, word)), command


def pages() -> dict[str, str]:
    """Write all pages, by file name. Their date is SOURCE_DATE_EPOCH's, where it is set."""
    now = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%d")
    found = {}
    for program in PROGRAMS:
        command = command_of(program)
        found[f"{program}.1"] = page(program, command, date)
        for path, one in each(command):
            name = f"{program} {path}"
            found[f"{name.replace(' ', '-')}.1"] = page(name, one, date)
    return found


def main() -> int:
    """Write the pages, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write them; share/man/man1 of an environment, say")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
