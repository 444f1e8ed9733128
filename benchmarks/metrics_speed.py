"""Milliseconds per slice of the image metrics, beside scikit-image and the `lpips` package in the same run.

    python benchmarks/metrics_speed.py [--slices 16] [--size 512] [--device cpu] [--threads N] [--json FILE]

LPIPS runs on random weights unless MITS_LPIPS_BACKBONE names a file: its speed does not depend on them.
"""
import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np


def milliseconds(call, slices: int, device: str, repeats: int = 3) -> float:
    "Best of several calls after one to warm up, per slice."
    import torch
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device != "cpu": torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds[1:]) / slices


def random_backbone(folder: str) -> Path:
    "A SqueezeNet 1.1 with seeded random weights, as a file."
    import torch
    from safetensors.torch import save_file
    from mits_nb.core import import_torchvision
    torch.manual_seed(0)
    path = Path(folder) / "random.safetensors"
    save_file(import_torchvision().models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def package_lpips(a: np.ndarray, b: np.ndarray, device: str):
    "A call of the `lpips` package (random weights) on the same slices, two at a time."
    import torch
    from mits_nb.core import import_torchvision
    from mits_nb.metrics import lung_window_image
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lpips
        model = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).to(device)
    x, y = (torch.from_numpy(lung_window_image(v))[:, None].expand(-1, 3, -1, -1).to(device) for v in (a, b))
    def call():
        with torch.inference_mode(): return sum(float(model(x[k:k + 2], y[k:k + 2]).sum()) for k in range(0, len(x), 2)) / len(x)
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=16)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    import torch
    from skimage.metrics import mean_squared_error, structural_similarity
    from mits_nb import metrics
    from mits_nb.core import rng, versions
    if args.threads: torch.set_num_threads(args.threads)
    shape = (args.slices, args.size, args.size)
    a = rng(0, "reference").normal(-600, 300, shape).round().astype(np.int16)
    b = (a + rng(0, "noise").normal(0, 20, shape)).round().astype(np.int16)
    p, q = (torch.from_numpy(v[:, None].astype(np.float32)).to(args.device) for v in (a, b))  # a batch (n, 1, y, x)
    with tempfile.TemporaryDirectory() as folder:
        backbone = os.environ.get("MITS_LPIPS_BACKBONE") or random_backbone(folder)
        def quiet(call):  # a measurement needs no gradient
            with torch.inference_mode(): return call()
        calls = {
            "RMSE": (lambda: metrics.rmse(a, b), lambda: quiet(lambda: metrics.rmse(p, q)), lambda: [mean_squared_error(x.astype(float), y.astype(float)) for x, y in zip(a, b)]),
            "PSNR": (lambda: metrics.psnr(a, b), lambda: quiet(lambda: metrics.psnr(p, q)), None),
            "SSIM": (lambda: metrics.ssim(a, b), lambda: quiet(lambda: metrics.ssim(p, q)), lambda: [structural_similarity(x.astype(float), y.astype(float), data_range=4096) for x, y in zip(a, b)]),
            "LPIPS": (lambda: quiet(lambda: metrics.lpips(a, b, backbone)), lambda: quiet(lambda: metrics.lpips(p, q, backbone)), package_lpips(a, b, args.device))}
        rows = {name: [None if call is None else round(milliseconds(call, args.slices, args.device), 3) for call in row] for name, row in calls.items()}
    print(f"{args.slices} slices of {args.size} x {args.size}, tensors on {args.device}, {torch.get_num_threads()} threads; ms per slice")
    print(f"{'':8}{'array':>10}{'tensor':>10}{'library':>10}")
    for name, row in rows.items(): print(f"{name:8}" + "".join(f"{'-' if v is None else f'{v:.2f}':>10}" for v in row))
    if args.json: Path(args.json).write_text(json.dumps({"ms_per_slice": rows, "columns": ["array", "tensor", "library"], "device": args.device, "threads": torch.get_num_threads(), "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
