"""Attack the bytes of a bundle: other bytes, endless data, extraneous dependencies, wrong size, slow retrieval, mirrors."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
from attack_cases import EVIL, GOOD, case, hub_with, joined, tried
from small_hostile import (
    KEY,
    Answer,
    Bundle,
    Device,
    Heard,
    Server,
    header,
    listening,
    put,
    serving,
    statement,
    welcome,
)

from fedsoda_edge.errors import BlobCorrupt, FedSODAError, HubNotTrusted, HubUnreachable
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.signatures import as_text

# --- arbitrary installation -------------------------------------------------------------------------------------------

ARBITRARY = "arbitrary installation"


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
    honest = Server(cut_at(GOOD.files, 500))
    return await tried(Device(home), hub_with(None, GOOD), None, "", honest, Server(_lying(GOOD.files)))


def cut_at(files: dict[str, bytes], at: int) -> Answer:
    """Answer with the first bytes of a file, and hang up."""

    async def answer(heard: Heard, writer: asyncio.StreamWriter) -> None:
        data = files[heard.digest]
        header(writer, "200 OK", Content_Length=len(data))
        put(writer, data[:at])

    return answer


# --- endless data -----------------------------------------------------------------------------------------------------

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
    wrong = await tried(Device(home), hub, BlobCorrupt, "manifest of")
    return wrong or ("" if len(hub.heard) == 1 else "it was asked for")


# --- extraneous dependencies ------------------------------------------------------------------------------------------

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


# --- wrong size -------------------------------------------------------------------------------------------------------

SIZE = "wrong size"


@case(SIZE, "a manifest with other bytes than signed")
async def _(home: Path) -> str:
    greeting = welcome(GOOD, signed=statement(GOOD))
    larger = msgspec.structs.replace(greeting.manifest, bytes=greeting.manifest.bytes + 1)
    hub = Server(serving(GOOD.files), [msgspec.structs.replace(greeting, manifest=larger)])
    return await tried(await joined(home, GOOD), hub, HubNotTrusted, "mix-and-match")


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

    return await tried(Device(home), hub_with(None, GOOD), None, "", Server(cut_at(GOOD.files, 500)), Server(answer))


# --- slow retrieval ---------------------------------------------------------------------------------------------------

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


# --- the mirrors' side ------------------------------------------------------------------------------------------------


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
