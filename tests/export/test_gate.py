"""The gate of an export: deliberate faults in the graph fail it whatever the model has learnt, and right graphs pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from held_weights import weights_from_models
from onnx import NodeProto, numpy_helper
from untrained import random_models

from longtake.accuracy.compare import compare_networks
from longtake.accuracy.rows import Row, require_gate
from longtake.errors import GateError
from longtake.export import package
from longtake.export.ort_view import ort_view
from longtake.export.package import PlainGraphs
from longtake.formats.onnx_file import read_onnx
from longtake.formats.recipe import Recipe, recipe_named
from longtake.training.models.load import Models, load_models
from longtake.training.models.presets import TINY
from longtake.training.models.quantize import insert_quantizers, read_amax
from longtake.training.models.wan.rope import rope_tables

RECIPES = ("tiny_nvfp4_sm120", "tiny_fp8_sm90", "tiny_w4a16_sm89", "tiny_bf16_sm89")
MODELS = ("random", "hardly trained", "shipped")
QUANTIZED = ("context", "dit")  # the others are the same in every recipe
PLAIN = ("text_encoder", "vae_first", "vae_steady", "vae_encoder_first", "vae_encoder_steady")
Graph = onnx.GraphProto


def initializer(graph: Graph, name: str) -> onnx.TensorProto:
    return next(t for t in graph.initializer if t.name == name)


def changed(graph: Graph, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = initializer(graph, name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))


def exchanged(graph: Graph, one: str, other: str) -> None:
    a, b = initializer(graph, one), initializer(graph, other)
    a.name, b.name = other, one


def first(graph: Graph, op: str, at: int = 0) -> NodeProto:
    return [node for node in graph.node if node.op_type == op][at]


def swapped(node: NodeProto, one: int, other: int) -> None:
    node.input[one], node.input[other] = node.input[other], node.input[one]


def scale_off_by_one_code(graph: Graph) -> None:
    tensor = initializer(graph, "blocks.1.ffn.0.weight.scales")
    raw = bytearray(tensor.raw_data)
    raw[5] += 1 if raw[5] & 127 < 126 else -1
    tensor.raw_data = bytes(raw)


def one_code_off(graph: Graph) -> None:
    tensor = initializer(graph, "blocks.0.self_attn.v.weight.values")
    raw = bytearray(tensor.raw_data)
    raw[40] ^= 1
    tensor.raw_data = bytes(raw)


def activation_scale_off(graph: Graph) -> None:
    quantizer = first(graph, "TRT_FP4DynamicQuantize", 4)
    changed(graph, quantizer.input[1], lambda value: value * np.float32(1.125))


def k_and_v_exchanged(graph: Graph) -> None:
    swapped([node for node in graph.node if node.op_type.startswith("kv_cache_write")][1], 0, 1)


def k_and_v_exchanged_where_read(graph: Graph) -> None:
    swapped(next(node for node in graph.node if node.op_type.startswith("sink_attention")), 1, 2)


def k_of_the_neighbour_written(graph: Graph) -> None:
    writes = [node for node in graph.node if node.op_type.startswith("kv_cache_write")]
    writes[1].input[0] = writes[0].input[0]


def bias_lost(graph: Graph) -> None:
    changed(graph, "blocks.1.cross_attn.o.bias", np.zeros_like)


def gate_lost(graph: Graph) -> None:
    """The last sum of a product and the residual: without the product's second factor."""
    made = {name: node for node in graph.node for name in node.output}
    reads = next(node for node in graph.node if "blocks.0.self_attn.o.bias" in node.input).output[0]
    product = next(n for n in graph.node if n.op_type == "Mul" and reads in behind(made, n.input[0], 4))
    lost = product.input[0]
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == product.output[0]:
                node.input[i] = lost


def behind(made: dict[str, NodeProto], name: str, depth: int) -> set[str]:
    """`name`, and what it is a cast or another shape of."""
    node = made.get(name)
    if depth == 0 or node is None or node.op_type not in ("Cast", "Reshape", "Squeeze", "Unsqueeze"):
        return {name}
    return {name} | behind(made, node.input[0], depth - 1)


