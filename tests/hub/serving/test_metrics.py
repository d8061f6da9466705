"""What /metrics shows: counted from events, read off a hub, in both forms, with as many series however many edges come."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from fedsoda_edge.protocol import messages as ms
from fedsoda_hub import events
from fedsoda_hub.federation.refusals import RefusalKind
from fedsoda_hub.federation.rounds import RoundMachine
from fedsoda_hub.federation.state import LedgerState
from fedsoda_hub.serving.gauges import Gauges
from fedsoda_hub.serving.metrics import OUTCOMES, Metrics, prefers_openmetrics
from fedsoda_hub.serving.resume import rules_of
from tests.conftest import ROOT
from tests.hub.serving.test_daemon import connected, hello, joined, serving, update, write_run

OPENMETRICS = "application/openmetrics-text;version=1.0.0"
DEPLOY = ROOT / "scripts" / "deploy"
D = ms.Digest("0" * 64)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Nobody:
    """No edge is here, and no process computes."""

    pid = rss_bytes = None

    @property
    def connected(self) -> set[ms.EdgeId]:
        return set()

    def bytes_now(self) -> tuple[int, int]:
        return 7, 9


def hub_of(directory: Path, state: LedgerState | None = None) -> Metrics:
    settings, made = write_run(directory), Metrics()
    machine = RoundMachine(rules_of(settings), state or LedgerState(run_id="r"))
    made.watch(Gauges(settings, machine, Nobody(), Nobody(), directory))
    return made


def scraped(metrics: Metrics, accept: str = OPENMETRICS) -> str:
    return asyncio.run(metrics.scrape(accept)).data.decode()


def families(metrics: Metrics) -> dict[str, Metric]:
    return {one.name: one for one in read_openmetrics(scraped(metrics))}  # type: ignore[no-untyped-call]


def value(metrics: Metrics, sample: str, **labels: str) -> float:
    [found] = [
        one.value
        for family in families(metrics).values()
        for one in family.samples
        if one.name == sample and one.labels == labels
    ]
    return float(found)


def opened(number: int, *cohort: str, deadline_at: float = 1000.0) -> events.RoundOpened:
    return events.RoundOpened(
        rounds=9, round=number, cohort=tuple(map(ms.EdgeId, cohort)), view=D, alignment=0, deadline_at=deadline_at
    )


def accepted(number: int, edge: str) -> events.UpdateAccepted:
    return events.UpdateAccepted(
        rounds=9, round=number, edge=ms.EdgeId(edge), digest=D, num_examples=1, loss=0.5, size_class=0
    )


def closed(number: int) -> events.RoundClosed:
    return events.RoundClosed(
        rounds=9, round=number, master=D, view=D, delta=D, moments=None, cross_term=None, smaller=(), standings=(),
        loss=0.5, updates=1, bytes_up=1, bytes_down=1,
    )  # fmt: skip


# --- counting --------------------------------------------------------------------------------------------------------


def test_a_round_counts_each_invited_edge_once_by_what_became_of_it() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    metrics.hear(opened(1, "a", "b", "c", "d", "e"))
    metrics.hear(accepted(1, "a"))
    for edge, how in (("b", "declined"), ("c", "refused"), ("d", "paused")):
        metrics.hear(events.EdgeAnswered(rounds=9, round=1, edge=ms.EdgeId(edge), how=how))  # type: ignore[arg-type]
    clock.now += 42
    metrics.hear(closed(1))
    outcomes = {one: value(metrics, "fedsoda_updates_total", outcome=one) for one in OUTCOMES}
    assert outcomes == {"accepted": 1, "refused": 1, "declined": 1, "paused": 1, "left": 0, "missing": 1}
    assert value(metrics, "fedsoda_rounds_total") == 1
    assert value(metrics, "fedsoda_round_seconds_sum") == 42


def test_an_edge_that_is_back_from_a_pause_and_answers_is_not_missing() -> None:
    metrics = Metrics()
    metrics.hear(opened(1, "a", "b"))
    metrics.hear(events.EdgeAnswered(rounds=9, round=1, edge=ms.EdgeId("b"), how="paused"))
    metrics.hear(events.CohortExtended(rounds=9, round=1, invited=(ms.EdgeId("b"),), deadline_at=1000.0))
    assert value(metrics, "fedsoda_round_extensions_total") == 0  # the deadline is as it was
    metrics.hear(accepted(1, "a"))
    metrics.hear(accepted(1, "b"))
    metrics.hear(closed(1))
    assert value(metrics, "fedsoda_updates_total", outcome="missing") == 0
    assert value(metrics, "fedsoda_updates_total", outcome="accepted") == 2


def test_a_deadline_that_is_set_again_is_an_extension() -> None:
    metrics = Metrics()
    metrics.hear(opened(1, "a"))
    metrics.hear(events.CohortExtended(rounds=9, round=1, invited=(ms.EdgeId("b"),), deadline_at=2000.0))
    assert value(metrics, "fedsoda_round_extensions_total") == 1


def test_a_round_that_an_earlier_hub_opened_has_no_seconds_and_no_missing_edges() -> None:
    metrics = Metrics()
    metrics.hear(accepted(4, "a"))
    metrics.hear(closed(4))
    assert value(metrics, "fedsoda_rounds_total") == 1
    assert value(metrics, "fedsoda_round_seconds_count") == 0
    assert value(metrics, "fedsoda_updates_total", outcome="missing") == 0


def test_an_alignment_lasts_from_its_first_step_to_its_last() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    for done in range(4):
        clock.now += 10
        metrics.hear(events.StageProgress(job="realign", stage="aligning", done=done, total=3))
    assert value(metrics, "fedsoda_alignment_seconds_sum") == 30
    assert value(metrics, "fedsoda_alignment_seconds_count") == 1


def test_jobs_and_uploads_are_timed() -> None:
    metrics = Metrics()
    metrics.worked("aggregate", 2.0)
    metrics.worked("evaluate", 3.0)
    metrics.uploaded(0.25)
    assert value(metrics, "fedsoda_aggregation_seconds_sum") == 2
    assert value(metrics, "fedsoda_job_seconds_sum", job="evaluate") == 3
    assert value(metrics, "fedsoda_upload_seconds_count") == 1


def test_two_hubs_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.refused(RefusalKind.REVOKED)
    assert value(one, "fedsoda_refusals_total", reason="revoked") == 1
    assert value(other, "fedsoda_refusals_total", reason="revoked") == 0


def test_a_blocked_event_loop_is_seen() -> None:
    metrics = Metrics()

    async def block() -> None:
        measuring = asyncio.create_task(metrics.run())
        await asyncio.sleep(0)
        import time

        time.sleep(0.8)  # as a durable write on the loop would
        await asyncio.sleep(0.01)
        measuring.cancel()

    asyncio.run(block())
    late = value(metrics, "fedsoda_event_loop_lag_seconds_sum")
    assert 0.25 < late < 5


# --- writing ---------------------------------------------------------------------------------------------------------


def test_gauges_are_read_off_the_hub(tmp_path: Path) -> None:
    cohort = [ms.EdgeId("a"), ms.EdgeId("b"), ms.EdgeId("c")]
    state = LedgerState(run_id="r", phase="collecting", round=3, cohort=cohort, invited=3, deadline_at=5000.0)
    state.losses = [0.5, 0.25]
    metrics = hub_of(tmp_path, state)
    assert value(metrics, "fedsoda_round") == 3
    assert value(metrics, "fedsoda_rounds_closed") == 2
    assert value(metrics, "fedsoda_rounds_planned") == 2
    assert value(metrics, "fedsoda_round_updates_needed") == 2  # half of three, rounded up
    assert value(metrics, "fedsoda_round_deadline_timestamp_seconds") == 5000
    assert value(metrics, "fedsoda_round_loss") == 0.25
    assert value(metrics, "fedsoda_edges", state="away") == 3
    assert value(metrics, "fedsoda_network_bytes_total", direction="up") == 7
    assert value(metrics, "fedsoda_run_phase", fedsoda_run_phase="collecting") == 1
    assert value(metrics, "fedsoda_run_phase", fedsoda_run_phase="idle") == 0
    assert value(metrics, "fedsoda_disk_size_bytes") == shutil.disk_usage(tmp_path).total
    assert not families(metrics)["fedsoda_compute_vram_bytes"].samples  # nothing is shown of what does not run


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.9", False),
        ("application/openmetrics-text;version=9.0.0", False),
        ("application/openmetrics-text;version=abc", False),
        ("application/openmetrics-text;q=x, ;;=;, text/plain;q=", False),
        ("application/openmetrics-text;q=nan", False),
        (  # what Prometheus 3 sends
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
            "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            True,
        ),
    ],
)
def test_the_form_is_the_one_that_is_asked_for(accept: str, wanted: bool) -> None:
    assert prefers_openmetrics(accept) is wanted
    written = asyncio.run(Metrics().scrape(accept))
    assert written.content_type.startswith("application/openmetrics-text; version=1.0.0" if wanted else "text/plain; ")
    assert written.data.endswith(b"# EOF\n") is wanted
    list((read_openmetrics if wanted else read_text)(written.data.decode()))


def names(metrics: Metrics) -> set[str]:
    """Every name of a sample that a query can ask for."""
    return {one.name for family in families(metrics).values() for one in family.samples} | set(families(metrics))


def test_names_follow_the_conventions(tmp_path: Path) -> None:
    for family in families(hub_of(tmp_path)).values():
        assert family.name.startswith(("fedsoda_", "process_"))
        assert family.documentation
        if family.type == "counter":
            assert all(one.name.endswith(("_total", "_created")) for one in family.samples)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")


HOSTILE = ('"} 1\nfake_total 9', "a\\b", "é" * 40, "# HELP x", "{}", "\x00", "e")


def test_2000_edges_with_hostile_names_make_no_series(tmp_path: Path) -> None:
    def series(metrics: Metrics) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        return {
            (one.name, tuple(sorted(one.labels.items())))
            for family in families(metrics).values()
            for one in family.samples
        }

    metrics = hub_of(tmp_path)
    before = series(metrics)
    edges = [ms.EdgeId(f"{HOSTILE[number % len(HOSTILE)]}{number}") for number in range(2000)]
    for edge in edges:
        metrics.hear(events.EdgeConnected(edge=edge, software=edge))
    metrics.hear(opened(1, *edges))
    for number, edge in enumerate(edges):
        if number % 2:
            metrics.hear(accepted(1, edge))
        metrics.hear(events.EdgeLeft(edge=edge, reason=edge))
    metrics.hear(closed(1))
    assert series(metrics) == before
    assert len(before) < 320
    assert value(metrics, "fedsoda_updates_total", outcome="missing") == 1000
    assert len(scraped(metrics)) < 64_000


# --- a hub that serves -----------------------------------------------------------------------------------------------


def test_a_round_of_real_edges_is_in_the_metrics(tmp_path: Path) -> None:
    """Two edges hand in a round; a stranger, an edge of another protocol and a bad update are refused."""

    async def talk() -> dict[str, float]:
        async with serving(write_run(tmp_path)) as hub, httpx.AsyncClient(base_url=hub.url, trust_env=False) as client:
            tokens = {"a": hub.token("a"), "b": hub.token("b")}
            for token in ("", "guess"):
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                assert (await client.get(f"/v1/blobs/{D}", headers=headers)).status_code == 401
            async with connected(hub.url, hub.token("old")) as old:
                await old.say(hello("old", protocol=99))
                await old.hear(ms.Refusal)
            async with joined(hub.url, tokens["a"]) as a, joined(hub.url, tokens["b"], "phone") as b:
                await a.upload(await a.hear(ms.RoundOffer), update(0.5))
                offer = await b.hear(ms.RoundOffer)
                await b.upload(offer, update(0.25), base=D)
                await b.hear(ms.Refusal)
                await hub.until("round_closed")
                answer = await client.get("/metrics", headers={"Accept": OPENMETRICS})
                assert answer.headers["content-type"].startswith("application/openmetrics-text")
                return {
                    one.name + "".join(f" {value}" for value in one.labels.values()): one.value
                    for family in read_openmetrics(answer.text)  # type: ignore[no-untyped-call]
                    for one in family.samples
                }

    found = asyncio.run(talk())
    assert found["fedsoda_rounds_total"] == 1
    assert found["fedsoda_updates_total accepted"] == found["fedsoda_updates_total refused"] == 1
    assert found["fedsoda_refusals_total no_token"] == found["fedsoda_refusals_total unknown_token"] == 1
    assert found["fedsoda_refusals_total other_protocol"] == found["fedsoda_refusals_total bad_update"] == 1
    assert found["fedsoda_upload_seconds_count"] == 2
    assert found["fedsoda_round_seconds_count"] == found["fedsoda_aggregation_seconds_count"] == 1
    assert found["fedsoda_job_seconds_count prepare"] == 1
    assert found["fedsoda_network_bytes_total up"] > 2 * len(update(0.5))
    assert found["fedsoda_queue_length jobs"] == 0


# --- alerts and dashboard --------------------------------------------------------------------------------------------


def expressions() -> Iterator[str]:
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    for panel in json.loads((DEPLOY / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def test_every_metric_of_the_alerts_and_the_dashboard_exists(tmp_path: Path) -> None:
    known = names(hub_of(tmp_path))
    asked = {
        name
        for expression in expressions()
        for name in re.findall(r"\b(?:fedsoda|process)_\w+(?!\w*[=~!])", expression)
    }
    assert len(asked) > 30
    assert asked - known == set()


def test_every_own_metric_is_on_the_dashboard_or_in_an_alert(tmp_path: Path) -> None:
    """Nothing is measured that nobody looks at."""
    asked = " ".join(expressions())
    own = {name for name in families(hub_of(tmp_path)) if name.startswith("fedsoda_")}
    assert {name for name in own if not re.search(rf"\b{name}(_|\b)", asked)} == set()


def test_alerts_cover_what_an_owner_must_know() -> None:
    [group] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    for word in ("HubDown", "RoundStuck", "QuorumMissing", "DiskLow", "LoopLag", "ComputeFailing", "NoEdges"):
        assert f"FedSODA{word}" in {rule["alert"] for rule in group["rules"]}
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="Debian's package prometheus brings promtool"
)


@needs_promtool
def test_promtool_finds_nothing_wrong_with_metrics_and_rules(tmp_path: Path) -> None:
    text = "\n".join(
        line
        for line in scraped(hub_of(tmp_path), "").splitlines()
        if "process_" not in line  # names of the library
    )
    for arguments, given in (
        (["check", "metrics"], text + "\n"),
        (["check", "rules", "--lint=all", str(DEPLOY / "alerts.yml")], ""),
    ):
        done = subprocess.run(
            ["promtool", *arguments], input=given, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


RULE_TESTS = """
rule_files: [{alerts}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'up{{job="fedsoda", instance="h"}}', values: '0x30'}}
      - {{series: 'fedsoda_round_deadline_timestamp_seconds{{job="fedsoda", instance="h"}}', values: '60x30'}}
      - {{series: 'fedsoda_edges{{job="fedsoda", instance="h", state="idle"}}', values: '0x30'}}
      - {{series: 'fedsoda_edges{{job="fedsoda", instance="h", state="away"}}', values: '3x30'}}
      - {{series: 'fedsoda_run_phase{{job="fedsoda", instance="h", fedsoda_run_phase="idle"}}', values: '0x30'}}
      - {{series: 'fedsoda_run_phase{{job="fedsoda", instance="h", fedsoda_run_phase="collecting"}}', values: '1x30'}}
      - {{series: 'fedsoda_disk_free_bytes{{job="fedsoda", instance="h"}}', values: '1e9x30'}}
      - {{series: 'fedsoda_disk_size_bytes{{job="fedsoda", instance="h"}}', values: '1e12x30'}}
      - {{series: 'fedsoda_compute_failures_total{{job="fedsoda", instance="h"}}', values: '0 0 1x28'}}
      - {{series: 'fedsoda_round_extensions_total{{job="fedsoda", instance="h"}}', values: '0 0 1x28'}}
      - {{series: 'fedsoda_event_loop_lag_seconds_bucket{{job="fedsoda", instance="h", le="2.5"}}', values: '0+1x30'}}
      - {{series: 'fedsoda_event_loop_lag_seconds_bucket{{job="fedsoda", instance="h", le="5"}}', values: '0+60x30'}}
      - {{series: 'fedsoda_event_loop_lag_seconds_bucket{{job="fedsoda", instance="h", le="+Inf"}}', values: '0+60x30'}}
    promql_expr_test:
      - {{expr: 'count(ALERTS{{alertstate="firing"}})', eval_time: 29m, exp_samples: [{{value: 7}}]}}
  - interval: 1m
    input_series:
      - {{series: 'up{{job="fedsoda", instance="h"}}', values: '1x30'}}
      - {{series: 'fedsoda_edges{{job="fedsoda", instance="h", state="idle"}}', values: '2x30'}}
      - {{series: 'fedsoda_run_phase{{job="fedsoda", instance="h", fedsoda_run_phase="idle"}}', values: '1x30'}}
      - {{series: 'fedsoda_round_deadline_timestamp_seconds{{job="fedsoda", instance="h"}}', values: '9000x30'}}
      - {{series: 'fedsoda_disk_free_bytes{{job="fedsoda", instance="h"}}', values: '1e11x30'}}
      - {{series: 'fedsoda_disk_size_bytes{{job="fedsoda", instance="h"}}', values: '1e12x30'}}
      - {{series: 'fedsoda_compute_failures_total{{job="fedsoda", instance="h"}}', values: '1x30'}}
    promql_expr_test:
      - {{expr: 'count(ALERTS) or vector(0)', eval_time: 29m, exp_samples: [{{value: 0}}]}}
"""


@needs_promtool
def test_alerts_fire_when_they_should_and_else_not(tmp_path: Path) -> None:
    """Prometheus itself judges: one hub on which all is wrong, and one on which nothing is."""
    (tmp_path / "tests.yml").write_text(RULE_TESTS.format(alerts=DEPLOY / "alerts.yml"))
    done = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "tests.yml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
