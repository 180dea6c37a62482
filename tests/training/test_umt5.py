from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from longtake.errors import IntegrityError
from longtake.export.onnx_from_model import onnx_from_model
from longtake.export.ort_view import ort_view
from longtake.training.convert.text_keys import from_huggingface, from_wan
from longtake.training.models.checkpoint import check_state
from longtake.training.models.network_spec import Binding, NetworkSpec
from longtake.training.models.presets import WAN22_TI2V_5B, TextEncoderConfig
from longtake.training.models.text.umt5 import UMT5, attended, relative_buckets
from longtake.training.models.text.words import TextStep

CONFIG = TextEncoderConfig(kind="umt5", dim=64, layers=3, heads=4, length=48, ffn_dim=96, vocabulary=101)
WAN_NAMES = {
    "embedding": "token_embedding",
    "position": "pos_embedding.embedding",
    "ffn.gate": "ffn.gate.0",
    "ffn.up": "ffn.fc1",
    "ffn.down": "ffn.fc2",
}


def oracle(config: TextEncoderConfig) -> UMT5EncoderModel:
    size = UMT5Config(
        vocab_size=config.vocabulary, d_model=config.dim, d_kv=config.dim // config.heads, d_ff=config.ffn_dim,
        num_layers=config.layers, num_heads=config.heads, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = UMT5EncoderModel(size).eval()
    for parameter in model.parameters():  # all of them, norms too; large enough that attention prefers something
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[UMT5, UMT5EncoderModel]:
    torch.manual_seed(0)
    theirs = oracle(CONFIG)
    ours = UMT5(CONFIG).eval()
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    return ours, theirs


def prompts(*lengths: int) -> torch.Tensor:
    tokens = torch.zeros(len(lengths), CONFIG.length, dtype=torch.int32)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(2, CONFIG.vocabulary, (length,))
    return tokens


@torch.no_grad()
def test_it_equals_transformers(pair: tuple[UMT5, UMT5EncoderModel]) -> None:
    ours, theirs = pair
    tokens = prompts(1, 17, 48)
    tokens[1, 5] = 0  # a literal <pad> inside a prompt is a word to the attention mask
    mask = torch.arange(CONFIG.length) < torch.tensor([[1], [17], [48]])
    wanted = theirs(tokens.long(), attention_mask=mask.long()).last_hidden_state * mask[..., None]
    got = ours(tokens)
    assert got.dtype == torch.float32 and not got[0, 1:].any() and not got[1, 17:].any()
    for a, b in zip(got, wanted):
        assert ((a - b).norm() / b.norm()).item() <= 1e-5


@torch.no_grad()
def test_bf16_stays_near_transformers_in_bf16(pair: tuple[UMT5, UMT5EncoderModel]) -> None:
    ours, theirs = (type_of(m) for m, type_of in zip(pair, (_bf16_ours, _bf16_theirs)))
    tokens = prompts(48)
    exact = pair[0](tokens)
    wanted = theirs(tokens.long()).last_hidden_state.float()
    got = ours(tokens)
    own_error = (wanted - exact).norm() / exact.norm()
    assert (got - exact).norm() / exact.norm() <= 1.5 * own_error


def _bf16_ours(model: UMT5) -> UMT5:
    copy = UMT5(CONFIG).eval()
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.bfloat16)


def _bf16_theirs(model: UMT5EncoderModel) -> UMT5EncoderModel:
    copy = oracle(CONFIG)
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.bfloat16)


@torch.no_grad()
def test_an_empty_row_is_zero_and_finite(pair: tuple[UMT5, UMT5EncoderModel]) -> None:
    assert not pair[0](prompts(0, 3))[0].any()
    assert attended(torch.tensor([[3, 0, 2, 0], [0, 0, 0, 0]], dtype=torch.int32)).tolist() == [
        [True, True, True, False],
        [False] * 4,
    ]


def test_buckets_at_full_length_are_transformers() -> None:
    config = UMT5Config(d_model=8, d_kv=2, num_heads=4, d_ff=8, num_layers=1, vocab_size=8)
    attention = UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
    place = torch.arange(512)
    assert torch.equal(
        relative_buckets(512, place.device), attention._relative_position_bucket(place[None] - place[:, None])
    )


def test_wans_names_carry_the_same_weights(pair: tuple[UMT5, UMT5EncoderModel]) -> None:
    own = pair[0].state_dict()
    wan = {re.sub("|".join(map(re.escape, WAN_NAMES)), lambda m: WAN_NAMES[m[0]], key): own[key] for key in own}
    assert "blocks.2.ffn.gate.0.weight" in wan and "blocks.0.pos_embedding.embedding.weight" in wan
    back = from_wan(wan)
    assert back.keys() == own.keys() and all(torch.equal(back[key], own[key]) for key in own)


def test_full_size_keys_and_shapes() -> None:
    """Every name and shape of google/umt5-xxl's encoder, no memory taken."""
    size = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                      feed_forward_proj="gated-gelu")  # fmt: skip
    with torch.device("meta"):
        theirs, ours = UMT5EncoderModel(size), UMT5(WAN22_TI2V_5B.text)
    check_state(ours, from_huggingface(theirs.state_dict()), "umT5-XXL")
    assert sum(parameter.numel() for parameter in ours.parameters()) == 5_680_910_336


def test_a_whole_umt5_loses_its_decoder_and_a_stranger_is_named() -> None:
    whole = {"encoder.embed_tokens.weight": 1, "decoder.block.0.layer.0.layer_norm.weight": 2, "lm_head.weight": 3}
    assert from_huggingface(whole) == {"embedding.weight": 1}
    assert from_huggingface({"shared.weight": 4, **whole}) == {"embedding.weight": 4}
    for convert in (from_huggingface, from_wan):
        with pytest.raises(IntegrityError, match=r"blocks\.0\.cross_attn\.q\.bias") as caught:
            convert({"blocks.0.cross_attn.q.bias": 0})
        assert "blocks.N.attn.X.weight" in str(caught.value)


def fill(model: onnx.ModelProto, module: torch.nn.Module) -> None:
    """Put the module's weights in bf16 where the graph names them, wherever the exporter left them."""
    state = module.state_dict()
    for tensor in model.graph.initializer:
        if tensor.name in state:
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = state[tensor.name].to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def test_it_exports_with_its_own_weight_names() -> None:
    torch.manual_seed(1)
    ours = UMT5(CONFIG).eval()
    spec = NetworkSpec(
        "text_encoder", (Binding("tokens", "int32", (1, 48)),), (Binding("embeddings", "fp32", (1, 48, 64)),)
    )
    model = onnx_from_model(TextStep(ours), spec)
    large = {t.name for t in model.graph.initializer if np.prod(t.dims) > 48 * 48}
    assert large == {name for name, p in ours.state_dict().items() if p.numel() > 48 * 48}
    gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
    assert {node.input[1] for node in gemms} == {n for n in ours.state_dict() if ".attn." in n or ".ffn." in n}
    fill(model, ours)
    session = onnxruntime.InferenceSession(ort_view(model).SerializeToString())
    tokens = prompts(20)[:1]
    got = torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0])
    wanted = ours.to(torch.bfloat16).float()(tokens)
    assert (got - wanted).norm() / wanted.norm() <= 1e-5
