"""The owner's page in a real browser: what an owner does there, what a hostile device cannot, and that everybody can use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from fedsoda_edge.protocol import messages as ms
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from tests.hub.serving import scenes
from tests.hub.serving.browsers import DESKTOP, PHONE, needs_browser, serious_faults, started
from tests.hub.serving.test_daemon import Hub, connected, joined, records, serving, update, write_run

pytestmark = [needs_browser, pytest.mark.slow]
HOSTILE = "<img src=x onerror=window.taken=1>"


def talk(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scene())


async def at(page: Any, hub: Hub, section: str = "run") -> None:
    """Show a section of the page, on the hub's own machine."""
    await page.goto(f"{hub.url}/#{section}")
    await page.wait_for_selector("#pages:not([hidden])")
    await page.wait_for_selector(f"#page-{section}:not([hidden])")


async def says(page: Any, element: str, text: str) -> None:
    """Wait until an element says this, among other things."""
    await page.wait_for_function(
        "([id, text]) => document.getElementById(id).textContent.includes(text)", arg=[element, text]
    )


def test_an_owner_signs_in_by_a_link_and_sees_a_round_close_without_loading_again(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path, rounds={"count": 3, "min_edges": 2}, tls={"mode": "on"})
        plain = write_run(tmp_path / "plain", rounds={"count": 3, "min_edges": 2})
        async with started() as browser:
            away = {"X-Forwarded-For": "203.0.113.7"}  # as if from elsewhere
            async with serving(settings) as hub, browser.page(extra_http_headers=away) as page:
                await page.goto(f"{hub.url}/")
                await page.wait_for_selector("#gate:not([hidden])")
                assert "fedsoda-hub open" in await page.inner_text("#gate")
                assert not await page.is_visible("#pages")
                secret = hub.daemon.desk.sign_in.new_link()
                await page.goto(f"{hub.url}/#sign-in={secret}")
                await page.wait_for_selector("#pages:not([hidden])")
                assert secret not in page.url
                [cookie] = await page.context.cookies()
                assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "Strict")
            browser.complaints.clear()  # it was told that it is not signed in
            async with (
                serving(plain) as hub,
                browser.page() as page,
                joined(hub.url, hub.token("a")) as a,
            ):
                await at(page, hub)
                await page.evaluate("window.isTheSame = true")
                assert "begins when the first round closes" in await page.inner_text("#loss")
                async with joined(hub.url, hub.token("b"), "phone") as b:
                    await says(page, "sentence", "Round 1 of 3")
                    for edge in (a, b):
                        await edge.upload(await edge.hear(ms.RoundOffer), update(0.5))
                    await says(page, "progress-text", "1 of 3")
                    await page.wait_for_selector("#loss canvas")
                    assert "0.500 in round 1" in await page.get_attribute("#loss [role=img]", "aria-label")
                assert await page.evaluate("window.isTheSame")
            assert browser.complaints == []

    talk(scene)


