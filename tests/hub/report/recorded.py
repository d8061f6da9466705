"""Records of a small run in its second round, for tests of the report."""

from __future__ import annotations

from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation import records as rec
from fedsoda_hub.federation.jobs import EvaluateResult, Standing

A = Digest("a" * 64)
ANN, BOB = EdgeId("ann"), EdgeId("<script>bob</script>")
KL = {"aligned": 0.2, "pruned": 0.5, "quantized": 0.6}
RESULT = EvaluateResult(
    accuracy={"full": 0.25, "sub_llm": 0.75, "plug_in": 0.5},
    loss={"full": 3.0, "sub_llm": 1.0, "plug_in": 2.0},
    auc={"full": None, "sub_llm": None, "plug_in": None},
    num_examples=16,
)

STANDINGS = (
    Standing(edge=ANN, norm=1.5, cosine=0.75, kept=1.0),
    Standing(edge=BOB, norm=30.0, cosine=-0.25, kept=0.05),
)


def accepted(number: int, edge: EdgeId, num_examples: int, loss: float) -> rec.UpdateAccepted:
    return rec.UpdateAccepted(round=number, edge=edge, digest=A, num_examples=num_examples, loss=loss)


def opened(number: int, *cohort: EdgeId) -> rec.RoundOpened:
    return rec.RoundOpened(round=number, cohort=cohort, view=A, alignment=0, deadline_at=1e9)


RECORDED: list[rec.AnyRecord] = [
    rec.RunStarted(run_id="1", fixed={}),
    rec.RunPrepared(manifest=A, adapter_view=A, emulator_view=A, public_kl=KL),
    opened(1, ANN, BOB),
    accepted(1, ANN, 30, 2.0),
    rec.EdgeAnswered(round=1, edge=BOB, how="refused"),
    rec.CohortExtended(round=1, invited=(BOB,), deadline_at=1e9),
    accepted(1, BOB, 10, 1.0),
    rec.RoundClosed(round=1, master=A, view=A, delta=A, standings=STANDINGS),
    rec.Evaluated(round=1, result=RESULT),
    rec.Realigned(round=2, version=1, view=A, delta=A, kl_before=0.3, kl_after=0.25),
    opened(2, ANN, BOB),
    accepted(2, ANN, 30, 1.5),
    rec.EdgeAnswered(round=2, edge=BOB, how="declined"),
]
