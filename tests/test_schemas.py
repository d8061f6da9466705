"""What the two commands print is what `schemas/` says, field by field: reports, events and errors of real runs.

The schemas are as strict as they can be: no unknown field, none missing, no NaN. A command, an event or an error class
without a schema fails here. Left to `test_federation.py`: the events of hub and edges with torch on both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import msgspec
import pytest
import typer
from jsonschema import Draft202012Validator

import fedsoda_edge.cli.commands
import fedsoda_hub.cli.commands
from fedsoda_edge import errors
from fedsoda_edge import events as edge_events
from fedsoda_edge.errors import HubUnreachable, WorkerFailed
from fedsoda_edge.join import control
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.inspect import Found
from fedsoda_edge.join.status import WORK, JoinStatus
from fedsoda_edge.ports import console
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.coded import CODECS
from fedsoda_edge.protocol.ranges import Positive
from fedsoda_edge.protocol.session import Upload
from fedsoda_edge.testing import ScriptedHub
from fedsoda_hub import events as hub_events
from fedsoda_hub.cli.display import HubDisplay
from fedsoda_hub.demo.report import DemoReport
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.serving import daemon as daemon_module
from fedsoda_hub.settings.run import RunSettings
from tests import schema_of
from tests.edge.cli.test_cli import a_bundle, serving
from tests.gguf_files import write_gguf
from tests.hub.preparation.test_shapes import healing_run
from tests.hub.runs import make_run
from tests.hub.serving import test_daemon
from tests.hurried_clock import HurriedClock
from tests.joins import ports_of_commands
from tests.schema import EDGE, HUB, read_json

APPS = {"fedsoda-edge": (EDGE, fedsoda_edge.cli.commands.app), "fedsoda-hub": (HUB, fedsoda_hub.cli.commands.app)}
both_programs = pytest.mark.parametrize("program", APPS)
INSTEAD = {"error", "terminated"}  # of a report
ROWS = "".join(json.dumps({"prompt": f"visit {i}", "completion": "home" if i % 2 else "ward"}) + "\n" for i in range(8))


# --- the schemas -----------------------------------------------------------------------------------------------------


def commands(app: typer.Typer, option: str) -> set[str]:
    """Names of all commands that have the option, those of groups too."""

    def below(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, *path, name)
            else:
                yield " ".join((*path, name)), command

    found = below(typer.main.get_command(app))
    return {name for name, command in found if any(option in parameter.opts for parameter in command.params)}


EDGE_EVENTS: dict[str, type[edge_events.JoinEvent]] = {
    kind.__struct_config__.tag: kind for kind in get_args(edge_events.AnyEvent)
}


def events_of(program: str) -> set[str]:
    """Name every event that the program can say: its structs' tags, and the terminal event."""
    kinds = EDGE_EVENTS if program == "fedsoda-edge" else {kind.__struct_config__.tag for kind in hub_events.kinds()}
    return {*map(str, kinds), "end"}


