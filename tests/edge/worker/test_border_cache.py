"""Border states on disk: sealed, void with their alignment, computed again where they are damaged or did not fit; the
delta has the same bits whatever was kept."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.source import Checkpoint
from fedsoda_edge.model.streaming import LayersDone, stream
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.border_cache import BorderPasses, CachedStates, CacheSettings
from fedsoda_edge.worker.record_file import to_record
from fedsoda_edge.worker.training import data_order, fine_tune
from fedsoda_hub.algorithms.pruning.layer_plan import make_plan
from fedsoda_hub.algorithms.pruning.sgp import choose_groups
from tests.edge.model.test_bundle import pruned_by_hand, random_lora, write
from tests.edge.worker.test_record_file import HEAD, KEY, LARGE, MARK, TAG, WIDTH, FullDisk, flip
from tests.edge.worker.test_training import SETTINGS, make_samples

SAMPLES = make_samples(10)


def deep_plan(source: Checkpoint, adapter: int = 2) -> LayerPlan:
    """Groups at layers 2 and 4, so that layers 0 and 1 are below all LoRA."""
    emulator = source.num_layers - adapter
    distances = [[1.0 / (1 + low)] * (emulator - 1 - low) for low in range(emulator)]
    return make_plan(source.num_layers, adapter, choose_groups(distances, source.num_layers, adapter, 1, 2), distances)


@pytest.fixture(scope="module")
def one_tier(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    """Layers 0, 2, 3, 5 below the adapter; 0 and 3 carry LoRA."""
    return write(tmp_path_factory.mktemp("one") / "bundle", tiny_llama, trained=True)


@pytest.fixture(scope="module")
def two_tiers(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    """Layers 0, 1, 2, 4 below the adapter; 2 and 4 carry LoRA."""
    plan = deep_plan(Checkpoint.open(str(tiny_llama)))
    return write(tmp_path_factory.mktemp("two") / "bundle", tiny_llama, trained=True, plan=plan)


@pytest.fixture(params=["one_tier", "two_tiers"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Bundle)
    return found


Batches = Sequence[Sequence[int]]


class Passes(list[tuple[tuple[int, ...], list[tuple[int, ...]]]]):
    """Every pass over layers: which, and the ids of the samples that it took along.

    batches: the lengths of those that ran together.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.batches: list[list[int]] = []
        below, border = BorderPasses.below, BorderPasses.border

        def noting_below(
            made: BorderPasses, ids: Sequence[Tensor], batches: Batches, progress: LayersDone | None
        ) -> list[Tensor]:
            self.note(made.bottom, ids, batches)
            return below(made, ids, batches, progress)

        def noting_border(
            made: BorderPasses,
            ids: Sequence[Tensor],
            batches: Batches,
            start: Sequence[Tensor] | None,
            progress: LayersDone | None,
        ) -> list[Tensor]:
            self.note(made.top if start is not None else (*made.bottom, *made.top), ids, batches)
            return border(made, ids, batches, start, progress)

        monkeypatch.setattr(BorderPasses, "below", noting_below)
        monkeypatch.setattr(BorderPasses, "border", noting_border)

    def note(self, layers: Sequence[int], ids: Sequence[Tensor], batches: Batches) -> None:
        self.append((tuple(layers), [tuple(sample.tolist()) for sample in ids]))
        self.batches += [[len(ids[place]) for place in batch] for batch in batches]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def opened(bundle: Bundle, directory: Path, samples: Sequence[Sample] = SAMPLES, **change: Any) -> CachedStates:
    """Open the cache; by default each sample runs alone, so that passes can be counted by samples."""
    settings = CacheSettings(
        directory,
        change.get("key", KEY),
        change.get("dtype", "bf16"),
        change.get("max_bytes"),
        change.get("slice_bytes", LARGE),
        group_positions=change.get("group_positions", 0),
    )
    return CachedStates(
        bundle,
        [sample.ids for sample in samples],
        emulator=change.get("emulator", bundle.emulator_lora()),
        emulator_name=change.get("name", "first"),
        settings=settings,
        compute_dtype=torch.float32,
        device="cpu",
    )


