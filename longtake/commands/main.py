"""The `longtake` command: finds the subcommand, makes its options, runs it; errors become one clear message."""

from __future__ import annotations

import importlib
import io
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from longtake.commands.failures import explained
from longtake.commands.streams import open_standard_streams
from longtake.errors import LongtakeError, nearest
from longtake.settings import configure_logging, settings_from_environment
from longtake.signals import ended_by_signals
from longtake.version import __version__

# Command -> (module, help). A module has COMMAND (see `options.Command`).
COMMANDS = {
    "doctor": ("longtake.commands.doctor", "what runs on this machine, and what is missing"),
    "train": ("longtake.commands.train", "train the VAE or the DiT, in bf16 or under NVFP4"),
    "distill": ("longtake.commands.distill", "distil a trained DiT to 4 or 2 denoise steps"),
    "evaluate": ("longtake.commands.evaluate", "PSNR, flow loss, and whether videos show what their prompts say"),
    "random-weights": ("longtake.commands.random_weights", "checkpoints of a preset with random content"),
    "convert": ("longtake.commands.convert", "released weights (Wan, LongLive, diffusers) to a checkpoint folder"),
    "export": ("longtake.commands.export", "PyTorch to ONNX, with a structural check and a parity table"),
    "engines": ("longtake.commands.engines", "ONNX to TensorRT plans"),
    "generate": ("longtake.commands.generate", "a story to an mp4, with a run report"),
    "serve": ("longtake.commands.serve", "a page and two interfaces: video while it is made"),
    "check": (
        "longtake.commands.check",
        "accuracy: PyTorch fake-quant <-> ONNX Runtime <-> TensorRT, against the recipe's gate",
    ),
    "profile": ("longtake.commands.profile", "where a pass's time goes, by layer and by kernel"),
    "inspect": ("longtake.commands.inspect", "describe a plan, manifest, ONNX file, checkpoint or snapshot"),
    "budget": ("longtake.commands.budget", "what a recipe takes on the GPU, before anything is allocated"),
    "budget memory": ("longtake.runtime.budget.working_memory", "what a VAE decoder's working memory is made of"),
    "bench": ("longtake.commands.bench", "speed and memory at full size, on random weights, against PyTorch"),
    "bench kernels attention": ("longtake.plugins.bench.attention", "sink attention on the quantized cache, alone"),
    "bench kernels linear": ("longtake.plugins.bench.linear", "quantized linears, alone"),
    "bench kernels norm": ("longtake.plugins.bench.norm", "norms, gates and cross-attention, alone"),
    "bench kernels conv": ("longtake.plugins.bench.conv", "the VAE's convolutions, alone"),
    "bench kernels stream": ("longtake.plugins.bench.stream", "what the VAE's streams carry from step to step, alone"),
    "bench parallel": ("longtake.training.parallel.bench.main", "training: ways to share a sample over GPUs"),
    "bench umt5": ("longtake.runtime.bench.umt5", "latency and memory of umT5-XXL, whole and paged"),
    "experiment": (
        "longtake.training.experiment.cli",
        "what 4 bits cost: train, distil and measure (docs/experiment.md)",
    ),
    "experiment arithmetic": ("longtake.training.experiment.arithmetic", "what 8-bit and 4-bit arithmetic costs"),
    "experiment probe": ("longtake.training.experiment.probe_cli", "where attention falls when a subject returns"),
    "experiment vae-codes": ("longtake.training.experiment.vae_codes", "what 8-bit convolutions cost a VAE's frames"),
    "experiment engine-fidelity": ("longtake.training.experiment.engine_fidelity", "the same, of engines"),
    "sanitize": ("longtake.commands.sanitize", "every kernel once, against its reference (for compute-sanitizer)"),
}
# Commands that compute, and what torch, ONNX Runtime and a tiny model reserve of address space (measured: 1.19 GB with one
# thread, 2.36 GB with eight); what models take beyond that is not known here.
HEAVY = ("train", "distill", "export", "engines", "generate", "check", "profile", "bench", "convert")
LIBRARIES_BYTES, THREAD_BYTES = 1_250_000_000, 170_000_000
USAGE = """usage: longtake COMMAND [options]      (longtake COMMAND --help tells a command's options)

Train, export, compile and stream long multi-shot video generation in 4 bits.

commands:
"""
EPILOG = """
the usual way:
  longtake doctor                               what runs on this machine, and what is missing
  longtake train --stage dit --data digits      train (or fine-tune); with --precision nvfp4 in 4 bits
  longtake distill --teacher runs/train --out runs/four    4 denoise steps a chunk instead of 16
  longtake export --recipe tiny_nvfp4_sm120     PyTorch to ONNX
  longtake engines --recipe tiny_nvfp4_sm120    ONNX to TensorRT
  longtake generate demo.yaml                   a story to an mp4
  longtake serve                                a page on which one types and sees it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code. What a user or the system did never shows a traceback; a defect does."""
    with ended_by_signals() as ended:
        return ended.code(_guarded(list(sys.argv[1:] if argv is None else argv)))


