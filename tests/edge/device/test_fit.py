"""How training fits this device: the quickest way that has room, or both numbers in one sentence and exit status 4."""

from __future__ import annotations

import pytest

from fedsoda_edge.device.fit import Limits, check_device_name, check_disk, fit, leaner, plan_sentence, table
from fedsoda_edge.errors import DeviceTooSmall, DiskFull, UsageProblem
from fedsoda_edge.protocol.messages import DeviceFacts
from fedsoda_edge.protocol.needs import PROCESS_BYTES, MemoryPlan, SampleSizes, Shape, plans
from fedsoda_edge.units import human_bytes

GIB = 2**30
# Llama-3-8B with three adapter layers, everything in NF4.
SHAPE = Shape(
    4096,
    14336,
    4096,
    1024,
    128256,
    num_layers=3,
    num_attention=2,
    num_mlp=2,
    layer_parameters=218_000_000,
    adapter_parameters=3 * 218_000_000,
    frozen_parameters=0,
    lora_parameters=5_000_000,
    adapter_in_nf4=True,
    emulator_in_nf4=True,
    head_in_nf4=True,
    width=2,
)
SAMPLES = SampleSizes(8, 512, 100)


def ways(device: str, samples: SampleSizes = SAMPLES) -> list[MemoryPlan]:
    return list(plans(SHAPE, device, samples))


def facts(*, ram: int = 64 * GIB, disk: int = 50 * GIB, vram: int = 0) -> DeviceFacts:
    return DeviceFacts(
        ram_bytes=ram, vram_bytes=vram, disk_bytes=disk, threads=4, accelerator="RTX 4060" if vram else ""
    )


def refusal(wanted: str, have: DeviceFacts, limits: Limits = Limits()) -> str:
    with pytest.raises(DeviceTooSmall) as failure:
        fit(wanted, SHAPE, SAMPLES, have, limits)
    assert failure.value.exit_status == 4
    return str(failure.value)


def test_ways_come_quickest_first_and_each_form_halves_its_micro_batch() -> None:
    found = [(way.packed, way.recompute, way.micro_batch) for way in ways("cpu")]
    assert found == [
        (packed, recompute, micro)
        for packed, recompute in ((False, False), (True, False), (True, True))
        for micro in (8, 4, 2, 1)
    ]
    for form in range(3):
        peaks = [way.peak for way in ways("cpu")[4 * form : 4 * form + 4]]
        assert peaks == sorted(peaks, reverse=True)


def test_a_gpu_computes_in_bf16_and_needs_less_for_weights_and_activations() -> None:
    for one, other in zip(ways("cuda"), ways("cpu"), strict=True):
        assert (one.dtype, other.dtype) == ("bfloat16", "float32")
        assert one.activations < 0.65 * other.activations
    assert ways("cuda")[0].weights * 2 == ways("cpu")[0].weights


def test_plenty_of_memory_is_used_for_speed() -> None:
    assert fit("auto", SHAPE, SAMPLES, facts()) == ways("cpu")[0]


@pytest.mark.parametrize("place", range(12))
def test_the_first_way_with_room_is_taken(place: int) -> None:
    way = ways("cpu")[place]
    found = fit("cpu", SHAPE, SAMPLES, facts(ram=int(way.peak / 0.9) + 1))
    assert found.peak <= way.peak or ways("cpu").index(found) <= place
    assert ways("cpu").index(found) <= place


def test_the_last_tenth_is_left_to_others_unless_nothing_else_has_room() -> None:
    least = min(ways("cpu"), key=lambda way: way.peak)
    assert fit("cpu", SHAPE, SAMPLES, facts(ram=least.peak)) == least
    refusal("cpu", facts(ram=least.peak - 1))


def test_auto_takes_a_gpu_that_has_room_else_the_cpu() -> None:
    least = min(way.peak for way in ways("cuda"))
    assert fit("auto", SHAPE, SAMPLES, facts(vram=24 * GIB)).device == "cuda"
    assert fit("auto", SHAPE, SAMPLES, facts(vram=least)).device == "cuda"
    assert fit("auto", SHAPE, SAMPLES, facts(vram=least - 1)).device == "cpu"
    assert fit("cpu", SHAPE, SAMPLES, facts(vram=24 * GIB)).device == "cpu"
    assert fit("cuda:1", SHAPE, SAMPLES, facts(vram=24 * GIB)).device == "cuda:1"


