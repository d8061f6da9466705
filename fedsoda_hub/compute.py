"""The hub's child process that owns torch: prepare, aggregate, probe, realign, evaluate. No sockets, no decisions.

Arguments and results are JSON; tensors are blobs by digest in the run directory.
"""

from __future__ import annotations

import os
from collections import ChainMap
from functools import partial
from typing import Any

import msgspec
import torch
from safetensors.torch import load

from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.lora import LoRATensors
from fedsoda_edge.ports.child import Handler, Report, Values, serve
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_hub.algorithms.aggregation import flexlora, server_optimizer
from fedsoda_hub.algorithms.aggregation.products import cross_term, pairs_by_module
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighted_mean
from fedsoda_hub.evaluation.export import RunJudge, check_evaluation
from fedsoda_hub.federation.rounds import trained_factor
from fedsoda_hub.preparation.prepare import Preparation
from fedsoda_hub.run.ledger import Outcome
from fedsoda_hub.settings.run import RunSettings


class Compute:
    """One run's torch work. Every command can be done again: it only adds blobs."""

    def __init__(self) -> None:
        self._settings: RunSettings | None = None
        self._judge: RunJudge | None = None
        self._report: Report = lambda _: None

    @property
    def settings(self) -> RunSettings:
        assert self._settings is not None, "the daemon opens the run first"
        return self._settings

    @property
    def blobs(self) -> BlobStore:
        return BlobStore(self.settings.run_dir / "blobs")

    @property
    def commands(self) -> dict[str, Handler]:
        commands = (self.open, self.prepare, self.aggregate, self.probe, self.realign, self.reprune, self.evaluate)
        return {command.__name__: command for command in commands}

    def open(self, values: Values, _: Report) -> Values:
        self._settings = msgspec.convert(values["settings"], RunSettings)
        check_evaluation(self._settings)
        return {"threads": torch.get_num_threads()}

    def prepare(self, _: Values, report: Report) -> Values:
        return Preparation(self.settings, report).run()

    def aggregate(self, values: Values, _: Report) -> Values:
        """The next master of the decoded updates, as [aggregation] says; c = Q(w - v); v += decode(c) (delta.py).

        Every size class with LoRA of its own has its own v and c: of the tensors of w that it holds.
        """
        how, codec, max_weight = self.settings.aggregation, self.settings.wire.codec, self.settings.rounds.max_weight
        blobs, factor = self.blobs, trained_factor(how.rule, values["round"])
        master = load(blobs.get(values["master"]))
        views = {digest: load(blobs.get(digest)) for digest in (values["view"], *values["smaller"])}
        layouts = {digest: of_factor(delta.layout_of(view), factor) for digest, view in views.items()}
        updates = [
            CodedUpdate(edge, num_examples, partial(blobs.get, digest), views[base], layouts[base])
            for edge, num_examples, digest, base in values["updates"]
        ]
        products = partial(pairs_by_module, updates, codec, max_weight)
        moments = None
        if how.rule == "flexlora":
            # What edges hold of a module, where any hold it at the master's rank.
            held_whole = (
                {name: tensor for name, tensor in view.items() if tensor.shape == master[name].shape}
                for view in views.values()
            )
            before = ChainMap(*held_whole, master)
            new_master = master | flexlora.merge(products(), before)
        elif how.optimizer == "none":
            new_master = delta.moved(master, weighted_mean(updates, codec, max_weight), codec)
        else:
            held = {} if values["moments"] is None else load(blobs.get(values["moments"]))
            mean = weighted_mean(updates, codec, max_weight)
            new_master, held = server_optimizer.step(master, mean, held, how)
            moments = blobs.put(delta.to_bytes(held))
        steps = {}
        for digest, view in views.items():
            coded, new_view = delta.step_down(flexlora.cut(new_master, view), view, layouts[digest], codec)
            steps[digest] = {"view": blobs.put(delta.to_bytes(new_view)), "delta": blobs.put(coded)}
        return {
            "master": blobs.put(delta.to_bytes(new_master)),
            **steps[values["view"]],
            "smaller": [steps[digest] for digest in values["smaller"]],
            "moments": moments,
            # Factors of different ranks have no mean that anything could be lost by.
            "cross_term": cross_term(products()) if len(set(self.settings.lora.ranks)) < 2 else None,
        }

    def probe(self, values: Values, report: Report) -> Values:
        return Preparation(self.settings, report).probe(*self._tensors(values))

    def realign(self, values: Values, report: Report) -> Values:
        """All size classes, one after the other."""
        preparation, made = Preparation(self.settings, report), []
        master = load(self.blobs.get(values["master"]))
        for size_class, view in enumerate([values["emulator_view"], *values["smaller"]]):
            made.append(
                preparation.realign(
                    values["version"], master, load(self.blobs.get(view)), self.settings.wire.codec, size_class
                )
            )
        largest, *smaller = made
        return largest | {"smaller": smaller}

    def reprune(self, values: Values, report: Report) -> Values:
        return Preparation(self.settings, report).reprune(values["round"], load(self.blobs.get(values["master"])))

    def _tensors(self, values: Values) -> tuple[LoRATensors, LoRATensors]:
        """The adapter's master and the largest sub-LLM's emulator view."""
        spec = Bundle.open(self.settings.run_dir / "bundle").manifest.lora
        return (
            delta.from_bytes(self.blobs.get(values["master"]), spec.adapter),
            delta.from_bytes(self.blobs.get(values["emulator_view"]), spec.emulator),
        )

    def evaluate(self, values: Values, report: Report) -> Values:
        if self._judge is None:
            data = self.settings.eval_data
            assert data is not None, "the machine asks for no evaluation without data"
            self._judge = RunJudge(
                self.settings,
                data,
                lambda done, total: self._report({"stage": "evaluating", "done": done, "total": total}),
            )
        self._report = report
        reached = Outcome(values["master"], values["emulator_view"], values["manifest"], values["round"], None)
        return self._judge.judge(reached)


def main() -> None:
    threads: Any = os.environ.get("FEDSODA_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    serve(Compute().commands)


if __name__ == "__main__":
    main()
