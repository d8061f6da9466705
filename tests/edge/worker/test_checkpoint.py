"""A local round that is killed at any step ends with the bits of a calm one and loses at most 2 % of its work."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.worker.batches import Batch, SweptSamples
from fedsoda_edge.worker.checkpoint import RoundCheckpoint, Saved
from fedsoda_edge.worker.training import StepDone, TrainedDelta, fine_tune, num_steps
from tests.edge.model.test_bundle import write
from tests.edge.worker.test_training import SETTINGS, Killed, make_samples

IDENTITY = {"seed": 0, "round": 1, "view": "aa", "settings": {"batch_size": 4}}
SAMPLES = make_samples(14)
SEVEN_STEPS = msgspec.structs.replace(SETTINGS, epochs=2, max_steps=0, proximal_mu=0.1)


class Prompt(RoundCheckpoint):
    """Its disk is quicker than training."""

    def save(self, step: int, tokens: int, micro_batch: int, tensors: dict[str, torch.Tensor]) -> None:
        super().save(step, tokens, micro_batch, tensors)
        self.wait()


def killed_at(step: int) -> StepDone:
    def progress(done: int, *_: float) -> None:
        if done == step:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bundle:
    return write(tmp_path_factory.mktemp("b") / "bundle", tiny_llama, trained=True)


@pytest.fixture(scope="module")
def swept(bundle: Bundle) -> SweptSamples:
    scale = bundle.manifest.lora.scale
    return SweptSamples.sweep(
        bundle, bundle.plan.sub_emulator, SAMPLES, emulator=bundle.emulator_lora(), lora_scale=scale
    )


def trained(
    bundle: Bundle,
    swept: SweptSamples,
    saves: RoundCheckpoint | None = None,
    progress: StepDone | None = None,
    epochs: int = 2,
    micro_batch: int | None = None,
) -> TrainedDelta:
    """Train a round with a fresh sub-LLM, as a process does that has just begun."""
    tail, view = build(bundle, bundle.plan.adapter), bundle.adapter_lora()
    lora.attach(tail, bundle.manifest.lora, view)
    settings = msgspec.structs.replace(SEVEN_STEPS, epochs=epochs)
    assert epochs != 2 or num_steps(len(SAMPLES), settings) == 7
    return fine_tune(
        tail,
        swept,
        view,
        settings,
        seed=0,
        round_number=1,
        edge="a",
        micro_batch=micro_batch,
        progress=progress,
        checkpoint=saves,
    )


@pytest.fixture(scope="module")
def calm(bundle: Bundle, swept: SweptSamples) -> TrainedDelta:
    return trained(bundle, swept)


def same(one: TrainedDelta, other: TrainedDelta) -> bool:
    counts = ("num_examples", "loss", "num_steps", "num_tokens")
    return delta.to_bytes(one.delta) == delta.to_bytes(other.delta) and all(
        getattr(one, name) == getattr(other, name) for name in counts
    )


# -- a round --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 8))
def test_a_round_killed_after_any_step_continues_to_the_same_bits(
    bundle: Bundle, swept: SweptSamples, calm: TrainedDelta, tmp_path: Path, step: int
) -> None:
    with pytest.raises(Killed):
        trained(bundle, swept, Prompt(tmp_path, IDENTITY), killed_at(step))
    again: list[int] = []
    result = trained(bundle, swept, Prompt(tmp_path, IDENTITY), lambda done, *_: again.append(done))
    assert same(result, calm)
    assert again == list(range(min(step + 1, 7), 8))  # of what was done only the last step, which is not saved


def test_a_round_killed_again_and_again_continues_to_the_same_bits(
    bundle: Bundle, swept: SweptSamples, calm: TrainedDelta, tmp_path: Path
) -> None:
    for step in (2, 3, 6):
        with pytest.raises(Killed):
            trained(bundle, swept, Prompt(tmp_path, IDENTITY), killed_at(step))
    assert same(trained(bundle, swept, Prompt(tmp_path, IDENTITY)), calm)


@pytest.mark.parametrize("micro_batch", [None, 3, 1])
def test_a_round_that_ran_out_of_memory_continues_with_the_micro_batch_it_had(
    bundle: Bundle, swept: SweptSamples, tmp_path: Path, micro_batch: int | None
) -> None:
    """Memory is short in step 3 alone: what comes after it, in this process or the next, goes in the same sums."""

    class Scarce(SweptSamples):
        steps = 0

        def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Batch:
            if self.steps == 2 and len(indices) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().batch(indices, device)

        def progress(self, done: int, *_: float) -> None:
            self.steps = done
            if done == self.killed_at:
                raise Killed

        def __init__(self, killed_at: int = 0) -> None:
            super().__init__(swept.samples, swept.states)
            self.killed_at = killed_at

    class Noting(SweptSamples):
        def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> Batch:
            seen.add(len(indices))
            return super().batch(indices, device)

    scarce, seen = Scarce(), set[int]()
    whole = trained(bundle, scarce, None, scarce.progress, micro_batch=micro_batch)
    allowed = 1 if micro_batch == 1 else 2
    assert whole.micro_batch == allowed
    scarce = Scarce(killed_at=5)
    with pytest.raises(Killed):
        trained(bundle, scarce, Prompt(tmp_path, IDENTITY), scarce.progress, micro_batch=micro_batch)
    noting = Noting(swept.samples, swept.states)
    result = trained(bundle, noting, Prompt(tmp_path, IDENTITY), micro_batch=micro_batch)
    assert seen == {allowed}
    assert same(result, whole)


def test_a_checkpoint_does_not_change_a_round(
    bundle: Bundle, swept: SweptSamples, calm: TrainedDelta, tmp_path: Path
) -> None:
    saves = RoundCheckpoint(tmp_path, IDENTITY)
    assert same(trained(bundle, swept, saves), calm)
    saves.forget()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_disturb_training(
    bundle: Bundle, swept: SweptSamples, calm: TrainedDelta, tmp_path: Path
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str]) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert same(trained(bundle, swept, Prompt(tmp_path, IDENTITY, full)), calm)
    assert list(tmp_path.iterdir()) == []


def test_what_was_saved_before_the_disk_was_full_counts(
    bundle: Bundle, swept: SweptSamples, calm: TrainedDelta, tmp_path: Path
) -> None:
    left = [3]

    def filling(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str]) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        save_file(tensors, path, about)

    with pytest.raises(Killed):
        trained(bundle, swept, Prompt(tmp_path, IDENTITY, filling), killed_at(6))
    again: list[int] = []
    assert same(trained(bundle, swept, Prompt(tmp_path, IDENTITY, filling), lambda done, *_: again.append(done)), calm)
    assert again == [4, 5, 6, 7]


# -- the files ------------------------------------------------------------------------------------------


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"lora_A": torch.full((3, 2), float(step)), "lora_A#step": torch.tensor(float(step))}


def saved_twice(directory: Path) -> tuple[Path, Path]:
    """Save steps 1 and 2 and give their files."""
    saves = Prompt(directory, IDENTITY)
    saves.save(1, 10, 4, tensors(1))
    [older] = directory.iterdir()
    saves.save(2, 20, 4, tensors(2))
    [newer] = set(directory.iterdir()) - {older}
    return older, newer


def is_step(saved: Saved | None, step: int) -> bool:
    assert saved is not None
    assert saved.tokens == 10 * step
    assert saved.tensors.keys() == tensors(step).keys()
    assert all(torch.equal(saved.tensors[name], value) for name, value in tensors(step).items())
    return saved.step == step


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * len(path.read_bytes()))


def lose_data(path: Path) -> None:
    """Leave a file as some file systems do after a power cut: the length is there, the last bytes are not."""
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(8))


def take_a_stranger(path: Path) -> None:
    save_file(tensors(9), path)


DAMAGES = [truncate, empty, scribble, lose_data, take_a_stranger, Path.unlink]


def test_the_latest_save_is_the_one_that_counts(tmp_path: Path) -> None:
    assert RoundCheckpoint(tmp_path, IDENTITY).load() is None
    saved_twice(tmp_path)
    assert is_step(RoundCheckpoint(tmp_path, IDENTITY).load(), 2)
    saves = Prompt(tmp_path, IDENTITY)
    saves.load()
    saves.save(3, 30, 4, tensors(3))
    assert len(list(tmp_path.iterdir())) == 2
    assert is_step(RoundCheckpoint(tmp_path, IDENTITY).load(), 3)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_save_before_is_used_where_the_newest_is_damaged(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    older, newer = saved_twice(tmp_path)
    damage(newer)
    saves = Prompt(tmp_path, IDENTITY)
    assert is_step(saves.load(), 1)
    saves.save(2, 20, 4, tensors(2))  # in the damaged one's place, so that step 1 stays while it is written
    assert is_step(RoundCheckpoint(tmp_path, IDENTITY).load(), 2)
    newer.unlink()
    assert is_step(RoundCheckpoint(tmp_path, IDENTITY).load(), 1)
    damage(older)
    assert RoundCheckpoint(tmp_path, IDENTITY).load() is None


@pytest.mark.parametrize("both", [False, True], ids=["newest", "both"])
def test_a_round_continues_from_what_is_whole(
    bundle: Bundle, swept: SweptSamples, calm: TrainedDelta, tmp_path: Path, both: bool
) -> None:
    with pytest.raises(Killed):
        trained(bundle, swept, Prompt(tmp_path, IDENTITY), killed_at(4))
    files = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path in files if both else files[1:]:
        truncate(path)
    again: list[int] = []
    assert same(trained(bundle, swept, Prompt(tmp_path, IDENTITY), lambda done, *_: again.append(done)), calm)
    assert again == list(range(1 if both else 4, 8))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"round": 2}, {"view": "ab"}, {"settings": {"batch_size": 5}}, {"threads": 2}]
)
def test_another_round_begins_at_its_beginning(tmp_path: Path, change: dict[str, Any]) -> None:
    saved_twice(tmp_path)
    other = Prompt(tmp_path, IDENTITY | change)
    assert other.load() is None
    other.save(1, 10, 4, tensors(1))
    assert is_step(RoundCheckpoint(tmp_path, IDENTITY | change).load(), 1)


def test_an_identity_is_the_same_in_any_order(tmp_path: Path) -> None:
    saved_twice(tmp_path)
    assert is_step(RoundCheckpoint(tmp_path, dict(reversed(IDENTITY.items()))).load(), 2)


def test_forgetting_leaves_no_file(tmp_path: Path) -> None:
    saved_twice(tmp_path)
    (tmp_path / "round.1.part").write_bytes(b"half, of a process that was killed")
    RoundCheckpoint(tmp_path, IDENTITY).forget()
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_is_what_was_there_then(tmp_path: Path) -> None:
    saves, held = RoundCheckpoint(tmp_path, IDENTITY), tensors(1)
    saves.save(1, 10, 4, held)
    held["lora_A"].zero_()  # training continues while the file is written
    saves.wait()
    assert is_step(RoundCheckpoint(tmp_path, IDENTITY).load(), 1)


# -- when to save ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 49, 50, 99, 100, 149, 150, 1000, 12345])
def test_at_most_two_percent_or_one_step_is_at_risk(tmp_path: Path, steps: int) -> None:
    saves = RoundCheckpoint(tmp_path, IDENTITY)
    due = [step for step in range(1, steps + 1) if saves.is_due(step, steps)]
    gaps = [after - before for before, after in zip([0, *due], [*due, steps], strict=True)]
    assert max(gaps) <= max(1, 0.02 * steps)
    if steps < 100:
        assert due == list(range(1, steps))
    else:
        assert len(due) <= 75


def test_a_slow_disk_has_one_save_to_write_at_a_time(tmp_path: Path) -> None:
    may_go_on = threading.Event()

    def slow(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str]) -> None:
        may_go_on.wait(30)
        save_file(tensors, path, about)

    saves = RoundCheckpoint(tmp_path, IDENTITY, slow)
    saves.save(1, 10, 4, tensors(1))
    assert not saves.is_due(2, 7)
    may_go_on.set()
    saves.wait()
    assert saves.is_due(2, 7)
    assert is_step(RoundCheckpoint(tmp_path, IDENTITY).load(), 1)


# -- kill -9 --------------------------------------------------------------------------------------------

PROCESS = """
import sys
from pathlib import Path
import msgspec
import torch
from fedsoda_edge.data.samples import Sample
from fedsoda_edge.model import lora
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.sub_llm import build
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.checkpoint import RoundCheckpoint
from fedsoda_edge.worker.training import fine_tune