def other_eps(kind: str, at: int, model: onnx.ModelProto) -> None:
    nodes = [n for g in (model.graph, *model.functions) for n in g.node if n.op_type == kind]
    attribute = next(a for a in nodes[at].attribute if a.name == "epsilon")
    attribute.f *= 10


def weights_of_the_neighbour(graph: Graph) -> None:
    for part in ("values", "scales", "scale"):
        exchanged(graph, f"blocks.0.ffn.2.weight.{part}", f"blocks.1.ffn.2.weight.{part}")


def modulation_rows_shifted(graph: Graph) -> None:
    changed(graph, "blocks.1.modulation", lambda value: np.roll(value, 1, axis=-2))


def cos_and_sin_exchanged(graph: Graph) -> None:
    node = first(graph, "qk_norm_rope", 1)
    swapped(node, 4, 5)


def norms_exchanged(graph: Graph) -> None:
    node = first(graph, "qk_norm_rope")
    swapped(node, 2, 3)


def other_gelu(graph: Graph) -> None:
    attribute = next(a for a in first(graph, "Gelu").attribute if a.name == "approximate")
    attribute.s = b"none"


def missing_clamp(view: onnx.ModelProto) -> None:
    """In the view, where the quantizer is plain arithmetic: codes beyond 6 in block 1's ffn.2."""
    made = {name: node for node in view.graph.node for name in node.output}
    seen, todo = [], [next(n for n in view.graph.node if "blocks.1.ffn.2.bias" in n.input).input[0]]
    while len(seen) < 1:
        node = made[todo.pop(0)]
        if node.op_type == "Clip" and abs(bound(made, node)) == 6:
            seen.append(node)
        todo += [name for name in node.input if name in made]
    node = seen[0]
    del node.input[1:]
    node.op_type = "Identity"


def bound(made: dict[str, NodeProto], clip: NodeProto) -> float:
    node = made[clip.input[2]]
    return float(numpy_helper.to_array(node.attribute[0].t)) if node.op_type == "Constant" else 0.0


def eps_of_the_last_norm(graph: Graph) -> None:
    node = [node for node in graph.node if node.op_type == "LayerNormalization"][-1]
    next(a for a in node.attribute if a.name == "epsilon").f *= 10


def neighbours_exchanged(graph: Graph) -> None:
    """The weights of q and k of the last layer."""
    products = [node for node in graph.node if node.op_type == "MatMul"]
    by_input: dict[str, list[NodeProto]] = {}
    for node in products:
        by_input.setdefault(node.input[0], []).append(node)
    one, other = [nodes for nodes in by_input.values() if len(nodes) == 3][-1][:2]
    one.input[1], other.input[1] = other.input[1], one.input[1]


def gelus_other_form(graph: Graph) -> None:
    attribute = next(a for a in first(graph, "Gelu", -1).attribute if a.name == "approximate")
    attribute.s = b"none" if attribute.s == b"tanh" else b"tanh"


def frames_clamp_lost(graph: Graph) -> None:
    node = first(graph, "Clip", -1)
    del node.input[1:]
    node.op_type = "Identity"


def bias_of_a_conv_lost(graph: Graph) -> None:
    del first(graph, "Conv", 3).input[2:]


def silu_lost(graph: Graph) -> None:
    first(graph, "Sigmoid", 4).op_type = "HardSigmoid"


def histories_exchanged(graph: Graph) -> None:
    """Two of the caches that a step leaves, of one shape."""
    shapes: dict[str, str] = {}
    for value in graph.output:
        shape = str(value.type.tensor_type.shape)
        if value.name.startswith("vae_cache") and shape in shapes:
            names = {value.name: shapes[shape], shapes[shape]: value.name}
            for node in graph.node:
                node.output[:] = [names.get(name, name) for name in node.output]
                node.input[:] = [names.get(name, name) for name in node.input]
            return
        shapes[shape] = value.name


IN_PLAIN: dict[str, tuple[Callable[[Graph], None], ...]] = {
    "text_encoder": (eps_of_the_last_norm, neighbours_exchanged, gelus_other_form),
    "vae_first": (frames_clamp_lost, bias_of_a_conv_lost, silu_lost),
    "vae_steady": (frames_clamp_lost, histories_exchanged),
    "vae_encoder_steady": (bias_of_a_conv_lost,),
}