def kept(bundle: Bundle, directory: Path, samples: Sequence[Sample] = SAMPLES, **change: Any) -> CachedStates:
    states = opened(bundle, directory, samples, **change)
    states.sweep()
    return states


def trained(bundle: Bundle, states: CachedStates, epochs: int = 2) -> dict[str, torch.Tensor]:
    """Train a round over all samples and give its delta."""
    tail, view = build(bundle, bundle.plan.adapter), bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    settings = msgspec.structs.replace(SETTINGS, max_steps=0, epochs=epochs)
    swept = SweptSamples(SAMPLES, states)
    return fine_tune(tail, swept, view, settings, seed=0, round_number=1, edge="a").delta


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def record_bytes(sample: Sample) -> int:
    return HEAD + 2 * WIDTH * len(sample.ids) + TAG


def room_for(samples: Iterable[Sample]) -> int:
    """Count the bytes of a border file of these samples."""
    return MARK + sum(map(record_bytes, samples))


def border_file(directory: Path) -> Path:
    [path] = directory.glob("border-*")
    return path


# -- the states -----------------------------------------------------------------------------------------


def alone(bundle: Bundle, layers: Sequence[int], sample: Sample, start: torch.Tensor | None = None) -> torch.Tensor:
    """Compute a sample's states after these layers without a cache."""
    [state] = stream(
        bundle,
        layers,
        [torch.tensor(sample.ids)],
        start=None if start is None else [start],
        lora=bundle.emulator_lora(),
        lora_scale=bundle.manifest.lora.scale,
    )
    return state


@pytest.mark.parametrize("max_bytes", [None, 0], ids=["kept", "computed"])
def test_states_are_those_of_the_sweep_rounded_to_bf16(one_tier: Bundle, tmp_path: Path, max_bytes: int | None) -> None:
    states = kept(one_tier, tmp_path / "c", max_bytes=max_bytes)
    states.expect([*range(len(SAMPLES))] * 2)
    assert states.num_kept == (len(SAMPLES) if max_bytes is None else 0)
    for index, sample in enumerate(SAMPLES):
        expected = alone(one_tier, one_tier.plan.sub_emulator, sample)
        assert torch.equal(states[index], expected.to(torch.bfloat16))
    swept = SweptSamples.sweep(
        one_tier,
        one_tier.plan.sub_emulator,
        SAMPLES,
        emulator=one_tier.emulator_lora(),
        lora_scale=one_tier.manifest.lora.scale,
    )
    for index in range(len(SAMPLES)):  # samples in batches: other last bits, so here and there the next bf16
        torch.testing.assert_close(states[index].float(), swept.states[index], rtol=2**-7, atol=1e-5)
    states.close()


def test_states_between_tiers_are_rounded_to_bf16_too(two_tiers: Bundle, tmp_path: Path) -> None:
    states = kept(two_tiers, tmp_path / "c")
    assert two_tiers.plan.sub_emulator == (0, 1, 2, 4)
    for index, sample in enumerate(SAMPLES):
        below = alone(two_tiers, (0, 1), sample).to(torch.bfloat16)
        assert torch.equal(states[index], alone(two_tiers, (2, 4), sample, below).to(torch.bfloat16))
    states.close()


