"""What one visit to a Hopper GPU runs for the convolutions in 8-bit codes; each part stays under ten minutes.

    python tests/gpu_visits/conv8.py test          # tests of the kernel and of what writes codes
    python tests/gpu_visits/conv8.py sanitize      # compute-sanitizer over the kernel, if it is installed
    python tests/gpu_visits/conv8.py kernels       # a latent's convolutions alone: cuDNN, and every form of ours
    python tests/gpu_visits/conv8.py before        # longtake bench without 8-bit convolutions ...
    python tests/gpu_visits/conv8.py fp8           # ... with all in E4M3 ...
    python tests/gpu_visits/conv8.py int8          # ... and with all in INT8
    python tests/gpu_visits/conv8.py frames        # PSNR and choice at full width, on random weights

JSON goes to docs/measurements, or to --out. `before`, `fp8` and `int8` belong into one visit, on one card.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "docs" / "recipes_library"
LIMIT_S = 570
LARGE = "wan2.2-ti2v-5b"


def run(*words: str) -> int:
    """Run a command in the repository, its output shown; its exit code, 124 past the limit."""
    print("+", " ".join(words), flush=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # where packages were unpacked
    environ = {**os.environ, "PYTHONPATH": path}
    try:
        return subprocess.run(words, cwd=ROOT, env=environ, timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def longtake(*words: str) -> int:
    return run(sys.executable, "-m", "longtake", *words)


def test(out: Path) -> int:
    files = ("test_conv8.py", "test_stream_extend.py", "test_upsample.py", "test_every_op.py")
    return run(sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-k", "conv8 or fp8 or int8 or extend or upsample or encode",
               *(f"tests/plugins/{name}" for name in files))  # fmt: skip


def sanitize(out: Path) -> int:
    tool = shutil.which("compute-sanitizer")
    command = (sys.executable, "-m", "longtake", "sanitize", "conv8")
    if tool is None:
        print("compute-sanitizer is not installed: the kernel runs without it")
        return run(*command)
    checks = (("memcheck", "--report-api-errors", "no"), ("racecheck",), ("synccheck",))
    return max(run(tool, "--tool", *check, "--error-exitcode", "3", *command) for check in checks)


def kernels(out: Path) -> int:
    methods = (
        "cudnn",
        "torch",
        "cublaslt",
        "fp8",
        "int8",
        "fp8_fast",
        "fp8_rows",
        "int8_rows",
        "fp8_late",
        "int8_late",
    )
    return longtake("bench", "kernels", "conv", "--methods", *methods, "--plans", "8", "--seconds", "1", "--json",
                    str(out / "conv8_kernels_h200.json"))  # fmt: skip


def bench(conv: str) -> Callable[[Path], int]:
    def part(out: Path) -> int:
        with tempfile.TemporaryDirectory() as folder:
            text = (RECIPES / f"{LARGE}_fp8_conv8_sm90.yaml").read_text(encoding="utf-8")
            recipe = Path(folder) / f"{LARGE}_fp8_conv_{conv}_sm90.yaml"
            recipe.write_text(text.replace("vae_conv: calibrated", f"vae_conv: {conv}"), encoding="utf-8")
            results = Path(folder) / "bench"
            against = ("--against", "torch") if conv == "bf16" else ()
            code = longtake("bench", "--recipe", str(recipe), "--out", str(results), *against)
            for found in results.rglob("bench.json"):
                shutil.copyfile(found, out / f"bench_5b_conv_{conv}_h200.json")
            return code

    return part


def frames(out: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        made = longtake("random-weights", "--preset", LARGE, "--out", folder, "--only", "vae")
        code = made or longtake("convert", "--preset", LARGE, "--out", folder, "--calibrate", "--chunks", "1", "--passes", "2",
                                "--device", "cuda:0")  # fmt: skip
        side = Path(folder) / "vae.json"
        if side.is_file():
            shutil.copyfile(side, out / "vae_conv8_5b_random_h200.json")
        return code


PARTS: dict[str, Callable[[Path], int]] = {
    "test": test, "sanitize": sanitize, "kernels": kernels, "before": bench("bf16"), "fp8": bench("fp8"), "int8": bench("int8"),
    "frames": frames,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measurements")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return PARTS[args.part](args.out)


if __name__ == "__main__":
    sys.exit(main())
