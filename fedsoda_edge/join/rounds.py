"""Do one round after the other: train it when the owner takes its offer, hand its update in until the hub answers.

Which offers are worth taking is left to `offered.py`, what is written when to `run_state.py`, the worker to `trainer.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from fedsoda_edge import events as ev
from fedsoda_edge.errors import DiskFull, HubUnreachable, ProtocolViolation, UsageProblem
from fedsoda_edge.join.conversation import Conversation, RunOver
from fedsoda_edge.join.offered import Offered
from fedsoda_edge.join.patience import Patience
from fedsoda_edge.join.preparation import Equipment
from fedsoda_edge.join.run_state import RunState
from fedsoda_edge.ports import Clock
from fedsoda_edge.ports.disk import sha256_file
from fedsoda_edge.protocol import commands as cmd
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.manifest import parse_manifest

PROGRESS_SECONDS = 0.5  # between two reports of training, to people and to the hub

WHAT_LEAVES = (
    "What leaves this device: coded LoRA deltas, the number of examples, the mean loss, the device's sizes. Never text, "
    "never hidden states. Text can be partly recovered from deltas (arXiv 2601.17533): join only hubs you trust."
)


class RoundRunner:
    """The rounds of one join on this device.

    Args:
        patience: how long to send an update that the hub cannot take for now.
    """

    def __init__(
        self,
        welcome: ms.Welcome,
        state: RunState,
        offered: Offered,
        conversation: Conversation,
        say: ev.EventSink,
        clock: Clock,
        patience: Patience,
    ) -> None:
        self._welcome = welcome
        self._state = state
        self._offered = offered
        self._conversation = conversation
        self._say = say
        self._clock = clock
        self._patience = patience
        self._progress: asyncio.Queue[ms.Progress] = asyncio.Queue()
        self._handing_in = asyncio.Lock()
        self._has_said_what_leaves = False

    @property
    def is_handing_in(self) -> bool:
        """Whether an update is on its way."""
        return self._handing_in.locked()

    # --- training ----------------------------------------------------------------------------------------------------

    async def train(self, round_number: int, equipment: Equipment) -> ms.UpdateStart:
        """Bring the views up to date, sweep if the alignment changed, train; return what is to be announced.

        Raises:
            ProtocolViolation: the hub offers another round by now.
        """
        self._offered.take(round_number)
        try:
            self._state.begin_round()
            trainer = equipment.trainer
            await trainer.use_early(self._offered.latest.emulator.digest)
            offer, trained = await trainer.at_work(lambda: self._train_once(equipment))
            update = self._state.update
            start = ms.UpdateStart(
                round=offer.round,
                base=offer.view.digest,
                alignment=offer.alignment,
                digest=ms.Digest(await asyncio.to_thread(sha256_file, update)),
                bytes=update.stat().st_size,
                codec=self._welcome.codec,
                num_examples=trained.num_examples,
                loss=trained.loss,
            )
            self._state.commit(start)
        except BaseException:
            self._offered.let_go()
            raise
        self._offered.trained()
        self._say(
            ev.RoundTrained(
                round=offer.round,
                edge=self._welcome.edge,
                num_examples=trained.num_examples,
                num_steps=trained.num_steps,
                num_tokens=trained.num_tokens,
                micro_batch=trained.micro_batch,
                seconds=trained.seconds,
                loss=trained.loss,
            )
        )
        return start

    async def _train_once(self, equipment: Equipment) -> tuple[ms.RoundOffer, cmd.Trained]:
        """Train the round that is offered now, which after a pause may be a later one."""
        state, trainer, fetch = self._state, equipment.trainer, self._conversation.fetch
        await trainer.open()
        before, offer = self._offered.in_hand, self._offered.follow()
        if offer.round != before:
            self._say(ev.Notice(f"round {before} is over; training round {offer.round} instead"))
        if offer.manifest is not None and not trainer.is_open_with(offer.manifest.digest):
            await self._follow(equipment, offer.manifest)
        emulator = await state.bring_up("emulator", offer.emulator, offer.alignment, fetch, trainer.advance)
        view = await state.bring_up("adapter", offer.view, offer.round, fetch, trainer.advance)
        await trainer.sweep(emulator, offer.emulator.digest)
        return offer, await trainer.train(offer, view, self._on_step(offer.round))

    async def _follow(self, equipment: Equipment, wanted: ms.BlobRef) -> None:
        """Fetch what is missing of the bundle that the hub has chosen since the last round, and change to it."""
        download = equipment.download
        manifest = parse_manifest((await download.manifest(wanted)).read_bytes())
        self._state.bound_views(manifest)
        async with download.bundle(manifest, wanted.digest) as fetch:
            await fetch()
        await equipment.trainer.follow(manifest, wanted.digest)
        layers = ", ".join(map(str, manifest.plan.kept))
        self._say(ev.Notice(f"the hub has chosen other layers; this device now trains {layers}"))

    def _on_step(self, round_number: int) -> Callable[[cmd.TrainingStep], None]:
        """Make the callback that tells people and the hub how far training is, at most twice a second."""
        said_at = -PROGRESS_SECONDS

        def report(taken: cmd.TrainingStep) -> None:
            nonlocal said_at
            now = self._clock.monotonic()
            if now - said_at < PROGRESS_SECONDS and taken.step != taken.steps:
                return
            said_at = now
            progress = ms.Progress(
                round=round_number,
                step=taken.step,
                steps=taken.steps,
                loss=taken.loss,
                tokens_per_second=taken.tokens_per_second,
            )
            self._say(
                ev.Training(
                    round=round_number,
                    step=taken.step,
                    steps=taken.steps,
                    loss=taken.loss,
                    tokens_per_second=taken.tokens_per_second,
                )
            )
            self._progress.put_nowait(progress)

        return report

    async def pass_progress_on(self) -> None:
        """Tell the hub how far training is, while the join lives; what it does not hear at once is dropped."""
        while True:
            progress = await self._progress.get()
            with contextlib.suppress(HubUnreachable):
                await self._conversation.send(progress)

    # --- handing in --------------------------------------------------------------------------------------------------

    async def check(self, round_number: int, digest: str, path: Path) -> ms.UpdateStart:
        """Return what is to be announced of an update that its owner submits.

        Raises:
            UsageProblem: it is not the update that was trained last, or its file was changed.
        """
        start = self._offered.check(self._state.pending(), round_number, digest)
        found = await asyncio.to_thread(_digest, path)
        if found != digest:
            raise UsageProblem(
                f"the update of round {round_number} has digest {found[:12] or '(no file)'}, it was trained as "
                f"{digest[:12]}, so its file was changed; submit it as Offer.train returned it"
            )
        if not self._has_said_what_leaves:
            self._has_said_what_leaves = True
            self._say(ev.Notice(WHAT_LEAVES))
        return start

    async def left_over(self) -> ms.UpdateStart | None:
        """Return what is to be announced of an update that an earlier join left without an answer; None: it left none."""
        start = self._state.pending()
        if start is not None and await asyncio.to_thread(_digest, self._state.update) != start.digest:
            self._say(
                ev.Notice(
                    f"the update of round {start.round} from an earlier join is damaged on disk, so it is not sent"
                )
            )
            self._state.forget_pending()
            return None
        return start

    async def hand_in(self, start: ms.UpdateStart) -> bool:
        """Announce the update, send it in chunks and wait for the hub's answer; return whether that is a receipt.

        Raises:
            RunOver: the run was over before that.
        """
        async with self._handing_in:
            self._offered.handing_in(start)
            try:
                answer = await self._answer_to(start)
                is_accepted = isinstance(answer, ms.Receipt)
                self._state.settle(start, is_accepted)
                self._offered.settled(start, is_accepted)
            except RunOver:
                self._say(ev.Notice(f"the run ended before the hub answered the update of round {start.round}"))
                raise
            finally:
                self._offered.let_go()
        self._say_answer(start, answer)
        return is_accepted

    def _say_answer(self, start: ms.UpdateStart, answer: ms.Receipt | ms.Refusal) -> None:
        number, num_examples, size = start.round, start.num_examples, start.bytes
        if isinstance(answer, ms.Refusal):
            refused = ev.Refused(
                round=number, reason=answer.reason, num_examples=num_examples, loss=start.loss, bytes=size
            )
            self._say(refused)
        elif start.loss is None:
            raise ProtocolViolation(f"the hub accepted an update of round {number} whose loss is not finite")
        else:
            self._say(ev.Accepted(round=number, num_examples=num_examples, loss=start.loss, bytes=size))

    async def _answer_to(self, start: ms.UpdateStart) -> ms.Receipt | ms.Refusal:
        data = await asyncio.to_thread(self._state.update.read_bytes)
        while True:
            try:
                answer = await self._conversation.hand_in(start, data)
            except DiskFull as error:  # what leaves is noted first, and cannot be: the update waits on this disk
                self._say(ev.Retrying(round=start.round, reason=str(error)))
                await self._patience.after(error)
                continue
            if not (isinstance(answer, ms.Refusal) and answer.retry):
                self._patience.progressed()
                return answer
            self._say(ev.Retrying(round=start.round, reason=answer.reason))
            why = (
                f"the hub does not take the update of round {start.round}: {answer.reason}; join again, which sends it"
            )
            await self._patience.after(HubUnreachable(why, "HTTP"))


def _digest(path: Path) -> str:
    """Compute the digest of a file; "" where there is no file."""
    try:
        return sha256_file(path)
    except FileNotFoundError:
        return ""
