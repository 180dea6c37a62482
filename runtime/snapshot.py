"""Snapshots of a session, in memory and in one safetensors file whose header carries the JSON and a digest."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.errors import IntegrityError, LongtakeError
from longtake.files import atomic_path, json_value, require_disk
from longtake.record import UNFIT, Kind, record_from_json
from longtake.runtime.session_options import SessionOptions
from longtake.runtime.state import KEPT, Position, SessionState, position_from_json
from longtake.runtime.video_model import VideoModel
from longtake.tensor_file import tensors_in
from longtake.training.models.families import family_named

log = logging.getLogger(__name__)

FORMAT = "longtake-session"
KIND = Kind("a saved session", "--save-session", "start a new session", format=3, oldest=1)
OLD_NAME = re.compile(r"(positive|negative)\.(\d+)\.(\d+)")  # of version 1: side, layer, number within the layer
FIRST_LATENT = "first_latent"  # tensor of a session that has yet to generate the chunk that starts from a picture
UNREADABLE, FIX = "is no readable saved session", "pass a file written by --save-session, or start a new session"
MOST_STEPS = 1000
NOISE = 1  # version of sampler.noise_for_chunk: another one would continue with other noise


@dataclass(frozen=True)
class Identity:
    """What has to agree for a snapshot to be continued. model: preset and precision, such as "tiny_w4a16".

    family: whose slots the position holds; version 1 knew one. What follows came with version 3. weights: see `Backend.weights`.
    noise, embeddings: what they come of, or "given".
    """

    preset: str
    model: str
    cache: str
    seed: int
    steps: int
    guidance: float
    negative_prompt: str
    shift: float
    family: str = "wan"
    weights: dict[str, str] = field(default_factory=dict)
    solver: str = "unipc"
    timesteps: tuple[float, ...] = ()
    noise: str = "seed"
    embeddings: str = "prompts"


@dataclass(frozen=True)
class Snapshot:
    """A session's state. Tensors are copies: "positive.NAME", "negative.NAME" (the model's state), "decoder.I", FIRST_LATENT,
    and latents "kept.CHUNK" (see state.py)."""

    identity: Identity
    position: Position
    tensors: dict[str, Tensor]

    def decoder_tensors(self) -> list[Tensor]:
        count = sum(name.startswith("decoder.") for name in self.tensors)
        return [self.tensors[f"decoder.{i}"] for i in range(count)]


def identity_of(model: VideoModel, options: SessionOptions, *, noise: bool, embeddings: bool) -> Identity:
    """What a snapshot of a session with these fits. noise, embeddings: they come of seed and prompts, not from a caller."""
    recipe = model.recipe
    return Identity(
        preset=model.preset.name,
        model=recipe.onnx_name,
        cache=recipe.cache,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        negative_prompt=options.negative_prompt,
        shift=options.shift,
        family=model.family.name,
        weights=dict(model.backend.weights),
        solver=options.solver,
        timesteps=options.timesteps,
        noise="seed" if noise else "given",
        embeddings="prompts" if embeddings else "given",
    )


def check_same(given: Identity, wanted: Identity) -> None:
    """Raise LongtakeError naming the first thing in which a snapshot and a session differ."""
    for each in fields(Identity):
        have, want = getattr(given, each.name), getattr(wanted, each.name)
        if each.name == "weights":
            _check_same_weights(have, want)
        elif have != want:
            what = f"the saved session has another {each.name}"
            fix = f"use engines and options with {each.name} {have!r}, or start a new session"
            raise LongtakeError(what, got=repr(have), expected=repr(want), fix=fix)


def _check_same_weights(have: Mapping[str, str], want: Mapping[str, str]) -> None:
    """Raise LongtakeError for weights that are known to differ; warn where one side does not tell."""
    known = sorted(have.keys() & want.keys())
    if other := [name for name in known if have[name] != want[name]]:
        raise LongtakeError(
            "the saved session has another model: its cache is of other weights",
            got=", ".join(f"{name} {have[name][:12]}…" for name in other),
            expected=", ".join(f"{name} {want[name][:12]}…" for name in other),
            fix="use engines of the checkpoint that it was saved with, or start a new session",
        )
    if not known and (have or want):
        log.warning(
            "nothing says whether the saved session is of these weights: one of the two was made before that was recorded; "
            "go on only if the model is the same"
        )


def load_tensors(snapshot: Snapshot, into: SessionState) -> None:
    """Copy the state's tensors of `snapshot` over `into`, in place; the dtype may differ between backends."""
    given = {
        name: t
        for name, t in snapshot.tensors.items()
        if not name.startswith(("decoder.", KEPT)) and name != FIRST_LATENT
    }
    if given and all(map(OLD_NAME.fullmatch, given)):
        given = _renamed(given, list(into.shapes()))
    shapes, wanted = {name: tuple(t.shape) for name, t in given.items()}, into.shapes()
    if shapes != wanted:
        differing = sorted(k for k in shapes.keys() | wanted.keys() if shapes.get(k) != wanted.get(k))[0]
        raise IntegrityError(
            f"the saved session's tensor {differing} does not fit",
            got=shapes.get(differing, "nothing"),
            expected=wanted.get(differing, "nothing"),
        )
    into.load(given)


