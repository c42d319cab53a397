"""Copies between a device and the host that run beside what the device computes.

The only module of the offloaded optimizer that knows streams and events.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Link(ABC):
    """The way between the host and one device.

    A device does what it is asked in order; copies run beside it, each way in the order in which they were asked for.
    What the host does with either end of a copy must come after `wait`.
    """

    @abstractmethod
    def host_memory(self, count: int) -> Tensor:
        """Return memory of the host to copy from and to: uint8 of shape (count,)."""

    @abstractmethod
    def fetch(self, source: Tensor, target: Tensor) -> Any:
        """Copy to the host what is on the device, after all that was asked of the device so far; return the copy.

        The memory of `source` may be given up at once.
        """

    @abstractmethod
    def send(self, source: Tensor, target: Tensor) -> Any:
        """Copy to the device what is in the host's memory, after all that was asked of the device; return the copy."""

    @abstractmethod
    def wait(self, copy: Any) -> None:
        """Wait until a copy has ended."""

    @abstractmethod
    def join(self) -> None:
        """Let all that is asked of the device from now on come after what was sent."""


class BlockingLink(Link):
    """Copies that have ended when they return: to any device, the CPU itself included."""

    def host_memory(self, count: int) -> Tensor:
        """Return ordinary, pageable memory."""
        return torch.empty(count, dtype=torch.uint8)

    def fetch(self, source: Tensor, target: Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def wait(self, copy: None) -> None:
        """Return at once: the copy has ended."""

    def join(self) -> None:
        """Return at once: all copies have ended."""


class StreamLink(Link):
    """Copies on two streams of an accelerator, one each way, from and to memory that is pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = torch.get_device_module(device)
        self._down, self._up = (self._module.Stream(device=device) for _ in range(2))

    def host_memory(self, count: int) -> Tensor:
        """Return pinned memory."""
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def fetch(self, source: Tensor, target: Tensor) -> Any:
        """Copy on the stream to the host; the allocator keeps `source` until that has ended."""
        source.record_stream(self._down)
        return self._copied(self._down, source, target)

    def send(self, source: Tensor, target: Tensor) -> Any:
        """Copy on the stream to the device."""
        target.record_stream(self._up)
        return self._copied(self._up, source, target)

    def _copied(self, stream: Any, source: Tensor, target: Tensor) -> Any:
        """Copy on a stream, after what the device computes now; return the event of the copy's end."""
        stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, copy: Any) -> None:
        """Wait for the event."""
        copy.synchronize()

    def join(self) -> None:
        """Let the stream that computes wait for what was sent."""
        self._module.current_stream(self._device).wait_stream(self._up)


_WITH_STREAMS = ("cuda", "xpu")


def make_link(device: torch.device) -> Link:
    """Return the way to a device."""
    return StreamLink(device) if device.type in _WITH_STREAMS else BlockingLink()
