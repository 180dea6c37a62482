"""`longtake generate`: a story, or a prompt, to an mp4, a report and a contact sheet."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from longtake.commands.contact_sheet import ContactSheet, write_contact_sheet
from longtake.commands.meter import Meter
from longtake.commands.progress_bar import GenerateProgress
from longtake.errors import LongtakeError
from longtake.files import require_disk
from longtake.outputs import claim_outputs
from longtake.runtime.budget.terms_table import Budget, budget_table
from longtake.runtime.chunk import Chunk
from longtake.runtime.generator import Generator
from longtake.runtime.report import Report, conditions_of_run, table, write_report
from longtake.runtime.sampling import CancelledError
from longtake.runtime.session import Session
from longtake.runtime.snapshot import snapshot_from_file
from longtake.runtime.sources import BACKEND_NAMES, ORACLE, OpenOptions
from longtake.runtime.start import start_of
from longtake.runtime.story import Story, check_fits, checked_prompt, frame_count, story_from_file, story_from_prompt
from longtake.video import VideoWriter

EPILOG = """a story is a YAML file; a chunk is 8 latent frames (29 video frames for the first, 32 for each later one):

  seed: 7
  shots:
    - prompt: a green seven drifts left over a dark blue background, soft light
      chunks: 2
      then:                      # the prompt changes, the shot goes on
        - prompt: a green seven rises over a dark blue background, soft light
    - prompt: a red two circles over a forest background, light from above      # a new shot: a cut
      chunks: 2

  image: first.png               # the first frame (I2V); or --image
  continue_from: clip.mp4        # or: go on from a video, or a .safetensors file of latents; or --continue-from

what is seen in the clip may be told shot by shot; without that it is what the first shot's prompt says:

  continue_from:
    clip: clip.mp4               # paths are seen from where the story lies
    shots:
      - prompt: a red two circles over a forest background, light from above

examples:
  longtake generate docs/stories/demo.yaml --engines tiny_nvfp4_sm120 --out demo.mp4
  longtake generate --prompt "a white nine grows over a black background, soft light" --chunks 3
  longtake generate docs/stories/demo.yaml --chunks 2 --save-session half.safetensors
  longtake generate --load-session half.safetensors --out rest.mp4
  longtake generate --prompt "a green seven drifts left" --image first.png --chunks 3
  longtake generate --prompt "a green seven rises" --continue-from demo.mp4 --clip-prompt "a green seven drifts left"

Ctrl-C stops at the next pass and keeps the frames finished so far as a playable file (exit code 130); SIGTERM and
SIGHUP do the same (143, 129).
"""


def register(subparsers: Any) -> None:
    """Add the `generate` command."""
    parser = subparsers.add_parser(
        "generate",
        help="a story to an mp4, with a run report",
        description="Generate a video, chunk by chunk, from a story file or one prompt.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to generate")
    what.add_argument("story", nargs="?", metavar="STORY.yaml", help="such as docs/stories/demo.yaml")
    what.add_argument("--prompt", help="one prompt instead of a story")
    what.add_argument(
        "--chunks", type=int, metavar="N", help="stop after N chunks; beyond the story, its last prompt goes on"
    )
    what.add_argument("--seed", type=int, help="noise seed (default: the story's, else 0)")
    what.add_argument(
        "--steps", type=int, metavar="N", help="denoise steps a chunk (default: the story's, else the preset's)"
    )
    what.add_argument("--guidance", type=float, metavar="S", help="guidance scale; 1 turns it off and halves the work")
    what.add_argument("--negative-prompt", metavar="TEXT", help="prompt of the unguided pass")
    what.add_argument("--image", type=Path, metavar="FILE", help="picture that is the first frame (I2V)")
    what.add_argument(
        "--continue-from", type=Path, metavar="FILE", help="go on from a video, or a .safetensors file of latents"
    )
    what.add_argument("--clip-prompt", metavar="TEXT", help="what is seen in that clip (default: the first prompt)")
    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--engines",
        metavar="FOLDER|RECIPE",
        help="engines, exported networks, or a recipe's name (default: the best there is)",
    )
    how.add_argument(
        "--checkpoints",
        type=Path,
        metavar="FOLDER",
        help="where a text or VAE encoder that was not exported lies (default: where the export was made from)",
    )
    how.add_argument(
        "--backend",
        default="auto",
        metavar="|".join(BACKEND_NAMES),
        help="taken or refused, never replaced; auto chooses and says why",
    )
    how.add_argument("--device", help="such as cuda:0")
    how.add_argument("--decode-device", help="another GPU for the VAE, such as cuda:1")
    out = parser.add_argument_group("what to write")
    out.add_argument(
        "--out", type=Path, metavar="FILE.mp4", help="default: runs/NAME.mp4; a contact sheet lies beside it"
    )
    out.add_argument("--report", type=Path, metavar="FILE.json", help="default: beside the video")
    out.add_argument(
        "--save-session", type=Path, metavar="FILE.safetensors", help="save the session at the end, to go on later"
    )
    out.add_argument("--load-session", type=Path, metavar="FILE.safetensors", help="go on with a saved session")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, open the engines, generate."""
    story = _story(args)
    out = _output(args, story)
    if story is not None:
        start_of(story, args.image, args.continue_from, _clip_words(args)).check()
    with Generator.from_engines(
        args.engines,
        _backend_name(args.backend),
        args.device,
        args.decode_device,
        _open_options(args, story),
        args.checkpoints,
    ) as generator:
        return generate(generator, args, story, out)


