"""Contamination: copies are found however they were saved, different patients are not, questions whatever the order."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmedexpert.data import overlap as contamination
from mmedexpert.data import pictures
from mmedexpert.data.images import open_image
from mmedexpert.data.overlap import Fingerprints, fingerprints, jaccard, normalised, overlap, report, word_pairs
from mmedexpert.data.pictures import Picture
from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.sources.medr1 import parse_problem


def record(
    name: str, image: str | tuple[str, ...], question: str = "What is it?", options: dict[str, str] | None = None
) -> Record:
    images = (image,) if isinstance(image, str) else image
    return Record(
        id=name, images=images, question=question, options=options, answer="A", specialties=("all",), source="made",
        license="CC0", split="test", image_group=name,
    )  # fmt: skip


def blurred(seed: int, side: int = 160) -> Image.Image:
    """A smooth random picture, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int = 80) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def of_images(folder: Path, images: dict[str, Image.Image], cache: Path | None = None) -> Fingerprints:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / name)
    return fingerprints([record(name, name) for name in images], folder, cache)


def found(train: Fingerprints, test: Fingerprints, **options: float) -> list[bool]:
    return overlap(train, test, **options).image.tolist()


# Images


def test_copies_are_found_and_others_are_not(tmp_path: Path) -> None:
    seen, other = blurred(1), blurred(2)
    train = of_images(tmp_path / "train", {"a.png": seen, "b.png": blurred(3)})
    test = of_images(
        tmp_path / "test",
        {
            "1_lossless.bmp": seen,
            "2_jpeg.png": as_jpeg(seen),
            "3_half.png": seen.resize((80, 80)),
            "4_grey.png": seen.convert("L"),
            "5_other.png": other,
        },
    )
    result = overlap(train, test)
    assert result.image.tolist() == [True, True, True, True, False]
    assert (result.images, result.images_exact, result.images_seen) == (5, 1, 4)
    assert result.clean == {"5_other.png"}
    assert found(train, test, max_distance=0)[0] and not any(found(of_images(tmp_path / "none", {}), test))


def test_flat_images_match_by_pixels_only(tmp_path: Path) -> None:
    def flat(value: int) -> Image.Image:
        return Image.new("RGB", (64, 64), (value,) * 3)

    def gradient(step: float) -> Image.Image:
        return Image.fromarray(np.tile((np.arange(128) * step).astype(np.uint8), (128, 1)))

    vignette = np.hypot(*np.mgrid[-64:64, -64:64]) / 30
    faint = [Image.fromarray((level - vignette).astype(np.uint8)) for level in (128, 90)]
    train = of_images(tmp_path / "train", {"black.png": flat(0), "ramp.png": gradient(1), "faint.png": faint[0]})
    others = {"grey.png": flat(90), "ramp.png": gradient(1.9), "faint.png": faint[1]}
    assert not any(found(train, of_images(tmp_path / "others", others)))
    assert found(train, of_images(tmp_path / "same", {"black.png": flat(0)})) == [True]
    assert found(train, of_images(tmp_path / "large", {"black.png": flat(0).resize((128, 32))})) == [False]


def test_any_of_several_images_counts(tmp_path: Path) -> None:
    train = of_images(tmp_path, {"a.png": blurred(1)})
    blurred(2).save(tmp_path / "b.png")
    test = fingerprints([record("both", ("b.png", "a.png")), record("new", ("b.png", "b.png"))], tmp_path, None)
    assert test.images[1] == (test.images[0][0],)
    assert found(train, test) == [True, False]


def random_pictures(seed: int, count: int, near: list[str]) -> tuple[Picture, ...]:
    """Balanced hashes; each third is one of `near` with a few bits of each kind swapped."""
    rng = np.random.default_rng(seed)
    pictures = []
    for number in range(count):
        bits = rng.permutation(np.repeat(np.array([0, 1], np.uint8), 128))
        if near and number % 3 == 0:
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(near[rng.integers(len(near))]), np.uint8))
            swapped = int(rng.integers(0, 8))
            for value in (0, 1):
                bits[rng.choice(np.flatnonzero(bits == value), swapped, replace=False)] ^= 1
        pictures.append(Picture(f"{seed}-{number}", np.packbits(bits).tobytes().hex(), 50.0))
    return tuple(pictures)


def bare(pictures: tuple[Picture, ...]) -> Fingerprints:
    names = tuple(picture.pixels for picture in pictures)
    return Fingerprints(names, tuple((row,) for row in range(len(names))), (), pictures, names, (), ())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 20))
def test_the_search_finds_the_pairs_that_a_comparison_of_all_finds(seed: int, max_distance: int) -> None:
    train = random_pictures(2 * seed, 30, [])
    test = random_pictures(2 * seed + 1, 30, [picture.phash for picture in train])
    pairs = contamination._near_images(bare(train), bare(test), max_distance)
    expected = {
        (i, j, distance)
        for i, a in enumerate(test)
        for j, b in enumerate(train)
        if (distance := (int(a.phash, 16) ^ int(b.phash, 16)).bit_count()) <= max_distance
    }
    assert {(i, j, distance) for i, near in pairs.items() for j, distance in near} == expected


