"""Edges and properties of reading and writing scans (the lessons themselves are checked in chapter 1)."""
import json
import logging
import os
import random
import shutil
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian,
                         ImplicitVRLittleEndian, MRImageStorage, RLELossless, generate_uid)
from scipy.spatial.transform import Rotation

from mits_nb.core import MitsError, OutputError, ScanError
from mits_nb.scan import SUFFIXES, Scan, list_series, marker_text, read_scan, resample, resample_tensor, show_slices, sidecar_path, window, write_scan

FORGED = {"kind": "forged", "action": "inject", "at": [2, 10, 8], "box": [[1, 4], [6, 14], [4, 12]]}
PROTECTED = {"kind": "protected", "by": "mitsgan-tiny", "seed": 0}


def volume(shape=(6, 20, 16), seed=0, low=-1000, high=1500):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)


def write_series(folder, stored, positions=None, *, iop=(1, 0, 0, 0, 1, 0), slopes=1, intercepts=-1024, signed=False, bits=16,
                 syntax=ExplicitVRLittleEndian, names=None, series="a", sop=CTImageStorage, spacing=(0.7, 0.8), **tags):
    "A series written with pydicom alone, so that the reader is not checked against our own writer."
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for k, pixels in enumerate(stored):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = syntax
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop, generate_uid(entropy_srcs=[series, str(k)])
        ds = FileDataset(None, {}, file_meta=meta, is_implicit_VR=syntax == ImplicitVRLittleEndian, is_little_endian=syntax != ExplicitVRBigEndian)
        ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = sop, meta.MediaStorageSOPInstanceUID, generate_uid(entropy_srcs=[series])
        ds.Modality, ds.PatientID, ds.ImageType = "CT", "test", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImagePositionPatient = list(positions[k]) if positions is not None else [-50.5, -60.25, 10 + 2.5 * k]
        ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = list(iop), list(spacing), 9
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *pixels.shape, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)
        ds.RescaleSlope, ds.RescaleIntercept = (float(np.broadcast_to(v, len(stored))[k]) for v in (slopes, intercepts))
        for name, value in tags.items(): ds.add_new(name, "US", value) if name.startswith("PixelPadding") else setattr(ds, name, value)
        kind = np.dtype("i2" if signed else "u2").newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")
        ds.PixelData = pixels.astype(kind).tobytes()
        ds["PixelData"].VR = "OW"
        if syntax == RLELossless: ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian; ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(folder / (names[k] if names else f"s{k}.dcm"), enforce_file_format=True)
    return folder


def gdcm_pack(source, target, name):
    "Copy a series with its pixels packed by GDCM."
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm (extra decoders) is not installed")
    target.mkdir()
    for path in source.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name))), change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(target / path.name)), writer.SetFile(reader.GetFile()), writer.SetImage(change.GetOutput())
        assert writer.Write()
    return target


def write_enhanced(path, stored, *, positions=None, slopes=1, intercepts=-1024, iop=(1, 0, 0, 0, 1, 0), syntax=ExplicitVRLittleEndian, frame_type="AXIAL", shared_rescale=False, spacing=(0.7, 0.8), series="e"):
    "An enhanced multi-frame CT, written with pydicom alone."
    path.parent.mkdir(exist_ok=True)
    item = lambda **tags: pydicom.Sequence([dataset(**tags)])
    def dataset(**tags):
        ds = pydicom.Dataset()
        for name, value in tags.items(): setattr(ds, name, value)
        return ds
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.2.1", generate_uid(entropy_srcs=[series])
    ds = FileDataset(None, {}, file_meta=meta)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, generate_uid(entropy_srcs=[series, "s"]), "1.2.3"
    ds.Modality, ds.PatientID, ds.PatientName, ds.ImageType, ds.SeriesDescription = "CT", "test", "A^B", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "Chest"
    ds.NumberOfFrames, (ds.Rows, ds.Columns), ds.SamplesPerPixel, ds.PhotometricInterpretation = len(stored), stored[0].shape, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    rescale = lambda k: item(RescaleSlope=float(np.broadcast_to(slopes, len(stored))[k]), RescaleIntercept=float(np.broadcast_to(intercepts, len(stored))[k]), RescaleType="HU")
    shared = dataset(PixelMeasuresSequence=item(PixelSpacing=list(spacing), SliceThickness=9), PlaneOrientationSequence=item(ImageOrientationPatient=list(iop)))
    if shared_rescale: shared.PixelValueTransformationSequence = rescale(0)
    ds.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    frames = []
    for k in range(len(stored)):
        frame = dataset(PlanePositionSequence=item(ImagePositionPatient=list(positions[k]) if positions is not None else [-50.5, -60.25, 10 + 2.5 * k]), CTImageFrameTypeSequence=item(FrameType=["ORIGINAL", "PRIMARY", frame_type, "NONE"]))
        if not shared_rescale: frame.PixelValueTransformationSequence = rescale(k)
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    ds.PixelData = np.stack(stored).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    if syntax == RLELossless: ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def pixels_of(folder):
    return {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, sorted(Path(folder).iterdir()))}


def itk_series(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.fixture
def toy(tmp_path):
    "A DICOM series with shuffled names, and the Scan read from it."
    names = [f"IM{i:02d}.dcm" for i in np.random.default_rng(3).permutation(6)]
    folder = write_series(tmp_path / "toy", volume() + 1024, names=names, bits=12, SeriesDescription="Chest", PatientName="A^B")
    return folder, read_scan(folder)


# ---- reading DICOM

@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless])
def test_transfer_syntaxes_round_trip(tmp_path, signed, syntax):
    hu = volume()
    stored = hu if signed else hu.astype(np.int32) + 1024
    folder = write_series(tmp_path / "s", stored, signed=signed, intercepts=0 if signed else -1024, syntax=syntax)
    scan = read_scan(folder)
    assert scan.hu.dtype == np.int16 and (scan.hu == hu).all()
    forged = scan.with_hu(scan.hu + np.int16(1), FORGED)
    written = write_scan(forged, tmp_path / "out")
    assert (read_scan(written).hu == forged.hu).all()
    for ds in pixels_of(written).values():
        assert ds.PixelRepresentation == int(signed) and ds.pixel_array.shape == (20, 16)


def test_each_slice_has_its_own_rescale(tmp_path):
    stored = volume(low=0, high=1000)
    slopes, intercepts = [1, 2, 3, 1, 2, 1], [-1024, -1000, 0, -1024, 5, -7]
    scan = read_scan(write_series(tmp_path / "s", stored, slopes=slopes, intercepts=intercepts))
    assert scan.hu.dtype == np.int16
    assert all((scan.hu[k] == stored[k] * slopes[k] + intercepts[k]).all() for k in range(6))


def test_fractional_slope_gives_float32_and_the_same_stored_bits_back(tmp_path):
    stored = volume(low=0, high=4096)
    scan = read_scan(write_series(tmp_path / "s", stored, slopes=0.37, intercepts=-1000.5))
    assert scan.hu.dtype == np.float32 and np.allclose(scan.hu, stored * 0.37 - 1000.5, atol=1e-3)
    changed = scan.hu.copy()
    changed[0, 0, 0] += 100
    back = [ds.pixel_array for ds in pixels_of(write_scan(scan.with_hu(changed), tmp_path / "o")).values()]
    originals = [ds.pixel_array for ds in pixels_of(tmp_path / "s").values()]
    assert sum((a != b).sum() for a in back for b in originals if (a != b).sum() < 2) == 1  # one voxel in one slice


def test_values_beyond_int16_become_float32(tmp_path):
    stored = np.full((3, 8, 8), 60_000)
    scan = read_scan(write_series(tmp_path / "s", stored, intercepts=0))
    assert scan.hu.dtype == np.float32 and (scan.hu == 60_000).all()