def on_graph(fault: Callable[[Graph], None], model: onnx.ModelProto) -> None:
    fault(model.graph)


IN_GRAPH = [
    scale_off_by_one_code, one_code_off, activation_scale_off, k_and_v_exchanged, k_and_v_exchanged_where_read,
    k_of_the_neighbour_written, bias_lost, gate_lost, weights_of_the_neighbour, modulation_rows_shifted, cos_and_sin_exchanged, norms_exchanged,
    other_gelu,
]  # fmt: skip
FAULTS: dict[str, Callable[[onnx.ModelProto], None]] = {f.__name__: partial(on_graph, f) for f in IN_GRAPH} | {
    "eps of a norm in the last block": partial(other_eps, "LayerNormalization", -2),
    "eps of q's and k's norm": partial(other_eps, "RMSNormalization", 0),
}
ANYWHERE = (  # whatever the precision
    "k_and_v_exchanged", "k_and_v_exchanged_where_read", "k_of_the_neighbour_written", "bias_lost", "gate_lost", "modulation_rows_shifted",
    "cos_and_sin_exchanged", "norms_exchanged", "other_gelu", "eps of a norm in the last block", "eps of q's and k's norm",
)  # fmt: skip
IN_VIEW = {"missing_clamp": missing_clamp}


def trained_a_little(models: Models, steps: int = 20) -> Models:
    """`steps` of flow matching on noise, then calibrated: what one exports first."""
    dit, preset = models.dit, models.preset
    generator = torch.Generator().manual_seed(4)
    frames, (height, width) = preset.chunk_latents, preset.latent_hw
    rope = rope_tables(preset.dit, torch.arange(frames), preset.grid_hw)

    def run(net: torch.nn.Module) -> torch.Tensor:
        latents = torch.randn(1, preset.dit.channels, frames, height, width, generator=generator)
        noise, text = (
            torch.randn(latents.shape, generator=generator),
            torch.randn(1, 8, preset.dit.text_dim, generator=generator),
        )
        sinusoid = torch.randn(1, frames, preset.dit.freq_dim, generator=generator)
        context = [c[:, None] for c in net.context(text)]  # type: ignore[operator]
        attend = lambda layer, q, k, v: torch.nn.functional.scaled_dot_product_attention(  # noqa: E731
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)
        velocity = net(0.5 * latents + 0.5 * noise, sinusoid, rope, context, attend)
        return torch.nn.functional.mse_loss(velocity, noise - latents)

    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = run(dit)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dit.requires_grad_(False)
    import copy

    calibrated = insert_quantizers(copy.deepcopy(dit), run)
    return replace(models, dit=dit, amax=read_amax(calibrated))


def models_named(name: str) -> Models:
    if name == "shipped":
        return load_models(TINY)
    preset = replace(TINY, dit=replace(TINY.dit, layers=2), height=64, width=64)
    models = random_models(preset, seed=3)
    if name == "hardly trained":
        return trained_a_little(models)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in models.dit.parameters():  # biases and norms, too: a bias of zero cannot be lost
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return models


def exported(
    models: Models, graphs: PlainGraphs, recipe: Recipe, folder: Path, networks: Sequence[str] = QUANTIZED
) -> Path:
    folder.mkdir()
    for name in networks:
        package._export_network(graphs, recipe, name, folder, lambda words: None, weights_from_models(models))
    return folder


def rows_of(models: Models, recipe: Recipe, folder: Path, **which: object) -> list[Row]:
    return list(compare_networks(models, recipe, folder, **which))  # type: ignore[arg-type]


def with_fault(folder: Path, into: Path, name: str) -> Path:
    """A folder whose DiT has the fault `name`."""
    model = read_onnx(folder / "dit.onnx")
    FAULTS.get(name, lambda model: None)(model)
    into.mkdir()
    onnx.save(model, into / "dit.onnx")
    for file in folder.glob("context*"):
        shutil.copy(file, into)
    view = ort_view(model)
    IN_VIEW.get(name, lambda view: None)(view)
    onnx.save(view, into / "dit.ort.onnx")
    return into


