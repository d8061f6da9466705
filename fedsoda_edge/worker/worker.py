"""Do the commands of `protocol/commands.py` in the edge's child process, which owns torch and the GPU. No sockets.

It reads private text and writes only LoRA tensors and encrypted border states; its parent never sees ids or hidden
states. How training works is left to `training.py`, which commands come to the agent.
"""

from __future__ import annotations

import math
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
from fedsoda_edge.data.tokenizer_files import read_json
from fedsoda_edge.errors import DeviceTooSmall, UsageProblem
from fedsoda_edge.model import delta, lora
from fedsoda_edge.model.bundle import DTYPES, Bundle, read_manifest
from fedsoda_edge.model.nf4 import NF4Linear, dequantize, quantize
from fedsoda_edge.model.own_tokenizer import own_eos, own_tokenizer
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.ports.child import ReportProgress, serve
from fedsoda_edge.ports.disk import sha256_file, write_durably
from fedsoda_edge.ports.machine import threads
from fedsoda_edge.ports.store import FileStore, when_here
from fedsoda_edge.ports.system import lower_priority, peak_rss_bytes, return_memory_at_once
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_edge.protocol.manifest import TOKENIZER_FILES
from fedsoda_edge.protocol.messages import Digest
from fedsoda_edge.protocol.needs import PROCESS_BYTES, MemoryPlan, dtype_on
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.units import human_bytes
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.border_cache import CachedStates, CacheSettings
from fedsoda_edge.worker.checkpoint import RoundCheckpoint
from fedsoda_edge.worker.training import fine_tune, is_out_of_memory, probe


class Worker:
    """The worker of one run on one device. Paths come from the agent; what is computed between them stays here.

    Args:
        shared: models that the workers of one process train in turn, each from its own view; None: this worker is the
            only one. Workers of one process keep no checkpoints, since none of them dies alone.
        process_bytes: bytes that a process holds before it reads anything; None: what this one holds now.
        confinement: what its process gave up; None: it has no process of its own.
    """

    def __init__(
        self,
        shared: MutableMapping[bytes, SubLLM] | None = None,
        *,
        process_bytes: int | None = None,
        confinement: cmd.Confinement | None = None,
    ) -> None:
        if (
            process_bytes is None
        ):  # what imports take: measured, or the usual size where several workers share a process
            process_bytes = psutil.Process().memory_info().rss if shared is None else PROCESS_BYTES
        self._process_bytes = process_bytes
        self._confinement = confinement
        self._models: MutableMapping[bytes, SubLLM] = {} if shared is None else shared
        self._keeps_checkpoints = shared is None
        self._memory: MemoryPlan | None = None
        self._micro_batch = self._room = 0
        self._bundle: Bundle | None = None
        self._border: SweptSamples | None = None
        self._states: CachedStates | None = None
        self._emulator_name = ""
        self._frozen_lora: dict[str, torch.Tensor] = {}  # emulator LoRA of layers above the border
        self._sub_llm: SubLLM | None = None

    @property
    def bundle(self) -> Bundle:
        """The bundle that was opened last."""
        assert self._bundle is not None, "the agent opens the bundle first"
        return self._bundle

    def answer(self, command: cmd.Command, report: ReportProgress) -> msgspec.Struct:
        """Do one command of the agent; return its result.

        Raises:
            FedSODAError: the command cannot be done on this device, or with this data or bundle.
        """
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
                return examine(self._confinement)
            case cmd.LoadTokenizer():
                return load_tokenizer(command)

    def open(self, command: cmd.Open) -> cmd.Opened:
        """Read the data, as soon as the tokenizer is here; return how many samples there are.

        The rest of the bundle may still be on its way. Each file is verified when it is first used.

        Raises:
            DataProblem: the rows cannot be used. BlobCorrupt: a file of the bundle is not what its manifest says.
        """
        store = FileStore(Path(command.store))
        coming = store.coming(command.manifest)
        manifest = read_manifest(store.get(command.manifest))
        self._bundle = Bundle(manifest, lambda file: when_here(store.path(file.sha256), coming))
        names = {file.name for file in manifest.files}
        files = {name: self._bundle.path(name) for name in TOKENIZER_FILES if name in names}
        tokenizer = SampleTokenizer.read(files, manifest.config.get("eos_token_id"), int(manifest.config["vocab_size"]))
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
            confinement=self._confinement,
        )

    @property
    def memory(self) -> MemoryPlan:
        """The memory plan of the last sweep."""
        assert self._memory is not None, "the agent says how to train when it asks for the border"
        return self._memory

    @property
    def _compute_dtype(self) -> torch.dtype:
        """The dtype of sweeps and steps."""
        return DTYPES[self.memory.dtype]

    def check(self, command: cmd.Check) -> cmd.Checked:
        """Read every row of data whose format the agent does not read; return how many there are.

        Raises:
            DataProblem: a row cannot be used.
        """
        rows = command.rows
        data = LocalData(Path(rows.path), rows.columns)
        return cmd.Checked(data.check(TextTemplate(rows.prompt), TextTemplate(rows.completion)))

    def sweep(self, command: cmd.Sweep, report: ReportProgress) -> cmd.Swept:
        """Compute the border states of all samples with this alignment, except those that are on disk already.

        Raises:
            UsageProblem: the plan is for a GPU, and torch has none. DeviceTooSmall: memory runs out.
        """
        bundle, spec = self.bundle, self.bundle.manifest.lora
        path, cache = command.emulator, command.cache
        self._memory = memory = command.memory
        self._micro_batch, self._room = memory.micro_batch, command.room
        if memory.device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageProblem(
                f"device={memory.device!r} cannot be used: torch has no CUDA here; install a CUDA build of torch, or train "
                "with device='cpu'"
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
        """Train one local round; write the coded delta and the new error feedback to files.

        Raises:
            DeviceTooSmall: memory runs out with a single sample, or beside the steps.
        """
        spec = self.bundle.manifest.lora
        assert self._border is not None, "the agent asks for the border first"
        assert self._states is not None
        view, settings = self._view(command.view), command.settings
        if self._sub_llm is None:
            self._sub_llm = self._built(view, settings.batch_size)
        lora.load(self._sub_llm, self._frozen_lora)  # which each alignment changes
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
            "dtype": self.memory.dtype,
            "samples": self._states.digest,
            "cache": self._states.dtype,
            "software": version("fedsoda"),
        }
        checkpoint = RoundCheckpoint(Path(command.checkpoint), identity) if self._keeps_checkpoints else None
        damaged = self._states.num_damaged
        with _out_of_memory_is_told(self.memory):  # beside the steps too: AdamW allocates its moments in the first one
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
        # A round that diverged still answers, with zeros: the hub refuses the update, and the run continues.
        wanted = {name: value if finite else torch.zeros_like(value) for name, value in trained.delta.items()}
        residual = None
        if finite and command.residual is not None:
            residual = delta.feedback_of(Path(command.residual).read_bytes(), spec.adapter)
        layout = of_factor(spec.adapter, command.trains)
        coded, left = delta.encode_with_feedback(wanted, residual, view, layout, command.codec)
        write_durably(Path(command.update), coded)
        # The factor that does not train now keeps its error feedback.
        waiting = residual or {name: torch.zeros_like(value) for name, value in view.items()}
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
        """Write v + decode(c) for the adapter's or the emulator's view; return its digest, to compare with the hub's.

        Raises:
            ProtocolViolation: the delta or the view is not one of this run.
        """
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
        """Build what trains, by the memory plan, and find a micro-batch of the longest samples that fits.

        Raises:
            DeviceTooSmall: the first step takes more than the worker may.
        """
        assert self._border is not None
        memory, samples = self.memory, self._samples.samples
        key = msgspec.json.encode([self.bundle.manifest, memory.device, memory.dtype, memory.packed, memory.recompute])
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
                f"the first step took {human_bytes(taken)} of memory, and {human_bytes(self._room)} may be taken; "
                "allow more, or close other programs"
            )
        return sub_llm