@pytest.mark.parametrize("seed", range(3))
def test_oblique_geometry_matches_simpleitk(tmp_path, seed):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    if np.linalg.det(q) < 0: q[:, 2] *= -1
    origin = rng.uniform(-200, 200, 3)
    # 7 digits, as scanners write them; the file order is reversed and shuffled
    positions = [np.round(origin + q[:, 2] * 1.25 * k, 6) for k in range(6)]
    folder = write_series(tmp_path / "s", volume() + 1024, positions, iop=np.round(q[:, :2].T.ravel(), 7), names=[f"{9 - k}.dcm" for k in range(6)])
    scan, image = read_scan(folder), itk_series(folder)
    assert (sitk.GetArrayFromImage(image) == scan.hu).all()
    assert np.allclose(scan.spacing, image.GetSpacing()[::-1], atol=1e-4)
    image.SetSpacing(scan.spacing[::-1]), image.SetOrigin(scan.origin), image.SetDirection(scan.direction.ravel().tolist())
    for zyx in rng.uniform(0, 5, (10, 3)):
        point = image.TransformContinuousIndexToPhysicalPoint(zyx[::-1].tolist())
        assert np.allclose(scan.voxel_to_world(zyx), point, atol=1e-6)
        assert np.allclose(scan.world_to_voxel(point), zyx, atol=1e-6)


def test_spacing_comes_from_positions_and_order_from_them_too(toy):
    folder, scan = toy
    assert scan.spacing == (2.5, 0.7, 0.8) and scan.origin == (-50.5, -60.25, 10.0)  # SliceThickness says 9
    assert (scan.hu == volume()).all()


def test_one_file_stands_for_its_series_and_uid_chooses(tmp_path):
    write_series(tmp_path / "s", volume() + 1024, series="a")
    write_series(tmp_path / "s", volume(seed=1) + 1024, series="b", names=[f"b{k}.dcm" for k in range(6)])
    uid = generate_uid(entropy_srcs=["b"])
    assert (read_scan(tmp_path / "s" / "b3.dcm").hu == volume(seed=1)).all()
    assert (read_scan(tmp_path / "s", series_uid=uid).hu == volume(seed=1)).all()
    with pytest.raises(ScanError, match=uid): read_scan(tmp_path / "s")
    with pytest.raises(ScanError, match="1.2.3.*" + uid): read_scan(tmp_path / "s", series_uid="1.2.3")


def test_localizers_other_objects_and_other_files_are_left_out(tmp_path, caplog):
    folder = write_series(tmp_path / "s", volume() + 1024)
    write_series(folder, volume((1, 30, 30)) + 1024, names=["loc.dcm"], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(folder, volume((2, 30, 30)) + 1024, names=["mr0", "mr1"], sop=MRImageStorage, series="mr")
    (folder / "notes.txt").write_text("x" * 200)
    (folder / "069.xml").write_text("<a/>")
    (folder / "empty").touch()
    (folder / ".hidden").mkdir()
    (folder / "._s0.dcm").write_bytes(b"\0\5\x16\7" + bytes(400))  # macOS
    with caplog.at_level(logging.WARNING): assert (read_scan(folder).hu == volume()).all()
    assert not caplog.records


def test_subfolders_are_searched(tmp_path):
    (tmp_path / "patient" / "study").mkdir(parents=True)
    write_series(tmp_path / "patient" / "study" / "series", volume() + 1024)
    assert read_scan(tmp_path / "patient").shape == (6, 20, 16)


def damage(folder, what):
    paths = sorted(folder.iterdir())
    path = paths[3]
    ds = pydicom.dcmread(path)
    def put(**tags):
        for name, value in tags.items(): setattr(ds, name, value)
        ds.save_as(path)
    if what == "missing": sorted(folder.iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])[2].unlink()
    elif what == "two of three":
        for other in sorted(folder.iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])[4:]: other.unlink()
        sorted(folder.iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])[1].unlink()
    elif what == "duplicate": shutil.copy(path, folder / "copy.dcm")
    elif what == "truncated": path.write_bytes(path.read_bytes()[:-200])
    elif what == "truncated header": path.write_bytes(path.read_bytes()[:300])
    elif what == "no pixels": del ds.PixelData; ds.save_as(path)
    elif what == "garbage": path.write_bytes(b"not found" * 100)
    elif what == "size": ds.PixelData = ds.PixelData[:16 * 16 * 2]; put(Rows=16)
    elif what == "spacing": put(PixelSpacing=[0.7, 0.9])
    elif what == "turned": put(ImageOrientationPatient=[0, 1, 0, 1, 0, 0])
    elif what == "no position": del ds.ImagePositionPatient; ds.save_as(path)
    elif what == "slope 0": put(RescaleSlope=0)
    elif what == "slope gone": del ds.RescaleSlope; ds.save_as(path)
    elif what == "colour": put(SamplesPerPixel=3)
    elif what == "frames": put(NumberOfFrames=5)
    elif what == "absurd":
        for p in paths:
            ds = pydicom.dcmread(p); ds.Rows, ds.Columns = 65000, 65000; ds.save_as(p)
    elif what == "absurd packed":
        for p in paths:
            ds = pydicom.dcmread(p); ds.Rows, ds.Columns = 65000, 65000; ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian; ds.save_as(p)
    elif what == "larger than file":
        for p in paths:
            ds = pydicom.dcmread(p); ds.Rows, ds.Columns = 8000, 8000; ds.save_as(p)
    elif what == "uneven": put(ImagePositionPatient=[-50.5, -60.25, float(ds.ImagePositionPatient[2]) + 0.6])
    elif what == "tilt":
        for p in paths:
            ds = pydicom.dcmread(p); x, y, z = ds.ImagePositionPatient; ds.ImagePositionPatient = [x, float(y) + 0.3 * float(z), z]; ds.save_as(p)
    elif what == "lone": [other.unlink() for other in paths if other != path]
    elif what == "only MR":
        for p in paths:
            ds = pydicom.dcmread(p); ds.SOPClassUID = MRImageStorage; ds.save_as(p)
    elif what == "emptied": [p.unlink() for p in paths]


@pytest.mark.parametrize("what, words", [
    ("missing", "missing 1 slice"), ("two of three", "missing 1 slice"), ("duplicate", "same position"), ("truncated", "truncated"), ("truncated header", "header|has no"),
    ("no pixels", "no pixel data"), ("garbage", "unreadable"), ("size", "differ in size"), ("spacing", "differ in pixel spacing"), ("turned", "differ in orientation"),
    ("no position", "ImagePositionPatient"), ("slope 0", "RescaleSlope"), ("slope gone", "RescaleSlope"), ("colour", "grey"), ("frames", "single-slice"), ("absurd", "65000"), ("absurd packed", "65000"),
    ("larger than file", "truncated"), ("uneven", "unevenly"), ("tilt", "tilt"), ("lone", "at least 2 slices"), ("only MR", "MR Image"), ("emptied", "no DICOM"),
])
def test_faults_of_a_series(toy, what, words):
    folder, _ = toy
    damage(folder, what)
    tracemalloc.start()
    with pytest.raises(ScanError, match=words) as caught: read_scan(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert folder.name in str(caught.value) and "\n" not in str(caught.value)
    assert peak < 100e6  # refused before anything large is allocated


def test_a_compressed_series_without_decoder_says_so(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "s", volume() + 1024)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
        ds.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(40)])
        ds["PixelData"].is_undefined_length = True
        ds.save_as(path)
    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "is_available", False)
    with pytest.raises(ScanError, match=r"JPEG 2000.*pip install .mits_nb\[decoders\]"): read_scan(folder)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"])
def test_packed_pixels(tmp_path, name, signed):
    hu = volume()
    plain = write_series(tmp_path / "plain", hu if signed else hu + 1024, signed=signed, intercepts=0 if signed else -1024)
    scan = read_scan(gdcm_pack(plain, tmp_path / "packed", name))
    assert scan.source.headers[0].file_meta.TransferSyntaxUID.is_encapsulated and scan.hu.dtype == np.int16 and (scan.hu == hu).all()
    changed = hu.copy()
    changed[1, 2, 3] += 7
    written = write_scan(scan.with_hu(changed, FORGED), tmp_path / "out")
    before = {p.name: pydicom.dcmread(p).pixel_array for p in plain.iterdir()}
    assert sum(int((pydicom.dcmread(p).pixel_array != before[p.name]).sum()) for p in written.iterdir()) == 1
    assert all(not ds.file_meta.TransferSyntaxUID.is_compressed for ds in pixels_of(written).values())


