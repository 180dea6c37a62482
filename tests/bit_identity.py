"""Digests of what the project computes on a CPU, to show that a change of its structure changed no output bit.

    python tests/bit_identity.py record before.json             # with the tree as it was
    python tests/bit_identity.py record after.json              # with the tree as it is
    python tests/bit_identity.py compare before.json after.json # exit code 1 names what differs

`record --tree FOLDER` takes the code of another checkout; `--work FOLDER` keeps what is made, and goes on where it
stopped. Digests are compared on one kind of CPU only, because matrix products round by its instructions: `compare` says
so when two files are of different ones. What is recorded:

export    graph and weights of every network of a recipe, without the source paths that torch writes into a graph
frames    latents and decoded frames of the demo story, from every backend that runs on a CPU
train     checkpoints after 20 steps of the DiT under NVFP4, and 5 of the VAE
distill   the student after 5 steps
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("tiny_nvfp4_sm120", "tiny_w4a16_sm90", "tiny_fp8_sm90", "tiny_bf16_sm90")
LIBRARY = ("tiny_bf16_library_sm90", "tiny_fp8_fast_sm90")  # by their files
BACKENDS = ("reference", "torch")
CHUNKS = 3
Digests = dict[str, str]

FRAMES = """
import hashlib, json, sys
from longtake.runtime import Generator
folder, backend, chunks, story = sys.argv[1:]
found = {}
with Generator.from_engines(folder, backend) as generator:
    with generator.session(story, chunks=int(chunks)) as session:
        for chunk in session:
            found[f"{chunk.index}.latents"] = hashlib.sha256(chunk.latents.numpy().tobytes()).hexdigest()
            found[f"{chunk.index}.frames"] = hashlib.sha256(chunk.frames.tobytes()).hexdigest()
print(json.dumps(found))
"""


def run(tree: Path, *words: str) -> str:
    """Run Python on `tree`'s code; what it printed. Raises CalledProcessError with its errors shown."""
    environ = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "LONGTAKE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def longtake(tree: Path, *words: str) -> None:
    """Run one `longtake` command of `tree`; commits before `python -m longtake` have another door."""
    door = "longtake" if (tree / "longtake" / "__main__.py").is_file() else "longtake.runtime.cli"
    run(tree, "-m", door, *words)


def graph_digest(path: Path) -> str:
    """Digest of an ONNX file without its external data and without names of source files."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)

    def clean(message: object) -> None:
        for name in ("doc_string", "metadata_props", "producer_version"):
            if hasattr(message, name):
                message.ClearField(name)  # type: ignore[attr-defined]

    clean(model)
    for graph in (model.graph, *model.functions):
        clean(graph)
        values = [*getattr(graph, "input", ()), *getattr(graph, "initializer", ()), *graph.value_info]
        for part in (*graph.node, *(value for value in values if not isinstance(value, str))):
            clean(part)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensor_digests(folder: Path) -> dict[str, str]:
    """Digest of every checkpoint's tensors, without its header, which may hold the command that made it."""
    import torch
    from safetensors.torch import load_file

    found = {}
    paths = [path for path in sorted(folder.glob("*.safetensors")) if not path.stem.startswith("resume-")]
    for path in [*paths, *sorted(folder.glob("resume-*.safetensors"))[-1:]]:  # earlier ones were saved by the clock
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[path.stem] = digest.hexdigest()
    return found


def export(tree: Path, work: Path, name: str) -> Digests:
    """One recipe's networks."""
    out, recipe = work / "export" / name, name if name in RECIPES else f"docs/recipes_library/{name}.yaml"
    longtake(tree, "export", "--recipe", recipe, "--checkpoints", "training/checkpoints/tiny-4step", "--out", str(out),
             "--no-parity")  # fmt: skip
    found = {f"{name}.{path.stem}": graph_digest(path) for path in sorted(out.glob("*/*.onnx"))}
    return found | {f"{name}.{path.name}": file_digest(path) for path in sorted(out.glob("*/*.data"))}