torch.set_num_threads(1)
bundle = Bundle.open(Path(sys.argv[1]))
given = msgspec.json.decode(sys.stdin.readline())
settings = msgspec.convert(given["settings"], LocalSettings)
samples = [Sample(tuple(ids), start) for ids, start in given["samples"]]
scale = bundle.manifest.lora.scale
swept = SweptSamples.sweep(bundle, bundle.plan.sub_emulator, samples, emulator=bundle.emulator_lora(), lora_scale=scale)
tail, view = build(bundle, bundle.plan.adapter), bundle.adapter_lora()
lora.attach(tail, bundle.manifest.lora, view)

def progress(step, *_):
    print(step, flush=True)
    if step == 35:
        sys.stdin.read()

saves = RoundCheckpoint(Path(sys.argv[2]), given["identity"])
fine_tune(
    tail, swept, view, settings, seed=0, round_number=1, edge="a", progress=progress, checkpoint=saves
)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_a_process_killed_in_the_middle_of_a_round_leaves_what_the_next_one_needs(
    bundle: Bundle, swept: SweptSamples, tmp_path: Path
) -> None:
    settings = msgspec.structs.replace(SEVEN_STEPS, epochs=12)
    given = {
        "settings": settings,
        "identity": IDENTITY,
        "samples": [(sample.ids, sample.start) for sample in SAMPLES],
    }
    command = [sys.executable, "-c", PROCESS, str(bundle.path("tokenizer.json").parent), str(tmp_path / "c")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(given) + b"\n")
        process.stdin.flush()
        for line in process.stdout:
            if line == b"12\n":
                process.kill()  # it is on its way to step 35, where it would wait
                break
    assert process.returncode == -signal.SIGKILL
    again: list[int] = []
    saves = RoundCheckpoint(tmp_path / "c", IDENTITY)
    result = trained(bundle, swept, saves, lambda done, *_: again.append(done), epochs=12)
    assert again == list(range(again[0], 43))
    assert again[0] > 1
    assert same(result, trained(bundle, swept, epochs=12))
    saves.forget()
    assert list((tmp_path / "c").iterdir()) == []