def test_damaged_packed_pixels(tmp_path):
    plain = write_series(tmp_path / "plain", volume() + 1024)
    folder = gdcm_pack(plain, tmp_path / "packed", "JPEGLSLossless")
    victim = sorted(folder.iterdir())[2]
    whole = victim.read_bytes()
    at = whole.find(b"\xff\xf7")  # the marker in front of precision, rows and columns
    for what, damaged in (("cut", whole[:-60]), ("size", whole[:at + 5] + b"\x60\x00" + whole[at + 7:]), ("precision", whole[:at + 4] + b"\xb4" + whole[at + 5:]), ("none", whole[:at - 10])):
        victim.write_bytes(damaged)
        with pytest.raises(ScanError, match=victim.name): read_scan(folder)
    victim.write_bytes(whole)
    assert (read_scan(folder).hu == volume()).all()


def test_a_deflated_bomb_is_refused(tmp_path):
    import struct, zlib
    folder = write_series(tmp_path / "s", volume() + 1024, syntax=DeflatedExplicitVRLittleEndian)
    path = sorted(folder.iterdir())[0]
    raw = path.read_bytes()
    begin = 144 + struct.unpack("<I", raw[140:144])[0]
    packer = zlib.compressobj(9, wbits=-15)
    bomb = packer.compress(zlib.decompress(raw[begin:], -15)) + b"".join(packer.compress(bytes(2**20)) for _ in range(300)) + packer.flush()
    path.write_bytes(raw[:begin] + bomb)
    tracemalloc.start()
    with pytest.raises(ScanError, match="unpacks to more"): read_scan(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_monochrome1_is_the_same_measurement(tmp_path):
    folder = write_series(tmp_path / "s", volume() + 1024, PhotometricInterpretation="MONOCHROME1")
    scan = read_scan(folder)
    assert (scan.hu == volume()).all()
    written = write_scan(scan.with_hu(scan.hu + np.int16(1), FORGED), tmp_path / "o")
    assert all(ds.PhotometricInterpretation == "MONOCHROME1" for ds in pixels_of(written).values()) and (read_scan(written).hu == scan.hu + 1).all()


@pytest.mark.parametrize("signed, tags, expected", [
    (True, dict(PixelPaddingValue=63536), (-3024, -3024)), (False, dict(PixelPaddingValue=0), (-1024, -1024)),
    (True, dict(PixelPaddingValue=63536, PixelPaddingRangeLimit=63556), (-3024, -3004)), (True, {}, None)])
def test_padding_values(tmp_path, signed, tags, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = write_series(tmp_path / "s", volume(low=0, high=2000), signed=signed, **tags)
    scan = read_scan(folder)
    assert scan.meta.get("padding_hu") == expected and (scan.hu == volume(low=0, high=2000) - 1024).all()
    back = read_scan(write_scan(scan.with_hu(scan.hu, FORGED), tmp_path / "o"))
    assert back.meta.get("padding_hu") == expected


def test_padding_is_read_where_the_bits_say_so(data_dir):
    assert read_scan(data_dir / "dicom" / "LIDC-IDRI-0001").meta["padding_hu"] == (-3024, -3024)


def test_bits_above_those_stored_are_no_values(tmp_path, caplog):
    hu = volume(low=-1000, high=1500)
    stored = (hu + 1024).astype(np.uint16)
    stored[0, 3, :4] |= 0x8000  # an old overlay plane
    folder = write_series(tmp_path / "s", stored, bits=12)
    assert (read_scan(folder).hu == hu).all()
    image = itk_series(folder)
    assert (sitk.GetArrayFromImage(image) == hu).all()


def test_elements_behind_the_pixels_are_kept(tmp_path):
    folder = write_series(tmp_path / "s", volume() + 1024, DataSetTrailingPadding=bytes(32))
    scan = read_scan(folder)
    copy = write_scan(scan, tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


# ---- multi-frame

@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("shared", [False, True])
def test_enhanced_multi_frame_is_the_same_scan(tmp_path, shared, syntax):
    hu, turned = volume(), np.random.default_rng(2).permutation(6)
    positions = [(-50.5, -60.25, 10 + 2.5 * k) for k in turned]
    path = write_enhanced(tmp_path / "e" / "multi.dcm", list(hu[turned] + 1024), positions=positions, shared_rescale=shared, syntax=syntax)
    single = read_scan(write_series(tmp_path / "s", hu + 1024))
    for where in (path, path.parent):
        scan = read_scan(where)
        assert (scan.hu == hu).all() and scan.hu.dtype == np.int16
        assert scan.spacing == single.spacing and scan.origin == single.origin and (scan.direction == single.direction).all()
    assert list_series(path.parent) == [dict(uid=scan.meta["series_uid"], slices=6, description="Chest")]
    copy = write_scan(scan, tmp_path / "copy")  # becomes a series of single-frame CT images
    back = pixels_of(copy)
    assert len(back) == 6 and (read_scan(copy).hu == hu).all() and len({ds.SeriesInstanceUID for ds in back.values()} | {scan.meta["series_uid"]}) == 2
    for ds in back.values():
        assert ds.SOPClassUID == CTImageStorage and ds.PatientName == "A^B" and ds.BitsStored == 12 and "NumberOfFrames" not in ds and "PerFrameFunctionalGroupsSequence" not in ds
    forged = read_scan(write_scan(scan.with_hu(hu + np.int16(1), FORGED), tmp_path / "f"))
    assert (forged.hu == hu + 1).all() and "TEACHING FORGERY" in forged.meta["marker"]
    assert (sitk.GetArrayFromImage(itk_series(copy)) == hu).all()


def test_frames_have_their_own_rescale(tmp_path):
    stored = volume(low=0, high=1000)
    slopes, intercepts = [1, 2, 3, 1, 2, 1], [-1024, -1000, 0, -1024, 5, -7]
    scan = read_scan(write_enhanced(tmp_path / "e" / "m.dcm", list(stored), slopes=slopes, intercepts=intercepts))
    assert all((scan.hu[k] == stored[k] * slopes[k] + intercepts[k]).all() for k in range(6))


@pytest.mark.parametrize("what, words", [("count", "claims 9 frames"), ("groups", "functional groups"), ("cut", "truncated"), ("gap", "missing 1 slice.*frame 3.*frame 4"), ("localizer", "no DICOM files|no CT")])
def test_faults_of_a_multi_frame_file(tmp_path, what, words):
    positions = [(0, 0, 2.5 * (k + (what == "gap" and k > 2))) for k in range(6)]
    path = write_enhanced(tmp_path / "e" / "m.dcm", list(volume() + 1024), positions=positions, frame_type="LOCALIZER" if what == "localizer" else "AXIAL")
    ds = pydicom.dcmread(path)
    if what == "count": ds.NumberOfFrames = 9
    if what == "groups": del ds.PerFrameFunctionalGroupsSequence
    if what in ("count", "groups"): ds.save_as(path)
    if what == "cut": path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ScanError, match=words): read_scan(path)


# ---- zip

def zipped(path, members, **options):
    import zipfile
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items(): archive.writestr(name, data)
    return path


def test_a_zip_of_a_series(toy, tmp_path):
    import zipfile
    folder, scan = toy
    members = {f"export/{p.name}": p.read_bytes() for p in folder.iterdir()}
    path = zipped(tmp_path / "s.zip", {**members, "export/readme.txt": b"x" * 300, "__MACOSX/export/._IM00.dcm": bytes(400), "viewer/setup.exe": bytes(5000)}, compression=zipfile.ZIP_DEFLATED)
    back = read_scan(path)
    assert (back.hu == scan.hu).all() and back.spacing == scan.spacing and back.meta["path"] == back.source.path == str(path)
    copy = write_scan(back, tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    two = zipped(tmp_path / "two.zip", {**members, **{f"b/{p.name}": p.read_bytes() for p in write_series(tmp_path / "b", volume(seed=1) + 1024, series="b").iterdir()}})
    uid = generate_uid(entropy_srcs=["b"])
    assert [s["slices"] for s in list_series(two)] == [6, 6] and (read_scan(two, series_uid=uid).hu == volume(seed=1)).all()
    with pytest.raises(ScanError, match=f"two.zip.*{uid}"): read_scan(two)


def test_hostile_and_broken_zips(toy, tmp_path):
    import zipfile
    folder, _ = toy
    slices = {p.name: p.read_bytes() for p in folder.iterdir()}
    before = set(tmp_path.rglob("*"))
    inside = tmp_path / "zips"
    inside.mkdir()
    for name in ("../evil.dcm", "/tmp/evil.dcm", "..\\evil.dcm", "a/../../evil.dcm", "C:/evil.dcm"):
        with pytest.raises(ScanError, match="outside its folder"): read_scan(zipped(inside / "slip.zip", {**slices, name: slices["IM00.dcm"]}))
    bomb = zipped(inside / "bomb.zip", {f"{k}.dcm": bytes(128) + b"DICM" + bytes(2**24) for k in range(16)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ScanError, match="would unpack to"): read_scan(bomb)
    whole = zipped(inside / "ok.zip", slices, compression=zipfile.ZIP_DEFLATED).read_bytes()
    for k, damaged in enumerate((whole[:-40], whole[:len(whole) // 2], whole[:3000] + b"\0\1\2" + whole[3003:], b"PK\3\4", b"PK\5\6" + bytes(18))):
        (inside / f"broken{k}.zip").write_bytes(damaged)
        with pytest.raises(ScanError, match=f"broken{k}.zip"): read_scan(inside / f"broken{k}.zip")
    locked = bytearray(whole)
    at = locked.rfind(b"PK\1\2")
    locked[at + 8] |= 1  # the flag "encrypted" in the table of contents
    (inside / "locked.zip").write_bytes(locked)
    with pytest.raises(ScanError, match="encrypted"): read_scan(inside / "locked.zip")
    assert {p for p in tmp_path.rglob("*") if inside not in (p, *p.parents)} == before


# ---- regrid

@pytest.mark.parametrize("angle", [12.0, -20.0])
def test_a_leaning_stack_is_straightened(tmp_path, angle):
    "Linear interpolation is exact for a world that is linear in x, y and z."
    world = lambda x, y, z: 2.0 * x - 3.0 * y + 1.5 * z
    lean = np.tan(np.deg2rad(angle))
    k, y, x = np.meshgrid(np.arange(8), np.arange(24), np.arange(20), indexing="ij")
    origin = np.array([-8.0, 5.0, 30.0])
    position = lambda k: origin + [0.25 * k, 2.5 * k * lean, 2.5 * k]
    stored = np.rint(world(*(np.stack([position(i) for i in range(8)])[k] + np.stack([x * 0.8, y * 0.7, 0 * x], -1)).transpose(3, 0, 1, 2)) * 10)
    folder = write_series(tmp_path / "s", stored, [position(i) for i in range(8)], signed=True, slopes=0.1, intercepts=0)
    with pytest.raises(ScanError, match=rf"tilt of {abs(np.degrees(np.arctan(np.hypot(lean, 0.1)))):.1f} degrees.*regrid=True"): read_scan(folder)
    scan = read_scan(folder, regrid=True)
    assert np.allclose(scan.spacing, (2.5, 0.7, 0.8)) and scan.shape[0] == 8 and scan.history[0]["kind"] == "regridded" and scan.source is None
    inside = np.argwhere(scan.hu > -500)  # the corners hold air
    truth = world(*scan.voxel_to_world(inside).T)
    error = np.abs(scan.hu[tuple(inside.T)] - truth)
    assert len(inside) > 0.5 * stored.size and np.quantile(error, 0.7) < 0.11 and (scan.hu == -1024).any()
    assert (read_scan(write_scan(scan, tmp_path / "out")).spacing == np.round(scan.spacing, 9)).all()


def test_uneven_spacing_is_interpolated_on_request(tmp_path):
    depth = np.array([0, 2.0, 4.4, 6.0, 8.0, 10.0, 14.0])
    stored = np.broadcast_to((depth * 10)[:, None, None], (7, 8, 9)).astype(int)
    folder = write_series(tmp_path / "s", stored, [(0, 0, d) for d in depth], signed=True, intercepts=0)
    with pytest.raises(ScanError, match="missing 1 slice.*regrid=True"): read_scan(folder)
    scan = read_scan(folder, regrid=True)
    assert scan.shape == (8, 8, 9) and scan.spacing[0] == 2.0 and (scan.hu[:, 0, 0] == np.arange(8) * 20).all() and scan.hu.dtype == np.int16
    straight = write_series(tmp_path / "t", volume() + 1024, series="t")
    assert read_scan(straight, regrid=True).source is not None and (read_scan(straight, regrid=True).hu == volume()).all()  # nothing to mend


def test_paths_that_are_no_scan(tmp_path):
    with pytest.raises(ScanError, match="does not exist"): read_scan(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanError, match="no DICOM files"): read_scan(tmp_path / "empty")
    (tmp_path / "a.png").write_bytes(b"\x89PNG" + bytes(300))
    with pytest.raises(ScanError, match="no DICOM file"): read_scan(tmp_path / "a.png")


def test_memory_stays_near_one_volume(tmp_path):
    hu = volume((40, 256, 256))
    folder = write_series(tmp_path / "s", hu.astype(np.int32) + 1024)
    read_scan(folder)  # imports
    tracemalloc.start()
    scan = read_scan(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2 * scan.hu.nbytes


# ---- reading image files

def itk_image(array, spacing=(0.7, 0.8, 2.5)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[:image.GetDimension()])
    return image


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_image_files_round_trip(tmp_path, suffix, dtype):
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))
    hu = volume().astype(dtype) + dtype(0 if dtype == np.int16 else 0.25)
    scan = Scan(hu, (2.5, 0.123456789, 0.8), (-12.3456789, 5, 1e3), q * np.sign(np.linalg.det(q)))
    back = read_scan(write_scan(scan, tmp_path / f"a.b{suffix}"))
    tolerance = 1e-3 if "nii" in suffix else 1e-6  # NIfTI stores its geometry in single precision
    assert back.hu.dtype == dtype and (back.hu == hu).all() and "marker" not in back.meta
    assert np.allclose(back.voxel_to_world([[0, 0, 0], [5, 19, 15]]), scan.voxel_to_world([[0, 0, 0], [5, 19, 15]]), atol=tolerance)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


@pytest.mark.parametrize("kind, expected", [("u2", np.int16), ("i4", np.int16), ("f4", np.int16), ("f8", np.int16), ("u1", np.int16)])
def test_whole_values_that_fit_become_int16(tmp_path, kind, expected):
    sitk.WriteImage(itk_image(volume(low=0, high=200).astype(kind)), str(tmp_path / "a.nrrd"))
    scan = read_scan(tmp_path / "a.nrrd")
    assert scan.hu.dtype == expected and (scan.hu == volume(low=0, high=200)).all()


def test_fractions_and_large_values_become_float32(tmp_path):
    for array in (volume() + 0.5, volume().astype("i4") + 50_000):
        sitk.WriteImage(itk_image(array), str(tmp_path / "a.mha"))
        scan = read_scan(tmp_path / "a.mha")
        assert scan.hu.dtype == np.float32 and np.allclose(scan.hu, array)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_image_files(tmp_path, suffix, compress, capfd):
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(itk_image(volume((8, 64, 64))), str(path), compress)
    data = next((p for p in tmp_path.iterdir() if p.suffix in (".raw", ".zraw")), path)
    whole = data.read_bytes()
    for part in (0.98, 0.5, 0.02):
        data.write_bytes(whole[:int(len(whole) * part)])
        with pytest.raises(ScanError, match=path.name): read_scan(path)
    assert capfd.readouterr().err == ""


def test_gzip_in_several_members_is_whole(tmp_path):
    import gzip
    sitk.WriteImage(itk_image(volume()), str(tmp_path / "a.nii"))
    raw = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    assert (read_scan(tmp_path / "b.nii.gz").hu == volume()).all()


def test_nifti_files_of_one_name_are_kept_apart(tmp_path):
    one, two = (Scan(volume(seed=seed), (2.5, 0.7, 0.8)) for seed in (1, 2))
    write_scan(one, tmp_path / "x.nii"), write_scan(two, tmp_path / "x.nii.gz")
    assert (read_scan(tmp_path / "x.nii").hu == one.hu).all() and (read_scan(tmp_path / "x.nii.gz").hu == two.hu).all()
    assert read_scan(tmp_path / "x.nii.gz").meta["path"] == str(tmp_path / "x.nii.gz")


def test_image_files_that_are_no_volume(tmp_path, capfd):
    cases = {"2-D.mha": volume()[0], "nan.nrrd": np.where(np.arange(16) == 3, np.nan, volume().astype("f4")), "4d.nii.gz": volume((2, 3, 8, 8))}
    for name, array in cases.items(): sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(tmp_path / name))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 8, 8, 3), "u1"), isVector=True), str(tmp_path / "rgb.mha"))
    (tmp_path / "broken.mha").write_bytes(b"ObjectType = Image\nNDims = x\n")
    (tmp_path / "zero.nii.gz").touch()
    for name, words in {"2-D.mha": "2-D image", "nan.nrrd": "NaN", "4d.nii.gz": "4-D image", "rgb.mha": "3 values per voxel", "broken.mha": "unreadable header", "zero.nii.gz": "unreadable header"}.items():
        with pytest.raises(ScanError, match=words) as caught: read_scan(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_header_that_claims_absurd_sizes_allocates_nothing(tmp_path):
    sitk.WriteImage(itk_image(volume()), str(tmp_path / "a.mha"), True)
    raw = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(raw.replace(b"DimSize = 16 20 6", b"DimSize = 20000 20000 6000"))
    with pytest.raises(ScanError, match="claims"): read_scan(tmp_path / "a.mha")


def test_mhd_data_file(tmp_path):
    (tmp_path / "in").mkdir()
    sitk.WriteImage(itk_image(volume()), str(tmp_path / "in" / "a.mhd"))
    header = (tmp_path / "in" / "a.mhd").read_text()
    (tmp_path / "in" / "other.raw").write_bytes((tmp_path / "in" / "a.raw").read_bytes())
    (tmp_path / "in" / "a.mhd").write_text(header.replace("a.raw", "other.raw"))
    assert (read_scan(tmp_path / "in" / "a.mhd").hu == volume()).all()
    (tmp_path / "secret.raw").write_bytes((tmp_path / "in" / "a.raw").read_bytes())
    (tmp_path / "in" / "a.mhd").write_text(header.replace("a.raw", "../secret.raw"))
    with pytest.raises(ScanError, match="outside its own folder"): read_scan(tmp_path / "in" / "a.mhd")
    (tmp_path / "in" / "a.mhd").write_text(header.replace("a.raw", "gone.raw"))
    with pytest.raises(ScanError, match="missing"): read_scan(tmp_path / "in" / "a.mhd")


# ---- writing DICOM

def test_unchanged_copy_is_the_same_files(toy, tmp_path):
    folder, scan = toy
    copy = write_scan(scan, tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_only_changed_voxels_change_and_headers_stay(toy, tmp_path):
    folder, scan = toy
    hu = scan.hu.copy()
    hu[2, 10, 8:10] += 100
    written = write_scan(scan.with_hu(hu, FORGED), tmp_path / "f")
    before = {p.name: pydicom.dcmread(p) for p in folder.iterdir()}
    after = {p.name: pydicom.dcmread(p) for p in written.iterdir()}
    assert before.keys() == after.keys()
    assert sum(int((before[n].pixel_array != after[n].pixel_array).sum()) for n in before) == 2
    assert len({ds.SeriesInstanceUID for ds in after.values()}) == 1 and len({ds.SOPInstanceUID for ds in after.values()}) == 6
    new = {"SOPInstanceUID", "SeriesInstanceUID", "ImageType", "SeriesDescription", "PixelData"}
    for name in before:
        for element in before[name]:
            assert (after[name][element.tag].value == element.value) or element.keyword in new, element
        ds = after[name]
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID != before[name].SOPInstanceUID
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"] and ds.SeriesDescription == "TEACHING FORGERY Chest"
        assert "TEACHING FORGERY" in ds.private_block(0x4D49, "MITS_NB")[0x01].value
        assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == before[name].SOPInstanceUID


def test_uids_follow_from_the_content(toy, tmp_path):
    _, scan = toy
    forged = scan.with_hu(scan.hu + np.int16(1), FORGED)
    a, b = (write_scan(forged, tmp_path / name) for name in "ab")
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}
    c = write_scan(scan.with_hu(scan.hu + np.int16(2), FORGED), tmp_path / "c")
    assert not set(pixels_of(a)) & set(pixels_of(c))


def test_a_change_without_a_note_is_marked_too(toy, tmp_path):
    _, scan = toy
    written = write_scan(scan.with_hu(scan.hu + np.int16(1)), tmp_path / "m")
    assert "MODIFIED" in read_scan(written).meta["marker"]
    assert next(iter(pixels_of(written).values())).ImageType[0] == "DERIVED"


@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_marker_survives_every_format_and_any_chain(toy, tmp_path, suffix):
    _, scan = toy
    forged = read_scan(write_scan(scan.with_hu(scan.hu + np.int16(1), FORGED), tmp_path / f"one{suffix}"))
    assert "TEACHING FORGERY" in forged.meta["marker"] and forged.history == (FORGED,)
    for k, other in enumerate(["", *SUFFIXES]):
        again = read_scan(write_scan(forged, tmp_path / f"two{k}{other}"))
        assert "TEACHING FORGERY" in again.meta["marker"]
    both = read_scan(write_scan(forged.with_hu(forged.hu, PROTECTED), tmp_path / f"three{suffix}"))
    assert both.meta["marker"].startswith("TEACHING FORGERY")
    if suffix == "": assert "PROTECTED" in both.meta["marker"]


@pytest.mark.parametrize("suffix", ["", *SUFFIXES])
def test_sidecar_brings_the_history_back(toy, tmp_path, suffix):
    _, scan = toy
    note = {**FORGED, "at": [1.5, 2.0, 3.0], "box": [[0, 3], [1, 5], [2, 6]]}
    path = write_scan(scan.with_hu(scan.hu + np.int16(1), note).with_hu(scan.hu + np.int16(2), PROTECTED), tmp_path / f"one{suffix}")
    assert sidecar_path(path) == tmp_path / f"one{suffix}.forgery.json"
    told = json.loads(sidecar_path(path).read_text())
    assert told["version"] == 1 and told["shape"] == list(scan.shape) and told["spacing"] == list(scan.spacing)
    back = read_scan(path)
    assert back.history == (note, PROTECTED)
    again = read_scan(write_scan(back, tmp_path / f"two{suffix}"))                                # a chain of copies says it once
    assert again.history == back.history and again.meta["marker"].count("TEACHING") == 1
    if suffix == "":
        assert {p.name: p.read_bytes() for p in path.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}   # and keeps its identity
        assert read_scan(sorted(path.iterdir())[0]).history == back.history
    write_scan(scan, path)                                                                        # an unforged scan of the same name
    assert not sidecar_path(path).exists() and read_scan(path).history == ()


@pytest.mark.parametrize("spoil", ["cut", "list", "version", "marker", "shape", "box", "box type", "at", "history", "deep", "no header"])
def test_sidecars_that_are_not_believed(toy, tmp_path, caplog, spoil):
    _, scan = toy
    note = {**FORGED, "at": [1, 2, 3], "box": [[0, 3], [1, 5], [2, 6]]}
    path = write_scan(scan.with_hu(scan.hu + np.int16(1), note), tmp_path / "one.mha")
    file = sidecar_path(path)
    told = json.loads(file.read_text())
    if spoil == "version": told["version"] = 2
    if spoil == "marker": told["marker"] = told["marker"].replace("inject", "remove") + "?"
    if spoil == "shape": told["shape"][0] += 1
    if spoil == "box": told["history"][0]["box"][2] = [0, 10**6]
    if spoil == "box type": told["history"][0]["box"] = [[0, "3"], [1, 5], [2, 6]]
    if spoil == "at": told["history"][0]["at"] = [1, None, 3]
    if spoil == "history": told["history"] = [3]
    file.write_text({"cut": file.read_text()[:40], "list": "[]", "deep": "[" * 100_000}.get(spoil, json.dumps(told)))
    if spoil == "no header":
        other = write_scan(scan, tmp_path / "other.mha")
        os.replace(file, sidecar_path(other)); path = other
    with caplog.at_level(logging.WARNING): assert read_scan(path).history == ()
    assert bool(caplog.records) == (spoil != "no header")


def test_protected_series_says_so(toy, tmp_path):
    _, scan = toy
    written = write_scan(scan.with_hu(scan.hu + np.int16(1), PROTECTED), tmp_path / "p")
    ds = next(iter(pixels_of(written).values()))
    assert ds.SeriesDescription == "protected (mits_nb) Chest" and ds.ImageType[0] == "DERIVED" and "FORGERY" not in read_scan(written).meta["marker"]
    assert "mitsgan-tiny" in read_scan(written).meta["marker"]
    twice = scan.with_hu(scan.hu, PROTECTED).with_hu(scan.hu, FORGED)
    assert marker_text(twice).startswith("TEACHING FORGERY") and "PROTECTED" in marker_text(twice)


def test_new_series_is_valid_ct(tmp_path):
    q, _ = np.linalg.qr(np.random.default_rng(8).normal(size=(3, 3)))
    scan = Scan(volume(low=-3024, high=3000), (1.25, 0.7, 0.7), (-100.123456, 20, 3), q * np.sign(np.linalg.det(q)))
    folder = write_scan(scan, tmp_path / "new series 1.2.840")
    back, image = read_scan(folder), itk_series(folder)
    assert (back.hu == scan.hu).all() and (sitk.GetArrayFromImage(image) == scan.hu).all()
    assert np.allclose(image.GetSpacing(), scan.spacing[::-1]) and np.allclose(image.GetOrigin(), scan.origin, atol=1e-6) and np.allclose(np.reshape(image.GetDirection(), (3, 3)), scan.direction, atol=1e-6)
    for ds in pixels_of(folder).values():
        assert ds.SOPClassUID == CTImageStorage and ds.PixelRepresentation == 1 and ds.RescaleIntercept == 0 and ds.Modality == "CT"
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID",
                        "SeriesNumber", "FrameOfReferenceUID", "PositionReferenceIndicator", "Manufacturer", "InstanceNumber", "ImageType", "KVP", "AcquisitionNumber", "SliceThickness"):
            assert keyword in ds, keyword
        assert all(len(str(v)) <= 16 for key in ("ImagePositionPatient", "ImageOrientationPatient") for v in ds[key].value)


# ---- properties

finite = lambda low, high: st.floats(low, high, allow_nan=False, width=32)
rotations = st.tuples(*[finite(-1, 1)] * 4).filter(lambda q: np.linalg.norm(q) > 0.1).map(lambda q: Rotation.from_quat(q).as_matrix())
scans = st.builds(lambda shape, seed, spacing, origin, direction, kind: Scan(volume(shape, seed).astype(kind), spacing, origin, direction),
                  st.tuples(*[st.integers(2, 6)] * 3), st.integers(0, 2**20), st.tuples(*[finite(0.25, 8)] * 3), st.tuples(*[finite(-900, 900)] * 3), rotations, st.sampled_from([np.int16, np.float32]))
few = settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@few
@given(scans, st.lists(st.tuples(*[finite(-20, 20)] * 3), min_size=1, max_size=5))
def test_voxel_and_world_agree_with_simpleitk(scan, points):
    image = sitk.GetImageFromArray(scan.hu)
    image.SetSpacing(scan.spacing[::-1]), image.SetOrigin(scan.origin), image.SetDirection(scan.direction.ravel().tolist())
    for zyx in points:
        world = image.TransformContinuousIndexToPhysicalPoint(list(map(float, zyx[::-1])))
        assert np.abs(scan.voxel_to_world(zyx) - world).max() < 1e-6
        assert np.abs(scan.world_to_voxel(world) - image.TransformPhysicalPointToContinuousIndex(world)[::-1]).max() < 1e-6
    assert np.abs(scan.world_to_voxel(scan.voxel_to_world(points)) - points).max() < 1e-6


@few
@given(scans, st.sampled_from(["", *SUFFIXES]))
def test_any_scan_comes_back_from_any_format(tmp_path, scan, suffix):
    target = tmp_path / f"again{suffix}"
    back = read_scan(write_scan(scan, target))
    assert back.shape == scan.shape and np.abs(back.hu - scan.hu).max() <= (0.5 if suffix == "" and scan.hu.dtype == np.float32 else 0)
    corners = [[0, 0, 0], [n - 1 for n in scan.shape]]
    tolerance = 2e-3 if "nii" in suffix else 1e-5 if suffix == "" else 1e-6  # NIfTI: single precision; DICOM: 16 characters a number
    assert np.abs(back.voxel_to_world(corners) - scan.voxel_to_world(corners)).max() < tolerance
    if suffix == "" and (back.hu == scan.hu).all():  # a series read and written again: the same files
        again = write_scan(back, tmp_path / "twice")
        assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in target.iterdir()}
        shutil.rmtree(again), shutil.rmtree(target)


