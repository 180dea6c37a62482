"""What one visit to two H200 runs for real time; each part stays under ten minutes and keeps its JSON.

    python tests/gpu_visits/realtime.py tree         # where git is: the code before into build/house/before, for `write`
    python tests/gpu_visits/realtime.py test         # GPU tests of what is new here
    python tests/gpu_visits/realtime.py build        # graphs and plans for one and for two ranks, 8-bit convolutions
    python tests/gpu_visits/realtime.py build_w4a16  # ... with 4-bit weights
    python tests/gpu_visits/realtime.py build_world  # ... of SANA-WM
    python tests/gpu_visits/realtime.py conv8        # 8-bit convolutions with PyTorch, eager and compiled, in the same run
    python tests/gpu_visits/realtime.py windows      # no window kept, ten, and as many as the memory allows
    python tests/gpu_visits/realtime.py steps2       # end to end with 2 steps
    python tests/gpu_visits/realtime.py ranks        # one video on two GPUs beside one, 8-bit convolutions
    python tests/gpu_visits/realtime.py write        # the cache write alone, before and after: its launches, and whether its bits are the same
    python tests/gpu_visits/realtime.py world        # SANA-WM at full size with PyTorch, eager and compiled
    python tests/gpu_visits/realtime.py world_tiny   # the small one likewise
    python tests/gpu_visits/realtime.py w4a16        # 4-bit weights beside compiled bf16 in the same run

JSON goes to docs/measurements, or to --out. `windows` is before and after of one card in one visit. `--tiny` takes the small
model's recipes, to try the parts out; on a CPU no figure is the product's. Not run yet: build with two ranks, build_world, ranks, world,
world_tiny.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conv8
import house

ROOT = Path(__file__).resolve().parents[2]
NEW = ("test_bench_world.py", "test_bench.py", "test_passes.py", "test_second_gpu.py")
PLUGINS = ("test_kernels.py", "test_window_kernels.py", "test_hopper_attention.py", "test_conv8.py")
BEFORE = "24a6e5c"  # the last commit that packed the cache as it did before
Part = Callable[[Path, bool], int]


def recipe(name: str, tiny: bool) -> str:
    """A recipe's name or file; the small model's."""
    name = name.replace("wan2.2-ti2v-5b", "tiny") if tiny else name
    library = conv8.RECIPES / f"{name}.yaml"
    return str(library.relative_to(ROOT)) if library.is_file() else name


CONV8, W4A16 = "wan2.2-ti2v-5b_fp8_conv8_sm90", "wan2.2-ti2v-5b_w4a16_sm90"
WORLD, WORLD_TINY = "sana-wm_bf16_sm90", "world-tiny_bf16_sm90"


def bench(out: Path, name: str, *words: str) -> int:
    """`longtake bench`, its report kept under `name`, with the command in it."""
    with tempfile.TemporaryDirectory() as folder:
        code = conv8.longtake("bench", *words, "--out", folder)
        found = Path(folder) / "bench.json"
        if found.is_file():
            report = json.loads(found.read_text(encoding="utf-8"))
            told = f"longtake bench {' '.join(words)}"
            text = json.dumps({**report, "command": told, "rerun_with": told}, indent=1)
            (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        for log in Path(folder).glob("parts/*.log"):
            if code:
                print(f"---- {log.name}", log.read_text(encoding="utf-8")[-2000:], sep="\n")
    return code


def test(out: Path, tiny: bool) -> int:
    files = [*(f"tests/runtime/{name}" for name in NEW), *(f"tests/plugins/{name}" for name in PLUGINS)]
    return conv8.run(sys.executable, "-m", "pytest", "-m", "gpu", "-q", *files, "tests/runtime/parallel")


def build(name: str, gpus: str = "1") -> Part:
    def part(out: Path, tiny: bool) -> int:
        words = ("--recipe", recipe(name, tiny), "--skeleton")
        ranks = ("--gpus", gpus) if gpus != "1" else ()
        return conv8.longtake("export", *words) or conv8.longtake("engines", *words, *ranks)

    return part


def conv8_and_torch(out: Path, tiny: bool) -> int:
    words = ("--recipe", recipe(CONV8, tiny), "--against", "torch", "--chunks", "3")
    return bench(out, "bench_5b_conv8_against_torch_h200", *words)


def windows(out: Path, tiny: bool) -> int:
    words = ("--recipe", recipe(CONV8, tiny), "--chunks", "3", "--seconds", "180")
    none = bench(out, "bench_5b_conv8_windows_0_h200", *words, "--kept-windows", "0")
    ten = bench(out, "bench_5b_conv8_windows_10_h200", *words, "--kept-windows", "10")
    return max(none, ten, bench(out, "bench_5b_conv8_windows_fit_h200", *words))


def steps2(out: Path, tiny: bool) -> int:
    return bench(out, "bench_5b_conv8_2steps_h200", "--recipe", recipe(CONV8, tiny), "--steps", "2", "--chunks", "3")


def ranks(out: Path, tiny: bool) -> int:
    return bench(out, "bench_5b_conv8_two_ranks_h200", "--recipe", recipe(CONV8, tiny), "--gpus", "2", "--chunks", "3")


def tree(out: Path, tiny: bool) -> int:
    house.make_tree(BEFORE)
    return 0


def write(out: Path, tiny: bool) -> int:
    """Both trees in turns, twice: the same script, another `longtake` before it."""
    rows: list[dict[str, Any]] = []
    for side, place in tuple(house.SIDES.items()) * 2:
        path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
        words = [sys.executable, str(Path(__file__).with_name("cache_write.py"))]
        done = subprocess.run(
            words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240
        )
        print(side, done.stdout, done.stderr[-2000:], flush=True)
        if done.returncode:
            return done.returncode
        rows.append({"side": side, **json.loads(done.stdout.splitlines()[-1])})
    sys.path.insert(0, str(ROOT))
    from longtake.provenance import origin

    report = {
        **origin(),
        "kind": "bench",
        "what": "the 4-bit cache write of one layer, alone, before and after: one card, alternating",
        "command": "python tests/gpu_visits/realtime.py write",
        "rerun_with": "",
        "not_rerun_because": "it compares two commits: see command",
        "before": BEFORE,
        "gpu": rows[0]["gpu"],
        "rows": rows,
    }
    (out / "cache_write_h200.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def world(out: Path, tiny: bool) -> int:
    words = ("--recipe", WORLD_TINY if tiny else WORLD, "--against", "torch", "--chunks", "3")
    return bench(out, "bench_sana_wm_h200", *words)


def world_tiny(out: Path, tiny: bool) -> int:
    return bench(out, "bench_world_tiny_h200", "--recipe", WORLD_TINY, "--against", "torch")


def w4a16(out: Path, tiny: bool) -> int:
    words = ("--recipe", recipe(W4A16, tiny), "--networks", "dit", "--against", "torch", "--chunks", "2")
    return bench(out, "bench_5b_w4a16_against_torch_h200", *words)


PARTS: dict[str, Part] = {
    "tree": tree, "test": test, "build": build(CONV8, "2"), "build_w4a16": build(W4A16), "build_world": build(WORLD),
    "conv8": conv8_and_torch, "windows": windows, "steps2": steps2, "ranks": ranks, "write": write, "world": world,
    "world_tiny": world_tiny, "w4a16": w4a16,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measurements")
    parser.add_argument("--tiny", action="store_true", help="the small model's recipes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return PARTS[args.part](args.out, args.tiny)


if __name__ == "__main__":
    sys.exit(main())
