"""What the owner's program and webhook are told: by real events, over real HTTP, to real programs that misbehave."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedsoda_edge.errors import UsageProblem
from fedsoda_edge.protocol import messages as ms
from fedsoda_hub import events
from fedsoda_hub.federation.jobs import EvaluateResult
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.edges import KnownEdge
from fedsoda_hub.serving import notices
from fedsoda_hub.serving.hook_command import HookCommand
from fedsoda_hub.serving.notify import GONE_SECONDS, MAX_WAITING, WATCH_SECONDS, NotDelivered, Notifier, Outbox, Watched
from fedsoda_hub.serving.ways import ways_of
from fedsoda_hub.serving.webhook import Webhook, read_secret
from tests.hub.hand_clock import HandClock
from tests.hub.serving.test_daemon import joined, serving, until, update, write_run
from tests.hub.serving.test_metrics import accepted, closed, opened
from tests.schema import ROOT

SCHEMAS = ROOT / "tests" / "schemas"
SECRET = b"a secret of 24 characters"
TRIAL = notices.TrialNotice(id="1", at=12.5, run="triage", run_id="r", text="a trial")
BODY = msgspec.json.encode(TRIAL)


# --- a server --------------------------------------------------------------------------------------------------------


class Receiver:
    """A real HTTP server. answers: what it answers, one a request, the last again; a number of seconds: it hangs so long."""

    def __init__(self, *answers: int | float | tuple[int, str, str]) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.at: list[float] = []
        receiver, self.over = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.at.append(time.monotonic())
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
                answer = answers[min(len(receiver.requests), len(answers)) - 1]
                if isinstance(answer, float):
                    receiver.over.wait(answer)
                    return
                status, name, value = answer if isinstance(answer, tuple) else (answer, "X", "y")
                self.send_response(status)
                self.send_header(name, value)
                self.end_headers()
                if status == 200:
                    self.wfile.write(b"x" * 100)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiving() -> Iterator[Any]:
    made: list[Receiver] = []

    def start(*answers: Any) -> Receiver:
        made.append(Receiver(*answers))
        return made[-1]

    yield start
    for one in made:
        one.close()


def webhook(receiver: Receiver, seconds: float = 5.0, pauses: tuple[float, ...] = (0.05, 0.1)) -> Webhook:
    return Webhook(receiver.url, SECRET, lambda: 1_700_000_000.9, seconds, pauses)


def deliver(way: Webhook | HookCommand) -> str:
    """Why it was not delivered; "": it was."""
    try:
        asyncio.run(way.deliver(TRIAL, BODY))
    except NotDelivered as error:
        return str(error)
    return ""


def test_what_is_posted_is_signed_over_time_and_body(receiving: Any) -> None:
    receiver = receiving(200)
    assert deliver(webhook(receiver)) == ""
    [(headers, body)] = receiver.requests
    assert json.loads(body) == {
        "event": "trial", "schema": 1, "id": "1", "at": 12.5, "run": "triage", "run_id": "r", "text": "a trial",
    }  # fmt: skip
    at, signed = (part.partition("=")[2] for part in headers["fedsoda-signature"].split(","))
    assert at == "1700000000"
    assert signed == hmac.new(SECRET, f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    assert (headers["fedsoda-event"], headers["fedsoda-id"]) == ("trial", "1")
    assert headers["content-type"] == "application/json"


def test_a_server_that_fails_twice_gets_it_at_the_third_try_with_the_same_id(receiving: Any) -> None:
    receiver = receiving(503, 500, 204)
    assert deliver(webhook(receiver)) == ""
    assert len(receiver.requests) == 3
    assert {headers["fedsoda-id"] for headers, _ in receiver.requests} == {"1"}
    assert receiver.at[2] - receiver.at[1] >= 0.05  # at least half of the second pause


def test_a_server_that_always_fails_is_tried_no_further(receiving: Any) -> None:
    receiver = receiving(502)
    assert deliver(webhook(receiver)) == "the server answers 502, at the last of 3 tries"
    assert len(receiver.requests) == 3


def test_a_server_that_hangs_is_given_up_in_time_and_tried_again(receiving: Any) -> None:
    receiver = receiving(60.0, 200)
    began = time.monotonic()
    assert deliver(webhook(receiver, seconds=1.0)) == ""
    assert time.monotonic() - began < 30
    assert len(receiver.requests) >= 2


def test_a_server_that_says_when_to_come_again_is_heeded(receiving: Any) -> None:
    receiver = receiving((429, "Retry-After", "1"), 200)
    assert deliver(webhook(receiver)) == ""
    assert receiver.at[1] - receiver.at[0] >= 1


@pytest.mark.parametrize("value", ["-5", "soon", "Wed, 21 Oct 2065 07:28:00 GMT", "9" * 40, "1e9", "\u0663"])
def test_a_strange_retry_after_does_not_stop_the_queue(receiving: Any, value: str) -> None:
    receiver = receiving((503, "Retry-After", value.encode().decode("latin-1")), 200)
    assert deliver(webhook(receiver)) == ""


@pytest.mark.parametrize(("status", "said"), [(400, "answers 400"), (401, "answers 401"), (404, "answers 404")])
def test_a_refusal_is_not_tried_again(receiving: Any, status: int, said: str) -> None:
    receiver = receiving(status)
    assert said in deliver(webhook(receiver))
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(receiving: Any, status: int) -> None:
    other = receiving(200)
    receiver = receiving((status, "Location", other.url))
    assert "redirects" in deliver(webhook(receiver))
    assert other.requests == []


def test_after_410_nothing_more_is_sent(receiving: Any) -> None:
    receiver = receiving(410)
    counted: list[str] = []

    async def talk() -> None:
        outbox = Outbox(webhook(receiver), lambda _, outcome: counted.append(outcome))
        running = asyncio.create_task(outbox.run())
        for _ in range(3):
            outbox.put(TRIAL)
        await outbox.emptied()
        outbox.put(TRIAL)
        await running
        assert outbox.num_waiting == 0

    asyncio.run(talk())
    assert counted == ["failed"]
    assert len(receiver.requests) == 1


def test_who_is_not_there_is_told_as_such() -> None:
    way = Webhook("http://127.0.0.1:9/hook", SECRET, time.time, 5.0, (0.01,))
    assert "at the last of 2 tries" in deliver(way)


def test_a_proxy_of_the_environment_is_used(receiving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy gets the request; the host behind it exists nowhere."""
    proxy = receiving(200)
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/hook"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    way = Webhook("http://hooks.invalid/x", SECRET, time.time, 5.0, ())
    assert deliver(way) == ""
    assert proxy.requests[0][0]["host"] == "hooks.invalid"


