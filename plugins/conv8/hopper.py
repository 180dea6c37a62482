"""Convolutions of 8-bit codes by our kernel for Hopper: tiles for a size, the launch, and a trial with known answers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longtake.errors import UnavailableError
from longtake.plugins import driver
from longtake.plugins.codes import encode
from longtake.plugins.conv.reference import library_weight
from longtake.plugins.conv8.reference import FOLDED
from longtake.plugins.kernels import Dims, Macros, blocks_of
from longtake.plugins.launch import OpLauncher
from longtake.plugins.nvrtc import compile_cubin
from longtake.plugins.shapes import shape_of
from longtake.plugins.spec import Op

SOURCE = Path(__file__).with_name("hopper.cu")
MULTIPROCESSORS = 132  # of an H100 or H200
THREADS, CHANNELS = 384, 128
SHARED_BYTES, BARRIER_BYTES = 232_448, 1024  # of a thread block; of those, kept for barriers
TRIAL_ERROR = 4e-3  # relative; bf16's rounding of the output is 1.7e-3, unpromoted sums would be 5e-3


@dataclass(frozen=True)
class Tile:
    """What a thread block computes at a time: x by y positions of a frame, n channels."""

    x: int
    y: int
    n: int


LARGE, SMALL, WIDE = Tile(32, 8, 128), Tile(16, 8, 128), Tile(16, 8, 256)
COST = {
    LARGE: 1.0,
    WIDE: 1.05,
    SMALL: 1.15,
}  # of a product: what is copied for it is used fewer times by a smaller tile


def tiles_of(tile: Tile, dims: Dims, frames: int, sets: int = 1) -> tuple[int, int, int]:
    """How many cover a row, the channels of all sets of weights, and everything: each is of one set."""
    across, channels = blocks_of(dims["X"], tile.x), sets * blocks_of(dims["N"], tile.n)
    return across, channels, across * blocks_of(dims["Y"], tile.y) * frames * channels


def tile_for(dims: Dims, frames: int, whole: bool, multiprocessors: int = MULTIPROCESSORS, sets: int = 1) -> Tile:
    """The tile with which all is done first if every multiprocessor takes one after another. Sums that are promoted leave
    no registers for 256 channels."""

    def work(tile: Tile) -> float:
        rounds = math.ceil(tiles_of(tile, dims, frames, sets)[2] / multiprocessors)
        return rounds * tile.x * tile.y * tile.n * COST[tile]

    return min((tile for tile in COST if tile != WIDE or (whole and dims["N"] > CHANNELS)), key=work)


class _Sizes(ctypes.Structure):
    """`Conv` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("bias", "scale", "residual", "out")),
        *((name, ctypes.c_int32) for name in ("t", "y", "x", "c", "n", "kt", "tiles_x", "tiles_n", "tiles")),
    )


