"""One visit to a GPU that compares two commits: `longtake bench` of the 5B fp8 recipe, alternating, on one card.

    python tests/gpu_visits/house.py tree 769fc2a    # where git is: the old tree into build/house/before, which git ignores
    python tests/gpu_visits/house.py engines         # both trees export without weights and build, if that is not done yet
    python tests/gpu_visits/house.py runs            # before, after, three times; the report is written after every run

`engines` and `runs` each stay under ten minutes and go on where an earlier call stopped; build/house must travel and be
kept between calls. The exit code of `runs` is 1 if a median or the memory differs by more than 1 %. The report goes to
docs/measurements, or to --out. `--recipe tiny_fp8_sm90` tries it on a CPU, where no figure is the product's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "house"
SIDES = {"before": WORK / "before", "after": ROOT}
KEPT = {
    "before": (),
    "after": ("--kept-windows", "0"),
}  # before, no layer kept its window between the passes of a chunk
NOT_CARRIED = ("docs", "tests", "training/checkpoints")
COMMITS = "commits.json"  # in the old tree: the machine of the visit has no history
LIMIT_S = 570
RUNS = 3
BOUND = 0.01
FIGURES = ("dit", "vae", "end_to_end")
SAME = ("gpu", "preset", "recipe", "precision", "cache", "attention", "backend", "resolution", "steps", "guidance",
        "chunk_latents", "window_latents", "warmup_chunks", "chunks")  # fmt: skip


def make_tree(commit: str) -> None:
    """The code of `commit` in build/house/before, without docs, tests and checkpoints."""
    shutil.rmtree(SIDES["before"], ignore_errors=True)
    SIDES["before"].mkdir(parents=True)
    paths = [".", *(f":(exclude){name}" for name in NOT_CARRIED)]
    archive = subprocess.run(["git", "archive", commit, "--", *paths], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x", "-C", str(SIDES["before"])], input=archive, check=True)
    words = ["git", "rev-parse", commit, "HEAD"]
    commits = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    (SIDES["before"] / COMMITS).write_text(json.dumps(dict(zip(SIDES, commits))), encoding="utf-8")


def longtake(side: str, deadline: float, *words: str) -> float:
    """Run a command of one side's code, in its tree; the seconds it took. Raises what subprocess raises."""
    tree = SIDES[side]
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    home = str(WORK / f"{side}_home")
    environ = {**os.environ, "PYTHONPATH": path, "LONGTAKE_HOME": home, "LONGTAKE_CACHE_DIR": home}
    print(f"{side}: longtake", *words, flush=True)
    started = time.monotonic()
    door = "longtake" if (tree / "longtake" / "__main__.py").is_file() else "longtake.runtime.cli"  # of old commits
    subprocess.run(
        [sys.executable, "-m", door, *words], cwd=tree, env=environ, timeout=max(1.0, deadline - started), check=True
    )
    return time.monotonic() - started


def places(side: str) -> tuple[str, ...]:
    return "--onnx", str(WORK / f"{side}_onnx"), "--engines", str(WORK / f"{side}_engines")


def build(recipe: str, deadline: float) -> int:
    """Both sides' graphs and plans."""
    for side in SIDES:
        onnx, engines = places(side)[1::2]
        if not any(Path(onnx).glob("*/export.json")):
            took = longtake(side, deadline, "export", "--recipe", recipe, "--skeleton", "--out", onnx)
            print(f"{side}: exported in {took:.0f} s", flush=True)
        if not any(Path(engines).glob("*/bundle.json")):
            words = ("--recipe", recipe, "--skeleton", "--onnx", onnx, "--out", engines)
            print(f"{side}: built in {longtake(side, deadline, 'engines', *words):.0f} s", flush=True)
    return 0


def bench(side: str, run: int, recipe: str, deadline: float) -> dict[str, Any]:
    """The report of one run; one that is there already is read."""
    out = WORK / "bench" / f"{side}_{run}"
    if not (out / "bench.json").is_file() or report_in(out)["error"]:
        words = ("--recipe", recipe, "--chunks", "2", "--warmup", "4", *KEPT[side], *places(side), "--out", str(out))
        longtake(side, deadline, "bench", *words)
    return report_in(out)


def report_in(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    return report


def runs(recipe: str, out: Path, deadline: float) -> int:
    """Three runs of each side, in turns."""
    reports: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for run in range(1, RUNS + 1):
        for side in SIDES:
            reports[side].append(bench(side, run, recipe, deadline))
            if all(reports.values()):
                report = compared(reports)
                out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: report[key] for key in ("median", "ratio", "beyond_bound")}, indent=1))
    return 1 if report["beyond_bound"] else 0


def compared(reports: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Both sides' medians, what they differ by, and every run. Raises ValueError if they did not measure the same."""
    first = reports["before"][0]
    for report in [report for side in reports.values() for report in side]:
        if other := [name for name in SAME if report.get(name) != first.get(name)]:
            raise ValueError(f"the sides did not measure the same: {', '.join(other)}")
    figures = {side: [{**{name: run["fps"].get(name) for name in FIGURES}, "peak_gb": run["peak_gb"]} for run in side_reports]
               for side, side_reports in reports.items()}  # fmt: skip
    names = [name for name in figures["before"][0] if figures["before"][0][name] is not None]
    median = {
        side: {name: statistics.median(run[name] for run in rows) for name in names} for side, rows in figures.items()
    }
    ratio = {name: round(median["after"][name] / median["before"][name], 4) for name in names}
    return {
        "kind": "bench",
        "what": "one recipe before and after a change of structure: one machine, alternating runs",
        "command": "python tests/gpu_visits/house.py runs",
        "rerun_with": f"longtake bench --recipe {first['recipe']} --chunks 2 --warmup 4",
        "product_figures": first["product_figures"],
        "commits": json.loads((SIDES["before"] / COMMITS).read_text(encoding="utf-8")),
        **{name: first.get(name) for name in (*SAME, "versions")},
        "median": median,
        "ratio": ratio,
        "beyond_bound": [name for name, value in ratio.items() if abs(value - 1) > BOUND],
        "runs": [
            {"side": side, "run": index + 1, "date": report["date"], **figures[side][index],
             "gpu_state": report["engine"].get("gpu_state")}
            for side in reports for index, report in enumerate(reports[side])
        ],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tree", "engines", "runs"))
    parser.add_argument("commit", nargs="?", default="769fc2a")
    parser.add_argument("--recipe", default="wan2.2-ti2v-5b_fp8_sm90")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measurements")
    args = parser.parse_args()
    deadline = time.monotonic() + LIMIT_S
    if args.part == "tree":
        make_tree(args.commit)
        return 0
    if args.part == "engines":
        return build(args.recipe, deadline)
    args.out.mkdir(parents=True, exist_ok=True)
    return runs(args.recipe, args.out / f"bench_{args.recipe}_before_after.json", deadline)


if __name__ == "__main__":
    sys.exit(main())