def _open_options(args: argparse.Namespace, story: Story | None) -> OpenOptions:
    """What the backend is opened for; the memory it takes is printed before it takes any."""
    asked = args.guidance if args.guidance is not None else story.guidance if story else None
    if args.load_session:
        asked = snapshot_from_file(args.load_session).identity.guidance
    starts = bool(args.image or args.continue_from or (story and (story.image or story.clip)))
    return OpenOptions(
        guided=None if asked is None else asked != 1.0,
        encode=starts,
        announce=lambda budget: print(budget_table(budget), flush=True),
    )


def generate(generator: Generator, args: argparse.Namespace, story: Story | None, out: Path) -> int:
    """Generate to `out`; returns the exit code."""
    backend = generator.backend
    print(f"backend: {backend.name} ({backend.reason})", flush=True)
    with _session(generator, args, story) as session:
        total = _total(session, args.chunks)
        preset = backend.preset
        require_disk(out.parent, frame_count(preset, total) * preset.height * preset.width // 4 + (8 << 20))
        take = Take(out, preset.fps)
        interrupted = _generate_all(session, total, take)
        if args.save_session:
            session.save(args.save_session)
            print(f"session: {args.save_session}")
        _conclude(session, args, take, not interrupted, generator.budget)
    return 130 if interrupted else 0


def _generate_all(session: Session, total: int, take: Take) -> bool:
    """Drive the session; True if it was interrupted. Whatever happens, finished frames become a playable file."""
    waiting: deque[Chunk] = deque()
    progress = GenerateProgress(total)
    try:
        with cancel_on_interrupt(session):
            for chunk in islice(session, total):
                waiting.append(chunk)
                if len(waiting) > 1:  # the newest is still being decoded: write the one before it meanwhile
                    take.add(waiting.popleft(), progress)
    except (CancelledError, KeyboardInterrupt):
        return True
    finally:
        try:
            while waiting:
                take.add(waiting.popleft(), progress)
        finally:
            progress.close()
            take.close()
    return False


class Take:
    """What a run produces besides latents: the video, its contact sheet, and the figures."""

    def __init__(self, out: Path, fps: int) -> None:
        self.out, self.fps = out, fps
        self.meter, self.sheet = Meter(), ContactSheet()
        self._writer: VideoWriter | None = None

    def add(self, chunk: Chunk, progress: GenerateProgress) -> None:
        """Write a chunk's frames; waits for the decoder."""
        frames = chunk.frames
        if self._writer is None:
            self._writer = VideoWriter(self.out, self.fps)
        self._writer.write(frames)
        self.meter.add(chunk)
        self.sheet.add(chunk.index, chunk.prompt, chunk.cut, frames)
        progress.update(chunk, self.meter)

    def close(self) -> None:
        """Put the video under its final name, however many frames it has; without any there is no file."""
        if self._writer is not None:
            self._writer.close()

    @property
    def sheet_path(self) -> Path:
        return self.out.with_suffix(".png")


def _conclude(session: Session, args: argparse.Namespace, take: Take, complete: bool, budget: Budget | None) -> None:
    """Write the report and the contact sheet, and say where everything is."""
    if not take.sheet.stills:
        print("interrupted before the first chunk was whole: there is nothing to keep", file=sys.stderr)
        return
    options = session.options
    report = Report(
        kind="generate", steps=options.steps, guidance=options.guidance, seed=options.seed, complete=complete,
        output=str(take.out), **conditions_of_run(session.model.backend, budget), **take.meter.figures(),
    )  # fmt: skip
    report_path = args.report or take.out.with_suffix(".json")
    write_report(report, report_path)
    write_contact_sheet(take.sheet.stills, take.sheet_path)
    print(table(report))
    kept = "" if complete else " (interrupted: the frames finished so far)"
    print(f"video:  {take.out}{kept}\nsheet:  {take.sheet_path}\nreport: {report_path}")


@contextmanager
def cancel_on_interrupt(session: Session) -> Iterator[None]:
    """Let the first Ctrl-C cancel the session between two passes; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(*_: object) -> None:
        print("\nstopping at the next pass; once more stops at once", file=sys.stderr)
        signal.signal(signal.SIGINT, previous)
        session.cancel()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _story(args: argparse.Namespace) -> Story | None:
    """The story to tell; None to go on with a saved session's own."""
    if args.story and args.prompt is not None:
        raise LongtakeError(
            "both a story and --prompt were given", got=f"{args.story} and --prompt", fix="leave one out"
        )
    if args.chunks is not None and args.chunks < 1:
        raise LongtakeError("bad number of chunks", got=args.chunks, expected="1 or more", fix="pass --chunks 2")
    if args.load_session:
        fixed = [f"--{key.replace('_', '-')}" for key in ("seed", "steps", "guidance", "negative_prompt")
                 if getattr(args, key) is not None]  # fmt: skip
        if fixed:
            raise LongtakeError("a saved session fixes how it is sampled", got=", ".join(fixed) + " with --load-session",
                                fix=f"leave out {fixed[0]}")  # fmt: skip
        if args.image or args.continue_from or args.clip_prompt:
            raise LongtakeError("a saved session has begun already", got="--image, --continue-from or --clip-prompt",
                                expected="a new video", fix="leave out --load-session")  # fmt: skip
    if args.prompt is not None:
        return story_from_prompt(args.prompt, args.chunks or 1)
    if args.story:
        return story_from_file(args.story)
    if args.load_session:
        return None
    raise LongtakeError("nothing to generate", expected="a story, --prompt or --load-session",
                        fix="longtake generate docs/stories/demo.yaml")  # fmt: skip


def _session(generator: Generator, args: argparse.Namespace, story: Story | None) -> Session:
    """A new session, or a saved one with the story after what it still had to do."""
    if not args.load_session:
        given = {key: getattr(args, key) for key in ("steps", "guidance", "negative_prompt", "image", "continue_from")}
        session = generator.session(story or (), seed=args.seed, clip=_clip_words(args), **given)
        if session.next_index:
            print(f"clip: {session.next_index} chunks taken in; the video written is what comes after them", flush=True)
        return session
    if story is not None and (story.image or story.clip):
        raise LongtakeError("a saved session has begun already", got=f"story {story.name} starts from a picture or clip",
                            expected="a story without one", fix="leave out --load-session")  # fmt: skip
    if story is not None:
        check_fits(story, generator.backend.preset)
    session = generator.load_session(args.load_session)
    for segment in story.segments if story else ():
        session.extend(segment.chunks, segment.prompt, segment.cut)
    return session


def _clip_words(args: argparse.Namespace) -> list[str] | None:
    return None if args.clip_prompt is None else [checked_prompt(args.clip_prompt, "the clip's prompt")]


def _total(session: Session, asked: int | None) -> int:
    """How many chunks to generate now; lengthens the script where more are asked for than it has."""
    left = session.remaining
    if asked is not None and asked > left:
        session.extend(asked - left)
    if asked is None and not left:
        raise LongtakeError("the saved session has nothing left to do", got=f"{session.next_index} chunks generated",
                            expected="a story, --prompt or --chunks to go on with", fix="pass --chunks 2")  # fmt: skip
    return left if asked is None else asked


def _output(args: argparse.Namespace, story: Story | None) -> Path:
    name = story.name if story else args.load_session.stem
    out = args.out or Path("runs") / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}.mp4"
    if out.suffix.lower() != ".mp4":
        raise LongtakeError("the video must be an mp4", got=out, expected="a path ending in .mp4",
                            fix=f"--out {out.with_suffix('.mp4')}")  # fmt: skip
    written = {
        "the video (--out)": out,
        "the contact sheet beside --out": out.with_suffix(".png"),
        "the report (--report)": args.report or out.with_suffix(".json"),
        "--save-session": args.save_session,
    }
    told, engines = Path(args.story) if args.story else None, Path(args.engines or ".")
    read = {
        "the story": told,
        "the story's picture": story and story.image,
        "the story's clip": story and story.clip,
        "--image": args.image,
        "--continue-from": args.continue_from,
        "--load-session": args.load_session,
        "the engines": engines / "bundle.json",
        "the export": engines / "export.json",
    }
    claim_outputs(written, {name: path and Path(path) for name, path in read.items()})
    return out


def _backend_name(name: str) -> str:
    if name not in (*BACKEND_NAMES, ORACLE):
        raise LongtakeError("unknown backend", got=name, expected=" | ".join(BACKEND_NAMES),
                            fix="pass one of these with --backend")  # fmt: skip
    return name
