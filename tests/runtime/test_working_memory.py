"""The report on the decoder's working memory."""

from __future__ import annotations

import pytest

from longtake.errors import LongtakeError
from longtake.runtime.budget.working_memory import MemoryOptions, run

RECIPE = "wan2.2-ti2v-5b_w4a16_sm90"


def test_the_peak_is_listed_with_what_lies_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(MemoryOptions(recipe=RECIPE, steps=1)) == 0
    said = capsys.readouterr().out
    assert said.startswith("arena 1960.8 MB, 86 steps") and "conv_3x3x3: 1960.8 MB in use" in said
    assert "1384.1 MB  6x352x640x512" in said and said.count(" MB  ") == 3
    assert run(MemoryOptions(recipe=RECIPE, steps=1, plain=True)) == 0
    assert capsys.readouterr().out.startswith("arena 2768.2 MB, 77 steps")
    assert run(MemoryOptions(recipe=RECIPE, steps=1, network="vae_first")) == 0
    assert "1038.1 MB in use" in capsys.readouterr().out


def test_a_decoder_that_is_one_engine_is_not_known_step_by_step() -> None:
    with pytest.raises(LongtakeError, match=r"not known step by step[\s\S]*vae_ops: library"):
        run(MemoryOptions(recipe="tiny_bf16_sm90"))
