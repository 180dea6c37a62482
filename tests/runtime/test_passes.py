"""Passes on static buffers, without a GPU: what is copied where, and in which order; graphs are left out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from longtake.runtime.backends.base import State
from longtake.runtime.backends.trt import graphs
from longtake.runtime.backends.trt.graphs import Passes
from longtake.training.models.network_spec import Binding
from longtake.training.models.presets import TINY
from longtake.training.models.wan.spec import dit_spec

SPEC = dit_spec(TINY, "bf16")


class Noting:
    """A network double: keeps what it was given, and writes ones where it writes."""

    weight_tensors: list[Tensor] = []

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Tensor], bool]] = []

    def prepare(self) -> None: ...

    def run(self, tensors: Mapping[str, Tensor], write: bool = True) -> None:
        self.seen.append((dict(tensors), write))
        tensors["velocity"].copy_(2 * tensors["latents"])
        if write:
            tensors["cache_0_out"][int(tensors["write_slot"])] = 1


def allocate(binding: Binding) -> Tensor:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int32": torch.int32}
    return torch.zeros([4 if isinstance(n, str) else n for n in binding.shape], dtype=dtypes[binding.dtype])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    monkeypatch.setattr(graphs, "acquire_stream", lambda device, owner: None)
    return Passes(Noting(), SPEC, allocate, torch.device("cpu"), cuda_graphs=False, captured=lambda: None)


def test_a_pass_reads_buffers_that_never_move(passes: Passes) -> None:
    kept = set(SPEC.kept.values())
    state = State({b.name: allocate(b) for b in SPEC.inputs if b.name in kept})
    for table, commit in (([0, 1, -1], False), ([0, 1, -1], True), ([0, -1], False)):
        inputs = {b.name: torch.ones_like(allocate(b), dtype=torch.float32) for b in SPEC.inputs if b.name not in kept}
        inputs |= {"table": torch.tensor(table, dtype=torch.int32), "write_slot": torch.tensor([2], dtype=torch.int32)}
        outputs = passes.run(inputs, state, commit)
        assert list(outputs) == ["velocity"] and bool((outputs["velocity"] == 2).all())
        tensors, write = passes.network.seen[-1]  # type: ignore[attr-defined]
        assert write == commit and tensors["table"].tolist() == table
        assert int(tensors["write_slot"]) == (2 if commit else -1)
        assert tensors["cache_3"] is tensors["cache_3_out"] is state.tensors["cache_3"]
    seen = [tensors for tensors, _ in passes.network.seen]  # type: ignore[attr-defined]
    assert all(len({tensors[name].data_ptr() for tensors in seen}) == 1 for name in seen[0])
    assert [slot for slot in range(4) if state.tensors["cache_0"][slot].any()] == [2]


def test_inputs_are_copied_in_the_order_of_the_spec(passes: Passes) -> None:
    assert passes._inputs == [b.name for b in SPEC.inputs if not b.name.startswith("cache")]
    assert passes._inputs[:6] == ["latents", "timestep_sinusoid", "rope_cos", "rope_sin", "table", "write_slot"]
    assert passes.static_bytes == sum(tensor.nbytes for tensor in passes._static.values())


def test_a_window_has_another_number_whenever_it_may_be_another(
    passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another state, other content of one, another table, a pass that has written; not for the passes of a chunk."""

    class Numbered(Noting):
        kept_windows, window_version = 1, torch.zeros(1, dtype=torch.int32)

    monkeypatch.setattr(graphs, "SegmentedNetwork", Numbered)
    passes.network = network = Numbered()
    kept = set(SPEC.kept.values())
    one, other = (State({b.name: allocate(b) for b in SPEC.inputs if b.name in kept}) for _ in range(2))
    inputs = {b.name: allocate(b) for b in SPEC.inputs if b.name not in kept}
    table = torch.tensor([0, 1, -1], dtype=torch.int32)

    def number(state: State, table: torch.Tensor, commit: bool = False) -> int:
        passes.run({**inputs, "table": table}, state, commit)
        return int(network.window_version)

    assert [number(one, table), number(one, table), number(one, table, commit=True)] == [1, 1, 1]
    assert [number(one, table), number(one, table.clone()), number(other, table), number(one, table)] == [2, 3, 4, 5]
    one.load(other.whole())
    table_now = number(one, table)
    table[1] = 2
    assert [table_now, number(one, table), number(one, table)] == [6, 7, 7]


def test_graphs_are_destroyed_also_where_something_holds_them(passes: Passes) -> None:
    held = [SimpleNamespace(ended=False) for _ in range(2)]
    for number, graph in enumerate(held):
        graph.reset = partial(setattr, graph, "ended", True)
        passes.graphs[number,] = graph  # type: ignore[assignment]
    passes.release()
    assert not passes.graphs and all(graph.ended for graph in held)
