"""The house stands: who may import whom, which files may touch the network, what may never become code.

Checkers read source with `ast` and see imports at every depth, so a lazy import inside a function counts.
Each is shown to fail on a planted defect. What the code computes is tested beside the packages' mirrors.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT

Sources = Mapping[str, str]  # "fedsoda_edge/network/hub_transport.py" -> its text
Checker = Callable[[Sources], list[str]]

HUB_MAY_IMPORT = ("protocol", "model", "ports", "data", "errors")
HUB_EXTRA = {  # a comparison runs edges in its own process, and trains without a federation to compare with
    "fedsoda_hub/local/in_process.py": ("agent", "config", "worker"),
    "fedsoda_hub/compare/central.py": ("border", "training"),
}
NETWORK_FILES = ("fedsoda_edge/network/hub_transport.py", "fedsoda_hub/serving/listener.py")
SYSTEM_FILE = "fedsoda_edge/ports/system.py"
NETWORK = {"httpx", "websockets", "uvicorn", "starlette", "socket", "ssl", "requests", "aiohttp", "urllib.request"}
NETWORK |= {"http.client", "http.server", "socketserver"}
TENSORS = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
OUTER_WORLD = TENSORS | NETWORK | {"numpy", "safetensors", "asyncio", "threading", "subprocess", "signal", "select"}
OUTER_WORLD |= {"time", "datetime", "sqlite3", "os", "pathlib", "shutil", "tempfile", "io", "selectors"}
RUNS_CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing", "runpy"}
HOLDS_A_SOCKET = (
    "fedsoda_edge.edge",
    "fedsoda_edge.join.agent",
    "fedsoda_edge.network.hub_transport",
    "fedsoda_hub.serving.daemon",
    "fedsoda_hub.serving.listener",
)
LIGHT = ("fedsoda_edge", "fedsoda_edge.cli", "fedsoda_hub.cli", *HOLDS_A_SOCKET)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    files = [path for package in ("fedsoda_edge", "fedsoda_hub") for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


# -- reading --------------------------------------------------------------------------------------------


def imports(file: str, text: str) -> Iterator[str]:
    """Every name the file may import, as an absolute dotted path; `from a import b` gives a and a.b."""
    package = Path(file).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def below(name: str, tops: set[str]) -> str | None:
    """The entry of `tops` that is `name` or a package above it."""
    parts = name.split(".")
    return next((top for i in range(len(parts)) if (top := ".".join(parts[: i + 1])) in tops), None)


def module_name(file: str) -> str:
    return ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")


def reachable(start: str, sources: Sources) -> dict[str, str]:
    """Modules of ours that `start` can load, directly or through others, each with the module that names it."""
    files = {module_name(file): file for file in sources}
    found = {start: start} if start in files else {}
    queue = list(found)
    while queue:
        module = queue.pop()
        for name in imports(files[module], sources[files[module]]):
            # A package above a named module only runs its __init__, whose names are lazy: LIGHT loads them for real.
            if name in files and name not in found:
                found[name] = module
                queue.append(name)
    return found


# -- the rules ------------------------------------------------------------------------------------------


def edge_never_imports_hub(sources: Sources) -> list[str]:
    return [
        f"{file} imports {name}; the edge never imports the hub"
        for file, text in sources.items()
        if file.startswith("fedsoda_edge/")
        for name in imports(file, text)
        if below(name, {"fedsoda_hub"})
    ]


def hub_imports_the_contract_only(sources: Sources) -> list[str]:
    wrong = []
    for file, text in sources.items():
        if not file.startswith("fedsoda_hub/"):
            continue
        allowed = {f"fedsoda_edge.{name}" for name in (*HUB_MAY_IMPORT, *HUB_EXTRA.get(file, ()))}
        names = [name for name in imports(file, text) if below(name, {"fedsoda_edge"})]
        for name in names:
            # `from fedsoda_edge import data` also gives the bare package: judged by what is taken from it.
            if name == "fedsoda_edge" and any(other != name for other in names):
                continue
            if not below(name, allowed):
                wrong.append(f"{file} imports {name}; of the edge, the hub imports {', '.join(HUB_MAY_IMPORT)}")
    return wrong


def decisions_are_pure(sources: Sources) -> list[str]:
    """`protocol` and `federation`: no tensors, sockets, clock or disk, not even through a module of ours."""
    wrong = []
    for file, text in sources.items():
        if not file.startswith(("fedsoda_edge/protocol/", "fedsoda_hub/federation/")):
            continue
        ours = {"fedsoda_edge.protocol", "fedsoda_edge.errors", "fedsoda_hub.federation"}
        for name in imports(file, text):
            if below(name, OUTER_WORLD):
                wrong.append(f"{file} imports {name}; decisions are events in, effects out")
            if below(name, {"fedsoda_edge", "fedsoda_hub"}) and not below(name, ours):
                wrong.append(f"{file} imports {name}; pure rooms import protocol, errors and each other")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("open", "input"):
                wrong.append(f"{file}:{node.lineno} calls {node.func.id}(); the disk is a port")
    return wrong


def transport_cannot_name_private_text(sources: Sources) -> list[str]:
    private = {f"fedsoda_edge.{name}" for name in ("data", "border", "training", "worker")}
    return [
        f"fedsoda_edge.transport reaches {module} through {through}; the network cannot name private text"
        for module, through in reachable("fedsoda_edge.network.hub_transport", sources).items()
        if module in private
    ]


def only_two_files_touch_the_network(sources: Sources) -> list[str]:
    return [
        f"{file} imports {name}; only {' and '.join(NETWORK_FILES)} touch the network"
        for file, text in sources.items()
        if file not in NETWORK_FILES
        for name in imports(file, text)
        if below(name, NETWORK)
    ]


def no_tensors_where_a_socket_is(sources: Sources) -> list[str]:
    """A heartbeat must survive a long training step, and an out-of-memory kill must not take the socket along."""
    files = {module_name(file): file for file in sources}
    return [
        f"{start} reaches {module} (through {through}), which imports {name}; tensors live in child processes"
        for start in HOLDS_A_SOCKET
        for module, through in reachable(start, sources).items()
        for name in imports(files[module], sources[files[module]])
        if below(name, TENSORS)
    ]


def nothing_received_becomes_code(sources: Sources) -> list[str]:
    wrong = []
    for file, text in sources.items():
        wrong += [f"{file} imports {name}, which runs code" for name in imports(file, text) if below(name, RUNS_CODE)]
        for node in ast.walk(ast.parse(text)):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
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


def one_file_knows_operating_systems(sources: Sources) -> list[str]:
    """What cannot be run on every system is in one place, to be read as a whole."""
    asks = ("sys.platform", "os.name", "platform.system", "platform.release")
    only_there = {"fcntl", "msvcrt", "resource", "pwd", "grp", "winreg"}
    wrong = []
    for file, text in sources.items():
        if file == SYSTEM_FILE:
            continue
        wrong += [
            f"{file} imports {name}, which some systems lack" for name in imports(file, text) if name in only_there
        ]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in asks:
                wrong.append(f"{file}:{node.lineno} asks {ast.unparse(node)}; {SYSTEM_FILE} knows")
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/proc/"):
                wrong.append(f"{file}:{node.lineno} reads {node.value}, which only Linux has")
    return wrong


def every_file_has_a_name(sources: Sources) -> list[str]:
    return [f"{file}: name the idea it holds" for file in sources if Path(file).stem in ("utils", "util", "helpers")]


RULES: list[Checker] = [
    edge_never_imports_hub,
    hub_imports_the_contract_only,
    decisions_are_pure,
    transport_cannot_name_private_text,
    only_two_files_touch_the_network,
    no_tensors_where_a_socket_is,
    nothing_received_becomes_code,
    one_file_knows_operating_systems,
    every_file_has_a_name,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_packages_keep(rule: Checker, sources: dict[str, str]) -> None:
    assert rule(sources) == []


EDGE, HUB = "fedsoda_edge/planted.py", "fedsoda_hub/planted.py"
PROTOCOL, FEDERATION = "fedsoda_edge/protocol/planted.py", "fedsoda_hub/federation/planted.py"
TRANSPORT = "fedsoda_edge/network/hub_transport.py"


@pytest.mark.parametrize(
    ("rule", "planted"),
    [
        (edge_never_imports_hub, {EDGE: "def f():\n    from fedsoda_hub.ledger import Ledger"}),
        (edge_never_imports_hub, {EDGE: "import fedsoda_hub"}),
        (hub_imports_the_contract_only, {HUB: "from fedsoda_edge.training import fine_tune"}),
        (hub_imports_the_contract_only, {HUB: "from fedsoda_edge import data, store"}),
        (hub_imports_the_contract_only, {HUB: "import fedsoda_edge"}),
        (hub_imports_the_contract_only, {"fedsoda_hub/compare/run.py": "from fedsoda_edge.worker import main"}),
        (decisions_are_pure, {FEDERATION: "from time import monotonic"}),
        (decisions_are_pure, {FEDERATION: "from fedsoda_hub.ledger import Ledger"}),
        (decisions_are_pure, {FEDERATION: "from ..ledger import Ledger"}),
        (decisions_are_pure, {PROTOCOL: "import asyncio"}),
        (decisions_are_pure, {PROTOCOL: "import torch.nn"}),
        (decisions_are_pure, {PROTOCOL: "def f(p):\n    return open(p)"}),
        (transport_cannot_name_private_text, {TRANSPORT: "from fedsoda_edge.data import LocalData"}),
        (transport_cannot_name_private_text, {TRANSPORT: "from . import data", "fedsoda_edge/data/local_data.py": ""}),
        (
            transport_cannot_name_private_text,
            {TRANSPORT: "from fedsoda_edge.planted import x", EDGE: "from . import data"},
        ),
        (only_two_files_touch_the_network, {EDGE: "def f():\n    import httpx"}),
        (only_two_files_touch_the_network, {HUB: "from starlette.requests import Request"}),
        (only_two_files_touch_the_network, {HUB: "from urllib.request import urlopen"}),
        (no_tensors_where_a_socket_is, {"fedsoda_edge/edge.py": "def f():\n    import torch"}),
        (
            no_tensors_where_a_socket_is,
            {"fedsoda_hub/serving/daemon.py": "from fedsoda_hub import planted", HUB: "import peft"},
        ),
        (nothing_received_becomes_code, {HUB: "import pickle"}),
        (nothing_received_becomes_code, {HUB: "from multiprocessing import Process"}),
        (nothing_received_becomes_code, {HUB: "Model.from_pretrained(path, trust_remote_code=True)"}),
        (nothing_received_becomes_code, {HUB: "Model.from_pretrained(path, **{'trust_remote_code': True})"}),
        (nothing_received_becomes_code, {EDGE: "state = torch.load(path, weights_only=True)"}),
        (nothing_received_becomes_code, {EDGE: "import importlib\nimportlib.import_module(message.kind)"}),
        (nothing_received_becomes_code, {EDGE: "import subprocess\nsubprocess.run(line, shell=True)"}),
        (one_file_knows_operating_systems, {HUB: "import sys\nif sys.platform == 'win32':\n    pass"}),
        (one_file_knows_operating_systems, {EDGE: "def f():\n    import fcntl"}),
        (one_file_knows_operating_systems, {EDGE: "open('/proc/self/status')"}),
        (every_file_has_a_name, {"fedsoda_hub/algorithms/utils.py": ""}),
    ],
)
def test_a_rule_fails_on_a_planted_defect(rule: Checker, planted: dict[str, str]) -> None:
    sources = {"fedsoda_edge/data/local_data.py": "", **planted}
    assert rule(sources), f"{rule.__name__} let {planted} pass"


def test_what_the_rules_allow_passes() -> None:
    allowed = {
        "fedsoda_hub/compare/central.py": "from fedsoda_edge.training import fine_tune\nfrom fedsoda_edge import data",
        "fedsoda_hub/preparation/prepare.py": "from fedsoda_edge.model import lora\nfrom fedsoda_edge import errors\nimport torch",
        "fedsoda_hub/federation/rounds.py": "import random\nfrom fedsoda_edge.protocol.messages import Receipt",
        "fedsoda_hub/serving/listener.py": "import uvicorn",
        "fedsoda_edge/network/hub_transport.py": "import ssl\nfrom .protocol import codec\nfrom . import errors",
        "fedsoda_edge/edge.py": "import asyncio\nfrom fedsoda_edge.transport import connect\nmodel.eval()",
    }
    assert [line for rule in RULES for line in rule(allowed)] == []


# -- what really loads ----------------------------------------------------------------------------------

PROBE = """
import contextlib, importlib, io, json, sys
modules, heavy = map(json.loads, sys.argv[1:])
loaded = {}
for name in modules:
    module = importlib.import_module(name)
    if name.endswith(".cli"):
        sys.argv = [name, "--help"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            module.main()
    loaded[name] = [package for package in heavy if package in sys.modules]
print(json.dumps(loaded))
"""


def heavy_modules(modules: tuple[str, ...], path: Path = ROOT) -> dict[str, list[str]]:
    """For each module, in one fresh interpreter in this order, which heavy packages are loaded after it."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(modules), json.dumps(sorted(TENSORS | {"numpy"}))],
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


def test_importing_the_agents_and_their_help_loads_no_tensor_library() -> None:
    there = tuple(name for name in LIGHT if list(ROOT.glob(name.replace(".", "/") + "*")))
    assert heavy_modules(there) == {name: [] for name in there}


def test_a_loaded_tensor_library_is_seen(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")  # stands in for the real one, which takes seconds to load
    (tmp_path / "planted.py").write_text("import torch")
    assert heavy_modules(("json", "planted"), tmp_path) == {"json": [], "planted": ["torch"]}


# -- the top level --------------------------------------------------------------------------------------


def test_the_top_level_is_the_users() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of what belongs to it")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    allowed = {"fedsoda_edge", "fedsoda_hub", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE"}
    assert {file.split("/")[0] for file in listed} <= allowed | {".gitignore", ".ci"}