@few
@given(st.integers(0, 2**20), st.integers(9, 16), st.booleans(), st.sampled_from([1, 2, 0.5, 0.37, 1.0009765625]), st.sampled_from([0, -1024, -1000.5, 7]), st.sampled_from([ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless]))
def test_stored_pixels_survive(tmp_path, seed, bits, signed, slope, intercept, syntax):
    stored = np.random.default_rng(seed).integers(-(1 << bits - 1) if signed else 0, 1 << bits - signed, (3, 6, 5))
    folder, out = tmp_path / "in", tmp_path / "out"
    scan = read_scan(write_series(folder, stored, bits=bits, signed=signed, slopes=slope, intercepts=intercept, syntax=syntax))
    assert np.allclose(scan.hu, stored * slope + intercept, atol=1e-2)
    hu = scan.hu.copy()
    hu[1, 2, 3] = hu[1, 2, 2]  # one voxel takes its neighbour's value
    expected = stored.copy()
    expected[1, 2, 3] = expected[1, 2, 2]
    written = write_scan(scan.with_hu(hu, FORGED), out)
    back = np.stack([ds.pixel_array for ds in sorted(pixels_of(written).values(), key=lambda ds: ds.ImagePositionPatient[2])])
    assert (back == expected).all()
    shutil.rmtree(folder), shutil.rmtree(out)


