"""Part E of the cases: what containers, closed streams, file systems, clocks and signals do to hub and edge.

What this machine cannot do to a process is planted by a `sitecustomize` that the process loads: file systems without
locks, a clock that is ahead, another machine's control groups.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench_inputs_case import Case, Ended, command

QUICK = {"FEDSODA_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FEDSODA_NICE": "0"}
PATIENCE_SECONDS = 120.0
MIB = 1 << 20
RUN = """\
name = "case"
model = "model"
device = "cpu"
[listen]
port = 0
[public]
text = "public.txt"
sequences = 4
length = 16
[method]
emulator = "full"
adapter_layers = 1
[lora]
rank = 2
[local]
max_length = {max_length}
max_steps = 4
batch_size = 2
[rounds]
count = 1
min_edges = {min_edges}
deadline_seconds = 30.0
"""

NO_LOCKS = """
import errno, fcntl
def flock(file, how):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""
AHEAD = """
import time
_time = time.time
time.time = lambda: _time() + 1000 * 86400
"""
NO_USER = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
"""
SMALL_DISK = """
import shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1000)
"""
RECORDED = """
import builtins, io, os
_open, _root = io.open, os.environ["RECORDED_ROOT"]
def recorded(file, *arguments, **named):
    path = os.fspath(file) if not isinstance(file, int) else ""
    if str(path).startswith(("/proc/self/cgroup", "/proc/self/mountinfo", "/sys/fs/cgroup")):
        file = _root + path
    return _open(file, *arguments, **named)
io.open = builtins.open = recorded
"""


def planted(work: Path, code: str) -> dict[str, str]:
    """Make the environment of a process that runs this code first."""
    place = work / "planted"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(code, encoding="utf-8")
    return {**QUICK, "PYTHONPATH": os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))}


def without_rights() -> None:
    """Take from this process, and from what it becomes, what lets root write where nobody may."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def ran(
    words: list[str],
    environment: dict[str, str],
    *,
    shell: str = "",
    before: Callable[[], None] | None = None,
    lacking: tuple[str, ...] = (),
) -> Ended:
    """Run `python -m WORDS`, with its streams as the shell has them."""
    python = [sys.executable, "-m", *words]
    given = {name: value for name, value in {**os.environ, **environment}.items() if name not in lacking}
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *python],
        capture_output=True,
        text=True,
        errors="replace",
        env=given,
        timeout=PATIENCE_SECONDS,
        check=False,
        preexec_fn=before,  # no thread runs here
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@functools.cache
def model() -> Path:
    """Make a tiny checkpoint, once for all cases."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    place = Path(tempfile.mkdtemp(prefix="fedsoda-model-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: number for number, token in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(place / "tokenizer.json"))
    return place


def run_file(work: Path, *, max_length: int = 64, min_edges: int = 1) -> Path:
    """Write a run of the tiny checkpoint, with rows and without anything done."""
    if not (work / "model").exists():
        (work / "model").symlink_to(model())
    (work / "public.txt").write_text("the cat sat on the mat. " * 40)
    rows = [{"prompt": f"row {number}", "completion": "yes" if number % 2 else "no"} for number in range(6)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "run.toml").write_text(RUN.format(max_length=max_length, min_edges=min_edges))
    return work / "run.toml"


def with_token(work: Path, run: Path) -> Path:
    """Make an edge's token."""
    command("fedsoda_hub", "token", "create", str(run), "--name", "a", "--out", str(work / "a.token"), home=work)
    return work / "a.token"


