"""Read hostile files in a process of its own, under a limit of memory, and report what each led to, a line of JSON each.

    python trust_artifacts_child.py ROOM LIST WATCHED

What the process loads, starts, opens for writing or connects to while it reads is heard by an audit hook. The limit is
RLIMIT_AS: what the process has when it begins, and MEMORY bytes more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

MEMORY = 1 << 30
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "ctypes.dlopen",
)
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.truncate",
    "shutil.rmtree",
    "shutil.move",
)


class Ear:
    """What a hook of `sys.addaudithook` hears while `listens` is set. may_write: below which nothing is out of order."""

    def __init__(self, may_write: Path) -> None:
        self.listens = False
        self.heard: list[str] = []
        self._may_write = f"{may_write}{os.sep}"
        roots = {sys.prefix, sys.base_prefix, *sys.path, str(Path(__file__).resolve().parent.parent)}
        self._ours = (*(root for root in roots if root), "<frozen")
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.listens:
            return
        self.listens = False
        try:
            if wrong := self._wrong(event, args):
                self.heard.append(wrong[:200])
        finally:
            self.listens = True

    def _wrong(self, event: str, args: tuple[Any, ...]) -> str:
        if event in STARTS or event in NETWORK or event == "pickle.find_class":
            is_library = event == "ctypes.dlopen" and (args[0] is None or self._is_ours(str(args[0])))
            return "" if is_library else f"{event} {args!r:.120}"
        if event == "open":
            path, _mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, str | bytes) and not self._is_inside(os.fsdecode(path)):
                return f"writes {path!r:.120}"
        if event in CHANGES and not self._is_inside(_place(args)):
            return f"{event} {args!r:.120}"
        if event == "exec" and not self._is_ours(args[0].co_filename) and not self._is_called_by_library():
            return f"runs code of {args[0].co_filename!r:.80}"
        if event == "import" and isinstance(args[1], str) and not self._is_ours(args[1]):
            return f"imports {args[0]} from {args[1]!r:.80}"
        if event in ("marshal.loads", "marshal.load") and not self._is_called_by_library():
            return event
        return ""

    def _is_inside(self, path: str) -> bool:
        return os.path.abspath(path).startswith((self._may_write, "/dev/"))

    def _is_ours(self, path: str) -> bool:
        return path.startswith(self._ours)

    def _is_called_by_library(self) -> bool:
        """Tell whether a library compiles what it wrote itself: dataclasses, importlib, and Jinja within its sandbox."""
        name = sys._getframe(3).f_code.co_filename  # behind the three of the ear
        return name.startswith("<frozen") or name.endswith(
            (
                "dataclasses.py",
                f"collections{os.sep}__init__.py",
                "enum.py",
                f"jinja2{os.sep}environment.py",
                f"jinja2{os.sep}debug.py",
                "typing.py",
                "functools.py",
            )
        )


def _place(args: tuple[Any, ...]) -> str:
    """Find the path of a change, which may be one below a directory that is open."""
    if not isinstance(args[0], str | bytes | os.PathLike):
        return ""
    path = os.fsdecode(args[0])
    if os.path.isabs(path) or not (isinstance(args[-1], int) and args[-1] >= 0):
        return path
    with contextlib.suppress(OSError):
        return os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), path)
    return path


# --- the readers -----------------------------------------------------------------------------------------------------


class Shop:
    """The readers of all kinds; what they need is made once, before the ear listens."""

    def __init__(self, watched: Path, room: str) -> None:
        self.store = watched / "store"
        self.work = self.store / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        if room != "agent":
            from fedsoda_edge.model.bundle import Bundle

            self.bundle_dir = watched / "bundle"
            self.bundle = Bundle.open(self.bundle_dir)

    def reader(self, kind: str) -> Callable[[bytes, dict[str, Any]], object]:
        return cast("Callable[[bytes, dict[str, Any]], object]", getattr(self, f"read_{kind}"))

    # agent

    def read_manifest(self, data: bytes, _: dict[str, Any]) -> object:
        from fedsoda_edge.join.download import in_order
        from fedsoda_edge.protocol.manifest import parse_manifest
        from fedsoda_edge.protocol.needs import shape_of

        manifest = parse_manifest(data)
        return in_order(manifest), shape_of(manifest)

    def read_file_name(self, _: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_edge.ports.store import FileStore

        return asyncio.run(_fetched(FileStore(self.store / "files"), with_["name"], 4, b"data"))

    def read_download(self, data: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_edge.ports.store import FileStore

        return asyncio.run(
            _fetched(
                FileStore(self.store / "files"),
                hashlib.sha256(data).hexdigest(),
                with_["size"],
                with_["sent"].encode(),
                with_["times"],
            )
        )

    def read_manifest_size(self, _: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_edge.protocol.manifest import check_manifest_size

        check_manifest_size(with_["size"])
        return None

    def read_view_size(self, _: bytes, with_: dict[str, Any]) -> object:
        """A view that the hub announces larger than its manifest allows."""
        from fedsoda_edge.join.run_state import RunState
        from fedsoda_edge.protocol.manifest import parse_manifest
        from fedsoda_edge.protocol.messages import BlobRef, Digest, ViewRef

        state = RunState(self.work / "run", "nf4")
        state.bound_views(parse_manifest(with_["manifest"].encode()))
        huge = BlobRef(digest=Digest("0" * 64), bytes=with_["size"])

        async def fetch(blob: BlobRef) -> bytes:
            return bytes(min(blob.bytes, 2 << 30))

        async def advance(_: Any) -> Any:
            raise AssertionError("nothing to advance")

        return asyncio.run(
            state.bring_up("adapter", ViewRef(digest=Digest("1" * 64), delta=huge, snapshot=huge), 5, fetch, advance)
        )

    def read_run_id(self, _: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_edge.join.home import Home

        return Home(self.store / "home").run(with_["name"])

    def read_token_name(self, _: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_hub.run.ledger import Ledger

        return Ledger(None).tokens.create(with_["name"])

    def read_rows(self, data: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_edge.data.local_data import LocalData
        from fedsoda_edge.protocol.template import TextTemplate

        path = self.work / "rows"
        _bomb(path, data, with_)
        return LocalData(path).check(TextTemplate("{a}"), TextTemplate("{b}"))

    def read_dataset(self, data: bytes, _: dict[str, Any]) -> object:
        from fedsoda_edge.data.local_data import LocalData
        from fedsoda_edge.protocol.template import TextTemplate

        path = self.work / "dataset"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "state.json").write_bytes(data)
        return LocalData(path).check(TextTemplate("{a}"), TextTemplate("{b}"))

    def read_coded(self, data: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_edge.protocol.coded import check
        from fedsoda_edge.protocol.manifest import TensorSpec

        check(data, (TensorSpec("layers.1.q.lora_A", (4, 16)),), with_["codec"])
        return None

    # worker

    def read_tokenizer(self, data: bytes, _: dict[str, Any]) -> object:
        from fedsoda_edge.data.samples import SampleTokenizer

        made = SampleTokenizer.read({"tokenizer.json": data}, [1], 300)
        ids = [made.encode(text) for text in ("a", "", "a" * 40 + "b", "\0", "e\u0301 \U0001f4a3 a b")]
        return made.decode(ids[2]), made.sample("a", "b")

    def read_template(self, data: bytes, _: dict[str, Any]) -> object:
        from fedsoda_edge.data.chat import ChatTemplate

        files = {"tokenizer_config.json": b"{}", "chat_template.jinja": data}
        templates = ChatTemplate.read(files)
        assert templates is not None
        rendered = templates.rendered(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], add_generation_prompt=False
        )
        assert len(rendered.text) <= 64 << 10, "more than a template may write"
        return None

    def read_bundle_manifest(self, data: bytes, _: dict[str, Any]) -> object:
        from fedsoda_edge.model.bundle import read_manifest

        return read_manifest(data)

    def read_shard(self, data: bytes, with_: dict[str, Any]) -> object:
        from msgspec.structs import replace

        from fedsoda_edge.model.bundle import Bundle
        from fedsoda_edge.protocol.manifest import File

        name = f"{with_['role']}.safetensors"
        path = self.work / "shard"
        path.write_bytes(data)
        manifest = self.bundle.manifest
        files = tuple(
            File(name, hashlib.sha256(data).hexdigest(), len(data)) if one.name == name else one
            for one in manifest.files
        )
        bundle = Bundle(
            replace(manifest, files=files), lambda file: path if file.name == name else self.bundle_dir / file.name
        )
        if with_["role"].startswith("layers."):
            return bundle.layer(int(with_["role"][7:]))
        return {"embedding": bundle.embedding, "adapter_lora": bundle.adapter_lora, "norm": bundle.norm}[
            with_["role"]
        ]()

    def read_snapshot(self, data: bytes, _: dict[str, Any]) -> object:
        from fedsoda_edge.model import delta

        return delta.from_bytes(data, self.bundle.manifest.lora.adapter)

    def read_delta(self, data: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_edge.model import delta

        return delta.decode(data, self.bundle.manifest.lora.adapter, with_["codec"])

    # hub

    def _model(self, **files: bytes) -> Path:
        path = self.work / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.bundle_dir.parent / "model", path)
        for name, data in files.items():
            (path / name.replace("__", ".")).write_bytes(data)
        return path

    def read_checkpoint(self, data: bytes, with_: dict[str, Any]) -> object:
        from fedsoda_edge.model.source import Checkpoint

        path = self._model()
        if with_["file"] != "model.safetensors":
            for name in with_.get("without", ()):
                (path / name).unlink()
        (path / with_["file"]).write_bytes(data)
        found = Checkpoint.open(str(path))
        return found.layer(0), found.embedding(), found.norm()

    def read_gguf(self, data: bytes, _: dict[str, Any]) -> object:
        from fedsoda_hub.preparation.gguf import import_gguf

        path = self.work / "model.gguf"
        path.write_bytes(data)
        shutil.rmtree(self.work / "imported", ignore_errors=True)
        return import_gguf(path, self.work / "imported")


class _Sender:
    """A `Transport` that sends the same bytes again and again."""

    url = "hostile"
    up = down = 0

    def __init__(self, sent: bytes, times: int) -> None:
        self._sent, self._times = sent, times

    async def fetch(self, digest: str, offset: int) -> AsyncIterator[bytes]:
        for _ in range(self._times):
            yield self._sent


async def _fetched(store: Any, digest: str, size: int, sent: bytes, times: int = 1) -> Path:
    from fedsoda_edge.join.download import fetch_file

    return await fetch_file(store, _Sender(sent, times), digest, size)  # type: ignore[arg-type]


def _bomb(path: Path, data: bytes, with_: dict[str, Any]) -> None:
    path.write_bytes(data * with_.get("times", 1))


def make_base(watched: Path) -> None:
    """Make a bundle and a checkpoint that are in order, from which the hostile ones are made."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedsoda_edge.testing import make_bundle

    make_bundle(watched / "bundle")
    sizes = {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(watched / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(watched / "bundle" / name, watched / "model" / name)


def main() -> None:
    room, listed, watched = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if room == "base":
        make_base(watched)
        return
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a file makes the process print is no report
    ear = Ear(watched / "store")
    shop = Shop(watched, room)
    with contextlib.suppress(Exception):
        import fedsoda_edge.data.chat
        import fedsoda_edge.data.samples  # noqa: F401
    if defect := os.environ.get("FEDSODA_TRUST_DEFECT"):
        import trust_artifacts_defects

        trust_artifacts_defects.plant(defect)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from fedsoda_edge.errors import FedSODAError

    for line in listed.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        print(json.dumps({"begins": case["number"]}), file=out, flush=True)
        data = Path(case["path"]).read_bytes() if case["path"] else b""
        ear.heard.clear()
        how, sentence = "taken", ""
        begin = time.process_time()  # of this process: other programs of the machine do not count
        ear.listens = True
        try:
            shop.reader(case["kind"])(data, case["with"])
        except FedSODAError as error:
            how, sentence = "refused", str(error)
        except BaseException as error:
            how, sentence = "raised", f"{type(error).__name__}: {error}"[:300]
        finally:
            ear.listens = False
        report = {
            "number": case["number"],
            "how": how,
            "sentence": sentence[:3000],
            "seconds": time.process_time() - begin,
            "heard": ear.heard[:5],
        }
        print(json.dumps(report), file=out, flush=True)


if __name__ == "__main__":
    main()
