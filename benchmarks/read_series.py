"""Time and memory of reading a DICOM series, beside SimpleITK's series reader in the same run.

    python benchmarks/read_series.py [--slices 300] [--size 512] [--repeats 5] [--folder SERIES] [--json FILE]

The series is made in a temporary folder with headers of the size that scanners write (about 90 elements). Both readers take turns,
so that a busy machine slows both; SimpleITK's time includes sorting the files (GetGDCMSeriesFileNames), as ours does. Peak memory
is measured in a process of its own that does nothing but import the library and read. Goals: ratio <= 1.0, memory <= 2.2 volumes.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MEMORY = """
import sys
from mits_nb.core import peak_rss_mb
from mits_nb.scan import read_scan
import pydicom
before = peak_rss_mb()
scan = read_scan(sys.argv[1])
print(before * 2**20 / 1e6, peak_rss_mb() * 2**20 / 1e6)
"""


def make_series(folder: Path, slices: int, size: int) -> None:
    "A series as a scanner writes it: 12-bit noise on a slope, unsigned, some 90 elements a header."
    import pydicom
    from mits_nb.scan import Scan, write_scan

    rng = np.random.default_rng(0)
    write_scan(Scan(np.zeros((2, size, size), np.int16), (1.25, 0.7, 0.7)), folder)
    first, second = sorted(folder.iterdir())
    header = pydicom.dcmread(first)
    second.unlink(), first.unlink()
    for name, value in dict(SeriesDate="20000101", AcquisitionDate="20000101", ContentDate="20000101", SeriesTime="120000", AcquisitionTime="120000", ContentTime="120000", InstitutionName="A hospital",
                            StationName="CT01", StudyDescription="Chest", ManufacturerModelName="Model", PatientAge="060Y", PatientWeight="70", ScanOptions="HELICAL MODE", DataCollectionDiameter="500",
                            DeviceSerialNumber="1", SoftwareVersions="1.0", ProtocolName="Chest", ReconstructionDiameter="360", DistanceSourceToDetector="949.075", DistanceSourceToPatient="541", GantryDetectorTilt="0",
                            TableHeight="144.4", RotationDirection="CW", ExposureTime="570", XRayTubeCurrent="400", Exposure="4684", FilterType="BODY FILTER", GeneratorPower="48000", FocalSpots="1.2", ConvolutionKernel="STANDARD",
                            SliceLocation="0", PatientIdentityRemoved="YES", DeidentificationMethod="test").items(): setattr(header, name, value)
    block = header.private_block(0x0099, "A MANUFACTURER", create=True)
    for k in range(15): block.add_new(k + 1, "LO", f"private value {k}")
    header.BitsStored, header.HighBit, header.PixelRepresentation, header.RescaleIntercept = 12, 11, 0, -1024
    for k, name in enumerate(rng.permutation(slices)):
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.8.498.1.{k}"
        header.InstanceNumber, header.ImagePositionPatient = k + 1, [-180, -180, 1.25 * k]
        header.PixelData = rng.integers(0, 4096, (size, size), dtype=np.uint16).tobytes()
        header.save_as(folder / f"IM{name:05d}.dcm", enforce_file_format=True)


def itk_read(folder: Path):
    "The usual three lines."
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def seconds(function, folder: Path) -> float:
    start = time.perf_counter()
    function(folder)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="an existing series instead of the made one")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    import SimpleITK as sitk
    from mits_nb.scan import read_scan

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder) if args.folder else Path(temporary, "series")
        if not args.folder: make_series(folder, args.slices, args.size)
        scan = read_scan(folder)  # warms the file cache and the imports
        image = itk_read(folder)  # its array is a view: it must outlive the comparison
        assert (sitk.GetArrayViewFromImage(image) == scan.hu).all(), "the two readers disagree"
        shape, volume_mb = scan.shape, scan.hu.nbytes / 1e6
        del scan, image
        turns = [(seconds(read_scan, folder), seconds(itk_read, folder)) for _ in range(args.repeats)]
        ours, theirs = (statistics.median(times) for times in zip(*turns))
        before, peak = map(float, subprocess.run([sys.executable, "-c", MEMORY, str(folder)], check=True, capture_output=True, text=True).stdout.split())
    print(f"series of {shape[0]} slices, {shape[2]} x {shape[1]}: {volume_mb:.0f} MB of voxels; median of {args.repeats} turns each")
    print(f"read_scan               {ours:6.2f} s   {' '.join(f'{a:.2f}' for a, _ in turns)}")
    print(f"SimpleITK series reader {theirs:6.2f} s   {' '.join(f'{b:.2f}' for _, b in turns)}")
    print(f"ratio                   {ours / theirs:6.2f}     goal <= 1.0")
    print(f"peak memory             {peak:6.0f} MB  = {peak / volume_mb:.2f} volumes with the interpreter ({before:.0f} MB), {(peak - before) / volume_mb:.2f} without; goal <= 2.2")
    if args.json:
        figures = dict(shape=shape, read_scan_s=[a for a, _ in turns], simpleitk_s=[b for _, b in turns], ratio=ours / theirs, peak_mb=peak, before_mb=before, volume_mb=volume_mb)
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
