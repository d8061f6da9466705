"""Measure what healing leaves of a pruned LLM's error at the border, and what an adapter trained above it is worth.

SmolLM2 on SST-2. First the error of border states on prompts of the task, for the groups that are given (none: all layers
are kept): pruned alone, the same in NF4, healed, and healed in NF4. With `--seeds` then federations on border states that are swept once for all of them: 4 edges of
1,000 rows, 6 rounds x 40 steps, deltas averaged as they are, the plug-in judged by the first id of each answer. They are the
product's own training without its network, so that five seeds take half an hour; `bench_compare` runs the whole of it.
`--curve` heals with each of these numbers of prompts instead, and prints what each leaves at the border. `--filled` adds
that many ids of prompts that are filled with pieces of public text. `--planted-defect` leaves the layers as they are: then
healing has no effect, and the script fails (exit 1).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_variants import ROOT
from torch import Tensor

from fedsoda_edge.data.samples import Sample, SampleTokenizer
from fedsoda_edge.model import lora
from fedsoda_edge.model.source import Checkpoint, LayerSource
from fedsoda_edge.model.streaming import stream
from fedsoda_edge.model.sub_llm import SubLLM, build
from fedsoda_edge.protocol.manifest import LoRASpec
from fedsoda_edge.protocol.messages import LocalSettings
from fedsoda_edge.protocol.template import TextTemplate
from fedsoda_edge.worker.batches import SweptSamples
from fedsoda_edge.worker.training import fine_tune
from fedsoda_hub.algorithms.alignment.healing import StoredLayer, heal, rounded
from fedsoda_hub.preparation.filled import filled_rows
from fedsoda_hub.preparation.public_text import read_blocks

ADAPTER, TARGETS, ANSWERS = 3, ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), (" negative", " positive")
PROMPT, MAX_LENGTH = "Review: {sentence}\nSentiment:", 96
EDGES, ROWS_OF_EDGE, ROUNDS, STEPS = 4, 1000, 6, 40
TRAINED, JUDGED, LOOKED_AT, BLOCKS, LENGTH = 8000, 1000, 200, 48, 128
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Rows:
    """The rows of SST-2, shuffled: the first `like_task` of train are prompts without labels, the next ones are trained on."""

    def __init__(self, shared: Path, tokenizer: SampleTokenizer, like_task: int) -> None:
        train, dev = (self._read(shared / "data" / "sst2" / f"{name}.jsonl") for name in ("train", "dev"))
        self.like_task = [tokenizer.encode(self._prompt(row)) for row in train[:like_task]]
        self.trained = [self._sample(tokenizer, row) for row in train[3000 : 3000 + TRAINED]]
        self.prompts = [tokenizer.encode(self._prompt(row)) for row in dev[:JUDGED]]
        self.is_positive = torch.tensor([row["label"] == "positive" for row in dev[:JUDGED]])

    @staticmethod
    def _read(path: Path) -> list[dict[str, str]]:
        lines = path.read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(lines)
        return [json.loads(line) for line in lines]

    @staticmethod
    def _prompt(row: Mapping[str, str]) -> str:
        return PROMPT.format(**row)

    def _sample(self, tokenizer: SampleTokenizer, row: Mapping[str, str]) -> Sample:
        sample = tokenizer.sample(self._prompt(row), row["label"], MAX_LENGTH)
        assert sample is not None
        return sample


def after(starts: Sequence[int], size: int, below: int) -> dict[int, int]:
    """Map each kept layer below the adapter to the layer of the full LLM whose output it has to give."""
    removed = {start + step for start in starts for step in range(1, size + 1)}
    kept = [layer for layer in range(below) if layer not in removed]
    return {layer: layer + size if layer in starts else layer for layer in kept}


def error(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """Mean |made - wanted|^2 / |wanted|^2 over all positions but the first, and at the last one of each prompt."""
    sums: dict[str, list[Tensor]] = {"prompt": [], "prompt_end": []}
    for a, b in zip(made, wanted, strict=True):
        relative = (a - b).square().sum(dim=1) / b.square().sum(dim=1)
        sums["prompt"].append(relative[1:])
        sums["prompt_end"].append(relative[-1:])
    return {name: round(float(torch.cat(values).mean()), 4) for name, values in sums.items()}


class Bench:
    """The full LLM, its rows, and border states on disk, which a second call finds again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out = Path(options.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.source = Checkpoint.open(str(ROOT / "bench-models" / "smollm2"))
        self.below = self.source.num_layers - ADAPTER
        tokenizer = SampleTokenizer(self.source.path / "tokenizer.json", self.source.fields["eos_token_id"])
        shared = Path(options.shared)
        self.rows = Rows(shared, tokenizer, options.like_task)
        bos = self.source.fields.get("bos_token_id")
        text = shared / "data" / "wikitext2" / "test.txt"
        self.blocks, _ = read_blocks(text, self.source.path / "tokenizer.json", bos, BLOCKS, LENGTH)
        self.filled = filled_rows(
            self.blocks, TextTemplate(PROMPT), tokenizer, MAX_LENGTH, num_ids=options.filled, seed=0
        )
        self.answers = [tokenizer.encode(answer)[0] for answer in ANSWERS]
        self.how: dict[str, Any] = {"compute_dtype": DTYPES[options.dtype], "store_dtype": torch.float32}

    def healed(
        self, places: Mapping[int, int], *, in_nf4: bool, like_task: int | None = None
    ) -> dict[int, StoredLayer]:
        """Heal the kept layers on prompts without labels, filled rows and public text.

        Args:
            like_task: how many prompts; None: all.
        """
        prompts = self.rows.like_task[:like_task]
        texts = [*(torch.tensor(ids) for ids in prompts), *self.filled, *self.blocks]
        how = {"in_nf4": in_nf4, "lacking": {}, "healed": {}, "compute_dtype": self.how["compute_dtype"]}
        return dict(heal(self.source, places, texts, **how))

    def border(
        self, name: str, source: LayerSource, layers: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Sweep these ids to the border, once; kept in bf16, as an edge keeps them."""
        file = self.out / f"{name}.pt"
        if not file.exists():
            states = stream(source, layers, [torch.tensor(one) for one in ids], **self.how)
            torch.save([state.bfloat16() for state in states], file)
        return [state.float() for state in torch.load(file)]

    def errors(self, places: Mapping[int, int], sources: Mapping[str, Checkpoint]) -> dict[str, dict[str, float]]:
        """Compare the border states of each sub-LLM with the full LLM's on prompts of the task."""
        ids = [torch.tensor(one) for one in self.rows.prompts[:LOOKED_AT]]
        wanted = stream(self.source, range(self.below), ids, **self.how)
        return {name: error(stream(source, list(places), ids, **self.how), wanted) for name, source in sources.items()}

    def curve(self, places: Mapping[int, int], counts: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Heal in NF4 with each of these numbers of prompts; yield the border's errors."""
        for count in counts:
            layers = self.healed(places, in_nf4=True, like_task=count)
            found = self.errors(places, {"healed_nf4": self.source.with_layers(layers)})
            yield {"like_task": count, **found["healed_nf4"]}

    def federations(self, seeds: Sequence[int], arms: Mapping[str, tuple[Checkpoint, Sequence[int]]]) -> Iterator[Any]:
        """Train and judge each arm with each seed, unless that is done; the full LLM untouched first."""
        layers = range(self.below, self.source.num_layers)
        layout = lora.specs(self.source.family, self.source.fields, layers, TARGETS, 8)
        spec = LoRASpec(rank=8, alpha=16.0, targets=TARGETS, adapter=layout, emulator=())
        whole = range(self.below)
        judged = self.border("judged", self.source, whole, self.rows.prompts)
        full = build(self.source, layers)
        lora.attach(full, spec, lora.initial(layout, 0))
        yield {"arm": "untouched", **self.judge(full, judged)}
        for seed in seeds:
            for name, (source, kept) in arms.items():
                done = self.out / f"{name}.{seed}.json"
                if not done.exists():
                    states = self.border(f"trained.{name}", source, kept, [one.ids for one in self.rows.trained])
                    view = self._federate(build(self.source, layers), spec, states, seed)
                    lora.load(full, view)
                    done.write_text(
                        json.dumps({"arm": name, "seed": seed, **self.judge(full, judged)}), encoding="utf-8"
                    )
                yield json.loads(done.read_text(encoding="utf-8"))

    def _federate(self, tail: SubLLM, spec: LoRASpec, states: list[Tensor], seed: int) -> dict[str, Tensor]:
        """Train the adapter on the rows of all edges; return the last view."""
        view = lora.initial(spec.adapter, seed)
        lora.attach(tail, spec, view)
        order = list(range(TRAINED))
        random.Random(seed).shuffle(order)
        parts = [order[edge::EDGES][:ROWS_OF_EDGE] for edge in range(EDGES)]
        held = [SweptSamples([self.rows.trained[at] for at in part], [states[at] for at in part]) for part in parts]
        local = LocalSettings(
            epochs=100, max_steps=STEPS, batch_size=8, learning_rate=1e-3, weight_decay=0.01, max_length=MAX_LENGTH
        )
        for number in range(1, ROUNDS + 1):
            deltas = [
                fine_tune(tail, part, view, local, seed=seed, round_number=number, edge=str(edge)).delta
                for edge, part in enumerate(held)
            ]
            view = {name: view[name] + torch.stack([delta[name] for delta in deltas]).mean(dim=0) for name in view}
        return view

    def judge(self, model: SubLLM, states: Sequence[Tensor]) -> dict[str, float]:
        """Judge by the first id of each answer: accuracy, AUC, loss (nats), share of "positive"."""
        scores = []
        with torch.no_grad():
            for state in states:
                logits = model.hidden(states=state[None])[0, -1] @ model.head.T
                scores.append(logits.log_softmax(dim=0)[self.answers])
        table, is_positive = torch.stack(scores), self.rows.is_positive
        margin = table[:, 1] - table[:, 0]
        positive, negative = margin[is_positive, None], margin[~is_positive]
        return {
            "accuracy": float(((margin > 0) == is_positive).float().mean()),
            "auc": float((positive > negative).float().mean() + 0.5 * (positive == negative).float().mean()),
            "loss": float(-table[torch.arange(len(table)), is_positive.long()].mean()),
            "share_positive": float((margin > 0).float().mean()),
        }


def main() -> None:
    """Print errors and federations as JSON, and exit with 1 where healing has no effect."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="*", default=[0, 4, 11, 15], help="the layer that each group keeps")
    parser.add_argument("--size", type=int, default=3, help="layers that each group removes")
    parser.add_argument("--like-task", type=int, default=1500, help="prompts to heal on")
    parser.add_argument("--filled", type=int, default=0, help="ids of filled prompts to heal on, at most")
    parser.add_argument("--curve", type=int, nargs="+", default=[], help="heal with each of these numbers of prompts")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="federations with each of these seeds")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--shared", default=str(ROOT.parent / "shared"), help="directory with data/sst2, data/wikitext2"
    )
    parser.add_argument("--out", default=str(ROOT / "bench-out" / "healing"))
    parser.add_argument("--planted-defect", action="store_true", help="layers stay as they are: the script must fail")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.like_task = max([options.like_task, *options.curve])
    bench = Bench(options)
    places = after(options.groups, options.size, bench.below)
    if options.curve:
        curve = list(bench.curve(places, options.curve))
        print(json.dumps({"groups": options.groups, "filled": sum(map(len, bench.filled)), "curve": curve}))
        return
    in_nf4, as_they_are = {number: rounded(bench.source, number) for number in places}, dict[int, StoredLayer]()
    nf4 = in_nf4 if options.planted_defect else bench.healed(places, in_nf4=True)
    dense = as_they_are if options.planted_defect else bench.healed(places, in_nf4=False)
    sources = {
        "pruned": bench.source,
        "pruned_nf4": bench.source.with_layers(in_nf4),
        "healed": bench.source.with_layers(dense),
        "healed_nf4": bench.source.with_layers(nf4),
    }
    found = bench.errors(places, sources)
    report: dict[str, Any] = {"groups": options.groups, "like_task": options.like_task, "border_error": found}
    if options.seeds:
        arms = {"exact": (bench.source, range(bench.below)), "healed_nf4": (sources["healed_nf4"], list(places))}
        report["federations"] = list(bench.federations(options.seeds, arms))
    print(json.dumps(report))
    if not found["healed_nf4"]["prompt"] < 0.5 * found["pruned_nf4"]["prompt"]:
        raise SystemExit("healing leaves more than half of the error of pruning and NF4: it has no effect")


if __name__ == "__main__":
    main()
