"""The attacks of The Update Framework, by their names, and forged receipts: real sockets, the edge's own download.

The cases stand in scripts/attacks_on_*.py, where scripts/bench_trust counts them too, and are shown there to fail on defects.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import bench_trust_bundles as bench
import msgspec
import pytest
from attack_cases import CASES, GOOD, SMALL, hub_with, joined, tried
from attacks_on_files import cut_at
from small_hostile import KEY, MALLORY, RUN, Device, Server, listening, serving, statement, welcome

from fedsoda_edge.errors import HubNotTrusted, UsageProblem
from fedsoda_edge.join.trust import KnownHub
from fedsoda_edge.protocol.signatures import as_text, fingerprint


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.mark.parametrize("name", CASES)
def test_the_edge_withstands(name: str, tmp_path: Path) -> None:
    assert bench.run_case(name, tmp_path) == ""


def test_every_attack_has_its_name() -> None:
    names = {name.partition(":")[0] for name in CASES}
    assert names >= {
        "arbitrary installation", "endless data", "extraneous dependencies", "freeze", "rollback", "mix-and-match",
        "wrong size", "slow retrieval", "forged receipt",
    }  # fmt: skip


def known(device: Device) -> KnownHub:
    return msgspec.json.decode(device.home.known_hub(RUN).read_bytes(), type=KnownHub)


def test_the_first_key_of_a_run_is_remembered_and_the_highest_version(tmp_path: Path) -> None:
    device = asyncio.run(joined(tmp_path, GOOD, version=3))
    assert known(device) == KnownHub(key=as_text(KEY.public), version=3, manifests=(GOOD.ref,))
    hub = hub_with(statement(SMALL, version=7), SMALL)
    assert asyncio.run(tried(device, hub, None)) == ""
    assert known(device).version == 7


def test_the_sentence_about_another_key_names_both_and_the_file(tmp_path: Path) -> None:
    device = asyncio.run(joined(tmp_path, GOOD))

    async def meet() -> str:
        hub = hub_with(statement(GOOD, key=MALLORY), GOOD)
        async with listening(hub):
            with pytest.raises(HubNotTrusted) as refused:
                await device.join(hub.url)
        assert refused.value.exit_status == 5
        return str(refused.value)

    sentence = asyncio.run(meet())
    assert fingerprint(KEY.public) in sentence
    assert fingerprint(MALLORY.public) in sentence
    assert str(device.home.known_hub(RUN)) in sentence


def test_an_older_hub_is_accepted_with_one_note_and_not_where_a_link_names_its_key(tmp_path: Path) -> None:
    device = Device(tmp_path / "token")
    assert asyncio.run(tried(device, hub_with(None, GOOD), None)) == ""
    assert [said for said in device.said if "signs neither" in said] == device.said != []
    assert not device.home.known_hub(RUN).exists()
    linked = Device(tmp_path / "link", hub_key=KEY.public)
    assert asyncio.run(tried(linked, hub_with(None, GOOD), HubNotTrusted, "older release")) == ""


def test_a_damaged_memory_of_the_hub_is_not_taken_for_none(tmp_path: Path) -> None:
    device = asyncio.run(joined(tmp_path, GOOD))
    path = device.home.known_hub(RUN)
    path.write_bytes(path.read_bytes()[:-9])

    async def meet() -> None:
        hub = hub_with(statement(GOOD), GOOD)
        async with listening(hub):
            with pytest.raises(UsageProblem, match="is damaged"):
                await device.join(hub.url)

    asyncio.run(meet())


def test_a_mirror_without_files_is_left_out_after_three_and_the_hub_sends_them(tmp_path: Path) -> None:
    empty = Server(serving({}))
    device, hub = Device(tmp_path), hub_with(None, GOOD)
    assert asyncio.run(tried(device, hub, None, "", empty)) == ""
    assert len(empty.heard) == 3
    lines = [said for said in device.said if "failed" in said]
    assert len(lines) == 3
    assert "HTTP 404" in lines[0]
    assert lines[0].endswith("the file is taken from elsewhere")
    assert "asks it no more" in lines[2]
    assert len([heard for heard in hub.heard if "blobs" in heard.path]) == len(GOOD.files)


def test_a_file_is_continued_across_sources_from_the_byte_where_one_stopped(tmp_path: Path) -> None:
    cutting, second = Server(cut_at(GOOD.files, 500)), Server(serving(GOOD.files))
    hub = hub_with(None, GOOD)
    device = Device(tmp_path)
    assert asyncio.run(tried(device, hub, None, "", cutting, second)) == ""
    assert [heard.offset for heard in second.heard[:3]] == [500, 500, 500]  # then the first is left out
    assert {heard.offset for heard in second.heard[3:]} == {0}
    assert [heard.path for heard in hub.heard if "blobs" in heard.path] == []
    assert device.held == GOOD.files


def test_a_mirror_is_asked_below_its_path(tmp_path: Path) -> None:
    mirror = Server(serving(GOOD.files))
    assert asyncio.run(tried(Device(tmp_path), hub_with(None, GOOD), None, "", mirror)) == ""
    assert {heard.path for heard in mirror.heard} == {f"/run7/{digest}" for digest in GOOD.files}


def test_what_is_no_mirror_is_not_asked(tmp_path: Path) -> None:
    mirror = Server(serving(GOOD.files))

    async def meet() -> None:
        hub = hub_with(None, GOOD)
        async with listening(hub, mirror):
            bad = ("ftp://x/", "http://user:secret@x/", "http://x/?key=1", "file:///etc/passwd", f"{mirror.url}/#x")
            hub.says[0] = welcome(GOOD, signed=statement(GOOD, mirrors=bad))
            await Device(tmp_path).join(hub.url)

    asyncio.run(meet())
    assert mirror.heard == []
