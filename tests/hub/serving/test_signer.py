"""What a hub signs: its bundles, once an hour for all edges and when they change, and each receipt."""

from __future__ import annotations

import msgspec
import pytest

from fedsoda_edge.ports import SystemClock
from fedsoda_edge.protocol import messages as ms
from fedsoda_edge.protocol.signatures import SigningKey
from fedsoda_edge.protocol.statements import BundleStatement, ReceiptStatement, read
from fedsoda_hub.federation.state import Collected, LedgerState
from fedsoda_hub.serving.signer import LIFETIME_SECONDS, RENEW_SECONDS, Signer
from tests.hub.serving.test_offers import digest, size_of, sub_llm

KEY = SigningKey(b"k" * 32)
EDGE = ms.EdgeId("clinic-7")
LARGE, SMALL = digest("large manifest"), digest("small manifest")
VIEW = ms.ViewRef(digest=ms.Digest("0" * 64), delta=None, snapshot=None)


class Wall(SystemClock):
    """A clock that shows what the test sets."""

    at = 1_000_000.0

    def wall(self) -> float:
        return self.at


@pytest.fixture
def state() -> LedgerState:
    return LedgerState(run_id="r", sub_llms=(sub_llm("large"), sub_llm("small")))


@pytest.fixture
def clock() -> Wall:
    return Wall()


@pytest.fixture
def signer(state: LedgerState, clock: Wall) -> Signer:
    return Signer(KEY, state, ("https://cdn.example.org/",), size_of, clock)


def said(signer: Signer) -> BundleStatement:
    return read(signer.bundles(), KEY.public, BundleStatement)


def test_it_signs_run_version_times_manifests_by_size_class_and_mirrors(signer: Signer) -> None:
    assert said(signer) == BundleStatement(
        run_id="r",
        version=1,
        signed_at=1_000_000,
        expires=1_000_000 + LIFETIME_SECONDS,
        manifests=(size_of(LARGE), size_of(SMALL)),
        mirrors=("https://cdn.example.org/",),
    )


def test_one_signature_serves_all_edges_for_an_hour(signer: Signer, clock: Wall) -> None:
    first = signer.bundles()
    clock.at += RENEW_SECONDS - 1
    assert signer.bundles() is first
    clock.at += 1
    assert said(signer).signed_at == 1_000_000 + RENEW_SECONDS
    clock.at -= 2 * RENEW_SECONDS  # somebody sets the clock right
    assert said(signer).signed_at == 1_000_000 - RENEW_SECONDS


def test_other_layers_are_a_higher_version_at_once_and_over_restarts(
    signer: Signer, state: LedgerState, clock: Wall
) -> None:
    assert said(signer).version == 1
    state.repruned_for, state.sub_llms = 6, (sub_llm("other"),)
    assert (said(signer).version, len(said(signer).manifests)) == (7, 1)
    assert said(Signer(KEY, state, (), size_of, clock)).version == 7


def test_a_receipt_is_signed_with_what_the_ledger_has(signer: Signer, state: LedgerState) -> None:
    update = ms.Digest("d" * 64)
    state.receipts[EDGE] = Collected(round=3, digest=update, num_examples=12, loss=0.5)
    made = signer.signed(EDGE, ms.Receipt(round=3, digest=update))
    assert isinstance(made, ms.Receipt)
    assert made.signed is not None
    assert read(made.signed, KEY.public, ReceiptStatement) == ReceiptStatement(
        run_id="r", round=3, edge=EDGE, digest=update, num_examples=12, accepted_at=1_000_000
    )


def test_only_an_offer_that_names_a_bundle_carries_its_statement(signer: Signer) -> None:
    offer = ms.RoundOffer(
        round=1, rounds=2, view=VIEW, alignment=0, emulator=VIEW, local=ms.LocalSettings(), due_seconds=1.0
    )
    assert signer.signed(EDGE, offer) == offer
    named = msgspec.structs.replace(offer, manifest=size_of(LARGE))
    assert signer.signed(EDGE, named) == msgspec.structs.replace(named, signed=signer.bundles())
    closed = ms.RoundClosed(round=1, num_updates=2)
    assert signer.signed(EDGE, closed) is closed
