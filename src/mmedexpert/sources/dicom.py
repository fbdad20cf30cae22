"""DICOM files as pictures: what their own window shows, upright in brightness; nothing of the patient but the pixels.

DICOM PS3.3 C.11 (modality LUT, VOI LUT, windows), PS3.15 annex E (what identifies a person). Reading is pydicom's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedexpert.data.images import MAX_PIXELS, ONE_COLOUR, TAILS, check_shape, open_image
from mmedexpert.data.table import NOBODY
from mmedexpert.errors import UserError

SUFFIXES = (".dcm", ".dicom", ".ima")  # of files that may lack the mark at byte 128
WIDE = 2**20  # ours: grey levels above which a table of them costs more than the picture
# what a picture's `changes` tell
MIDDLE, OWN_RANGE = "DICOM: several frames, the middle one is shown", "DICOM: no usable window, scaled by its own range"
WINDOWED, INVERTED = "DICOM: shown in its own window", "DICOM: MONOCHROME1, inverted"
BURNT_IN = "DICOM: says that an annotation is burnt into the picture: look at it"
# ours: the tags of PS3.15 table E.1-1 that are most often filled; none of any kind leaves, these are counted by name
PHI = (
    "AccessionNumber AcquisitionDate AdditionalPatientHistory AdmissionID ContentDate DeviceSerialNumber EthnicGroup "
    "InstitutionAddress InstitutionName InstitutionalDepartmentName IssuerOfPatientID MedicalRecordLocator "
    "NameOfPhysiciansReadingStudy Occupation OperatorsName OtherPatientIDs OtherPatientIDsSequence OtherPatientNames "
    "PatientAddress PatientAge PatientBirthDate PatientBirthName PatientBirthTime PatientComments PatientID "
    "PatientMotherBirthName PatientName PatientSex PatientSize PatientTelephoneNumbers PatientWeight "
    "PerformingPhysicianName PhysiciansOfRecord ReferringPhysicianName ReferringPhysicianTelephoneNumbers "
    "RequestingPhysician SeriesDate StationName StudyDate StudyID"
).split()
PRIVATE = "private tags"


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its mark, or by its suffix, as old ones have no mark."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" or path.suffix.lower() in SUFFIXES
    except OSError:
        return False


def open_picture(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file, or a DICOM file, as `data.images.open_image` gives it; its `changes` tell what was done to it.

    UserError as there, and for a DICOM file without pixels or in a compression that cannot be decoded here.
    """
    return _open_dicom(path, max_pixels) if is_dicom(path) else open_image(path, max_pixels=max_pixels)


def patient_of(paths: Sequence[Path]) -> str:
    """The first PatientID of DICOM files that names somebody, else nothing: to group by, not to keep."""
    from pydicom import dcmread

    for path in paths:
        if is_dicom(path):
            try:
                found = str(dcmread(path, force=True, specific_tags=["PatientID"], stop_before_pixels=True).PatientID)
            except Exception:  # a damaged file is told where its picture is opened
                continue
            if found.strip() and found.strip().casefold() not in NOBODY:
                return found.strip()
    return ""


def numbered(patients: Sequence[str]) -> list[str]:
    """Numbers in place of ids, in order: an id would tell who it is; nothing stays nothing."""
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(filter(None, patients)), start=1)}
    return [f"patient {numbers[patient]}" if patient else "" for patient in patients]


def _open_dicom(path: Path, max_pixels: int) -> Image.Image:
    from pydicom import dcmread  # here, because most commands read no DICOM

    told: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that break the standard and are read all the same
        try:
            data = dcmread(path, force=path.suffix.lower() in SUFFIXES)
            values = _frame(path, data, max_pixels, told)
            picture = Image.fromarray(values).convert("RGB")
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError(f"image {path} is missing: check the image root, or restore the file") from error
        except Exception as error:  # pydicom raises almost anything on damaged bytes
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"image {path} is damaged DICOM ({reason}): copy or export it again") from error
        found = [keyword for keyword in PHI if str(data.get(keyword, "")).strip()]
        found += [PRIVATE] if any(element.tag.is_private for element in data) else []
        told += [f"DICOM: {name} present, left behind" for name in found]
        if str(data.get("BurnedInAnnotation", "")).strip().upper() == "YES":
            told.append(BURNT_IN)
    check_shape(picture, str(path))
    if np.ptp(np.asarray(picture), axis=(0, 1)).max() == 0:
        told.append(ONE_COLOUR)
    picture.info = {"changes": tuple(told)}
    return picture


