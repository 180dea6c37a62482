"""How far it is from the command line to the chunk loop and its first pass. The bounds only go down.

Engines are opened from their bundle, with the reference backend; the networks are stand-ins that answer with zeros.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import tree
from onnx import TensorProto, helper

import longtake.commands.generate  # noqa: F401  (what runs while it is imported is not the way)
from longtake.commands.main import main
from longtake.files import sha256
from longtake.formats.bundle import Bundle
from longtake.formats.exported import Checked, Export, ExportedFile, ExportedNetwork
from longtake.formats.recipe import recipe_named
from longtake.machine.flavour import Flavour
from longtake.runtime.backends.reference import ReferenceBackend
from longtake.training.models.families import family_of
from longtake.training.models.network_spec import NetworkSpec
from longtake.training.models.text.words import default_vocabulary

RECIPE = recipe_named("tiny_bf16_sm90")
KINDS = {"int32": TensorProto.INT32, "int8": TensorProto.INT8}  # all others are fp32 there

MOST_FILES = 48  # in which a function is called before the first pass
MOST_LAYERS = 5  # files that are in the middle of a call when the first pass begins
NEVER = (
    "runtime/budget/",
    "training/models/wan/vae.py",
    "training/models/wan/dit.py",
)  # of what is built, nothing is computed


def stand_in(spec: NetworkSpec) -> onnx.ModelProto:
    """A network with the bindings of `spec` whose outputs are zeros."""

    def value(binding: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(binding.name, KINDS.get(binding.dtype, TensorProto.FLOAT), binding.shape)

    nodes = []
    for binding in spec.outputs:
        zero = helper.make_tensor("zero", KINDS.get(binding.dtype, TensorProto.FLOAT), [1], [0])
        shape = helper.make_tensor("shape", TensorProto.INT64, [len(binding.shape)], list(map(int, binding.shape)))
        nodes.append(helper.make_node("Constant", [], [f"{binding.name}_shape"], value=shape))
        nodes.append(helper.make_node("ConstantOfShape", [f"{binding.name}_shape"], [binding.name], value=zero))
    graph = helper.make_graph(nodes, spec.name, list(map(value, spec.inputs)), list(map(value, spec.outputs)))
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A folder of engines without plans, and the export that it was built from."""
    exported, engines, preset = tmp_path / RECIPE.onnx_name, tmp_path / "engines", RECIPE.model
    family, networks = family_of(preset), {}
    exported.mkdir()
    engines.mkdir()
    for name in family.networks(preset):
        view = exported / f"{name}.ort.onnx"
        onnx.save(stand_in(family.spec(preset, RECIPE, name)), str(view))
        networks[name] = ExportedNetwork({view.name: ExportedFile(sha256(view))})
    words = default_vocabulary()
    Export(
        RECIPE.onnx_name, RECIPE.preset, RECIPE.precision, RECIPE.cache, networks, words, checked=Checked("passed", "")
    ).write(exported)
    Bundle.of(engines, RECIPE, Flavour("tensorrt_rtx", "1.6.1", None, "a test"), exported, []).write()
    return engines


@pytest.fixture
def stack_at_first_pass(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the first pass raise FirstPass; the files of the stack are then in this list, the outermost first."""
    stack: list[str] = []
    answer = ReferenceBackend.run

    def run(self: Any, network: str, inputs: Mapping[str, Any], *rest: Any, **more: Any) -> Any:
        if network != "dit":
            return answer(self, network, inputs, *rest, **more)
        sys.setprofile(None)
        frame = sys._getframe(1)
        while frame is not None:
            stack.insert(0, frame.f_code.co_filename)
            frame = frame.f_back  # type: ignore[assignment]
        raise tree.FirstPass

    monkeypatch.setattr(ReferenceBackend, "run", run)
    return stack


def until_first_pass(words: Sequence[str]) -> list[str]:
    """The files that a command enters before its first pass."""

    def command() -> None:
        with pytest.raises(tree.FirstPass):
            main(words)

    return tree.files_entered(command)


def test_generate_is_a_short_way_from_the_command_line(
    engines: Path, stack_at_first_pass: list[str], tmp_path: Path
) -> None:
    words = ["generate", "--prompt", "a green seven", "--engines", str(engines), "--backend", "reference"]
    entered = until_first_pass([*words, "--out", str(tmp_path / "video.mp4")])
    assert stack_at_first_pass, "no pass was reached"
    assert not [name for name in entered if name.startswith(NEVER)]
    assert len(entered) <= MOST_FILES, "\n".join(entered)
    ours = {str(path): path.relative_to(tree.ROOT).as_posix() for path in tree.library_files()}
    layers = dict.fromkeys(ours[name] for name in map(resolved, stack_at_first_pass) if name in ours)
    assert len(layers) <= MOST_LAYERS, "\n".join(layers)


def resolved(name: str) -> str:
    return str(Path(name).resolve())
