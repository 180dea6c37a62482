"""The record of a run: loss curve as JSON and plot, TensorBoard scalars and pictures."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from longtake.errors import LongtakeError
from longtake.files import atomic_path, read_json, write_json
from longtake.record import UNFIT

logger = logging.getLogger(__name__)

LIMIT = 2000


class History:
    """Points (step, loss, metrics), thinned to at most LIMIT of each kind, mirrored to TensorBoard if installed."""

    def __init__(self, out: Path, resume_step: int = 0) -> None:
        self.out = out
        self.train: list[dict[str, Any]] = []
        self.held_out: list[dict[str, Any]] = []
        if resume_step and (out / "loss.json").is_file():
            try:
                saved = read_json(out / "loss.json")
                self.train = [point for point in saved["train"] if point["step"] <= resume_step]
                self.held_out = [point for point in saved["held_out"] if point["step"] <= resume_step]
            except (LongtakeError, *UNFIT) as error:
                logger.warning("the curve begins anew: %s is damaged (%s)", out / "loss.json", error)
                self.train, self.held_out = [], []
        self.writer = _summary_writer(out / "tensorboard", resume_step)

    def add(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record `values` of "train" or "held_out" after `step` steps."""
        points = self.train if kind == "train" else self.held_out
        points.append({"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}})
        if len(points) > LIMIT:
            del points[1:-1:2]
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def add_samples(self, step: int, samples: Tensor | None) -> None:
        """Show uint8 [N, T, 3, H, W] clips: a sheet (a row a clip, eight frames of it side by side), and as they move."""
        if samples is None or self.writer is None:
            return
        picks = [round(i * (samples.shape[1] - 1) / 7) for i in range(8)]
        sheet = samples[:, picks].permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        self.writer.add_image("samples", sheet.cpu(), step)
        self.writer._get_file_writer().add_summary(moving_summary("sample_video", samples.cpu()), step)

    def save(self) -> None:
        """Write loss.json and flush TensorBoard."""
        write_json(self.out / "loss.json", {"train": self.train, "held_out": self.held_out})
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """End TensorBoard's writer and its thread."""
        if self.writer is not None:
            self.writer.close()

    def plot(self, title: str) -> None:
        """Write loss.png."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for label, points in (("training", self.train), ("held out", self.held_out)):
            if points and "loss" in points[-1]:
                axes.plot([p["step"] for p in points], [p["loss"] for p in points], label=label)
        axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_path(self.out / "loss.png") as partial:
            figure.savefig(partial, dpi=110)


def moving_summary(tag: str, samples: Tensor) -> Any:
    """TensorBoard's image of clips uint8 [N, T, 3, H, W] one above the other, as a GIF of 12 pictures a second.

    SummaryWriter.add_video would do, but it needs a package that isn't among ours.
    """
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames_THWC = samples[:, ::2].permute(1, 0, 3, 4, 2).flatten(1, 2).numpy()
    first, *rest = (Image.fromarray(frame) for frame in frames_THWC)
    encoded = io.BytesIO()
    first.save(encoded, "GIF", save_all=True, append_images=rest, duration=1000 // 12, loop=0)
    height, width = frames_THWC.shape[1:3]
    picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=picture)])


def _summary_writer(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard isn't installed: the curves go to loss.json and loss.png only")
        return None
    threading.excepthook = _told_once
    return SummaryWriter(str(folder), purge_step=resume_step or None)


_before = threading.excepthook


def _told_once(args: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread raises is raised again by the next write: without a traceback between the lines."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        _before(args)
