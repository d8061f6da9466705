"""Check this device and the way to the hub, one step after the other; each passes, or says what to do.

The steps of the network are left to the transport, torch and the GPU to a worker process, and showing to the command.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsoda_edge.device.facts import read_device
from fedsoda_edge.device.fit import Limits
from fedsoda_edge.errors import DeviceTooSmall, FedSODAError, HubUnreachable, Recovery, UsageProblem
from fedsoda_edge.join import identity
from fedsoda_edge.join.home import Home
from fedsoda_edge.join.inspect import look_at
from fedsoda_edge.join.token import read_token
from fedsoda_edge.join.trainer import WORKER_MODULE, worker_environment
from fedsoda_edge.ports import Clock, SystemClock, TorchPort, Transport
from fedsoda_edge.ports.child import Child
from fedsoda_edge.ports.machine import room
from fedsoda_edge.ports.system import memory_limit_hint
from fedsoda_edge.protocol.commands import Confinement, Examine
from fedsoda_edge.protocol.join_link import JoinLink
from fedsoda_edge.protocol.needs import Part
from fedsoda_edge.units import counted, human_bytes

if TYPE_CHECKING:
    from fedsoda_edge.network.proving import LinkedDevice
    from fedsoda_edge.network.tls import Trust

MAX_SKEW_SECONDS = 120.0
SHORT = {"bfloat16": "bf16", "float32": "fp32"}  # dtypes, for people
PROBE_BYTES = 4 << 20  # fetched of the bundle, to measure the bandwidth


@dataclass(frozen=True)
class DoctorStep:
    """A step and its result.

    fix: what to do; "" where the step passed. exit_status, recovery: the command's when this is the first step that fails.
    parts: what the memory in the detail consists of.
    """

    name: str
    passed: bool
    detail: str
    fix: str = ""
    exit_status: int = 0
    parts: Sequence[Part] = ()
    recovery: Recovery = "fix-machine"


def _failed(name: str, error: FedSODAError) -> DoctorStep:
    what, mark, fix = str(error).rpartition("; ")
    recovery = error.way_out().recovery
    return DoctorStep(name, False, what if mark else fix, fix if mark else "", error.exit_status, recovery=recovery)


def linked(home: Home, link: JoinLink, trust: Trust) -> LinkedDevice:
    """Return this device as the hub of the link is to know it; its key is made the first time.

    Args:
        trust: as the user said, whose pin must be the link's.

    Raises:
        UsageProblem: the key's file is damaged, the home cannot be used, or pin and link name different keys.
        DiskFull: the disk has no space left.
    """
    from fedsoda_edge.network.proving import LinkedDevice

    if trust.pin is not None and trust.pin != link.tls_pin:
        raise UsageProblem(
            "pin and the join link do not name the same TLS key; leave the pin out: the link has its own"
        )
    worked = lambda url: identity.reached(home, link, url)  # noqa: E731
    return LinkedDevice(link, identity.device_key(home), identity.addresses(home, link), trust.insecure_http, worked)


async def examine(
    hub: str | JoinLink | None,
    token_file: str | Path | None,
    home: Home,
    *,
    pin: str | None = None,
    insecure_http: bool = False,
    worker: TorchPort | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[DoctorStep]:
    """Yield all steps in order. Steps that depend on one that failed are left out.

    Args:
        hub: its URL, or the join link; None: only this device is checked. pin, insecure_http: as of `Edge`.
        worker: what looks at torch; None: a child process. clock: None: the system's.
    """
    with tempfile.TemporaryDirectory(prefix="fedsoda-doctor-") as made:
        async for check in _device(home, worker or Child(WORKER_MODULE, worker_environment(Path(made)))):
            yield check
    if hub is not None:
        async for check in _way_to(hub, token_file, home, pin, insecure_http, clock or SystemClock()):
            yield check


async def _device(home: Home, worker: TorchPort) -> AsyncIterator[DoctorStep]:
    yield DoctorStep("Python", True, platform.python_version())
    try:
        found = await worker.call(Examine())
    except FedSODAError as error:
        yield _failed("torch", error)
        return
    finally:
        await worker.close()
    yield DoctorStep("torch", True, f"{found.torch}, {found.threads} threads")
    if found.confinement is not None:
        yield DoctorStep("confinement", True, _confinement_sentence(found.confinement))
    yield DoctorStep(
        "GPU",
        True,
        f"{found.accelerator or 'none that torch sees: training runs on the CPU'}, in {SHORT[found.dtype]}",
    )
    problem = found.nf4_problem
    yield DoctorStep(
        "NF4",
        not problem,
        problem or f"forward and backward are right on {found.device}",
        "install bitsandbytes for this CUDA again, or train with device='cpu'" if problem else "",
        1,
    )
    facts = read_device(home.directory)
    hint = memory_limit_hint()
    limits = room()
    by = f", as {limits.ram_from} allows" if limits.ram_from else ""
    yield DoctorStep("memory", True, f"{human_bytes(facts.ram_bytes)} free{by}" + (f" ({hint})" if hint else ""))
    by = f", as {limits.cpus_from} allows" if limits.cpus_from else ""
    yield DoctorStep("CPU", True, f"{counted(limits.cpus, 'CPU')}{by}")
    if facts.accelerator:
        yield DoctorStep("GPU memory", True, f"{human_bytes(facts.vram_bytes)} free on {facts.accelerator}")
    yield DoctorStep("disk", True, f"{human_bytes(facts.disk_bytes)} free for {home.directory}")


def _confinement_sentence(found: Confinement) -> str:
    """Write what the worker gave up, and why not the rest."""
    given_up = [f"no network ({found.network})"] * bool(found.network)
    given_up += [f"no paths but its own ({found.files})"] * bool(found.files)
    return ("the worker has " if given_up else "the worker is not confined: ") + "; ".join([*given_up, *found.missing])


async def _way_to(
    hub: str | JoinLink,
    token_file: str | Path | None,
    home: Home,
    pin: str | None,
    insecure_http: bool,
    clock: Clock,
) -> AsyncIterator[DoctorStep]:
    from fedsoda_edge.network import checks
    from fedsoda_edge.network.hub_transport import HubTransport
    from fedsoda_edge.network.tls import Trust, read_pin, shortened

    step = "address"
    try:
        trust = Trust(None if pin is None else read_pin(pin), insecure_http)
        if isinstance(hub, str):
            transport, shown = HubTransport(hub, "", trust), "token"
        else:
            transport, shown = HubTransport.by_link(linked(home, hub, trust)), "join link"
            yield DoctorStep("address", True, ", ".join(route.url for route in transport.routes))
        route = transport.route
        for one in transport.routes[1:]:  # of several addresses one that answers is enough
            if await checks.first_failure(route) is None:
                break
            route = one
        yield DoctorStep("proxy", True, route.via)
        step = "DNS"
        of_proxy = "" if route.proxy is None else ", of the proxy"
        yield DoctorStep(step, True, await checks.check_dns(route) + of_proxy)
        step = "TCP"
        yield DoctorStep(step, True, f"answers in {1000 * await checks.check_tcp(route):.0f} ms{of_proxy}")
        step = "TLS"
        certificate = await checks.check_tls(route)
        pinned = route.trust.pin
        of_key = f"the pinned key {shortened(pinned)}, " if pinned is not None else ""
        until = f"{of_key}certificate until {certificate.valid_until}" if certificate else "not used: http://"
        yield DoctorStep(step, True, until)
        step = "HTTP"
        theirs = await checks.check_http(route)
        yield DoctorStep(step, True, "a hub answers")
        if theirs is not None:
            skew = clock.wall() - theirs.timestamp()
            way = "ahead of" if skew > 0 else "behind"
            is_near = abs(skew) < MAX_SKEW_SECONDS
            fix = "" if is_near else "set this device's clock: certificates and due times depend on it"
            yield DoctorStep("clock", is_near, f"{abs(skew):.0f} s {way} the hub's", fix, 1)
        step = shown
        if isinstance(hub, str):
            transport = HubTransport(hub, read_token(token_file), trust)
        await transport.connect()
        await transport.close()
        yield DoctorStep(step, True, "accepted, and the websocket opens")
        step = "fits"
        key = None if isinstance(hub, str) else hub.hub_key
        found = await look_at(transport, home, "auto", Limits(), key)
        yield DoctorStep(
            step,
            True,
            f"{found.source}: {found.memory.message}; download {human_bytes(found.disk_needed)}",
            parts=found.memory.parts,
        )
        step = "bandwidth"
        try:
            size, seconds = await _bandwidth(transport, found.largest_file)
        finally:
            await transport.close()
        yield DoctorStep(step, True, f"{human_bytes(size / seconds)}/s")
    except FedSODAError as error:
        if isinstance(error, HubUnreachable) and error.step == "proxy":
            step = "proxy"
        yield _failed("memory" if isinstance(error, DeviceTooSmall) else step, error)


async def _bandwidth(transport: Transport, digest: str) -> tuple[int, float]:
    """Fetch the first PROBE_BYTES of a file, or all of it; return (bytes, seconds)."""
    started, size = time.perf_counter(), 0
    stream = transport.fetch(digest, 0)
    async for piece in stream:
        size += len(piece)
        if size >= PROBE_BYTES:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return size, max(time.perf_counter() - started, 1e-6)
