"""Forge what an edge says to a real hub in this process, for `bench_trust_frames`: daemon, roster, machine, ledger and blobs.

Only what `trust_frames_stage` has is stood in for. Three edges take part: two are honest, the third is forged. Each frame is
judged by `trust_frames_judge`, and after each episode the ledger and the honest edges must be as they should.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from trust_frames_forge import EdgeForger
from trust_frames_judge import EITHER, END, STAY, Facts, HubJudge, Verdict
from trust_frames_mutate import Forger
from trust_frames_stage import FORGED, HONEST, RUN, Door, Line, Paper, StillClock, Torch, hello, said, update

from fedsoda_edge.ports import TorchPort
from fedsoda_edge.ports.console import ProgressLine
from fedsoda_hub.cli.display import HubDisplay
from fedsoda_hub.events import HubEvent, as_json
from fedsoda_hub.federation import records as rec
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.serving.daemon import Daemon
from fedsoda_hub.settings.run import read_settings


class HubBench:
    """The hub, its honest edges, and the forged one. wrong: sentences. tried: forged frames."""

    def __init__(self, directory: Path, seed: int, most_wrong: int = 20) -> None:
        self.tried = self.num_right = 0
        self.wrong: list[str] = []
        self.found: list[dict[str, Any]] = []  # frames of episodes that were wrong
        self._most_wrong = most_wrong
        self._directory = directory
        self.forger = Forger(random.Random(seed))
        self.facts = Facts()
        self._edge = EdgeForger(self.forger, self.facts)
        self._lines: dict[str, Line] = {}
        self._appended: list[Any] = []
        self._display = HubDisplay(jsonl=False)
        self._display._line = cast(ProgressLine, Paper(self._note))

    async def __aenter__(self) -> HubBench:
        (self._directory / "public.txt").write_text("public")
        (self._directory / "run.toml").write_text(RUN)
        settings = read_settings(self._directory / "run.toml")
        door, torch = Door(), Torch(RunDirectory(settings.run_dir))
        self.daemon = Daemon.open(settings, self._hear, StillClock(), door=door, torch=cast(TorchPort, torch))
        ledger = self.daemon.disk.ledger
        ledger.database.write(("PRAGMA synchronous = OFF", ()))  # what is tried here is not the disk
        append = ledger.append

        def noted(record: rec.AnyRecord) -> None:
            append(record)
            self._appended.append(record)

        ledger.append = noted  # type: ignore[method-assign]
        for edge in (*HONEST, FORGED):
            ledger.tokens.create(edge)
        self._stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(self.daemon.serve(self._stop, exit_when_done=False))
        waited: set[asyncio.Future[Any]] = {door.hub, self._serving}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        self.hub = door.hub.result()
        self.facts.most_bytes = len(update([0.0] * 32))
        self.facts.least_refused = 1 << 20
        for edge in HONEST:
            await self._join(edge)
        await self._open_round()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set_result("SIGTERM")
        for line in self._lines.values():
            await line.hang_up()
        await asyncio.wait({self._serving}, timeout=30)
        if not self._serving.done():
            self._serving.cancel()

    def _hear(self, event: HubEvent) -> None:
        as_json(event)
        self._display.say(event)

    def _note(self, what: str) -> None:
        if len(self.wrong) < self._most_wrong:
            self.wrong.append(what)

    # --- the honest course of rounds -------------------------------------------------------------------------------

    async def _join(self, edge: str) -> Line:
        line = self._lines[edge] = Line(self.hub, edge)
        for values in (hello(edge), {"type": "ready", "num_examples": 3}):
            frame = said(**values)
            self.forger.remember(frame)
            assert await line.say(frame), line.heard
        return line

    async def _open_round(self) -> None:
        line = await self._join(FORGED)
        offer = await line.hear("round_offer", after=1)
        facts = self.facts
        facts.round, facts.view, facts.alignment = offer["round"], offer["view"]["digest"], offer["alignment"]
        facts.cohort, facts.accepted = {FORGED, *HONEST}, {}
        facts.blobs = {}
        for view in (offer["view"], offer["emulator"]):
            for one in (view.get("delta"), view.get("snapshot")):
                if one:
                    facts.blobs[one["digest"]] = one["bytes"]
            path = self.daemon.disk.directory.blobs.path(view["digest"])
            facts.blobs[view["digest"]] = path.stat().st_size  # the bundle's own view is a blob too
        await line.hang_up()
        del self._lines[FORGED]

    async def next_round(self) -> None:
        """Let the round end honestly, and check that each honest update was counted once, as it was sent."""
        facts = self.facts
        if FORGED not in facts.accepted:
            line = await self._join(FORGED)
            await line.say(said(type="decline", round=facts.round, reason="done"))
            await line.hang_up()
            del self._lines[FORGED]
        for edge in HONEST:
            start, chunk = self._edge.upload(facts.round, facts.view)
            for frame in (start, chunk):
                self.forger.remember(frame)
                if not await self._lines[edge].say(frame):
                    self._note(f"{edge}, who is honest, lost the connection in round {facts.round}")
                    return
            answer = await self._lines[edge].hear("receipt", "refusal", after=max(0, len(self._lines[edge].heard) - 1))
            if answer["type"] != "receipt":
                self._note(f"{edge}, who is honest, was refused: {answer}")
            facts.receipts[edge] = (facts.round, json.loads(start[4:])["digest"])
        # The next offer comes once the round is merged.
        for edge in HONEST:
            line = self._lines[edge]
            closed = await line.hear("round_closed", after=1)
            if closed["type"] != "round_closed":
                self._note(f"round {facts.round} did not close for {edge}: {closed}")
            line.heard.clear()
            line.heard.append({"type": "welcome"})
        closing = [record for record in self._appended if isinstance(record, rec.RoundClosed)]
        if [record.round for record in closing] != [facts.round]:
            self._note(f"closed {[record.round for record in closing]} where round {facts.round} was open")
        self._appended.clear()
        await self._open_round()

    # --- the forged edge --------------------------------------------------------------------------------------------

    async def episode(self) -> None:
        """Hold one forged conversation."""
        chance, facts = self.forger.chance, self.facts
        line = Line(self.hub, FORGED)
        judge = HubJudge(facts, FORGED, f"device-of-{FORGED}", f"place-of-{FORGED}")
        sent: list[bytes] = []
        honest = [said(**hello(FORGED)), said(type="ready", num_examples=3)][: chance.choice((0, 1, 2, 2, 2, 2, 2))]
        todo: list[tuple[bytes, bool]] = [(frame, False) for frame in honest]
        todo += [(frame, True) for frame in self._edge.frames(chance.randint(2, 10))]
        before = len(self.wrong)
        for frame, is_forged in todo:
            was_accepted = facts.accepted.get(FORGED)
            verdict = judge.judge(frame)
            sent.append(frame)
            num_heard = len(line.heard)
            stays = await line.say(frame)
            if is_forged:
                self.tried += 1
                self.forger.remember(frame)
            answer = await self._answer(line, judge, verdict, stays, num_heard)
            problem = self._problem(verdict, stays, answer)
            if (
                any(one["type"] == "round_offer" for one in line.heard)
                and not judge.is_ready
                and verdict.then != EITHER
            ):
                problem = problem or "an edge that is not ready was asked for a round"
            accepted = [one for one in self._appended if isinstance(one, rec.UpdateAccepted) and one.edge == FORGED]
            if len(accepted) > (was_accepted is not None or answer == "receipt"):
                problem = problem or "an update without a receipt, or a second one, is in the ledger"
            if problem:
                self._note(f"{problem}: {frame[:160]!r}")
                self.found.append({"frames": [one.hex() for one in sent], "problem": problem})
            elif is_forged:
                self.num_right += 1
            if not stays or problem or verdict.then == EITHER:
                break
        await line.hang_up()
        if verdict.then == EITHER:
            await self._settle()
        if line.defect is not None:
            self._note(f"the hub raised {line.defect!r:.200} on {sent[-1][:120]!r}")
            self.found.append({"frames": [one.hex() for one in sent], "problem": repr(line.defect)})
        if self._serving.done():
            raise RuntimeError(f"the hub ended: {self._serving.exception()!r}")
        for edge in HONEST:
            if self._lines[edge].is_over:
                self._note(f"{edge}, who is honest, lost the connection")
                await self._join(edge)
        if len(self.wrong) == before:
            return

    async def _settle(self) -> None:
        """Wait until the hub has judged what came, and note what it took of frames that it might take or not."""
        async with asyncio.timeout(60):
            while self.daemon.uploads.num_unjudged or not self.daemon.inbox.empty():
                await asyncio.sleep(0.001)
        for one in self._appended:
            if isinstance(one, rec.UpdateAccepted) and one.edge == FORGED and FORGED not in self.facts.accepted:
                self.facts.accepted[FORGED] = one.digest
                self.facts.receipts[FORGED] = (one.round, one.digest)

    async def _answer(self, line: Line, judge: HubJudge, verdict: Verdict, stays: bool, num_heard: int) -> str:
        """Wait for the answer to a whole update, or for the blob that was asked for; note what was accepted."""
        if stays and verdict.answer == "blob_chunk":  # whole, since each is small: the next may be asked for after it
            return str((await line.hear("blob_chunk", after=num_heard))["type"])
        if not stays or verdict.start is None:
            return ""
        found = await line.hear("receipt", "refusal", after=num_heard)
        if found["type"] == "receipt":
            self.facts.accepted[FORGED] = verdict.start["digest"]
            self.facts.receipts[FORGED] = (verdict.start["round"], verdict.start["digest"])
            if (found["round"], found["digest"]) != (verdict.start["round"], verdict.start["digest"]):
                return "another receipt"
        return str(found["type"])

    @staticmethod
    def _problem(verdict: Verdict, stays: bool, answer: str) -> str:
        if verdict.then != EITHER and stays != (verdict.then == STAY):
            return "the connection stays" if stays else "the connection ended, and the frame is allowed"
        if verdict.then == END or verdict.answer in ("", "any"):
            return ""
        return "" if answer == verdict.answer else f"the answer is {answer or 'none'}, {verdict.answer} is right"


async def run(directory: Path, seed: int, tries: int) -> Mapping[str, Any]:
    """Forge so many frames against one hub."""
    async with HubBench(directory, seed) as bench:
        episodes = 0
        while bench.tried < tries:
            await bench.episode()
            episodes += 1
            if episodes % 60 == 0:
                await bench.next_round()
        with contextlib.suppress(TimeoutError):
            await bench.next_round()
        return {"tried": bench.tried, "right": bench.num_right, "wrong": bench.wrong, "found": bench.found[:20]}
