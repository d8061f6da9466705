"""Events reach all who listen, in their order."""

from fedsoda_hub.events import HubEvent, Waiting
from fedsoda_hub.serving.broadcast import Broadcast


def test_listeners_hear_what_is_said_since_they_began() -> None:
    heard: list[tuple[str, HubEvent]] = []
    tell = Broadcast(lambda event: heard.append(("first", event)))
    early, late = Waiting(why="for edges"), Waiting(why="for disk")
    tell(early)
    tell.begin(lambda event: heard.append(("second", event)))
    tell(late)
    assert heard == [("first", early), ("first", late), ("second", late)]
