"""Border states on disk: sealed, void with their alignment, computed anew where they are damaged or did not fit, and
never with another bit of the delta."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from fedsoda_edge.data.samples import Sample
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.streaming import Checkpoint, stream
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.protocol.manifest import LayerPlan
from fedsoda_edge.worker import border_cache
from fedsoda_edge.worker.batches import Border
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings, RecordFile, from_record, row_bytes, to_record
from fedsoda_edge.worker.training import data_order, fine_tune
from fedsoda_hub.algorithms.pruning.layer_plan import choose_groups, make_plan
from tests.edge.model import test_bundle
from tests.edge.model.test_bundle import pruned_by_hand, random_lora, write
from tests.edge.worker.test_training import SETTINGS, make_samples

KEY, WIDTH = bytes(range(32)), 64
MARK, HEAD, TAG = 48, 32, 16  # bytes of a file's beginning, of a record's head and of its tag
SAMPLES = make_samples(10)
LARGE = 1 << 30


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_bundle, "plan_for", deep_plan)
        return write(tmp_path_factory.mktemp("two") / "bundle", tiny_llama, trained=True)


@pytest.fixture(params=["one_tier", "two_tiers"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Bundle)
    return found


@pytest.fixture(autouse=True)
def _groups_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample runs alone, so that passes can be counted by samples; groups have tests of their own."""
    monkeypatch.setattr(border_cache, "GROUP_POSITIONS", 0)