class HopperConv(OpLauncher):
    """One convolution for fixed dims; weights lie as `library_weight` leaves them.

    tile: by default the one that suits the dims. promote: shifts of 128 channels after which sums of E4M3 products go to
    fp32, 0 for never. ahead: fetch the residual while the products run. multiprocessors: by default the device's.

    Raises UnavailableError for dims that the kernel does not take.
    """

    method = "wgmma"
    halo = True

    def __init__(
        self,
        op: Op,
        dims: Dims,
        arch: str | None = None,
        tile: Tile | None = None,
        promote: int = 1,
        ahead: bool = True,
        multiprocessors: int = 0,
    ) -> None:
        super().__init__(op, dims)
        if dims["C"] % 16 or dims["N"] % 8:
            raise UnavailableError(
                f"{op.name}: the kernel does not take these channels",
                got=f"{dims['C']} to {dims['N']}",
                expected="a multiple of 16 to a multiple of 8",
            )
        self._time, self._side, _ = op.kernel_size
        self._sets = 4 if op.kernel_size == FOLDED else 1
        self._frames, self._whole = dims["T"] - self._time + 1, op.codes == "int8"
        self._arch, self._wanted_tile, self._multiprocessors = arch, tile, multiprocessors
        self._promote, self._ahead = (0 if self._whole else promote), ahead and "residual" in op.spec.names
        self._function: object = None
        self._maps: dict[tuple[int, ...], tuple[bytes, bytes]] = {}

    @property
    def tile(self) -> Tile:
        """What a thread block computes at a time."""
        count = self._multiprocessors or MULTIPROCESSORS
        return self._wanted_tile or tile_for(self.dims, self._frames, self._whole, count, self._sets)

    @property
    def box(self) -> tuple[int, int]:
        """Positions that one copy takes, across and down: the tile's, with a border."""
        border = self._side - 1
        return self.tile.x + (border if self.halo else 0), self.tile.y + border

    def macros(self) -> Macros:
        """What the kernel is compiled with."""
        a_stage = -(-math.prod(self.box) * CHANNELS // 1024) * 1024
        b_stage, limit = self.tile.n * CHANNELS, SHARED_BYTES - BARRIER_BYTES
        each = self._side == 1  # a copy of positions for every one of weights
        a_stages = limit // (a_stage + b_stage) if each else 2
        return {
            "BX": self.tile.x,
            "BY": self.tile.y,
            "BN": self.tile.n,
            "SIDE": self._side,
            "HALO": int(self.halo),
            "PROMOTE": self._promote,
            "WHOLE": int(self._whole),
            "CUT": int(self.dims["N"] % self.tile.n != 0),
            "AHEAD": int(self._ahead),
            "A_STAGES": a_stages,
            "B_STAGES": a_stages if each else (limit - a_stages * a_stage) // b_stage,
        }

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a thread block."""
        macros = self.macros()
        a_stage = -(-math.prod(self.box) * CHANNELS // 1024) * 1024
        stages = int(macros["A_STAGES"]), int(macros["B_STAGES"])
        return stages[0] * a_stage + stages[1] * self.tile.n * CHANNELS + 16 * sum(stages)

    def cubin(self, arch: str) -> bytes:
        """The compiled kernel; needs no GPU."""
        return compile_cubin(SOURCE, {**self.macros(), "COMPUTE_BF16": 1}, arch)

    def prepare(self) -> HopperConv:
        """See OpLauncher.prepare."""
        if self._function is None:
            device = driver.ensure_context()
            self._multiprocessors = self._multiprocessors or driver.multiprocessors(device)
            (self._function,) = driver.load_functions(self.cubin(self._arch or driver.device_arch(device)), ["conv8"])
            driver.allow_shared(self._function, self.shared_bytes)
        return self

    def launch(self, pointers: Sequence[int], stream: int, workspace: int = 0, table_len: int = 0) -> None:
        """See OpLauncher.launch. The first launch over new addresses describes them to the copy engine."""
        self._check(pointers, workspace, table_len)
        self.prepare()
        driver.ensure_context()
        known = dict(zip(self.spec.names, pointers))
        across, channels, tiles = tiles_of(self.tile, self.dims, self._frames, self._sets)
        sizes = _Sizes(
            known["bias"],
            known["scale"],
            known.get("residual", 0),
            known["out"],
            self._frames,
            self.dims["Y"],
            self.dims["X"],
            self.dims["C"],
            self.dims["N"],
            self._time,
            across,
            channels,
            tiles,
        )
        map_x, map_w = (ctypes.create_string_buffer(m, len(m)) for m in self._maps_of(known["x"], known["weight"]))
        boxes = [ctypes.addressof(argument) for argument in (map_x, map_w, sizes)]
        grid = min(tiles, self._multiprocessors or MULTIPROCESSORS), 1
        driver.launch_boxes(self._function, grid, THREADS, stream, boxes, self.shared_bytes)

    def _maps_of(self, x: int, weight: int) -> tuple[bytes, bytes]:
        if (x, weight) not in self._maps:
            t, y, across, c, n = (self.dims[letter] for letter in "TYXCN")
            taps = self._time * self._side * self._side
            self._maps[x, weight] = (
                driver.tensor_map(x, (c, across, y, t), (CHANNELS, *self.box, 1)),
                driver.tensor_map(weight, (taps * c, self._sets * n), (CHANNELS, self.tile.n)),
            )
        return self._maps[x, weight]

    def try_out(self) -> None:
        """Convolve something of odd sizes with a known answer, once for each kernel that is compiled: what fails must fail
        before the run. Raises UnavailableError."""
        kind: Any = type(self)
        error = _trial_error(kind, self.op, self.macros(), self.tile)
        if not error <= TRIAL_ERROR:  # a NaN is refused, too
            raise UnavailableError(
                f"{self.op.name} through {self.method} is wrong",
                got=f"relative error {error:.3g}",
                expected=f"at most {TRIAL_ERROR}",
            )


_TRIALS: dict[tuple[Any, ...], float] = {}  # of each kernel that was tried in this process


def _trial_error(kind: type[HopperConv], op: Op, macros: Macros, tile: Tile) -> float:
    """The error of one kernel, found out once in this process: an op cannot be hashed, its name can."""
    key = (kind, op.name, tuple(sorted(macros.items())), tile)
    if key not in _TRIALS:
        _TRIALS[key] = _tried(kind, op, macros, tile)
    return _TRIALS[key]


def _tried(kind: type[HopperConv], op: Op, macros: Macros, tile: Tile) -> float:
    """The relative error of one kernel against its reference in fp64, and infinity if sums of ones are not what they are."""
    cut = macros["CUT"]
    n = tile.n + 8 if cut else 2 * tile.n
    dims = {"T": 2 + op.kernel_size[0] - 1, "Y": 11, "X": tile.x + 5, "C": 272, "N": n}
    launcher = kind(op, dims, tile=tile, promote=int(macros["PROMOTE"]))
    generator = torch.Generator("cuda").manual_seed(0)

    def run(x: torch.Tensor, weight: torch.Tensor, worth: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.full((weight.shape[0],), worth, device="cuda")
        bias = torch.randn(n, generator=generator, device="cuda").bfloat16()
        shape = shape_of(op.spec.outputs[0], dims)
        rest = (
            [torch.randn(shape, generator=generator, device="cuda").bfloat16()] if "residual" in op.spec.names else []
        )
        out = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
        tensors = (x, library_weight(weight), scale, bias, *rest, out)
        launcher.launch([t.data_ptr() for t in tensors], torch.cuda.current_stream().cuda_stream)
        wanted = op.reference(
            *(t.cpu() for t in (x, weight, scale, bias, *rest))
        )  # on the CPU: no TF32, no other kernel
        return out.cpu().float(), wanted.float()

    shapes = [shape_of(tensor, dims) for tensor in op.spec.inputs[:2]]
    x, weight = (encode(30 * torch.randn(s, generator=generator, device="cuda"), op.codes) for s in shapes)
    got, wanted = run(x, weight, 1 / (900 * weight[0].numel() ** 0.5))
    ones = [encode(torch.ones(s, device="cuda"), op.codes) for s in shapes]
    counted, count = run(ones[0], ones[1], 1.0)
    if not torch.equal(counted, count):
        return float("inf")
    return float((got - wanted).norm() / wanted.norm())


class HopperRowsConv(HopperConv):
    """The same with first rows that are multiples of eight: for a GPU or driver where any others go wrong."""

    method = "wgmma_rows"
    halo = False