@few
@given(scans, st.tuples(*[finite(0.25, 9)] * 3))
def test_resampling_tensors_is_resampling_arrays(scan, spacing):
    scan = replace(scan, hu=scan.hu.astype(np.float32))
    values = torch.tensor(scan.hu, requires_grad=True)
    out = resample_tensor(values, scan.spacing, spacing)
    assert out.shape == resample(scan, spacing).shape and np.abs(out.detach().numpy() - resample(scan, spacing).hu).max() < 2e-3
    out.sum().backward()
    assert abs(float(values.grad.double().sum()) - out.numel()) < 1e-3 * out.numel()  # the eight weights of a point add up to 1
    batch = resample_tensor(values.detach().double().expand(2, 1, *scan.shape), scan.spacing, spacing)
    assert batch.shape == (2, 1, *out.shape) and np.abs(batch[1, 0].numpy() - out.detach().numpy()).max() < 2e-3


def test_gradient_of_resampling_is_exact():
    values = torch.tensor(volume((4, 5, 3)), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: resample_tensor(v, (2.5, 0.7, 0.8), (1.1, 0.5, 1.3)), values)
    for bad in (dict(hu=values[0]), dict(hu=values.int()), dict(new_spacing=0), dict(new_spacing=(1, float("nan"), 1))):
        with pytest.raises(ScanError): resample_tensor(**{**dict(hu=values, spacing=(1, 1, 1), new_spacing=2), **bad})


