"""The hub's child process that owns torch: prepare, aggregate, probe, realign, evaluate. No sockets, no decisions.

Arguments and results are JSON; tensors are blobs by digest in the run directory.
"""

from __future__ import annotations

import os
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
from fedsoda_hub.algorithms import flexlora, server_optimizer
from fedsoda_hub.algorithms.aggregation import CodedUpdate, weighted_mean
from fedsoda_hub.algorithms.products import cross_term, pairs_by_module
from fedsoda_hub.config import RunSettings
from fedsoda_hub.export import RunJudge, check_evaluation
from fedsoda_hub.federation.rounds import trained_factor
from fedsoda_hub.ledger import Outcome
from fedsoda_hub.prepare import Preparation


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
        commands = (self.open, self.prepare, self.aggregate, self.probe, self.realign, self.evaluate)
        return {command.__name__: command for command in commands}

    def open(self, values: Values, _: Report) -> Values:
        self._settings = msgspec.convert(values["settings"], RunSettings)
        check_evaluation(self._settings)
        return {"threads": torch.get_num_threads()}

    def prepare(self, _: Values, report: Report) -> Values:
        return Preparation(self.settings, report).run()

    def aggregate(self, values: Values, _: Report) -> Values:
        """The next master of the decoded updates, as [aggregation] says; c = Q(w - v); v += decode(c) (delta.py)."""
        spec = Bundle.open(self.settings.run_dir / "bundle").manifest.lora
        how, codec, max_weight = self.settings.aggregation, self.settings.wire.codec, self.settings.rounds.max_weight
        blobs, layout = self.blobs, of_factor(spec.adapter, trained_factor(how.rule, values["round"]))
        master = delta.from_bytes(blobs.get(values["master"]), spec.adapter)
        view = delta.from_bytes(blobs.get(values["view"]), spec.adapter)
        updates = [
            CodedUpdate(edge, num_examples, partial(blobs.get, digest))
            for edge, num_examples, digest in values["updates"]
        ]
        products = partial(pairs_by_module, updates, view, layout, codec, max_weight)
        moments = None
        if how.rule == "flexlora":
            new_master = flexlora.merge(products(), view)
        elif how.optimizer == "none":
            new_master = delta.moved(master, weighted_mean(updates, layout, codec, max_weight), codec)
        else:
            held = {} if values["moments"] is None else load(blobs.get(values["moments"]))
            mean = weighted_mean(updates, layout, codec, max_weight)
            new_master, held = server_optimizer.step(master, mean, held, how)
            moments = blobs.put(delta.to_bytes(held))
        coded, new_view = delta.step_down(new_master, view, layout, codec)
        return {
            "master": blobs.put(delta.to_bytes(new_master)),
            "view": blobs.put(delta.to_bytes(new_view)),
            "delta": blobs.put(coded),
            "moments": moments,
            "cross_term": cross_term(products()),
        }

    def probe(self, values: Values, report: Report) -> Values:
        return Preparation(self.settings, report).probe(*self._tensors(values))

    def realign(self, values: Values, report: Report) -> Values:
        """All size classes, one after the other."""
        preparation, made = Preparation(self.settings, report), []
        for size_class, view in enumerate([values["emulator_view"], *values["smaller"]]):
            spec = Bundle.open(self.settings.run_dir / "bundle", size_class).manifest.lora
            made.append(
                preparation.realign(
                    values["version"],
                    delta.from_bytes(self.blobs.get(values["master"]), spec.adapter),
                    delta.from_bytes(self.blobs.get(view), spec.emulator),
                    self.settings.wire.codec,
                    size_class,
                )
            )
        largest, *smaller = made
        return largest | {"smaller": smaller}

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
        return self._judge.judge(Outcome(values["master"], values["emulator_view"], values["round"], None))


def main() -> None:
    threads: Any = os.environ.get("FEDSODA_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    serve(Compute().commands)


if __name__ == "__main__":
    main()
