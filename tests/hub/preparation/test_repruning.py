"""FedPruner per device: each size class keeps layers of its own, drawn again every few rounds, and all train one master."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakValueDictionary

import msgspec
import pytest
import torch
from msgspec.structs import replace
from peft import PeftModel
from safetensors.torch import load, load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsoda_edge import events as edge_events
from fedsoda_edge.device.facts import read_device
from fedsoda_edge.device.fit import Limits
from fedsoda_edge.errors import DeviceTooSmall, UsageProblem
from fedsoda_edge.join import size_class
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.bundle_writer import BundleSettings, write_bundle
from fedsoda_edge.ports.disk import BlobStore, sha256_file
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_edge.protocol.needs import MemoryPlan, SampleSizes, Shape, plans, shape_of
from fedsoda_hub.algorithms.methods.fedpruner import redrawn
from fedsoda_hub.algorithms.pruning import representatives
from fedsoda_hub.algorithms.pruning.representatives import contiguous, measure_layers, select_layers
from fedsoda_hub.evaluation.export import export
from fedsoda_hub.events import HubEvent, HubSay, Repruned, RoundClosed, RoundOpened, UpdateAccepted, as_json
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import JobProgress, Reprune
from fedsoda_hub.federation.schedule import trained_factor
from fedsoda_hub.local import in_process
from fedsoda_hub.plan import likely_plans
from fedsoda_hub.preparation.prepare import RunPreparation, bundle_of
from fedsoda_hub.preparation.realign import PreparedRun
from fedsoda_hub.report.history import read_history
from fedsoda_hub.run.ledger import Ledger
from fedsoda_hub.run.outcome import read_outcome
from fedsoda_hub.settings.run import RunSettings, settings_for_plan
from fedsoda_hub.settings.toml import write_toml
from tests.edge.model.test_bundle import pruned_by_hand
from tests.hub.algorithms.alignment.test_oda import with_peft
from tests.hub.algorithms.methods.test_exact import mean_nll
from tests.hub.runs import WORDS, all_blobs_kept, make_run, prepare
from tests.schema import EDGE, HUB

METHOD = {
    "name": "fedpruner",
    "adapter_layers": None,
    "layers_per_group": None,
    "groups": None,
    "realign_every": None,
    "drop_layers": 3,
    "classes": [5],
    "reprune_every": 2,
}
ROUNDS = 5
SMALL_EDGE = "b"


def make(directory: Path, model: Path, **tables: dict[str, Any]) -> RunSettings:
    settings = make_run(
        directory,
        model,
        method=METHOD | tables.pop("method", {}),
        align={"steps": None, "realign_steps": None, "border_map": None},
        local={"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2},
        wire={"codec": "nf4"} | tables.pop("wire", {}),
        rounds={"count": ROUNDS, "min_edges": 2, "quorum": 1.0},
        listen={"port": 0},
        **tables,
    )
    Path(settings.path).write_text(write_toml(settings))
    return settings


def rows_of(directory: Path, name: str) -> Path:
    path = directory / f"{name}.jsonl"
    rows = [{"word": word, "answer": "yes" if i % (2 + ord(name) % 2) else "no"} for i, word in enumerate(WORDS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def little_memory(settings: RunSettings) -> Iterator[None]:
    """One edge has no room for the largest sub-LLM, whatever this machine has: a tiny model's layers are not what counts."""
    largest = shape_of(Bundle.open(settings.run_dir / "bundle").manifest).lora_parameters

    def facts(home: Path) -> ms.DeviceFacts:
        return replace(read_device(home), ram_bytes=1) if home.name == SMALL_EDGE else read_device(home)

    def fit(device: str, shape: Shape, samples: SampleSizes, facts: ms.DeviceFacts, limits: Limits) -> MemoryPlan:
        if facts.ram_bytes == 1 and shape.lora_parameters == largest:
            raise DeviceTooSmall("no room")
        return next(plans(shape, device, samples))

    with mock.patch.object(size_class, "read_device", facts), mock.patch.object(size_class, "fit", fit):
        yield


def federate(
    settings: RunSettings, edges: str = "ab", say: HubSay = lambda _: None
) -> dict[str, list[edge_events.AnyEvent]]:
    """The run, or the rest of it; what its edges said."""
    data = {name: rows_of(settings.directory, name) for name in edges}
    said: dict[str, list[edge_events.AnyEvent]] = {name: [] for name in edges}

    async def run() -> None:
        stop = asyncio.get_running_loop().create_future()
        homes = settings.directory / "homes"
        await in_process.federate(settings, data, homes, stop, say, lambda name: said[name].append)

    prepare(settings)
    with little_memory(settings), all_blobs_kept():
        asyncio.run(run())
    return said