def seen(models: Models, right: Path, wrong: Path, name: str, recipe: Recipe) -> bool:
    """Whether the gate fails the DiT of the export `right` once it has the fault `name`."""
    rows = rows_of(models, recipe, with_fault(right, wrong, name), networks=("dit",))
    shutil.rmtree(wrong)
    return failed(rows, name)


def failed(rows: list[Row], name: str) -> bool:
    bad = [row for row in rows if not row.passed]
    print(name, len(bad), max(bad, key=lambda row: row.error) if bad else "PASSES")
    if any(row.part or row.stored for row in bad):
        with pytest.raises(GateError, match="how well the model is trained plays no part"):
            require_gate([row for row in rows if row.part or row.stored], name)
    return bool(bad)


def unseen_in_plain(models: Models, recipe: Recipe, folder: Path, wrong: Path) -> list[str]:
    """Faults in the networks without codes that the gate does not see."""
    unseen = []
    for network, faults in IN_PLAIN.items():
        for fault in faults:
            view = onnx.load(folder / f"{network}.ort.onnx")
            fault(view.graph)
            shutil.copytree(folder, wrong)
            onnx.save(view, wrong / f"{network}.ort.onnx")
            if not failed(rows_of(models, recipe, wrong, networks=(network,)), f"{network} {fault.__name__}"):
                unseen.append(f"{network} {fault.__name__}")
            shutil.rmtree(wrong)
    return unseen


def require_passed(models: Models, recipe: Recipe, folder: Path, networks: Sequence[str] = QUANTIZED) -> None:
    rows = rows_of(models, recipe, folder, networks=networks)
    for stored in (True, False):
        worst = max((row for row in rows if row.stored == stored and not row.informs), key=lambda row: row.error)
        print(recipe.name, worst)
        assert worst.error < (1e-6 if stored else 1e-4), worst
    require_gate(rows, recipe.name)
    assert {"a prompt, far out", "first chunk, near nothing"} <= {row.case for row in rows}


@pytest.mark.slow
def test_a_right_graph_passes_and_some_wrong_ones_do_not(small_graphs: PlainGraphs, tmp_path: Path) -> None:
    models, recipe = models_named("random"), recipe_named(RECIPES[0])
    assert models.preset == small_graphs.preset
    folder = exported(models, small_graphs, recipe, tmp_path / "right", (*PLAIN, *QUANTIZED))
    require_passed(models, recipe, folder, (*PLAIN, *QUANTIZED))
    faults = (
        "one_code_off",
        "bias_lost",
        "missing_clamp",
        "k_and_v_exchanged_where_read",
        "k_of_the_neighbour_written",
    )
    assert [name for name in faults if not seen(models, folder, tmp_path / "wrong", name, recipe)] == []
    assert unseen_in_plain(models, recipe, folder, tmp_path / "wrong") == []


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("model", MODELS)
def test_right_graphs_pass_in_every_recipe_and_wrong_ones_in_none(model: str, tmp_path: Path) -> None:
    models = models_named(model)
    graphs = PlainGraphs(models.preset)
    for recipe in map(recipe_named, RECIPES):
        networks = (*PLAIN, *QUANTIZED) if recipe.name == RECIPES[0] else QUANTIZED
        require_passed(models, recipe, exported(models, graphs, recipe, tmp_path / recipe.name, networks), networks)
    folder, wrong, recipe = tmp_path / RECIPES[0], tmp_path / "wrong", recipe_named(RECIPES[0])
    assert [name for name in (*FAULTS, *IN_VIEW) if not seen(models, folder, wrong, name, recipe)] == []
    assert unseen_in_plain(models, recipe, folder, wrong) == []


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES[1:])
def test_wrong_graphs_of_the_other_recipes_do_not_pass(name: str, tmp_path: Path) -> None:
    models, recipe = models_named("random"), recipe_named(name)
    folder = exported(models, PlainGraphs(models.preset), recipe, tmp_path / "right")
    assert [fault for fault in ANYWHERE if not seen(models, folder, tmp_path / "wrong", fault, recipe)] == []
