"""FEDSODA_HOME: one running join, one device id, one directory for each run."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from fedsoda_edge.errors import DiskFull, HomeInUse, ProtocolViolation, UsageProblem
from fedsoda_edge.join.home import HOME_VERSION, Home, HomeOfNewerRelease, JoinedRun, default_home

ANOTHER_JOIN = """
import sys
from pathlib import Path
from fedsoda_edge.join.home import JoinedRun, Home
home = Home(Path(sys.argv[1]))
home.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


# -- the home -------------------------------------------------------------------------------------------


def test_the_home_is_what_fedsoda_home_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSODA_HOME", str(tmp_path / "here"))
    assert default_home() == tmp_path / "here"
    monkeypatch.setenv("FEDSODA_HOME", "~/there")
    assert default_home() == Path.home() / "there"
    monkeypatch.delenv("FEDSODA_HOME")
    assert default_home().name == "fedsoda"


def test_a_second_join_in_the_same_home_is_refused_with_the_pid_of_the_first_until_that_is_killed(home: Home) -> None:
    command = [sys.executable, "-c", ANOTHER_JOIN, str(home.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        for _ in range(2):  # asking does not take it away
            with pytest.raises(HomeInUse) as failure:
                home.lock()
            assert str(failure.value) == (
                f"{home.directory} is used by another join (pid {first.pid}); "
                "stop that join, or set FEDSODA_HOME to another directory and join with another token, since a token "
                "belongs to one home"
            )
            assert failure.value.exit_status == 2
        Home(home.directory.with_name("other")).lock()
        first.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
    home.lock()


def test_the_lock_names_its_holder_and_is_gone_after_unlock(home: Home) -> None:
    home.lock()
    with pytest.raises(HomeInUse, match=rf"\(pid {os.getpid()}\)"):
        Home(home.directory).lock()
    home.unlock()
    home.unlock()  # harmless
    home.lock()
    with pytest.raises(HomeInUse, match=rf"\(pid {os.getpid()}\)"):  # no trace of the holder before
        Home(home.directory).lock()


def test_a_home_that_cannot_be_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        for use in (Home.lock, Home.device_id, lambda home: home.run("run1")):
            with pytest.raises(UsageProblem) as failure:
                use(Home(directory))
            assert str(failure.value).startswith(f"FEDSODA_HOME {directory} cannot be used: ")
            assert str(failure.value).endswith("; set FEDSODA_HOME to a directory you may write to")
            assert failure.value.exit_status == 2


def test_a_home_on_a_full_disk_may_be_tried_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFull, match="No space left on device; free space there, then try again") as failure:
        home.lock()
    assert failure.value.exit_status == 3


def test_the_device_id_is_made_once_and_stays(home: Home) -> None:
    made = home.device_id()
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert home.device_id() == made
    assert Home(home.directory).device_id() == made
    assert Home(home.directory.with_name("other")).device_id() != made
    assert [path.name for path in home.directory.iterdir()] == ["device_id"]


def test_each_run_has_a_directory_of_its_own(home: Home) -> None:
    one, other = home.run("0123456789abcdef"), home.run("fedcba9876543210")
    assert one != other
    assert one.is_dir()
    assert home.run("0123456789abcdef") == one
    assert one.is_relative_to(home.directory)


@pytest.mark.parametrize("run_id", ["../../.ssh", "/etc", "..", ".", "", "a/b", "a\\b", "a\0b", "C:", "x" * 65])
def test_a_hub_cannot_name_a_directory_outside_the_home(home: Home, run_id: str) -> None:
    with pytest.raises(ProtocolViolation) as failure:
        home.run(run_id)
    assert str(failure.value) == (
        f"the hub names its run {run_id!r}, which is not a safe name for a directory; join only hubs you trust"
    )
    assert not home.directory.exists()


# -- the key of border states ---------------------------------------------------------------------------


def test_each_join_has_a_key_of_its_own_that_no_disk_sees(home: Home) -> None:
    home.lock()
    there = sorted(home.directory.rglob("*"))
    keys = {home.cache_key(keep=False) for _ in range(3)}
    assert [len(key) for key in keys] == [32] * 3
    assert sorted(home.directory.rglob("*")) == there


def test_a_kept_key_is_its_owners_alone_and_stays(home: Home) -> None:
    before = os.umask(0)
    try:
        key = home.cache_key(keep=True)
    finally:
        os.umask(before)
    assert len(key) == 32
    assert stat.S_IMODE((home.directory / "cache.key").stat().st_mode) == 0o600
    assert Home(home.directory).cache_key(keep=True) == key
    assert Home(home.directory.with_name("other")).cache_key(keep=True) != key


def test_a_join_that_does_not_keep_it_deletes_a_kept_key(home: Home) -> None:
    kept = home.cache_key(keep=True)
    assert home.cache_key(keep=False) != kept
    assert not (home.directory / "cache.key").exists()
    assert home.cache_key(keep=True) != kept


def test_forgetting_borders_frees_those_of_every_run_and_nothing_else(home: Home) -> None:
    assert home.forget_borders() == 0
    for run, size in (("one", 1000), ("two", 234)):
        home.border(run).mkdir()
        (home.border(run) / "border-0.cache").write_bytes(bytes(size))
        (home.run(run) / "residual").write_bytes(b"stays")
    assert home.forget_borders() == 1234
    assert home.forget_borders() == 0
    names = sorted(str(path.relative_to(home.directory)) for path in home.directory.rglob("*") if path.is_file())
    assert names == [str(Path("runs", run, "residual")) for run in ("one", "two")]
    assert not home.border("one").exists()


def test_the_run_joined_last_is_remembered_while_its_tokenizer_is_here(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert home.last_joined() is None
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    joined = JoinedRun(
        run="triage",
        prompt="{a}",
        completion="{b}",
        max_length=64,
        tokenizer={"tokenizer.json": str(tokenizer)},
        eos=[2, 3],
    )
    home.remember_run("1", replace(joined, run="older"))
    os.utime(tmp_path / "home" / "runs" / "1" / "joined.json", (1, 1))
    home.remember_run("2", joined)
    assert home.last_joined() == joined
    tokenizer.unlink()  # `cache prune`
    assert home.last_joined() is None


def test_a_damaged_kept_key_is_refused_with_what_to_do(home: Home) -> None:
    home.cache_key(keep=True)
    (home.directory / "cache.key").write_bytes(b"short")
    with pytest.raises(UsageProblem, match=r"cache\.key has 5 bytes, a key has 32; delete the file"):
        home.cache_key(keep=True)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"two words"])