def subschemas(schema: Any, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, schema) of a schema and all in it."""
    if isinstance(schema, list):
        for place, inner in enumerate(schema):
            yield from subschemas(inner, f"{path}/{place}")
    elif isinstance(schema, dict):
        yield path, schema
        for keyword, inner in schema.items():
            if keyword in ("$defs", "properties"):
                for name, one in inner.items():
                    yield from subschemas(one, f"{path}/{keyword}/{name}")
            elif keyword not in ("enum", "const", "required", "type"):
                yield from subschemas(inner, f"{path}/{keyword}")


@both_programs
def test_a_schema_is_one_of_draft_2020_12(program: str) -> None:
    document = APPS[program][0].document
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(document)
    known = set(Draft202012Validator.VALIDATORS) | {"$schema", "$comment", "$defs"}
    for path, schema in subschemas(document):  # a keyword that the draft does not know is not an error in it
        assert set(schema) <= known, path
        assert schema.get("$ref", "#/$defs/Count").removeprefix("#/$defs/") in document["$defs"], path


@both_programs
def test_an_object_has_no_field_but_those_named_and_lacks_none(program: str) -> None:
    """But for what an option adds. Parts that are completed where they are used are closed there."""
    optional = {
        "#/$defs/token create": {"token"},
        "#/$defs/invite": {"link"},
        "#/$defs/rebind": {"link", "expires"},
        **({"#/$defs/plan": {"curve"}} if program == "fedsoda-hub" else {}),
        "#/$defs/evaluate": {"samples"},
        "#/$defs/evaluate/properties/samples/items": {"sub_llm"},
    }
    completed = {f"#/$defs/{part}" for part in ("Join", "Serve", "Run", "Live", "Failed", "Memory", "Terminated")}
    for path, schema in subschemas(APPS[program][0].document):
        if schema.get("type") == "object" and "properties" in schema:
            assert set(schema["properties"]) - set(schema["required"]) == optional.get(path, set()), path
            is_closed = False in (schema.get("additionalProperties"), schema.get("unevaluatedProperties"))
            assert is_closed != (path in completed), path


@both_programs
def test_every_report_and_every_event_has_a_schema_and_no_other_thing_has(program: str) -> None:
    outputs, app = APPS[program]
    assert outputs.entries == commands(app, "--json") | events_of(program) | INSTEAD


@pytest.mark.parametrize("name", EDGE_EVENTS)
def test_an_event_of_an_edge_is_the_struct_that_its_code_says(name: str) -> None:
    """Keys, types, ranges, and that there is nothing else."""
    assert schema_of.of_struct(EDGE_EVENTS[name]) == schema_of.normal(EDGE.parts[name], EDGE.parts)


@pytest.mark.parametrize(
    ("entry", "kind", "envelope"),
    [("Join", edge_events.JoinReport, {"schema", "status"}), ("plan", Found, {"schema", "status"}),
     ("Asked", control.RequestAnswer, {"schema", "status"}), ("JoinStatus", JoinStatus, set())],
)  # fmt: skip
def test_a_report_of_an_edge_has_the_keys_of_its_struct(entry: str, kind: Any, envelope: set[str]) -> None:
    """Their values are checked where the commands run."""
    assert set(EDGE.parts[entry]["properties"]) - envelope == set(kind.__struct_fields__)


def test_a_struct_that_is_not_as_promised_is_found() -> None:
    class Planted(edge_events.JoinEvent, frozen=True, tag="offer"):
        round: Positive
        due_seconds: float

    promised = schema_of.normal(EDGE.parts["offer"], EDGE.parts)
    assert schema_of.of_struct(edge_events.RoundOffered) == promised
    assert schema_of.of_struct(Planted) != promised  # seconds below 0
    assert schema_of.of_struct(edge_events.Retrying) != promised


def test_closed_sets_are_those_of_the_code() -> None:
    others = {"connecting", "reconnecting", "paused", "stopped"}
    assert set(EDGE.parts["JoinStatus"]["properties"]["state"]["enum"]) == others | set(WORK.values())
    assert tuple(HUB.parts["plan"]["properties"]["settings"]["properties"]["codec"]["enum"]) == CODECS
    assert EDGE.parts["Failed"] == HUB.parts["Failed"]


@both_programs
def test_an_error_has_the_exit_status_of_its_class(program: str) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FedSODAError)]
    for kind in {*kinds} - {errors.FedSODAError, errors.LocalError, errors.RemoteError}:
        said = {
            "schema": 1,
            "status": "error",
            "error": kind.__name__,
            "message": "no",
            "exit_status": kind.exit_status,
        }
        APPS[program][0].check("error", said)
        APPS[program][0].check("end", {"event": "end", "terminal": True, **said})
        with pytest.raises(AssertionError):
            APPS[program][0].check("error", said | {"exit_status": kind.exit_status % 5 + 1})


# --- that a check can fail -------------------------------------------------------------------------------------------


LISTED = '{"schema": 1, "status": "ok", "bytes": {"store": 3, "runs": 0}}'
ENDED = '{"schema": 1, "event": "end", "terminal": true, "status": "ok", "run": "t", "phase": "ended"}'


@pytest.mark.parametrize(
    ("planted", "why"),
    [
        (LISTED.replace("3", "3, \"logs\": 0"), "'logs' was unexpected"),
        (LISTED.replace('"schema"', '"version": 2, "schema"'), "'version' was unexpected"),
        (LISTED.replace('"store": 3, ', ""), "'store' is a required property"),
        (LISTED.replace("3", "NaN"), "NaN in "),
        (LISTED.replace("3", "-1"), "-1 is less than the minimum of 0"),
        (LISTED.replace("3", "3.0"), "3.0 is not of type 'integer'"),
        (LISTED.replace("3", "true"), "True is not of type 'integer'"),
        (LISTED.replace("3", "null"), "None is not of type 'integer'"),
        (LISTED.replace("ok", "good"), "'ok' was expected"),
    ],
)  # fmt: skip
def test_a_report_that_is_not_as_promised_is_found(planted: str, why: str) -> None:
    EDGE.report("cache list", LISTED)
    with pytest.raises(AssertionError, match=why):
        EDGE.report("cache list", planted)


def test_two_objects_are_no_report() -> None:
    with pytest.raises(AssertionError, match="not one line"):
        EDGE.report("cache list", f"{LISTED}\n{LISTED}\n")


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ['{"event": "waiting", "why": "no edge"}'],
        [ENDED, '{"event": "waiting", "why": "no edge"}'],
        [ENDED.replace("ended", "over")],
        [ENDED.replace('"run"', '"name"')],
        [ENDED.replace("}", ', "stopped": "SIGTERM"}')],
        ['{"event": "yawn"}', ENDED],
        ['{"why": "no edge"}', ENDED],
    ],
)
def test_events_that_are_not_as_promised_are_found(lines: list[str]) -> None:
    HUB.events(ENDED)
    with pytest.raises(AssertionError):
        HUB.events("".join(line + "\n" for line in lines))


def test_a_number_that_is_none_is_found_before_it_is_printed() -> None:
    event = {"event": "retrying", "round": 1, "reason": "full"}
    EDGE.check_event(event)
    progress = {
        "event": "training",
        "round": 1,
        "stage": "train",
        "step": 1,
        "steps": 2,
        "loss": None,
        "tokens_per_second": 9.5,
    }
    EDGE.check_event(progress)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(AssertionError, match=f"{loss} is not of type"):
            EDGE.check_event(progress | {"loss": loss})


# --- running the commands --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ran:
    status: int
    out: str


def run(program: str, *words: str | Path, **environment: str) -> Ran:
    """The command in this process, from its words to its exit status: a process each would take long."""
    out, before = io.StringIO(), signal.getsignal(signal.SIGTERM)
    argv = [program, *map(str, words)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(os.environ, {"NO_PROXY": "*", **environment}),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(io.StringIO()),
            pytest.raises(SystemExit) as end,
        ):
            console.run(APPS[program][1])
    finally:
        signal.signal(signal.SIGTERM, before)
    return Ran(int(end.value.code or 0), out.getvalue())


def edge(command: str, *words: str | Path, **environment: str) -> dict[str, Any]:
    """The report of `fedsoda-edge COMMAND ... --json`, checked."""
    return reported("fedsoda-edge", command, *words, **environment)


def hub(command: str, *words: str | Path, **environment: str) -> dict[str, Any]:
    """The report of `fedsoda-hub COMMAND ... --json`, checked."""
    return reported("fedsoda-hub", command, *words, **environment)


def reported(program: str, command: str, *words: str | Path, **environment: str) -> dict[str, Any]:
    ran = run(program, *command.split(), *words, "--json", **environment)
    found = APPS[program][0].report(command, ran.out)
    assert ran.status == found.get("exit_status", 0)
    return found


@contextlib.contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """`work` in another thread. It ends the command that runs here, also by its own failure."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)
            stop(signal.SIGTERM)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    if failures:
        raise failures[0]


