"""fedsoda-edge as people and scripts start it: one sentence, one status, with --json one object and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from fedsoda_edge import errors
from fedsoda_edge.cli.commands import app
from fedsoda_edge.join.home import Home
from fedsoda_edge.protocol import manifest as mf
from fedsoda_edge.protocol import messages as ms
from tests.conftest import ROOT
from tests.edge.network.test_hub_transport import SmallHub, listening
from tests.said import for_people

TIB = 2**40
FIRST_STEPS = "check which sub-LLM fits this device, and fetch it"
GOOD_ROWS = '{"text": "fever", "department": "er"}\n{"text": "cough", "department": "gp"}\n'


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line of an error; nothing else was said but what the command runs with, up to what comes next."""
        assert self.out == ""
        lines = self.err.splitlines()
        begun = [at for at, line in enumerate(lines, 1) if line.startswith("next: ")]
        [line] = lines[begun[0] :] if begun else lines
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        [line] = self.out.splitlines()
        found = json.loads(line)
        assert found["schema"] == 1
        return dict(found)


class Device:
    """A device with a FEDSODA_HOME of its own and nothing of this machine's settings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / "home"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDSODA_")}
        self._environment = {**kept, "FEDSODA_HOME": str(self.home), "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}

    def file(self, name: str, content: str) -> str:
        (self.directory / name).write_bytes(content.encode())
        return name

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fedsoda_edge", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env={**self._environment, **environment},
        )

    def run(self, *words: str, stdin: str = "", **environment: str) -> Ran:
        with self.start(*words, **environment) as process:
            out, err = process.communicate(stdin, timeout=60)
        return Ran(process.returncode, out, for_people(err))


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The URL of a port that is closed, and stays so."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the hub's own listener: tokens `good` and `old`, and a sub-LLM that no device can hold."""
    template = ms.Template(prompt="Report: {text}\nDepartment:", completion="{department}")
    with serving(tmp_path_factory.mktemp("bundle"), a_bundle(layer_bytes=TIB - 1), template) as url:
        yield url


@contextlib.contextmanager
def serving(directory: Path, bundle: mf.BundleManifest, template: ms.Template | None = None) -> Iterator[str]:
    """The URL of a small hub whose run has this bundle; blobs are the files of `directory`."""
    data = msgspec.json.encode(bundle)
    digest = hashlib.sha256(data).hexdigest()
    (directory / digest).write_bytes(data)
    welcome = ms.Welcome(
        protocol=ms.PROTOCOL_VERSION,
        run_id="0123456789abcdef",
        run_name="triage",
        edge=ms.EdgeId("clinic-7"),
        manifest=ms.BlobRef(digest=ms.Digest(digest), bytes=len(data)),
        rounds=2,
        rounds_done=0,
        template=template,
        max_length=64,
        codec="int8",
        seed=0,
        stall_seconds=60.0,
    )
    with in_a_thread(SmallHub(directory, welcome)) as url:
        yield url


def a_bundle(layer_bytes: int) -> mf.BundleManifest:
    """A manifest, as small as one can be but for its layers."""
    roles = ("layers.0", "layers.1", "embedding", "norm", "emulator_lora", "adapter_lora")
    names = [f"{role}.safetensors" for role in roles] + ["tokenizer.json"]
    return mf.BundleManifest(
        format_version=mf.FORMAT_VERSION,
        family="llama",
        config={
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "vocab_size": 320,
            "tie_word_embeddings": True,
        },
        dtype="bfloat16",
        source="made",
        source_revision="",
        plan=mf.LayerPlan(num_layers=2, adapter=(1,), kept=(0, 1), groups=(), mapping=(), distances=()),
        lora=mf.LoRASpec(rank=4, alpha=8.0, targets=("q_proj",), adapter=(), emulator=()),
        adapter_base="nf4",
        quantized_embedding=False,
        files=tuple(
            mf.File(name, f"{number:064x}", layer_bytes if name.startswith("layers") else 1)
            for number, name in enumerate(names)
        ),
        needs=mf.EdgeNeeds(disk_bytes=1, ram_bytes=1, vram_bytes=1),
        bits_per_parameter=4.5,
    )


