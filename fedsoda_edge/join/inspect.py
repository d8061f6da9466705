"""Greet a hub without joining its run: see what it would ask of this device, or say that this device does not come back.

Neither changes the run's state on this device; joining is left to `agent.py`.
"""

from __future__ import annotations

from importlib.metadata import version

import msgspec

from fedsoda_edge import events as ev
from fedsoda_edge.device.facts import read_device
from fedsoda_edge.device.fit import Limits, plan_sentence, table
from fedsoda_edge.events import DeviceName
from fedsoda_edge.join import size_class
from fedsoda_edge.join.conversation import Conversation
from fedsoda_edge.join.download import fetch_manifest
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.join.witness import HubWitness
from fedsoda_edge.ports import SystemClock, Transport
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.ports.system import place_of
from fedsoda_edge.protocol.messages import Hello
from fedsoda_edge.protocol.needs import SampleSizes
from fedsoda_edge.protocol.ranges import Count, Positive
from fedsoda_edge.protocol.versions import SPEAKS
from fedsoda_edge.units import one_line


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The needs of a run and what this device has free; sizes and names with _bytes, _needed and _free in bytes.

    largest_file: the digest of the bundle's largest file. size_class: 0 for the run's largest sub-LLM, then 1, 2, ...
    """

    run: str
    source: str
    layers: Positive
    layers_kept: Positive
    adapter_layers: Positive
    rank: Positive
    rounds: Positive
    largest_file: str
    size_class: Count
    disk_needed: Count
    disk_free: Count
    border_bytes_per_row: Positive
    ram_needed: Count
    ram_free: Count
    vram_needed: Count
    vram_free: Count
    device: DeviceName
    memory: ev.MemoryReport


def hello(home: Home) -> Hello:
    """Make the first message of a connection."""
    return Hello(
        protocol=SPEAKS.oldest,
        newest=0 if SPEAKS.newest == SPEAKS.oldest else SPEAKS.newest,
        software=f"fedsoda {version('fedsoda')}",
        device_id=home.device_id(),
        device=read_device(home.directory),
        place=place_of(home.device_id(), home.directory),
        waits=True,
    )


def _in_silence(_: ev.AnyEvent) -> None:
    """Say nothing: what is found is returned."""


def _conversation(transport: Transport, home: Home, hub_key: bytes | None) -> Conversation:
    clock = SystemClock()
    witness = HubWitness.of(transport.url, home, _in_silence, clock, hub_key, is_joining=False)
    return Conversation(transport, lambda: hello(home), _in_silence, clock, Patience(clock, 0.0), witness)  # asked once


async def look_at(transport: Transport, home: Home, device: str, limits: Limits, hub_key: bytes | None = None) -> Found:
    """Greet the hub, read its manifest and compare it with this device.

    Args:
        hub_key: as in `AgentSettings`.

    Raises:
        DeviceTooSmall: there is no room for the smallest sub-LLM of the run.
        HubUnreachable, RefusedByHub: the hub does not answer, or refuses this device.
        HubNotTrusted: another hub answers than this device knows.
    """
    conversation, store = _conversation(transport, home, hub_key), FileStore(home.store)
    try:
        welcome = await conversation.greet()
        taken = await size_class.take(
            welcome,
            lambda manifest: fetch_manifest(store, transport, manifest),
            store,
            home.directory,
            device,
            # Rows are not read here, so the longest that the run allows is planned for, all of it completion.
            SampleSizes(welcome.batch_size, welcome.max_length, welcome.max_length),
            limits,
            _in_silence,
        )
    finally:
        await conversation.close()
    manifest, memory, facts = taken.manifest, taken.memory, taken.facts
    on_cpu = memory.device == "cpu"
    return Found(
        run=welcome.run_name,
        source=one_line(manifest.source),
        layers=manifest.plan.num_layers,
        layers_kept=len(manifest.plan.kept),
        adapter_layers=len(manifest.plan.adapter),
        rank=manifest.lora.rank,
        rounds=welcome.rounds,
        largest_file=max(manifest.files, key=lambda file: file.bytes).sha256,
        size_class=taken.number,
        disk_needed=taken.disk_needed,
        disk_free=facts.disk_bytes,
        border_bytes_per_row=2 * int(manifest.config["hidden_size"]) * welcome.max_length,
        ram_needed=memory.peak if on_cpu else 0,
        ram_free=facts.ram_bytes,
        vram_needed=0 if on_cpu else memory.peak,
        vram_free=facts.vram_bytes,
        device=memory.device,
        memory=ev.memory_report(plan_sentence(memory, facts), memory, table(memory)),
    )


async def say_goodbye(transport: Transport, home: Home, hub_key: bytes | None = None) -> str:
    """Tell the hub that this edge does not come back by itself; return the run's name.

    Args:
        hub_key: as in `AgentSettings`.

    Raises:
        HubUnreachable, RefusedByHub: the hub did not hear it.
        HubNotTrusted: another hub answers than this device knows.
    """
    conversation = _conversation(transport, home, hub_key)
    try:
        welcome = await conversation.greet()
        await conversation.leave("the owner of the device left")
        if not home.is_in_use():  # else the join that runs here deletes them
            home.forget_borders()
        return welcome.run_name
    finally:
        await conversation.close()