def stop(number: signal.Signals) -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)


def wait_for(path: Path) -> str:
    until = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.01)
    return path.read_text()


@pytest.fixture
def nowhere() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


# --- fedsoda-edge ----------------------------------------------------------------------------------------------------


PREPARING = ms.Preparing(
    protocol=ms.PROTOCOL_VERSION, run_id="", run_name="scripted", stage="aligning", done=1, total=2
)


class MoodyHub(ScriptedHub):
    """Its disk is full, then it has closed round 1, then it is away for a moment; in round 2 all goes well.

    The owner of the device pauses before all that.
    """

    def __init__(self, bundle: Path) -> None:
        super().__init__(rounds=2, bundle=bundle)
        self._num_asked = 0
        self._is_away = False

    async def connect(self) -> None:
        if self._is_away:
            self._is_away = False
            raise HubUnreachable("TCP: nothing answers; is the hub running?", "TCP")
        await super().connect()

    async def send(self, frame: bytes) -> None:
        said = self._session.receive(frame)
        match said:
            case ms.Hello():
                if self._num_asked == 0:
                    control.ask(Home().control, "pause", 0.001)
                    self._say(PREPARING)
                self._say(self._welcome())
            case ms.Ready():
                self._offer()
            case Upload():
                self._num_asked += 1
                self._judge(said.start)

    def _judge(self, start: ms.UpdateStart) -> None:
        if self._num_asked == 1:
            self._say(ms.Refusal(round=1, reason="the disk is full", retry=True))
            return
        self.updates.append(start)
        if self._num_asked == 2:
            self._say(ms.Refusal(round=1, reason="round 1 is closed; wait for the next offer"))
            self._say(ms.RoundClosed(round=1, num_updates=3))
            self._is_away = True
            self._out.put_nowait(None)
            return
        self._say(ms.Receipt(round=start.round, digest=start.digest))
        self._offer()


