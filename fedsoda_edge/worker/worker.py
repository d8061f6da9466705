"""The edge's child process that owns torch and the GPU: it does the commands of `protocol/commands.py`. No sockets.

It reads private text and writes only LoRA tensors; its parent never sees ids or hidden states.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil
import torch

from fedsoda_edge.data.chat import ChatTemplate
from fedsoda_edge.data.local_data import LocalData
from fedsoda_edge.data.samples import SampleTokenizer, read_samples
from fedsoda_edge.errors import DeviceTooSmall, UsageProblem
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import Bundle, read_manifest
from fedsoda_edge.model.nf4 import NF4Linear, dequantize, quantize
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.ports.child import ReportProgress, serve
from fedsoda_edge.ports.disk import sha256_file, write_durably
from fedsoda_edge.ports.store import FileStore, when_here
from fedsoda_edge.ports.system import lower_priority, peak_rss_bytes, return_memory_at_once
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES
from fedsoda_edge.protocol.messages import Digest
from fedsoda_edge.protocol.needs import PROCESS_BYTES, MemoryPlan
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.units import human_bytes
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings
from fedsoda_edge.worker.checkpoint import RoundCheckpoint
from fedsoda_edge.worker.training import fine_tune, is_out_of_memory, probe


class Worker:
    """One run on one device. Paths come from the agent; what is between them stays here.

    Args:
        shared: adapters that workers of one process train in turn, each from its own view; None: this one is alone.
            Workers of one process keep no checkpoints: none of them dies alone.
        process_bytes: what a process holds before it reads anything; None: what this one holds now.
    """

    def __init__(
        self, shared: MutableMapping[bytes, SubLLM] | None = None, *, process_bytes: int | None = None
    ) -> None:
        if process_bytes is None:  # of imports alone; among others in one process, what each would take in its own
            process_bytes = psutil.Process().memory_info().rss if shared is None else PROCESS_BYTES
        self._process_bytes = process_bytes
        self._models: MutableMapping[bytes, SubLLM] = {} if shared is None else shared
        self._keeps_checkpoints = shared is None
        self._memory: MemoryPlan | None = None
        self._micro_batch = self._room = 0
        self._bundle: Bundle | None = None
        self._border: SweptSamples | None = None
        self._states: CachedStates | None = None
        self._emulator_name = ""
        self._frozen_lora: dict[str, torch.Tensor] = {}  # emulator LoRA of layers that are trained through
        self._sub_llm: SubLLM | None = None

    @property
    def bundle(self) -> Bundle:
        assert self._bundle is not None, "the agent opens the bundle first"
        return self._bundle

    def answer(self, command: cmd.Command, report: ReportProgress) -> msgspec.Struct:
        """Do one command of the agent."""
        match command:
            case cmd.Check():
                return self.check(command)
            case cmd.Open():
                return self.open(command)
            case cmd.Sweep():
                return self.sweep(command, report)
            case cmd.Train():
                return self.train(command, report)
            case cmd.Advance():
                return self.advance(command)
            case cmd.Examine():
                return examine()

    def open(self, command: cmd.Open) -> cmd.Opened:
        """Read the data, as soon as the tokenizer is here; say how many samples there are.

        The rest of the bundle may still be coming. Each file is verified when it is first used.
        """
        store = FileStore(Path(command.store))
        coming = store.coming(command.manifest)
        manifest = read_manifest(store.get(command.manifest))
        self._bundle = Bundle(manifest, lambda file: when_here(store.path(file.sha256), coming))
        tokenizer = SampleTokenizer(self._bundle.path("tokenizer.json"), manifest.config.get("eos_token_id"))
        names = {file.name for file in manifest.files}
        files = {name: self._bundle.path(name) for name in TOKENIZER_FILES if name in names}
        self._samples = read_samples(
            LocalData(Path(command.rows.path), command.rows.columns),
            TextTemplate(command.rows.prompt),
            TextTemplate(command.rows.completion),
            tokenizer,
            min(command.max_length, int(manifest.config["max_position_embeddings"])),
            ChatTemplate.read(files),
        )
        return cmd.Opened(
            num_examples=len(self._samples.samples),
            num_skipped=self._samples.num_skipped,
            threads=torch.get_num_threads(),
            process_bytes=self._process_bytes,
            has_cuda=torch.cuda.is_available(),
            longest_ids=max((len(sample.ids) for sample in self._samples.samples), default=0),
            longest_labels=max((len(sample.ids) - sample.start for sample in self._samples.samples), default=0),
        )

    @property
    def memory(self) -> MemoryPlan:
        assert self._memory is not None, "the agent says how to train when it asks for the border"
        return self._memory

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.memory.device.startswith("cuda") else torch.float32

    def check(self, command: cmd.Check) -> cmd.Checked:
        """Read every row of data whose format the agent does not read; say how many there are."""
        rows = command.rows
        data = LocalData(Path(rows.path), rows.columns)
        return cmd.Checked(data.check(TextTemplate(rows.prompt), TextTemplate(rows.completion)))

    def sweep(self, command: cmd.Sweep, report: ReportProgress) -> cmd.Swept:
        """Run all samples through the sub-emulator with this alignment; what is on the disk already is not run."""
        bundle, spec = self.bundle, self.bundle.manifest.lora
        path, cache = command.emulator, command.cache
        self._memory = memory = command.memory
        self._micro_batch, self._room = memory.micro_batch, command.room
        if memory.device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageProblem(
                f"--device {memory.device}: torch has no CUDA here; install a CUDA build, or --device cpu"
            )
        if memory.frugal:
            return_memory_at_once()
        emulator = bundle.emulator_lora() if path is None else delta.from_bytes(Path(path).read_bytes(), spec.emulator)
        name = bundle.manifest.file("emulator_lora.safetensors").sha256 if path is None else sha256_file(Path(path))
        if self._states is not None:
            self._states.close()
        self._states = CachedStates(
            bundle,
            [sample.ids for sample in self._samples.samples],
            emulator=emulator,
            emulator_name=name,
            settings=CacheSettings(
                Path(cache.directory),
                bytes.fromhex(cache.key),
                cache.dtype,
                cache.max_bytes,
                memory.slice_bytes,
                not memory.packed,
            ),
            compute_dtype=self._compute_dtype,
            device=memory.device,
        )
        with _out_of_memory_is_told(memory):
            self._states.sweep(lambda done, total: report(cmd.SweepProgress(done, total)))
        self._border = SweptSamples(self._samples.samples, self._states)
        self._emulator_name = name
        self._frozen_lora = lora.on(bundle.plan.resident, emulator)
        return cmd.Swept(
            num_kept=self._states.num_kept,
            kept_bytes=self._states.kept_bytes,
            num_damaged=self._states.num_damaged,
        )

    def train(self, command: cmd.Train, report: ReportProgress) -> cmd.Trained:
        """Train one local round; leave the coded delta and the new residual as files."""
        spec = self.bundle.manifest.lora
        assert self._border is not None, "the agent asks for the border first"
        assert self._states is not None
        view, settings = self._view(command.view), command.settings
        if self._sub_llm is None:
            self._sub_llm = self._built(view, settings.batch_size)
        lora.load(self._sub_llm, self._frozen_lora)  # another one since the last alignment
        identity = {
            "settings": msgspec.to_builtins(settings),
            "seed": command.seed,
            "round": command.round,
            "edge": command.edge,
            "trains": command.trains,
            "view": delta.digest(view),
            "emulator": self._emulator_name,
            "threads": torch.get_num_threads(),
            "device": self.memory.device,
            "samples": self._states.digest,
            "cache": self._states.dtype,
            "software": version("fedsoda"),
        }
        checkpoint = RoundCheckpoint(Path(command.checkpoint), identity) if self._keeps_checkpoints else None
        damaged = self._states.num_damaged
        with _out_of_memory_is_told(self.memory):  # outside of a step too: the optimiser's first one takes its moments
            trained = fine_tune(
                self._sub_llm,
                self._border,
                view,
                settings,
                seed=command.seed,
                round_number=command.round,
                edge=command.edge,
                trains=command.trains,
                micro_batch=self._micro_batch,
                checkpoint=checkpoint,
                progress=lambda step, steps, loss, rate: report(
                    cmd.TrainingStep(
                        step=step,
                        steps=steps,
                        loss=loss if math.isfinite(loss) else None,
                        tokens_per_second=rate,
                    )
                ),
            )
        self._micro_batch = trained.micro_batch
        finite = math.isfinite(trained.loss)
        # A broken round still answers, with nothing in it: the hub refuses it and the round continues.
        wanted = {name: value if finite else torch.zeros_like(value) for name, value in trained.delta.items()}
        residual = None
        if finite and command.residual is not None:
            residual = delta.feedback_of(Path(command.residual).read_bytes(), spec.adapter)
        layout = of_factor(spec.adapter, command.trains)
        coded, left = delta.encode_with_feedback(wanted, residual, view, layout, command.codec)
        write_durably(Path(command.update), coded)
        waiting = residual or {name: torch.zeros_like(value) for name, value in view.items()}  # of the other factor
        write_durably(Path(command.new_residual), delta.to_bytes({**waiting, **left}))
        if checkpoint is not None:
            checkpoint.forget()
        return cmd.Trained(
            num_damaged=self._states.num_damaged - damaged,
            num_examples=trained.num_examples,
            num_steps=trained.num_steps,
            num_tokens=trained.num_tokens,
            micro_batch=trained.micro_batch,
            seconds=trained.seconds,
            loss=trained.loss if finite else None,
        )

    def advance(self, command: cmd.Advance) -> cmd.Advanced:
        """Write v + decode(c) for the adapter's or the emulator's view; the digest tells whether it is the hub's."""
        spec = self.bundle.manifest.lora
        layout = spec.adapter if command.which == "adapter" else spec.emulator
        held = command.view
        if held is not None:
            view = delta.from_bytes(Path(held).read_bytes(), layout)
        else:
            view = self.bundle.adapter_lora() if command.which == "adapter" else self.bundle.emulator_lora()
        coded = Path(command.delta).read_bytes()
        moved = delta.advance(view, coded, of_factor(layout, command.moved), command.codec)
        write_durably(Path(command.out), delta.to_bytes(moved))
        return cmd.Advanced(Digest(delta.digest(moved)))

    def _view(self, path: str | None) -> dict[str, torch.Tensor]:
        if path is None:
            return self.bundle.adapter_lora()
        return delta.from_bytes(Path(path).read_bytes(), self.bundle.manifest.lora.adapter)

    def _built(self, view: dict[str, torch.Tensor], batch_size: int) -> SubLLM:
        """Return what trains, as the memory plan has it, after a probe: the heaviest micro-batch fits, or a smaller one."""
        assert self._border is not None
        memory, samples = self.memory, self._samples.samples
        key = msgspec.json.encode([self.bundle.manifest, memory.device, memory.packed, memory.recompute])
        sub_llm = self._models.get(key)
        if sub_llm is None:
            with _out_of_memory_is_told(memory):
                sub_llm = build(
                    self.bundle,
                    self.bundle.plan.resident,
                    compute_dtype=self._compute_dtype,
                    device=memory.device,
                    dense=not memory.packed,
                    dense_head=not memory.packed,
                    recompute=memory.recompute,
                )
            lora.attach(sub_llm, self.bundle.manifest.lora, {**self._frozen_lora, **view})
            self._models[key] = sub_llm
        longest = sorted(range(len(samples)), key=lambda at: -len(samples[at].ids))[
            : min(batch_size, self._micro_batch)
        ]
        self._border.expect(longest)
        self._micro_batch = probe(sub_llm, self._border, view, longest, self._micro_batch)
        on_cpu, taken = memory.device == "cpu", peak_rss_bytes()
        if on_cpu and taken > self._room:
            raise DeviceTooSmall(
                f"the first step took {human_bytes(taken)} of memory, {human_bytes(self._room)} may be taken; "
                "allow more, or close other programs"
            )
        return sub_llm


