"""What a hub tells people, struct by struct: the recorded schemas are theirs, and a printed line is read back."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from fedsoda_edge import events as edge_events
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub import events
from fedsoda_hub.federation import jobs
from tests import schema_of
from tests.schema import HUB


def merged(schema: Any) -> Any:
    """A choice of plain types as one list of types, as `schema_of` wants it."""
    if isinstance(schema, list):
        return [merged(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: merged(value) for key, value in schema.items()}
    ways = found.get("anyOf", [])
    if ways and all(set(way) <= {"type", "items"} and way.get("items", {}) == {} for way in ways):
        found.pop("anyOf")
        found["type"] = [way["type"] for way in ways]
    if any("maxProperties" in way for way in found.get("oneOf", [])):  # public KL: none yet, or of every stage
        return {"type": "object"}
    return found


PARTS = merged(HUB.parts)
PROGRESS = [kind for kind in events.kinds() if kind.__struct_config__.tag == "progress"]


def tag_of(kind: type[events.HubEvent]) -> str:
    return str(kind.__struct_config__.tag)


@pytest.mark.parametrize("kind", [kind for kind in events.kinds() if kind not in PROGRESS], ids=tag_of)
def test_an_event_has_the_keys_and_types_that_were_recorded(kind: type[events.HubEvent]) -> None:
    """What was recorded may say more of a value, such as its pattern, and never less."""
    assert is_recorded_as(made_of(kind), schema_of.normal(PARTS[tag_of(kind)], PARTS))


def test_every_recorded_form_of_progress_is_one_struct_and_every_struct_was_recorded() -> None:
    forms = [schema_of.normal(form, PARTS) for form in PARTS["progress"]["oneOf"]]
    fits = [[kind for kind in PROGRESS if is_recorded_as(made_of(kind), form)] for form in forms]
    assert all(len(kinds) == 1 for kinds in fits), fits
    assert {kind for [kind] in fits for kind in [kind]} == set(PROGRESS)


def made_of(kind: type[events.HubEvent]) -> Any:
    return schema_of.normal(*_schema_and_parts(kind))


def _schema_and_parts(kind: type[events.HubEvent]) -> tuple[Any, dict[str, Any]]:
    [schema], parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    return merged(schema), {name: merged(part) for name, part in parts.items()}


def is_recorded_as(made: Any, recorded: Any) -> bool:
    """Whether both have the same fields, and every value that was recorded is one that the struct can have."""
    if "enum" in recorded or "enum" in made:
        return "enum" not in made or set(recorded.get("enum", ["anything"])) <= set(made["enum"])
    if not made:  # any value
        return True
    types = set(made["type"]) | ({"integer"} if "number" in made["type"] else set())
    if not set(recorded["type"]) <= types:
        return False
    if "properties" in made:
        fields, optional = recorded["properties"], set(made["properties"]) - required(made)
        return (
            recorded["closed"]
            and set(made["properties"]) - optional <= set(fields) <= set(made["properties"])
            and set(recorded["required"]) == set(fields)
            and all(is_recorded_as(made["properties"][name], fields[name]) for name in fields)
        )
    if "items" in made and "items" in recorded:
        return is_recorded_as(made["items"], recorded["items"])
    at_least = all(
        recorded.get(key, made[key] - 1) >= made[key] for key in ("minimum", "exclusiveMinimum") if key in made
    )
    return at_least and ("maximum" not in made or recorded.get("maximum", made["maximum"] + 1) <= made["maximum"])


def required(made: Any) -> set[str]:
    """The fields that a struct always writes: `kl` and `detail` of progress alone are left out where there is none."""
    return set(made["properties"]) - {"kl", "detail"} | (set(made["properties"]) & {"cosine"} and {"kl"})


def test_a_struct_that_is_not_as_was_recorded_is_found() -> None:
    promised = schema_of.normal(PARTS["edge_left"], PARTS)
    assert is_recorded_as(made_of(events.EdgeLeft), promised)
    for other in (events.EdgeDisconnected, events.Declined, events.EdgeConnected):
        assert not is_recorded_as(made_of(other), promised)


EVENTS: list[events.HubEvent] = [
    events.Listening(url="http://127.0.0.1:8470", run="triage"),
    events.StageProgress(job="prepare", stage="quantizing", done=1, total=2),
    events.StageProgress(job="realign", stage="aligning", done=1, total=2, kl=0.25),
    events.DiskProgress(job="prepare", stage="caching teacher targets", needed_bytes=1, free_bytes=2),
    events.LeftOutProgress(job="prepare", stage="no border map", why="no prompts"),
    events.RoundOpened(rounds=2, round=1, cohort=(EdgeId("a"),), view=Digest("d" * 64), alignment=0, deadline_at=1.5),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_line_that_a_hub_printed_is_read_back(event: events.HubEvent) -> None:
    HUB.check_event(events.as_json(event))
    assert events.read(json.dumps(events.as_json(event))) == event


def test_the_terminal_event_is_the_commands_and_an_unknown_one_is_no_hubs() -> None:
    assert events.read('{"schema": 1, "event": "end", "terminal": true, "status": "ok"}') is None
    with pytest.raises(ValueError, match="a hub of this release does not print"):
        events.read('{"event": "yawn"}')


@pytest.mark.parametrize(
    "progress",
    [
        jobs.Stage(stage="aligning", done=1, total=2, kl=0.5),
        jobs.BorderMapFitted(stage="fitting the border map", error_before=0.5, error_whole=0.25, error=0.375),
        jobs.ShapeMeasured(stage="choosing groups", layers_per_group=3, groups=4, kl=0.5, cosine=0.75),
        jobs.ShapeHealed(stage="choosing groups", layers_per_group=3, groups=4, error=0.0625),
        jobs.LeftOut(stage="no border map", why="no prompts"),
        jobs.LeftOut(stage="not healed", why="no down_proj"),
        jobs.DiskNeeded(stage="caching teacher targets", needed_bytes=1, free_bytes=2),
    ],
    ids=lambda progress: type(progress).__name__,
)
def test_how_far_a_job_is_becomes_an_event(progress: jobs.JobProgress) -> None:
    HUB.check_event(events.as_json(events.event_of_progress("prepare", progress)))


def test_a_setting_is_read_back_as_it_was_written() -> None:
    """Not 3 as 3.0, nor "3" as 3: a demo shows the settings of a hub that runs in another process."""
    values: dict[str, Any] = {"count": 3, "rate": 3.0, "name": "3", "is_on": True, "targets": ["q_proj"], "text": None}
    printed = events.SettingsInForce(
        values={key: events.SettingInForce(value=value, source="x") for key, value in values.items()}
    )
    found = events.read(msgspec.json.encode(printed))
    assert isinstance(found, events.SettingsInForce)
    back = {key: setting.value for key, setting in found.values.items()}
    assert [(key, type(value), value) for key, value in back.items()] == [
        (key, type(value), value) for key, value in values.items()
    ]


def test_a_number_that_is_not_finite_is_printed_as_null() -> None:
    nan = float("nan")
    event = events.Probed(rounds=2, round=2, kl=nan, cosine=float("inf"))
    assert json.loads(events.line_of(event)) == {"event": "probed", "rounds": 2, "round": 2, "kl": None, "cosine": None}
    edge = edge_events.Training(round=1, step=1, steps=2, loss=nan, tokens_per_second=9.5)
    assert json.loads(edge_events.line_of(edge))["loss"] is None
