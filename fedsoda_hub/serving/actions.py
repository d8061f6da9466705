"""Do what the hub's owner asks from the page or by a command: steer the run, let devices in and out.

What is decided is `federation/steering.py`'s, who may ask `page.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from fedsoda_edge.errors import UsageProblem
from fedsoda_hub.federation import events as ev
from fedsoda_hub.run.directory import RunDirectory
from fedsoda_hub.run.ledger import opened
from fedsoda_hub.serving import invitations
from fedsoda_hub.serving.decisions import OwnerRequest
from fedsoda_hub.settings.run import RunSettings

ANSWER_SECONDS = 20.0  # in which the hub decides, unless its disk hangs
WEEK = 7 * 86_400.0
GuestName = Annotated[str, Meta(min_length=1, max_length=64)]


class OneEdge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request about one edge. seconds: how long a new link lasts until a device has used it."""

    edge: GuestName
    seconds: Annotated[float, Meta(ge=60, le=366 * 86_400)] = WEEK


class OtherRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request for other [rounds] settings; None: that key stays."""

    count: int | None = None
    quorum: float | None = None
    deadline_seconds: float | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to what was done: a sentence.

    link: a join link, to be shown once; expires: until when a device can use it, seconds since 1970. qr: the link as a QR
    code, a string of 0 and 1 for each row. None: nothing of that kind was made.
    """

    said: str
    link: str | None = None
    expires: float | None = None
    qr: list[str] | None = None


class Actions:
    """All that an owner can do. tell: takes what is asked of the run. touch: is called when who may join has changed."""

    def __init__(
        self,
        settings: RunSettings,
        tell: Callable[[OwnerRequest], None],
        touch: Callable[[], None],
        wall: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._tell = tell
        self._touch = touch
        self._wall = wall

    async def pause(self) -> Done:
        """Pause the run."""
        await self._steer(ev.PauseAsked())
        return Done(said="The run is paused: the open round continues to its end, and no other opens.")

    async def resume(self) -> Done:
        """End the pause."""
        await self._steer(ev.ResumeAsked())
        return Done(said="The run continues.")

    async def finish(self) -> Done:
        """End the run after the open round."""
        await self._steer(ev.FinishAsked())
        return Done(said="The run ends after this round. Until then, another number of rounds takes it back.")

    async def change(self, asked: OtherRules) -> Done:
        """Change rules of [rounds]."""
        await self._steer(ev.ChangeAsked(self._wall(), asked.count, asked.quorum, asked.deadline_seconds))
        return Done(said="Changed, from now on.")

    async def _steer(self, asked: ev.OwnerAsked) -> None:
        """Have the run decide it.

        Raises:
            UsageProblem: it is not done, and why.
        """
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._tell(OwnerRequest(asked, answer))
        try:
            why = await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise UsageProblem(
                f"the hub did not decide within {ANSWER_SECONDS:.0f} s; look at its log, then try again"
            ) from None
        if why is not None:
            raise UsageProblem(why)

    async def invite(self, asked: OneEdge) -> Done:
        """Make a join link for a new device."""
        return await self._linked(asked, is_rebound=False)

    async def rebind(self, asked: OneEdge) -> Done:
        """Give an edge's name to another device."""

        def let_go() -> bool:
            with opened(RunDirectory(self._settings.run_dir)) as ledger:
                return invitations.rebind_token(ledger, asked.edge)

        if await asyncio.to_thread(let_go):
            self._touch()
            return Done(said=f"The token of {asked.edge} belongs to the next device that joins with it.")
        return await self._linked(asked, is_rebound=True)

    async def revoke(self, asked: OneEdge) -> Done:
        """Shut an edge out."""

        def shut_out() -> str:
            with opened(RunDirectory(self._settings.run_dir)) as ledger:
                return invitations.revoke(ledger, asked.edge)

        kind = await asyncio.to_thread(shut_out)
        self._touch()
        what = "token" if kind == "token" else "join link and device"
        return Done(said=f"Revoked the {what} of {asked.edge}; its connection ends within seconds.")

    async def _linked(self, asked: OneEdge, *, is_rebound: bool) -> Done:
        def made() -> Done:
            with (
                opened(RunDirectory(self._settings.run_dir)) as ledger,
                invitations.inviting(
                    self._settings, ledger, asked.edge, asked.seconds, is_rebound=is_rebound
                ) as invited,
            ):
                link = str(invited.link)
                guess = f" It names {invited.way.addresses[0]}, a guess; [listen] public_url says it."
                return Done(
                    said=f"One device can join as {asked.edge} with this link, which is shown here only."
                    + (guess if invited.way.is_guess else ""),
                    link=link,
                    expires=invited.expires,
                    qr=qr_rows(link),
                )

        done = await asyncio.to_thread(made)
        self._touch()
        return done


def qr_rows(text: str) -> list[str]:
    """Write a text as a QR code: a string of 0 and 1 for each row, without the margin of 4 that it needs around."""
    import segno

    return ["".join("1" if cell else "0" for cell in row) for row in segno.make(text, error="m", micro=False).matrix]
