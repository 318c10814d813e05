"""Device memory as one arena, and the driver's side of pinned host memory."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, cast

import torch

from tierstore.budget import format_nbytes
from tierstore.errors import CapacityError, DeviceError
from tierstore.pools.region import RegionPool

_ALIGN = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class CudaPool(RegionPool):
    """``nbytes`` of memory of ``device``, taken at once through torch's allocator.

    Raises ``DeviceError`` without a GPU and ``CapacityError`` when the device has less.
    """

    def __init__(self, nbytes: int, device: torch.device, *, name: str = "the device pool") -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise DeviceError(f"{name} needs an NVIDIA GPU that torch can use, got {device}: use device='cpu'")
        self._device = device
        super().__init__(_on_device(nbytes, device, name), name=name)
        # The allocator may hand out memory that work issued earlier on this stream still reads; copy streams are
        # not ordered after that work.
        torch.cuda.current_stream(device).synchronize()

    def close(self) -> None:
        """Wait for the device, then let go: torch's allocator gives the memory to whoever asks next. Idempotent."""
        if self._region is not None:
            with suppress(RuntimeError):  # a device that failed is waited for no longer
                torch.cuda.synchronize(self._device)
        super().close()


class CudaRegistrar:
    """Pins host memory for copies to and from every CUDA device.

    A copy must not cross a multiple of ``segment_nbytes`` in host memory: the driver looks up the range that it
    begins in, and takes no copy that leaves it. ``device`` is the one whose context does the work.
    """

    segment_nbytes = 256 << 20

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device is None else device

    def register(self, address: int, nbytes: int) -> bool:
        """Pin ``nbytes`` at ``address``, both whole pages; False when the driver refuses."""
        with torch.cuda.device(self._device):
            pinned = int(_cudart().cudaHostRegister(address, nbytes, _PORTABLE)) == 0
            if not pinned:
                self._forget_error()
        return pinned

    def unregister(self, address: int) -> None:
        """Unpin what was registered at ``address``."""
        with torch.cuda.device(self._device):
            if int(_cudart().cudaHostUnregister(address)) != 0:
                self._forget_error()

    def _forget_error(self) -> None:
        """A failed call stays behind as this thread's last error, and the next kernel launch would report it as its
        own: launch one here, so that it does."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self._device)


def _cudart() -> Any:
    return cast(Any, torch.cuda).cudart()


def _on_device(nbytes: int, device: torch.device, name: str) -> torch.Tensor:
    """uint8 of shape ``(nbytes,)`` at a multiple of 4096, uninitialised."""
    try:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            region = torch.empty(nbytes, dtype=torch.uint8, device=device)
            if region.data_ptr() % _ALIGN == 0:
                return region
            del region
            spare = torch.empty(nbytes + _ALIGN, dtype=torch.uint8, device=device)
            skip = -spare.data_ptr() % _ALIGN
            return spare[skip : skip + nbytes]
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise CapacityError(
            f"{name} needs {format_nbytes(nbytes)} of memory on {device}, {format_nbytes(free)} of "
            f"{format_nbytes(total)} are free: lower Budget.hbm or end what else uses the device"
        ) from error