def test_an_owner_invites_revokes_pauses_and_changes_a_deadline(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        async with (
            serving(settings) as hub,
            started() as browser,
            browser.page() as page,
            joined(hub.url, hub.token("old")) as old,
        ):
            await at(page, hub, "edges")
            await page.click("#invite")
            await page.fill("#invite-name", "a/b")
            await page.click("#invite-form .primary")
            assert "letters, digits" in await page.inner_text("#invite-problem")
            await page.fill("#invite-name", "clinic-7")
            await page.keyboard.press("Enter")
            await page.wait_for_selector("#invited:not([hidden])")
            link = await page.input_value("#invited-link")
            assert "fedsoda://" in link
            assert len(await page.get_attribute("#qr path", "d")) > 1000
            await page.click("#invited [data-close]")
            await says(page, "edge-rows", "clinic-7not joined yet")
            assert await page.input_value("#invited-link") == ""

            await page.click("[aria-label='Actions for old']")
            await page.click("role=menuitem[name='Revoke']")
            await page.click("#ask-yes")
            await says(page, "edge-rows", "revoked")
            hub.clock.wake(2.0)
            assert await old.is_hung_up_on()

            await at(page, hub, "do")
            await page.fill("[name=deadline]", "soon")
            await page.click("#rules .primary")
            assert "Deadline" in await page.inner_text("#rules-problem")
            await page.fill("[name=deadline]", "45 min")
            await page.fill("[name=count]", "9")
            await page.click("#rules .primary")
            await says(page, "done", "Changed")
            assert (hub.daemon.machine.rules.deadline_seconds, hub.daemon.machine.rules.count) == (2700, 9)
            await page.click("#pause")
            await page.wait_for_selector("#resume:not([hidden])")
            await page.click("#resume")
            await page.wait_for_selector("#pause:not([hidden])")
            assert browser.complaints == []
        asked = [len(records(settings, kind)) for kind in (rec.RulesChanged, rec.RunPaused, rec.RunResumed)]
        assert asked == [1, 1, 1]

    talk(scene)


def test_what_a_hostile_device_calls_itself_stays_text(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        with opened(RunDirectory(settings.run_dir)) as ledger:  # as no command of ours would name an edge
            ledger.database.write(("INSERT INTO tokens (edge, sha256) VALUES (?, ?)", (HOSTILE, "0")))
        async with serving(settings) as hub, started() as browser, browser.page() as page:
            facts = ms.DeviceFacts(ram_bytes=1, vram_bytes=1, disk_bytes=1, threads=1, accelerator=HOSTILE)
            async with connected(hub.url, hub.token("a")) as a:
                await a.say(ms.Hello(protocol=ms.PROTOCOL_VERSION, software="x", device_id="d", device=facts))
                await a.hear(ms.Welcome)
                await at(page, hub, "edges")
                await says(page, "edge-rows", f"{HOSTILE}tokennot joined yet")
                await says(page, "edge-rows", f"{HOSTILE}, 1 B")
                assert await page.evaluate("[window.taken, document.querySelectorAll('#pages img').length]") == [
                    None,
                    0,
                ]
            assert browser.complaints == []

    talk(scene)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everybody_can_use_the_page(tmp_path: Path, theme: str) -> None:
    """Of a long run and an empty one: no serious fault that axe finds, and no scrolling sideways on a small phone."""

    async def scene() -> None:
        full, empty = scenes.a_run(tmp_path / "full"), write_run(tmp_path / "empty")
        names = [f"clinic-{number}" for number in range(30)]
        scenes.fill(full, edges=names, closed=7, is_open=True)
        tokens = scenes.let_in(full, names)
        async with started() as browser:
            for settings, here in ((full, {"clinic-3": tokens["clinic-3"]}), (empty, {})):
                async with scenes.served(settings, here) as (hub, _):
                    for size in (DESKTOP, PHONE):
                        async with browser.page(size, theme) as page:
                            for section in ("run", "edges", "do"):
                                await at(page, hub, section)
                                assert await serious_faults(page) == []
                                assert await page.evaluate("document.documentElement.scrollWidth") <= size[0]
                            await at(page, hub, "edges")
                            await page.click("#invite")
                            assert await serious_faults(page) == []
                            await page.evaluate(
                                "document.querySelector('main').append(document.createElement('select'))"
                            )
                            assert "select-name" in str(await serious_faults(page))  # it finds one that is planted
            assert browser.complaints == []

    talk(scene)


def test_of_two_thousand_edges_only_those_in_sight_are_in_the_document(tmp_path: Path) -> None:
    async def scene() -> None:
        settings = write_run(tmp_path)
        with opened(RunDirectory(settings.run_dir)) as ledger:
            ledger.database.write(
                *(
                    ("INSERT INTO tokens (edge, sha256) VALUES (?, ?)", (f"clinic-{number}", str(number)))
                    for number in range(2000)
                )
            )
        async with serving(settings) as hub, started() as browser, browser.page() as page:
            await at(page, hub, "edges")
            await says(page, "edges-count", "0 of 2,000 connected")
            assert await page.locator("#edge-rows [role=row]").count() < 60
            assert await page.get_attribute("#edge-table", "aria-rowcount") == "2001"
            await page.evaluate("document.getElementById('viewport').scrollTop = 1e9")
            await says(page, "edge-rows", "clinic-1999")
            assert await page.locator("#edge-rows [role=row]").count() < 60
            await page.fill("#filter", "clinic-777")
            await says(page, "edges-count", "1 match")
            await page.keyboard.press("Tab")  # with the keyboard alone
            await page.focus("#viewport")
            assert browser.complaints == []

    talk(scene)