@contextlib.contextmanager
def started(words: list[str], environment: dict[str, str], shell: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command with streams as the shell has them; it ends with the block."""
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-m", *words],
        env={**os.environ, **environment},
        # No thread runs here; under nohup a hang-up would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def address(run: Path) -> str:
    """Wait for the address of the hub that serves the run, and for the end of its preparation."""
    file, until = run.parent / "case.run" / "address", time.monotonic() + PATIENCE_SECONDS
    while not file.exists() or '"preparing"' in file.with_name("hub.json").read_text():
        assert time.monotonic() < until, "the hub never served"
        time.sleep(0.1)
    return file.read_text()


def serve(run: Path, *more: str) -> list[str]:
    """Return the words of the command that serves a run."""
    return ["fedsoda_hub", "serve", str(run), *more]


def join(url: str, token: Path, work: Path, *more: str) -> list[str]:
    """Return the words of the command that joins a run."""
    return ["fedsoda_edge", "join", url, "--token-file", str(token), "--data", str(work / "rows.jsonl"), *more]


def ended_ledger(work: Path) -> Path:
    """Leave the ledger of a run whose only round is closed, written by the standard library alone."""
    run, digest = run_file(work), "a" * 64
    with_token(work, run)
    records = [
        {"record": "run_started", "run_id": "1234", "fixed": {}},
        {"record": "prepared", "public_kl": dict.fromkeys(("pruned", "quantized", "aligned"), 0.1)}
        | dict.fromkeys(("manifest", "adapter_view", "emulator_view"), digest),
        {"record": "round_opened", "round": 1, "cohort": ["a"], "view": digest, "alignment": 0, "deadline_at": 1e9},
        {"record": "update_accepted", "round": 1, "edge": "a", "digest": digest, "num_examples": 8, "loss": 0.25},
        {"record": "round_closed", "round": 1, "master": digest, "view": digest, "delta": digest},
        {"record": "run_ended", "rounds": 1},
    ]
    with contextlib.closing(sqlite3.connect(work / "case.run" / "ledger.sqlite")) as ledger, ledger:
        ledger.executemany("INSERT INTO log (record) VALUES (?)", [(json.dumps(one).encode(),) for one in records])
    return run


def _container(mounts: str, groups: str, files: dict[str, str], memory: str, cpus: str) -> Callable[[Path], str]:
    def wrong(work: Path) -> str:
        root = work / "recorded"
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/mountinfo").write_text(mounts)
        (root / "proc/self/cgroup").write_text(groups)
        for name, text in files.items():
            path = root / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        environment = planted(work, RECORDED) | {
            "RECORDED_ROOT": str(root),
            "FEDSODA_CONFINE": "0",  # its worker is to read that root
            "FEDSODA_THREADS": "",
            "OMP_NUM_THREADS": "2",
        }
        ended = command("fedsoda_edge", "doctor", home=work, environment=environment)
        return ended.lacks(
            0, f"300 MiB free, as /sys/fs/cgroup/{memory}", f"1 CPU, as /sys/fs/cgroup/{cpus}", ", 1 threads"
        )

    return wrong


V2 = _container(
    "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "0::/pod/box\n",
    {
        "pod/memory.max": str(400 * MIB),
        "pod/memory.current": str(150 * MIB),
        "pod/memory.stat": f"inactive_file {50 * MIB}",
        "pod/box/memory.max": "max",
        "pod/box/cpu.max": "150000 100000",
    },
    "pod/memory.max",
    "pod/box/cpu.max",
)
V1 = _container(
    "35 31 0:32 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 /docker/x /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n",
    "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
    {
        "memory/memory.limit_in_bytes": str(300 * MIB),
        "memory/memory.usage_in_bytes": "0",
        "cpu/cpu.cfs_quota_us": "100000",
        "cpu/cpu.cfs_period_us": "100000",
    },
    "memory/memory.limit_in_bytes",
    "cpu/cpu.cfs_quota_us",
)


def _federation(of_hub: str, of_edge: str) -> Callable[[Path], str]:
    def wrong(work: Path) -> str:
        run = run_file(work)
        token = with_token(work, run)
        with started(serve(run, "--exit-when-done", "--jsonl"), QUICK, of_hub) as hub:
            home = QUICK | {"FEDSODA_HOME": str(work / "home")}
            with started(join(address(run), token, work, "--jsonl"), home, of_edge) as edge:
                statuses = (edge.wait(PATIENCE_SECONDS), hub.wait(PATIENCE_SECONDS))
        if statuses != (0, 0):
            return f"edge and hub ended with {statuses}"
        found = json.loads(command("fedsoda_hub", "status", str(run), "--json", home=work).out)
        return "" if (found["phase"], found["rounds_closed"]) == ("ended", 1) else f"status says {found}"

    return wrong


def _lost_token(work: Path) -> str:
    run = run_file(work)
    create = ["fedsoda_hub", "token", "create", str(run), "--name", "a"]
    for shell in (">/dev/full", ">&-"):
        wrong = ran(create, QUICK, shell=shell).lacks(2, "--out")
        if wrong:
            return f"{shell}: {wrong}"
    return ran(create, QUICK).lacks(0, "fs1-")


def _help(work: Path) -> str:
    run_file(work)
    shown = ran(["fedsoda_hub", "serve", "--help"], QUICK, shell=">/dev/full").lacks(0)
    check = ["fedsoda_edge", "data", "check", str(work / "rows.jsonl"), "--json"]
    return shown or ran(check, QUICK, shell="2>/dev/full").lacks(0, '"rows": 6')


def _no_locks(work: Path) -> str:
    environment = planted(work, NO_LOCKS)
    edge = command("fedsoda_edge", "cache", "prune", home=work, environment=environment).lacks(
        2, "has no locks", "local disk", "fedsoda-home"
    )
    hub = command("fedsoda_hub", "prepare", str(run_file(work)), home=work, environment=environment)
    return edge or hub.lacks(2, "has no locks", "local disk", "case.run")


def _read_only(work: Path) -> str:
    run = ended_ledger(work)
    (work / "case.run").chmod(0o555)
    (work / "case.run" / "ledger.sqlite").chmod(0o444)
    (work / "report").mkdir()
    try:
        for words, wanted in (
            (["status", str(run)], "1 closed"),
            (["edges", str(run)], "a "),
            (["report", str(run), "--to", str(work / "report")], "wrote"),
            (["token", "list", str(run)], "unused"),
        ):
            wrong = ran(["fedsoda_hub", *words], QUICK, before=without_rights).lacks(0, wanted)
            if wrong:
                return f"{words[0]}: {wrong}"
        for words in (["token", "create", str(run), "--name", "b"], ["serve", str(run)], ["report", str(run)]):
            wrong = ran(["fedsoda_hub", *words], QUICK, before=without_rights).lacks(2, "case.run")
            if wrong:
                return f"{words[0]}: {wrong}"
    finally:
        (work / "case.run").chmod(0o755)
    return ""


def _cut(damage: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    def wrong(work: Path) -> str:
        run = ended_ledger(work)
        path = work / "case.run" / "ledger.sqlite"
        (work / "case.run" / "blobs").mkdir()
        for words in (["status"], ["edges"], ["report"], ["serve"], ["token", "list"]):
            path.write_bytes(damage(path.read_bytes()) if words == ["status"] else path.read_bytes())
            found = command("fedsoda_hub", *words, str(run), home=work, environment=QUICK)
            if found.lacks(2, str(path), "fedsoda-hub reset"):
                return f"{words}: {found.lacks(2, str(path), 'fedsoda-hub reset')}"
        reset = command("fedsoda_hub", "reset", str(run), "--yes", home=work, environment=QUICK)
        again = command("fedsoda_hub", "token", "create", str(run), "--name", "a", home=work, environment=QUICK)
        return reset.lacks(0, "tokens are lost") or again.lacks(0, "fs1-")

    return wrong


def _circle(work: Path) -> str:
    """Follow the first refusal's advice; that has to be the way on."""
    run = run_file(work, max_length=512)
    token = with_token(work, run)
    first = command("fedsoda_hub", "serve", str(run), home=work, environment=QUICK, seconds=PATIENCE_SECONDS)
    if wrong := first.lacks(2, "max_length = 512", "256 positions"):
        return wrong
    run_file(work, max_length=64)
    with started(serve(run), QUICK, ">/dev/null 2>&1"):
        url = address(run)
        plan = command("fedsoda_edge", "plan", url, "--token-file", str(token), home=work, environment=QUICK)
    if wrong := plan.lacks(0):
        return wrong
    run_file(work, max_length=32)
    refused = command("fedsoda_hub", "serve", str(run), home=work, environment=QUICK)
    if wrong := refused.lacks(2, "64 when the run was prepared, 32 now", "may change", "fedsoda-hub reset"):
        return wrong
    reset = command("fedsoda_hub", "reset", str(run), "--yes", home=work, environment=QUICK)
    if wrong := reset.lacks(0, "1 token"):
        return wrong
    with started(serve(run), QUICK, ">/dev/null 2>&1"):
        url = address(run)
        return command("fedsoda_edge", "plan", url, "--token-file", str(token), home=work, environment=QUICK).lacks(0)


def _clock(work: Path) -> str:
    run = run_file(work)
    token = with_token(work, run)
    with started(serve(run, "--jsonl"), planted(work, AHEAD), f">{work}/hub.log 2>&1"):
        home = QUICK | {"FEDSODA_HOME": str(work / "home"), "FEDSODA_THREADS": "1"}
        with started(join(address(run), token, work), home, ">/dev/null 2>&1"):
            until = time.monotonic() + PATIENCE_SECONDS
            while "round_opened" not in (work / "hub.log").read_text():
                assert time.monotonic() < until, "no round opened"
                time.sleep(0.02)
    if "run_ended" in (work / "hub.log").read_text():
        return "the round closed before the clock could be put back"
    (work / "case.run" / "address").unlink(missing_ok=True)
    with started(serve(run), QUICK, ">/dev/null 2>&1"):
        address(run)
        found = json.loads(command("fedsoda_hub", "status", str(run), "--json", home=work).out)
    return "" if found["due_seconds"] <= 30.0 else f"due in {found['due_seconds']} s"


def _last_words(said: str, remedy: str) -> Callable[[Path], str]:
    def wrong(work: Path) -> str:
        environment = planted(work, "")
        (work / "planted" / "torch.py").write_text(f"raise {said}\n")
        edge = command("fedsoda_edge", "doctor", home=work, environment=environment).lacks(1, remedy)
        hub = command("fedsoda_hub", "serve", str(run_file(work)), home=work, environment=environment)
        return edge or hub.lacks(1, remedy)

    return wrong


def _no_home(work: Path) -> str:
    environment = planted(work, NO_USER)
    lacking = ("HOME", "FEDSODA_HOME", "XDG_DATA_HOME", "USER", "LOGNAME")
    return ran(["fedsoda_edge", "status"], environment, lacking=lacking).lacks(2, "FEDSODA_HOME", "volume")


def _lost_home(work: Path) -> str:
    run = run_file(work, min_edges=2)
    token = with_token(work, run)
    with started(serve(run), QUICK, ">/dev/null 2>&1"):
        plan = ["plan", address(run), "--token-file", str(token)]
        first = command("fedsoda_edge", *plan, home=work / "1", environment=QUICK).lacks(0)
        second = command("fedsoda_edge", *plan, home=work / "2", environment=QUICK)
        if wrong := first or second.lacks(5, "FEDSODA_HOME", "volume", "fedsoda-hub token rebind"):
            return wrong
        bound = command("fedsoda_hub", "token", "rebind", str(run), "a", home=work, environment=QUICK).lacks(0)
        return bound or command("fedsoda_edge", *plan, home=work / "2", environment=QUICK).lacks(0)


def _small_disk(work: Path) -> str:
    run = run_file(work, min_edges=2)
    token = with_token(work, run)
    with started(serve(run), QUICK, ">/dev/null 2>&1"):
        url = address(run)
        plan = ["plan", url, "--token-file", str(token)]
        found = command("fedsoda_edge", *plan, home=work, environment=planted(work, SMALL_DISK))
    return found.lacks(3, "1000 B of disk free", "the bundle needs", "free ")


def _hang_up(work: Path) -> str:
    run = run_file(work, min_edges=2)
    token = with_token(work, run)
    with started(serve(run), QUICK, f">{work}/hub.log 2>&1") as hub:
        home = QUICK | {"FEDSODA_HOME": str(work / "home")}
        with started(join(address(run), token, work), home, f">{work}/edge.log 2>&1") as edge:
            until = time.monotonic() + PATIENCE_SECONDS
            while "a connected" not in (work / "hub.log").read_text():
                assert time.monotonic() < until, "the edge never connected"
                time.sleep(0.1)
            edge.send_signal(signal.SIGHUP)
            of_edge = edge.wait(PATIENCE_SECONDS)
        hub.send_signal(signal.SIGHUP)
        of_hub = hub.wait(PATIENCE_SECONDS)
    text = (work / "edge.log").read_text() + (work / "hub.log").read_text()
    return Ended(of_edge or of_hub, "", text).lacks(0, "the same command continues", "stopping on SIGHUP")


def cases(_: Path) -> list[Case]:
    """List the cases of part E."""
    made: list[tuple[str, str, Callable[[Path], str]]] = [
        ("the host's numbers inside a container", "limits of a pod, cgroup v2", V2),
        ("the host's numbers inside a container", "a container's part of cgroup v1", V1),
        (
            "telling may fail deciding",
            "log disks full, readers gone",
            _federation("> >(true) 2>/dev/full", ">/dev/full 2>/dev/full"),
        ),
        ("telling may fail deciding", "all streams closed", _federation(">&- 2>&- <&-", ">&- 2>&- <&-")),
        ("telling may fail deciding", "a token that nobody gets", _lost_token),
        ("telling may fail deciding", "help and tables", _help),
        ('every errno read as "held"', "a file system without locks", _no_locks),
        ('only SQLite\'s "full" is translated', "a run of another user", _read_only),
        ('only SQLite\'s "full" is translated', "a ledger without its end", _cut(lambda data: data[: len(data) // 3])),
        ('only SQLite\'s "full" is translated', "an empty ledger", _cut(lambda _: b"")),
        ('only SQLite\'s "full" is translated', "no database", _cut(lambda data: b"x" * len(data))),
        ("refusals in a circle", "max_length beyond the model's positions", _circle),
        ("absolute wall times in the ledger", "a clock 1,000 days ahead, put right", _clock),
        (
            "a child's last words",
            "no temporary directory",
            _last_words("FileNotFoundError(2, 'No usable temporary directory found in /tmp')", "TMPDIR"),
        ),
        (
            "a child's last words",
            "a user without a name",
            _last_words("KeyError('getpwuid(): uid not found: 7')", "HOME"),
        ),
        ("a child's last words", "no HOME", _no_home),
        ("lost state", "a container without a volume", _lost_home),
        ("disk full on the edge", "no room for the bundle", _small_disk),
        ("SIGHUP", "of hub and edge", _hang_up),
    ]
    return [Case("E", kind, name, wrong) for kind, name, wrong in made]
