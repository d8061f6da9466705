"""Let a model write many texts together: one id of each a step, and a text that is finished makes room for the next.

A text is a generator. It yields what should stand before its next id, and is sent the id that the model drew. Ids that
it yields without having been sent them, such as a template's own words, are fed one a step like all others, so that a
step is one matrix product for all texts, whatever each of them is at. Keys and values of a text stay as long as they are
those of its beginning. What is written is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from fedsoda_edge.model.sub_llm import SubLLM

TEXTS = 128  # at once: with more of them a step's products hardly get quicker
CACHE_BYTES = 1 << 30  # of keys and values, at most
GROWTH = 64  # positions by which the cache grows

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """The next need of a text: an id behind `ids`, drawn from the `among` likeliest; None: from the whole vocabulary."""

    ids: Sequence[int]
    among: int | None


Text: TypeAlias = Generator[Ask, int, T]  # sent the ids that it asks for; returns what was written


def continuation(
    start: Sequence[int],
    most: int,
    *,
    ends: Container[int],
    among: int,
    broad: int = 0,
    made: list[int] | None = None,
    is_over: Callable[[list[int]], bool] | None = None,
) -> Text[list[int]]:
    """Continue a text until the model ends it, and return the new ids without its end.

    Args:
        most: how many ids are written at most.
        ends: the ids by which the model ends a text.
        among: how many likeliest ids are drawn from; 1: always the likeliest.
        broad: how many of the new ids, from the first on, are drawn from the whole vocabulary instead.
        made: the list that takes the new ids one by one; None: one that nobody sees before the end.
        is_over: tells whether the new ids are enough.
    """
    made = [] if made is None else made
    ids = list(start)
    for number in range(most):
        drawn = yield Ask(ids, None if number < broad else among)
        if drawn in ends:
            break
        ids.append(drawn)
        made.append(drawn)
        if is_over is not None and is_over(made):
            break
    return made


@dataclass
class _Begun(Generic[T]):
    """A text that is being written: its place in the order in which texts began, and what it needs next."""

    number: int
    text: Text[T]
    ask: Ask


class Writer:
    """A model that writes texts. On a CPU the same seed draws the same ids.

    Args:
        longest: ids of a text, at most; with CACHE_BYTES it decides how many are written at once.
    """

    def __init__(self, model: SubLLM, *, longest: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.positions = int(model.model.config.max_position_embeddings)
        self._model = model
        self._rows = texts_at_once(model.model.config, min(longest, self.positions), model.dtype)
        self._cache = _Cache(self._rows)
        self._held: list[list[int]] = [[] for _ in range(self._rows)]  # the ids of each row's keys and values

    def write(self, begin: Callable[[], Text[T] | None]) -> Iterator[T]:
        """Write texts, and yield what they return in the order in which they began.

        Args:
            begin: called whenever there is room; returns the next text, or None as long as there should be none. All
                that was yielded has been taken then.
        """
        writing: list[_Begun[T]] = []
        over: dict[int, T] = {}  # by number
        begun = yielded = 0
        while True:
            while len(writing) < self._rows and (text := begin()) is not None:
                if (ask := _next(text, None, over, begun)) is not None:
                    writing.append(_Begun(begun, text, ask))
                begun += 1
                while yielded in over:
                    yield over.pop(yielded)
                    yielded += 1
            if not writing:
                return
            for row, drawn in sorted(self._step([one.ask for one in writing]).items(), reverse=True):
                one = writing[row]
                if (ask := _next(one.text, drawn, over, one.number)) is not None:
                    one.ask = ask
                    continue
                last = writing.pop()
                if row < len(writing):
                    writing[row] = last
                    self._cache.copy(len(writing), row)
                    self._held[row] = list(self._held[len(writing)])
            while yielded in over:
                yield over.pop(yielded)
                yielded += 1

    def _step(self, asks: Sequence[Ask]) -> dict[int, int]:
        """Feed each row its next id; return the ids drawn for the rows that have all they asked for."""
        lengths, fed = [], []
        for held, ask in zip(self._held, asks, strict=False):
            same = _same(held, ask.ids)
            held[same:] = [ask.ids[same]]
            lengths.append(same)
            fed.append(ask.ids[same])
        device = self._model.device
        places = torch.tensor(lengths, device=device)
        with torch.inference_mode():
            hidden = self._model.hidden(
                ids=torch.tensor(fed, device=device)[:, None],
                positions=places[:, None],
                mask=self._masks(places, max(lengths) + 1),
                cache=self._cache.at(places, max(lengths) + 1),
            )[:, 0]
            whole = [row for row, ask in enumerate(asks) if lengths[row] + 1 == len(ask.ids)]
            drawn: dict[int, int] = {}
            for among in dict.fromkeys(asks[row].among for row in whole):
                rows = [row for row in whole if asks[row].among == among]
                drawn |= dict(zip(rows, self._draw(hidden[rows], among), strict=True))
        return drawn

    def _masks(self, places: Tensor, width: int) -> Any:
        """Make what the base model takes as its mask: (rows, 1, 1, width) bool, by kind of layer where these differ."""
        columns, own = torch.arange(width, device=places.device), places[:, None]
        full = (columns <= own)[:, None, None]
        window = getattr(self._model.model.config, "sliding_window", None)
        near = full if window is None else full & (columns > own - window)[:, None, None]
        if "layer_types" in self._model.family.fields:
            return {"full_attention": full, "sliding_attention": near}
        return near

    def _draw(self, hidden: Tensor, among: int | None) -> list[int]:
        """Draw an id after each of these states (rows, C)."""
        scores = self._model.model.get_submodule(self._model.family.head)(hidden).float()
        ids = None
        if among is not None:
            scores, ids = scores.topk(min(among, scores.shape[1]))
        reached = scores.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
        at = torch.rand(len(scores), 1, dtype=torch.float64, generator=self.generator).to(reached.device)
        place = torch.searchsorted(reached, at * reached[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return list((place if ids is None else ids.gather(1, place))[:, 0].tolist())


def texts_at_once(config: Any, longest: int, dtype: torch.dtype) -> int:
    """Count the texts that are written at once."""
    return max(1, min(TEXTS, CACHE_BYTES // (longest * _position_bytes(config, dtype))))


def cache_bytes(config: Any, longest: int, dtype: torch.dtype) -> int:
    """Count the bytes of keys and values of all texts that are written at once, at most."""
    return texts_at_once(config, longest, dtype) * longest * _position_bytes(config, dtype)


def _position_bytes(config: Any, dtype: torch.dtype) -> int:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * width * dtype.itemsize)


def _next(text: Text[T], drawn: int | None, over: dict[int, T], number: int) -> Ask | None:
    """Continue a text with the id that was drawn for it; where it ends, note what it returns under its number."""
    try:
        return next(text) if drawn is None else text.send(drawn)
    except StopIteration as end:
        over[number] = end.value
        return None


def _same(held: Sequence[int], ids: Sequence[int]) -> int:
    """Count the ids that both begin with, at most all but the last of `ids`."""
    most = min(len(held), len(ids) - 1)
    if list(ids[:most]) == list(held[:most]):
        return most
    return next(at for at in range(most) if held[at] != ids[at])


class _Cache:
    """Keys and values of texts of different lengths, in the place of Transformers' own cache: a row each, from the left.

    A step writes one position of each row. What lies behind it is of an earlier text, and masked.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values (rows, heads, positions, D)
        self._places = torch.empty(0, dtype=torch.int64)
        self._width = 0

    def at(self, places: Tensor, width: int) -> _Cache:
        """Set where the next step writes in the first rows, one of `places` each, and how many positions it returns."""
        self._places, self._width = places, width
        return self

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (B, heads, 1, D) of a layer, as its attention asks for; return those of all positions so far."""
        held = self._layers.get(layer_idx)
        if held is None or held[0].shape[2] < self._width:
            held = self._layers[layer_idx] = tuple(
                self._grown(None if held is None else held[kind], new) for kind, new in enumerate((keys, values))
            )
        rows = torch.arange(len(keys), device=keys.device)
        for whole, new in zip(held, (keys, values), strict=True):
            whole[rows, :, self._places] = new[:, :, 0]
        return tuple(whole[: len(keys), :, : self._width] for whole in held)

    def _grown(self, held: Tensor | None, new: Tensor) -> Tensor:
        positions = -(-self._width // GROWTH) * GROWTH
        grown = new.new_zeros(self._rows, new.shape[1], positions, new.shape[3])
        if held is not None:
            grown[:, :, : held.shape[2]] = held
        return grown

    def copy(self, source: int, target: int) -> None:
        """Copy a row to another one."""
        with torch.inference_mode():
            for pair in self._layers.values():
                for whole in pair:
                    whole[target] = whole[source]
