"""Take the largest of a run's sub-LLMs for which this device has room. Only manifests are fetched for that.

The hub averages each LoRA tensor over the edges that hold it, so no other edge depends on the choice. What fits is left
to `device/fit.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from fedsoda_edge.device.facts import read_device
from fedsoda_edge.device.fit import Limits, check_disk, fit
from fedsoda_edge.errors import DeviceTooSmall, DiskFull
from fedsoda_edge.events import EventSink, Notice
from fedsoda_edge.ports.store import FileStore
from fedsoda_edge.protocol.manifest import BundleManifest, check_manifest_size, parse_manifest
from fedsoda_edge.protocol.messages import BlobRef, DeviceFacts, SizeClass, Welcome
from fedsoda_edge.protocol.needs import MemoryPlan, SampleSizes, shape_of


@dataclass(frozen=True)
class Taken:
    """The sub-LLM that is taken.

    number: its size class, 0 for the largest, then 1, 2, ... memory: how it is trained here. disk_needed: bytes that
    bundle and views still need on disk.
    """

    number: int
    size_class: SizeClass
    manifest: BundleManifest
    memory: MemoryPlan
    facts: DeviceFacts
    disk_needed: int


async def take(
    welcome: Welcome,
    fetch: Callable[[BlobRef], Awaitable[Path]],
    store: FileStore,
    home: Path,
    device: str,
    samples: SampleSizes,
    limits: Limits,
    say: EventSink,
) -> Taken:
    """Take the largest sub-LLM whose files and training have room.

    Args:
        fetch: fetches a manifest and returns its file.
        home: the FEDSODA_HOME whose disk is measured.
        device, samples, limits: as in `device.fit.fit`.

    Raises:
        DeviceTooSmall: there is no memory for the smallest either.
        DiskFull: there is no disk for it.
    """
    classes = (SizeClass(manifest=welcome.manifest, emulator=welcome.emulator), *welcome.smaller)
    for number, one in enumerate(classes):
        check_manifest_size(one.manifest.bytes)
        manifest = parse_manifest((await fetch(one.manifest)).read_bytes())
        facts = read_device(home)
        held = store.held_bytes([(file.sha256, file.bytes) for file in manifest.files])
        needed = max(0, manifest.needs.disk_bytes - held)
        try:
            check_disk(needed, facts, held)
            memory = fit(device, shape_of(manifest), samples, facts, limits)
        except (DeviceTooSmall, DiskFull) as error:
            if number == len(classes) - 1:
                raise
            say(Notice(f"{error}; trying the run's next smaller sub-LLM"))
        else:
            return Taken(number, one, manifest, memory, facts, needed)
    raise AssertionError("a Welcome has a manifest")
