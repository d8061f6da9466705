"""A real browser for the owner's page: the machine's Chromium, without a download, driven by Playwright."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

CHROMIUM = os.environ.get("FEDSODA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs a Chromium on the PATH (apt-get install chromium) and playwright (pip install 'fedsoda[dev]')",
)
DESKTOP, PHONE = (1280, 900), (360, 740)


@dataclass
class Browser:
    """A browser whose pages remember what their consoles said. complaints: errors, warnings and what the policy refused."""

    inner: Any
    complaints: list[str] = field(default_factory=list)

    def _hear(self, said: Any) -> None:
        if said.type in ("error", "warning"):
            self.complaints.append(said.text)

    @contextlib.asynccontextmanager
    async def page(self, size: tuple[int, int] = DESKTOP, theme: str = "light", **options: Any) -> AsyncIterator[Any]:
        """Yield a page of a browser that nobody has used."""
        viewport = {"width": size[0], "height": size[1]}
        context = await self.inner.new_context(
            viewport=viewport, color_scheme=theme, reduced_motion="reduce", ignore_https_errors=True, **options
        )
        page = await context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        try:
            yield page
        finally:
            await context.close()


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[Browser]:
    """Start a browser, and end it after the block."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        # The sandbox needs what containers do not give; the pages are the hub's own.
        inner = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield Browser(inner)
        finally:
            await inner.close()


async def serious_faults(page: Any) -> list[str]:
    """What axe-core finds on a page that keeps people out: serious and critical faults, each with its places."""
    from axe_core_python.base import AXE_SCRIPT

    await page.evaluate(AXE_SCRIPT)
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['help']}: {', '.join(str(node['target']) for node in one['nodes'][:3])}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
