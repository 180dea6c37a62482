"""`longtake generate`: a story, or a prompt, to an mp4, a report and a contact sheet."""

from __future__ import annotations

import sys
from collections import deque
from itertools import islice
from pathlib import Path

from longtake.commands.generate_options import EPILOG, GenerateOptions
from longtake.commands.video_output import VideoOutput, conclude
from longtake.errors import LongtakeError
from longtake.files import require_disk
from longtake.formats.memory import budget_table
from longtake.options import Command
from longtake.outputs import claim_outputs, require_mp4
from longtake.runtime.chunk import Chunk
from longtake.runtime.generator import Generator
from longtake.runtime.sampling import CancelledError
from longtake.runtime.session import Session
from longtake.runtime.snapshot import snapshot_from_file
from longtake.runtime.sources import OpenOptions
from longtake.runtime.start import Request
from longtake.runtime.story import (
    Story,
    check_fits,
    checked_prompt,
    frame_count,
    story_from_file,
    story_from_prompt,
    story_from_prompts,
)
from longtake.signals import first_interrupt


def run(options: GenerateOptions) -> int:
    """Check everything that can be checked, open the engines, generate."""
    story = _story(options)
    out = _output(options, story)
    request = None if options.load_session or story is None else _request(options, story).check()
    with Generator.from_engines(
        options.model or options.engines,
        options.backend,
        options.device,
        options.decode_device,
        _open_options(options, story, request),
        options.checkpoints,
    ) as generator:
        return generate(generator, options, story, out)


def _open_options(options: GenerateOptions, story: Story | None, request: Request | None) -> OpenOptions:
    """What the backend is opened for; the memory it takes is printed before it takes any."""
    asked = options.guidance if options.guidance is not None else story.guidance if story else None
    if options.load_session:
        asked = snapshot_from_file(options.load_session).identity.guidance
    starts = bool(options.image or options.continue_from or (story and (story.image or story.clip)))
    return OpenOptions(
        guided=None if asked is None else asked != 1.0,
        encode=starts,
        announce=lambda budget: print(budget_table(budget), flush=True),
        force=options.force,
        say=lambda line: print(line, file=sys.stderr),
        gpus=options.gpus,
        kept_windows=options.kept_windows,
        known=lambda preset: request.check_for(preset) if request else None,
    )


def _request(options: GenerateOptions, story: Story) -> Request:
    """The new session that is asked for."""
    names = ("seed", "steps", "guidance", "negative_prompt", "image", "continue_from", "view")
    given = {name: getattr(options, name) for name in names}
    # A camera's path must be as long as all that is asked for, so that is told at the start.
    return Request(story, clip=_clip_words(options), chunks=max(options.chunks or 0, story.chunks), **given)


def generate(generator: Generator, options: GenerateOptions, story: Story | None, out: Path) -> int:
    """Generate to `out`; returns the exit code."""
    backend = generator.backend
    print(f"backend: {backend.name} ({backend.reason})", flush=True)
    with _session(generator, options, story) as session:
        total = _total(session, options.chunks)
        preset = backend.preset
        require_disk(out.parent, frame_count(preset, total) * preset.height * preset.width // 4 + (8 << 20))
        output = VideoOutput(out, preset.fps, total)
        interrupted = _generate_all(session, total, output)
        if options.save_session:
            session.save(options.save_session)
            print(f"session: {options.save_session}")
        conclude(session, output, options.report, not interrupted, generator.budget, options.story)
    return 130 if interrupted else 0


def _generate_all(session: Session, total: int, output: VideoOutput) -> bool:
    """Drive the session; True if it was interrupted. Whatever happens, finished frames become a playable file."""
    waiting: deque[Chunk] = deque()

    def stop() -> None:
        print("\nstopping at the next pass; once more stops at once", file=sys.stderr)
        session.cancel()

    try:
        with first_interrupt(stop):
            for chunk in islice(session, total):
                waiting.append(chunk)
                if len(waiting) > 1:  # the newest is still being decoded: write the one before it meanwhile
                    output.add(waiting.popleft())
    except (CancelledError, KeyboardInterrupt):
        return True
    finally:
        try:
            while waiting:
                output.add(waiting.popleft())
        finally:
            output.close()
    return False


def _story(options: GenerateOptions) -> Story | None:
    """The story to tell; None to go on with a saved session's own."""
    if len(options.prompt) == 1:
        return story_from_prompt(options.prompt[0], options.chunks or 1)
    if options.prompt:
        return story_from_prompts(options.prompt)
    return story_from_file(options.story) if options.story else None


def _session(generator: Generator, options: GenerateOptions, story: Story | None) -> Session:
    """A new session, or a saved one with the story after what it still had to do."""
    if not options.load_session:
        assert story is not None  # the options say so
        session = generator.session(**vars(_request(options, story)))
        if session.next_index:
            print(f"clip: {session.next_index} chunks taken in; the video written is what comes after them", flush=True)
        return session
    if story is not None and (story.image or story.clip):
        what, got = "a saved session has begun already", f"story {story.name} starts from a picture or clip"
        expected, fix = "a story without one", "leave out --load-session"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    if story is not None:
        check_fits(story, generator.backend.preset)
    session = generator.load_session(options.load_session)
    for segment in story.segments if story else ():
        session.extend(segment.chunks, segment.prompt, segment.cut)
    return session


def _clip_words(options: GenerateOptions) -> list[str] | None:
    return None if options.clip_prompt is None else [checked_prompt(options.clip_prompt, "the clip's prompt")]


def _total(session: Session, asked: int | None) -> int:
    """How many chunks to generate now; lengthens the script where more are asked for than it has."""
    left = session.remaining
    if asked is not None and asked > left:
        session.extend(asked - left)
    if asked is None and not left:
        what, got = "the saved session has nothing left to do", f"{session.next_index} chunks generated"
        expected, fix = "a story, --prompt or --chunks to go on with", "pass --chunks 2"
        raise LongtakeError(what, got=got, expected=expected, fix=fix)
    return left if asked is None else asked


def _output(options: GenerateOptions, story: Story | None) -> Path:
    name = story.name if story else Path(options.load_session or "").stem
    out = options.out or Path("runs") / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in name)}.mp4"
    require_mp4(out, f"--out {out.with_suffix('.mp4')}")
    _claim(options, story, out)
    return out


def _claim(options: GenerateOptions, story: Story | None, out: Path) -> None:
    """Refuse outputs that are inputs, or files that are not ours."""
    written = {
        "the video (--out)": out,
        "the contact sheet beside --out": out.with_suffix(".png"),
        "the report (--report)": options.report or out.with_suffix(".json"),
        "--save-session": options.save_session,
    }
    engines = Path(options.engines or ".")
    read = {
        "the story": options.story,
        "the story's picture": story.image if story else None,
        "the story's clip": story.clip if story else None,
        "--image": options.image,
        "--continue-from": options.continue_from,
        "--load-session": options.load_session,
        "--camera": options.camera,
        "--intrinsics": options.intrinsics,
        "the engines": engines / "bundle.json",
        "the export": engines / "export.json",
    }
    claim_outputs(written, {name: Path(path) for name, path in read.items() if path})


COMMAND = Command(run, (GenerateOptions,), "Generate a video, chunk by chunk, from a story file or one prompt.", EPILOG)