@contextlib.contextmanager
def in_a_thread(hub: SmallHub) -> Iterator[str]:
    started = queue.Queue[tuple[str, Callable[[], object]]]()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        async with listening(hub) as url:
            started.put((url, lambda: loop.call_soon_threadsafe(stop.set)))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    url, stop = started.get(timeout=10)
    yield url
    stop()
    thread.join()


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


# -- what is promised -----------------------------------------------------------------------------------


# Each takes as long as all that the help needs, or more. numpy comes with tokenizers and pyarrow.
NOT_FOR_HELP = frozenset(
    [
        "torch",
        "numpy",
        "transformers",
        "tokenizers",
        "websockets",
        "httpx",
        "cryptography",
        "pyarrow",
        "asyncio",
        "jinja2",
    ]
)


def test_help_says_every_exit_status_and_loads_no_torch(device: Device) -> None:
    ran = device.run("--help", PYTHONPROFILEIMPORTTIME="1", COLUMNS="400")
    assert ran.status == 0
    statuses = {
        error.exit_status
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.FedSODAError)
    }
    assert statuses == {1, 2, 3, 4, 5, 6}
    told = " ".join(ran.out.split()).partition("Exit status: ")[2]
    assert [int(status) for status in re.findall(r"(?:^|; )(\d+) ", told)] == [0, *sorted(statuses), 130]
    loaded = set(re.findall(r"^import time: .*\| +(\S+)$", ran.err, re.MULTILINE))
    assert "fedsoda_edge.cli" in loaded
    assert not loaded & NOT_FOR_HELP
    assert not device.home.exists()


def test_every_option_is_also_an_environment_variable() -> None:
    found = list(commands(typer.main.get_command(app)))
    assert {name for name, _ in found} >= {"join", "plan", "status", "leave", "data check", "cache list", "cache prune"}
    for name, command in found:
        for option in command.params:
            if option.param_type_name == "option" and option.name not in ("help", "schema"):
                wanted = "FEDSODA_" + option.opts[0].removeprefix("--").upper().replace("-", "_")
                assert option.envvar == wanted, f"{name} {option.opts[0]}"


def test_every_command_that_reports_has_json() -> None:
    for name, command in commands(typer.main.get_command(app)):
        assert any("--json" in option.opts for option in command.params), name
        assert any("--debug" in option.opts for option in command.params), name


# -- 2: wrong usage, settings or data -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "the data visits.jsonl cannot be read: No such file or directory"),
        (GOOD_ROWS + '\n{"text": "ache", }\n', "visits.jsonl:4: not JSON: "),
        (
            "[1, 2]",
            "visits.jsonl is not a list of objects: item 1 is a number; write [{...}, ...], or one object a line",
        ),
    ],
    ids=["missing", "malformed", "no object"],
)
def test_bad_data_is_told_with_its_line_before_the_hub_is_asked(
    device: Device, content: str | None, sentence: str
) -> None:
    if content is not None:
        device.file("visits.jsonl", content)
    ran = device.run("join", "http://hub.invalid", "--data", "visits.jsonl")
    assert ran.sentence.startswith(sentence)
    assert ran.status == 2


def test_a_column_that_is_not_there_is_told_with_those_that_are(device: Device, hub: str) -> None:
    device.file("visits.jsonl", '{"passage": "fever", "department": "er", "age": 70}\n')
    join = ("join", hub, "--data", "visits.jsonl")
    ran = device.run(*join, "--json", FEDSODA_TOKEN="good")
    assert ran.status == 2
    assert ran.json["message"] == (
        "visits.jsonl:1: no column 'text'; there are age, department, passage; rename one, or name its column: --column text=COLUMN"
    )
    mapped = device.run(*join, "--column", "text=passage", FEDSODA_TOKEN="good")
    assert mapped.status == 4  # the data is right, this hub's sub-LLM is too large
    ran = device.run("data", "check", "visits.jsonl", "--prompt", "{text}", "--completion", "{department}")
    assert ran.sentence.startswith("visits.jsonl:1: no column 'text'; there are age, department, passage; ")
    assert ran.status == 2


