"""What `longtake sanitize` runs on a GPU can be made here: its inputs, of every op."""

from __future__ import annotations

from itertools import product

from longtake.commands.sanitize import ATTENTIONS, CUT_TILES
from longtake.plugins.cases import op_inputs
from longtake.plugins.registry import kernel_ops


def test_the_inputs_of_every_op_can_be_made() -> None:
    for op in kernel_ops().values():
        for dims, indices in product(op.sizes[1:], op.indices):
            assert len(op_inputs(op.name, dims, op.compute_dtypes[0], indices)) == len(op.spec.inputs), op.name


def test_the_inputs_of_attention_with_cut_tiles_can_be_made() -> None:
    assert ATTENTIONS
    for op, (dims, indices) in product(ATTENTIONS, CUT_TILES):
        assert len(op_inputs(op.name, dims, "bf16", indices)) == len(op.spec.inputs), op.name
