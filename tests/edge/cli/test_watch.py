"""`status --watch` and `status --web`: calm on a terminal, lines in a log, a page for this machine alone."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from fedsoda_edge.cli.status_page import FILES, made_page
from fedsoda_edge.cli.watch import drawn, looks, watch
from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.join.glance import Glance, GlanceRow
from fedsoda_edge.network.own_page import OwnPage
from fedsoda_edge.ports import console
from tests.conftest import ROOT

FACTS = (
    GlanceRow(about="run", said="triage, as clinic-7"),
    GlanceRow(about="round", said="3 of 20, step 40 of 100, loss 0.520"),
    GlanceRow(about="sent", said="8 updates, 1.20 MiB; 52 small messages; no text, last at 14:03"),
)  # fmt: skip
BUSY = Glance(headline="training", tone="busy", running=True, progress=0.4, facts=FACTS)
OVER = Glance(headline="the run is over", tone="over", running=False, progress=None, facts=FACTS)
HOSTILE = Glance(
    headline="[red]x[/red]\x1b[2J", tone="trouble", running=True, progress=None,
    facts=(GlanceRow(about="run", said="<script>alert(1)</script>[bold]b[/bold]\x1b]0;t\x07"),),
)  # fmt: skip


def text_of(now: Glance, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(drawn(now, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80])
def test_all_facts_fit_the_terminal(width: int) -> None:
    lines = text_of(BUSY, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 12
    joined = " ".join(" ".join(lines).split())
    for wanted in (
        "* training",
        "40%",
        "triage, as clinic-7",
        "step 40 of 100",
        "8 updates",
        "Ctrl+C ends this view, not the join",
    ):
        assert wanted in joined


def test_what_others_wrote_is_neither_markup_nor_an_escape() -> None:
    shown = text_of(HOSTILE, 80)
    assert "[red]x[/red]" in shown
    assert "[bold]b[/bold]" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_it_looks_until_the_join_ends() -> None:
    coming = iter([BUSY, BUSY, OVER, BUSY])
    assert list(looks(lambda: next(coming), lambda _: None)) == [BUSY, BUSY, OVER]


def test_in_a_log_a_line_is_written_where_something_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedsoda_edge.cli.watch.LOOK_SECONDS", 0)
    stepped = msgspec.structs.replace(BUSY, facts=(FACTS[0], GlanceRow(about="round", said="3 of 20, step 41 of 100")))
    coming = iter([BUSY, BUSY, stepped, OVER])
    watch(lambda: next(coming))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "training: round 3 of 20, step 40 of 100, loss 0.520",
        "the run is over: round 3 of 20, step 40 of 100, loss 0.520",
    ]
    assert lines[2] == "run: triage, as clinic-7"
    assert len(lines) == 5


# --- on a real terminal ----------------------------------------------------------------------------------------------

JOINING = """
import sys, time
from pathlib import Path
from fedsoda_edge.join.home import Home
home = Home(Path(sys.argv[1])); home.make_directories(); home.lock()
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def joining(home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the home as a join does, with a status that says so, until its stdin closes."""
    held = subprocess.Popen(
        [sys.executable, "-c", JOINING, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == "ready\n"
        status = {
            "state": "training",
            "pid": held.pid,
            "hub": "http://h",
            "run": "triage",
            "edge": "e",
            "round": 2,
            "rounds": 9,
        }
        (home / "status.json").write_text(json.dumps({**status, "step": 3, "steps": 10}))
        yield held
    finally:
        held.kill()
        held.communicate()


def read_until(descriptor: int, wanted: bytes, seconds: float = 20.0) -> bytes:
    seen, until = b"", time.monotonic() + seconds
    while wanted not in seen and time.monotonic() < until:
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                seen += os.read(descriptor, 65536)
            except OSError:  # the other side is gone
                break
    assert wanted in seen, seen
    return seen


def test_on_a_terminal_it_is_drawn_once_for_each_change_and_ctrl_c_ends_it_with_0(tmp_path: Path) -> None:
    with joining(tmp_path):
        master, slave = pty.openpty()
        shown = subprocess.Popen(
            [sys.executable, "-m", "fedsoda_edge", "status", "--watch"],
            stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            env={**os.environ, "FEDSODA_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )  # fmt: skip
        os.close(slave)
        try:
            first = read_until(master, b"not the join")
            assert b"training" in first
            time.sleep(1.5)
            assert not select.select([master], [], [], 0)[0], "nothing changed, and yet it was drawn"
            os.kill(shown.pid, signal.SIGINT)
            last = read_until(master, b"\x1b[?25h")  # the cursor is back
            assert shown.wait(10) == 0
            assert b"Traceback" not in last
        finally:
            shown.kill()
            shown.wait()
            os.close(master)


def test_it_ends_when_the_join_does(tmp_path: Path) -> None:
    with joining(tmp_path) as held:
        shown = subprocess.Popen(
            [sys.executable, "-m", "fedsoda_edge", "status", "--watch"], stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "FEDSODA_HOME": str(tmp_path)},
        )  # fmt: skip
        assert shown.stderr is not None
        assert shown.stderr.readline() == "training: round 2 of 9, step 3 of 10\n"
        held.kill()
        _, err = shown.communicate(timeout=20)
    assert shown.returncode == 0
    assert (
        err.splitlines()[0]
        == "ended unexpectedly: it was killed, or the machine ended it for lack of memory: round 2 of 9"
    )


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def page() -> Iterator[OwnPage]:
    made = made_page(lambda: HOSTILE, 0)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def ask(page: OwnPage, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=5)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def test_the_page_and_its_facts_are_there_with_a_strict_policy(page: OwnPage) -> None:
    for path, (name, kind) in FILES.items():
        status, headers, body = ask(page, path)
        assert (status, headers["content-type"]) == (200, kind)
        assert body == (ROOT / "fedsoda_edge" / "cli" / "page" / name).read_bytes()
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    status, headers, body = ask(page, "/facts.json")
    assert headers["content-type"] == "application/json"
    assert "access-control-allow-origin" not in headers
    assert msgspec.json.decode(body, type=Glance) == HOSTILE
    assert ask(page, "/facts.json", "HEAD")[2] == b""


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", ""]
)
def test_another_name_for_this_machine_is_refused(page: OwnPage, host: str) -> None:
    """A site whose name was bound to 127.0.0.1 after it loaded (DNS rebinding) sends its own Host."""
    status, _, body = ask(page, "/facts.json", Host=host)
    assert status in (400, 403)
    assert b"script" not in body


def test_localhost_is_this_machine(page: OwnPage) -> None:
    assert ask(page, "/", Host=f"LocalHost:{page.server_port}")[0] == 200


@pytest.mark.parametrize("path", ["/nothing", "/../../etc/passwd", "/page.css/../../x", "//evil", "/?a=b", "*"])
def test_there_is_nothing_else(page: OwnPage, path: str) -> None:
    assert ask(page, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_changed(page: OwnPage, method: str) -> None:
    assert ask(page, "/", method)[0] == 501


def test_only_this_machine_is_listened_to(page: OwnPage) -> None:
    assert page.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_said(page: OwnPage) -> None:
    with pytest.raises(UsageProblem, match="choose another with --port"):
        made_page(lambda: OVER, page.server_port)


def test_the_page_holds_no_inline_script_style_or_foreign_address() -> None:
    folder = ROOT / "fedsoda_edge" / "cli" / "page"
    html = (folder / "index.html").read_text()
    assert not re.search(r"\son\w+=|style=|javascript:", html)
    assert re.findall(r"<script[^>]*>", html) == ['<script src="/page.js" defer>']
    script = (folder / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    for file in folder.iterdir():
        assert not re.search(r"https?://", file.read_text()), file


@pytest.mark.parametrize("options", [["--watch", "--web"], ["--watch", "--json"], ["--web", "--json"]])
def test_one_way_to_show_it_is_chosen(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsoda_edge.cli.commands import app

    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fedsoda-edge", "status", *options])
    with pytest.raises(SystemExit) as ended:
        console.run(app)
    assert ended.value.code == 2
