"""Fragments: what a chunk becomes, put together again, in every codec that opens here."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from longtake.errors import LongtakeError
from longtake.runtime.serve.fragments import CODECS, Codec, Fragment, boxes, codec_for, film, fragment

SIZES = (29, 32, 10)


def frames(count: int, start: int) -> np.ndarray:
    """Flat frames, each of a brightness of its own, so that the order shows."""
    shades = (np.arange(start, start + count) * 3 % 200 + 20).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, 64, 64, 3)).copy()


def stream(codec: Codec) -> list[Fragment]:
    starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    return [fragment(frames(n, at), at, i, codec) for i, (n, at) in enumerate(zip(SIZES, starts))]


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> Codec:
    return codec_for(request.param, 64, 64, 24)


def test_a_fragment_is_a_function_of_its_frames(codec: Codec) -> None:
    whole = stream(codec)
    assert stream(codec) == whole
    assert len({each.init for each in whole}) == 1
    assert [name for name, _, _ in boxes(whole[0].init)] == [b"ftyp", b"moov"]
    assert all([name for name, _, _ in boxes(each.media)] == [b"moof", b"mdat"] for each in whole)


def test_joined_fragments_and_the_film_play_every_frame(codec: Codec, tmp_path: Path) -> None:
    whole = stream(codec)
    joined = tmp_path / "joined.mp4"
    joined.write_bytes(whole[0].init + b"".join(each.media for each in whole))
    film(whole[0].init, [each.media for each in whole], tmp_path / "film.mp4")
    again = tmp_path / "again.mp4"
    film(whole[0].init, [each.media for each in whole], again)
    assert again.read_bytes() == (tmp_path / "film.mp4").read_bytes()
    assert [name for name, _, _ in boxes(again.read_bytes())][:2] == [b"ftyp", b"moov"]  # moov before the data
    for path in (joined, again):
        with av.open(str(path)) as container:
            shown = [
                (frame.pts * frame.time_base, frame.to_ndarray(format="gray").mean())
                for frame in container.decode(video=0)
            ]
        assert [round(float(time * 24)) for time, _ in shown] == list(range(sum(SIZES)))
        wanted = frames(sum(SIZES), 0)[:, 0, 0, 0].astype(float)
        assert np.abs(np.array([grey for _, grey in shown]) - wanted).max() < 12


def test_noise_stays_one_group_of_pictures() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
    made = fragment(noise, 0, 0, codec_for("h264", 64, 64, 24, "libx264"))
    assert len(boxes(made.media)) == 2


@pytest.mark.parametrize(("name", "mime"), [("h264", "avc1.64"), ("vp9", "vp09.00."), ("av1", "av01.0.")])
def test_the_media_type_names_the_codec(name: str, mime: str) -> None:
    made = fragment(frames(2, 0), 0, 0, codec_for(name, 64, 64, 24))
    assert made.mime.startswith(f'video/mp4; codecs="{mime}')


def test_what_cannot_be_encoded() -> None:
    codec = codec_for("h264", 64, 64, 24)
    for bad in (frames(0, 0), frames(2, 0)[:, :32], frames(2, 0).astype(np.float32)):
        with pytest.raises(LongtakeError, match="do not fit the stream"):
            fragment(bad, 0, 0, codec)
    with pytest.raises(LongtakeError, match="unknown codec"):
        codec_for("hevc", 64, 64, 24)
