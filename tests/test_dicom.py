"""DICOM: what a file's own window shows is what is seen, and nothing of the patient leaves it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, SecondaryCaptureImageStorage, generate_uid

from mmedexpert.data.images import changes
from mmedexpert.data.validation import validate
from mmedexpert.errors import UserError
from mmedexpert.sources import dicom
from mmedexpert.sources.dicom import numbered, open_picture, patient_of
from mmedexpert.sources.labelled import labelled_images

RAMP = np.arange(32 * 40, dtype=np.uint16).reshape(32, 40)


def write(path: Path, values: np.ndarray | None, **tags: Any) -> Path:
    """A DICOM file of grey values [H, W], frames [N, H, W] or colour [H, W, 3]."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    if values is not None:
        colour = values.ndim == 3 and values.shape[-1] == 3
        frames = values.shape[0] if values.ndim == 3 and not colour else 1
        data.Rows, data.Columns = values.shape[:2] if colour else values.shape[-2:]
        if frames > 1:
            data.NumberOfFrames = frames
        data.SamplesPerPixel = 3 if colour else 1
        if colour:
            data.PlanarConfiguration = 0
        data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
        data.HighBit = data.BitsStored - 1
        data.PixelRepresentation = int(values.dtype.kind == "i")
        raw = values.tobytes()
        data.PixelData = raw if data.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian else encapsulate([raw])
    for keyword, value in tags.items():
        setattr(data, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def grey(path: Path) -> np.ndarray:
    shown = np.asarray(open_picture(path))
    assert (shown == shown[..., :1]).all()
    return shown[..., 0].astype(int)


def test_the_window_of_the_file_says_what_is_black_and_white(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP, WindowCenter=600, WindowWidth=200)
    shown = grey(path)
    assert set(shown[RAMP <= 499]) == {0} and set(shown[RAMP >= 700]) == {255}
    # PS3.3 C.11.2.1.2.1
    inside = (RAMP > 500) & (RAMP < 699)
    wanted = ((RAMP[inside] - 599.5) / 199 + 0.5) * 255
    assert np.abs(shown[inside] - wanted).max() <= 1
    assert dicom.WINDOWED in changes(open_picture(path))


def test_slope_and_intercept_go_before_the_window(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.dcm", RAMP, WindowCenter=[600, 40], WindowWidth=[200, 400])
    scaled = write(tmp_path / "b.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=176, WindowWidth=399)
    assert np.abs(grey(plain) - grey(scaled)).max() <= 1


def test_signed_values_and_a_table_in_place_of_a_window(tmp_path: Path) -> None:
    signed = RAMP.astype(np.int16) - 600
    path = write(tmp_path / "a.dcm", signed, WindowCenter=0, WindowWidth=200)
    assert grey(path)[signed == -300][0] == 0 and grey(path)[signed == 300][0] == 255
    table = Dataset()
    table.LUTDescriptor = [2, 600, 8]  # below 601 black, from there on white
    table.add_new("LUTData", "US", [0, 255])
    path = write(tmp_path / "b.dcm", RAMP, VOILUTSequence=Sequence([table]), WindowCenter=5, WindowWidth=3)
    assert set(grey(path)[RAMP <= 600]) == {0} and set(grey(path)[RAMP > 600]) == {255}


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    window = {"WindowCenter": 600, "WindowWidth": 200}
    usual = grey(write(tmp_path / "a.dcm", RAMP, **window))
    path = write(tmp_path / "b.dcm", RAMP, PhotometricInterpretation="MONOCHROME1", **window)
    assert (grey(path) == 255 - usual).all()
    assert dicom.INVERTED in changes(open_picture(path))


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 600, "WindowWidth": 0}])
def test_without_a_usable_window_its_own_range_without_the_padding(tmp_path: Path, window: dict) -> None:
    values = RAMP.astype(np.int16)
    values[:8] = -2000
    path = write(tmp_path / "a.dcm", values, PixelPaddingValue=-2000, **window)
    shown = grey(path)
    assert dicom.OWN_RANGE in changes(open_picture(path))
    assert set(shown[:8].ravel()) == {0}
    assert shown[8, :5].max() <= 2 and shown[-1, -1] == 255 and 120 < shown[20, 0] < 135


