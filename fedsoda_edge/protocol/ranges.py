"""Name the ranges that values of messages, events and settings may have, so that each is written once.

Which value has which range is said where the value stands.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Words = Annotated[str, Meta(min_length=1)]
