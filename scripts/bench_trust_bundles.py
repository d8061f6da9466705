"""Try the attacks of The Update Framework, by their names, and forged receipts against the edge's own code.

Each case is right when the edge refuses what it must, its store holds nothing but files that the run's hub signed for, and
what it remembers of the hub is as before. Part of scripts/bench_trust.py; the servers are small_hostile.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from small_hostile import (
    DAY,
    KEY,
    MALLORY,
    RUN,
    Answer,
    Bundle,
    Device,
    Heard,
    Server,
    changed,
    digest_of,
    header,
    listening,
    put,
    serving,
    statement,
    welcome,
)

from fedsoda_edge.errors import BlobCorrupt, FedSODAError, HubNotTrusted, HubUnreachable, ProtocolViolation
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.signatures import as_text
from fedsoda_edge.protocol.statements import ReceiptStatement, sign

GOOD, EVIL, SMALL = Bundle("good"), Bundle("evil"), Bundle("small")
CASE_SECONDS = 8.0
Case = Callable[[Path], Awaitable[str]]  # returns what went wrong; "": nothing
CASES: dict[str, Case] = {}
SIGNED_FILES = {**GOOD.files, **SMALL.files}


def case(attack: str, what: str) -> Callable[[Case], Case]:
    """Register a case by the attack's name."""

    def take(made: Case) -> Case:
        CASES[f"{attack}: {what}"] = made
        return made

    return take


async def tried(
    device: Device, hub: Server, refusal: type[FedSODAError] | None, word: str = "", *others: Server
) -> str:
    """Join; say what was not as it must be. refusal: None: the join must work."""
    async with listening(hub, *others):
        if others:  # their addresses are known only by now
            mirrors = tuple(f"{other.url}/run7/" for other in others)
            hub.says[0] = welcome(GOOD, signed=statement(GOOD, mirrors=mirrors))
        return await outcome(device, hub, refusal, word)


async def outcome(device: Device, hub: Server, refusal: type[FedSODAError] | None, word: str) -> str:
    """Join a hub that listens; as `tried`."""
    known = device.home.known_hub(RUN)
    before = known.read_bytes() if known.exists() else None
    try:
        await device.join(hub.url)
    except FedSODAError as error:
        if refusal is None:
            return f"refused: {error}"
        if not isinstance(error, refusal) or word not in str(error):
            return f"refused for another reason: {type(error).__name__}: {error}"
        if before is not None and known.read_bytes() != before:
            return "what the device remembers of the hub has changed"
    else:
        if refusal is not None:
            return "accepted"
    foreign = [name for name, data in device.held.items() if SIGNED_FILES.get(name) != data]
    return f"the store holds {foreign}" if foreign else ""


async def joined(home: Path, *bundles: Bundle, version: int = 1) -> Device:
    """A device that has joined the run before."""
    device = Device(home)
    hub = Server(serving(SIGNED_FILES), [welcome(*bundles, signed=statement(*bundles, version=version))])
    wrong = await tried(device, hub, None)
    assert not wrong, wrong
    return Device(home)  # of a later process


def hub_with(signed: ms.Signed | None, *bundles: Bundle, run: str = RUN, answer: Answer | None = None) -> Server:
    """A hub that shows this statement."""
    return Server(answer or serving({**SIGNED_FILES, **EVIL.files}), [welcome(*bundles, signed=signed, run=run)])


# --- arbitrary installation ------------------------------------------------------------------------------------------

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


def _lying(files: dict[str, bytes]) -> Answer:
    return serving({name: bytes(len(data)) for name, data in files.items()})


@case(ARBITRARY, "a mirror with other bytes of the same size")
async def _(home: Path) -> str:
    device, liar = Device(home), Server(_lying(GOOD.files))
    wrong = await tried(device, hub_with(None, GOOD), None, "", liar)
    return wrong or ("" if len(liar.heard) == 1 else f"the mirror that lied was asked {len(liar.heard)} times")


@case(ARBITRARY, "a hub with other bytes of the same size")
async def _(home: Path) -> str:
    return await tried(Device(home), hub_with(statement(GOOD), GOOD, answer=_lying(GOOD.files)), BlobCorrupt, "digest")


