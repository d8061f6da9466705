"""Register attacks by their names, and say of each what the edge did that it must not. The attacks are in attacks_on_*.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from small_hostile import (
    RUN,
    Answer,
    Bundle,
    Device,
    Server,
    listening,
    serving,
    statement,
    welcome,
)

from fedsoda_edge.errors import FedSODAError
from fedsoda_edge.protocol import messages as ms

GOOD, EVIL, SMALL = Bundle("good"), Bundle("evil"), Bundle("small")
CASE_SECONDS = 20.0
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
