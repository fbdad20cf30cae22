"""Images, record folders, validation, fingerprints and splits."""

from __future__ import annotations

import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from mmedexpert.data.images import check_image, open_image
from mmedexpert.data.record import SPLITS, Record, Trace
from mmedexpert.data.records import fingerprint, load_records, save_records
from mmedexpert.data.splits import assign_splits, join_groups
from mmedexpert.data.validation import validate
from mmedexpert.errors import UserError

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
FORMATS: dict[str, dict[str, Any]] = {"png": {}, "jpg": {}, "bmp": {}, "gif": {}, "tif": {}, "webp": {"lossless": True}}


def noise(path: Path, seed: int = 0, size: tuple[int, int] = (16, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def record(number: int, **changes: object) -> Record:
    base = Record(
        id=f"r{number}",
        images=(f"images/{number}.png",),
        question="What does the image show?",
        options={"A": "Mass", "B": "No finding"},
        answer="B",
        specialties=("pediatrics",),
        source="test",
        license="CC0",
        split="train",
        image_group=f"g{number}",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        noise(tmp_path / f"images/{number}.png", seed=number)
    return tmp_path


# images


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_cut_file_is_never_filled_up(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some libraries leave it behind
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(NOISE).save(whole, **FORMATS[suffix])
    data, pixels = whole.read_bytes(), np.asarray(open_image(whole))
    refused = 0
    for share in (0.02, 0.2, 0.5, 0.8, 0.95, 0.99):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(data[: int(len(data) * share)])
        try:
            found = np.asarray(open_image(cut))
        except UserError:
            refused += 1
        else:
            assert np.array_equal(found, pixels)  # only the file's tail may be missing
    assert refused >= 4


def test_missing_folder_text_and_empty_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "drawing.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for name in ("absent.png", "text.png", "empty.png", "folder.png", "drawing.png"):
        for function in (open_image, check_image):
            with pytest.raises(UserError, match=name) as caught:
                function(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0))
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="9000 x 9000 pixels, above the limit of 64000000"):
        open_image(bomb)
    with pytest.raises(UserError, match="truncated or damaged"):  # had it been decoded, this would be the complaint
        open_image(bomb, max_pixels=90_000_000)
    with pytest.raises(UserError, match="above the limit of 191"):
        check_image(noise(tmp_path / "small.png"), max_pixels=191)
    check_image(tmp_path / "small.png", max_pixels=192)


def grey(path: Path) -> list[list[int]]:
    return np.asarray(open_image(path))[..., 0].tolist()


def test_deep_grey_is_scaled_by_the_bit_depth_it_uses(tmp_path: Path) -> None:
    twelve, eight = np.array([[0, 2000], [1000, 3000]] * 2), np.array([[0, 255], [100, 30]] * 2)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(twelve.astype(np.uint16)).save(tmp_path / name)
        assert open_image(tmp_path / name).mode == "RGB" and grey(tmp_path / name) == [[0, 125], [62, 187]] * 2
        assert check_image(tmp_path / name) == ("deep grey, scaled by its bit depth",)
        Image.fromarray((twelve * 2 // 3).astype(np.uint16)).save(tmp_path / name)  # darker, of the same series
        assert grey(tmp_path / name) == [[0, 83], [41, 125]] * 2
        Image.fromarray(eight.astype(np.uint16)).save(tmp_path / name)  # an 8-bit picture in a deep file
        assert grey(tmp_path / name) == eight.tolist()
    Image.fromarray(np.full((2, 2), 7, dtype=np.uint16)).save(tmp_path / "flat.png")
    assert grey(tmp_path / "flat.png") == [[7, 7], [7, 7]]
    assert "one colour all over" in check_image(tmp_path / "flat.png")
    Image.fromarray(np.array([[np.nan, 0.0], [1.0, np.inf]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert grey(tmp_path / "float.tif") == [[0, 0], [255, 255]]


def test_a_hot_pixel_turns_nothing_black_and_an_offset_keeps_its_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 4000, 400).reshape(20, 20).astype(np.uint16)
    hot = ramp.copy()
    hot[3, 4] = 65535
    for name, values in (("plain.png", ramp), ("hot.png", hot)):
        Image.fromarray(values).save(tmp_path / name)
    difference = np.asarray(open_image(tmp_path / "plain.png")) != np.asarray(open_image(tmp_path / "hot.png"))
    assert difference.any(-1).sum() == 1 and grey(tmp_path / "hot.png")[3][4] == 255

    # CT numbers with an offset of 32768 (as in DeepLesion), and with a sign: hardly any of the depth is used
    Image.fromarray((ramp // 4 + 32000).astype(np.uint16)).save(tmp_path / "ct.png")
    Image.fromarray(ramp.astype(np.int32) - 1024).save(tmp_path / "signed.tif")
    for name in ("ct.png", "signed.tif"):
        row = grey(tmp_path / name)
        assert row[0][0] == 0 and row[-1][-1] == 255 and row[10][0] in range(125, 131)
        assert check_image(tmp_path / name) == ("deep grey, scaled by its own range",)


def tiff(values: np.ndarray, photometric: int) -> bytes:
    """An uncompressed grey TIFF of 8 or 16 bits, written by hand: Pillow inverts in writing, too."""
    height, width = values.shape
    bits, data = values.dtype.itemsize * 8, values.tobytes()
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 3, height), (279, 4, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_inverted_at_any_depth(tmp_path: Path, dtype: type) -> None:
    values = np.linspace(0, np.iinfo(dtype).max, 48).reshape(6, 8).astype(dtype)
    (tmp_path / "black.tif").write_bytes(tiff(values, 1))
    (tmp_path / "white.tif").write_bytes(tiff(np.iinfo(dtype).max - values, 0))
    black, white = np.array(grey(tmp_path / "black.tif")), np.array(grey(tmp_path / "white.tif"))
    assert black[0, 0] == 0 and black[-1, -1] == 255
    assert np.abs(black - white).max() <= 1
    assert ("deep grey, inverted: white is zero" in check_image(tmp_path / "white.tif")) == (dtype == np.uint16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_16_bit_colour_is_read_where_its_upper_bits_are_used(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (6, 8, 3)).astype(np.uint16)
    for name, deep in (("full.png", values), ("low.png", values >> 4)):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
        header = struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert np.array_equal(np.asarray(open_image(tmp_path / "full.png")), values >> 8)
    with pytest.raises(UserError, match=r"low\.png is 16-bit colour that uses its low bits alone"):
        open_image(tmp_path / "low.png")


def test_of_several_frames_the_first_is_shown_and_told(tmp_path: Path) -> None:
    frames = [Image.fromarray(NOISE[:16, :16] // n) for n in (1, 2, 3)]
    for name in ("stack.tif", "film.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), NOISE[:16, :16])
        assert check_image(tmp_path / name) == ("several frames, the first is shown",)
    frames[0].save(tmp_path / "one.tif")
    assert check_image(tmp_path / "one.tif") == ()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_large_icc_profile_is_no_damage(tmp_path: Path, suffix: str) -> None:
    profile = np.random.default_rng(1).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    Image.fromarray(NOISE).save(tmp_path / f"printed.{suffix}", icc_profile=profile)
    assert open_image(tmp_path / f"printed.{suffix}").size == (64, 48)


def test_a_text_chunk_that_is_a_bomb_is_still_refused(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 * 2**20)))
    (tmp_path / "bomb.png").write_bytes(data[:33] + bomb + data[33:])
    with pytest.raises(UserError, match=r"bomb\.png is truncated or damaged \(Decompressed data too large"):
        check_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(("size", "fits"), [((900, 3), False), ((3, 900), False), ((600, 3), True), ((200, 1), True)])
def test_a_shape_that_cannot_be_patched_is_found_by_the_check(tmp_path: Path, size: tuple, fits: bool) -> None:
    """By the rule of the image processor that will patch it: what the check passes, the encoder takes."""
    from mmedexpert.models.tiny import build_image_processor

    noise(tmp_path / "strip.png", size=size)
    if fits:
        check_image(tmp_path / "strip.png")
        picture = open_image(tmp_path / "strip.png")
    else:
        with pytest.raises(UserError, match=rf"strip\.png has {size[0]} x {size[1]} pixels, which Qwen-VL cannot"):
            check_image(tmp_path / "strip.png")
        picture = Image.open(tmp_path / "strip.png")
    try:
        found = build_image_processor(56)(images=[picture], return_tensors="np")["pixel_values"]
    except ValueError:
        assert not fits
    else:
        assert fits and np.ptp(found) > 1


def test_palette_alpha_grey_and_cmyk_become_rgb(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.save(tmp_path / "alpha.png")
    clear.quantize(8).save(tmp_path / "palette.png")
    for name in ("alpha.png", "palette.png"):
        picture = open_image(tmp_path / name)
        assert picture.getpixel((0, 0)) == (255, 0, 0)
        assert picture.getpixel((3, 3)) == (255, 255, 255)
    for mode, name in (("L", "grey.png"), ("1", "bits.png"), ("LA", "grey_alpha.png"), ("CMYK", "print.jpg")):
        Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / name)
        picture = open_image(tmp_path / name)
        assert picture.mode == "RGB"
        assert min(picture.getpixel((1, 1))) > 250


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # what an orientation asks for, by hand
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE).save(tmp_path / f"turned.{suffix}", exif=exif, **FORMATS[suffix])
    assert np.array_equal(np.asarray(open_image(tmp_path / f"turned.{suffix}")), UPRIGHT[orientation](NOISE))


def exif_jpeg(path: Path, entries: list[tuple[int, int, int, bytes]], head: bytes = b"II*\0") -> Path:
    """A JPEG of 64 x 48 pixels whose EXIF block holds (tag, type, count, four bytes)."""
    Image.fromarray(NOISE).save(path)
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)
    block = b"Exif\0\0" + head + struct.pack("<I", 8) + ifd
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:])
    return path


TURN = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    "odd", [(296, 2, 4, b"cm \0"), (259, 2, 4, b"JPG\0"), (256, 9, 1, struct.pack("<i", -1)),
            (296, 4, 1, struct.pack("<I", 70000)), (0x8769, 2, 4, b"abc\0"), (305, 7, 4, b"\xff\xfe\0a")],
)  # fmt: skip
def test_an_odd_exif_tag_does_not_lose_a_picture(tmp_path: Path, odd: tuple) -> None:
    path = exif_jpeg(tmp_path / "odd.jpg", sorted([TURN, odd]))
    plain = exif_jpeg(tmp_path / "plain.jpg", [TURN])
    assert check_image(path) == ()
    assert open_image(path).size == (48, 64)
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(open_image(plain)))


def test_an_unreadable_exif_block_is_told(tmp_path: Path) -> None:
    path = exif_jpeg(tmp_path / "torn.jpg", [TURN], head=b"XX*\0")
    assert open_image(path).size == (64, 48)
    assert check_image(path) == ("unreadable EXIF, shown as stored",)


# record folders

words = st.text(max_size=12)
records_strategy = st.builds(
    record,
    st.integers(0, 3),
    question=words,
    options=st.none() | st.dictionaries(st.sampled_from("ABCD"), words),
    specialties=st.lists(words, max_size=2).map(tuple),
    trace=st.none() | st.builds(Trace, words, st.lists(words, max_size=3).map(tuple)),
    latent=st.dictionaries(words, st.integers() | words | st.floats(allow_nan=False), max_size=2),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(records_strategy, max_size=4))
def test_save_and_load_are_inverse(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    home = tmp_path_factory.mktemp("folder")
    for number in range(4):
        noise(home / f"images/{number}.png", seed=number)
    save_records(records, home, home)
    loaded, root = load_records(home)
    assert loaded == records
    assert root == home.resolve()
    assert fingerprint(loaded, root) == fingerprint(records, home)


def test_the_files_are_plain_and_the_folder_can_move(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    records = [record(0), record(1, split="test", specialties=("cardiology", "adult_medicine"))]
    save_records(records, folder, folder, skipped=[("r9", "broken")])
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset == {
        "image_root": ".",
        "source_root": None,
        "counts": {"train": {"pediatrics": 1}, "test": {"cardiology": 1, "adult_medicine": 1}},
        "skipped": [{"id": "r9", "reason": "broken"}],
    }
    assert json.loads((folder / "records.jsonl").read_text().splitlines()[0])["options"]["B"] == "No finding"
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "images", "records.jsonl"]
    before = fingerprint(*load_records(folder))
    moved = folder.rename(tmp_path_factory.mktemp("elsewhere") / "moved")
    assert fingerprint(*load_records(moved)) == before

    apart = tmp_path_factory.mktemp("apart")
    save_records(records, apart, moved)
    assert load_records(apart)[1] == moved.resolve()


def test_a_failed_write_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_records([record(0)], folder, folder)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_records([record(0), record(1)], folder, folder)
    assert [one.id for one in load_records(folder)[0]] == ["r0"]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row.pop("license"), "missing license"),
        (lambda row: row.update(colour="red"), "unknown colour"),
        (lambda row: row.update(images="images/0.png"), "wrong type of value in images"),
        (lambda row: row.update(options=["x", "y"]), "wrong type of value in options"),
        (lambda row: row.update(trace={"steps": []}), "wrong type of value in trace"),
        (lambda row: row.update(answer=1, latent=[]), "wrong type of value in answer, latent"),
    ],
)
def test_a_damaged_line_is_named(folder: Path, change: Callable[[dict], object], told: str) -> None:
    save_records([record(0), record(1)], folder, folder)
    first, second = (folder / "records.jsonl").read_text().splitlines()
    row = json.loads(second)
    change(row)
    (folder / "records.jsonl").write_text(f"{first}\n{json.dumps(row)}\n")
    with pytest.raises(UserError, match=f"line 2: {told}"):
        load_records(folder)
    (folder / "records.jsonl").write_text(f"{first}\n{second[:40]}\n")
    with pytest.raises(UserError, match="line 2"):
        load_records(folder)
    (folder / "records.jsonl").unlink()
    with pytest.raises(UserError, match=r"records\.jsonl cannot be read"):
        load_records(folder)


# validation


def test_good_records_pass_and_each_image_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    monkeypatch.setattr("mmedexpert.data.validation.check_image", lambda path: seen.update([path.name]))
    records = [record(0), record(1, options=None, answer="in the left lobe"), record(2, images=("images/0.png",))]
    assert validate(records, folder) == (records, [])
    assert seen == {"0.png": 1, "1.png": 1}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"options": None}, "letter B but there are no options"),
        ({"options": {"B": "Mass"}}, "1 option"),
        ({"answer": "C"}, "'C' is none of the options A, B"),
        ({"answer": " "}, "answer is empty"),
        ({"options": {"A": "Mass", "B": "Mass"}}, "under another letter"),
        ({"options": {"A": "no  FINDING", "B": "No finding"}}, "stands under another letter"),
        ({"question": "half a pair \ud800"}, "no Unicode"),
        ({"options": {"A": "Mass</answer>", "B": "No finding"}}, "holds the tag </answer>"),
        ({"trace": Trace("bayesian", ("so <Answer>A",))}, "holds the tag <Answer>"),
        ({"question": " \n"}, "question is empty"),
        ({"specialties": ()}, "no specialty"),
        ({"split": "dev"}, "split 'dev'"),
        ({"image_group": ""}, "image_group is empty"),
        ({"images": ()}, "no image"),
        ({"images": ("../secret.png",)}, "leaves the image root"),
        ({"images": ("/etc/secret.png",)}, "absolute"),
        ({"images": ("images/absent.png",)}, "absent.png"),
        ({"images": ("images/0.png", "images/cut.png")}, "cut.png"),
        ({"id": "r0"}, "occurs twice"),
        ({"image_group": "g0", "split": "val"}, "'g0'"),
    ],
)
def test_each_problem_is_refused_by_name(folder: Path, changes: dict, told: str) -> None:
    data = noise(folder / "images/big.png", size=(64, 64)).read_bytes()
    (folder / "images/cut.png").write_bytes(data[: len(data) // 2])
    bad_one = record(1, **changes)
    with pytest.raises(UserError, match=told) as caught:
        validate([record(0), bad_one, record(2)], folder)
    message = str(caught.value)
    assert "data.on_bad_record=skip" in message
    assert repr(bad_one.id) in message or changes.get("split") == "val"  # of a group in two splits, val is kept

    good, bad = validate([record(0), bad_one, record(2)], folder, on_bad_record="skip")
    assert len(good) == 2
    assert len(bad) == 1
    assert told in bad[0][1]


@pytest.mark.parametrize(("one", "other"), [("Aa", "AA"), ("rS", "RS"), ("T1", "t1"), ("Mass", "Masses")])
def test_options_whose_case_is_their_meaning_are_two(folder: Path, one: str, other: str) -> None:
    records = [record(0, options={"A": one, "B": other})]
    assert validate(records, folder) == (records, [])


def test_what_images_are_changed_is_counted_once_for_each(folder: Path) -> None:
    Image.fromarray(np.arange(400).reshape(20, 20).astype(np.uint16) * 9).save(folder / "images/0.png")
    Image.new("RGB", (20, 20), "black").save(folder / "images/1.png")
    records = [record(0), record(1), record(2, images=("images/0.png",)), record(3)]
    _, left = validate(records, folder)
    assert left.changed == {"images: deep grey, scaled by its bit depth": 1, "images: one colour all over": 1}


def test_a_group_in_two_splits_keeps_its_test_records(folder: Path) -> None:
    splits = ["train", "test", "val", "train"]
    records = [record(n, image_group="same", split=split) for n, split in enumerate(splits)]
    good, bad = validate(records, folder, on_bad_record="skip")
    assert [one.id for one in good] == ["r1"]
    assert [record_id for record_id, _ in bad] == ["r0", "r2", "r3"]


def test_what_a_source_refused_counts(folder: Path) -> None:
    assert validate([record(0)], folder, bad=[("x", "no options")], on_bad_record="skip")[1] == [("x", "no options")]
    with pytest.raises(UserError, match="'x': no options"):
        validate([record(0)], folder, bad=[("x", "no options")])
    with pytest.raises(ValueError, match="ignore"):
        validate([], folder, on_bad_record="ignore")


def test_the_fingerprint_sees_texts_order_and_pixels_only(folder: Path) -> None:
    records = [record(0), record(1)]
    base = fingerprint(records, folder)
    assert fingerprint([record(0), record(1)], folder) == base
    (folder / "images/0.png").touch()
    assert fingerprint(records, folder) == base
    assert fingerprint([record(0), record(1, answer="A")], folder) != base
    assert fingerprint(records[::-1], folder) != base
    noise(folder / "images/0.png", seed=9)
    assert fingerprint(records, folder) != base
    (folder / "images/0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png"):
        fingerprint(records, folder)


# splits

groups_strategy = st.lists(st.tuples(st.integers(0, 30).map(str), st.sampled_from("xyz")), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(groups_strategy, st.integers(0, 5), st.randoms(use_true_random=False))
def test_splits_are_by_group_and_do_not_depend_on_order(rows: list, seed: int, rng: object) -> None:
    groups, strata = [list(column) for column in zip(*rows, strict=True)]
    splits = assign_splits(groups, seed=seed, strata=strata)
    by_group: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        by_group.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in by_group.values())
    rng.shuffle(rows)  # type: ignore[attr-defined]
    again = assign_splits([group for group, _ in rows], seed=seed, strata=[stratum for _, stratum in rows])
    assert {(group, split) for (group, _), split in zip(rows, again, strict=True)} == set(
        zip(groups, splits, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 200), st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0.0, 0.5), (0.0, 0.0, 1.0), (0.98, 0.01, 0.01)]))