def recorded(settings: RunSettings) -> list[rec.AnyRecord]:
    with contextlib.closing(Ledger(settings.run_dir / "ledger.sqlite")) as ledger:
        return ledger.records()


def history(settings: RunSettings) -> list[rec.AnyRecord]:
    """What must be equal in a run that was disturbed."""
    return [record for record in recorded(settings) if isinstance(record, rec.RoundClosed | rec.Repruned)]


@dataclass
class Ran:
    settings: RunSettings
    said: dict[str, list[edge_events.AnyEvent]]
    heard: list[HubEvent]


@pytest.fixture(scope="module", autouse=True)
def every_layer_has_a_chance() -> Iterator[None]:
    """Layers of a tiny model do so unequally much that the draw would hardly ever change the choice."""
    with mock.patch.object(representatives, "TEMPERATURE", 50.0):
        yield


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Ran:
    settings = make(tmp_path_factory.mktemp("calm"), tiny_llama)
    heard: list[HubEvent] = []
    return Ran(settings, federate(settings, say=heard.append), heard)


# --- preparation -------------------------------------------------------------------------------------------


def test_each_class_is_the_bundle_of_its_own_choice_from_one_measurement(calm: Ran, tmp_path: Path) -> None:
    made = RunPreparation(calm.settings)
    measured = measure_layers(made.llm.source, made.llm.text.used, seed=0)
    for number, count in enumerate((5, 3)):
        bundle = Bundle.open(calm.settings.run_dir / "bundle", number)
        assert bundle.plan.kept == bundle.plan.adapter == select_layers(measured, count, contiguous, keep_ends=True)
        spec = bundle.manifest.lora
        alone = write_bundle(
            tmp_path / str(number),
            made.llm.source,
            bundle.plan,
            BundleSettings(spec, "bf16", False),
            name=made.llm.source.name,
            revision=made.llm.source.revision,
            adapter_lora=lora.initial(spec.adapter, 0),
            emulator_lora={},
            tokenizer_files=made.llm.source.tokenizer_files,
        )
        assert bundle.manifest.files == alone.files
        needs = (msgspec.structs.astuple(manifest.needs) for manifest in (bundle.manifest, alone))
        assert next(needs) == pytest.approx(next(needs), rel=0.01)
        assert bundle.manifest.bits_per_parameter == pytest.approx(alone.bits_per_parameter)
    said: list[JobProgress] = []
    result = PreparedRun(made.llm).reprune(Reprune(round=9, master=prepare(calm.settings).master), said.append)
    assert len(result.sub_llms) == 2
    assert said == []  # nothing is measured again