def test_a_damaged_device_id_is_refused_with_what_to_do(home: Home, damage: bytes) -> None:
    home.directory.mkdir(parents=True, exist_ok=True)
    (home.directory / "device_id").write_bytes(damage)
    with pytest.raises(UsageProblem, match=r"device_id is damaged.*fedsoda-hub token rebind"):
        home.device_id()


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"run": 5}'])
def test_a_damaged_note_of_the_last_run_is_none(home: Home, damage: bytes) -> None:
    path = home.run("r1") / "joined.json"
    path.write_bytes(damage)
    assert home.last_joined() is None


def test_a_user_without_a_home_directory_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSODA_HOME", "~nobody-of-that-name/fedsoda")
    with pytest.raises(UsageProblem, match=r"no home directory.*FEDSODA_HOME.*volume"):
        Home()


# --- the version of a home -------------------------------------------------------------------------------------------


def test_a_home_of_the_first_release_gets_a_version_and_keeps_its_device(tmp_path: Path) -> None:
    (tmp_path / "device_id").write_text("d-1")
    home = Home(tmp_path)
    home.lock()
    home.unlock()
    assert ((tmp_path / "version").read_text(), home.device_id()) == (f"{HOME_VERSION}\n", "d-1")


def test_a_home_of_a_newer_release_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "version").write_text(f"{HOME_VERSION + 1}\n")
    home = Home(tmp_path)
    for use in (home.lock, home.device_id):
        with pytest.raises(
            HomeOfNewerRelease, match=f"its version is {HOME_VERSION + 1}, and this release knows"
        ) as raised:
            use()
        assert str(raised.value).endswith(raised.value.way_out().helps)
    assert [path.name for path in tmp_path.iterdir()] == ["version"]


@pytest.mark.parametrize("said", ["", "one", "-1", "1" * 40, "\u00b2"])
def test_a_version_that_is_no_number_is_refused(tmp_path: Path, said: str) -> None:
    (tmp_path / "version").write_text(said)
    with pytest.raises(UsageProblem, match="and no number; delete it"):
        Home(tmp_path).lock()