@dataclasses.dataclass(frozen=True)
class Joined:
    """What a whole join printed, and the home that it left."""

    events: list[dict[str, Any]]
    home: str
    data: Path
    hub: MoodyHub


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory, scripted: Path) -> Joined:
    directory = tmp_path_factory.mktemp("joined")
    home, data, moody = str(directory / "home"), directory / "visits.jsonl", MoodyHub(scripted)
    data.write_text(ROWS)
    with ports_of_commands(moody, clock=HurriedClock(0.01)):
        ran = run(
            "fedsoda-edge", "join", "http://hub", "--data", data, "--column", "text=prompt", "--jsonl",
            FEDSODA_HOME=home, FEDSODA_TOKEN="t",
        )  # fmt: skip
    assert ran.status == 0, ran.out
    return Joined(EDGE.events(ran.out), home, data, moody)


def test_a_join_says_every_event_that_an_edge_has(joined: Joined) -> None:
    assert {event["event"] for event in joined.events} == events_of("fedsoda-edge")
    assert [done["accepted"] for done in joined.events[-1]["rounds"]] == [False, True]


def test_join_reports_with_json_what_its_terminal_event_says(joined: Joined) -> None:
    with ports_of_commands(joined.hub):
        found = edge("join", "http://hub", "--data", joined.data, FEDSODA_HOME=joined.home, FEDSODA_TOKEN="t")
    assert found.keys() == joined.events[-1].keys() - {"event", "terminal"}
    assert found["rounds"] == []  # the run is over


def test_what_a_join_does_of_a_request_is_told() -> None:
    home, asked = Home(), []

    def answer() -> None:
        paused = control.RequestAnswer(state="paused", reason="by its owner", seconds=1.5, freed_bytes=9, round=3)
        running = control.RequestAnswer(state="running", was_paused=True, round=3)
        for done in (paused, running, control.RequestAnswer(state="finishing", was_paused=True, round=3)):
            until = time.monotonic() + 30
            while not (requests := control.requests(home.control)):
                assert time.monotonic() < until
                time.sleep(0.01)
            asked.append((requests[0].do, requests[0].seconds))
            control.answer(requests[0], done)

    home.lock()
    with meanwhile(answer):
        assert edge("pause", "--for", "1.5h")["reason"] == "by its owner"
        assert edge("resume")["was_paused"] is True
        assert edge("finish")["round"] == 3
    with mock.patch.object(control, "ANSWER_SECONDS", 0.0):
        assert edge("pause")["state"] == "noted"
    home.unlock()
    assert asked == [("pause", 5400.0), ("resume", None), ("finish", None)]


def test_the_home_of_a_join_is_told(joined: Joined) -> None:
    home = {"FEDSODA_HOME": joined.home}
    assert edge("status", **home)["join"]["state"] == "the run is over"
    assert edge("data check", joined.data, **home)["lengths"]["max"] > 0  # with the run's tokenizer and template
    assert edge("cache list", **home)["bytes"]["store"] > 0


def test_a_home_that_nobody_joined_from_is_told(tmp_path: Path) -> None:
    assert edge("status")["join"] is None
    assert edge("cache list")["bytes"] == {"store": 0, "runs": 0}
    assert edge("cache prune")["freed_bytes"] == 0
    (tmp_path / "visits.jsonl").write_text(ROWS)
    found = edge("data check", tmp_path / "visits.jsonl")
    assert (found["lengths"], found["truncated"], found["cut_ids"]) == (None, None, None)


def test_a_join_that_sigterm_stops_says_so_and_leaves_a_status(nowhere: str, tmp_path: Path) -> None:
    data, home = tmp_path / "visits.jsonl", Home()
    data.write_text(ROWS)

    def stop_it() -> None:
        wait_for(home.status)
        stop(signal.SIGTERM)

    for option in ("--json", "--jsonl"):
        home.status.unlink(missing_ok=True)
        with meanwhile(stop_it):
            ran = run("fedsoda-edge", "join", nowhere, "--data", data, "--unattended", option, FEDSODA_TOKEN="t")
        assert ran.status == 0
        last = EDGE.report("join", ran.out) if option == "--json" else EDGE.events(ran.out)[-1]
        assert last["stopped"] == "SIGTERM"
        found = edge("status")["join"]
        assert (found["state"], found["run"], found["round"]) == ("stopped", None, None)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the hub's own listener: a sub-LLM that fits everywhere, tokens `good` and `old`."""
    directory = tmp_path_factory.mktemp("served")
    bundle = a_bundle(layer_bytes=100_000)
    (directory / bundle.files[0].sha256).write_bytes(bytes(100_000))
    with serving(directory, bundle) as url:
        yield url