def test_a_run_of_one_choice_has_the_files_that_it_had_before_there_were_more(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make(tmp_path, tiny_llama, method={"classes": [], "reprune_every": 0})
    result = prepare(settings)
    assert [sub_llm.adapter_view for sub_llm in result.sub_llms] == [result.master]
    shards = {path.name for path in (settings.run_dir / "bundle").iterdir() if path.name.startswith("layers.")}
    kept = Bundle.open(settings.run_dir / "bundle").plan.kept
    assert shards == {f"layers.{number}.safetensors" for number in kept}


# --- a whole run -------------------------------------------------------------------------------------------


def test_layers_are_drawn_before_rounds_3_and_5_by_seed_class_and_round(calm: Ran) -> None:
    made = RunPreparation(calm.settings)
    measured = measure_layers(made.llm.source, made.llm.text.used, seed=0)
    repruned = [record for record in recorded(calm.settings) if isinstance(record, rec.Repruned)]
    assert [record.round for record in repruned] == [3, 5]
    seen = set()
    for record in repruned:
        for number, (digest, count) in enumerate(((record.manifest, 5), (record.smaller[0].manifest, 3))):
            key = hashlib.sha256(f"0/{number}/{record.round}".encode()).digest()
            chance = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
            kept = bundle_of(calm.settings.run_dir, digest).plan.kept
            assert kept == select_layers(measured, count, contiguous, keep_ends=True, generator=chance)
            seen.add((number, kept))
    first = {(number, Bundle.open(calm.settings.run_dir / "bundle", number).plan.kept) for number in (0, 1)}
    assert len(seen | first) > 2, "no draw differs from the first choice: the test shows nothing"


def test_master_and_views_are_what_the_rules_say_of_the_updates(calm: Ran) -> None:
    """By hand, from the accepted blobs: w over the holders, v of each class, both again after a draw."""
    settings, codec = calm.settings, calm.settings.wire.codec
    blobs = BlobStore(settings.run_dir / "blobs")
    prepared = next(record for record in recorded(settings) if isinstance(record, rec.RunPrepared))
    assert prepared.master is not None
    master = load(blobs.get(prepared.master))
    digests = [prepared.adapter_view, prepared.smaller[0].adapter_view or ""]
    views = [load(blobs.get(digest)) for digest in digests]
    assert master.keys() == views[0].keys() | views[1].keys()
    accepted: list[rec.UpdateAccepted] = []
    for record in recorded(settings):
        match record:
            case rec.UpdateAccepted():
                assert record.size_class == (record.edge == SMALL_EDGE)
                accepted.append(record)
            case rec.RoundClosed():
                assert sorted(one.edge for one in accepted) == ["a", "b"]
                steps: dict[str, list[tuple[int, Tensor]]] = {}
                for one in accepted:
                    layout = delta.layout_of(views[one.size_class])
                    for name, step in delta.decode(blobs.get(one.digest), layout, codec).items():
                        steps.setdefault(name, []).append((one.num_examples, step))
                after = load(blobs.get(record.master))
                assert after.keys() == master.keys()
                for name, tensor in after.items():
                    held = steps.get(name, [])
                    mean = sum(count * step.double() for count, step in held) / max(1, sum(count for count, _ in held))
                    torch.testing.assert_close(tensor.double(), master[name].double() + mean, rtol=1e-6, atol=1e-7)
                master = after
                coded = (record.delta, record.smaller[0].delta)
                for number, (digest, step) in enumerate(zip((record.view, record.smaller[0].view), coded, strict=True)):
                    lacking = {name: master[name] - value for name, value in views[number].items()}
                    assert blobs.get(step) == delta.encode(lacking, codec)
                    views[number] = delta.advance(views[number], blobs.get(step), delta.layout_of(lacking), codec)
                    assert delta.digest(views[number]) == digest
                accepted = []
            case rec.Repruned():
                drawn = load(blobs.get(record.master))
                assert all(torch.equal(drawn[name], tensor) for name, tensor in master.items())
                assert not any(drawn[name].any() for name in drawn.keys() - master.keys() if name.endswith("B"))
                master = drawn
                for number, (manifest, digest) in enumerate(
                    ((record.manifest, record.view), (record.smaller[0].manifest, record.smaller[0].view))
                ):
                    layout = bundle_of(settings.run_dir, manifest).manifest.lora.adapter
                    views[number] = {spec.name: master[spec.name] for spec in layout}
                    assert delta.digest(views[number]) == digest


def test_the_report_says_when_layers_were_drawn(calm: Ran) -> None:
    with contextlib.closing(Ledger(calm.settings.run_dir / "ledger.sqlite")) as ledger:
        assert read_history(ledger).repruned == [3, 5]


def test_what_nobody_trained_keeps_its_bits(calm: Ran) -> None:
    """Between two draws the layers of the last choice lie still."""
    blobs = BlobStore(calm.settings.run_dir / "blobs")
    closed = {record.round: record for record in recorded(calm.settings) if isinstance(record, rec.RoundClosed)}
    second, third = (load(blobs.get(closed[number].master)) for number in (2, 3))
    repruned = next(record for record in recorded(calm.settings) if isinstance(record, rec.Repruned))
    held = {
        spec.name
        for digest in (repruned.manifest, repruned.smaller[0].manifest)
        for spec in bundle_of(calm.settings.run_dir, digest).manifest.lora.adapter
    }
    still = second.keys() - held
    assert still, "every layer was drawn again: the test shows nothing"
    assert all(torch.equal(second[name], third[name]) for name in still)
    assert not all(torch.equal(second[name], third[name]) for name in held & second.keys())


def test_edges_follow_and_fetch_only_what_they_do_not_hold(calm: Ran) -> None:
    settings = calm.settings
    for name, events in calm.said.items():
        for event in events:
            EDGE.check_event(json.loads(edge_events.line_of(event)))
        number = int(name == SMALL_EDGE)
        assert [event.round for event in events if isinstance(event, edge_events.Accepted)] == [1, 2, 3, 4, 5]
        told = [
            event.message
            for event in events
            if isinstance(event, edge_events.Notice) and "chosen other layers" in event.message
        ]
        choices = [
            bundle_of(settings.run_dir, (record.manifest, record.smaller[0].manifest)[number]).plan.kept
            for record in recorded(settings)
            if isinstance(record, rec.Repruned)
        ]
        assert [message.rpartition("trains ")[2] for message in told] == [", ".join(map(str, kept)) for kept in choices]
        kept = {*Bundle.open(settings.run_dir / "bundle", number).plan.kept, *choices[0], *choices[1]}
        store = {path.name for path in (settings.directory / "homes" / name / "store").iterdir()}
        shards = {layer: sha256_file(settings.run_dir / "bundle" / f"layers.{layer}.safetensors") for layer in range(8)}
        assert {layer for layer, digest in shards.items() if digest in store} == kept
    for heard in calm.heard:
        HUB.check_event(as_json(heard))
    assert any(isinstance(event, Repruned) for event in calm.heard)


def test_the_full_llm_gets_all_layers_that_anybody_trained(calm: Ran, tmp_path: Path, tiny_llama: Path) -> None:
    """What the hub says of the sub-LLM in force and of the plug-in, Transformers and PEFT say too."""
    settings, outcome = calm.settings, read_outcome(calm.settings.run_dir)
    bundle, master = (
        bundle_of(settings.run_dir, outcome.manifest),
        load(BlobStore(settings.run_dir / "blobs").get(outcome.master)),
    )
    plan, spec = bundle.plan, bundle.manifest.lora
    assert plan.kept != Bundle.open(settings.run_dir / "bundle").plan.kept
    export(settings, tmp_path / "adapter")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = {int(key.split(".layers.")[1].split(".")[0]) for key in exported}
    assert layers == {int(name.split(".")[1]) for name in master} > set(plan.kept)
    whole = with_peft(
        pruned_by_hand(tiny_llama, plan, quantized=False),
        {number: position for position, number in enumerate(plan.kept)},
        lora.on(plan.kept, master),
        spec.rank,
        spec.alpha,
    )
    full: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    plugged: Any = PeftModel.from_pretrained(full, str(tmp_path / "adapter")).eval()
    assert outcome.evaluation is not None
    loss = outcome.evaluation.loss
    assert loss["sub_llm"] == pytest.approx(mean_nll(whole, settings, tiny_llama), rel=1e-4)
    assert loss["plug_in"] == pytest.approx(mean_nll(plugged, settings, tiny_llama), rel=1e-4)


# --- a run that is disturbed -------------------------------------------------------------------------------


def fails_at(event: type[Repruned | UpdateAccepted | RoundOpened], number: int) -> HubSay:
    def say(said: HubEvent) -> None:
        if isinstance(said, event) and said.round == number:
            raise KeyError("the hub is gone")

    return say


@pytest.mark.parametrize("event", [Repruned, UpdateAccepted])
def test_a_hub_that_stops_after_a_draw_goes_on_to_the_same_bits(
    calm: Ran, tmp_path: Path, tiny_llama: Path, event: type[Repruned | UpdateAccepted]
) -> None:
    rough = make(tmp_path, tiny_llama)
    with pytest.raises(KeyError, match="the hub is gone"):
        federate(rough, say=fails_at(event, 3))
    assert len(history(rough)) == 3
    federate(rough)
    assert history(rough) == history(calm.settings)


def test_who_joins_after_a_draw_begins_with_the_layers_in_force(tmp_path: Path, tiny_llama: Path) -> None:
    settings = make(tmp_path, tiny_llama)
    with pytest.raises(KeyError, match="the hub is gone"):
        federate(settings, say=fails_at(RoundOpened, 3))
    late = federate(settings, edges="abc")["c"]
    accepted = [event.round for event in late if isinstance(event, edge_events.Accepted)]
    assert accepted[-1] == 5
    assert not [event for event in late if isinstance(event, edge_events.Refused)]
    choices = [record for record in recorded(settings) if isinstance(record, rec.Repruned)]
    store = {path.name for path in (settings.directory / "homes" / "c" / "store").iterdir()}
    assert {record.manifest for record in choices} <= store
    first = next(record for record in recorded(settings) if isinstance(record, rec.RunPrepared))
    assert first.manifest not in store


def test_the_models_of_a_choice_that_is_over_are_given_back(tmp_path: Path, tiny_llama: Path) -> None:
    """Edges of one process share what they train; nobody holds what no edge trains any more."""
    settings = make(tmp_path, tiny_llama, method={"classes": [], "reprune_every": 1})
    held: list[int] = []

    def look(event: HubEvent) -> None:
        if isinstance(event, RoundClosed):
            held.append(len(shared))

    shared: Any = {}

    def made() -> Any:
        nonlocal shared
        shared = WeakValueDictionary()
        return shared

    with mock.patch("fedsoda_hub.local.in_process.WeakValueDictionary", made):
        prepare(settings)

        async def run() -> None:
            stop = asyncio.get_running_loop().create_future()
            data = {name: rows_of(settings.directory, name) for name in "ab"}
            await in_process.federate(
                settings, data, settings.directory / "homes", stop, look, lambda _: lambda _: None
            )

        asyncio.run(run())
    assert len(held) == ROUNDS
    assert max(held) == 1


# --- rules of aggregation ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "how"),
    [
        ("nf4", {"rule": "ffa"}),
        ("int8", {"rule": "rolora"}),
        ("klt", {"rule": "rolora"}),
        ("bf16", {"rule": "flexlora"}),
        ("nf4", {"optimizer": "fedadam"}),
        ("nf4-weight", {}),
    ],
    ids=["ffa", "rolora", "klt and rolora", "flexlora", "fedadam", "whole weights"],
)
def test_every_rule_goes_with_classes_and_draws(
    tmp_path: Path, tiny_llama: Path, codec: str, how: dict[str, Any]
) -> None:
    settings = make(tmp_path, tiny_llama, aggregation=how, wire={"codec": codec})
    federate(settings)
    closed = [record for record in recorded(settings) if isinstance(record, rec.RoundClosed)]
    blobs = BlobStore(settings.run_dir / "blobs")
    assert len(closed) == ROUNDS
    assert len([record for record in recorded(settings) if isinstance(record, rec.UpdateAccepted)]) == 2 * ROUNDS
    for record in closed:
        factor = trained_factor(settings.aggregation.rule, record.round)
        for view, step in ((record.view, record.delta), (record.smaller[0].view, record.smaller[0].delta)):
            layout = of_factor(delta.layout_of(load(blobs.get(view))), factor)
            assert delta.decode(blobs.get(step), layout, codec)
        if factor == "both":
            assert (record.cross_term or 0.0) > 0.0
        elif (
            codec == "klt"
        ):  # divides its bytes among all tensors of a view, so that classes hold one a little otherwise
            assert (record.cross_term or 0.0) < 0.05
        else:
            assert record.cross_term == 0.0


