"""Records, and engines that answer them in ways that are known: right, wrong, by a habit, not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mmedexpert.curation.steps import Records, Verdict, write_step
from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Ask, Reply, refusal

OPTIONS = {"A": "pneumonia", "B": "normal lung", "C": "fracture", "D": "large pleural effusion"}


def record(number: int, answer: str = "B", **fields) -> Record:
    plain = {
        "id": f"q{number}", "images": (f"{number}.png",), "question": f"What is shown in picture {number}?",
        "options": OPTIONS, "answer": answer, "specialties": (), "source": "test", "license": "-", "split": "train",
        "image_group": f"{number}",
    }  # fmt: skip
    return Record(**(plain | fields))


def stored(folder: Path, records: Iterable[Record]) -> Records:
    """The records as a step before left them."""
    return write_step("before", map(Verdict, records), folder, folder / "images", given=None)


def shown(ask: Ask) -> dict[str, str]:
    """The options of an ask, in the order in which it shows them."""
    lines = [line.partition(". ") for line in ask.text.split("\n")]
    return {letter: text for letter, dot, text in lines if dot and len(letter) == 1}


def letter_of(ask: Ask, text: str) -> str:
    """The letter under which an ask shows an option."""
    return next(letter for letter, other in shown(ask).items() if other == text)


def says(text: str) -> Callable[[Ask], str]:
    """Who always picks the option of that text."""
    return lambda ask: f"<think>It is so.</think><answer>{letter_of(ask, text)}</answer>"


def longest(ask: Ask) -> str:
    """Who always picks the longest option."""
    return says(max(shown(ask).values(), key=len))(ask)


class Fake:
    """An engine that says what it is told (None: it refuses), last question first, and may die on the way."""

    def __init__(self, say: Callable[[Ask], str | None], die_after: int | None = None) -> None:
        self.say, self.die_after = say, die_after
        self.asked: list[Ask] = []
        self.calls: list[int] = []

    def __call__(self, asks: Sequence[Ask]):
        self.calls.append(len(asks))
        for place in reversed(range(len(asks))):  # any order is allowed
            if len(self.asked) == self.die_after:
                raise KeyboardInterrupt
            self.asked.append(asks[place])
            text = self.say(asks[place])
            yield place, refusal("not about people") if text is None else Reply(text, 3, "stop", 0.1, None)