def test_plan_doctor_and_leave_of_a_hub(served: str) -> None:
    assert edge("plan", served, FEDSODA_TOKEN="good")["device"] == "cpu"
    assert edge("leave", served, FEDSODA_TOKEN="good")["run"] == "triage"
    with ports_of_commands():
        passed = edge("doctor", served, FEDSODA_TOKEN="good")
        failed = edge("doctor", served, FEDSODA_TOKEN="old")
    assert [check["name"] for check in passed["checks"]][-2:] == ["fits", "bandwidth"]
    assert (failed["status"], failed["exit_status"], failed["checks"][-1]["passed"]) == ("error", 5, False)


def test_receipts_of_a_device(served: str) -> None:
    assert edge("receipts")["sent"] == []
    edge("plan", served, FEDSODA_TOKEN="good")
    edge("leave", served, FEDSODA_TOKEN="good")
    found = edge("receipts", "--run", "triage")["sent"]
    assert [one["what"] for one in found] == ["hello", "hello", "leave"]
    assert {one["hub"] for one in found} == {served}
    assert edge("receipts", "--run", "other")["sent"] == []


def test_errors_of_an_edge(served: str, nowhere: str, tmp_path: Path) -> None:
    data = tmp_path / "visits.jsonl"
    data.write_text(ROWS)
    join = ("join", nowhere, "--data", str(data))
    assert edge("join", nowhere)["error"] == "Usage"
    assert edge(*join, "--device", "tpu")["error"] == "UsageProblem"  # there is no token either
    assert edge("join", nowhere, "--data", tmp_path / "none.jsonl")["error"] == "DataProblem"
    with mock.patch("fedsoda_edge.join.agent.FIRST_SECONDS", 0.0):
        assert edge(*join, FEDSODA_TOKEN="good")["error"] == "HubUnreachable"
        told = EDGE.events(run("fedsoda-edge", *join, "--jsonl", FEDSODA_TOKEN="good").out)
    assert [event["event"] for event in told] == ["settings", "reconnecting", "end"]
    assert told[-1]["exit_status"] == 3
    assert edge("plan", served, FEDSODA_TOKEN="old")["error"] == "RefusedByHub"
    assert edge("status", "--loud")["error"] == "Usage"
    assert edge("data check", data, "--tokenizer", tmp_path)["error"] == "UsageProblem"
    home = Home()
    home.lock()
    assert edge("cache prune")["error"] == "HomeInUse"
    home.unlock()


# --- fedsoda-hub -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Told:
    """A run of one closed round: its settings, what `prepare` reported, and the events of its jobs."""

    settings: RunSettings
    prepared: dict[str, Any]
    evaluated: dict[str, Any]
    progress: list[dict[str, Any]]

    @property
    def eval_data(self) -> Path:
        assert self.settings.eval_data is not None
        return self.settings.eval_data


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Told:
    """Prepared and evaluated by the real commands; the round between them is written down by hand."""
    settings = make_run(tmp_path_factory.mktemp("told"), tiny_llama, align={"steps": 2})
    progress: list[dict[str, Any]] = []
    with mock.patch.object(HubDisplay, "say", lambda _, event: progress.append(hub_events.as_json(event))):
        found = hub("prepare", settings.path)
        views = {name: found[name] for name in ("manifest", "adapter_view", "emulator_view", "public_kl")}
        a, b, view = ms.EdgeId("a"), ms.EdgeId("b"), ms.Digest(views["adapter_view"])
        records: list[rec.AnyRecord] = [
            rec.RunStarted(run_id="0123456789abcdef", fixed=settings.fixed()),
            rec.RunPrepared(**views),
            rec.RoundOpened(round=1, cohort=(a, b), view=view, alignment=0, deadline_at=1e9),
            rec.UpdateAccepted(round=1, edge=a, digest=view, num_examples=8, loss=0.25),
            rec.EdgeAnswered(round=1, edge=b, how="declined"),
            rec.RoundClosed(round=1, master=view, view=view, delta=view),
            rec.Realigned(
                round=2, version=1, view=views["emulator_view"], delta=view, kl_before=0.5, kl_after=0.25
            ),
        ]  # fmt: skip
        with opened(RunDirectory(settings.run_dir)) as ledger:
            for record in records:
                ledger.append(record)
        evaluated = hub("evaluate", settings.path, "--data", settings.directory / "eval.jsonl")
    result = {name: evaluated[name] for name in jobs.EvaluateResult.__struct_fields__}
    with opened(RunDirectory(settings.run_dir)) as ledger:
        ledger.append(rec.Evaluated(round=1, result=msgspec.convert(result, jobs.EvaluateResult)))
        ledger.add_traffic(a, 1, 300, 500)
        ledger.snapshot(ledger.replay())
        ledger.tokens.create("a")
    return Told(settings, found, evaluated, progress)


