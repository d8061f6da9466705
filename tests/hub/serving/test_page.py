"""The owner's page over HTTP: who may see it, what it says, what changes need, and what it never sends."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.serving.page import STATIC
from tests.hub.serving import scenes
from tests.hub.serving.test_daemon import Hub, connected, joined, records, serving, until, update, write_run
from tests.schema import HUB


@contextlib.asynccontextmanager
async def browser(hub: Hub, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client at the hub, without a session."""
    async with httpx.AsyncClient(base_url=hub.url, headers=headers, trust_env=False) as client:
        yield client


@contextlib.asynccontextmanager
async def owner(hub: Hub) -> AsyncIterator[httpx.AsyncClient]:
    """A client that is signed in, as one on the hub's machine is by asking, and sends what the page sends with changes."""
    async with browser(hub, Origin=hub.url) as client:
        client.headers["X-CSRF-Token"] = (await client.get("/page/session")).json()["csrf"]
        yield client


def talk(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scene())


def edge_rows(state: dict[str, Any]) -> dict[str, list[Any]]:
    return {row[0]: row for row in state["edges"]}


# --- who may see it --------------------------------------------------------------------------------------------------


def test_on_its_own_machine_no_link_is_needed_and_elsewhere_nothing_is_seen_without(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub, browser(hub) as client:
            for path in ("session", "state", "layers", "events", "download/report"):
                away = await client.get(f"/page/{path}", headers={"Host": "rebound.example.org"})
                assert away.status_code == 401, path
                assert "small" not in away.text
                proxied = await client.get(f"/page/{path}", headers={"X-Forwarded-For": "127.0.0.1"})
                assert proxied.status_code == 401, path
            assert (await client.get("/page/session")).json()["run"] == "small"
            assert (await client.get("/page/state")).status_code == 200

    talk(scene)


def test_behind_a_proxy_that_adds_no_header_a_link_is_needed(tmp_path: Path) -> None:
    """A proxy on this machine without `X-Forwarded-For` looks like a browser on it."""

    async def scene() -> None:
        settings = write_run(tmp_path, listen={"port": 0, "public_url": "https://hub.example.org"})
        async with serving(settings) as hub, browser(hub) as client:
            assert (await client.get("/page/session")).status_code == 401
            secret = hub.daemon.desk.sign_in.new_link()
            asked = await client.post(
                "/page/sign-in", json={"secret": secret}, headers={"Origin": "https://hub.example.org"}
            )
            assert asked.status_code == 200
            assert (await client.get("/page/state")).status_code == 200

    talk(scene)


def test_a_request_of_http_1_0_needs_a_link(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(hub.url.rpartition(":")[2]))
            writer.write(b"GET /page/session HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
            assert b" 401 " in await reader.readline()
            writer.close()

    talk(scene)


def test_another_user_of_the_hubs_machine_needs_a_link(tmp_path: Path) -> None:
    """Where this is root, a process of another user really asks; it finds out whose sockets are by itself."""
    program = (
        "import encodings.idna, os, socket, sys\n"  # all that it needs is loaded before it cannot read it any more
        "if sys.argv[2] == 'other': os.setuid(65534)\n"
        "talk = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "talk.sendall(b'GET /page/session HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n')\n"
        "print(talk.recv(99).split()[1].decode())"
    )

    async def asked(url: str, who: str) -> int:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, url.rpartition(":")[2], who, stdout=subprocess.PIPE
        )
        out, _ = await child.communicate()
        return int(out)

    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub:
            assert await asked(hub.url, "own") == 200
            if os.getuid() == 0:
                assert await asked(hub.url, "other") == 401

    talk(scene)


def test_a_link_signs_in_once_with_a_cookie_that_scripts_and_other_sites_do_not_get(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub, browser(hub, **{"X-Forwarded-For": "203.0.113.7"}) as client:
            admin = (hub.daemon.disk.directory.admin_token).read_text()
            made = await client.post("/page/link", headers={"Authorization": f"Bearer {admin}"})
            secret = made.json()["secret"]
            origin = {"Origin": hub.url}
            evil = await client.post(
                "/page/sign-in", json={"secret": secret}, headers={"Origin": "http://evil.example"}
            )
            assert evil.status_code == 403
            first = await client.post("/page/sign-in", json={"secret": secret}, headers=origin)
            assert first.status_code == 200
            cookie = first.headers["set-cookie"]
            assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/"))
            assert secret not in cookie
            assert (await client.get("/page/state")).status_code == 200
            again = await client.post("/page/sign-in", json={"secret": secret}, headers=origin)
            assert (again.status_code, "set-cookie" in again.headers) == (401, False)

    talk(scene)


def test_over_tls_the_cookie_is_for_tls_alone(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path, tls={"mode": "on"})
        async with (
            serving(settings) as hub,
            httpx.AsyncClient(base_url=hub.url, verify=False, trust_env=False) as client,
        ):
            cookie = (await client.get("/page/session")).headers["set-cookie"]
            assert "Secure" in cookie
            assert cookie.startswith("__Host-fedsoda-")

    talk(scene)


def test_only_who_has_the_admin_token_makes_links(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub, owner(hub) as client:
            assert (await client.post("/page/link")).status_code == 401
            assert (await client.post("/page/link", headers={"Authorization": "Bearer guess"})).status_code == 401

    talk(scene)


def test_wrong_sign_ins_are_bounded(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub, browser(hub, Origin=hub.url) as client:
            found = [(await client.post("/page/sign-in", json={"secret": "x"})).status_code for _ in range(12)]
            assert found == [401] * 10 + [429] * 2

    talk(scene)


# --- what changes need -----------------------------------------------------------------------------------------------


def test_a_change_needs_session_origin_and_csrf_token(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub, owner(hub) as client:
            good = dict(client.headers)
            for lacking, status in (
                ({"x-csrf-token": "guess"}, 403),
                ({"x-csrf-token": ""}, 403),
                ({"origin": "http://evil.example"}, 403),
                ({"origin": "null"}, 403),
                ({"sec-fetch-site": "cross-site"}, 403),
                ({"cookie": ""}, 401),
            ):
                answer = await client.post("/page/do/pause", headers={**good, **lacking})
                assert answer.status_code == status, lacking
            del client.headers["Origin"]
            assert (await client.post("/page/do/pause")).status_code == 403
            assert not hub.daemon.machine.state.steering.is_paused
            assert (await client.post("/page/do/pause", headers={"Origin": hub.url})).status_code == 200
            assert hub.daemon.machine.state.steering.is_paused

    talk(scene)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "text/plain", 415),
        (b"{}", "application/x-www-form-urlencoded", 415),
        (b"[]", "application/json", 400),
        (b'{"edge": 1}', "application/json", 400),
        (b'{"edge": ""}', "application/json", 400),
        (b'{"edge": "a", "admin": true}', "application/json", 400),
        (b'{"edge": "a", "seconds": 1e300}', "application/json", 400),
        (b'{"edge": "a/b"}', "application/json", 409),
        (b'{"edge": "\xff"}', "application/json", 400),
        (b'{"edge": "' + b"a" * 5000 + b'"}', "application/json", 413),
        (b"[" * 4000, "application/json", 400),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(tmp_path: Path, body: bytes, kind: str, status: int) -> None:
    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub, owner(hub) as client:
            answer = await client.post("/page/do/invite", content=body, headers={"Content-Type": kind})
            assert answer.status_code == status
            assert answer.json()["reason"]
            assert (await client.post("/page/do/reboot", json={})).status_code == 404
            assert not hub.running.done()

    talk(scene)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_page_shows_a_round_from_its_offer_to_its_close(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        async with serving(settings) as hub, owner(hub) as client:
            hub.daemon.desk.feed._cost = -1.0  # shown again at once
            assert (await client.get("/page/state")).json()["run"]["phase"] == "idle"
            async with joined(hub.url, hub.token("a")) as a, joined(hub.url, hub.token("b"), "phone") as b:
                offers = [await edge.hear(ms.RoundOffer) for edge in (a, b)]
                await a.say(ms.Progress(round=1, step=3, steps=40))
                await until(lambda: hub.said("edge_progress"))
                state = (await client.get("/page/state")).json()
                if state["run"]["phase"] == "idle":  # it was shown just now
                    await asyncio.sleep(0.6)
                    state = (await client.get("/page/state")).json()
                assert (state["run"]["phase"], state["run"]["invited"]) == ("collecting", 2)
                assert edge_rows(state)["a"][1:3] == ["training", "token"]
                assert edge_rows(state)["a"][6:8] == [3, 40]
                assert edge_rows(state)["b"][1] == "starting"
                for edge, offer in zip((a, b), offers, strict=True):
                    await edge.upload(offer, update(0.5))
                    await edge.hear(ms.Receipt)
                await hub.until("round_closed")
                await asyncio.sleep(0.6)
                state = (await client.get("/page/state")).json()
                assert (state["run"]["closed"]["number"], state["run"]["closed"]["loss"]) == ([1], [0.5])
                assert state["run"]["closed"]["up"][0] > 0
                assert edge_rows(state)["a"][8:10] == [1, 2]  # of two rounds that it was asked for

    talk(scene)


def test_an_open_page_hears_what_changes_and_no_more(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        async with serving(settings) as hub, owner(hub) as client:
            tokens = [hub.token(name) for name in "ab"]
            heard: list[tuple[str, Any]] = []
            async with client.stream("GET", "/page/events") as stream, joined(hub.url, tokens[0]):
                assert stream.headers["content-type"].startswith("text/event-stream")
                assert stream.headers["x-accel-buffering"] == "no"
                name = ""
                async for line in stream.aiter_lines():
                    if line.startswith("event: "):
                        name = line[7:]
                    elif line.startswith("data: "):
                        heard.append((name, json.loads(line[6:])))
                        if name == "changed":
                            break
            assert [name for name, _ in heard][:2] == ["run", "edges"]
            assert [row[0] for row in heard[1][1]] == ["a", "b"]
            assert [row[0] for row in heard[-1][1]] == ["a"]

    talk(scene)


def test_a_stream_ends_with_its_session_and_with_the_hub(tmp_path: Path) -> None:
    async def scene() -> None:
        async with (
            serving(write_run(tmp_path)) as hub,
            owner(hub) as client,
            owner(hub) as other,
            client.stream("GET", "/page/events") as ours,
            other.stream("GET", "/page/events") as theirs,
            asyncio.timeout(8),
        ):
            await other.post("/page/sign-out")
            hub.daemon.desk.feed.touch()
            assert "event: over" in "".join([line async for line in theirs.aiter_lines()])
            hub.daemon.desk.close()
            assert "event: over" in "".join([line async for line in ours.aiter_lines()])

    talk(scene)


def test_a_run_of_many_rounds_is_shown_as_its_ledger_says(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = scenes.a_run(tmp_path)
        names = [f"clinic-{number}" for number in range(4)]
        scenes.fill(settings, edges=names, closed=6)
        scenes.let_in(settings, names)
        async with serving(settings) as hub, owner(hub) as client:
            state = (await client.get("/page/state")).json()
            layers = (await client.get("/page/layers")).json()
        run = state["run"]
        told = records(settings, rec.UpdateAccepted)
        assert run["closed"]["number"] == [1, 2, 3, 4, 5, 6]
        for number, loss in zip(run["closed"]["number"], run["closed"]["loss"], strict=True):
            given = [one for one in told if one.round == number]
            total = sum(one.num_examples for one in given)
            assert loss == pytest.approx(sum(one.loss * one.num_examples for one in given) / total)
        assert run["judged"]["round"] == [2, 4, 6]
        assert [model["name"] for model in run["models"]] == ["full", "sub_llm", "plug_in"]
        for model in run["models"]:
            assert 0 <= model["low"] < model["accuracy"] < model["high"] <= 1
        rows = edge_rows(state)
        assert sum(row[8] for row in rows.values()) == len(told)
        assert [row[9] for row in rows.values()] == [6] * 4
        with opened(RunDirectory(settings.run_dir)) as ledger:
            assert {edge: (row[10], row[11]) for edge, row in rows.items()} == ledger.traffic_by_edge()
        assert layers["num_layers"] == 24

    talk(scene)


def test_a_run_that_keeps_its_best_round_names_it(tmp_path: Path) -> None:
    async def scene() -> None:
        last = scenes.a_run(tmp_path)
        scenes.fill(last, edges=["a", "b"], closed=6)
        best = msgspec.structs.replace(last, task=msgspec.structs.replace(last.task, keep="best", metric="loss"))
        for settings in (last, best):
            async with serving(settings) as hub, owner(hub) as client:
                found = (await client.get("/page/state")).json()["run"]["best"]
            if settings is last:
                assert found is None
        judged = records(best, rec.Evaluated)
        wanted = min(judged, key=lambda one: one.result.loss["plug_in"])
        assert found == {"round": wanted.round, "metric": "loss", "value": wanted.result.loss["plug_in"]}

    talk(scene)


def test_a_hostile_edge_is_data_and_never_markup(tmp_path: Path) -> None:
    """The one place that takes a device's words is JSON; nothing that a page shows is HTML of the hub's making."""

    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub, owner(hub) as client:
            facts = ms.DeviceFacts(
                ram_bytes=1, vram_bytes=1, disk_bytes=1, threads=1, accelerator="<img src=x onerror=1>"
            )
            async with connected(hub.url, hub.token("a")) as a:
                await a.say(ms.Hello(protocol=ms.PROTOCOL_VERSION, software="</script>", device_id="d", device=facts))
                await a.hear(ms.Welcome)
                answer = await client.get("/page/state")
                assert answer.headers["content-type"] == "application/json"
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert edge_rows(answer.json())["a"][4].startswith("<img src=x onerror=1>")

    talk(scene)


# --- what the owner does ---------------------------------------------------------------------------------------------


def test_an_invited_device_gets_a_link_and_a_revoked_one_is_ended(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        async with serving(settings) as hub, owner(hub) as client:
            done = (await client.post("/page/do/invite", json={"edge": "clinic-7"})).json()
            assert done["link"].startswith("fedsoda://")
            assert len(done["qr"]) == len(done["qr"][0]) >= 21
            assert set("".join(done["qr"])) == {"0", "1"}
            again = await client.post("/page/do/invite", json={"edge": "clinic-7"})
            assert again.json()["link"] != done["link"]  # the first one is worth nothing
            async with joined(hub.url, hub.token("a")) as a:
                assert (await client.post("/page/do/revoke", json={"edge": "a"})).status_code == 200
                hub.clock.wake(2.0)
                assert await a.is_hung_up_on()
            assert (await client.post("/page/do/rebind", json={"edge": "a"})).status_code == 409
            assert "neither a token" in (await client.post("/page/do/revoke", json={"edge": "x"})).json()["reason"]

    talk(scene)


def test_what_is_asked_of_the_run_is_in_the_ledger_and_outlives_the_hub(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        async with serving(settings) as hub, owner(hub) as client:
            assert (await client.post("/page/do/pause")).status_code == 200
            refused = await client.post("/page/do/pause")
            assert (refused.status_code, refused.json()["reason"]) == (409, "the run is paused already")
            changed = await client.post("/page/do/change", json={"count": 7, "deadline_seconds": 60})
            assert changed.status_code == 200
            wrong = await client.post("/page/do/change", json={"quorum": 2})
            assert wrong.json()["reason"] == "quorum is 2, and must be more than 0 and at most 1"
        assert len(records(settings, rec.RunPaused)) == len(records(settings, rec.RulesChanged)) == 1
        async with serving(settings) as hub, owner(hub) as client:
            run = (await client.get("/page/state")).json()["run"]
            assert (run["is_paused"], run["rules"]["count"], run["rules"]["deadline_seconds"]) == (True, 7, 60)

    talk(scene)


@pytest.mark.slow
def test_the_report_is_downloaded_and_why_there_is_no_adapter_is_said(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        async with serving(settings) as hub, owner(hub) as client:
            client.timeout = httpx.Timeout(60)
            report = await client.get("/page/download/report")
            assert report.headers["content-disposition"] == 'attachment; filename="small-report.html"'
            assert report.text.startswith("<!doctype html>")
            none = await client.get("/page/download/export")
            assert none.status_code == 409
            assert "no round of small.run has closed yet" in none.json()["reason"]
            assert (await client.get("/page/download/ledger")).status_code == 404

    talk(scene)


async def command(*words: str) -> dict[str, Any]:
    """The report of `fedsoda-hub ... --json` in a process of its own, checked."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedsoda_hub", *words, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    out, _ = await child.communicate()
    return HUB.report(words[0], out.decode())


@pytest.mark.slow
def test_commands_ask_the_hub_that_serves_the_run(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        async with (
            serving(settings) as hub,
            browser(hub, Origin=hub.url, **{"X-Forwarded-For": "203.0.113.7"}) as client,
        ):
            made, paused = await asyncio.gather(command("open", settings.path), command("pause", settings.path))
            url, _, secret = made["link"].partition("#sign-in=")
            assert url == f"{hub.url}/"
            assert (await client.post("/page/sign-in", json={"secret": secret})).status_code == 200
            assert "paused" in paused["said"]
            again, changed = await asyncio.gather(
                command("pause", settings.path), command("change", settings.path, "--deadline", "90s", "--rounds", "3")
            )
            assert again["message"] == "the run is paused already"
            assert changed["status"] == "ok"
            assert hub.daemon.machine.rules.deadline_seconds == 90
        gone = await command("resume", settings.path)
        assert (gone["exit_status"], "no hub serves small.run now" in gone["message"]) == (2, True)

    talk(scene)


# --- its files -------------------------------------------------------------------------------------------------------


def test_the_page_runs_nothing_but_its_own_files(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving(write_run(tmp_path)) as hub, browser(hub) as client:
            index = await client.get("/")
            policy = index.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", index.text)
            assert not re.search(r"https?://|//cdn", index.text)
            names = re.findall(r'(?:src|href)="page/static/([^"]+)"', index.text)
            assert len(names) == 6
            for name in names:
                file = await client.get(f"/page/static/{name}")
                assert file.status_code == 200
                tag = {"If-None-Match": file.headers["etag"]}
                assert (await client.get(f"/page/static/{name}", headers=tag)).status_code == 304
            for name in ("..%2fpage.py", "uPlot.LICENSE", "no.js", "%2e%2e"):
                assert (await client.get(f"/page/static/{name}")).status_code == 404

    talk(scene)


def test_no_script_of_the_page_makes_html_of_texts() -> None:
    for path in STATIC.glob("*.js"):
        if not path.name.startswith("uPlot"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
            ), path
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path


def test_the_charts_are_drawn_by_the_released_file_with_its_licence() -> None:
    """uPlot 1.6.32, as its own archive has it."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in STATIC.glob("uPlot*")}
    assert sums == {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    }
    assert "MIT License" in (STATIC / "uPlot.LICENSE").read_text()


def test_a_number_that_is_none_is_null_for_the_page() -> None:
    assert msgspec.json.encode({"loss": float("nan")}) == b'{"loss":null}'