def test_states_are_those_of_transformers(bundle: Bundle, tiny_llama: Path, tmp_path: Path) -> None:
    model = pruned_by_hand(tiny_llama, bundle.plan, quantized=True)
    emulator, scale = bundle.emulator_lora(), bundle.manifest.lora.scale
    for name in [name for name in emulator if name.endswith("lora_A")]:
        _, number, rest = name.split(".", 2)
        linear = model.model.layers[bundle.plan.kept.index(int(number))].get_submodule(rest.removesuffix(".lora_A"))
        a, b = emulator[name], emulator[name[:-1] + "B"]
        linear.register_forward_hook(lambda _, x, y, a=a, b=b: y + scale * x[0] @ a.T @ b.T)
    states = kept(bundle, tmp_path / "c")
    for index, sample in enumerate(SAMPLES):
        with torch.no_grad():
            hidden = model(torch.tensor([sample.ids]), output_hidden_states=True).hidden_states
        theirs = hidden[len(bundle.plan.sub_emulator)][0]
        assert float((states[index].float() - theirs).norm() / theirs.norm()) < 2**-7
    states.close()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_nobody_reads_states_or_text_from_the_files_without_the_key(
    two_tiers: Bundle, tmp_path: Path, dtype: str
) -> None:
    states = kept(two_tiers, tmp_path / "c", dtype=dtype)
    files = list((tmp_path / "c").iterdir())
    assert sorted(path.name.partition("-")[0] for path in files) == ["below", "border"]
    held = b"".join(path.name.encode() + path.read_bytes() for path in files)
    assert len(held) > states.kept_bytes
    for index, sample in enumerate(SAMPLES):
        below = to_record(alone(two_tiers, (0, 1), sample), "bf16")
        above = to_record(states[index], dtype)
        for record in (below, above):
            assert not any(record[at : at + 16] in held for at in range(0, len(record), 16))
        for kind in (torch.int64, torch.int32, torch.int16):
            ids = torch.tensor(sample.ids, dtype=kind).numpy().tobytes()
            assert ids[:16] not in held
            assert ids not in held
            for algorithm in ("md5", "sha1", "sha256", "sha512", "blake2b"):
                digest = hashlib.new(algorithm, ids)
                assert digest.digest()[:16] not in held
                assert digest.hexdigest()[:16].encode() not in held
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert KEY not in path.read_bytes()
    states.close()


def test_two_keys_name_a_sample_differently_and_the_digest_of_all_is_the_same(one_tier: Bundle, tmp_path: Path) -> None:
    mine, yours = kept(one_tier, tmp_path / "1"), kept(one_tier, tmp_path / "2", key=bytes(32))
    names = [border_file(tmp_path / number).read_bytes()[MARK : MARK + 16] for number in "12"]
    assert names[0] != names[1]
    assert mine.digest == yours.digest
    assert mine.digest != opened(one_tier, tmp_path / "3", SAMPLES[::-1]).digest
    for states in (mine, yours):
        states.close()


def test_another_key_finds_nothing(one_tier: Bundle, tmp_path: Path, passes: Passes) -> None:
    kept(one_tier, tmp_path / "c").close()
    passes.clear()
    states = kept(one_tier, tmp_path / "c", key=bytes(32))
    assert [len(ids) for _, ids in passes] == [10]
    assert states.num_damaged == 0
    states.close()


def test_duplicates_share_one_record(one_tier: Bundle, tmp_path: Path, passes: Passes) -> None:
    twice = [*SAMPLES[:3], *SAMPLES[:3]]
    states = kept(one_tier, tmp_path / "c", twice)
    assert border_file(tmp_path / "c").stat().st_size == room_for(SAMPLES[:3])
    assert states.num_kept == len(states) == 6
    states.close()
    assert [len(ids) for _, ids in passes] == [3]
    passes.clear()
    states = kept(one_tier, tmp_path / "d", twice, max_bytes=0)
    states.expect(range(6))
    assert all(torch.equal(states[index], states[index - 3]) for index in range(3, 6))
    assert [len(ids) for _, ids in passes] == [3]
    states.close()


def test_data_that_grew_needs_only_its_new_rows(bundle: Bundle, tmp_path: Path, passes: Passes) -> None:
    kept(bundle, tmp_path / "c", SAMPLES[:7]).close()
    passes.clear()
    states = kept(bundle, tmp_path / "c", [*SAMPLES[8:], *SAMPLES[:8]])
    new = [SAMPLES[8].ids, SAMPLES[9].ids, SAMPLES[7].ids]
    assert all(ids == new for _, ids in passes)
    assert tuple(layer for layers, _ in passes for layer in layers) == bundle.plan.sub_emulator
    assert states.num_kept == 10
    states.close()