@case(ARBITRARY, "a mirror that continues a file of an honest one with other bytes")
async def _(home: Path) -> str:
    honest = Server(_cut_at(GOOD.files, 500))
    return await tried(Device(home), hub_with(None, GOOD), None, "", honest, Server(_lying(GOOD.files)))


def _cut_at(files: dict[str, bytes], at: int) -> Answer:
    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        data = files[heard.digest]
        header(writer, "200 OK", Content_Length=len(data))
        put(writer, data[:at])

    return answer


# --- endless data ----------------------------------------------------------------------------------------------------

ENDLESS = "endless data"


def _endless(status: str = "200 OK", **headers: object) -> Answer:
    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        header(writer, status, **headers)
        data = GOOD.files.get(heard.digest, b"")
        put(writer, data)
        with contextlib.suppress(ConnectionError):
            while True:
                put(writer, bytes(65536))
                await writer.drain()

    return answer


async def _bounded(home: Path, answer: Answer, *, is_mirror: bool, refusal: type[FedSODAError] | None) -> str:
    server = Server(answer) if is_mirror else hub_with(statement(GOOD), GOOD, answer=answer)
    if is_mirror:
        wrong = await tried(Device(home), hub_with(None, GOOD), refusal, "", server)
    else:
        wrong = await tried(Device(home), server, refusal)
    asked = max(1, len(server.heard))
    # What lies in the buffers of two sockets is sent without being read.
    return wrong or ("" if server.written < asked * (16 << 20) else f"{server.written} bytes were taken")


@case(ENDLESS, "a mirror that sends on after the file")
async def _(home: Path) -> str:
    return await _bounded(home, _endless(), is_mirror=True, refusal=None)


@case(ENDLESS, "a hub that sends on after the file")
async def _(home: Path) -> str:
    return await _bounded(home, _endless(), is_mirror=False, refusal=BlobCorrupt)


@case(ENDLESS, "an error page without end, of a hub")
async def _(home: Path) -> str:
    return await _bounded(home, _endless("503 Busy"), is_mirror=False, refusal=HubUnreachable)


@case(ENDLESS, "an error page without end, of a mirror")
async def _(home: Path) -> str:
    return await _bounded(home, _endless("503 Busy"), is_mirror=True, refusal=None)


@case(ENDLESS, "compressed bytes that become gigabytes, of a hub")
async def _(home: Path) -> str:
    return await _bounded(home, _endless(Content_Encoding="zstd"), is_mirror=False, refusal=HubUnreachable)


@case(ENDLESS, "compressed bytes, of a mirror")
async def _(home: Path) -> str:
    return await _bounded(home, _endless(Content_Encoding="gzip"), is_mirror=True, refusal=None)


@case(ENDLESS, "a manifest that is announced with a terabyte")
async def _(home: Path) -> str:
    large = ms.BlobRef(digest=GOOD.ref.digest, bytes=1 << 40)
    text = statement(GOOD).text.replace(f'"bytes":{GOOD.ref.bytes}', f'"bytes":{1 << 40}')
    signed = ms.Signed(text=text, key=as_text(KEY.public), signature=as_text(KEY.sign("manifest", text.encode())))
    greeting = msgspec.structs.replace(welcome(GOOD, signed=signed), manifest=large)
    hub = Server(_endless(), [greeting])
    wrong = await tried(Device(home), hub, ProtocolViolation, "manifest of")
    return wrong or ("" if len(hub.heard) == 1 else "it was asked for")


# --- extraneous dependencies -----------------------------------------------------------------------------------------

EXTRANEOUS = "extraneous dependencies"


async def _refused_bundle(home: Path, made: Bundle, word: str) -> str:
    hub = hub_with(statement(made), made, answer=serving(made.files))
    device = Device(home)
    async with listening(hub):
        try:
            await device.join(hub.url)
        except BlobCorrupt as error:
            extra = set(device.held) - {made.ref.digest}
            return f"{len(extra)} files were fetched" if extra else "" if word in str(error) else str(error)
    return "accepted"


@case(EXTRANEOUS, "a file that no bundle has")
async def _(home: Path) -> str:
    return await _refused_bundle(home, Bundle(more=("setup.py",)), "a file that no bundle has")


@case(EXTRANEOUS, "a layer that the plan does not keep")
async def _(home: Path) -> str:
    return await _refused_bundle(home, Bundle(more=("layers.7.safetensors",)), "a file that no bundle has")


