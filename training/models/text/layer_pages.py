"""Layers of weights too large for the device: packed in host memory, two at a time on the device, copied ahead of their use.

One packed layer is one run of bytes, so that one copy moves it; its tensors are views of those bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from longtake.cuda_streams import acquire_stream
from longtake.errors import UnavailableError

ALIGNMENT = 256
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU
State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where a layer's tensors lie in its bytes: name -> (offset, dtype, shape)."""

    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]
    size: int

    @classmethod
    def of(cls, tensors: State) -> Layout:
        """The layout of tensors like `tensors` (their content is not read)."""
        places, offset = {}, 0
        for name, tensor in tensors.items():
            places[name] = offset, tensor.dtype, tuple(tensor.shape)
            offset += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return cls(places, offset)

    def views(self, page: Tensor) -> State:
        """The tensors that lie in `page`, uint8 [size]."""
        return {
            name: page[at : at + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (at, dtype, shape) in self.places.items()
        }

    def fill(self, page: Tensor, tensors: State) -> None:
        """Copy `tensors` to their places in `page`."""
        for name, view in self.views(page).items():
            view.copy_(tensors[name])


class Resident:
    """All layers on the device. pages: uint8 [layers, size] there."""

    def __init__(self, layout: Layout, pages: Tensor) -> None:
        self.layout, self.pages = layout, pages

    def layers(self) -> Generator[State, None, None]:
        """The layers' tensors, in order."""
        return (self.layout.views(page) for page in self.pages)


class Paged:
    """Layers in pinned host memory, brought to one of two device pages while the layer before is computed.

    pages: uint8 [layers, size] on the host; pinned here for as long as this lives (only where `device` is a GPU).

    Raises:
        UnavailableError: the memory can't be pinned.
    """

    def __init__(self, layout: Layout, pages: Tensor, device: torch.device) -> None:
        self.layout, self.pages, self.device = layout, pages, device
        self.copying = acquire_stream(device, self) if device.type == "cuda" else None
        if self.copying is not None:
            pin(pages)
            weakref.finalize(self, unpin, pages).atexit = False  # CUDA may be gone by then

    def layers(self) -> Generator[State, None, None]:
        """The layers' tensors, in order; each is valid until the next is asked for. The device pages live as long."""
        slots = torch.empty(min(2, len(self.pages)), self.layout.size, dtype=torch.uint8, device=self.device)
        if self.copying is None:
            yield from (self.layout.views(slots[i % 2].copy_(page)) for i, page in enumerate(self.pages))
            return
        computing = torch.cuda.current_stream(self.device)
        self.copying.wait_stream(computing)  # whatever had the slots' memory before was queued there
        try:
            arrived = [self._bring(i, slots[i], self.copying) for i in range(len(slots))]
            for i in range(len(self.pages)):
                computing.wait_event(arrived[i % 2])  # the copy is on another stream
                yield self.layout.views(slots[i % 2])
                if i + 2 < len(self.pages):
                    self.copying.wait_stream(computing)  # layer i, queued by now, still reads the slot
                    arrived[i % 2] = self._bring(i + 2, slots[i % 2], self.copying)
        finally:
            computing.wait_stream(self.copying)  # who gets the slots' memory next must not meet a late copy

    def _bring(self, index: int, slot: Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            slot.copy_(self.pages[index], non_blocking=True)
        return stream.record_event()


def pin(pages: Tensor) -> None:
    """Page-lock host memory in place: torch's own pinned memory comes in powers of two, 16 GiB for 9."""
    result = torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), pages.nbytes, PORTABLE)
    if int(result):
        got, fix = f"CUDA error {result}", "free host memory, or keep the text encoder in 8 bits or on the device"
        raise UnavailableError(f"{pages.nbytes / 1e9:.1f} GB of host memory can't be pinned", got=got, fix=fix)


def unpin(pages: Tensor) -> None:
    """Undo `pin`, once no copy is under way any more."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(pages.data_ptr())