def test_jobs_say_how_far_they_are(told: Told) -> None:
    for event in told.progress:
        HUB.check_event(event)
    stages = {(event["job"], event["stage"]) for event in told.progress}
    assert stages == {
        ("prepare", "reading the full LLM and the public text"),
        ("prepare", "measuring layer similarity"),
        ("prepare", "caching teacher targets"),
        ("prepare", "quantizing"),
        ("prepare", "running the full LLM on public text"),
        ("prepare", "running the pruned LLM on public text"),
        ("prepare", "running the sub-LLM on public text"),
        ("prepare", "aligning"),
        ("evaluate", "evaluating"),
    }


def test_plan_of_a_model_and_of_a_bare_config(ref24: Path, tiny_llama: Path) -> None:
    found = hub("plan", ref24 / "config.json")
    assert found["kept_layers"] == 12
    short = ("--groups", "2", "--layers-per-group", "1", "--adapter-layers", "2", "--realign-every", "0")
    assert hub("plan", tiny_llama, *short, "--codec", "bf16")["ours"]["up_bytes_per_edge_round"] > 0


def test_plan_of_a_run_that_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    settings = healing_run(tmp_path, tiny_llama)
    found = hub("plan", settings.path, "--measure")
    assert found["kept_layers"] == found["num_layers"] - 2
    assert [point["removed_layers"] for point in found["curve"]] == [0, 1, 2, 3, 4]
    assert hub("plan", settings.path, "--measure", "--groups", "1")["error"] == "UsageProblem"


def test_status_and_edges_of_a_run_that_no_hub_serves(told: Told) -> None:
    found = hub("status", told.settings.path)
    assert (found["running"], found["evaluation"]["num_examples"], found["answered"]) == (False, 16, {"b": "declined"})
    assert [edge["edge"] for edge in hub("edges", told.settings.path)["edges"]] == ["a"]


def test_report_of_a_run(told: Told, tmp_path: Path) -> None:
    found = hub("report", told.settings.path, "--to", tmp_path / "report")
    assert found["rounds_closed"] == 1
    assert all(Path(picture).is_file() for picture in found["pictures"])


def test_the_files_of_a_bundle_for_mirrors(told: Told, tmp_path: Path) -> None:
    found = hub("bundle", told.settings.path, "--to", tmp_path / "cdn")
    assert (found["files"], found["copied"]) == (len(list((tmp_path / "cdn").iterdir())), found["files"])
    assert hub("bundle", told.settings.path, "--to", tmp_path / "cdn")["copied"] == 0


def test_export_and_evaluate_of_a_run_of_its_export_and_of_one_that_left_it(
    told: Told, tiny_llama: Path, tmp_path: Path
) -> None:
    judge = ("--data", told.eval_data, "--samples", "1")
    assert hub("export", told.settings.path, "--to", tmp_path / "merged", "--merge")["merged"] is True
    adapter = told.settings.directory / "adapter"
    assert hub("export", told.settings.path, "--to", adapter)["rounds"] == 1
    assert hub("evaluate", adapter, *judge)["accuracy"] == told.evaluated["accuracy"]
    moved = Path(shutil.copytree(adapter, tmp_path / "elsewhere" / "adapter"))
    found = hub("evaluate", moved, *judge, "--model", tiny_llama)
    assert found["accuracy"]["sub_llm"] is None
    assert "sub_llm" not in found["samples"][0]
    assert hub("evaluate", moved, *judge)["error"] == "UsageProblem"


def test_import_of_a_gguf(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_llama, tmp_path / "tiny.gguf")
    assert hub("import", file, "--to", tmp_path / "made")["family"] == "llama"
    assert hub("import", file, "--to", tmp_path / "made")["error"] == "UsageProblem"


def test_tokens(tmp_path: Path) -> None:
    run_file = test_daemon.write_run(tmp_path).path
    assert hub("token create", run_file, "--name", "a")["token"].startswith("fs1-")
    assert "token" not in hub("token create", run_file, "--name", "b", "--out", tmp_path / "b.token")
    assert hub("token rebind", run_file, "a")["edge"] == "a"
    assert hub("token revoke", run_file, "a")["edge"] == "a"
    assert [token["revoked"] for token in hub("token list", run_file)["tokens"]] == [True, False]
    assert hub("reset", run_file, "--yes")["tokens"] == 1
    assert [token["edge"] for token in hub("token list", run_file)["tokens"]] == ["a", "b"]