# ---- what others say about our files

def complaints(folder):
    "Errors that dciodvfy reports about the files of a folder, without the values of this or that file."
    program = shutil.which("dciodvfy")
    if program is None: pytest.skip("dciodvfy (Debian package dicom3tools) is not installed")
    import subprocess
    found = set()
    for path in sorted(Path(folder).iterdir()):
        done = subprocess.run([program, "-new", str(path)], capture_output=True, text=True, errors="replace")
        found |= {line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")}
    return found


def test_dciodvfy_finds_nothing_in_new_series(tmp_path):
    from mits_nb.phantom import make_phantom
    scan = make_phantom(seed=1, shape=(4, 96, 96), spacing=(5, 4, 4))[0]
    few_slices = replace(scan, hu=scan.hu[:3])
    q, _ = np.linalg.qr(np.random.default_rng(8).normal(size=(3, 3)))
    for k, one in enumerate([few_slices, few_slices.with_hu(few_slices.hu, FORGED), few_slices.with_hu(few_slices.hu, PROTECTED), replace(few_slices, hu=few_slices.hu.astype(np.float32) * np.float32(9.7)), replace(few_slices, direction=q * np.sign(np.linalg.det(q)))]):
        assert complaints(write_scan(one, tmp_path / f"new{k}")) == set()


@pytest.mark.parametrize("kind", ["plain", "packed", "multi-frame"])
def test_dciodvfy_finds_nothing_that_the_source_has_not(tmp_path, kind):
    if kind == "multi-frame": source = write_enhanced(tmp_path / "s" / "m.dcm", list(volume((3, 20, 16)) + 1024)).parent
    else: source = write_series(tmp_path / "s", volume((3, 20, 16)) + 1024, syntax=RLELossless if kind == "packed" else ExplicitVRLittleEndian)
    scan = read_scan(source)
    known = complaints(source)
    for k, note in enumerate([None, FORGED, PROTECTED]):
        written = write_scan(scan if note is None else scan.with_hu(scan.hu + np.int16(1), note), tmp_path / f"o{k}")
        words = lambda lines: {line.split(" - Module")[0] for line in lines}
        assert words(complaints(written)) <= words(known), note


def test_dciodvfy_on_real_series(data_dir, tmp_path):
    for name in ("dicom/LIDC-IDRI-0001",):
        scan = read_scan(data_dir / name)
        known = complaints(data_dir / name)
        written = write_scan(scan.with_hu(scan.hu + np.int16(1), FORGED), tmp_path / "f")
        assert complaints(written) <= known


def test_new_series_of_floats(tmp_path):
    scan = Scan(volume((3, 8, 8)).astype(np.float32) + np.float32(40_000.4), (1, 1, 1))
    back = read_scan(write_scan(scan, tmp_path / "f"))
    assert np.abs(back.hu - scan.hu).max() <= 0.5
    with pytest.raises(ScanError, match="16 bits"): write_scan(replace(scan, hu=scan.hu * np.float32([[[-100]], [[1]], [[100]]])), tmp_path / "g")
    with pytest.raises(ScanError, match="at least 2"): write_scan(replace(scan, hu=scan.hu[:1]), tmp_path / "h")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


def test_resampled_scan_becomes_a_new_series_with_its_marker(toy, tmp_path):
    _, scan = toy
    small = resample(scan.with_hu(scan.hu, FORGED), 1.0)
    back = read_scan(write_scan(small, tmp_path / "r"))
    assert (back.hu == small.hu).all() and back.spacing == (1.0, 1.0, 1.0) and "TEACHING FORGERY" in back.meta["marker"]
    moved = replace(scan, origin=(0, 0, 0))  # headers no longer describe it
    assert read_scan(write_scan(moved, tmp_path / "m")).origin == (0, 0, 0)


def test_values_outside_the_stored_bits_are_clipped_aloud(toy, tmp_path, caplog):
    _, scan = toy  # 12 bits unsigned, intercept -1024
    hu = scan.hu.copy()
    hu[0, 0, :2] = -2000, 4000
    with caplog.at_level(logging.WARNING): back = read_scan(write_scan(scan.with_hu(hu), tmp_path / "c"))
    assert back.hu[0, 0, :2].tolist() == [-1024, 3071] and "2 voxels" in caplog.text


def test_originals_and_foreign_folders_are_never_replaced(toy, tmp_path):
    folder, scan = toy
    with pytest.raises(OutputError, match="read from"): write_scan(scan, folder)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.docx").write_text("precious" * 50)
    with pytest.raises(OutputError, match="thesis.docx"): write_scan(scan, tmp_path / "home")
    with pytest.raises(OutputError, match="suffix"): write_scan(scan, tmp_path / "a.png")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError): write_scan(scan, tmp_path / "file" / "a.mha")
    with pytest.raises(OutputError): write_scan(scan, tmp_path / "file")
    assert (tmp_path / "home" / "thesis.docx").exists() and (tmp_path / "file").read_text() == "x"
    first = write_scan(scan.with_hu(scan.hu, FORGED), tmp_path / "out")
    assert write_scan(scan.with_hu(scan.hu, FORGED), tmp_path / "out") == first  # our own earlier result may be replaced