Passes = list[tuple[tuple[int, ...], list[tuple[int, ...]]]]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Every pass over layers: which, and the ids of the samples that it took along."""
    seen: Passes = []

    def noting(source: Bundle, layers: Sequence[int], ids: Sequence[torch.Tensor], **rest: Any) -> list[torch.Tensor]:
        seen.append((tuple(layers), [tuple(sample.tolist()) for sample in ids]))
        return stream(source, layers, ids, **rest)

    monkeypatch.setattr(border_cache, "stream", noting)
    return seen


def opened(bundle: Bundle, directory: Path, samples: Sequence[Sample] = SAMPLES, **change: Any) -> CachedStates:
    settings = CacheSettings(
        directory,
        change.get("key", KEY),
        change.get("dtype", "bf16"),
        change.get("max_bytes"),
        change.get("slice_bytes", LARGE),
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
    """The delta of a round over all samples."""
    tail, view = build(bundle, bundle.plan.adapter), bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    settings = msgspec.structs.replace(SETTINGS, max_steps=0, epochs=epochs)
    border = Border(SAMPLES, states)
    return fine_tune(tail, border, view, settings, seed=0, round_number=1, edge="a").delta


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def record_bytes(sample: Sample) -> int:
    return HEAD + 2 * WIDTH * len(sample.ids) + TAG


def room_for(samples: Iterable[Sample]) -> int:
    """Of the border file alone."""
    return MARK + sum(map(record_bytes, samples))


def border_file(directory: Path) -> Path:
    [path] = directory.glob("border-*")
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# -- a record -------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> torch.Tensor:
    """(5, 64), rows of very different size, one of them zero."""
    sizes = torch.tensor([1e-6, 1.0, 0.0, 300.0, 7e4])
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)) * sizes[:, None]


def test_a_bf16_record_is_the_state_rounded_to_bf16(state: torch.Tensor) -> None:
    record = to_record(state, "bf16")
    assert len(record) == 5 * row_bytes(WIDTH, "bf16") == 5 * 2 * WIDTH
    assert torch.equal(from_record(record, WIDTH, "bf16"), state.to(torch.bfloat16))


def test_an_int8_record_is_within_half_a_step_of_each_rows_largest_magnitude(state: torch.Tensor) -> None:
    record = to_record(state, "int8")
    assert len(record) == 5 * row_bytes(WIDTH, "int8") == 5 * (WIDTH + 4)
    back = from_record(record, WIDTH, "int8")
    for row, got in zip(state.double(), back.double(), strict=True):
        step = max(abs(float(value)) for value in row) / 127
        assert float((row - got).abs().max()) <= step / 2 * (1 + 1e-5)
    assert not back[2].any()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_record_of_a_record_is_itself(state: torch.Tensor, dtype: str) -> None:
    once = from_record(to_record(state, dtype), WIDTH, dtype)
    again = from_record(to_record(once, dtype), WIDTH, dtype)
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


# -- a file of records ----------------------------------------------------------------------------------


def three_records(path: Path) -> RecordFile:
    """Names a, b, c of 2, 3 and 2 rows of 8 bytes."""
    file = RecordFile(path, KEY, "purpose", 8, LARGE)
    for letter, rows in ((b"a", 2), (b"b", 3), (b"c", 2)):
        assert file.put(letter * 16, rows, letter * 8 * rows)
    return file


A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
AT_B = MARK + HEAD + 16 + TAG
AT_C = AT_B + HEAD + 24 + TAG


def test_records_are_found_by_name_now_and_after_opening_again(tmp_path: Path) -> None:
    file = three_records(tmp_path / "f")
    assert file.num_bytes == (tmp_path / "f").stat().st_size == AT_C + HEAD + 16 + TAG
    file.close()
    for _ in range(2):
        file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
        assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"b" * 24, b"c" * 16)
        assert file.get(b"d" * 16) is None
        assert file.damaged == 0
        file.close()


def test_only_its_owner_reads_the_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        three_records(tmp_path / "f").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


@pytest.mark.parametrize("change", [{"key": bytes(32)}, {"purpose": "another"}])
def test_another_key_or_purpose_begins_the_file_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    three_records(tmp_path / "f").close()
    file = RecordFile(tmp_path / "f", **({"key": KEY, "purpose": "purpose"} | change), row_bytes=8, max_bytes=LARGE)
    assert [name in file for name in (A, B, C)] == [False] * 3
    assert file.damaged == 0
    assert (tmp_path / "f").stat().st_size == MARK
    file.close()


@pytest.mark.parametrize(
    "offset", [0, HEAD - 12, HEAD, HEAD + 23, HEAD + 24 + TAG - 1], ids=["head", "nonce", "first", "last", "tag"]
)
def test_a_flipped_bit_is_noticed_once_and_the_record_may_be_written_again(tmp_path: Path, offset: int) -> None:
    file = three_records(tmp_path / "f")
    flip(tmp_path / "f", AT_B + offset)
    assert file.get(B) is None
    assert B not in file
    assert file.get(B) is None
    assert file.damaged == 1
    assert file.put(B, 3, b"B" * 24)
    file.close()
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"B" * 24, b"c" * 16)
    file.close()


@pytest.mark.parametrize("cut", [1, TAG, TAG + 16 + 5, TAG + 16 + HEAD - 1])
def test_a_file_cut_off_in_a_record_keeps_those_before_and_grows_after_them(tmp_path: Path, cut: int) -> None:
    three_records(tmp_path / "f").close()
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:-cut])
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"b" * 24, None)
    assert file.num_bytes == (tmp_path / "f").stat().st_size == AT_C  # nothing of the torn one stays behind the next
    assert file.put(C, 1, b"c" * 8)
    file.close()
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"b" * 24, b"c" * 8)
    assert file.damaged == 0
    file.close()


@pytest.mark.parametrize("begin", [0, HEAD - 12], ids=["whole", "under the other's name"])
def test_a_record_in_anothers_place_is_refused(tmp_path: Path, begin: int) -> None:
    file = three_records(tmp_path / "f")
    data = bytearray((tmp_path / "f").read_bytes())
    length = HEAD + 16 + TAG
    one, other = slice(MARK + begin, MARK + length), slice(AT_C + begin, AT_C + length)
    data[one], data[other] = data[other], data[one]
    (tmp_path / "f").write_bytes(data)
    assert (file.get(A), file.get(C)) == (None, None)
    assert file.damaged == 2
    assert file.get(B) == b"b" * 24
    file.close()


def test_a_file_grows_no_larger_than_it_may_and_shrinks_when_it_may_less(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, AT_B + 10)
    assert file.put(A, 2, b"a" * 16)
    assert file.room == 10
    assert not file.put(B, 3, b"b" * 24)
    assert file.num_bytes == AT_B
    file.close()
    three_records(tmp_path / "g").close()
    file = RecordFile(tmp_path / "g", KEY, "purpose", 8, AT_C + 10)
    assert (file.get(A), file.get(B), file.get(C)) == (b"a" * 16, b"b" * 24, None)
    assert (tmp_path / "g").stat().st_size == AT_C
    file.close()


class Full:
    """A disk that takes so many bytes more, then half of a record and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, takes: int, number: int = errno.ENOSPC) -> None:
        plain = RecordFile._write_at

        def write(file: RecordFile, offset: int, parts: Iterable[bytes]) -> None:
            data = b"".join(parts)
            if len(data) > self.left:
                plain(file, offset, [data[: len(data) // 2]])
                raise OSError(number, os.strerror(number))
            self.left -= len(data)
            plain(file, offset, [data])

        self.left = takes
        monkeypatch.setattr(RecordFile, "_write_at", write)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_is_whole_and_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    disk = Full(monkeypatch, AT_B, number)
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    assert file.put(A, 2, b"a" * 16)
    assert not file.put(B, 3, b"b" * 24)
    assert (tmp_path / "f").stat().st_size == AT_B
    disk.left = LARGE
    assert not file.put(C, 2, b"c" * 16)
    assert file.get(A) == b"a" * 16
    file.close()


def test_a_broken_disk_is_not_a_full_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Full(monkeypatch, MARK, errno.EIO)
    file = RecordFile(tmp_path / "f", KEY, "purpose", 8, LARGE)
    with pytest.raises(OSError, match="Input/output error"):
        file.put(A, 2, b"a" * 16)
    file.close()


# -- the states -----------------------------------------------------------------------------------------


def alone(bundle: Bundle, layers: Sequence[int], sample: Sample, start: torch.Tensor | None = None) -> torch.Tensor:
    """A sample's state after these layers, from nobody's cache."""
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
    swept = Border.sweep(
        one_tier,
        one_tier.plan.sub_emulator,
        SAMPLES,
        lora=one_tier.emulator_lora(),
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
    monkeypatch.setattr(border_cache, "GROUP_POSITIONS", group_positions)
    states = kept(bundle, tmp_path / "all", dtype=dtype)
    everything = trained(bundle, states)
    assert any(tensor.any() for tensor in everything.values())
    states.close()

    passes.clear()
    states = kept(bundle, tmp_path / "all", dtype=dtype)
    assert same(trained(bundle, states), everything)
    assert passes == []
    states.close()

    states = kept(bundle, tmp_path / "none", dtype=dtype, max_bytes=0, slice_bytes=30_000)
    assert same(trained(bundle, states), everything)
    assert (states.num_kept, states.kept_bytes) == (0, MARK)
    states.close()

    states = kept(bundle, tmp_path / "half", dtype=dtype, max_bytes=room_for(SAMPLES[:5]))
    assert 1 <= states.num_kept <= 9
    assert same(trained(bundle, states), everything)
    states.close()

    below = room_for(SAMPLES) if bundle.plan.retained[0] > 0 else 0
    Full(monkeypatch, below + room_for(SAMPLES[:5]))
    states = kept(bundle, tmp_path / "full", dtype=dtype)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(border_cache, "GROUP_POSITIONS", 0)
        states = kept(one_tier, tmp_path_factory.mktemp("calm"))
        delta = trained(one_tier, states)
        states.close()
    return delta


@pytest.mark.parametrize(
    "offset", [0, 16, HEAD - 12, HEAD + 40, -1], ids=["name", "length", "nonce", "ciphertext", "tag"]
)
@pytest.mark.parametrize("when", ["open", "closed"])
def test_a_damaged_record_is_computed_anew_to_the_same_delta(
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


def test_a_damaged_state_below_is_computed_anew(two_tiers: Bundle, tmp_path: Path) -> None:
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


def test_a_sweep_that_was_killed_goes_on_after_its_last_whole_record(
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


def test_short_samples_run_together_and_long_ones_alone(
    one_tier: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []

    def noting(*args: Any, **rest: Any) -> list[torch.Tensor]:
        batches.extend([len(args[2][place]) for place in batch] for batch in rest["batches"])
        return stream(*args, **rest)

    monkeypatch.setattr(border_cache, "stream", noting)
    monkeypatch.setattr(border_cache, "GROUP_POSITIONS", 40)
    samples = [Sample(tuple(range(3, 3 + length)), length - 1) for length in (9, 60, 10, 11, 12, 50)]
    kept(one_tier, tmp_path / "c", samples).close()
    assert batches == [[9, 10, 11], [60], [12], [50]]  # at most 40 ids with pads, by their first sample