def test_progress_rises_to_the_end(bundle: Bundle, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    states = opened(bundle, tmp_path / "c", slice_bytes=2 * 4 * WIDTH * 60)
    states.sweep(lambda done, total: seen.append((done, total)))
    states.close()
    total = seen[-1][1]
    assert total > 4  # several slices of four layers
    assert seen == [(done, total) for done in range(1, total + 1)]


# -- what does not fit ----------------------------------------------------------------------------------


def test_what_does_not_fit_is_computed_in_one_pass_that_training_asks_for(
    one_tier: Bundle, tmp_path: Path, passes: Passes
) -> None:
    fits = SAMPLES[:5]
    states = kept(one_tier, tmp_path / "c", max_bytes=room_for(fits))
    assert passes == [(one_tier.plan.sub_emulator, [sample.ids for sample in fits])]
    assert states.num_kept == 5
    assert border_file(tmp_path / "c").stat().st_size == room_for(fits)
    passes.clear()
    trained(one_tier, states)
    order = list(data_order(len(SAMPLES), 1, 0, 1, "a"))
    assert passes == [(one_tier.plan.sub_emulator, [SAMPLES[at].ids for at in order if at >= 5])]
    assert border_file(tmp_path / "c").stat().st_size == room_for(fits)
    states.close()


def test_small_slices_follow_the_order_and_compute_each_once_an_epoch(
    one_tier: Bundle, tmp_path: Path, passes: Passes
) -> None:
    two = 2 * 2 * max(len(sample.ids) for sample in SAMPLES) * WIDTH * 4
    states = kept(one_tier, tmp_path / "c", max_bytes=room_for(SAMPLES[:5]), slice_bytes=two)
    passes.clear()
    trained(one_tier, states, epochs=1)
    order = [at for at in data_order(len(SAMPLES), 1, 0, 1, "a") if at >= 5]
    assert len(passes) > 1
    assert all(2 * 4 * WIDTH * sum(map(len, ids)) <= two for _, ids in passes)
    assert [ids for _, slice_ids in passes for ids in slice_ids] == [SAMPLES[at].ids for at in order]
    states.close()


def test_a_sample_larger_than_a_slice_is_a_slice(one_tier: Bundle, tmp_path: Path, passes: Passes) -> None:
    states = kept(one_tier, tmp_path / "c", max_bytes=0, slice_bytes=1)
    assert passes == []
    trained(one_tier, states, epochs=1)
    assert [len(ids) for _, ids in passes] == [1] * 10
    states.close()


@pytest.mark.parametrize(("dtype", "group_positions"), [("bf16", 0), ("int8", 0), ("bf16", 40)])
def test_the_delta_does_not_depend_on_what_is_kept(
    bundle: Bundle,
    tmp_path: Path,
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    group_positions: int,
) -> None:
    """Nor do groups of samples: they are made of the data alone."""
    how: dict[str, Any] = {"dtype": dtype, "group_positions": group_positions}
    states = kept(bundle, tmp_path / "all", **how)
    everything = trained(bundle, states)
    assert any(tensor.any() for tensor in everything.values())
    states.close()

    passes.clear()
    states = kept(bundle, tmp_path / "all", **how)
    assert same(trained(bundle, states), everything)
    assert passes == []
    states.close()

    states = kept(bundle, tmp_path / "none", **how, max_bytes=0, slice_bytes=30_000)
    assert same(trained(bundle, states), everything)
    assert (states.num_kept, states.kept_bytes) == (0, MARK)
    states.close()

    states = kept(bundle, tmp_path / "half", **how, max_bytes=room_for(SAMPLES[:5]))
    assert 1 <= states.num_kept <= 9
    assert same(trained(bundle, states), everything)
    states.close()

    below = room_for(SAMPLES) if bundle.plan.retained[0] > 0 else 0
    FullDisk(monkeypatch, below + room_for(SAMPLES[:5]))
    states = kept(bundle, tmp_path / "full", **how)
    assert 1 <= states.num_kept <= 9
    assert same(trained(bundle, states), everything)
    states.close()


def test_kept_states_fit_a_smaller_budget_of_the_next_join(bundle: Bundle, tmp_path: Path) -> None:
    kept(bundle, tmp_path / "c").close()
    states = kept(bundle, tmp_path / "c", max_bytes=room_for(SAMPLES[:5]))
    assert sum(path.stat().st_size for path in (tmp_path / "c").iterdir()) <= room_for(SAMPLES[:5])
    assert states.num_kept == 5
    states.close()


# -- damage ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm(one_tier: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The delta where nothing is damaged."""
    states = kept(one_tier, tmp_path_factory.mktemp("calm"))
    delta = trained(one_tier, states)
    states.close()
    return delta


@pytest.mark.parametrize(
    "offset", [0, 16, HEAD - 12, HEAD + 40, -1], ids=["name", "length", "nonce", "ciphertext", "tag"]
)
@pytest.mark.parametrize("when", ["open", "closed"])
def test_a_damaged_record_is_computed_again_to_the_same_delta(
    one_tier: Bundle, calm: dict[str, torch.Tensor], tmp_path: Path, offset: int, when: str
) -> None:
    states = kept(one_tier, tmp_path / "c")
    place = room_for(SAMPLES[:4])
    place += offset if offset >= 0 else record_bytes(SAMPLES[4]) + offset
    if when == "closed":
        states.close()
    flip(border_file(tmp_path / "c"), place)
    if when == "closed":
        states = kept(one_tier, tmp_path / "c")
    assert same(trained(one_tier, states), calm)
    # A length is read on opening only; a name that is another's then is just one that is missing.
    noticed = states.num_damaged
    assert noticed == (offset != 16 if when == "open" else offset != 0)
    for index in range(len(SAMPLES)):
        assert len(states[index]) == len(SAMPLES[index].ids)
    assert states.num_damaged == noticed
    assert states.num_kept == 10
    states.close()


def test_a_damaged_state_below_is_computed_again(two_tiers: Bundle, tmp_path: Path) -> None:
    kept(two_tiers, tmp_path / "c").close()
    [below] = (tmp_path / "c").glob("below-*")
    flip(below, MARK + HEAD + 3)
    emulator = {name: tensor * 0.5 for name, tensor in two_tiers.emulator_lora().items()}
    states = kept(two_tiers, tmp_path / "c", emulator=emulator, name="second")
    assert states.num_damaged == 1
    fresh = kept(two_tiers, tmp_path / "d", emulator=emulator, name="second")
    assert all(torch.equal(states[index], fresh[index]) for index in range(10))
    states.close()
    fresh.close()


def test_a_sweep_that_was_killed_continues_after_its_last_whole_record(
    bundle: Bundle, tmp_path: Path, passes: Passes
) -> None:
    states = kept(bundle, tmp_path / "c")
    expected = trained(bundle, states)
    states.close()
    path = border_file(tmp_path / "c")
    path.write_bytes(path.read_bytes()[: room_for(SAMPLES[:6]) + 100])
    passes.clear()
    states = kept(bundle, tmp_path / "c")
    assert [ids for _, ids in passes] == [[sample.ids for sample in SAMPLES[6:]]]
    assert same(trained(bundle, states), expected)
    assert states.num_damaged == 0
    states.close()


# -- alignments -----------------------------------------------------------------------------------------


def realigned(bundle: Bundle) -> dict[str, torch.Tensor]:
    tensors = random_lora(bundle.manifest.lora, 9)
    return {spec.name: tensors[spec.name] for spec in bundle.manifest.lora.emulator}


@pytest.mark.parametrize(
    ("tiers", "again"), [("one_tier", (0, 2, 3, 5)), ("two_tiers", (2, 4))], ids=["one tier", "two tiers"]
)
def test_a_realignment_runs_only_the_layers_from_the_first_with_lora_on(
    request: pytest.FixtureRequest, tmp_path: Path, passes: Passes, tiers: str, again: tuple[int, ...]
) -> None:
    bundle: Bundle = request.getfixturevalue(tiers)
    kept(bundle, tmp_path / "c").close()
    old = border_file(tmp_path / "c")
    below = {path: path.read_bytes() for path in (tmp_path / "c").glob("below-*")}
    assert len(below) == (tiers == "two_tiers")
    passes.clear()
    states = kept(bundle, tmp_path / "c", emulator=realigned(bundle), name="second")
    assert passes == [(again, [sample.ids for sample in SAMPLES])]
    assert not old.exists()
    assert {path: path.read_bytes() for path in below} == below
    fresh = kept(bundle, tmp_path / "d", emulator=realigned(bundle), name="second")
    first = kept(bundle, tmp_path / "e")
    assert all(torch.equal(states[index], fresh[index]) for index in range(10))
    assert not any(torch.equal(states[index], first[index]) for index in range(10))
    for each in (states, fresh, first):
        each.close()


def test_the_border_does_not_depend_on_whether_the_states_below_fit(
    two_tiers: Bundle, tmp_path: Path, passes: Passes
) -> None:
    both = kept(two_tiers, tmp_path / "both")
    assert {path.name.partition("-")[0] for path in (tmp_path / "both").iterdir()} == {"below", "border"}
    single = kept(two_tiers, tmp_path / "single", max_bytes=room_for(SAMPLES))
    assert {path.name.partition("-")[0] for path in (tmp_path / "single").iterdir()} == {"border"}
    assert both.num_kept == single.num_kept == 10
    assert all(torch.equal(both[index], single[index]) for index in range(10))
    both.close()
    single.close()


def another_scale(bundle: Bundle) -> Bundle:
    spec = msgspec.structs.replace(bundle.manifest.lora, alpha=2 * bundle.manifest.lora.alpha)
    return Bundle(msgspec.structs.replace(bundle.manifest, lora=spec), lambda file: bundle.path(file.name))


def another_config(bundle: Bundle) -> Bundle:
    config = bundle.manifest.config | {"rms_norm_eps": 0.1}
    return Bundle(msgspec.structs.replace(bundle.manifest, config=config), lambda file: bundle.path(file.name))


@pytest.mark.parametrize("change", [another_scale, another_config])
def test_states_of_another_bundle_are_not_taken_for_this_ones(
    two_tiers: Bundle, tmp_path: Path, change: Any, passes: Passes
) -> None:
    kept(two_tiers, tmp_path / "c").close()
    passes.clear()
    states = kept(change(two_tiers), tmp_path / "c")
    fresh = kept(change(two_tiers), tmp_path / "d")
    assert len(passes[0][1]) == 10
    assert all(torch.equal(states[index], fresh[index]) for index in range(10))
    states.close()
    fresh.close()


def test_files_of_other_bundles_and_precisions_go(one_tier: Bundle, two_tiers: Bundle, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "border-0123456789abcdef.cache").write_bytes(b"of yesterday")
    seen: set[str] = set()
    for bundle, dtype, tiers in ((one_tier, "bf16", 1), (two_tiers, "bf16", 2), (two_tiers, "int8", 2)):
        kept(bundle, tmp_path / "c", dtype=dtype).close()
        names = {path.name for path in (tmp_path / "c").iterdir()}
        assert len(names) == tiers
        assert not {name for name in names & seen if name.startswith("border")}
        seen |= names


def test_short_samples_run_together_and_long_ones_alone(one_tier: Bundle, tmp_path: Path, passes: Passes) -> None:
    samples = [Sample(tuple(range(3, 3 + length)), length - 1) for length in (9, 60, 10, 11, 12, 50)]
    kept(one_tier, tmp_path / "c", samples, group_positions=40).close()
    assert passes.batches == [[9, 10, 11], [60], [12], [50]]  # at most 40 ids with pads, by their first sample