def test_an_8b_model_trains_in_a_gigabyte_and_a_half_of_gpu_memory() -> None:
    assert min(way.peak for way in ways("cuda", SampleSizes(1, 512, 512))) < 1.5 * GIB


def test_too_little_memory_is_told_with_both_numbers_and_by_how_much() -> None:
    least = min(way.peak for way in ways("cpu"))
    assert refusal("cpu", facts(ram=GIB // 2)) == (
        f"this device has 512 MiB of memory free, the sub-LLM needs at least {human_bytes(least)} for a row of 512 ids, "
        f"{human_bytes(least - GIB // 2)} more; close other programs, or ask the hub's owner for a smaller sub-LLM"
    )


def test_too_little_gpu_memory_is_told_with_the_gpus_name() -> None:
    assert refusal("cuda", facts(vram=GIB // 4)).startswith("the GPU RTX 4060 has 256 MiB free, the sub-LLM needs")
    assert (
        refusal("cuda:0", facts()) == "this device shows no NVIDIA GPU; install its driver, or train with device='cpu'"
    )


def test_a_limit_of_the_owner_is_told_as_his() -> None:
    sentence = refusal("cpu", facts(), Limits(max_ram=GIB // 2))
    assert sentence.startswith("max_ram allows 512 MiB, the sub-LLM needs at least ")
    assert refusal("cuda", facts(vram=24 * GIB), Limits(max_vram=GIB // 4)).startswith("max_vram allows 256 MiB")


def test_a_limit_above_what_is_free_changes_nothing() -> None:
    tight = facts(ram=min(way.peak for way in ways("cpu")))
    assert fit("cpu", SHAPE, SAMPLES, tight, Limits(max_ram=99 * GIB)) == fit("cpu", SHAPE, SAMPLES, tight)


def test_a_leaner_way_needs_less_until_there_is_none() -> None:
    plan: MemoryPlan | None = ways("cpu")[0]
    peaks = []
    while plan is not None:
        peaks.append(plan.peak)
        plan = leaner(plan, SHAPE, SAMPLES, PROCESS_BYTES)
    assert peaks == sorted(set(peaks), reverse=True)
    assert peaks[-1] == min(way.peak for way in ways("cpu"))


def test_the_table_adds_up_to_the_peak() -> None:
    for way in ways("cpu"):
        *rest, sweep, peak = [part.bytes for part in table(way)]
        assert peak == way.peak == max(sum(rest), rest[0] + sweep)


def test_the_sentence_names_device_memory_and_way() -> None:
    assert plan_sentence(ways("cpu")[0], facts()).startswith("training on the CPU takes ")
    assert "64.0 GiB free: adapter and head dense, 8 samples at once" in plan_sentence(ways("cpu")[0], facts())
    least = plan_sentence(ways("cuda")[-1], facts(vram=8 * GIB))
    assert "on the GPU RTX 4060" in least
    assert (
        "8.00 GiB free: adapter and head as they are stored, 1 of 8 samples at once, activations computed twice"
        in least
    )


def test_too_little_disk_is_told_with_both_numbers() -> None:
    check_disk(GIB, facts(disk=GIB))
    with pytest.raises(DiskFull) as failure:
        check_disk(4 * GIB, facts(disk=700 * 2**20), 2 * GIB)
    assert failure.value.exit_status == 3
    assert str(failure.value) == (
        "this device has 700 MiB of disk free, the bundle needs 4.00 GiB beyond the 2.00 GiB that are here; "
        "free 3.32 GiB, or move FEDSODA_HOME with all that is in it to another disk "
        "(an empty one is another device, which needs a token of its own)"
    )


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:x", "", "CPU"])
def test_an_unknown_device_is_refused_with_those_there_are(wanted: str) -> None:
    with pytest.raises(UsageProblem) as failure:
        check_device_name(wanted)
    assert str(failure.value) == f"device={wanted!r} is not known; choose auto, cpu, cuda or cuda:N"
