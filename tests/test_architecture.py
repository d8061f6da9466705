"""The house stands: who may import whom, which files may touch the network, what may never become code.

One table says what each room may import, of ours and of the outer world. Files are read by `scripts/structure.py`: parsed
once, walked once, imports seen at every depth and for types alone too. Every rule is shown to fail on planted defects.
How large things may be is tests/test_structure.py's matter.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from structure import PACKAGES, Source, circles, import_graph, nearest, parse, read

from tests.conftest import ROOT

Checker = Callable[[Sequence[Source]], list[str]]

# -- the table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """What a room's files may import, beside each other and what is in no list below.

    ours: rooms, or single files of rooms. world: packages of others, and parts of the standard library by group.
    """

    ours: str = ""
    world: str = ""


# Parts of the standard library that a room must ask for, and packages that bring tensors.
GROUPS = {
    "asyncio": {"asyncio"},
    "clock": {"time", "datetime"},
    "disk": {"os", "pathlib", "shutil", "tempfile", "io", "mmap", "glob"},
    "sqlite3": {"sqlite3"},
    "processes": {"subprocess", "threading", "concurrent", "signal", "ctypes", "fcntl", "msvcrt", "resource"},
    "network": {"socket", "ssl", "select", "selectors", "http.client", "http.server", "socketserver", "urllib.request"},
    "tensors": {
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "safetensors",
        "numpy",
        "huggingface_hub",
    },
}
GUARDED = {name for group in ("asyncio", "clock", "disk", "sqlite3", "processes", "network") for name in GROUPS[group]}

# A room is a file, a folder, or what is left of a folder whose other files have rows of their own.
# "edge.x" is fedsoda_edge/x, "hub.x" is fedsoda_hub/x.
_SIZES = "edge.errors edge.units edge.protocol"
_JOIN = f"{_SIZES} edge.events edge.ports edge.data edge.device edge.device.facts edge.device.sensors"
_CONTRACT = f"{_SIZES} edge.ports edge.model edge.data"
_TORCH_ROOM = f"{_CONTRACT} hub.settings hub.algorithms hub.run"
_ABOVE = (
    f"{_CONTRACT} edge.ports.console edge.ports.program hub.events hub.settings hub.federation hub.run hub.serving "
    "hub.algorithms hub.preparation hub.plan hub.evaluation hub.compute hub.report"
)
_ANY_STDLIB = "asyncio clock disk processes"
HOUSE = {
    "edge": Room("edge.errors edge.data edge.edge edge.cli"),
    "edge.errors": Room(),
    "edge.units": Room("edge.errors"),  # of these two, the errors are below: what is not a size is a UsageProblem
    "edge.protocol": Room("edge.errors edge.units", "msgspec cryptography"),
    "edge.events": Room(_SIZES, "msgspec"),
    # `protocol`: TorchPort names the typed calls of protocol/calls.py to the processes that own torch.
    "edge.ports": Room(_SIZES, f"{_ANY_STDLIB} psutil msgspec"),
    "edge.ports.console": Room(f"{_SIZES} edge.ports", "clock disk processes typer rich"),
    "edge.ports.program": Room("edge.ports edge.ports.console", "typer"),
    # `tokenizers`: a model directory is refused where its tokenizer.json cannot be read.
    "edge.ports.setting_table": Room("", "rich"),
    "edge.ports.log_options": Room("", "disk typer"),
    "edge.ports.given_options": Room("edge.units edge.ports.log_options", "typer"),
    # The manager's socket; what is said there never leaves the machine.
    "edge.ports.service": Room("edge.errors edge.ports", "asyncio disk network"),
    "edge.model": Room(f"{_SIZES} edge.ports.disk edge.ports.system", "disk processes tensors tokenizers msgspec"),
    # Of tables: nothing imports their libraries before a user names a file of that kind.
    "edge.data": Room(_SIZES, "disk processes tokenizers jinja2 pyarrow zstandard python_calamine"),
    "edge.device": Room(_SIZES, "msgspec"),
    "edge.device.facts": Room(f"{_SIZES} edge.device edge.ports.machine", "disk psutil pynvml"),
    "edge.device.sensors": Room(f"{_SIZES} edge.device", "psutil pynvml"),
    "edge.network": Room(
        "edge.errors edge.protocol", "asyncio clock disk network httpx websockets certifi msgspec cryptography"
    ),
    "edge.join": Room(_JOIN, f"{_ANY_STDLIB} psutil platformdirs msgspec"),
    "edge.join.doctor": Room(f"{_JOIN} edge.join edge.network", f"{_ANY_STDLIB} msgspec"),
    "edge.worker": Room(
        f"{_SIZES} edge.ports edge.data edge.model", "clock disk processes tensors psutil cryptography msgspec"
    ),
    "edge.edge": Room(f"{_JOIN} edge.join edge.join.doctor edge.network", f"{_ANY_STDLIB} msgspec"),
    "edge.testing": Room(f"{_SIZES} edge.ports edge.model", "asyncio clock disk processes tensors tokenizers msgspec"),
    "edge.cli": Room(
        f"{_JOIN} edge.ports.console edge.ports.program edge.ports.given_options edge.ports.setting_table edge.ports.log_options edge.ports.service edge.join edge.join.doctor edge.network edge.edge",
        f"{_ANY_STDLIB} typer rich msgspec platformdirs",
    ),
    "hub": Room("hub.cli"),
    "hub.events": Room(f"{_SIZES} hub.federation hub.run", "msgspec"),
    "hub.settings": Room(_SIZES, "disk msgspec"),
    "hub.federation": Room("edge.errors edge.protocol", "msgspec"),
    "hub.run": Room(f"{_SIZES} edge.ports hub.federation", "clock disk processes sqlite3 msgspec"),
    # `network.tls`: both sides know a TLS key by its pin, and the hub's own commands ask their hub by it. `device.sensors`:
    # the metrics show how much GPU memory the process that owns torch holds.
    "hub.serving": Room(
        f"{_SIZES} edge.ports edge.network.tls edge.device.sensors hub.settings hub.federation hub.run hub.events",
        f"{_ANY_STDLIB} network starlette uvicorn websockets httpx msgspec cryptography prometheus_client segno",
    ),
    "hub.algorithms": Room(f"{_SIZES} edge.model hub.settings.tables", "tensors msgspec"),
    # Their results are what the jobs that ask for them promise.
    "hub.preparation": Room(
        f"{_TORCH_ROOM} hub.federation.jobs", "disk processes tensors tokenizers gguf psutil msgspec"
    ),
    "hub.plan": Room(f"{_TORCH_ROOM} hub.federation hub.preparation", "disk tensors msgspec"),
    "hub.evaluation": Room(
        f"{_CONTRACT} hub.settings hub.federation.jobs hub.preparation hub.run", "disk tensors msgspec"
    ),
    "hub.compute": Room(
        f"{_TORCH_ROOM} hub.federation.jobs hub.preparation hub.evaluation", "disk processes tensors msgspec"
    ),
    "hub.report": Room(f"{_SIZES} edge.ports hub.settings hub.federation hub.run", "clock disk matplotlib msgspec"),
    "hub.local": Room(f"{_ABOVE} edge.events", f"{_ANY_STDLIB} msgspec"),
    # A comparison runs edges in its own process.
    "hub.local.in_process": Room(f"{_ABOVE} hub.local edge.events edge.join edge.worker", f"{_ANY_STDLIB} msgspec"),
    "hub.compare": Room(
        f"{_ABOVE} edge.events hub.local hub.local.in_process hub.compare.central",
        f"{_ANY_STDLIB} tensors matplotlib msgspec scipy",
    ),
    # It also trains without a federation, to compare with.
    "hub.compare.central": Room(f"{_ABOVE} edge.worker", "disk tensors msgspec"),
    "hub.demo": Room(f"{_ABOVE} edge.events hub.local edge.join.trainer", f"{_ANY_STDLIB} rich msgspec"),
    "hub.cli": Room(
        f"{_ABOVE} edge.ports.setting_table edge.ports.given_options edge.ports.log_options edge.ports.service hub.local hub.compare hub.demo",
        f"{_ANY_STDLIB} typer rich msgspec",
    ),
}
MODULES = {f"fedsoda_{name}": name for name in HOUSE}
SHORT = {"fedsoda_edge": "edge", "fedsoda_hub": "hub"}
MADE_OF_TORCH = {name for name, room in HOUSE.items() if "tensors" in room.world.split()}
# These run in processes that hold a socket; no tensor library may come along.
HOLD_A_SOCKET = (
    *("edge", "edge.edge", "edge.join", "edge.join.doctor", "edge.network", "edge.ports.service", "edge.cli"),
    "hub.serving",
)
PURE = ("edge.errors", "edge.units", "edge.protocol", "edge.events", "edge.device", "hub.federation", "hub.events")


def room_of(name: str) -> str | None:
    """The room of a file or of what it holds, by its dotted name."""
    return MODULES.get(nearest(name, MODULES) or "")


def short(name: str) -> str:
    """A dotted name as the table writes it."""
    top, dot, rest = name.partition(".")
    return SHORT[top] + dot + rest


def is_ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def row(room: str) -> set[str]:
    """The rooms that a row of the table names; a file stands for its room."""
    return {one if one in HOUSE else one.rpartition(".")[0] for one in HOUSE[room].ours.split()}


def rooms_below(room: str) -> set[str]:
    """The rooms that files of this one may load, directly or through others."""
    found, queue = set[str](), [room]
    while queue:
        new = row(queue.pop()) - found
        found |= new
        queue.extend(new)
    return found


def test_the_table_has_no_circle() -> None:
    graph = {room: row(room) for room in HOUSE}
    assert set().union(*graph.values()) <= HOUSE.keys(), "a row names a room that has no row"
    assert circles(graph) == []


def test_the_room_of_the_network_cannot_name_private_text() -> None:
    assert rooms_below("edge.network") == {"edge.errors", "edge.units", "edge.protocol"}
    assert not rooms_below("hub.serving") & {"edge.data", "edge.worker"}


def test_no_room_with_a_socket_reaches_tensors() -> None:
    """A heartbeat must survive a long training step, and an out-of-memory kill must not take the socket along."""
    for room in (*HOLD_A_SOCKET, "hub.report"):
        assert not ({room} | rooms_below(room)) & MADE_OF_TORCH, room


def test_pure_rooms_ask_for_no_tensors_sockets_clock_or_disk() -> None:
    for room in PURE:
        assert set(HOUSE[room].world.split()) <= {"msgspec", "cryptography"}, room


# -- the rules ------------------------------------------------------------------------------------------

NETWORK_FILES = (
    *(
        f"fedsoda_edge/network/{name}.py"
        for name in ("route", "tls", "checks", "answers", "proving", "mirror", "hub_transport", "own_page")
    ),
    "fedsoda_edge/ports/service.py",
    "fedsoda_hub/serving/strangers.py",
    "fedsoda_hub/serving/guarded.py",
    "fedsoda_hub/serving/tls.py",
    "fedsoda_hub/serving/webhook.py",
    "fedsoda_hub/serving/listener.py",
    "fedsoda_hub/serving/neighbours.py",
    "fedsoda_hub/serving/ordering.py",
    "fedsoda_hub/serving/page.py",
)
SYSTEM_FILE = "fedsoda_edge/ports/system.py"
RUNS_CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "runpy"}


def every_file_has_a_room(sources: Sequence[Source]) -> list[str]:
    """Beside the rooms stand `__init__` and `__main__` alone."""
    return [
        f"{source.path} has no row in the table"
        for source in sources
        if (room := room_of(source.module)) is None
        or (room in SHORT.values() and source.module not in (*SHORT, *(f"{top}.__main__" for top in SHORT)))
    ]


def rooms_import_what_the_table_says(sources: Sequence[Source]) -> list[str]:
    wrong = []
    for source in sources:
        room = room_of(source.module)
        if room is None:
            continue
        may = set(HOUSE[room].ours.split())
        files = may - HOUSE.keys()
        for name, line in source.imports:
            if is_ours(name):
                other = room_of(name)
                if other != room and other not in may and not nearest(short(name), files):
                    wrong.append(
                        f"{source.path}:{line} imports {name}; {room} may import {HOUSE[room].ours or 'none of ours'}"
                    )
    return wrong


def rooms_know_of_the_world_what_the_table_says(sources: Sequence[Source]) -> list[str]:
    """Of the standard library, what is in no group is for everybody; a package of others is for who names it."""
    wrong = []
    for source in sources:
        words = HOUSE[room_of(source.module) or "edge.errors"].world.split()
        allowed = {name for word in words for name in GROUPS.get(word, {word})}
        for name, line in source.imports:
            top = name.split(".")[0]
            if is_ours(name) or nearest(name, allowed):
                continue
            if top not in sys.stdlib_module_names or nearest(name, GUARDED):
                wrong.append(
                    f"{source.path}:{line} imports {name}; its room may import {' '.join(words) or 'nothing of others'}"
                )
    return wrong


def few_files_touch_the_network(sources: Sequence[Source]) -> list[str]:
    network = GROUPS["network"] | {"httpx", "websockets", "uvicorn", "starlette", "requests", "aiohttp"}
    return [
        f"{source.path}:{line} imports {name}; only {' and '.join(NETWORK_FILES)} touch the network"
        for source in sources
        if source.path not in NETWORK_FILES
        for name, line in source.imports
        if nearest(name, network)
    ]


def pure_rooms_open_nothing(sources: Sequence[Source]) -> list[str]:
    return [
        f"{source.path}:{node.lineno} calls {node.func.id}(); the disk is a port"
        for source in sources
        if room_of(source.module) in PURE
        for node in source.nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "input", "print")
    ]


def files_have_no_circle(sources: Sequence[Source]) -> list[str]:
    return [f"{' <-> '.join(circle)} import each other" for circle in circles(import_graph(sources))]


def nothing_received_becomes_code(sources: Sequence[Source]) -> list[str]:
    wrong = []
    for source in sources:
        wrong += [
            f"{source.path}:{line} imports {name}, which runs code"
            for name, line in source.imports
            if nearest(name, RUNS_CODE)
        ]
        for node in source.nodes:
            where = f"{source.path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                wrong.append(f"{where} passes trust_remote_code")
            if isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "auto_map"):
                wrong.append(f"{where} names {node.value}")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__", "importlib.import_module", "import_module"):
                wrong.append(f"{where} calls {called}()")
            if called in ("torch.load", "torch.save"):
                wrong.append(f"{where} calls {called}(); tensors are stored as safetensors")
            if called in ("os.system", "os.popen") or any(
                keyword.arg == "shell"
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
                for keyword in node.keywords
            ):
                wrong.append(f"{where} runs a shell")
    return wrong


def one_file_knows_operating_systems(sources: Sequence[Source]) -> list[str]:
    """What cannot be run on every system is in one place, to be read as a whole."""
    asks = ("sys.platform", "os.name", "platform.system", "platform.release")
    only_there = {"fcntl", "msvcrt", "resource", "pwd", "grp", "winreg"}
    wrong = []
    for source in sources:
        if source.path == SYSTEM_FILE:
            continue
        wrong += [
            f"{source.path}:{line} imports {name}, which some systems lack"
            for name, line in source.imports
            if nearest(name, only_there)
        ]
        for node in source.nodes:
            if isinstance(node, ast.Attribute) and ast.unparse(node) in asks:
                wrong.append(f"{source.path}:{node.lineno} asks {ast.unparse(node)}; {SYSTEM_FILE} knows")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/proc/"):
                wrong.append(f"{source.path}:{node.lineno} reads {node.value}, which only Linux has")
    return wrong


def every_file_names_its_idea(sources: Sequence[Source]) -> list[str]:
    vague = ("utils", "util", "helpers", "helper", "misc", "common")
    return [f"{source.path}: name the idea it holds" for source in sources if Path(source.path).stem in vague]


RULES: list[Checker] = [
    every_file_has_a_room,
    rooms_import_what_the_table_says,
    rooms_know_of_the_world_what_the_table_says,
    few_files_touch_the_network,
    pure_rooms_open_nothing,
    files_have_no_circle,
    nothing_received_becomes_code,
    one_file_knows_operating_systems,
    every_file_names_its_idea,
]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return read(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_packages_keep(rule: Checker, sources: list[Source]) -> None:
    wrong = rule(sources)
    assert not wrong, "\n".join(wrong)


# -- the rules fail on planted defects --------------------------------------------------------------------

EDGE, CLI = "fedsoda_edge/join/planted.py", "fedsoda_hub/cli/planted.py"
PROTOCOL, FEDERATION = "fedsoda_edge/protocol/planted.py", "fedsoda_hub/federation/planted.py"
NETWORK = "fedsoda_edge/network/hub_transport.py"


@pytest.mark.parametrize(
    ("rule", "planted"),
    [
        (every_file_has_a_room, {"fedsoda_edge/planted.py": ""}),
        (every_file_has_a_room, {"fedsoda_hub/planted/file.py": ""}),
        (every_file_has_a_room, {"fedsoda_third/__init__.py": ""}),
        # the edge never imports the hub; the hub imports the contract only
        (rooms_import_what_the_table_says, {EDGE: "def f():\n    from fedsoda_hub.run.ledger import Ledger"}),
        (rooms_import_what_the_table_says, {EDGE: "import fedsoda_hub"}),
        (
            rooms_import_what_the_table_says,
            {"fedsoda_hub/plan.py": "from fedsoda_edge.worker.training import fine_tune"},
        ),
        (rooms_import_what_the_table_says, {"fedsoda_hub/plan.py": "from fedsoda_edge import data, device"}),
        (rooms_import_what_the_table_says, {CLI: "import fedsoda_edge"}),
        (rooms_import_what_the_table_says, {"fedsoda_hub/compare/run.py": "from fedsoda_edge.worker import main"}),
        (rooms_import_what_the_table_says, {"fedsoda_hub/demo/run.py": "from fedsoda_edge.join.agent import Agent"}),
        # arrows run one way, for types too
        (rooms_import_what_the_table_says, {FEDERATION: "from fedsoda_hub.run.ledger import Ledger"}),
        (rooms_import_what_the_table_says, {FEDERATION: "from ..run.ledger import Ledger"}),
        (
            rooms_import_what_the_table_says,
            {FEDERATION: "if TYPE_CHECKING:\n    from fedsoda_hub.serving.daemon import Daemon"},
        ),
        (rooms_import_what_the_table_says, {"fedsoda_hub/compute.py": "from fedsoda_hub.federation import rounds"}),
        (
            rooms_import_what_the_table_says,
            {"fedsoda_hub/algorithms/planted.py": "from fedsoda_hub.settings import run"},
        ),
        (
            rooms_import_what_the_table_says,
            {"fedsoda_edge/model/planted.py": "from fedsoda_edge.ports.child import Child"},
        ),
        # the network cannot name private text
        (rooms_import_what_the_table_says, {NETWORK: "from fedsoda_edge.data.local_data import LocalData"}),
        (rooms_import_what_the_table_says, {NETWORK: "from .. import data"}),
        (rooms_import_what_the_table_says, {EDGE: "from fedsoda_edge.ports.console import note"}),
        (rooms_know_of_the_world_what_the_table_says, {EDGE: "def f():\n    import httpx"}),
        (rooms_know_of_the_world_what_the_table_says, {CLI: "from starlette.requests import Request"}),
        (rooms_know_of_the_world_what_the_table_says, {CLI: "from urllib.request import urlopen"}),
        (few_files_touch_the_network, {"fedsoda_hub/serving/daemon.py": "def f():\n    import httpx"}),
        (few_files_touch_the_network, {"fedsoda_edge/network/policy.py": "from ssl import create_default_context"}),
        (rooms_know_of_the_world_what_the_table_says, {"fedsoda_edge/edge.py": "def f():\n    import torch"}),
        (rooms_know_of_the_world_what_the_table_says, {"fedsoda_hub/serving/daemon.py": "import peft"}),
        (rooms_know_of_the_world_what_the_table_says, {"fedsoda_edge/worker/planted.py": "import asyncio"}),
        (rooms_know_of_the_world_what_the_table_says, {"fedsoda_edge/worker/planted.py": "import typer"}),
        (rooms_know_of_the_world_what_the_table_says, {"fedsoda_edge/device/fit.py": "import psutil"}),
        (rooms_know_of_the_world_what_the_table_says, {"fedsoda_edge/device/pause_rules.py": "import os"}),
        (rooms_know_of_the_world_what_the_table_says, {FEDERATION: "from time import monotonic"}),
        (rooms_know_of_the_world_what_the_table_says, {PROTOCOL: "import asyncio"}),
        (rooms_know_of_the_world_what_the_table_says, {PROTOCOL: "import torch.nn"}),
        (pure_rooms_open_nothing, {PROTOCOL: "def f(p):\n    return open(p)"}),
        (
            files_have_no_circle,
            {
                "fedsoda_edge/join/a.py": "from fedsoda_edge.join.b import B",
                "fedsoda_edge/join/b.py": "from fedsoda_edge.join import c",
                "fedsoda_edge/join/c.py": "if TYPE_CHECKING:\n    from .a import A",
            },
        ),
        (nothing_received_becomes_code, {CLI: "import pickle"}),
        (nothing_received_becomes_code, {CLI: "from multiprocessing import Process"}),
        (nothing_received_becomes_code, {CLI: "Model.from_pretrained(path, trust_remote_code=True)"}),
        (nothing_received_becomes_code, {CLI: "Model.from_pretrained(path, **{'trust_remote_code': True})"}),
        (nothing_received_becomes_code, {EDGE: "state = torch.load(path, weights_only=True)"}),
        (nothing_received_becomes_code, {EDGE: "import importlib\nimportlib.import_module(message.kind)"}),
        (nothing_received_becomes_code, {EDGE: "import subprocess\nsubprocess.run(line, shell=True)"}),
        (one_file_knows_operating_systems, {CLI: "import sys\nif sys.platform == 'win32':\n    pass"}),
        (one_file_knows_operating_systems, {EDGE: "def f():\n    import fcntl"}),
        (one_file_knows_operating_systems, {EDGE: "open('/proc/self/status')"}),
        (every_file_names_its_idea, {"fedsoda_hub/algorithms/utils.py": ""}),
    ],
)
def test_a_rule_fails_on_a_planted_defect(rule: Checker, planted: dict[str, str]) -> None:
    assert rule(parsed(planted)), f"{rule.__name__} let {planted} pass"


def parsed(files: Mapping[str, str]) -> list[Source]:
    return [parse(path, text) for path, text in files.items()]


def test_what_the_rules_allow_passes() -> None:
    allowed = {
        "fedsoda_edge/__init__.py": "from fedsoda_edge.errors import FedSODAError",
        "fedsoda_edge/edge.py": "import asyncio\nfrom fedsoda_edge.network.hub_transport import HubTransport\nmodel.eval()",
        "fedsoda_edge/network/hub_transport.py": "import ssl\nfrom ..protocol import codec\nfrom .. import errors",
        "fedsoda_edge/join/doctor.py": "from fedsoda_edge.network.hub_transport import HubTransport",
        "fedsoda_edge/model/border.py": "import torch\nfrom fedsoda_edge.ports.disk import sha256",
        "fedsoda_hub/algorithms/methods/interface.py": "from fedsoda_hub.settings.tables import Method",
        "fedsoda_hub/compare/central.py": "from fedsoda_edge.worker.training import fine_tune\nfrom fedsoda_edge import data",
        "fedsoda_hub/compute.py": "from fedsoda_hub.federation.jobs import Probe\nimport torch",
        "fedsoda_hub/demo/run.py": "from fedsoda_edge.join import trainer",
        "fedsoda_hub/federation/rounds.py": "import random\nfrom fedsoda_edge.protocol.messages import Receipt",
        "fedsoda_hub/preparation/prepare.py": "from fedsoda_edge.model import lora\nfrom fedsoda_edge import errors\nimport torch",
        "fedsoda_hub/serving/listener.py": "import uvicorn",
    }
    assert [line for rule in RULES for line in rule(parsed(allowed))] == []


# -- what really loads ----------------------------------------------------------------------------------

PROBE = """
import contextlib, importlib, io, json, sys
modules, heavy = map(json.loads, sys.argv[1:])
loaded = {}
for name in modules:
    module = importlib.import_module(name)
    if name.endswith(".cli.commands"):
        sys.argv = [name, "--help"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            module.main()
    loaded[name] = [package for package in heavy if package in sys.modules]
print(json.dumps(loaded))
"""


def heavy_modules(modules: Sequence[str], path: Path = ROOT) -> dict[str, list[str]]:
    """For each module, in one fresh interpreter in this order, which tensor libraries are loaded after it."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(modules), json.dumps(sorted(GROUPS["tensors"]))],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answer: dict[str, list[str]] = json.loads(run.stdout)
    return answer


def light(sources: Sequence[Source]) -> Iterator[str]:
    """Modules of processes that hold a socket, and both commands, which load what they need when they are used."""
    for source in sources:
        if room_of(source.module) in (*HOLD_A_SOCKET, "hub.cli") and not source.module.endswith("__main__"):
            yield source.module


def test_the_agents_the_daemon_and_both_helps_load_no_tensor_library(sources: list[Source]) -> None:
    modules = list(light(sources))
    assert {"fedsoda_edge", "fedsoda_edge.join.agent", "fedsoda_hub.serving.daemon"} <= set(modules)
    assert {name: found for name, found in heavy_modules(modules).items() if found} == {}


def test_a_loaded_tensor_library_is_seen(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")  # stands in for the real one, which takes seconds to load
    (tmp_path / "planted.py").write_text("import torch")
    assert heavy_modules(("json", "planted"), tmp_path) == {"json": [], "planted": ["torch"]}


# -- the top level --------------------------------------------------------------------------------------


def test_the_top_level_is_the_users() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of what belongs to it")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    allowed = {"fedsoda_edge", "fedsoda_hub", "tests", "scripts", "docs", "pyproject.toml", "README.md", "LICENSE"}
    assert {file.split("/")[0] for file in listed} <= allowed | {".gitignore", ".ci"}
