"""Do the round machine's jobs in the hub's child process that owns torch. No sockets, no decisions.

Tensors are blobs by digest in the run directory. The algorithms are those of `algorithms/`, `preparation/` and
`evaluation/`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from functools import cached_property, partial
from typing import assert_never

import torch
from safetensors.torch import load

from fedsoda_edge.model import delta
from fedsoda_edge.model.delta import LoRATensors
from fedsoda_edge.ports.child import ReportProgress, serve
from fedsoda_edge.ports.disk import BlobStore
from fedsoda_edge.ports.machine import threads
from fedsoda_edge.protocol.coded import of_factor
from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_edge.units import counted
from fedsoda_hub.algorithms.aggregation import flexlora, gram, robust, server_optimizer, standing
from fedsoda_hub.algorithms.aggregation.products import CrossTerm, cross_term, pairs_by_module
from fedsoda_hub.algorithms.aggregation.weighted_mean import CodedUpdate
from fedsoda_hub.evaluation.judge import RunJudge, check_evaluation
from fedsoda_hub.federation import jobs
from fedsoda_hub.preparation.prepare import READING, RunPreparation
from fedsoda_hub.preparation.realign import PreparedRun
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.settings.open_run import OpenRun, RunOpened
from fedsoda_hub.settings.run import RunSettings


class Compute:
    """The torch work of one run. Every job can be done again: it only adds blobs."""

    def __init__(self) -> None:
        self._settings: RunSettings | None = None

    def answer(self, call: OpenRun | jobs.Job, report: ReportProgress) -> RunOpened | jobs.JobResult:
        """Do one call.

        Args:
            report: takes its progress.
        """
        match call:
            case OpenRun():
                return self.open(call)
            case jobs.Prepare():
                return self.prepare(report)
            case jobs.Aggregate():
                return self.aggregate(call, report)
            case jobs.Probe():
                return self._prepared.probe(call, report)
            case jobs.Realign():
                return self._prepared.realign(call, report)
            case jobs.Reprune():
                return self._prepared.reprune(call, report)
            case jobs.Evaluate():
                return self.evaluate(call, report)
            case _:
                assert_never(call)

    @property
    def settings(self) -> RunSettings:
        """The settings of the run that was opened."""
        assert self._settings is not None, "the daemon opens the run first"
        return self._settings

    @property
    def directory(self) -> RunDirectory:
        """The run's directory."""
        return RunDirectory(self.settings.run_dir)

    @property
    def blobs(self) -> BlobStore:
        """The run's store of views, coded steps and updates, by digest."""
        return self.directory.blobs

    def open(self, call: OpenRun) -> RunOpened:
        """Take the run's settings, and check what can be checked before any round.

        Raises:
            DataProblem: the evaluation data cannot be judged.
        """
        self._settings = call.settings
        check_evaluation(self._settings)
        return RunOpened(torch.get_num_threads())

    def prepare(self, report: ReportProgress) -> jobs.PrepareResult:
        """Prune, quantize and align, or find the results of before."""
        report(jobs.Stage(stage=READING, done=0, total=0))
        return self._preparation.run(report)

    def aggregate(self, job: jobs.Aggregate, report: ReportProgress) -> jobs.AggregateResult:
        """Merge the decoded updates into the next master, as [aggregation] says; c = Q(w - v), v += decode(c).

        Every size class with LoRA of its own has its own v and c, of the tensors of w that it holds
        (docs/protocol.md (p4-views)). What is lost by averaging A and B apart is measured of the plain means.
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
        self._say_left_out(len(updates), report)
        products = partial(pairs_by_module, updates, codec, max_weight)
        moments, crossed, lost = None, CrossTerm(), None
        # Factors of different ranks cannot be averaged, so nothing can be lost by averaging them.
        has_ranks = len(set(self.settings.lora.ranks)) > 1
        if how.rule == "flexlora":
            # The views of edges that hold a module at the master's rank; where there are none, the master itself.
            held_whole = (
                {name: tensor for name, tensor in view.items() if tensor.shape == master[name].shape}
                for view in views.values()
            )
            before = ChainMap(*held_whole, master)
            pairs = products() if has_ranks else crossed.watching(products())
            found = robust.kept(updates, codec, max_weight, how, gram.of_products)
            new_master = master | flexlora.merge(robust.counted(pairs, updates, found.counts), before)
            inner = found.gram if found.gram is not None else gram.of_products(updates, codec)
            kept, where = found.kept, standing.in_products(updates, max_weight, found.counts, inner)
        else:
            merged = robust.merge(updates, codec, max_weight, how)
            kept, where = merged.kept, standing.to_mean(updates, codec, merged.mean)
            if how.optimizer == "none":
                new_master = delta.moved(master, merged.mean, codec)
            else:
                held = {} if job.moments is None else load(blobs.get(job.moments))
                new_master, held = server_optimizer.step(master, merged.mean, held, how)
                moments = self._put(held)
        if not has_ranks:
            lost = crossed.value if how.rule == "flexlora" else cross_term(products())
        steps = {}
        for digest, view in views.items():
            coded, new_view = delta.step_down(flexlora.cut(new_master, view), view, layouts[digest], codec)
            steps[digest] = jobs.ViewStep(view=self._put(new_view), delta=Digest(blobs.put(coded)))
        return jobs.AggregateResult(
            master=self._put(new_master),
            steps=tuple(steps[digest] for digest in job.views),
            moments=moments,
            cross_term=lost,
            standings=_standings(where, kept),
        )

    def _say_left_out(self, num_updates: int, report: ReportProgress) -> None:
        """Say where another rule stands in for the run's, since it needs more updates."""
        wanted, taken = self.settings.aggregation.robust, robust.rule_for(self.settings.aggregation, num_updates)
        if taken != wanted:
            why = (
                f"{counted(num_updates, 'update')} of the {robust.LEAST_FOR_KRUM} that it needs; this round's are "
                f"merged by {taken}"
            )
            report(jobs.LeftOut(stage=f"no {wanted}", why=why))

    def evaluate(self, job: jobs.Evaluate, report: ReportProgress) -> jobs.EvaluateResult:
        """Judge full LLM, sub-LLM and plug-in after a round."""

        def evaluating(done: int, total: int) -> None:
            report(jobs.Stage(stage="evaluating", done=done, total=total))

        return self._judge.judge(job, evaluating).result

    def _put(self, tensors: LoRATensors) -> Digest:
        return Digest(self.blobs.put(delta.to_bytes(tensors)))

    @cached_property
    def _preparation(self) -> RunPreparation:
        """The run's preparation, which reads full LLM and public text once for the life of this process."""
        return RunPreparation(self.settings)

    @cached_property
    def _prepared(self) -> PreparedRun:
        return PreparedRun(self._preparation.llm)

    @cached_property
    def _judge(self) -> RunJudge:
        data = self.settings.eval_data
        assert data is not None, "the machine asks for no evaluation without data"
        return RunJudge(self.settings, data)


def _standings(where: Mapping[str, standing.ToMean], kept: Mapping[str, float]) -> tuple[jobs.Standing, ...]:
    """Round the standings for the round's record, in ascending edge id; of too many those with the least cosine."""
    least = sorted(where, key=lambda edge: (where[edge].cosine or 0.0, edge))[: jobs.MAX_STANDINGS]
    return tuple(
        jobs.Standing(
            edge=EdgeId(edge),
            norm=_rounded(where[edge].norm),
            cosine=None if (cosine := where[edge].cosine) is None else _rounded(cosine),
            kept=_rounded(kept[edge]) if edge in kept else None,
        )
        for edge in sorted(least)
    )


def _rounded(value: float) -> float:
    """Round to 4 significant digits: records stay short, and do not depend on how sums are parted."""
    return float(f"{value:.4g}")


def main() -> None:
    """Answer calls that come on stdin, until it closes."""
    torch.set_num_threads(threads(torch.get_num_threads()))
    serve(OpenRun | jobs.Job, Compute().answer)


if __name__ == "__main__":
    main()
