"""umT5-XXL where 11.4 GB are too much: the word embeddings stay on the host, the layers in 16 or 8 bits, paged or resident.

This is how presets of kind "umt5" get their embeddings at run time: a prompt is encoded once, by PyTorch, and kept. An
engine would hold 11 GB of weights for milliseconds of work a prompt. bf16 is the reference; int8 is weight-only.

    longtake bench umt5          latency and memory on this machine's GPU

Legend: P prompts, E tokens of a prompt (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from longtake.errors import IntegrityError, LongtakeError
from longtake.training.models.presets import TextEncoderConfig
from longtake.training.models.text.layer_pages import Layout, Paged, Resident, State
from longtake.training.models.text.umt5 import MASKED, UMT5, RMSNorm, UMT5Block, attended, relative_buckets

# The named constants one after the other, in the dtype stored (as `engines.onnx_file` reads them out of an ONNX file).
WeightSource = Callable[[set[str]], Iterator[tuple[str, Tensor]]]
STORAGES = ("bf16", "int8")
WORKING = torch.bfloat16


class Int8Linear(nn.Module):
    """A linear without bias whose weight is int8 with one fp32 scale a row.

    An int8 is exact in bf16, so the product is scaled, not the weight: no rounding of weights beyond that to 8 bits.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(outputs, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return (functional.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [O, I] as int8 and fp32 scales [O]: the largest magnitude of a row becomes 127."""
    scale = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def stored_block(config: TextEncoderConfig, storage: str) -> UMT5Block:
    """A layer without memory, whose state dict names what `storage` keeps of it.

    Raises:
        LongtakeError: there is no such storage.
    """
    if storage not in STORAGES:
        raise LongtakeError("unknown storage of the text encoder", got=storage, expected=" or ".join(STORAGES))
    with torch.device("meta"):
        block = UMT5Block(config).to(WORKING)
        if storage == "int8":
            for part in (block.attn, block.ffn):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(part, name, Int8Linear(linear.in_features, linear.out_features))
    return block.eval()


def stored_bytes(config: TextEncoderConfig, storage: str) -> int:
    """Bytes of one layer as it is stored."""
    return Layout.of(stored_block(config, storage).state_dict()).size


def device_bytes(config: TextEncoderConfig, storage: str, resident: bool) -> int:
    """Upper bound of the device memory that a `PagedUMT5` takes while it encodes one prompt, in bytes.

    Pages, the largest linear of an int8 layer in bf16, and activations: three attention-sized fp32 tensors, four of the
    FFN's, eight of the width.
    """
    pages = stored_bytes(config, storage) * (config.layers if resident else min(2, config.layers))
    widened = 2 * config.dim * max(config.dim, config.ffn_dim) if storage == "int8" else 0
    scores = 3 * 4 * config.heads * config.length**2
    rows = config.length * 4 * (4 * config.ffn_dim + 8 * config.dim)
    return pages + widened + scores + rows


class PagedUMT5:
    """umT5 with a bounded footprint on the device. Call it with token ids, as the module it stands for."""

    def __init__(
        self,
        config: TextEncoderConfig,
        source: WeightSource,
        device: torch.device,
        storage: str = "bf16",
        resident: bool = False,
    ) -> None:
        """Read all weights once, a layer at a time.

        Args:
            source: yields weights by the names of `UMT5`'s state dict.
            storage: "bf16" as the reference, or "int8" with a scale a row: half the memory and the copying.
            resident: keep every layer on the device instead of two.

        Raises:
            LongtakeError: unknown storage.
            IntegrityError: the source lacks a weight, or one has another shape.
        """
        self.config, self.device, self.storage, self.resident = config, torch.device(device), storage, resident
        self._block = stored_block(config, storage)
        self._buckets = relative_buckets(config.length, self.device)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in UMT5(config).state_dict().items()}
        self._read = _Reader(source, shapes)
        outer = self._read({"embedding.weight", "norm.weight"})
        self.embedding = outer["embedding.weight"].cpu()  # stays in the mapped file: only a prompt's rows are read
        self._norm = RMSNorm(config.dim).to(self.device, WORKING)
        self._norm.weight.data.copy_(outer["norm.weight"])
        self._pages = self._filled()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int32 [P, E] -> fp32 embeddings [P, E, dim] on the device; rows of padding are zero."""
        words = attended(tokens.cpu())
        rows = functional.embedding(tokens.cpu().long(), self.embedding).flatten(0, 1)
        x = rows.to(self.device, WORKING)
        on_device = words.to(self.device)
        mask = (~on_device).to(torch.float32)[:, None, None, :] * MASKED
        with closing(self._pages.layers()) as layers:
            for state in layers:
                x = functional_call(self._block, state, (x, mask, self._buckets))
        return self._norm(x).float().unflatten(0, tokens.shape) * on_device[..., None].to(torch.float32)

    @property
    def host_bytes(self) -> int:
        """Host memory it holds for good, but for the embedding: the pinned layers, or nothing when resident."""
        return 0 if self.resident else self.config.layers * stored_bytes(self.config, self.storage)

    def _filled(self) -> Resident | Paged:
        layout = Layout.of(self._block.state_dict())
        where = self.device if self.resident else torch.device("cpu")
        pages = torch.empty(self.config.layers, layout.size, dtype=torch.uint8, device=where)
        for index, page in enumerate(pages):
            layout.fill(page, self._stored(index))
        return Resident(layout, pages) if self.resident else Paged(layout, pages, self.device)

    @torch.no_grad()
    def _stored(self, index: int) -> State:
        """The tensors of layer `index` as they are stored; rounding to 8 bits is done on the device, which is faster."""
        prefix = f"blocks.{index}."
        weights = {n.removeprefix(prefix): t for n, t in self._read.starting(prefix).items()}
        if self.storage == "int8":
            for name in [n for n in weights if n.startswith(("attn.", "ffn."))]:
                weights[name], weights[f"{name.removesuffix('weight')}scale"] = int8_rows(weights[name].to(self.device))
        return weights


class _Reader:
    """Reads a source and insists on names and shapes."""

    def __init__(self, source: WeightSource, shapes: Mapping[str, torch.Size]) -> None:
        self.source, self.shapes = source, shapes

    def starting(self, prefix: str) -> State:
        return self({name for name in self.shapes if name.startswith(prefix)})

    def __call__(self, names: set[str]) -> State:
        found = {name: tensor for name, tensor in self.source(names) if name in names}
        pairs = [(name, list(t.shape), list(self.shapes[name])) for name, t in found.items()]
        problems = [f"{name} {got} instead of {wanted}" for name, got, wanted in pairs if got != wanted]
        problems += [f"no {name}" for name in sorted(names - found.keys())]
        if problems:
            what = "the weights aren't those of the text encoder"
            got, expected = "; ".join(problems[:6]), "every weight of umT5 in its shape"
            raise IntegrityError(what, got=got, expected=expected, fix="convert the checkpoint again")
        return found


def source_from_state(state: Mapping[str, Tensor]) -> WeightSource:
    """Weights out of a state dict."""
    return lambda names: ((name, state[name]) for name in sorted(names) if name in state)