def load_tokenizer(command: cmd.LoadTokenizer) -> cmd.LoadedTokenizer:
    """Load the tokenizer of a model's directory as Transformers does.

    Raises:
        UsageProblem: Transformers cannot load it, or its config.json is not JSON.
    """
    directory, to = Path(command.directory), Path(command.to)
    files = {name: str(directory / name) for name in TOKENIZER_FILES if (directory / name).exists()}
    for name, data in own_tokenizer(directory).items():
        (to / name).write_bytes(data)
        files[name] = str(to / name)
    config = read_json(directory / "config.json")
    eos, vocab = config.get("eos_token_id"), config.get("vocab_size")
    if not isinstance(eos, int | list):
        eos = own_eos(directory)
    return cmd.LoadedTokenizer(files=files, eos=eos, vocab_size=vocab if isinstance(vocab, int) else None)


def examine(confinement: cmd.Confinement | None = None) -> cmd.Examined:
    """Look at what torch sees here, and check that the gradient through NF4 is that through the dense matrix."""
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
            problem = "the gradient through NF4 is not that through the dense matrix"
    except Exception as error:  # a driver, a kernel or a library: whatever it raises is the answer
        problem = f"NF4 does not run on {device}: {error}"
    return cmd.Examined(
        torch=str(torch.__version__),  # torch's own class, which a struct does not accept
        threads=torch.get_num_threads(),
        device=device,
        dtype=dtype_on(device),
        accelerator=f"{torch.cuda.get_device_name()} ({kind})" if device == "cuda" else "",
        nf4_problem=problem,
        confinement=confinement,
    )


@contextmanager
def _out_of_memory_is_told(memory: MemoryPlan) -> Iterator[None]:
    """Raise a lack of memory as DeviceTooSmall: where a smaller micro-batch does not help, a leaner plan may."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceTooSmall(
            f"memory ran out on {memory.device}, where {human_bytes(memory.peak)} were planned; close other programs, or "
            "ask the hub's owner for a smaller sub-LLM"
        ) from error


def main(confinement: cmd.Confinement) -> None:
    """Answer the agent's commands until it closes stdin.

    Args:
        confinement: what this process has given up.
    """
    lower_priority()
    torch.set_num_threads(threads(torch.get_num_threads()))
    serve(cmd.Command, Worker(confinement=confinement).answer, private=(cmd.Check, cmd.Open))