def test_failed_write_leaves_nothing(toy, tmp_path, monkeypatch):
    _, scan = toy
    before = sorted(p.name for p in tmp_path.iterdir())
    saved = pydicom.dataset.Dataset.save_as
    def fail(self, path, *args, **kwargs):
        if path.name == scan.source.names[3]: raise OSError(28, "No space left on device")
        return saved(self, path, *args, **kwargs)
    monkeypatch.setattr(pydicom.dataset.Dataset, "save_as", fail)
    with pytest.raises(OutputError, match="No space"): write_scan(scan, tmp_path / "half")
    monkeypatch.setattr(sitk, "WriteImage", lambda *a: (_ for _ in ()).throw(RuntimeError("disk full")))
    with pytest.raises(OutputError, match="disk full"): write_scan(scan, tmp_path / "half.mha")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---- the object

def test_scan_refuses_nonsense():
    good = dict(hu=volume(), spacing=(1, 1, 1))
    for bad in (dict(hu=volume()[0]), dict(hu=volume().astype(np.float64)), dict(spacing=(1, 1)), dict(spacing=(1, 0, 1)), dict(spacing=(1, np.nan, 1)),
                dict(origin=(0, np.inf, 0)), dict(direction=np.ones((3, 3))), dict(hu=np.zeros((0, 3, 3), np.int16))):
        with pytest.raises(ScanError): Scan(**{**good, **bad})


def test_with_hu_keeps_type_and_never_mutates():
    scan = Scan(volume(), (1, 1, 1))
    other = scan.with_hu(scan.hu.astype(np.float64) + 0.6, FORGED)
    assert other.hu.dtype == np.int16 and (other.hu == scan.hu + 1).all() and scan.history == () and other.history == (FORGED,)
    assert other.with_hu(scan.hu, PROTECTED).history == (FORGED, PROTECTED)
    assert scan.with_hu(np.full(scan.shape, 1e6)).hu.max() == 32767
    with pytest.raises(ScanError): scan.with_hu(scan.hu[:2])
    with pytest.raises(ScanError): scan.with_hu(np.full(scan.shape, np.nan))


