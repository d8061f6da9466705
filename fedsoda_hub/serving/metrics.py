"""Count what a hub does, and write it as Prometheus reads it: OpenMetrics, or the older text where that is asked for.

Counters begin at 0 with each start of the hub, as Prometheus expects; bytes and gauges come from the ledger and continue.
No metric has a label that edges, strangers or data choose, so that their number is fixed. What gauges show is `gauges.py`'s,
who may ask the listener's.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    StateSetMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.exposition import generate_latest as as_text
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as as_openmetrics
from prometheus_client.registry import Collector

from fedsoda_edge.protocol.messages import PROTOCOL_VERSION
from fedsoda_hub import events
from fedsoda_hub.federation import jobs
from fedsoda_hub.federation.refusals import RefusalKind
from fedsoda_hub.serving.gauges import PHASES, Gauges, HostMemory, Seen

LAG_SECONDS = 0.5  # between two looks at how late the event loop is
OUTCOMES = ("accepted", "refused", "declined", "paused", "left", "missing")  # of an invited edge in a round
JOBS = tuple(sorted(str(kind.__struct_config__.tag) for kind in jobs.Job.__args__))
CHANNELS, DELIVERIES = ("command", "webhook"), ("delivered", "failed", "dropped")  # of notifications

_SHORT = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 600)
_LONG = (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 21600, 86400)
_LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True)
class Exposition:
    """The answer to a scrape."""

    data: bytes
    content_type: str


class _Together:
    """The counters and what was read off the hub for one scrape, as one thing to write."""

    def __init__(self, counted: Collector, seen: Sequence[Metric]) -> None:
        self._counted, self._seen = counted, seen

    def collect(self) -> Iterator[Metric]:
        yield from self._counted.collect()
        yield from self._seen


class Metrics:
    """The counters of a hub since it started. `hear` takes the daemon's events.

    Args:
        now: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._gauges: Gauges | None = None
        self._opened: tuple[int, float] | None = None  # the open round, and when this process saw it open
        self._deadline_at = 0.0
        self._invited: set[str] = set()
        self._answers: dict[str, str] = {}
        self._aligning: dict[str, float] = {}  # by job, when its alignment began
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._counters = self._made_counters()
        self._histograms = self._made_histograms()

    def _made_counters(self) -> dict[str, Counter]:
        def counter(name: str, text: str, label: str = "", values: Iterable[str] = ()) -> Counter:
            made = Counter(name, text, [label] if label else [], registry=self._registry)
            for value in values:
                made.labels(value)  # what did not happen yet is 0, not absent
            return made

        return {
            "rounds": counter("fedsoda_rounds", "Rounds that closed."),
            "updates": counter("fedsoda_updates", "Answers of invited edges.", "outcome", OUTCOMES),
            "refusals": counter("fedsoda_refusals", "Refusals of edges and strangers.", "reason", RefusalKind),
            "extensions": counter("fedsoda_round_extensions", "Deadlines that passed below quorum."),
            "connections": counter("fedsoda_edge_connections", "Connections of edges that were welcomed."),
            "departures": counter("fedsoda_edge_departures", "Edges that left the run for good."),
            "compute": counter("fedsoda_compute_failures", "Ends of the process that owns torch during a job."),
            "disk": counter("fedsoda_disk_full", "Writes that failed for lack of disk space."),
        }

    def _made_histograms(self) -> dict[str, Histogram]:
        def histogram(name: str, text: str, buckets: Sequence[float], label: str = "") -> Histogram:
            return Histogram(
                f"fedsoda_{name}_seconds", text, [label] if label else [], registry=self._registry, buckets=buckets
            )

        made = {
            "round": histogram(
                "round", "From a round's opening to its close, of rounds opened since the start.", _LONG
            ),
            "upload": histogram("upload", "From an update's announcement to its last byte on disk.", _SHORT),
            "aggregation": histogram("aggregation", "Merging a round's updates into the next master.", _SHORT),
            "alignment": histogram("alignment", "Steps of one alignment of a sub-LLM.", _LONG),
            "job": histogram("job", "A job of the process that owns torch, with its tries.", _LONG, "job"),
            "loop": histogram("event_loop_lag", "How late the event loop ran what was due.", _LAG),
        }
        for job in JOBS:
            made["job"].labels(job)
        self._deliveries = Counter(
            "fedsoda_notifications",
            "Notifications, by where they go and what became of them.",
            ["channel", "outcome"],
            registry=self._registry,
        )
        for channel in CHANNELS:
            for outcome in DELIVERIES:
                self._deliveries.labels(channel, outcome)
        return made

    def watch(self, gauges: Gauges) -> None:
        """Read gauges off this hub at each scrape."""
        self._gauges = gauges

    # --- what is counted ---------------------------------------------------------------------------------

    def refused(self, reason: RefusalKind) -> None:
        """Count a refusal."""
        self._counters["refusals"].labels(reason).inc()

    def uploaded(self, seconds: float) -> None:
        """Count an upload that came whole."""
        self._histograms["upload"].observe(seconds)

    def worked(self, job: str, seconds: float) -> None:
        """Count a job that is done, by the name that people read."""
        self._histograms["job"].labels(job).observe(seconds)
        if job == "aggregate":
            self._histograms["aggregation"].observe(seconds)

    def delivered(self, channel: str, outcome: str) -> None:
        """Count a notification, by one of CHANNELS and one of DELIVERIES."""
        self._deliveries.labels(channel, outcome).inc()

    def hear(self, event: events.HubEvent) -> None:
        """Count what an event says."""
        match event:
            case events.RoundOpened():
                self._opened = (event.round, self._now())
                self._deadline_at = event.deadline_at
                self._invited, self._answers = set(event.cohort), {}
            case events.CohortExtended():
                if event.deadline_at != self._deadline_at:  # the same deadline: an edge is back from a pause
                    self._counters["extensions"].inc()
                self._deadline_at = event.deadline_at
                self._invited.update(event.invited)
                for edge in event.invited:
                    self._answers.pop(edge, None)
            case events.UpdateAccepted():
                self._answered(event.edge, "accepted")
            case events.EdgeAnswered():
                self._answered(event.edge, event.how)
            case events.RoundClosed():
                self._closed(event)
            case events.StageProgress(stage="aligning"):
                self._aligned(event)
            case events.EdgeConnected():
                self._counters["connections"].inc()
            case events.EdgeLeft():
                self._counters["departures"].inc()
            case events.ComputeFailed():
                self._counters["compute"].inc()
                self._aligning.pop(event.job, None)
            case events.OutOfDisk():
                self._counters["disk"].inc()

    def _answered(self, edge: str, outcome: str) -> None:
        if self._answers.get(edge) != outcome:
            self._answers[edge] = outcome
            self._counters["updates"].labels(outcome).inc()

    def _closed(self, event: events.RoundClosed) -> None:
        self._counters["rounds"].inc()
        if self._opened is not None and self._opened[0] == event.round:
            self._histograms["round"].observe(self._now() - self._opened[1])
            self._counters["updates"].labels("missing").inc(len(self._invited - self._answers.keys()))
        self._opened = None
        self._invited, self._answers = set(), {}

    def _aligned(self, event: events.StageProgress) -> None:
        began = self._aligning.setdefault(event.job, self._now())
        if event.done >= event.total:
            del self._aligning[event.job]
            self._histograms["alignment"].observe(self._now() - began)

    async def run(self) -> None:
        """Measure how late the event loop is, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._histograms["loop"].observe(max(0.0, loop.time() - due))

    # --- what is written ---------------------------------------------------------------------------------

    async def scrape(self, accept: str) -> Exposition:
        """Write all metrics as of now, in the form that the Accept header prefers."""
        gauges = self._gauges
        seen = None if gauges is None else gauges.look()

        def write() -> Exposition:
            read = [] if gauges is None or seen is None else list(_families(seen, gauges.measure()))
            together = _Together(self._registry, [_build(), *read])
            if prefers_openmetrics(accept):
                return Exposition(as_openmetrics(together), OPENMETRICS)  # type: ignore[no-untyped-call]
            return Exposition(as_text(together), CONTENT_TYPE_PLAIN_0_0_4)

        return await asyncio.to_thread(write)


def prefers_openmetrics(accept: str) -> bool:
    """Tell whether an Accept header prefers OpenMetrics 1.0 to the older text; an empty one does not."""
    best = {True: 0.0, False: 0.0}
    for one in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in one.split(";"))
        values = dict(part.split("=", 1) for part in parameters if "=" in part)
        try:
            weight = float(values.get("q", "1"))
        except ValueError:
            weight = 0.0
        is_openmetrics = kind == "application/openmetrics-text"
        if is_openmetrics and values.get("version", "1.0.0").strip('"') not in ("1.0.0", "0.0.1"):
            continue
        best[is_openmetrics] = max(best[is_openmetrics], weight)
    return best[True] > 0 and best[True] >= best[False]


def _build() -> Metric:
    try:
        release = version("fedsoda")
    except PackageNotFoundError:  # a checkout that is not installed
        release = ""
    return InfoMetricFamily(
        "fedsoda_build",
        "What runs here.",
        {"version": release, "protocol": str(PROTOCOL_VERSION), "python": platform.python_version()},
    )


def _families(seen: Seen, machine: HostMemory) -> Iterator[Metric]:
    """Make the metrics that are read off the hub at a scrape."""

    def gauge(name: str, text: str, value: float | None) -> Metric:
        made = GaugeMetricFamily(f"fedsoda_{name}", text)
        if value is not None:
            made.add_metric([], value)
        return made

    def by(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
        made = GaugeMetricFamily(f"fedsoda_{name}", text, labels=[label])
        for value, number in values:
            made.add_metric([value], number)
        return made

    phase = StateSetMetricFamily("fedsoda_run_phase", "What the run does.")
    phase.add_metric([], {one: one == seen.phase for one in PHASES})
    yield phase
    yield gauge("round", "The open round, or else the last one.", seen.round)
    yield gauge("rounds_planned", "[rounds] count.", seen.rounds)
    yield gauge("rounds_closed", "Rounds that closed since the run began.", seen.rounds_closed)
    yield gauge("round_edges_invited", "Edges that the open round invited; 0: none is open.", seen.invited)
    yield gauge("round_updates_accepted", "Updates that the open round has.", seen.accepted)
    yield gauge("round_updates_needed", "Updates that close the open round at its deadline.", seen.needed)
    yield gauge("round_deadline_timestamp_seconds", "When the open round is due.", seen.deadline_at)
    yield gauge("round_loss", "Loss of the last closed round, nats a completion id.", seen.loss)
    yield by("accuracy_ratio", "Accuracy of the last evaluation.", "model", seen.accuracy.items())
    yield by("edges", "Edges by what they do now; each is in one state.", "state", seen.edges.items())
    yield by("queue_length", "What waits to be worked on.", "queue", seen.queues.items())
    yield gauge("uploading_bytes", "Announced bytes of uploads under way.", seen.uploading_bytes)
    travelled = CounterMetricFamily(
        "fedsoda_network_bytes",
        "Websocket payload and framing of all edges since the run began, without the bundle's files.",
        labels=["direction"],
    )
    travelled.add_metric(["up"], seen.bytes_up)
    travelled.add_metric(["down"], seen.bytes_down)
    yield travelled
    yield gauge("disk_free_bytes", "Free bytes where the run's directory lies.", machine.disk_free)
    yield gauge("disk_size_bytes", "Size of the file system where the run's directory lies.", machine.disk_size)
    yield gauge("compute_resident_memory_bytes", "Memory of the process that owns torch.", machine.compute_rss)
    yield gauge("compute_vram_bytes", "GPU memory of the process that owns torch.", machine.compute_vram)