def test_labels_that_are_not_strings_are_told_with_line_and_value(device: Device, hub: str) -> None:
    device.file("visits.jsonl", GOOD_ROWS + '{"text": "ache", "department": 7}\n')
    ran = device.run("join", hub, "--data", "visits.jsonl", "--json", FEDSODA_TOKEN="good")
    assert ran.status == 2
    assert ran.json["message"].startswith("visits.jsonl:3: 'department' is 7, ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["join", "http://hub.invalid"], "Missing option '--data'"),
        (["join", "http://hub.invalid", "--data", "d", "--max-rounds", "-1"], "Invalid value for '--max-rounds'"),
        (["join", "http://hub.invalid", "--data", "d", "--column", "text"], "--column 'text' is not NAME=COLUMN"),
        (["join", "http://hub.invalid", "--data", "none", "--max-ram", "-5"], "--max-ram '-5' is not a size"),
        (
            ["join", "http://hub.invalid", "--data", "none", "--cache", "fp8"],
            "--cache fp8 is not known; choose bf16 or int8",
        ),
        (
            ["join", "http://hub.invalid", "--data", "none", "--cache-key", "x"],
            "--cache-key 'x' is not known; choose keep or",
        ),
        (["join", "http://hub:99999", "--data", "d"], "'http://hub:99999' is not the address of a hub"),
        (["join", "http://hub.invalid", "--data", "d"], "there is no token; name its file with --token-file"),
        (
            ["data", "check", "d", "--tokenizer", "e", "--completion", "x"],
            "e/tokenizer.json cannot be read as a tokenizer (No",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_wrong_usage_exits_2_without_a_traceback(device: Device, words: list[str], said: str) -> None:
    device.file("d", '{"prompt": "fever"}\n')
    token = {"FEDSODA_TOKEN": "good"} if "hub:99999" in " ".join(words) else {}
    ran = device.run(*words, COLUMNS="400", **token)
    assert said in ran.err
    assert ran.status == 2
    assert ran.out == ""
    assert "Traceback" not in ran.err


# -- 3, 4, 5: the hub and this device -------------------------------------------------------------------


def test_a_hub_that_is_away_exits_3_with_the_step_that_failed_and_debug_adds_the_traceback(
    device: Device, nowhere: str
) -> None:
    ran = device.run("plan", nowhere, FEDSODA_TOKEN="good")
    assert ran.status == 3
    assert re.fullmatch(
        r"TCP: nothing answers at 127\.0\.0\.1:\d+ \(.+\); check that the hub runs and that the port is open",
        ran.sentence,
    )
    debug = device.run("plan", nowhere, "--debug", "--json", FEDSODA_TOKEN="good")
    assert debug.status == 3
    assert debug.json == {
        "schema": 1,
        "status": "error",
        "error": "HubUnreachable",
        "message": ran.sentence,
        "exit_status": 3,
        "code": "hub-unreachable",
        "recovery": "retry",
        "helps": "fedsoda-edge doctor",
    }
    assert "Traceback" in debug.err


@pytest.mark.slow  # as long as a join waits for its first Welcome
def test_a_join_tries_for_its_first_welcome_and_then_exits_3_with_the_step_that_failed(
    device: Device, nowhere: str
) -> None:
    join = ("join", nowhere, "--data", device.file("visits.jsonl", GOOD_ROWS))
    started, tried, ended = map(json.loads, device.run(*join, "--jsonl", FEDSODA_TOKEN="good").out.splitlines())
    assert (started["event"], started["values"]["device"]) == ("settings", {"value": "auto", "source": "default"})
    assert tried["event"] == "reconnecting"
    assert (ended["event"], ended["exit_status"], ended["message"]) == ("end", 3, tried["message"])


def test_plan_and_leave_need_the_hub_too(device: Device, nowhere: str) -> None:
    for command in ("plan", "leave"):
        ran = device.run(command, nowhere, "--json", FEDSODA_TOKEN="good")
        assert (ran.status, ran.json["status"], ran.json["error"]) == (3, "error", "HubUnreachable")


def test_a_device_that_is_joined_leaves_by_finish(device: Device, nowhere: str) -> None:
    home = Home(device.home)
    home.lock()
    ran = device.run("leave", nowhere, FEDSODA_TOKEN="good")
    home.unlock()
    assert (ran.status, ran.sentence) == (
        2,
        f"a join runs in {device.home}; run fedsoda-edge finish, so that it hands in its round and leaves",
    )


def test_a_refused_token_exits_5_with_the_hubs_reason(device: Device, hub: str) -> None:
    device.file("visits.jsonl", GOOD_ROWS)
    device.file("me.token", "old\n")
    ran = device.run("join", hub, "--data", "visits.jsonl", "--token-file", "me.token")
    assert ran.status == 5
    assert (
        ran.sentence == f"the hub {hub} refused: the token of clinic-7 was revoked; ask the hub's owner for a new one"
    )
    told_by_environment = {"FEDSODA_DATA": "visits.jsonl", "FEDSODA_TOKEN_FILE": "me.token", "FEDSODA_JSON": "1"}
    ran = device.run("join", hub, **told_by_environment)
    assert (ran.status, ran.json["error"]) == (5, "RefusedByHub")


def test_a_sub_llm_that_does_not_fit_exits_4_with_both_numbers_before_it_is_downloaded(
    device: Device, hub: str
) -> None:
    device.file("visits.jsonl", GOOD_ROWS)
    ran = device.run("join", hub, "--data", "visits.jsonl", "--token-file", "-", "--json", stdin="good\n")
    assert ran.status == 4
    assert ran.json["error"] == "DeviceTooSmall"
    # 2^40 bytes of NF4 a layer, as they are held for training, with the next one as it is stored.
    least = r"[\d.]+ [GM]iB of memory free, the sub-LLM needs at least 2\.\d\d TiB, [\d.]+ TiB more; "
    assert re.search(f"this device has {least}", ran.json["message"])
    assert "joined run triage as clinic-7" in ran.err
    assert len(list((device.home / "store").iterdir())) == 1  # the manifest
    plan = device.run("plan", hub, FEDSODA_TOKEN="good")
    assert plan.status == 4
    assert re.search(r"the sub-LLM needs at least 2\.\d\d TiB for a row of 64 ids, ", plan.sentence)
    owners = device.run("plan", hub, "--max-ram", "300MB", "--json", FEDSODA_TOKEN="good")
    assert (owners.status, owners.json["error"]) == (4, "DeviceTooSmall")
    assert owners.json["message"].startswith("--max-ram allows 286 MiB, the sub-LLM needs at least 2.")


# -- while a join runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_home_is_used_by_one_join_until_it_is_stopped(
    device: Device, nowhere: str, stop: signal.Signals, status: int
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would pass on that it ignores it
    join = ("join", nowhere, "--data", device.file("visits.jsonl", GOOD_ROWS))
    with device.start(*join, "--unattended", "--json", FEDSODA_TOKEN="good") as first:
        assert first.stderr is not None
        lines = map(for_people, first.stderr)
        said = list(iter(lambda: next(lines), f"next: connect to {nowhere}, {FIRST_STEPS}\n"))
        assert f'  url = "{nowhere}"\n' in said
        line = next(lines)
        assert re.match(r"no connection: TCP: nothing answers .*; trying again$", line)
        if stop == signal.SIGTERM:
            second = device.run(*join, FEDSODA_TOKEN="good")
            assert second.status == 2
            assert second.sentence.startswith(f"{device.home} is used by another join (pid {first.pid}); ")
            assert device.run("cache", "prune").status == 2
            running = device.run("status", "--json")
            assert (running.status, running.json["running"]) == (0, True)
        first.send_signal(stop)
        out, err = first.communicate(timeout=30)
    assert first.returncode == status
    assert "stopped; the same command continues where this one ended" in for_people(err).splitlines()
    assert "Traceback" not in err
    found = Ran(status, out, err).json
    assert found["status"] == ("ok" if status == 0 else "error")
    assert device.run("status", "--json").json["running"] is False


# -- without a hub --------------------------------------------------------------------------------------


def test_status_and_cache_list_without_a_join_say_so_and_make_nothing(device: Device) -> None:
    ran = device.run("status", "--json")
    assert ran.status == 0
    assert ran.json == {
        "schema": 1,
        "status": "ok",
        "home": str(device.home),
        "running": False,
        "runs": [],
        "join": None,
    }
    assert device.run("cache", "list", "--json").json["bytes"] == {"store": 0, "runs": 0}
    assert not device.home.exists()


def test_the_cache_is_listed_and_pruned_and_the_state_of_runs_stays(device: Device) -> None:
    for name, size in {"store/" + "a" * 64: 3_000_000, "runs/0123456789abcdef/residual": 2_000_000}.items():
        (device.home / name).parent.mkdir(parents=True)
        (device.home / name).write_bytes(bytes(size))
    listed = device.run("cache", "list", "--json")
    assert listed.json["bytes"] == {"store": 3_000_000, "runs": 2_000_000}
    assert listed.err.splitlines() == [f"  2.86 MiB  {device.home / 'store'}", f"  1.91 MiB  {device.home / 'runs'}"]
    pruned = device.run("cache", "prune", "--json")
    assert (pruned.status, pruned.json["freed_bytes"], pruned.err) == (0, 3_000_000, "freed 2.86 MiB\n")
    assert device.run("cache", "list", "--json").json["bytes"] == {"store": 0, "runs": 2_000_000}


def test_data_check_shows_a_sample_as_it_is_trained_on(device: Device) -> None:
    device.file("visits.jsonl", GOOD_ROWS)
    template = {"FEDSODA_PROMPT": "Report: {report}", "FEDSODA_COMPLETION": "{department}"}
    ran = device.run("data", "check", "visits.jsonl", "--column", "report=text", "--json", **template)
    assert ran.status == 0
    found = ran.json
    assert (found["rows"], found["duplicates"], found["lengths"]) == (2, 0, None)
    assert found["columns"] == {"text": "str", "department": "str", "report": "str"}
    assert found["samples"][0] == {
        "line": 1,
        "prompt": "Report: fever",
        "completion": "er",
        "joined": " ",
        "supervised": [],
    }
    assert ran.err.startswith(
        "2 rows of JSON: 2 taken, 0 skipped\n"
        "columns: text (str), department (str), report (str)\n"
        "--- sample 1 (line 1)\nReport: fever >>> ␣er\n"
    )
    assert "name a model's directory with --tokenizer" in ran.err


def test_data_check_counts_what_truncation_would_skip(device: Device, ref24: Path) -> None:
    long = json.dumps({"prompt": "fever " * 50, "completion": "er"})
    device.file("visits.jsonl", '{"prompt": "fever", "completion": "er"}\n' + long)
    check = ("data", "check", "visits.jsonl", "--tokenizer", str(ref24), "--json")
    ran = device.run(*check, "--max-length", "20")
    assert ran.status == 0
    assert (ran.json["rows"], ran.json["skipped"], ran.json["truncated"]) == (2, 1, 0)
    lengths = ran.json["lengths"]
    assert 2 <= lengths["min"] < 20 < 50 < lengths["max"]
    assert sum(bar["rows"] for bar in lengths["histogram"]) == 2
    ran = device.run(*check, FEDSODA_MAX_LENGTH="1")
    assert ran.status == 2
    assert re.search(r"none of the 2 rows .* within 1 ids; max_length = \d+ keeps 90 % of them", ran.json["message"])