def test_shares_are_kept_and_no_wanted_split_is_empty(n: int, fractions: tuple[float, float, float]) -> None:
    found = Counter(assign_splits([str(number) for number in range(n)], fractions=fractions, seed=1))
    for split, fraction in zip(SPLITS, fractions, strict=True):
        assert (found[split] > 0) == (fraction > 0)
        assert abs(found[split] - n * fraction) <= 2


def test_small_strata_reach_the_test_split() -> None:
    assert assign_splits(["only"], seed=0) == ["train"]
    assert sorted(assign_splits(["a", "b"], seed=0)) == ["test", "train"]
    assert sorted(assign_splits(["a", "b", "c"], seed=0)) == ["test", "train", "val"]
    names = [str(number) for number in range(100)]
    assert assign_splits(names, seed=0) != assign_splits(names, seed=1)
    for wrong in ((0.7, 0.1, 0.1), (1.2, -0.1, -0.1)):
        with pytest.raises(ValueError, match="sum to 1"):
            assign_splits(names, fractions=wrong, seed=0)


def test_rows_that_share_a_key_share_a_group() -> None:
    keys = [["image:1", "p:a"], ["image:2", "p:b"], ["image:1", "p:c"], ["image:3"], ["p:c", "image:4"]]
    assert join_groups(keys) == ["image:1", "image:2", "image:1", "image:3", "image:1"]
    assert join_groups(keys[::-1]) == join_groups(keys)[::-1]
    with pytest.raises(ValueError, match="without keys"):
        join_groups([[]])
