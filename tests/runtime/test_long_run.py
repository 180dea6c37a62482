"""A long session on the segmented backend: nothing moves, nothing grows."""

from __future__ import annotations

import pytest
import torch

from longtake.engines.recipe import RECIPES
from longtake.runtime.generator import Generator

RECIPE = "tiny_w4a16_sm90"
BUILT = RECIPES.parent / "build" / RECIPE / "bundle.json"


@pytest.mark.gpu
def test_a_thousand_chunks_move_no_buffer_and_take_no_more_memory() -> None:
    if not BUILT.is_file():
        pytest.skip(f"{BUILT.parent} is not built: longtake engines --recipe {RECIPE}")
    session = Generator.from_engines(RECIPE, backend="segmented").session(
        ["a green seven drifts left over a sea background, soft light"],
        steps=1,
        guidance=1.0,
        decode=False,
        endless=True,
    )
    addresses = [t.data_ptr() for t in session._state.tensors().values()]

    def free_after(chunks: int) -> int:
        for index in range(chunks):
            if index % 7 == 3:
                session.cut(f"a red {index % 5} circles over a forest background, soft light")
            next(session)
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    early = free_after(50)
    assert early - free_after(950) < 1 << 20
    assert session.next_index == 1000
    assert [t.data_ptr() for t in session._state.tensors().values()] == addresses