def test_invitations(tmp_path: Path) -> None:
    run_file = test_daemon.write_run(tmp_path, listen={"port": 8470}).path
    assert hub("invite", run_file, "--name", "a")["link"].startswith("fedsoda://127.0.0.1:8470/#k=")
    assert "link" not in hub("invite", run_file, "--name", "b", "--out", tmp_path / "b.link")
    assert hub("rebind", run_file, "a")["link"].startswith("fedsoda://127.0.0.1:8470/#k=")
    hub("token create", run_file, "--name", "c")
    assert [hub(command, run_file, "c")["kind"] for command in ("rebind", "revoke")] == ["token", "token"]
    assert hub("revoke", run_file, "b")["kind"] == "link"
    found = [(edge["edge"], edge["kind"], edge["revoked"]) for edge in hub("edges", run_file)["edges"]]
    assert found == [("a", "link", False), ("b", "link", True), ("c", "token", True)]
    assert hub("reset", run_file, "--yes")["links"] == 1
    assert hub("rebind", run_file, "b")["error"] == hub("revoke", run_file, "d")["error"] == "UsageProblem"


@pytest.mark.parametrize(
    "command",
    [
        "invite --name a",
        "revoke",
        "rebind",
        "prepare",
        "serve",
        "status",
        "edges",
        "export --to adapter",
        "evaluate --data eval.jsonl",
        "report",
        "token list",
        "token create --name a",
        "token revoke",
        "token rebind",
        "reset --yes",
    ],
)
def test_errors_of_a_hub(tmp_path: Path, command: str) -> None:
    run_file = tmp_path / "RUN.toml"
    name, *options = command.split(" --", 1)
    words = [run_file, *f"--{''.join(options)}".split()] if options else [run_file]
    assert hub(name, *words, "--loud")["error"] == "Usage"
    assert hub(name, *words, *(["a"] if name.endswith(("revoke", "rebind")) else []))["error"] == "UsageProblem"
    assert hub("plan", tmp_path / "no-model")["error"] == "UsageProblem"


class Torch(test_daemon.Torch):
    """In the place of torch; what it says and returns is held against real work by `told` and test_federation.py."""

    def answer(self, job: jobs.Job, on_progress: Any) -> jobs.JobResult:
        match job:
            case jobs.Probe():
                return jobs.ProbeResult(kl=0.5, cosine=0.75)
            case jobs.Realign():
                on_progress(jobs.Stage(stage="aligning", done=1, total=2, kl=0.25))
                view, delta = (self.stored(name) for name in (b"view", b"delta"))
                made = jobs.RealignedSubLLM(view=view, delta=delta, kl_before=0.5, kl_after=0.25)
                return jobs.RealignResult((made,))
            case jobs.Evaluate():
                on_progress(jobs.Stage(stage="evaluating", done=1, total=2))
                figures = {"full": 0.25, "sub_llm": 0.5, "plug_in": 0.75}
                none = dict.fromkeys(figures)
                return jobs.EvaluateResult(
                    accuracy=figures,
                    loss={**figures},
                    auc={**none},
                    mean_rank={**none},
                    shares={name: {} for name in figures},
                    num_examples=4,
                )
        return super().answer(job, on_progress)


@contextlib.contextmanager
def without_torch(settings: RunSettings, **torch: Any) -> Iterator[None]:
    """`serve` starts no child, and does not wait for edges that are gone."""
    child = Torch(settings.run_dir)
    vars(child).update(torch)
    with (
        mock.patch.object(daemon_module, "Child", return_value=child),
        mock.patch.object(daemon_module, "LINGER_SECONDS", 0.05),
    ):
        yield


async def play(url: str, tokens: dict[str, str]) -> None:
    """Two rounds in which every kind of thing happens that an edge can do."""
    async with test_daemon.joined(url, tokens["c"], "tablet") as c:
        await c.hear(ms.RoundOffer)
        await c.say(ms.Leave(reason="bye"))
        await c.is_hung_up_on()
    async with test_daemon.joined(url, tokens["a"], "laptop") as a:
        await a.hear(ms.RoundOffer)  # the cohort was extended
        await a.say(ms.Progress(round=1, step=3, steps=40, loss=0.5, tokens_per_second=9.5))
        await a.say(ms.Progress(round=1, step=4, steps=40))
        await a.say(ms.Decline(round=1, reason="busy"))
        async with test_daemon.joined(url, tokens["b"], "phone") as b:
            offer = await b.hear(ms.RoundOffer)
            await b.upload(offer, test_daemon.update(0.5))
            assert (await b.hear(ms.Refusal)).retry  # the disk is full
            await b.upload(offer, test_daemon.update(0.5))
            await b.hear(ms.RoundClosed)
            await b.upload(await b.hear(ms.RoundOffer), test_daemon.update(0.25))  # a's is missing at the deadline
            await b.hear(ms.Farewell)
            await a.hear(ms.Farewell)


