"""Generate the demo's private data: short messages to a town's help line, and the desk each belongs to.

Three offices hold messages of their own kind: none sees all four desks in equal shares and each lacks one
entirely, so that no edge alone can learn the whole task. The evaluation is balanced, shares no message with any
training set, and half of it names things that no training message names. Training is the edges' matter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

PROMPT = "Message: {message}\nDesk:"
COMPLETION = "{desk}"
DESKS = ("farm", "food", "health", "road")

DemoRow = dict[str, str]


@dataclass(frozen=True)
class Office:
    """An edge of the demo: how many messages it holds for each desk."""

    name: str
    messages: dict[str, int]


OFFICES = (
    Office("village", {"farm": 180, "road": 90, "food": 50}),
    Office("market", {"food": 180, "health": 90, "farm": 50}),
    Office("city", {"health": 140, "road": 140, "food": 40}),
)
EVALUATION_ROWS = 320


@dataclass(frozen=True)
class Topic:
    """The messages of a desk: things, things that only the evaluation names, and what is said of a thing."""

    things: tuple[str, ...]
    unseen: tuple[str, ...]
    sayings: tuple[str, ...]


TOPICS = {
    "farm": Topic(
        things=("dog", "horse", "cow", "cat", "goat", "pig", "bird", "rabbit", "hen", "pony"),
        unseen=("sheep", "duck", "lamb", "puppy"),
        sayings=(
            "The {thing} will not eat the grass.",
            "My {thing} ran away into the forest.",
            "Our {thing} has a baby and needs a warm bed.",
            "The little {thing} is lost and cries all night.",
            "A {thing} is in my garden.",
            "The old {thing} bit my dog on the tail.",
            "The {thing} jumped over the fence.",
            "My {thing} wants to play with the cat.",
        ),
    ),
    "food": Topic(
        things=("bread", "cake", "soup", "cheese", "fish", "milk", "fruit", "pizza", "rice", "meat"),
        unseen=("butter", "salad", "cookies", "chicken"),
        sayings=(
            "Please bring some {thing} for dinner.",
            "The {thing} was cold and had too much salt.",
            "How long do I cook the {thing}?",
            "We want to eat {thing} with sugar.",
            "Can I have more {thing} on my plate?",
            "I would like {thing} and a cup of tea.",
            "How do you make {thing} at home?",
            "The {thing} tastes bad today.",
        ),
    ),
    "health": Topic(
        things=("son", "mother", "daughter", "father", "brother", "wife", "friend", "baby", "sister", "husband"),
        unseen=("grandma", "uncle", "child", "aunt"),
        sayings=(
            "My {thing} has a fever and cannot sleep.",
            "My {thing} feels sick and needs a doctor.",
            "My {thing} has broken an arm.",
            "The {thing} of my friend has pain in the head.",
            "My {thing} is ill and very weak.",
            "My {thing} fell down and there is blood.",
            "What can my {thing} take for a sore throat?",
            "My {thing} has a bad heart.",
        ),
    ),
    "road": Topic(
        things=("car", "bus", "truck", "train", "bike", "engine", "wagon", "taxi", "van", "wheel"),
        unseen=("motor", "tractor", "carriage", "ship"),
        sayings=(
            "The {thing} will not start.",
            "My {thing} stopped on the bridge.",
            "The {thing} makes a loud noise when I drive.",
            "Our {thing} is stuck in the street.",
            "A {thing} hit my car at the station.",
            "The {thing} is too late again.",
            "When does the {thing} leave for the city?",
            "The {thing} is broken and needs new oil.",
        ),
    ),
}

FRAMES = (
    "{}",
    "Hello. {}",
    "Good morning. {}",
    "Please help. {}",
    "Oh no! {}",
    "I have a question. {}",
    "{} Thank you.",
    "{} What should we do?",
    "{} Can you come?",
    "{} Please call me.",
    "{} It is important.",
)


def training(edge: int, seed: int) -> list[DemoRow]:
    """Generate the messages of office `edge` (0, 1, 2), shuffled, as rows {"message", "desk"}."""
    draw = random.Random(f"{seed}/training/{edge}")
    rows = [
        {"message": message, "desk": desk}
        for desk, count in OFFICES[edge].messages.items()
        for message in _messages(draw, desk, TOPICS[desk].things, count, seed, held_out=False)
    ]
    draw.shuffle(rows)
    return rows


def evaluation(seed: int) -> list[DemoRow]:
    """Generate EVALUATION_ROWS balanced rows {"message", "desk"}; half of a desk's messages name an unseen thing."""
    draw = random.Random(f"{seed}/evaluation")
    rows = []
    share = EVALUATION_ROWS // len(DESKS)
    for desk in DESKS:
        topic = TOPICS[desk]
        for things in (topic.things, topic.unseen):
            rows += [
                {"message": message, "desk": desk}
                for message in _messages(draw, desk, things, share // 2, seed, held_out=True)
            ]
    draw.shuffle(rows)
    return rows


def _messages(
    draw: random.Random, desk: str, things: Sequence[str], count: int, seed: int, *, held_out: bool
) -> list[str]:
    """Draw `count` different messages; a message belongs either to training or to evaluation, for all offices alike."""
    found: dict[str, None] = {}
    while len(found) < count:
        saying = draw.choice(TOPICS[desk].sayings).format(thing=draw.choice(things))
        message = draw.choice(FRAMES).format(saying)
        if _is_held_out(message, seed) == held_out:
            found[message] = None
    return list(found)


def _is_held_out(message: str, seed: int) -> bool:
    return random.Random(f"{seed}/held out/{message}").random() < 0.25
