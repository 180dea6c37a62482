"""Stories: what they mean, and that every mistake gets a sentence with what, got, expected and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.errors import LongtakeError
from longtake.runtime.story import (
    MAX_PROMPT,
    SCHEMA,
    WHOLE,
    Segment,
    check_fits,
    fit_segments,
    frame_count,
    story_from_file,
    story_from_prompt,
    story_from_script,
)
from longtake.training.data.base import chunk_frames
from longtake.training.models.presets import PRESETS, TINY
from longtake.training.models.text.grammar import caption_words
from longtake.training.models.text.room_grammar import room_words
from longtake.training.models.wan.family import Wan

STORIES = Path(__file__).parents[2] / "docs" / "stories"
GOOD = """
seed: 5
steps: 4
guidance: 2
shots:
  - prompt: one
    chunks: 2
    then: [{prompt: two}, {prompt: three, chunks: 3}]
  - prompt: four
"""


def story_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "story.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_segments_of_a_story(tmp_path: Path) -> None:
    story = story_from_file(story_file(tmp_path, GOOD))
    assert story.segments == (
        Segment("one", 2), Segment("two", 1), Segment("three", 3), Segment("four", 1, cut=True)
    )  # fmt: skip
    assert (story.name, story.seed, story.steps, story.guidance, story.chunks) == ("story", 5, 4, 2, 7)


def test_shipped_stories_fit_the_small_preset_that_they_are_for() -> None:
    for path in STORIES.glob("*.yaml"):
        story = story_from_file(path)
        words = set(caption_words() if story.action is None else room_words())
        check_fits(story, TINY if story.action is None else PRESETS["world-tiny"])
        for segment in story.segments:
            assert set(segment.prompt.replace(",", "").split()) <= words, (path, segment)


def test_the_demo_is_what_it_claims() -> None:
    story = story_from_file(STORIES / "demo.yaml")
    assert sum(segment.cut for segment in story.segments) == 2 and story.chunks == 7
    assert sum(not segment.cut for segment in story.segments[1:]) == 2  # prompt changes inside a shot
    returns = next(i for i, segment in reversed(list(enumerate(story.segments))) if segment.cut)
    assert all("yellow six" in story.segments[i].prompt for i in (0, returns)) and "six" in story.segments[-1].prompt
    assert not any("six" in segment.prompt for segment in story.segments[1:returns])


def test_cut_prefix_is_put_before_a_cut_once() -> None:
    assert Wan().prompt("x", cut=True) == "The scene transitions. x"
    assert Wan().prompt("The scene transitions. x", cut=True) == "The scene transitions. x"
    assert Wan().prompt("x", cut=False) == "x"


BAD: dict[str, tuple[str | bytes, list[str]]] = {
    "unknown key": ("shots: [{prompt: x}]\nsed: 3", ["unknown key in story story.yaml", "'sed'", "did you mean 'seed'?"]),
    "unknown key in a shot": ("shots: [{promt: x}]", ["unknown key", "at shots[0]", "did you mean 'prompt'?"]),
    "unknown key deep down": (
        "shots: [{prompt: x, then: [{prompt: y, chunk: 2}]}]", ["at shots[0].then[0]", "did you mean 'chunks'?"],
    ),
    "empty prompt": ('shots: [{prompt: ""}]', ["shots[0].prompt is empty", "at least one word"]),
    "blank prompt": ('shots: [{prompt: "   "}]', ["shots[0].prompt is empty"]),
    "blank prompt deep down": (
        'shots: [{prompt: x}, {prompt: y, then: [{prompt: " "}]}]', ["shots[1].then[0].prompt is empty"],
    ),
    "huge prompt": ("shots: [{prompt: " + "x" * 5000 + "}]", ["shots[0].prompt is too long", "5000", "at most 4096"]),
    "number as prompt": ("shots: [{prompt: 7}]", ["at shots[0].prompt", "got: 7", "type string"]),
    "no shots": ("seed: 1", ["got: only seed", "the keys ['shots']"]),
    "empty shots": ("shots: []", ["at shots", "at least 1 item"]),
    "empty file": ("", ["got: None", "type object"]),
    "a list": ("- a\n- b", ["type object"]),
    "zero chunks": ("shots: [{prompt: x, chunks: 0}]", ["at shots[0].chunks", "got: 0", "1 or more"]),
    "negative seed": ("shots: [{prompt: x}]\nseed: -1", ["at seed", "0 or more"]),
    "bad YAML": ("shots:\n  - prompt: a: b\n", ["not valid YAML", "line 2", "in quotes"]),
    "tab": ("shots:\n\t- prompt: x\n", ["not valid YAML", "line 2"]),
    "not UTF-8": (b"shots: [{prompt: caf\xe9}]", ["not UTF-8 text", "save the file as UTF-8"]),
    "too large": (b"#" * (2 << 20), ["too large for a story"]),
    "python tag": ("shots: !!python/object/apply:os.system [ls]", ["not valid YAML"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_stories(tmp_path: Path, case: str) -> None:
    text, parts = BAD[case]
    with pytest.raises(LongtakeError) as caught:
        story_from_file(story_file(tmp_path, text))
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_missing_story_and_folder(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match="does not exist"):
        story_from_file(tmp_path / "none.yaml")
    with pytest.raises(LongtakeError, match="is not a file"):
        story_from_file(tmp_path)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("height: 704", ["height does not fit preset tiny", "got: 704", "expected: 128"]),
        ("width: 130", ["width does not fit", "got: 130"]),
        ("fps: 30", ["fps does not fit", "expected: 24"]),
        ("preset: wan2.2-ti2v-5b", ["preset does not fit preset tiny"]),
        ("seconds: 10", ["the length does not fit", "9.2083 s: 7 chunks are 221 frames", "set seconds: 9.2083"]),
    ],
)
def test_what_does_not_fit_the_preset(tmp_path: Path, line: str, parts: list[str]) -> None:
    story = story_from_file(story_file(tmp_path, GOOD + line))
    with pytest.raises(LongtakeError) as caught:
        check_fits(story, TINY)
    for part in parts:
        assert part in str(caught.value)


def test_what_fits_the_preset(tmp_path: Path) -> None:
    check_fits(
        story_from_file(story_file(tmp_path, GOOD + "height: 128\nwidth: 128\nfps: 24\nseconds: 9.21\npreset: tiny")),
        TINY,
    )


def test_frame_count_is_that_of_training() -> None:
    assert [frame_count(TINY, n) for n in (1, 2, 7)] == [29, 61, 221] == [chunk_frames(TINY, n) for n in (1, 2, 7)]


def test_schema_and_code_agree() -> None:
    schema: Any = json.loads(SCHEMA.read_text())
    assert schema["$defs"]["prompt"]["maxLength"] == MAX_PROMPT
    # torch.Generator and the noise hash take any seed the schema lets through
    torch.Generator().manual_seed(schema["properties"]["seed"]["maximum"])


def test_one_prompt() -> None:
    assert story_from_prompt("x", 3).segments == (Segment("x", 3),)
    with pytest.raises(LongtakeError, match="the prompt is empty"):
        story_from_prompt("", 1)


def test_fitting_a_script_to_a_length() -> None:
    script = (Segment("a", 2), Segment("b", 2, cut=True))
    assert fit_segments(script, 3) == (Segment("a", 2), Segment("b", 1, cut=True))
    assert fit_segments(script, 6) == (*script, Segment("b", 2))


def test_a_list_of_prompts_cuts_where_the_reference_does() -> None:
    """LongLive's scripts: one prompt a chunk, a cut where it begins with the prefix; the text encoded stays the same."""
    prompts = ["a", "a", "The scene transitions. b", "b"]
    segments = story_from_script(prompts).segments
    assert segments == (Segment("a"), Segment("a"), Segment("b", cut=True), Segment("b"))
    assert [Wan().prompt(segment.prompt, segment.cut) for segment in segments] == prompts