def test_a_run_says_every_event_that_a_hub_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eval.jsonl").write_text(ROWS)
    settings = test_daemon.write_run(
        tmp_path,
        method={"realign_every": "auto"},
        rounds={"min_edges": 1, "deadline_seconds": 1.0},
        task={"eval_data": "eval.jsonl"},
    )
    tokens = {name: hub("token create", settings.path, "--name", name)["token"] for name in "abc"}
    test_daemon.full_once(monkeypatch, BlobStore, "adopt", lambda path: path.read_bytes() == test_daemon.update(0.5))
    with (
        without_torch(settings, problems=[WorkerFailed("killed", "out of memory")]),
        meanwhile(lambda: asyncio.run(play(wait_for(settings.run_dir / "address"), tokens))),
    ):
        ran = run("fedsoda-hub", "serve", settings.path, "--exit-when-done", "--jsonl")
    said = HUB.events(ran.out)
    others = {"stopped", "cell", "repruned"}  # a comparison's, FedPruner's (test_repruning.py)
    assert {event["event"] for event in said} == events_of("fedsoda-hub") - others
    assert (ran.status, said[-1]["phase"]) == (0, "ended")
    with without_torch(settings):
        assert hub("serve", settings.path, "--exit-when-done")["phase"] == "ended"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_hub_that_is_stopped_says_so(tmp_path: Path, number: signal.Signals, status: int) -> None:
    settings = test_daemon.write_run(tmp_path)
    hub("token create", settings.path, "--name", "a")
    live: list[dict[str, Any]] = []

    def ask_and_stop() -> None:
        wait_for(settings.run_dir / "address")
        for command in ("status", "edges") if number == signal.SIGTERM else ():
            asked = [sys.executable, "-m", "fedsoda_hub", command, settings.path, "--json"]
            live.append(HUB.report(command, subprocess.run(asked, capture_output=True, text=True, check=True).stdout))
        stop(number)

    with without_torch(settings), meanwhile(ask_and_stop):
        ran = run("fedsoda-hub", "serve", settings.path, "--jsonl")
    assert ran.status == status
    *_, stopped, ended = HUB.events(ran.out)
    assert (stopped["signal"], ended["status"]) == (number.name, "error" if status else "ok")
    if live:
        assert live[0]["running"] is True
        assert live[0]["edges"] == live[1]["edges"] != []


# --- the demo --------------------------------------------------------------------------------------------------------


DEMO = """{"schema": 1, "status": "ok", "run": "/d/run.toml", "bundle": "/d/demo.run/bundle", "export": "/d/export", "report": "/d/report/report.html",
"model": "/m", "eval_data": "/d/eval.jsonl",
"accuracy": {"full": 0.25, "sub_llm": 0.75, "plug_in": 0.875, "local_only": 0.625},
"local_only": {"north": 0.5, "south": 0.625, "west": 0.5}, "public": {"text": "/d/public.txt", "sequences": 96,
"length": 128}, "public_kl": {"pruned": 1.5, "quantized": 1.75, "aligned": 0.25}, "bytes": {"bundle": 6000000,
"full_model": 22000000, "up_per_edge_round": 60000.5, "down_per_edge_round": 80000.0}, "bits_per_parameter": 4.5,
"lora_parameters": {"adapter": 120000, "emulator": 160000}, "rounds": 6, "edges": [{"examples": 90, "labels":
{"road": 60, "farm": 30}}], "edge_peak_rss_bytes": 600000000, "agent_peak_rss_bytes": 60000000,
"seconds": {"prepare": 30.5, "rounds": 60.25, "total": 120.0}}"""


def test_a_demo_reports_like_this_one_made_by_hand() -> None:
    """Running it takes minutes; its report has all its fields by type."""
    HUB.check("demo", read_json(DEMO))
    report = msgspec.json.decode(DEMO, type=DemoReport)
    envelope = {"schema": 1, "status": "ok"}
    assert msgspec.to_builtins(report) | envelope == read_json(DEMO)
