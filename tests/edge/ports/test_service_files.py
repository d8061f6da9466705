"""Files by which systems start services: quoted so that systemd, launchd and Windows read back what was meant."""

from __future__ import annotations

import plistlib
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsoda_edge import errors
from fedsoda_edge.errors import UsageProblem, lasting_statuses
from fedsoda_edge.ports.service_files import (
    Service,
    argument,
    assignment,
    command_line,
    environment_lines,
    home_in,
    launch_agent,
    scheduled_task,
    user_unit,
)

HARD = "/da ta/100%h $HOME ${X} \"q\" 'a' \\ é \t\n ; # * ~"
SERVICE = Service(
    "triage",
    ("/opt/a b/fedsoda-edge", "join", "--data", HARD),
    Path("/home/é %h"),
    {"https_proxy": 'http://u:p$w"`\\@proxy'},
    Path("/home/é %h/services/triage.log"),
)


def words_of(line: str) -> list[str]:
    """Read a line as systemd.syntax(7) says: quotes, C escapes, specifiers; no variables."""
    found = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line)
    simple = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
    unescaped = lambda hit: simple.get(hit[1]) or chr(int(hit[1][1:], 16))  # noqa: E731
    words = [re.sub(r'\\(x[0-9a-f]{2}|[ntr"\\])', unescaped, quoted or bare) for quoted, bare in found]
    assert not any(re.search(r"(?<!%)(%%)*%(?!%)", word) for word in words), "a specifier"
    return [word.replace("%%", "%") for word in words]


def arguments_of(line: str) -> list[str]:
    """Read the arguments of ExecStart= as systemd.service(5) says: $$ is a dollar sign, and a single one a variable."""
    words = words_of(line)
    assert not any(re.search(r"(?<!\$)(\$\$)*\$(?!\$)", word) for word in words), "a variable"
    return [word.replace("$$", "$") for word in words]


SAFE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\x7f"), max_size=20)


@given(st.lists(SAFE))
def test_arguments_are_read_back_as_they_were(words: list[str]) -> None:
    assert arguments_of(" ".join(map(argument, words))) == words


@given(SAFE)
def test_a_variable_is_read_back_as_it_was(value: str) -> None:
    assert words_of(assignment("NAME", value)) == [f"NAME={value}"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/opt/fedsoda-edge", '"/opt/fedsoda-edge"'),
        ("/a b/100%/$x/é", '"/a b/100%%/$x/é"'),  # systemd replaces no variable in a program's path
        ("/home/o'brien/edge", '/usr/bin/env "/home/o\'brien/edge"'),  # which it refuses as a program
        ('/a "b" $x/edge', '/usr/bin/env "/a \\"b\\" $$x/edge"'),
    ],
)
def test_a_program_has_the_form_that_systemd_starts(path: str, line: str) -> None:
    assert command_line([path]) == line


def test_a_name_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(UsageProblem, match=r"a\\udcff is not UTF-8"):
        argument("a\udcff")


def test_the_unit_of_a_join_keeps_secrets_elsewhere_and_starts_again_what_may_mend_itself() -> None:
    unit = user_unit(SERVICE)
    lines = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)
    assert arguments_of(lines["ExecStart"]) == list(SERVICE.command)
    assert "proxy" not in unit
    assert lines["RestartPreventExitStatus"] == "1 2 4 5 6"
    assert (lines["Type"], lines["Restart"], lines["KillMode"]) == ("notify", "on-failure", "mixed")
    assert lines["OOMPolicy"] == "continue"  # or a worker that is killed for memory would take the join along
    assert home_in(unit) == SERVICE.home
    assert home_in("[Service]\nExecStart=/bin/true\n") is None


def test_only_errors_that_may_mend_themselves_are_left_out_of_those_that_last() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FedSODAError)]
    again = {kind.__name__ for kind in kinds if kind.exit_status not in lasting_statuses()}
    assert again == {"HubUnreachable", "DiskFull"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_takes_the_unit_of_a_join(tmp_path: Path) -> None:
    program = tmp_path / "a %h $HOME é" / "fedsoda-edge"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    service = Service("t", (str(program), *SERVICE.command[1:]), tmp_path / "home %h", {}, tmp_path / "log")
    unit = tmp_path / "t.service"
    unit.write_text(user_unit(service), encoding="utf-8")
    checked = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=60
    )
    assert checked.returncode == 0, checked.stderr
    assert "t.service" not in checked.stderr


def test_a_file_of_variables_is_read_back_by_a_shell() -> None:
    shown = (
        f'{environment_lines(SERVICE.environment)}printf %s "$https_proxy"\n'  # its quoting is that of systemd's file
    )
    read = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert read.stdout == SERVICE.environment["https_proxy"]


def test_launchd_gets_the_command_and_the_environment() -> None:
    found = plistlib.loads(launch_agent(SERVICE, "org.fedsoda.edge.triage"))
    assert found["ProgramArguments"] == list(SERVICE.command)
    assert found["EnvironmentVariables"] == {**SERVICE.environment, "FEDSODA_HOME": "/home/é %h"}
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert found["Umask"] == 0o077


def test_windows_gets_the_command_without_a_time_limit_also_on_battery() -> None:
    hard = ("C:\\Pro grams\\fedsoda-edge.exe", "join", "--data", 'C:\\my "data" & <more>\\')
    task = ElementTree.fromstring(scheduled_task(Service("t", hard, Path("h"), {}, Path("l")), "HOME\\ann"))
    of = {element.tag.rpartition("}")[2]: element.text for element in task.iter()}
    assert of["Command"] == hard[0]
    assert of["Arguments"] == 'join --data "C:\\my \\"data\\" & <more>\\\\"'
    assert (of["ExecutionTimeLimit"], of["StopIfGoingOnBatteries"], of["UserId"]) == ("PT0S", "false", "HOME\\ann")
