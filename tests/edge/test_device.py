"""Whether a bundle fits this device: both numbers in one sentence and exit status 4, before anything is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedsoda_edge.device import choose_device, choose_device_within, read_device
from fedsoda_edge.errors import DeviceTooSmall, UsageProblem
from fedsoda_edge.ports.console import human_bytes
from fedsoda_edge.protocol.manifest import EdgeNeeds
from fedsoda_edge.protocol.messages import DeviceFacts

GIB = 2**30
NEEDS = EdgeNeeds(disk_bytes=4 * GIB, ram_bytes=6 * GIB, vram_bytes=3 * GIB)


def device(*, ram: int = 8 * GIB, disk: int = 5 * GIB, vram: int = 0) -> DeviceFacts:
    return DeviceFacts(
        ram_bytes=ram, vram_bytes=vram, disk_bytes=disk, threads=4, accelerator="RTX 4060" if vram else ""
    )


def refusal(wanted: str, facts: DeviceFacts, held_bytes: int = 0) -> str:
    with pytest.raises(DeviceTooSmall) as failure:
        choose_device(wanted, NEEDS, facts, held_bytes)
    assert failure.value.exit_status == 4
    return str(failure.value)


def test_a_laptop_without_gpu_trains_on_its_cpu() -> None:
    assert choose_device("auto", NEEDS, device()) == "cpu"
    assert choose_device("cpu", NEEDS, device()) == "cpu"


def test_auto_takes_a_gpu_that_has_room_else_the_cpu() -> None:
    assert choose_device("auto", NEEDS, device(vram=3 * GIB)) == "cuda"
    assert choose_device("auto", NEEDS, device(vram=3 * GIB - 1)) == "cpu"


def test_what_is_wished_for_is_used() -> None:
    assert choose_device("cpu", NEEDS, device(vram=3 * GIB)) == "cpu"
    assert choose_device("cuda", NEEDS, device(vram=3 * GIB)) == "cuda"
    assert choose_device("cuda:1", NEEDS, device(vram=3 * GIB)) == "cuda:1"


def test_exactly_enough_is_enough_and_a_byte_less_is_not() -> None:
    enough = device(ram=NEEDS.ram_bytes, disk=NEEDS.disk_bytes)
    assert choose_device("auto", NEEDS, enough) == "cpu"
    refusal("auto", device(ram=NEEDS.ram_bytes - 1, disk=NEEDS.disk_bytes))
    refusal("auto", device(ram=NEEDS.ram_bytes, disk=NEEDS.disk_bytes - 1))
    refusal("cuda", device(vram=NEEDS.vram_bytes - 1))


def test_too_little_memory_is_told_with_both_numbers() -> None:
    assert refusal("auto", device(ram=int(2.5 * GIB))) == (
        "this device has 2.50 GiB of memory free, the sub-LLM needs 6.00 GiB; "
        "close other programs, or ask the hub's owner for a smaller sub-LLM"
    )


def test_too_little_disk_is_told_with_both_numbers() -> None:
    assert refusal("auto", device(disk=700 * 2**20)) == (
        "this device has 700 MiB of disk free, the bundle needs 4.00 GiB; "
        "free space or point FEDSODA_HOME to another disk"
    )


def test_too_little_gpu_memory_is_told_with_both_numbers_and_the_gpus_name() -> None:
    assert refusal("cuda", device(vram=2 * GIB)) == (
        "the GPU RTX 4060 has 2.00 GiB free, the sub-LLM needs 3.00 GiB; close what uses it, or --device cpu"
    )
    assert refusal("cuda:0", device()) == (
        "the GPU (none found) has 0 B free, the sub-LLM needs 3.00 GiB; close what uses it, or --device cpu"
    )


def test_what_is_on_the_disk_already_needs_no_space_again() -> None:
    assert choose_device("auto", NEEDS, device(disk=GIB), held_bytes=3 * GIB) == "cpu"
    assert choose_device("auto", NEEDS, device(disk=0), held_bytes=5 * GIB) == "cpu"
    assert "1.00 GiB of disk free, the bundle needs 1.50 GiB" in refusal("auto", device(disk=GIB), 5 * GIB // 2)


def test_a_gpu_needs_no_room_in_memory_for_the_model() -> None:
    assert choose_device("auto", NEEDS, device(ram=GIB, vram=3 * GIB)) == "cuda"


def test_a_full_disk_is_a_full_disk_also_with_a_gpu() -> None:
    assert "disk" in refusal("cuda", device(vram=3 * GIB, disk=0))


@pytest.mark.parametrize("wanted", ["gpu", "CPU", "", "cuda:", "cuda:x", "cuda:-1", "cudaX", "cuda:0,1"])
def test_a_device_that_is_none_is_wrong_usage(wanted: str) -> None:
    with pytest.raises(UsageProblem) as failure:
        choose_device(wanted, NEEDS, device(vram=3 * GIB))
    assert str(failure.value) == f"--device {wanted!r} is none of auto, cpu, cuda, cuda:N"
    assert failure.value.exit_status == 2


def test_this_machine_is_read_before_its_home_exists(tmp_path: Path) -> None:
    facts = read_device(tmp_path / "not" / "yet" / "made")
    assert facts.ram_bytes > 0
    assert abs(facts.disk_bytes - shutil.disk_usage(tmp_path).free) < GIB
    assert facts.threads >= 1
    assert (facts.vram_bytes > 0) == (facts.accelerator != "")
    assert not (tmp_path / "not").exists()


def test_sizes_are_read_by_people() -> None:
    assert [human_bytes(size) for size in (0, 5 * 2**20, GIB, 3 * GIB // 2)] == [
        "0 B",
        "5.00 MiB",
        "1.00 GiB",
        "1.50 GiB",
    ]


def test_the_owners_limit_is_told_with_both_numbers() -> None:
    roomy = device(vram=4 * GIB)
    assert choose_device_within("auto", NEEDS, roomy) == "cuda"
    assert choose_device_within("auto", NEEDS, roomy, max_vram=3 * GIB - 1) == "cpu"
    assert choose_device_within("cpu", NEEDS, roomy, max_ram=6 * GIB) == "cpu"
    with pytest.raises(DeviceTooSmall) as failure:
        choose_device_within("cpu", NEEDS, roomy, max_ram=5 * GIB)
    assert failure.value.exit_status == 4
    assert str(failure.value) == (
        "--max-ram allows 5.00 GiB, the sub-LLM needs 6.00 GiB; allow more, or ask the hub's owner for a smaller sub-LLM"
    )
    with pytest.raises(
        DeviceTooSmall, match=r"--max-ram allows 5.00 GiB, .* and --max-vram allows 1.00 GiB, the sub-LLM"
    ):
        choose_device_within("auto", NEEDS, roomy, max_ram=5 * GIB, max_vram=GIB)
    with pytest.raises(DeviceTooSmall, match=r"this device has 2\.00 GiB of memory free"):
        choose_device_within("auto", NEEDS, device(ram=2 * GIB), max_ram=5 * GIB)
