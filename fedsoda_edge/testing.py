"""Play a hub's messages from memory (ScriptedHub), so that users can test their scripts without a hub.

The model is a random llama of 4 layers that a child process makes (no torch here); the edge, its worker and
the messages are the real ones. Averaging updates is left to real hubs: every round starts from the same view.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from fedsoda_edge.errors import ProtocolViolation
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import BundleManifest
from fedsoda_edge.protocol.session import HubSession, Upload
from fedsoda_edge.protocol.signatures import SigningKey
from fedsoda_edge.protocol.statements import BundleStatement, ReceiptStatement, sign

LOCAL = ms.LocalSettings(
    epochs=1,
    max_steps=3,
    batch_size=4,
    learning_rate=1e-3,
    weight_decay=0.01,
    max_grad_norm=1.0,
    proximal_mu=0.01,
    max_length=64,
)

EDGE = ms.EdgeId("scripted-edge")
KEY = SigningKey(b"the key of every scripted hub...")  # so that a device knows the next one; it keeps no secret
SIGNED_SECONDS = 86400


class ScriptedHub:
    """A Transport for `Edge(ScriptedHub(rounds=2))`.

    Args:
        rounds: rounds that are offered before the Farewell.
        prompt, completion: the run's template.
        bundle: directory of the model's bundle, which is made there where it is missing; None: a temporary one.
        local: how a round is trained.

    updates: what was accepted, in order.
    """

    url = "a script"

    def __init__(
        self,
        rounds: int = 2,
        *,
        prompt: str = "{prompt}",
        completion: str = "{completion}",
        bundle: Path | None = None,
        local: ms.LocalSettings = LOCAL,
    ) -> None:
        self.rounds = rounds
        self.updates: list[ms.UpdateStart] = []
        self.up = self.down = 0
        self._template = ms.Template(prompt=prompt, completion=completion)
        self._directory = tempfile.TemporaryDirectory(prefix="fedsoda-scripted-")
        self._bundle = bundle or Path(self._directory.name) / "bundle"
        self._local = local
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._session = HubSession(1 << 24)

    async def connect(self) -> None:
        """Make the model, the first time, and begin a connection."""
        if not self._bundle.exists():
            command = [sys.executable, "-m", "fedsoda_edge.testing", str(self._bundle)]
            await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
        self._out = asyncio.Queue()
        self._session = HubSession(1 << 24)

    async def send(self, frame: bytes) -> None:
        """Take a message of the edge and queue the script's answer.

        Raises:
            ProtocolViolation: the edge asks for a blob, or breaks the rules of a session.
        """
        said = self._session.receive(frame)
        match said:
            case ms.Hello():
                self._say(self._welcome())
            case ms.Ready():
                self._offer()
            case Upload():
                self.updates.append(said.start)
                self._say(ms.Receipt(round=said.start.round, digest=said.start.digest))
                self._offer()
            case ms.BlobRequest():
                raise ProtocolViolation("the script's views are the bundle's own; there is no blob to ask for")
            case ms.Leave():
                self._out.put_nowait(None)
            case _:
                pass

    def _say(self, message: ms.HubMessage) -> None:
        match message:
            case ms.Welcome():
                message = msgspec.structs.replace(
                    message,
                    signed=_bundles(self._run_id, (message.manifest, *(one.manifest for one in message.smaller))),
                )
            case ms.RoundOffer(manifest=ms.BlobRef() as manifest):
                signed = _bundles(self._run_id, (manifest,), version=1 + message.round)
                message = msgspec.structs.replace(message, signed=signed)
            case ms.Receipt() if self.updates and self.updates[-1].digest == message.digest:
                message = msgspec.structs.replace(message, signed=_receipt(self._run_id, self.updates[-1]))
            case _:
                pass
        self._out.put_nowait(self._session.send(message))

    @property
    def _run_id(self) -> str:
        """The run's id: another model is another run, since what a hub signed once for a run must not change."""
        return f"scripted-{sha256_file(self._bundle / 'manifest.json')[:12]}"

    def _welcome(self) -> ms.Welcome:
        manifest = self._bundle / "manifest.json"
        return ms.Welcome(
            protocol=ms.PROTOCOL_VERSION,
            run_id=self._run_id,
            run_name="scripted",
            edge=EDGE,
            manifest=ms.BlobRef(digest=ms.Digest(sha256_file(manifest)), bytes=manifest.stat().st_size),
            rounds=self.rounds,
            rounds_done=0,
            template=self._template,
            max_length=self._local.max_length,
            codec="int8",
            seed=0,
            stall_seconds=60.0,
            emulator=self._view("emulator"),
            batch_size=self._local.batch_size,
        )

    def _view(self, name: str) -> ms.ViewRef:
        digest = ms.Digest(sha256_file(self._bundle / f"{name}_lora.safetensors"))
        return ms.ViewRef(digest=digest, delta=None, snapshot=None)

    def _offer(self) -> None:
        number = len(self.updates) + 1
        if number > self.rounds:
            self._say(ms.Farewell(rounds=self.rounds, reason="the script is over"))
            return
        self._say(
            ms.RoundOffer(
                round=number,
                rounds=self.rounds,
                view=self._view("adapter"),
                alignment=0,
                emulator=self._view("emulator"),
                local=self._local,
                due_seconds=3600.0,
            )
        )

    async def frames(self) -> AsyncIterator[bytes]:
        """Yield the script's messages until the connection ends."""
        while (frame := await self._out.get()) is not None:
            yield frame

    async def close(self) -> None:
        """End the connection."""
        self._out.put_nowait(None)

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        """Yield a file of the made bundle from `offset` on."""
        manifest = self._bundle / "manifest.json"
        files = msgspec.json.decode(manifest.read_bytes(), type=BundleManifest).files
        names = {file.sha256: file.name for file in files} | {sha256_file(manifest): "manifest.json"}
        yield (self._bundle / names[digest]).read_bytes()[offset:]