# Questions


def test_only_image_and_question_of_one_training_record_are_joint(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        blurred(ord(name)).save(tmp_path / f"{name}.png")
    asked, other = "Is there a fracture of the left radius?", "Which modality was used for this picture?"
    told = [record("0", "a.png", "Where is the heart?"), record("1", "a.png", asked), record("2", "b.png", other)]
    train = fingerprints(told, tmp_path, None)
    test = [
        record("joint", "a.png", "is there a fracture of the left radius"),
        record("swapped", "b.png", asked),
        record("image", "a.png", "How old is the patient, roughly?"),
        record("question", "c.png", other),
        record("text", (), asked),
        record("new text", (), "What lowers blood pressure fastest?"),
    ]
    result = overlap(train, fingerprints(test, tmp_path, None))
    assert result.image.tolist() == [True, True, True, False, False, False]
    assert result.question.tolist() == [True, True, False, True, True, False]
    assert result.joint.tolist() == [True, False, False, False, False, False]
    assert result.clean == {"question", "new text"}
    assert [match.test_id for match in result.worst] == ["joint", "image", "swapped"]
    assert (result.worst[0].train_id, result.worst[0].distance, result.worst[0].jaccard) == ("1", -1, 1.0)
    assert [(row["count"], row["of"], row["share"]) for row in report(result)] == [
        ("2", "3", "66.7"), ("2", "3", "66.7"), ("3", "6", "50.0"), ("4", "6", "66.7"), ("1", "6", "16.7"),
        ("2", "6", "33.3"),
    ]  # fmt: skip


def test_options_belong_to_the_question_but_not_their_order_or_letters() -> None:
    def text(*options: str) -> str:
        return normalised(record("x", "i", "What is shown?", dict(zip("ABCD", options, strict=False))))

    assert text("Left lung", "Heart ") == text("heart", "LEFT  lung.")
    assert text("Left lung", "Heart") != text("Left lung", "Liver")
    assert normalised(record("x", "i", "\uff37hat is 肺部?")) == "what is 肺 部"  # a full-width W
    assert word_pairs("a b c\nd") == {"a b", "b c", "d"}


def test_rewordings_are_near_and_other_findings_are_not() -> None:
    def similar(a: str, b: str) -> float:
        return jaccard(*(word_pairs(normalised(record("x", "i", text))) for text in (a, b)))

    near = similar("Are the kidneys normal?", "Is/Are the kidneys normal?")
    far = similar("Is there air in the peritoneal cavity?", "Is there fluid in the peritoneal cavity?")
    assert far < contamination.MIN_JACCARD <= near


def test_minhash_proposes_what_is_near(tmp_path: Path) -> None:
    """Of 200 questions of 20 words, one of which is another (Jaccard 17/21), at least 198 are found; no other."""
    rng = np.random.default_rng(0)
    words = [[f"word{rng.integers(10_000)}" for _ in range(20)] for _ in range(200)]
    train = fingerprints([record(str(n), (), " ".join(text)) for n, text in enumerate(words)], tmp_path, None)
    changed = [[*text[:10], "changed", *text[11:]] for text in words]
    new = [[f"new{rng.integers(10_000)}" for _ in range(20)] for _ in range(200)]
    test = fingerprints([record(str(n), (), " ".join(text)) for n, text in enumerate(changed + new)], tmp_path, None)
    question = overlap(train, test).question
    assert question[:200].sum() >= 198 and not question[200:].any()


def test_what_minhash_misses_on_the_same_image_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = of_images(tmp_path, {"a.png": blurred(1)})
    monkeypatch.setattr(contamination, "_near_questions", lambda *_: [])
    result = overlap(one, one)
    assert result.joint.tolist() == result.question.tolist() == [True]


@pytest.mark.parametrize(("distance", "similarity"), [(-1, 0.7), (257, 0.7), (8, 0.0), (8, 1.1)])
def test_thresholds_out_of_range(distance: int, similarity: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        overlap(bare(()), bare(()), max_distance=distance, min_jaccard=similarity)


def test_an_empty_test_set(tmp_path: Path) -> None:
    result = overlap(of_images(tmp_path, {"a.png": blurred(1)}), bare(()))
    assert result.clean == frozenset() and {row["share"] for row in report(result)} == {"0.0"}


# The cache


def test_each_image_is_hashed_once_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(pictures, "open_image", lambda path: opened.append(path.name) or open_image(path))
    cache = tmp_path / "deep" / "cache.jsonl"
    first = of_images(tmp_path / "one", {"a.png": blurred(1), "b.png": blurred(2)}, cache)
    again = of_images(tmp_path / "two", {"c.png": blurred(1), "d.png": blurred(3)}, cache)
    assert opened == ["a.png", "b.png", "d.png"]
    assert again.pictures[0] == first.pictures[0] and first.pictures == of_images(tmp_path / "one", {
        "a.png": blurred(1), "b.png": blurred(2)}, None).pictures  # fmt: skip
    assert [set(json.loads(line)) for line in cache.read_text().split("\n")[1:]] == [
        {"file", "pixels", "phash", "grey_std"}
    ] * 3


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, cache = {f"{n}.png": blurred(n) for n in range(4)}, tmp_path / "cache.jsonl"
    whole = of_images(tmp_path / "i", images, cache)
    text = cache.read_text()
    cache.write_text(text[: text.rindex('"phash"') + 20])  # cut within the fourth image's line
    opened: list[str] = []
    monkeypatch.setattr(pictures, "open_image", lambda path: opened.append(path.name) or open_image(path))
    assert of_images(tmp_path / "i", images, cache).pictures == whole.pictures
    assert of_images(tmp_path / "i", images, cache).pictures == whole.pictures
    assert opened == ["3.png"]


def test_a_cache_of_an_older_way_to_open_images_is_made_anew(tmp_path: Path) -> None:
    images, cache = {f"{n}.png": blurred(n) for n in range(2)}, tmp_path / "cache.jsonl"
    whole = of_images(tmp_path / "i", images, cache)
    old = cache.read_text().replace("fingerprints 2", "fingerprints 1")
    cache.write_text(re.sub(r'"phash": "\w+', '"phash": "' + "0" * 64, old))
    assert of_images(tmp_path / "i", images, cache).pictures == whole.pictures
    assert cache.read_text().startswith('{"format": "mmedexpert image fingerprints 2"')


def test_a_damaged_line_is_hashed_anew(tmp_path: Path) -> None:
    images, cache = {f"{n}.png": blurred(n) for n in range(3)}, tmp_path / "cache.jsonl"
    whole = of_images(tmp_path / "i", images, cache)
    lines = cache.read_text().split("\n")
    cache.write_text("\n".join([lines[0], "[1, 2", '{"file": 3}', lines[2].replace('"phash": "', '"phash": "zz')]))
    assert of_images(tmp_path / "i", images, cache).pictures == whole.pictures


def test_another_kind_of_file_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"id": "1"}\n')
    with pytest.raises(UserError, match=r"records\.jsonl is no cache .*: delete it"):
        of_images(tmp_path / "i", {"a.png": blurred(1)}, path)
    assert path.read_text() == '{"id": "1"}\n'
    with pytest.raises(UserError, match="cannot be used"):
        fingerprints([], tmp_path, tmp_path)


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    for name in ("missing.png", "broken.png"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            fingerprints([record("1", name)], tmp_path, None)


# Real records


def test_vqa_rad_tests_on_images_of_its_training(shared: Path) -> None:
    folder = shared / "data" / "vqa_rad"
    made = []
    for split in ("train", "test"):
        rows = json.loads((folder / f"split_{split}set.json").read_text(encoding="utf-8"))
        records = [record(f"{split}-{n}", row["image_name"], row["question"]) for n, row in enumerate(rows)]
        made.append(fingerprints(records, folder / "images", None))
    result = overlap(*made)
    assert (result.images, result.images_exact, result.images_seen) == (203, 203, 203)
    assert result.image.all() and not result.clean and len(result.ids) == 451
    assert 0 < result.joint.sum() < result.question.sum() < 451


def test_med_r1_splits_share_images(shared: Path) -> None:
    folder = shared / "data" / "omnimedvqa"
    of_split: dict[str, list[Record]] = {"train": [], "test": []}
    for number, line in enumerate((folder / "records.jsonl").read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        of_split[row["split"]].append(record(str(number), row["image"], *parse_problem(row["problem"])))
    names = {split: {name for item in items for name in item.images} for split, items in of_split.items()}
    result = overlap(*(fingerprints(of_split[split], folder, None) for split in ("train", "test")))
    by_name = sum(item.images[0] in names["train"] for item in of_split["test"])
    assert result.image.sum() > by_name > 0  # copies under other names, too
    assert (result.images_exact, result.images, int(result.image.sum())) == (182, 284, 211)


@pytest.mark.parametrize("name", ["cxr_pediatric", "fundus", "ecg_cardiology"])
def test_real_images_are_found_again_and_other_patients_are_not(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "data" / "labelled" / name
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        files = sorted(row["file"] for row in csv.DictReader(file))[::4]
    train = fingerprints([record(file, file) for file in files], folder, None)
    copies: dict[str, Image.Image] = {}
    for row, file in enumerate(train.names):
        image = open_image(folder / file)
        copies[f"{row}.half.png"] = image.resize((image.width // 2, image.height // 2))
        copies[f"{row}.jpeg.png"] = as_jpeg(image)
    test = of_images(tmp_path, copies)
    pairs = contamination._near_images(train, test, contamination.MAX_DISTANCE)
    assert len(pairs) == len(copies) == 2 * len(train.names)
    for i, near in pairs.items():
        assert [train.names[seen] for seen, _ in near] == [train.names[int(test.names[i].split(".")[0])]]