# --- settings ----------------------------------------------------------------------------------------------


def test_classes_count_dropped_layers_and_ascend_from_the_largest() -> None:
    settings = settings_for_plan("m", method={"name": "fedpruner", "drop_layers": 2, "classes": [4, 5]})
    assert settings.method.reprune_every == 5
    assert [len(plan.kept) for plan in likely_plans(8, settings.method)] == [6, 4, 3]
    for classes in ([2], [4, 3], [3, 4, 5, 6]):
        with pytest.raises(UsageProblem, match=r"ascending, each above \[method\] drop_layers = 2"):
            settings_for_plan("m", method={"name": "fedpruner", "drop_layers": 2, "classes": classes})
    with pytest.raises(
        UsageProblem, match=r"\[method\] classes = \[7\], but the model has 8 layers .*; write at most 6"
    ):
        likely_plans(8, settings_for_plan("m", method={"name": "fedpruner", "drop_layers": 2, "classes": [7]}).method)


def test_a_choice_that_is_the_same_every_time_is_not_drawn_again() -> None:
    for choice in ("uniform", "top"):
        keys = {"name": "fedpruner", "layer_choice": choice}
        assert settings_for_plan("m", method=keys).method.reprune_every == 0
        with pytest.raises(
            UsageProblem,
            match=r'reprune_every = 3 beside layer_choice = .* write reprune_every = 0, or layer_choice = "c',
        ):
            settings_for_plan("m", method={**keys, "reprune_every": 3})
    with pytest.raises(UsageProblem, match=r'\[method\] reprune_every = 3 .* or write name = "fedpruner"'):
        settings_for_plan("m", method={"reprune_every": 3})


def test_random_layers_are_drawn_again_for_each_class_and_round(tmp_path: Path, tiny_llama: Path) -> None:
    method = settings_for_plan(
        "m", method={"name": "fedpruner", "layer_choice": "random", "drop_layers": 8, "classes": [12]}
    ).method
    full: Any = mock.Mock(num_layers=24)
    drawn = [tuple(plan.kept for plan in redrawn(full, method, 0, number)) for number in (6, 11, 16)]
    assert len({kept for pair in drawn for kept in pair}) == 6
    assert {tuple(map(len, pair)) for pair in drawn} == {(16, 12)}
    assert drawn[0] == tuple(plan.kept for plan in redrawn(full, method, 0, 6))