def test_what_is_on_this_machine_is_reached_without_the_proxy(receiving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = receiving(200)
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert deliver(webhook(receiver)) == ""


# --- a program -------------------------------------------------------------------------------------------------------


def command(directory: Path, code: str, seconds: float = 10.0) -> HookCommand:
    return HookCommand((sys.executable, "-c", code), directory, seconds)


def test_a_program_gets_the_json_on_stdin_in_the_directory_of_the_run(tmp_path: Path) -> None:
    code = "import sys, os; open('got', 'w').write(sys.stdin.read() + os.environ['FEDSODA_EVENT'])"
    assert deliver(command(tmp_path, code)) == ""
    assert (tmp_path / "got").read_text() == BODY.decode() + "\ntrial"


def test_a_program_that_does_not_read_and_floods_its_outputs_is_no_matter(tmp_path: Path) -> None:
    code = "import os\nfor _ in range(200): os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)"
    assert deliver(command(tmp_path, code)) == ""


def test_a_program_that_closes_its_stdin_at_once_is_no_matter(tmp_path: Path) -> None:
    way = command(tmp_path, "import os; os.close(0)")
    asyncio.run(way.deliver(TRIAL, b"x" * 1_000_000))


def test_a_program_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    said = deliver(command(tmp_path, "import sys; sys.exit('no such channel')"))
    assert said.endswith("ended with status 1: no such channel")


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "cannot be started" in deliver(HookCommand(("no-such-program-here",), tmp_path, 5.0))


def test_a_program_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    way = HookCommand(("sh", "-c", "(sleep 1.5; touch late) & touch started; sleep 60"), tmp_path, 0.8)
    assert "did not end within 0.8 s" in deliver(way)
    assert (tmp_path / "started").exists()
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()  # what the program's own child would have made


# --- what is told when -----------------------------------------------------------------------------------------------


class Heard:
    """A way that keeps what it gets."""

    name = "command"

    def __init__(self) -> None:
        self.notices: list[notices.HubNotice] = []
        self.may_go = asyncio.Event()
        self.may_go.set()

    async def deliver(self, notice: notices.HubNotice, body: bytes) -> None:
        await self.may_go.wait()
        self.notices.append(notice)

    def kinds(self) -> list[str]:
        return [one.kind for one in self.notices]


class Clock(HandClock):
    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


ALL = ["run_over", "below_quorum", "edge_gone", "disk_low", "compute_failed", "round_closed", "evaluated"]


class Told:
    """A notifier without a hub."""

    def __init__(self, directory: Path, state: LedgerState | None = None, **notify: Any) -> None:
        self.state = state or LedgerState(run_id="r", phase="idle")
        self.clock, self.way = Clock(), Heard()
        self.connected: set[ms.EdgeId] = set()
        self.known: list[KnownEdge] = []
        settings = write_run(directory, notify={"events": ALL, "disk_low_bytes": 0, **notify})
        watched = Watched(directory, self.state, lambda: 2, lambda: self.connected, lambda: self.known)
        self.counted: list[str] = []
        self.notifier = Notifier(settings, watched, self.clock, lambda _, outcome: self.counted.append(outcome))

    async def __aenter__(self) -> Told:
        self.notifier.open([self.way])
        self.running = asyncio.create_task(self.notifier.run())
        await until(lambda: self.clock.sleeps(WATCH_SECONDS))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.running.cancel()
        await asyncio.wait([self.running])
        await self.notifier.close()

    async def look(self) -> None:
        """Let the watch look once more."""
        self.clock.wake(WATCH_SECONDS)
        await asyncio.sleep(0.02)
        await until(lambda: self.clock.sleeps(WATCH_SECONDS))
        await asyncio.sleep(0)


def test_rounds_evaluations_failures_and_the_end_are_told_in_sentences(tmp_path: Path) -> None:
    async def talk() -> list[notices.HubNotice]:
        async with Told(tmp_path) as told:
            told.notifier.hear(opened(1, "a", "b"))
            told.clock.seconds += 30
            told.notifier.hear(accepted(1, "a"))
            told.notifier.hear(closed(1))
            result = EvaluateResult(accuracy={"full": 0.5, "plug_in": 0.75}, loss={"full": None}, num_examples=9)
            told.notifier.hear(events.Evaluated(rounds=9, round=1, result=result))
            told.notifier.hear(events.ComputeFailed(job="aggregate", message="it was killed", details="secret path"))
        return told.way.notices

    [round_, judged, failed] = asyncio.run(talk())
    assert isinstance(round_, notices.RoundNotice)
    assert (round_.round, round_.rounds, round_.loss, round_.seconds, round_.updates) == (1, 9, 0.5, 30.0, 1)
    assert (round_.run, round_.run_id, round_.text) == ("small", "r", "round 1 of 9 closed: loss 0.500")
    assert judged.text == "judged after round 1; accuracy full 50.0%, plug_in 75.0%"
    assert failed.text == "aggregate: it was killed"
    assert "secret path" not in json.dumps([msgspec.to_builtins(one) for one in (round_, judged, failed)])


def test_only_what_the_owner_chose_is_told(tmp_path: Path) -> None:
    async def talk() -> list[str]:
        async with Told(tmp_path, events=["compute_failed"]) as told:
            told.notifier.hear(opened(1, "a"))
            told.notifier.hear(closed(1))
            told.notifier.hear(events.ComputeFailed(job="aggregate", message="x", details=""))
        return told.way.kinds()

    assert asyncio.run(talk()) == ["compute_failed"]


def test_a_loss_that_is_not_a_number_is_null(tmp_path: Path) -> None:
    async def talk() -> bytes:
        async with Told(tmp_path) as told:
            told.notifier.hear(msgspec.structs.replace(closed(1), loss=float("nan")))
        return msgspec.json.encode(told.way.notices[0])

    assert json.loads(asyncio.run(talk()))["loss"] is None


def test_a_deadline_below_quorum_is_told_once_a_round(tmp_path: Path) -> None:
    async def talk() -> list[notices.HubNotice]:
        state = LedgerState(run_id="r", phase="collecting", round=1, invited=3)
        async with Told(tmp_path, state) as told:
            for number in (1, 1, 2):
                told.notifier.hear(events.DeadlinePassed(rounds=9, round=number))
        return told.way.notices

    first, second = asyncio.run(talk())
    assert isinstance(first, notices.QuorumNotice)
    assert (first.accepted, first.needed, first.invited) == (0, 2, 3)
    assert "round 1 has 0 of 2 updates at its deadline" in first.text
    assert "round 2" in second.text


def known(*edges: str, **values: Any) -> list[KnownEdge]:
    return [KnownEdge(edge=ms.EdgeId(edge), revoked=False, used=True) for edge in edges]


def test_edges_that_are_away_for_a_day_are_told_together_and_once(tmp_path: Path) -> None:
    async def talk() -> tuple[list[notices.HubNotice], list[str]]:
        async with Told(tmp_path) as told:
            told.known = [*known("a", "b", "c", "d"), KnownEdge(edge=ms.EdgeId("never"), revoked=False)]
            told.connected = {ms.EdgeId("a")}
            told.notifier.hear(events.EdgeLeft(edge=ms.EdgeId("b"), reason="done"))
            told.clock.seconds = GONE_SECONDS - 1
            await told.look()
            assert told.way.kinds() == []
            told.clock.seconds = GONE_SECONDS
            await told.look()
            await told.look()
            first = list(told.way.notices)
            told.notifier.hear(events.EdgeConnected(edge=ms.EdgeId("c"), software="x"))
            told.notifier.hear(events.EdgeDisconnected(edge=ms.EdgeId("c")))
            told.clock.seconds *= 2
            await told.look()
        return first, told.way.kinds()

    [first], kinds = asyncio.run(talk())
    assert isinstance(first, notices.EdgesGoneNotice)
    assert (first.edges, first.count) == (("c", "d"), 2)
    assert first.text == "c, d were not connected for a day"
    assert kinds == ["edge_gone", "edge_gone"]  # c again


def test_2000_edges_that_are_away_make_one_notice(tmp_path: Path) -> None:
    async def talk() -> list[notices.HubNotice]:
        async with Told(tmp_path) as told:
            told.known = known(*(f"e{number:04}" for number in range(2000)))
            told.clock.seconds = GONE_SECONDS
            await told.look()
        return told.way.notices

    [one] = asyncio.run(talk())
    assert isinstance(one, notices.EdgesGoneNotice)
    assert (len(one.edges), one.count) == (20, 2000)
    assert "and 1980 others" in one.text.replace(",", "")


def test_a_run_that_is_over_misses_nobody(tmp_path: Path) -> None:
    async def talk() -> list[str]:
        async with Told(tmp_path, LedgerState(run_id="r", phase="ended")) as told:
            told.known, told.clock.seconds = known("a"), GONE_SECONDS
            await told.look()
        return told.way.kinds()

    assert asyncio.run(talk()) == []


def test_a_low_disk_is_told_once_until_it_is_better_and_a_full_one_at_once(tmp_path: Path) -> None:
    async def talk(limit: int) -> list[notices.HubNotice]:
        async with Told(tmp_path, disk_low_bytes=limit) as told:
            await told.look()
            await told.look()
            told.notifier.hear(events.OutOfDisk(message="x"))
            await asyncio.sleep(0.05)
            told.notifier.hear(events.OutOfDisk(message="x"))
            await asyncio.sleep(0.05)
        return told.way.notices

    low, full = asyncio.run(talk(2**60))
    assert isinstance(low, notices.DiskNotice)
    assert isinstance(full, notices.DiskNotice)
    assert (low.is_full, full.is_full) == (False, True)
    assert 0 < low.free_bytes < low.limit_bytes == 2**60
    [only] = asyncio.run(talk(0))
    assert "the disk is full" in only.text


def test_a_way_that_hangs_holds_up_nothing_and_its_queue_is_bounded(tmp_path: Path) -> None:
    async def talk() -> Told:
        async with Told(tmp_path) as told:
            told.way.may_go.clear()
            began = time.monotonic()
            for number in range(1, MAX_WAITING + 51):
                told.notifier.hear(closed(number))
            assert time.monotonic() - began < 1
            assert told.notifier.num_waiting == MAX_WAITING
            told.way.may_go.set()
        return told

    told = asyncio.run(talk())
    assert told.counted.count("dropped") == 50
    rounds = [one.round for one in told.way.notices if isinstance(one, notices.RoundNotice)]
    assert rounds == [1, *range(52, MAX_WAITING + 51)]  # the first was on its way, the newest matter most


def test_without_a_way_nothing_is_kept(tmp_path: Path) -> None:
    async def talk() -> int:
        told = Told(tmp_path)
        told.notifier.open([])
        told.notifier.hear(closed(1))
        await told.notifier.run()
        await told.notifier.close()
        return told.notifier.num_waiting

    assert asyncio.run(talk()) == 0


# --- a hub -----------------------------------------------------------------------------------------------------------


def test_a_hub_tells_program_and_webhook_of_each_round_and_its_end(tmp_path: Path, receiving: Any) -> None:
    receiver = receiving(500, 200)
    code = "import sys; open('told', 'a').write(sys.stdin.read())"
    notify = {
        "command": [sys.executable, "-c", code],
        "webhook": receiver.url,
        "events": ["round_closed", "run_over"],
    }

    async def talk() -> None:
        settings = write_run(tmp_path, notify=notify, rounds={"count": 1})
        async with (
            serving(settings, exit_when_done=True) as hub,
            joined(hub.url, hub.token("a")) as a,
            joined(hub.url, hub.token("b"), "phone") as b,
        ):
            await a.upload(await a.hear(ms.RoundOffer), update(0.5))
            await b.upload(await b.hear(ms.RoundOffer), update(0.25))
            await a.hear(ms.Farewell)
            await asyncio.wait([hub.running])
            hub.running.result()

    asyncio.run(talk())
    lines = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["round_closed", "run_over"]
    assert [json.loads(body)["event"] for _, body in receiver.requests] == ["round_closed", "round_closed", "run_over"]
    secret = read_secret(tmp_path / "small.run" / "webhook.secret")
    assert (tmp_path / "small.run" / "webhook.secret").stat().st_mode & 0o777 == 0o600
    headers, body = receiver.requests[-1]
    at, signed = (part.partition("=")[2] for part in headers["fedsoda-signature"].split(","))
    assert signed == hmac.new(secret, f"{at}.".encode() + body, hashlib.sha256).hexdigest()


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notify", "said"),
    [
        ({"webhook": "http://hooks.example.org/x"}, "over plain http, where others can read it"),
        ({"webhook": "http://10.0.0.7/x"}, "over plain http"),
        ({"webhook": "ftp://hooks.example.org/x"}, "is not an address"),
        ({"webhook": "hooks.example.org"}, "is not an address"),
        ({"webhook": "https:///x"}, "is not an address"),
        ({"webhook": "https://[::1/x"}, "is not an address"),
        ({"webhook": "https://a b/"}, "is not an address"),
        ({"webhook": "https://h:99999/"}, "is not an address"),
        ({"secret": "s"}, "stands without a webhook"),
        ({"command": [""]}, "write a program and its arguments"),
        ({"command": "tell.py --now"}, "must be a list"),
        ({"events": ["round_open"]}, "one of run_over, below_quorum"),
        ({"timeout_seconds": 0}, "above 0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, notify: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageProblem, match=said):
        write_run(tmp_path, notify=notify)


@pytest.mark.parametrize(
    "notify",
    [
        {"webhook": "https://hooks.example.org:8443/a?b=c"},
        {"webhook": "http://127.0.0.1:9/x"},
        {"webhook": "http://[::1]:9/x"},
        {"webhook": "http://localhost/x"},
        {"webhook": "http://10.0.0.7/x", "insecure_http": True},
    ],
)
def test_https_loopback_and_what_the_owner_allows_are_taken(tmp_path: Path, notify: dict[str, Any]) -> None:
    assert write_run(tmp_path, notify=notify).notify.webhook == notify["webhook"]


def test_notify_may_change_while_a_run_is_prepared(tmp_path: Path) -> None:
    assert write_run(tmp_path, notify={"command": ["x"]}).fixed() == write_run(tmp_path).fixed()


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 5000])
def test_a_secret_that_protects_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    settings = write_run(tmp_path, notify={"webhook": "https://h.example/", "secret": "s"})
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(UsageProblem, match="must hold 16 to 4096"):
        ways_of(settings, RunDirectory(settings.run_dir), time.time)
    (tmp_path / "s").unlink()
    with pytest.raises(UsageProblem, match="cannot be read"):
        ways_of(settings, RunDirectory(settings.run_dir), time.time)


# --- the promise -----------------------------------------------------------------------------------------------------


def test_the_schema_of_notices_is_the_recorded_one() -> None:
    [_], parts = msgspec.json.schema_components([notices.AnyNotice], ref_template="#/$defs/{name}")
    recorded = json.loads((SCHEMAS / "notify.json").read_text())
    assert recorded["$defs"] == parts
    assert {one["$ref"].rpartition("/")[2] for one in recorded["oneOf"]} == set(parts)


def test_every_event_that_settings_know_is_a_notice() -> None:
    tags = {kind.__struct_config__.tag for kind in notices.HubNotice.__subclasses__()}
    assert tags == {*ALL, "trial"}