def examine() -> cmd.Examined:
    """Look at what torch sees here, and whether a gradient comes through NF4 as through the dense matrix."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "ROCm" if torch.version.hip else "CUDA"
    problem = ""
    try:
        tensor = quantize(torch.randn(256, 128, generator=torch.Generator().manual_seed(0)))
        x = torch.randn(4, 128, device=device, requires_grad=True)
        NF4Linear(tensor, None, device)(x).square().sum().backward()
        dense = dequantize(tensor).to(device)
        wanted = 2 * (x.detach() @ dense.T) @ dense
        if x.grad is None or not torch.allclose(x.grad, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max())):
            problem = "the gradient through NF4 is not that of the dense matrix"
    except Exception as error:  # a driver, a kernel or a library: whatever it raises is the answer
        problem = f"NF4 does not run on {device}: {error}"
    return cmd.Examined(
        torch=str(torch.__version__),  # a class of its own, which no message may have
        threads=torch.get_num_threads(),
        device=device,
        accelerator=f"{torch.cuda.get_device_name()} ({kind})" if device == "cuda" else "",
        nf4_problem=problem,
    )


@contextmanager
def _out_of_memory_is_told(memory: MemoryPlan) -> Iterator[None]:
    """Raise a lack of memory as DeviceTooSmall: where no smaller micro-batch helps, the agent may know a leaner way."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceTooSmall(
            f"memory ran out on {memory.device}, where {human_bytes(memory.peak)} were planned; close other programs, or "
            "ask the hub's owner for a smaller sub-LLM"
        ) from error


def main() -> None:
    lower_priority()
    threads = os.environ.get("FEDSODA_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    serve(cmd.Command, Worker().answer)


if __name__ == "__main__":
    main()
