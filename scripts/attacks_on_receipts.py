"""Forge receipts of updates."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import msgspec
from attack_cases import GOOD, case
from small_hostile import (
    KEY,
    MALLORY,
    RUN,
    Device,
    Server,
    changed,
    digest_of,
    listening,
    serving,
    statement,
    welcome,
)

from fedsoda_edge.errors import HubNotTrusted
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.signatures import as_text
from fedsoda_edge.protocol.statements import ReceiptStatement, sign

RECEIPTS = "forged receipt"
START = ms.UpdateStart(
    round=2,
    base=ms.Digest("0" * 64),
    alignment=0,
    digest=ms.Digest(digest_of(b"update")),
    bytes=6,
    codec="int8",
    num_examples=12,
    loss=0.5,
)
TRUE = ReceiptStatement(
    run_id=RUN, round=2, edge=ms.EdgeId("clinic-7"), digest=START.digest, num_examples=12, accepted_at=1
)


def receipt(said: ReceiptStatement = TRUE, **changes: Any) -> ms.Receipt:
    """A receipt of START that is signed like this. changes: of the message."""
    made = ms.Receipt(round=2, digest=START.digest, signed=sign(KEY, said))
    return msgspec.structs.replace(made, **changes)


def _other(**changes: Any) -> ms.Receipt:
    return receipt(msgspec.structs.replace(TRUE, **changes))


def _receipts() -> dict[str, ms.Receipt]:
    true = sign(KEY, TRUE)
    as_manifest = msgspec.structs.replace(true, signature=as_text(KEY.sign("manifest", true.text.encode())))
    other = ms.Digest(digest_of(b"another"))
    return {
        "of another key": receipt(signed=sign(MALLORY, TRUE)),
        "of another key that calls itself the hub's": receipt(
            signed=msgspec.structs.replace(sign(MALLORY, TRUE), key=as_text(KEY.public))
        ),
        "without signature": receipt(signed=None),
        "signed for a manifest": receipt(signed=as_manifest),
        "whose text was changed": receipt(signed=changed(true, '"accepted_at":1', '"accepted_at":2')),
        "of another update": receipt(digest=other),
        "signed for another update": _other(digest=other),
        "signed for another round": _other(round=1),
        "signed for another edge": _other(edge=ms.EdgeId("clinic-8")),
        "signed for another run": _other(run_id="feed"),
        "signed for another number of examples": _other(num_examples=13),
        "that is a statement of bundles": receipt(signed=statement(GOOD)),
    }


async def handed_in(home: Path, answer: ms.Receipt) -> str:
    """Hand an update in to a hub that gives this receipt; return why it is not believed, "": it is."""
    device = Device(home)
    hub = Server(serving(GOOD.files), [welcome(GOOD, signed=statement(GOOD)), answer])
    async with listening(hub):
        transport, _, conversation, sources = device.parts(hub.url)

        async def read() -> None:
            async with contextlib.aclosing(conversation.messages()) as messages:
                async for _ in messages:
                    pass

        await conversation.greet()
        reading = asyncio.create_task(read())
        try:
            # Ready is said by hand: this hub answers the first chunk.
            state = conversation._state
            state.is_ready = True  # type: ignore[union-attr]
            await conversation.hand_in(START, b"update")
        except HubNotTrusted as error:
            return str(error)
        finally:
            reading.cancel()
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()
            await sources.close()
            await conversation.close()
            await transport.close()
    return ""


def _forged(what: str, answer: ms.Receipt) -> None:
    @case(RECEIPTS, what)
    async def _(home: Path) -> str:
        return "" if await handed_in(home, answer) else "accepted"


for how, forged in _receipts().items():
    _forged(how, forged)


@case("honest receipt", "signed by the hub for this update")
async def _(home: Path) -> str:
    return await handed_in(home, receipt())
