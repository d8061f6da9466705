"""Attack what a hub signs of its bundles: arbitrary installation, freeze, rollback, mix-and-match."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
from attack_cases import EVIL, GOOD, SIGNED_FILES, SMALL, case, hub_with, joined, tried
from small_hostile import (
    DAY,
    KEY,
    MALLORY,
    Bundle,
    Device,
    Server,
    changed,
    listening,
    serving,
    statement,
    welcome,
)

from fedsoda_edge.errors import FedSODAError, HubNotTrusted
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.signatures import as_text

# --- arbitrary installation -------------------------------------------------------------------------------------------

ARBITRARY = "arbitrary installation"


def _refused_later(attack: str, what: str, make: Callable[[], Server], word: str) -> None:
    """A device that has joined before refuses this hub, and so does one whose join link names the key."""

    @case(attack, f"{what}, to a device that joined before")
    async def again(home: Path) -> str:
        return await tried(await joined(home, GOOD), make(), HubNotTrusted, word)

    @case(attack, f"{what}, to a device with a link")
    async def linked(home: Path) -> str:
        return await tried(Device(home, hub_key=KEY.public), make(), HubNotTrusted, word)


_refused_later(ARBITRARY, "another key", lambda: hub_with(statement(EVIL, key=MALLORY), EVIL), "key")
_refused_later(ARBITRARY, "no signature", lambda: hub_with(None, EVIL), "signs nothing")
_refused_later(
    ARBITRARY,
    "the hub's key beside another's signature",
    lambda: hub_with(msgspec.structs.replace(statement(EVIL, version=2, key=MALLORY), key=as_text(KEY.public)), EVIL),
    "not signed",
)
_refused_later(
    ARBITRARY,
    "a text changed after it was signed",
    lambda: hub_with(changed(statement(GOOD, version=2), GOOD.ref.digest, EVIL.ref.digest), EVIL),
    "not signed",
)
_refused_later(
    ARBITRARY,
    "a signature made for a receipt",
    lambda: hub_with(_for_a_receipt(statement(EVIL, version=2)), EVIL),
    "not signed",
)
_refused_later(
    ARBITRARY,
    "a signature that is none",
    lambda: hub_with(msgspec.structs.replace(statement(EVIL), signature="AAAA"), EVIL),
    "not signed",
)
_refused_later(ARBITRARY, "another manifest than signed", lambda: hub_with(statement(GOOD), EVIL), "mix-and-match")


def _for_a_receipt(signed: ms.Signed) -> ms.Signed:
    return msgspec.structs.replace(signed, signature=as_text(KEY.sign("receipt", signed.text.encode())))


# --- freeze -----------------------------------------------------------------------------------------------------------

FREEZE = "freeze"


@case(FREEZE, "an expired statement")
async def _(home: Path) -> str:
    return await tried(
        await joined(home, GOOD), hub_with(statement(GOOD, signed_ago=4 * DAY), GOOD), HubNotTrusted, "freeze"
    )


@case(FREEZE, "an expired statement, at the first join")
async def _(home: Path) -> str:
    return await tried(Device(home), hub_with(statement(GOOD, signed_ago=400 * DAY), GOOD), HubNotTrusted, "freeze")


def _clock(ahead: float, refusal: type[FedSODAError] | None) -> None:
    @case(FREEZE, f"a device whose clock is {ahead / DAY:+.0f} days wrong, and an honest hub")
    async def _(home: Path) -> str:
        return await tried(
            Device(home, ahead=ahead), hub_with(statement(GOOD), GOOD), refusal, "freeze" if refusal else ""
        )


for days, refused in ((1, None), (-1, None), (-20 * 365, None), (4, HubNotTrusted)):
    _clock(days * DAY, refused)


# --- rollback ---------------------------------------------------------------------------------------------------------

ROLLBACK = "rollback"


@case(ROLLBACK, "a lower version")
async def _(home: Path) -> str:
    return await tried(
        await joined(home, GOOD, version=5), hub_with(statement(SMALL, version=4), SMALL), HubNotTrusted, ROLLBACK
    )


@case(ROLLBACK, "a lower version of the same bundle")
async def _(home: Path) -> str:
    return await tried(
        await joined(home, GOOD, version=5), hub_with(statement(GOOD, version=1), GOOD), HubNotTrusted, ROLLBACK
    )


@case(ROLLBACK, "a lower version after a long absence")
async def _(home: Path) -> str:
    await joined(home, GOOD, version=5)
    late = Device(home, ahead=90 * DAY)
    old = statement(GOOD, version=4, signed_ago=-89 * DAY)
    return await tried(late, hub_with(old, GOOD), HubNotTrusted, ROLLBACK)


@case(ROLLBACK, "an honest higher version, and the same again")
async def _(home: Path) -> str:
    first = await joined(home, GOOD, version=5)
    wrong = await tried(first, hub_with(statement(SMALL, version=6), SMALL), None)
    return wrong or await tried(Device(home), hub_with(statement(SMALL, version=6), SMALL), None)


@case(ROLLBACK, "a lower version in an offer")
async def _(home: Path) -> str:
    return await offered(home, statement(SMALL, version=2), SMALL, version=3, word=ROLLBACK)


# --- mix-and-match ----------------------------------------------------------------------------------------------------

MIX = "mix-and-match"


async def offered(home: Path, signed: ms.Signed | None, bundle: Bundle, *, version: int = 1, word: str = MIX) -> str:
    """Take part in a run of two size classes as the second, whose hub then offers this bundle."""
    view = ms.ViewRef(digest=ms.Digest("0" * 64), delta=None, snapshot=None)
    offer = ms.RoundOffer(
        round=1,
        rounds=2,
        view=view,
        alignment=0,
        emulator=view,
        local=ms.LocalSettings(),
        due_seconds=9.0,
        manifest=bundle.ref,
        signed=signed,
    )
    greeting = welcome(GOOD, SMALL, signed=statement(GOOD, SMALL, version=version))
    hub = Server(serving(SIGNED_FILES), [greeting, offer])
    return await _told(Device(home), hub, ms.Ready(num_examples=1, size_class=1), word)


async def _told(device: Device, hub: Server, message: ms.Ready, word: str) -> str:
    """Say Ready, and see whether what the hub says then is refused with this word; "": it must not be."""
    async with listening(hub):
        transport, _, conversation, sources = device.parts(hub.url)
        try:
            await conversation.greet()
            await conversation.send(message)
            async with contextlib.aclosing(conversation.messages()) as messages:
                async for _ in messages:
                    return "accepted" if word else ""
        except HubNotTrusted as error:
            return "" if word and word in str(error) else f"refused for another reason: {error}"
        finally:
            await sources.close()
            await conversation.close()
            await transport.close()
    return "the connection ended"


@case(MIX, "a statement of another run")
async def _(home: Path) -> str:
    return await tried(await joined(home, GOOD), hub_with(statement(GOOD, run="feed"), GOOD), HubNotTrusted, MIX)


@case(MIX, "a statement of another run, with a link")
async def _(home: Path) -> str:
    return await tried(
        Device(home, hub_key=KEY.public), hub_with(statement(GOOD, run="feed"), GOOD), HubNotTrusted, MIX
    )


@case(MIX, "size classes in another order")
async def _(home: Path) -> str:
    return await tried(
        await joined(home, GOOD, SMALL), hub_with(statement(GOOD, SMALL), SMALL, GOOD), HubNotTrusted, MIX
    )


@case(MIX, "one size class left out")
async def _(home: Path) -> str:
    return await tried(await joined(home, GOOD, SMALL), hub_with(statement(GOOD, SMALL), GOOD), HubNotTrusted, MIX)


@case(MIX, "two bundles of one version")
async def _(home: Path) -> str:
    return await tried(await joined(home, GOOD), hub_with(statement(SMALL), SMALL), HubNotTrusted, MIX)


@case(MIX, "an offer with the bundle of another size class")
async def _(home: Path) -> str:
    return await offered(home, statement(GOOD, SMALL), GOOD)


@case(MIX, "an offer with a bundle that nobody signed")
async def _(home: Path) -> str:
    return await offered(home, None, EVIL)


@case(MIX, "an honest offer of other layers")
async def _(home: Path) -> str:
    return await offered(home, statement(GOOD, EVIL, version=2), EVIL, word="")