@pytest.mark.parametrize("spacing", [1.0, (1.0, 0.5, 0.9), (5.0, 2.0, 2.0)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_resample_is_simpleitk_linear(spacing, dtype):
    scan = Scan(volume().astype(dtype), (2.5, 0.7, 0.8), (5, 6, 7))
    out = resample(scan, spacing)
    image = sitk.GetImageFromArray(scan.hu.astype(np.float64))
    image.SetSpacing(scan.spacing[::-1]), image.SetOrigin(scan.origin)
    expected = sitk.GetArrayFromImage(sitk.Resample(image, out.shape[::-1], sitk.Transform(), sitk.sitkLinear, out.origin, out.spacing[::-1]))
    assert np.abs(expected - out.hu).max() <= (0.5001 if dtype == np.int16 else 1e-2)
    assert (resample(scan, scan.spacing).hu == scan.hu).all()
    with pytest.raises(ScanError): resample(scan, 0)


def test_window_and_pictures(tmp_path):
    import matplotlib.pyplot as plt
    assert window(np.array([-200, -160, 40, 240, 300], np.int16), 40, 400).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ScanError): window(np.zeros(3), 0, 0)
    hu = np.random.default_rng(0).normal(-800, 60, (4, 512, 512)).astype(np.int16)
    heat = np.zeros((121, 121)); heat[40:60, 40:60] = 1
    figure = show_slices(hu, list("abcd"), overlay=[None, heat, None, heat], boxes=[None, [(200, 232, 100, 132)], None, None])
    figure.axes[0].set_title("changed later")
    figure.savefig(tmp_path / "a.png", bbox_inches="tight")
    figure.canvas.draw()
    assert np.asarray(figure.canvas.buffer_rgba()).std() > 0
    assert plt.get_fignums() == [] and (tmp_path / "a.png").stat().st_size < 130_000
    assert len(show_slices(hu[0]).axes) == 1
    for bad in (dict(images=volume()[:2], titles=["one"]), dict(images=np.zeros((2, 2, 2, 2))), dict(images=[]), dict(images=volume()[:2], overlay=[heat])):
        with pytest.raises(ScanError): show_slices(**bad)


# ---- damage at random, and real files

def bases(folder):
    "One healthy input of each kind: path to read -> files that may be damaged."
    write = lambda name, **options: write_series(folder / name, volume((4, 20, 16)) + 1024, **options)
    found = {write("explicit"): 30, write("implicit", syntax=ImplicitVRLittleEndian): 20, write("big", syntax=ExplicitVRBigEndian): 10, write("deflated", syntax=DeflatedExplicitVRLittleEndian): 20, write("rle", syntax=RLELossless): 20}
    found[write_enhanced(folder / "multi" / "m.dcm", list(volume((4, 20, 16)) + 1024)).parent] = 25
    import importlib.util
    if importlib.util.find_spec("gdcm"):
        for name in ("JPEGLSLossless", "JPEGLosslessProcess14_1", "JPEG2000Lossless"): found[gdcm_pack(folder / "explicit", folder / name, name)] = 4  # slow: a process for each
    for suffix in SUFFIXES:
        (folder / suffix[1:]).mkdir()
        found[write_scan(Scan(volume((4, 20, 16)), (2.5, 1, 1)), folder / suffix[1:] / f"a{suffix}")] = 26
    (folder / "zip").mkdir()
    found[zipped(folder / "zip" / "a.zip", {p.name: p.read_bytes() for p in (folder / "explicit").iterdir()})] = 15
    return found


def torment(folder, seed=7):
    "Read damaged inputs and write what can be read; prints how each ended and how far memory grew. Runs in a process of its own."
    import json
    folder, dice, ended = Path(folder), random.Random(int(seed)), {"scan": 0, "error": 0, "other": []}
    memory = lambda: {line.split(":")[0]: int(line.split()[1]) // 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(("VmSize", "VmRSS", "VmPeak", "VmHWM"))} if Path("/proc/self/status").exists() else {}
    found, before = bases(folder), None
    for source, turns in found.items():
        read_scan(source)  # healthy: also loads the libraries
    before = memory()
    for source, turns in found.items():
        for turn in range(turns):
            target = folder / "work"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source if source.is_dir() else source.parent, target)
            path = target if source.is_dir() else target / source.name
            victim = dice.choice(sorted(target.iterdir()))
            raw = bytearray(victim.read_bytes())
            for _ in range(dice.choice([1, 1, 2, 5, 20])):
                at, how = dice.randrange(len(raw)) if dice.random() < 0.3 else dice.randrange(min(len(raw), 1400)), dice.random()
                if how < 0.3: raw[at] = dice.randrange(256)
                elif how < 0.45: raw[at] ^= 1 << dice.randrange(8)
                elif how < 0.6: raw[at:at + 4] = b"\xff\xff\xff\x7f"[:len(raw) - at]
                elif how < 0.7: del raw[max(at, 1):]
                elif how < 0.85: raw[at:at] = bytes(dice.randrange(256) for _ in range(9))
                elif how < 0.95: raw[at:at] = raw[max(0, at - 200):at]
                else: del raw[at:at + 9]
                if len(raw) < 3: break
            victim.write_bytes(raw)
            try:
                scan = read_scan(path, regrid=turn % 2 == 1)
                assert np.isfinite(scan.hu).all()
                write_scan(scan, folder / "written again")
                ended["scan"] += 1
            except MitsError as error:
                if "\n" in str(error): ended["other"].append(f"{source.name} turn {turn}: newline in {error}")
                ended["error"] += 1
            except Exception as error: ended["other"].append(f"{source.name} turn {turn}: {error!r}")
    after = memory()
    print(json.dumps({**ended, **({"asked": after["VmPeak"] - before["VmSize"], "used": after["VmHWM"] - before["VmRSS"]} if after else {})}))


def test_mutated_files_end_in_a_scan_or_one_of_our_errors(tmp_path):
    import json, os, subprocess, sys
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "import sys, test_scan; test_scan.torment(sys.argv[1])", str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]  # no crash, no hang
    ended = json.loads(done.stdout.splitlines()[-1])
    assert ended["other"] == [] and ended["scan"] + ended["error"] >= 200 and min(ended["scan"], ended["error"]) > 40, ended
    assert ended.get("asked", 0) < 1024 and ended.get("used", 0) < 1024, ended  # MB


def test_real_series(data_dir, tmp_path, capfd):
    folder = data_dir / "dicom" / "LIDC-IDRI-0001"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan = read_scan(folder)
        copy = write_scan(scan, tmp_path / "copy")
        forged = write_scan(scan.with_hu(np.where(np.arange(512) == 7, np.int16(0), scan.hu), FORGED), tmp_path / "forged")
        again = read_scan(forged)
    assert capfd.readouterr().err == ""
    assert scan.shape == (30, 512, 512) and scan.spacing == (2.5, 0.703125, 0.703125) and scan.hu.min() == -2048 and scan.hu.dtype == np.int16
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    image = itk_series(forged)
    assert (sitk.GetArrayFromImage(image) == again.hu).all() and (again.hu != scan.hu)[..., 8:].sum() == 0
    assert np.allclose(image.GetSpacing(), scan.spacing[::-1]) and np.allclose(image.GetOrigin(), scan.origin)


def test_real_image_files_and_lone_slices(data_dir, capfd):
    for name, shape in {"LIDC-IDRI-0003": (44, 512, 512), "CPTAC-LSCC_C3N-00247": (20, 512, 512), "Lung_Dx-A0001": (24, 512, 512)}.items():
        scan = read_scan(data_dir / f"{name}.mha")
        assert scan.shape == shape and scan.hu.dtype == np.int16
    for path in (data_dir / "slices", data_dir / "slices" / "COVID-19-NY-SBU_A002304.dcm"):
        with pytest.raises(ScanError): read_scan(path)
    assert capfd.readouterr().err == ""