def _bundles(run_id: str, manifests: tuple[ms.BlobRef, ...], version: int = 1) -> ms.Signed:
    now = int(time.time())
    statement = BundleStatement(
        run_id=run_id, version=version, signed_at=now, expires=now + SIGNED_SECONDS, manifests=manifests
    )
    return sign(KEY, statement)


def _receipt(run_id: str, update: ms.UpdateStart) -> ms.Signed:
    statement = ReceiptStatement(
        run_id=run_id,
        round=update.round,
        edge=EDGE,
        digest=update.digest,
        num_examples=update.num_examples,
        accepted_at=int(time.time()),
    )
    return sign(KEY, statement)


def make_bundle(directory: Path, vocab_size: int = 259) -> None:
    """Write a 4-layer random llama with a byte-level tokenizer as a bundle. This needs torch, so it runs as a process."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedsoda_edge.model import lora
    from fedsoda_edge.model.bundle_writer import BundleSettings, write_bundle
    from fedsoda_edge.model.source import Checkpoint
    from fedsoda_edge.protocol.manifest import Group, LayerPlan, LoRASpec

    with tempfile.TemporaryDirectory() as made:
        model_dir = Path(made) / "scripted-llama"
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model_dir)
        vocabulary = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(model_dir / "tokenizer.json"))
        (model_dir / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        source = Checkpoint.open(str(model_dir))
        plan = LayerPlan(
            num_layers=4,
            adapter=(3,),
            kept=(0, 2, 3),
            groups=(Group(start=0, removed=(1,), distance=0.1),),
            mapping=((0, 0),),
            distances=(),
        )
        targets = ("q_proj", "v_proj")
        spec = LoRASpec(
            rank=4,
            alpha=8.0,
            targets=targets,
            adapter=lora.specs(source.family, source.fields, plan.adapter, targets, 4),
            emulator=lora.specs(source.family, source.fields, plan.retained, targets, 4),
        )
        write_bundle(
            directory,
            source,
            plan,
            BundleSettings(spec, adapter_base="nf4", quantize_embedding=False),
            name=source.name,
            revision=source.revision,
            adapter_lora=lora.initial(spec.adapter, 0),
            emulator_lora=lora.initial(spec.emulator, 0),
            tokenizer_files=source.tokenizer_files,
        )


if __name__ == "__main__":
    make_bundle(Path(sys.argv[1]))
