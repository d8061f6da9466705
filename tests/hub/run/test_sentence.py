"""One sentence says what a run does, why it does nothing, and how it ended."""

import msgspec
import pytest

from fedsoda_edge.protocol.messages import Digest, EdgeId
from fedsoda_hub.federation.state import Collected, LedgerState
from fedsoda_hub.run.sentence import sentence_of
from fedsoda_hub.run.status import BestRound, HubProcess, LiveStatus, RunningJob, live_status, run_status

HERE = "http://127.0.0.1:8730"
ALIGNING = RunningJob(job="prepare", stage="aligning", done=81, total=200, seconds=460, seconds_left=660)
READING = RunningJob(job="prepare", stage="reading the full LLM", seconds=12)
EVALUATING = RunningJob(job="evaluate", stage="evaluating", done=0, total=40)
MERGING = RunningJob(job="aggregate", seconds=3)
SERVING = HubProcess(state="serving", pid=7)


def of(phase: str, **more: object) -> LiveStatus:
    state = LedgerState(phase=phase, round=3, cohort=[EdgeId(name) for name in "abcd"])  # type: ignore[arg-type]
    state.losses = [1.0, 0.9]
    state.accepted = {EdgeId("a"): Collected(3, Digest("0" * 64), 8, 0.5)}
    state.answered = {EdgeId("b"): "paused"}
    found = live_status(run_status("triage", 20, [], state), [], url=HERE, hub=SERVING)
    return msgspec.structs.replace(found, **more)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (of("preparing"), "preparing the sub-LLM"),
        (of("preparing", work=ALIGNING), "preparing: aligning 81 of 200, about 11 min left"),
        (of("preparing", work=READING), "preparing: reading the full LLM, for 12 s"),
        (of("preparing", url=None, hub=HubProcess(state="preparing", pid=7), work=ALIGNING), "preparing: aligning 81 of 200, about 11 min left"),
        (of("idle"), "waiting: for edges; 2 of 20 rounds are closed"),
        (of("idle", waiting="round 3 needs 3 edges, 1 is here"), "waiting: round 3 needs 3 edges, 1 is here; 2 of 20 rounds are closed"),
        (of("idle", work=EVALUATING), "evaluating 0 of 40; 2 of 20 rounds are closed"),
        (of("collecting", due_seconds=240), "round 3 of 20: 1 of 4 updates are in, 2 still train, closes within 4 min"),
        (of("collecting", work=MERGING), "round 3 of 20: 1 of 4 updates are in, merging the updates"),
        (of("collecting", waiting="the disk is full"), "round 3 of 20: 1 of 4 updates are in; waiting: the disk is full"),
        (of("ended"), "over after 2 of 20 rounds"),
        (of("ended", best=BestRound(round=7, metric="accuracy", value=0.8125)), "over after 2 of 20 rounds; the best is round 7 (accuracy 81.2%)"),
        (of("ended", best=BestRound(round=7, metric="mean_rank", value=1.25)), "over after 2 of 20 rounds; the best is round 7 (mean rank 1.250)"),
        (of("idle", url=None, hub=None), "no hub serves it; 2 of 20 rounds are closed"),
        (of("idle", url=None, hub=HubProcess(state="stopped", pid=7, reason="SIGTERM")), "no hub serves it: the last one was stopped (SIGTERM); 2 of 20 rounds are closed"),
        (of("idle", url=None, hub=HubProcess(state="failed", pid=7, reason="no memory")), "no hub serves it: the last one failed (no memory); 2 of 20 rounds are closed"),
        (
            of("collecting", url=None, hub=HubProcess(state="killed", pid=7)),
            "no hub serves it: the last one (pid 7) was killed, or the machine ended it for lack of memory; 2 of 20 rounds are closed",
        ),
    ],
)  # fmt: skip
def test_the_sentence_of_a_run(status: LiveStatus, said: str) -> None:
    assert sentence_of(status) == said