def _renamed(given: dict[str, Tensor], into: list[str]) -> dict[str, Tensor]:
    """Tensors of a version 1 file, which are numbered in the order of `into`, by the names of today."""
    old = sorted(given, key=lambda name: (name[0] != "p", *map(int, name.split(".")[1:])))
    return {new: given[name] for new, name in zip([*into, *old[len(into) :]], old, strict=False)}


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode("utf-8"))
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def snapshot_to_file(snapshot: Snapshot, path: Path | str) -> None:
    """Write `snapshot` to `path` as one file, atomically. Raises LongtakeError if the disk is too full."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in snapshot.tensors.items()}
    about: dict[str, Any] = {"version": KIND.format, "noise": NOISE}
    about |= {"identity": asdict(snapshot.identity), "position": snapshot.position.as_json()}
    text = json.dumps(about, ensure_ascii=True, sort_keys=True)
    require_disk(Path(path).parent, sum(t.nbytes for t in tensors.values()) + (1 << 20))
    header = {"format": FORMAT, "session": text, "sha256": _digest(text, tensors)}
    with atomic_path(path) as partial:
        save_file(tensors, str(partial), metadata=header)


def snapshot_from_file(path: Path | str) -> Snapshot:
    """Read and verify a saved session.

    Raises:
        LongtakeError: there is no such file, or it was saved by another version.
        IntegrityError: it is damaged, or no saved session.
    """
    source = Path(path)
    if not source.is_file():
        raise LongtakeError(f"saved session {source} does not exist", fix="check the path")
    with tensors_in(source, UNREADABLE, FIX) as opened:
        header = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if header.get("format") != FORMAT:
        what, fix = f"{source} is not a saved session", "pass a file written by session.save or --save-session"
        raise IntegrityError(what, got=header.get("format", "another safetensors file"), expected=FORMAT, fix=fix)
    if header.get("sha256") != _digest(header.get("session", ""), tensors):
        what, expected = f"{source} was altered after it was saved", "the digest in its header"
        raise IntegrityError(what, got="a wrong digest", expected=expected, fix="save the session again")
    try:
        return _snapshot_from_json(source, json_value(header["session"]), tensors)
    except UNFIT as error:
        got = str(error) if isinstance(error, TypeError | ValueError) else repr(error)
        raise IntegrityError(
            f"{source} {UNREADABLE}", got=got[:300], expected="what --save-session writes", fix=FIX
        ) from None


def _snapshot_from_json(source: Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> Snapshot:
    KIND.require_format(about.get("version"), source)
    if about.get("noise") != NOISE:
        what = f"{source} was saved by another version of longtake"
        raise LongtakeError(what, got=f"noise {about.get('noise')}", expected=f"noise {NOISE}", fix=KIND.remake)
    identity = record_from_json(Identity, about["identity"])
    if not 1 <= identity.steps <= MOST_STEPS or identity.shift <= 0:
        raise ValueError(f"steps {identity.steps}, shift {identity.shift}")
    position = position_from_json(about["position"], family_named(identity.family).marker)
    snapshot = Snapshot(identity, position, tensors)
    snapshot.decoder_tensors()  # KeyError for one that is left out
    return snapshot