@case(EXTRANEOUS, "a path that leads out of the store")
async def _(home: Path) -> str:
    return await _refused_bundle(home, Bundle(more=("../../.bashrc",)), "a file that no bundle has")


@case(EXTRANEOUS, "files larger than the disk that they are said to need")
async def _(home: Path) -> str:
    return await _refused_bundle(home, Bundle(needs=5000), "bytes of disk")


@case(EXTRANEOUS, "files that a mirror offers beside those that were asked for")
async def _(home: Path) -> str:
    mirror = Server(serving({**GOOD.files, **EVIL.files}))
    wrong = await tried(Device(home), hub_with(None, GOOD), None, "", mirror)
    asked = {one.digest for one in mirror.heard}
    return wrong or ("" if asked == set(GOOD.files) else f"asked for {len(asked)} files, of {len(GOOD.files)} needed")


# --- freeze ----------------------------------------------------------------------------------------------------------

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


# --- rollback --------------------------------------------------------------------------------------------------------

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


# --- mix-and-match ---------------------------------------------------------------------------------------------------

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


# --- wrong size ------------------------------------------------------------------------------------------------------

SIZE = "wrong size"


@case(SIZE, "a manifest with other bytes than signed")
async def _(home: Path) -> str:
    greeting = welcome(GOOD, signed=statement(GOOD))
    larger = msgspec.structs.replace(greeting.manifest, bytes=greeting.manifest.bytes + 1)
    hub = Server(serving(GOOD.files), [msgspec.structs.replace(greeting, manifest=larger)])
    return await tried(await joined(home, GOOD), hub, HubNotTrusted, MIX)


@case(SIZE, "a mirror whose file is shorter")
async def _(home: Path) -> str:
    short = {name: data[:-10] for name, data in GOOD.files.items()}
    return await tried(Device(home), hub_with(None, GOOD), None, "", Server(serving(short)))


@case(SIZE, "a mirror whose file is longer")
async def _(home: Path) -> str:
    longer = {name: data + b"more" for name, data in GOOD.files.items()}
    return await tried(Device(home), hub_with(None, GOOD), None, "", Server(serving(longer)))


@case(SIZE, "a hub whose file is longer")
async def _(home: Path) -> str:
    longer = {name: data + b"more" for name, data in GOOD.files.items()}
    return await tried(Device(home), hub_with(statement(GOOD), GOOD, answer=serving(longer)), BlobCorrupt, "more than")


@case(SIZE, "a mirror that continues at another byte than asked")
async def _(home: Path) -> str:
    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        data = GOOD.files[heard.digest]
        header(
            writer,
            "206 Partial Content",
            Content_Length=len(data),
            Content_Range=f"bytes 0-{len(data) - 1}/{len(data)}",
        )
        put(writer, data)

    return await tried(Device(home), hub_with(None, GOOD), None, "", Server(_cut_at(GOOD.files, 500)), Server(answer))


# --- slow retrieval --------------------------------------------------------------------------------------------------

SLOW = "slow retrieval"


def _trickling(seconds: float) -> Answer:
    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        data = GOOD.files[heard.digest]
        header(writer, "200 OK", Content_Length=len(data))
        with contextlib.suppress(ConnectionError):
            for place in range(len(data)):
                put(writer, data[place : place + 1])
                await writer.drain()
                await asyncio.sleep(seconds)

    return answer


@case(SLOW, "a mirror that sends a byte at a time")
async def _(home: Path) -> str:
    mirror = Server(_trickling(0.02))
    wrong = await tried(Device(home), hub_with(None, GOOD), None, "", mirror)
    return wrong or ("" if len(mirror.heard) == 1 else f"it was asked {len(mirror.heard)} times")


@case(SLOW, "a mirror that sends nothing after its headers")
async def _(home: Path) -> str:
    return await tried(Device(home), hub_with(None, GOOD), None, "", Server(_trickling(600.0)))


@case(SLOW, "a hub that sends a byte at a time")
async def _(home: Path) -> str:
    hub = hub_with(statement(GOOD), GOOD, answer=_trickling(0.02))
    return await tried(Device(home), hub, HubUnreachable, "a transfer below")


# --- receipts --------------------------------------------------------------------------------------------------------

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


