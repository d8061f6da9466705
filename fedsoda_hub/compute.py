"""The hub's child process that owns torch: it does the round machine's jobs. No sockets, no decisions.

Tensors are blobs by digest in the run directory.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable
from functools import partial
from typing import Any, assert_never

import msgspec
import torch
from safetensors.torch import load

from fedsoda_edge.model import delta
from fedsoda_edge.model.bundle import Bundle
from fedsoda_edge.model.lora import LoRATensors
from fedsoda_edge.ports.child import Report, serve
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_edge.protocol.messages import Digest
from fedsoda_hub.algorithms.aggregation import flexlora, server_optimizer
from fedsoda_hub.algorithms.aggregation.products import cross_term, pairs_by_module
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate, weighted_mean
from fedsoda_hub.evaluation.export import RunJudge, check_evaluation
from fedsoda_hub.federation import jobs
from fedsoda_hub.preparation.prepare import Preparation
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import Outcome
from fedsoda_hub.settings.open_run import OpenRun, RunOpened
from fedsoda_hub.settings.run import RunSettings


class Compute:
    """One run's torch work. Every job can be done again: it only adds blobs."""

    def __init__(self) -> None:
        self._settings: RunSettings | None = None
        self._judge: RunJudge | None = None
        self._report: Report = lambda _: None

    def answer(self, call: OpenRun | jobs.Job, report: Report) -> RunOpened | jobs.JobResult:
        """Do one call; report takes its progress."""
        self._report = report
        match call:
            case OpenRun():
                return self.open(call)
            case jobs.Prepare():
                return self.prepare()
            case jobs.Aggregate():
                return self.aggregate(call)
            case jobs.Probe():
                return self.probe(call)
            case jobs.Realign():
                return self.realign(call)
            case jobs.Reprune():
                return self.reprune(call)
            case jobs.Evaluate():
                return self.evaluate(call)
            case _:
                assert_never(call)

    @property
    def settings(self) -> RunSettings:
        """The settings of the run that was opened."""
        assert self._settings is not None, "the daemon opens the run first"
        return self._settings

    @property
    def directory(self) -> RunDirectory:
        """Where the run's files lie."""
        return RunDirectory(self.settings.run_dir)

    @property
    def blobs(self) -> BlobStore:
        """Views, coded steps and updates, by digest."""
        return self.directory.blobs

    def open(self, call: OpenRun) -> RunOpened:
        """Take the run's settings.

        Raises:
            DataProblem: the evaluation data cannot be judged.
        """
        self._settings = call.settings
        check_evaluation(self._settings)
        return RunOpened(torch.get_num_threads())

    def prepare(self) -> jobs.PrepareResult:
        """Prune, quantize and align, or find that again."""
        return _prepare_result(self._preparation().run())

    def aggregate(self, job: jobs.Aggregate) -> jobs.AggregateResult:
        """Merge the decoded updates into the next master, as [aggregation] says; c = Q(w - v); v += decode(c) (delta.py).

        Every size class with LoRA of its own has its own v and c: of the tensors of w that it holds.
        """
        how, codec, max_weight = self.settings.aggregation, self.settings.wire.codec, self.settings.rounds.max_weight
        blobs = self.blobs
        master = load(blobs.get(job.master))
        views = {digest: load(blobs.get(digest)) for digest in job.views}
        layouts = {digest: of_factor(delta.layout_of(view), job.trains) for digest, view in views.items()}
        updates = [
            CodedUpdate(
                update.edge,
                update.num_examples,
                partial(blobs.get, update.digest),
                views[update.view],
                layouts[update.view],
            )
            for update in job.updates
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
            held = {} if job.moments is None else load(blobs.get(job.moments))
            mean = weighted_mean(updates, codec, max_weight)
            new_master, held = server_optimizer.step(master, mean, held, how)
            moments = self._put(held)
        steps = {}
        for digest, view in views.items():
            coded, new_view = delta.step_down(flexlora.cut(new_master, view), view, layouts[digest], codec)
            steps[digest] = jobs.ViewStep(view=self._put(new_view), delta=Digest(blobs.put(coded)))
        return jobs.AggregateResult(
            master=self._put(new_master),
            steps=tuple(steps[digest] for digest in job.views),
            moments=moments,
            # Factors of different ranks have no mean that anything could be lost by.
            cross_term=cross_term(products()) if len(set(self.settings.lora.ranks)) < 2 else None,
        )

    def probe(self, job: jobs.Probe) -> jobs.ProbeResult:
        """Measure how far the largest sub-LLM has drifted."""
        found = self._preparation().probe(*self._tensors(job))
        return jobs.ProbeResult(kl=found["kl"], cosine=found["cosine"])

    def realign(self, job: jobs.Realign) -> jobs.RealignResult:
        """Align all size classes, one after the other."""
        preparation, master = self._preparation(), load(self.blobs.get(job.master))
        codec = self.settings.wire.codec
        made = [
            preparation.realign(job.version, master, load(self.blobs.get(view)), codec, size_class)
            for size_class, view in enumerate(job.emulator_views)
        ]
        return jobs.RealignResult(tuple(msgspec.convert(one, jobs.RealignedSubLLM) for one in made))

    def reprune(self, job: jobs.Reprune) -> jobs.RepruneResult:
        """Draw other layers for each size class."""
        made = self._preparation().reprune(job.round, load(self.blobs.get(job.master)))
        drawn = [{"manifest": one["manifest"], "view": one["view"]} for one in (made, *made["smaller"])]
        return msgspec.convert({"master": made["master"], "sub_llms": drawn}, jobs.RepruneResult)

    def evaluate(self, job: jobs.Evaluate) -> jobs.EvaluateResult:
        """Judge full LLM, sub-LLM and plug-in."""
        if self._judge is None:
            data = self.settings.eval_data
            assert data is not None, "the machine asks for no evaluation without data"
            self._judge = RunJudge(
                self.settings,
                data,
                lambda done, total: self._report(jobs.Stage(stage="evaluating", done=done, total=total)),
            )
        reached = Outcome(job.master, job.emulator_view, job.manifest, job.round, None)
        return msgspec.convert(self._judge.judge(reached), jobs.EvaluateResult)

    def _put(self, tensors: LoRATensors) -> Digest:
        return Digest(self.blobs.put(delta.to_bytes(tensors)))

    def _tensors(self, job: jobs.Probe) -> tuple[LoRATensors, LoRATensors]:
        """Read the adapter's master and the largest sub-LLM's emulator view."""
        spec = Bundle.open(self.directory.bundle).manifest.lora
        return (
            delta.from_bytes(self.blobs.get(job.master), spec.adapter),
            delta.from_bytes(self.blobs.get(job.emulator_view), spec.emulator),
        )

    def _preparation(self) -> Preparation:
        return Preparation(self.settings, untyped(self._report))


# Until preparation reports and returns jobs' own types.


def untyped(report: Callable[[jobs.Progress], None]) -> Callable[[dict[str, Any]], None]:
    """Take progress as dicts and report it as types."""
    kinds = (jobs.Stage, jobs.DiskNeeded, jobs.BorderMapFitted, jobs.NoBorderMap, jobs.ShapeMeasured)

    def take(values: dict[str, Any]) -> None:
        [kind] = [kind for kind in kinds if set(values) - {"kl"} == set(kind.__struct_fields__) - {"kl"}]
        report(kind(**values))

    return take


def _prepare_result(values: dict[str, Any]) -> jobs.PrepareResult:
    sub_llms = tuple(
        jobs.PreparedSubLLM(
            manifest=one["manifest"],
            adapter_view=one["adapter_view"] or values["adapter_view"],
            emulator_view=one["emulator_view"],
            public_kl=one["public_kl"],
        )
        for one in (values, *values.get("smaller", ()))
    )
    return jobs.PrepareResult(sub_llms=sub_llms, master=values.get("master", values["adapter_view"]))


def main() -> None:
    """Answer calls on stdin."""
    threads = os.environ.get("FEDSODA_THREADS")
    if threads:
        torch.set_num_threads(int(threads))
    serve(OpenRun | jobs.Job, Compute().answer)


if __name__ == "__main__":
    main()