def _guarded(words: list[str]) -> int:
    try:
        open_standard_streams()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding lacks: printing must not fail
        configure_logging()
        with _interrupts_kept():
            return _run(words)
    except KeyboardInterrupt:
        print("longtake: interrupted; nothing half-written was left under a final name", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = error if isinstance(error, LongtakeError) else explained(error)
        if known is None:
            raise
        print(f"longtake: error: {known}", file=sys.stderr)
        return known.exit_code


def _run(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"longtake {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    name, rest = split(words)
    if name in HEAVY and not {"-h", "--help"} & set(rest):
        threads = settings_from_environment().threads
        require_address_space(LIBRARIES_BYTES + (threads - 1) * THREAD_BYTES, f"longtake {name}")
    command = importlib.import_module(COMMANDS[name][0]).COMMAND
    return int(command.run(*parsed(name, rest)) or 0)


def require_address_space(needed: int, what: str) -> None:
    """Raise LongtakeError if the limit on this process's address space (ulimit -v) leaves less than `needed` bytes.

    Where memory runs out in a library's thread, the process is aborted: what can be known before is said before.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit in (resource.RLIM_INFINITY, -1):
        return
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return
    if limit - used < needed:
        raise LongtakeError(
            f"out of memory: {what} does not fit the limit on this process's address space",
            got=f"{(limit - used) / 1e9:.2f} GB left of {limit / 1e9:.2f} GB",
            expected=f"at least {needed / 1e9:.2f} GB",
            fix="raise the limit (ulimit -v), or use fewer threads (LONGTAKE_THREADS=1 OMP_NUM_THREADS=1)",
        )


def overview() -> str:
    """What `longtake --help` prints."""
    width = max(map(len, COMMANDS))
    return USAGE + "\n".join(f"  {name:{width}}  {help}" for name, (_, help) in COMMANDS.items()) + "\n" + EPILOG


def split(words: list[str]) -> tuple[str, list[str]]:
    """The command, of one word or several, and the words after it. Raises LongtakeError for an unknown one."""
    for count in range(3, 0, -1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, words[count:]
    asked = " ".join(word for word in words[:3] if not word.startswith("-"))
    fix = nearest(asked, COMMANDS, nearest(words[0], COMMANDS, "see longtake --help"))
    raise LongtakeError("unknown command", got=asked or words[0], expected=", ".join(COMMANDS), fix=fix)


def parsed(name: str, words: list[str]) -> list[Any]:
    """The dataclasses that a command runs with, made from its words. `--help` prints and raises SystemExit."""
    from longtake.commands.options import instances, parser_of

    command = importlib.import_module(COMMANDS[name][0]).COMMAND
    parser = parser_of(name, command)
    if not command.runs:
        return instances(name, command, parser.values(words), {})
    from longtake.commands.run_files import add_config, told, values_of_config

    add_config(parser, command.runs)
    given = parser.values(words)
    options = instances(name, command, given, values_of_config(given, command))
    return [replace(one, told=told(given, command)) if hasattr(one, "told") else one for one in options]


@contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Send a Ctrl-C again that fell into a finalizer: Python prints what is raised there, and drops it."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