def _frame(path: Path, data: Any, max_pixels: int, told: list[str]) -> np.ndarray:
    """The middle frame as 8-bit grey [H, W] or RGB [H, W, 3]."""
    from pydicom.pixels import apply_color_lut, pixel_array

    if not any(name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = getattr(getattr(data.get("SOPClassUID"), "name", None), "strip", str)() or "no image"
        raise UserError(f"image {path} is DICOM without pixels ({kind}): leave it out")
    if int(data.Rows) * int(data.Columns) > max_pixels:
        size = f"{data.Columns} x {data.Rows} pixels, above the limit of {max_pixels}"
        raise UserError(f"image {path} has {size}: resize it, it was not decoded")
    _check_syntax(path, data)
    frames = int(data.get("NumberOfFrames") or 1)
    index = frames // 2  # ours: of a volume or a film the middle shows most; its slices are no samples of their own
    if frames > 1:
        told.append(MIDDLE)
    values = pixel_array(data, index=index)
    kind = str(data.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, data)
    if values.ndim == 3:
        return values if values.dtype == np.uint8 else (values >> (8 * values.dtype.itemsize - 8)).astype(np.uint8)
    shown = _grey(values, _of_frame(data, index), told)
    if kind == "MONOCHROME1":
        told.append(INVERTED)
        shown = 255 - shown
    return shown


def _check_syntax(path: Path, data: Any) -> None:
    from pydicom.pixels import get_decoder

    syntax = getattr(data.file_meta, "TransferSyntaxUID", None) if hasattr(data, "file_meta") else None
    if syntax is None:
        raise UserError(f"image {path} is DICOM without a transfer syntax: export it again")
    try:
        decodable = get_decoder(syntax).is_available
    except NotImplementedError:
        decodable = False
    if not decodable:
        fix = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or save it uncompressed"
        raise UserError(f"image {path} is compressed as {syntax.name}, which cannot be decoded here: {fix}")


def _of_frame(data: Any, index: int) -> Any:
    """What says how the grey of one frame is shown: of the file, or of an enhanced one's functional groups."""
    from pydicom.dataset import Dataset

    found = Dataset()
    groups = [data.get("SharedFunctionalGroupsSequence"), (data.get("PerFrameFunctionalGroupsSequence") or [])[index:]]
    inner = [item for group in groups if group for item in group[:1]]
    parts = [data]
    for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
        parts += [item for group in inner for item in (group.get(name) or [])[:1]]
    for part in parts:
        for keyword in ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter",
                        "WindowWidth", "VOILUTFunction"):  # fmt: skip
            if part.get(keyword) not in (None, ""):
                found.add(part[keyword])
    for keyword in ("BitsStored", "PixelRepresentation", "PhotometricInterpretation", "PixelPaddingValue"):
        if keyword in data:
            found.add(data[keyword])
    return found


def _grey(values: np.ndarray, about: Any, told: list[str]) -> np.ndarray:
    """Stored values [H, W] as 0..255, through rescale slope and window: once for each level, not for each pixel."""
    low, high = values.min(), values.max()
    if values.dtype.kind in "iu" and int(high) - int(low) < WIDE:
        levels = np.arange(int(low), int(high) + 1).astype(values.dtype)
        places = values.astype(np.int64) - int(low)
    else:
        levels, places = np.unique(values, return_inverse=True)
    padding = about.get("PixelPaddingValue")
    used = np.bincount(places.ravel(), minlength=len(levels)) * (levels != padding if padding is not None else 1)
    shares = _windowed(levels, used, about, told)
    table = np.round(np.nan_to_num(shares).clip(0.0, 1.0) * 255).astype(np.uint8)
    return table[places]


def _windowed(levels: np.ndarray, used: np.ndarray, about: Any, told: list[str]) -> np.ndarray:
    """Grey levels as shares of white; `used` counts the pixels of each."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    rescaled = apply_modality_lut(levels, about)
    try:
        if about.get("VOILUTSequence"):
            entries, first, bits = (int(value) for value in about.VOILUTSequence[0].LUTDescriptor)
            # clipped here: pydicom 3.0 lets what is far above a table of 8 bits wrap round
            inside = np.round(rescaled).astype(np.int64).clip(first, first + (entries or 65536) - 1)
            shares = apply_voi(inside, about) / (2.0**bits - 1)
            told.append(WINDOWED)
            return shares
        if "WindowCenter" in about and "WindowWidth" in about:
            # its ends come from the same function, as what it maps to depends on the file's bits and slope
            ends = apply_windowing(np.array([-1e12, 1e12]), about)
            shares = (apply_windowing(rescaled, about) - ends[0]) / (ends[1] - ends[0])
            told.append(WINDOWED)
            return shares
    except Exception:  # a window of no width, a broken table: as if there were none
        pass
    told.append(OWN_RANGE)
    counts = used if used.any() else np.ones_like(used)
    order = np.argsort(rescaled, kind="stable")
    percent = np.cumsum(counts[order]) / counts.sum() * 100
    low, high = (float(rescaled[order][int((percent < tail).sum())]) for tail in TAILS)
    if low >= high:  # little but background: the rest is the picture
        low, high = float(rescaled[counts > 0].min()), float(rescaled[counts > 0].max())
    return (rescaled - low) / ((high - low) or 1.0)