def frames(tree: Path, work: Path, backend: str, recipe: str) -> Digests:
    """A video of one recipe's export by one backend."""
    (folder,) = (work / "export" / recipe).iterdir()  # named by the networks, which several recipes may share
    out = run(tree, "-c", FRAMES, str(folder), backend, str(CHUNKS), "docs/stories/demo.yaml")
    return {f"{backend}.{recipe}.{key}": value for key, value in json.loads(out.splitlines()[-1]).items()}


def train(tree: Path, work: Path, stage: str) -> Digests:
    """A stage's checkpoints."""
    shipped, few = (
        "training/checkpoints/tiny",
        ("--batch", "1", "--evaluate-steps", "0", "--device", "cpu", "--seed", "3"),
    )
    words = {
        "dit": ("--init", shipped, "--vae", shipped, "--precision", "nvfp4", "--context", "window", "--chunks", "1,2",
                "--stories", "6", "--steps", "20"),
        "vae": ("--steps", "5"),
    }  # fmt: skip
    shutil.rmtree(work / stage, ignore_errors=True)  # of a run that was stopped
    longtake(tree, "train", "--stage", stage, *words[stage], *few, "--out", str(work / stage))
    return {f"{stage}.{key}": value for key, value in tensor_digests(work / stage).items()}


def distill(tree: Path, work: Path) -> Digests:
    """The student."""
    shutil.rmtree(work / "student", ignore_errors=True)
    longtake(tree, "distill", "--teacher", "training/checkpoints/tiny", "--student-steps", "4", "--precision", "nvfp4",
             "--steps", "5", "--batch", "1", "--stories", "4", "--evaluate-steps", "0", "--device", "cpu", "--seed", "3", "--out", str(work / "student"))  # fmt: skip
    return tensor_digests(work / "student")


PARTS: dict[str, list[Callable[[Path, Path], Digests]]] = {
    "export": [partial(export, name=name) for name in (*RECIPES, *LIBRARY)],
    "frames": [partial(frames, backend=backend, recipe=recipe) for recipe in RECIPES for backend in BACKENDS],
    "train": [partial(train, stage=stage) for stage in ("dit", "vae")],
    "distill": [distill],
}


def cpu() -> str:
    """The processor's name and the vector instructions that libraries choose by."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    vectors = [
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()
    ]
    return f"{facts.get('model name', 'unknown')} ({' '.join(vectors)})"


def record(out: Path, tree: Path, only: Sequence[str], work: Path) -> None:
    """Write the digests of `tree` to `out`, step by step; those of the parts `only`. Steps done in `work` are kept."""
    import torch

    commit = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    found: dict[str, Any] = {"commit": commit, "cpu": cpu(), "torch": torch.__version__}
    for part in only:
        found[part] = {}
        for number, step in enumerate(PARTS[part]):
            print(f"{part} {number + 1} of {len(PARTS[part])} ...", file=sys.stderr, flush=True)
            done = work / f"{part}_{number}.json"
            if not done.is_file():
                done.write_text(json.dumps(step(tree, work)), encoding="utf-8")
            found[part] |= json.loads(done.read_text(encoding="utf-8"))
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(before: Path, after: Path) -> int:
    """0 if all digests agree; else 1, and what differs is named."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    for fact in ("cpu", "torch"):
        if old[fact] != new[fact]:
            print(f"cannot be compared: {fact} was {old[fact]}, is {new[fact]}")
            return 2
    parts = [part for part in PARTS if part in old and part in new]
    print(f"compared: {', '.join(parts)}")
    differ = [f"{part}: {key}" for part in parts for key in old[part].keys() | new[part].keys()
              if old[part].get(key) != new[part].get(key)]  # fmt: skip
    print("\n".join(sorted(differ)) or f"all {sum(len(old[part]) for part in parts)} digests agree")
    return 1 if differ else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--tree", type=Path, default=ROOT)
    recording.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="frames needs export")
    recording.add_argument("--work", type=Path, metavar="FOLDER", help="kept, of one tree (default: a temporary one)")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.before, args.after)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        record(args.out.resolve(), args.tree.resolve(), args.only, work.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