def test_of_several_frames_the_middle_one_is_shown_and_told(tmp_path: Path) -> None:
    frames = np.stack([RAMP // 8, RAMP // 8 + 50, RAMP // 8 + 90]).astype(np.uint8)
    path = write(tmp_path / "a.dcm", frames, WindowCenter=128, WindowWidth=256)
    assert np.abs(grey(path) - frames[1]).max() <= 1
    assert dicom.MIDDLE in changes(open_picture(path))


def test_an_enhanced_file_has_a_window_for_each_frame(tmp_path: Path) -> None:
    frames = np.stack([RAMP] * 3)
    groups = []
    for center in (100, 600, 1100):
        window, group = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = center, 200
        group.FrameVOILUTSequence = Sequence([window])
        groups.append(group)
    path = write(tmp_path / "a.dcm", frames, PerFrameFunctionalGroupsSequence=Sequence(groups))
    one = write(tmp_path / "b.dcm", RAMP, WindowCenter=600, WindowWidth=200)
    assert (grey(path) == grey(one)).all()


def test_colour_stays_as_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    assert (np.asarray(open_picture(write(tmp_path / "a.dcm", values))) == values).all()


def test_what_identifies_a_person_is_counted_by_name_and_left_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP, PatientName="Doe^Jane", PatientID="4711", InstitutionName="St. Elsewhere",
                 BurnedInAnnotation="YES", StudyDate="")  # fmt: skip
    picture = open_picture(path)
    told = changes(picture)
    assert {name for name in told if "left behind" in name} == {
        f"DICOM: {name} present, left behind" for name in ("PatientName", "PatientID", "InstitutionName")
    }
    assert dicom.BURNT_IN in told
    assert not any(value in str(picture.info) for value in ("Doe", "4711", "Elsewhere"))


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda path: write(path, None, PatientName="Doe^Jane"), "without pixels (Secondary Capture Image Storage)"),
        (lambda path: write(path, RAMP, syntax=JPEGLSLossless), "JPEG-LS Lossless Image Compression, which cannot be"),
        (lambda path: path.write_bytes(write(path, RAMP).read_bytes()[:900]), "is damaged DICOM"),
        (lambda path: path.write_bytes(b"no picture"), "DICOM"),
        (lambda path: write(path, RAMP, Rows=40_000, Columns=40_000), "above the limit of 64000000"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path: Path, make: Any, told: str) -> None:
    path = tmp_path / "a.dcm"
    make(path)
    with pytest.raises(UserError) as caught:
        open_picture(path)
    assert told in str(caught.value) and "\n" not in str(caught.value) and "Doe" not in str(caught.value)


def test_patients_group_by_number(tmp_path: Path) -> None:
    names = ["4711", "", "0815", "4711", "ANONYMOUS"]
    paths = [write(tmp_path / f"{n}.dcm", RAMP, PatientID=name) for n, name in enumerate(names)]
    assert numbered([patient_of([path]) for path in paths]) == ["patient 1", "", "patient 2", "patient 1", ""]


def test_a_labelled_folder_of_dicom_files(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    rows = []
    for number in range(8):
        values = np.random.default_rng(number).integers(0, 4096, (32, 40), dtype=np.uint16)
        write(root / f"{number}.dcm", values, PatientID=f"MRN{number // 2}", PatientName="Doe^Jane")
        rows.append([f"{number}.dcm", ("here", "gone")[number % 2]])
    write(root / "report.dcm", None)
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "label"], *rows, ["report.dcm", "here"]])
    about = {"specialties": ["adult_medicine"], "distractors": ["Mass", "Cyst"]}
    (root / "dataset.yaml").write_text(json.dumps(about))
    records, image_root, bad = labelled_images(root, tmp_path / "out", seed=0)
    assert [record_id for record_id, _ in bad] == ["mine/report.dcm"] and "without pixels" in bad[0][1]
    assert bad.changed["images: DICOM: PatientName present, left behind"] == 8
    assert validate(records, image_root)[0] == records and len(records) == 8
    assert len({record.image_group for record in records}) == 4
    everything = str(records) + "".join(path.read_bytes().decode("latin-1") for path in image_root.rglob("*.png"))
    assert "MRN" not in everything and "Doe" not in everything