def test_the_first_prompt_of_a_list_keeps_its_prefix(tmp_path: Path) -> None:
    """Nothing stands before it: the reference makes no cut there, and encodes what was written."""
    prompts = ["The scene transitions. a", "The scene transitions. b"]
    first, second = story_from_script(prompts).segments
    assert Wan().prompt(first.prompt, first.cut, first=True) == prompts[0]
    assert Wan().prompt(second.prompt, second.cut) == prompts[1]
    assert Wan().prompt(first.prompt, first.cut) == prompts[0]  # after a clip it is a cut like any other


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    """To JSON Schema 7.0 is an integer; to the noise it was another seed."""
    text = (
        "seed: 7{0}\nsteps: 2{0}\nfps: 24{0}\nguidance: 1.5\ncontinue_from: {{clip: a.mp4, shots: [{{prompt: x, chunks: 1{0}}}]}}\n"
        "shots:\n  - {{prompt: a, chunks: 2{0}, then: [{{prompt: b, chunks: 3{0}}}]}}\n"
    )
    told = []
    for number, zero in enumerate(("", ".0")):
        (tmp_path / f"{number}.yaml").write_text("name: s\n" + text.format(zero))
        told.append(story_from_file(tmp_path / f"{number}.yaml"))
    assert told[0] == told[1] and repr(told[0]) == repr(told[1])
    assert Segment("a", 2.0) == Segment("a", 2) and isinstance(Segment("a", 2.0).chunks, int)  # type: ignore[arg-type]
    with pytest.raises(LongtakeError, match=r"bad number of chunks\n  got: 1.5\n  expected: a whole number"):
        Segment("a", 1.5)  # type: ignore[arg-type]


def test_what_the_schema_wants_whole_is_known() -> None:
    found: set[str] = set()

    def look(schema: Any) -> None:
        for key, value in schema.items() if isinstance(schema, dict) else ():
            if isinstance(value, dict) and value.get("type") == "integer":
                found.add(key)
            look(value)

    look(json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert found == WHOLE
