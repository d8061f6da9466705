"""This machine is read as it is, and nothing is made on it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedsoda_edge.device.facts import read_device

GIB = 2**30


def test_this_machine_is_read_before_its_home_exists(tmp_path: Path) -> None:
    found = read_device(tmp_path / "not" / "yet" / "made")
    assert found.ram_bytes > 0
    assert abs(found.disk_bytes - shutil.disk_usage(tmp_path).free) < GIB
    assert found.threads >= 1
    assert (found.vram_bytes > 0) == (found.accelerator != "")
    assert not (tmp_path / "not").exists()


def test_the_gpu_with_the_most_free_memory_is_named_and_a_driver_that_fails_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pynvml

    class Memory:
        def __init__(self, free: int) -> None:
            self.free = free

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda index: f"GPU {index}")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda index: Memory((2, 7, 5)[index] * GIB))
    found = read_device(tmp_path)
    assert (found.accelerator, found.vram_bytes) == ("GPU 1", 7 * GIB)

    def lost(_: int) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    found = read_device(tmp_path)
    assert (found.accelerator, found.vram_bytes) == ("", 0)
