"""Another question's image: which one, and that the page tells what it changes."""

from __future__ import annotations

from solving import record

from mmedexpert.evaluation.swap import swapped


def image(number: int, **fields):
    return record(number, **({"images": (f"{number}.png",), "modality": "CT"} | fields))


def test_the_next_question_of_the_modality_on_another_image():
    records = [image(3), image(1), image(2, image_group="1"), image(4, modality="MRI"), image(5, modality="MRI")]
    found = swapped(records)
    assert found == {"q1": ("3.png",), "q2": ("3.png",), "q3": ("1.png",), "q4": ("5.png",), "q5": ("4.png",)}
    assert list(found) == [one.id for one in records]


def test_another_modality_before_its_own_image_and_never_another_number_of_images():
    records = [image(1, modality="US"), image(2), image(3, images=("3a.png", "3b.png")), image(4, images=())]
    found = swapped(records)
    assert found["q1"] == ("2.png",) and found["q2"] == ("1.png",)
    assert found["q3"] == ("3a.png", "3b.png") and found["q4"] == ()  # nobody else has as many
