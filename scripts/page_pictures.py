"""Take pictures of the page of the hub's owner: every section, phone and desktop, light and dark, and the states that people see.

The runs are made up; the hub, the page and the browser are real.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedsoda_edge.protocol import messages as ms
from tests.hub.serving import scenes
from tests.hub.serving.browsers import DESKTOP, PHONE, Browser, started

NAMES = ["clinic-1", "clinic-2", "clinic-3", "clinic-4", "harbour-lab", "north-hospital", "pharmacy-12", "west-ward"]
SIZES = {"desktop": DESKTOP, "phone": PHONE}
FACTS = {
    "clinic-1": ms.DeviceFacts(
        ram_bytes=28 << 30, vram_bytes=22 << 30, disk_bytes=1 << 38, threads=16, accelerator="RTX 4090"
    ),
    "harbour-lab": ms.DeviceFacts(
        ram_bytes=12 << 30, vram_bytes=7 << 30, disk_bytes=1 << 37, threads=8, accelerator="RTX 3060"
    ),
}
OTHER = ms.DeviceFacts(ram_bytes=6 << 30, vram_bytes=0, disk_bytes=1 << 36, threads=8, accelerator="")
SHOWN = Path(__file__).resolve().parent.parent / "docs" / "pictures"
IN_DOCS = ("run-desktop-light", "edges-phone-dark", "do-desktop-dark")


async def picture(browser: Browser, url: str, to: Path, name: str, section: str, act: Any = None) -> None:
    """Take one state in both sizes and themes."""
    for kind, size in SIZES.items():
        for theme in ("light", "dark"):
            async with browser.page(size, theme, device_scale_factor=2) as page:
                await page.goto(f"{url}/#{section}")
                await page.wait_for_selector("#pages:not([hidden]), #gate:not([hidden])")
                await page.wait_for_timeout(700)
                if act is not None:
                    await act(page)
                await page.screenshot(path=str(to / f"{name}-{kind}-{theme}.png"), full_page=act is None)


async def invited(page: Any) -> None:
    """Open the dialog with a link that was just made."""
    await page.click("#invite")
    await page.fill("#invite-name", f"clinic-{abs(hash(page)) % 90_000 + 10_000}")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#invited:not([hidden])")


async def take(root: Path, to: Path) -> list[str]:
    """Take all pictures, and return what the browser complained of."""
    at_work, empty, over = (scenes.a_run(root / name) for name in ("work", "empty", "over"))
    scenes.fill(at_work, edges=NAMES, closed=6, is_open=True)
    scenes.fill(empty, edges=NAMES, closed=0)
    scenes.fill(over, edges=NAMES, closed=20, is_over=True)
    tokens, _ = (scenes.let_in(settings, NAMES) for settings in (at_work, over))
    async with started() as browser:
        here = {name: tokens[name] for name in NAMES[:6]}
        async with scenes.served(at_work, here, facts={**dict.fromkeys(NAMES, OTHER), **FACTS}) as (hub, devices):
            for number, name in enumerate(NAMES[1:4]):
                progress = ms.Progress(round=7, step=11 + 9 * number, steps=40, loss=0.5, tokens_per_second=900.0)
                await devices[name].say(progress)
            for section in ("run", "edges", "do"):
                await picture(browser, hub.url, to, section, section)
            await picture(browser, hub.url, to, "invited", "edges", invited)
        async with scenes.served(empty, {}) as (hub, _):
            await picture(browser, hub.url, to, "empty-run", "run")
            await picture(browser, hub.url, to, "empty-edges", "edges")
        async with scenes.served(over, {}) as (hub, _):
            await picture(browser, hub.url, to, "over", "run")
            await picture(browser, f"{hub.url}", to, "over-do", "do")
        return browser.complaints


def for_docs(taken: Path) -> None:
    """Put small copies of the pictures that docs/ shows there: half the size, 64 colours."""
    from PIL import Image

    SHOWN.mkdir(exist_ok=True)
    for name in IN_DOCS:
        picture = Image.open(taken / f"{name}.png").convert("RGB")
        half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
        half.quantize(64, dither=Image.Dither.NONE).save(SHOWN / f"page-{name}.png", optimize=True)


def main() -> int:
    """Take the pictures, and return 1 where the browser complained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("page-pictures"))
    parser.add_argument("--docs", action="store_true", help="put those that docs/ shows there")
    asked = parser.parse_args()
    to = asked.directory
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        complaints = asyncio.run(take(Path(root), to))
    print(f"{len(list(to.glob('*.png')))} pictures are in {to}")
    if asked.docs:
        for_docs(to)
    for one in complaints:
        print(f"the browser complained: {one}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