# --- the mirrors' side -----------------------------------------------------------------------------------------------


@case("mirrors", "no token, no cookie and no header of ours is sent, and the hub is asked for nothing")
async def _(home: Path) -> str:
    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        header(writer, "200 OK", Content_Length=len(GOOD.files[heard.digest]), Set_Cookie="who=you; Path=/")
        put(writer, GOOD.files[heard.digest])

    mirror, hub = Server(answer), hub_with(None, GOOD)
    wrong = await tried(Device(home), hub, None, "", mirror)
    known = {"host", "accept", "accept-encoding", "connection", "user-agent", "range", ""}
    ours = {name for heard in mirror.heard for name in heard.headers} - known
    told = [heard.headers for heard in mirror.heard if "good" in str(heard.headers)]
    asked = [heard.path for heard in hub.heard if "blobs" in heard.path]
    return wrong or (f"sent {ours} {told}, asked the hub for {len(asked)} files" if ours or told or asked else "")


@case("mirrors", "a redirect over plain http is not followed")
async def _(home: Path) -> str:
    other = Server(serving(GOOD.files))

    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        header(writer, "302 Found", Location=f"{other.url}/{heard.digest}", Content_Length=0)

    async with listening(other):
        wrong = await tried(Device(home), hub_with(None, GOOD), None, "", Server(answer))
    return wrong or ("it was followed" if other.heard else "")


# --- the part of bench_trust -----------------------------------------------------------------------------------------

SLOW_CASES = tuple(name for name in CASES if name.startswith((SLOW, ENDLESS)))


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    with mock.patch.dict(os.environ, {"NO_PROXY": "*", "no_proxy": "*"}):
        yield


def run_case(name: str, home: Path) -> str:
    """Try one case; return what went wrong, "": nothing."""

    async def timed() -> str:
        try:
            return await asyncio.wait_for(CASES[name](home), CASE_SECONDS)
        except TimeoutError:
            return f"it was not over after {CASE_SECONDS:.0f} s"

    with _no_proxy():
        try:
            return asyncio.run(timed())
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def measure(quick: bool) -> dict[str, object]:
    """Try all cases; quick: three times less of those that wait for a slow server. Returns counts."""
    wrong, by_attack, right = list[str](), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="fedsoda-trust-") as made:
        for number in range(1 if quick else 3):
            for name in CASES:
                found = run_case(name, Path(made) / f"{number}-{digest_of(name.encode())[:12]}")
                by_attack[name.partition(":")[0]] += not found
                right += not found
                wrong += [f"{name}: {found}"] if found else []
    tried_cases = right + len(wrong)
    return {"tried": tried_cases, "right": right, "wrong": wrong[:20], "by_attack": dict(by_attack)}


def _signature() -> AbstractContextManager[Any]:
    """No signature is verified."""
    return mock.patch("fedsoda_edge.protocol.statements.verify", return_value=None)


def _memory() -> AbstractContextManager[Any]:
    """What was seen of a hub is forgotten."""
    return mock.patch("fedsoda_edge.join.trust._known", return_value=None)


def _expiry() -> AbstractContextManager[Any]:
    """Nothing expires."""
    return mock.patch("fedsoda_edge.join.trust.has_ended", return_value=False)


def _digest() -> AbstractContextManager[Any]:
    """What was fetched is taken for what was asked for."""
    return mock.patch("fedsoda_edge.join.download.sha256_file", lambda path: path.stem)


def _receipt() -> AbstractContextManager[Any]:
    """Every receipt is believed."""
    return mock.patch("fedsoda_edge.join.trust.receipt_problem", return_value="")


def _pace() -> AbstractContextManager[Any]:
    """A transfer may take as long as it likes."""

    async def unpaced(pieces: AsyncIterator[bytes], *_: object) -> AsyncIterator[bytes]:
        async for piece in pieces:
            yield piece

    return mock.patch("fedsoda_edge.join.download.paced", unpaced)


DEFECTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a manifest's or receipt's signature is not verified": _signature,
    "the hub's key and version are not remembered": _memory,
    "an expired statement is accepted": _expiry,
    "a file's digest is not compared": _digest,
    "a receipt is not compared with what was sent": _receipt,
    "a slow transfer is not ended": _pace,
}
