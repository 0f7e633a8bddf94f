"""Where the tensors of a layer are: on the device, in host memory, or on the way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nexusquant_cache.layer.host import arrive, beside, side_stream, to_device, to_host
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import LayerState


@dataclass(eq=False)
class Residency:
    """Moves the tensors of a layer between its device and host memory.

    Whoever enters a layer calls `arrive` first, or a method here that does.

    Attributes:
        state: What the layer holds.
        shared: What the layers of the cache share.
        is_parked: Whether it was sent away by `offload`, all of it or, after an error, some.
        coming: Where copies to the device are made beside the computation; None while none are.
    """

    state: LayerState
    shared: Shared
    is_parked: bool = False
    coming: torch.cuda.Stream | None = None

    @property
    def is_away(self) -> bool:
        """Whether anything that attention needs is elsewhere than on the device of the layer."""
        if self.state.tail is None:
            return False
        home = self.state.home
        is_somewhere = self.is_parked or self.state.tail[0].device != home
        return is_somewhere or any(buffer.is_away(home) for buffer in self.state.buffers)

    def offload(self) -> None:
        """Move everything stored to host memory, in packed form."""
        self.arrive()
        self.is_parked = self.state.tail is not None
        self.state.move(to_host)

    def fetch(self, *, codes: bool = True, prompt: bool = True) -> None:
        """Move what attention needs to the device; an offloading cache only copies the codes there.

        On a CUDA device the copies may still be under way, in the order of the current stream.

        Args:
            codes: Also the codes.
            prompt: Also the exact tokens of a prompt that waits for its compression.
        """
        self.arrive()
        if self.is_away:
            self._move_here(codes=codes, prompt=prompt)

    def fetch_beside(self) -> None:
        """Start to `fetch` beside the computation; whatever uses the layer next waits."""
        if self.coming is None and self.is_away:
            home = self.state.home
            self.coming = side_stream(home)
            with beside(self.coming, home):
                self._move_here()

    def unpark(self) -> None:
        """Undo `offload`, but for what an offloading cache keeps in host memory: codes, and a waiting prompt."""
        stays = self.shared.offloading
        self.fetch(codes=not stays, prompt=not stays)

    def release(self) -> None:
        """Keep in host memory alone what is large: the codes, and a prompt that waits for its compression.

        Sinks, the newest tokens and transforms stay on the device: they change, or are needed, at every step.
        """
        self.arrive()
        for buffer in self.state.buffers:
            buffer.release()
        if self.state.turn.is_pending and self.state.tail is not None:
            self.state.tail = (to_host(self.state.tail[0]), to_host(self.state.tail[1]))

    @contextmanager
    def at_home(self, *, codes: bool = True) -> Iterator[None]:
        """Have everything on the device meanwhile, or all but codes that are kept in host memory."""
        was_away = self.is_away
        self.fetch(codes=codes or not self.shared.offloading)
        try:
            yield
        finally:
            if was_away and self.shared.offloading:
                self.release()

    def arrive(self) -> None:
        """Wait for what is coming, in the order of the device's current stream."""
        if self.coming is None:
            return
        came = [tensor for _, tensor in self.state.tensors("exact", "positions", "transform")]
        came += [tensor for buffer in self.state.buffers for tensor in buffer.on_the_way]
        arrive(self.coming, self.state.home, came)
        self.coming = None

    def _move_here(self, *, codes: bool = True, prompt: bool = True) -> None:
        """Move or copy to the device what is not there.  After an error it can be called again."""
        state, home = self.state, self.state.home
        stays = state.exact if state.turn.is_pending and not prompt else ()
        if self.is_parked or state.exact[0].device != home:
            state.move(_moved_to(home, stays), "exact", "positions", "transform")
        if codes and not self.shared.offloading:
            state.move(_moved_to(home, ()), "codes", "scales")
        elif codes:
            for buffer in state.buffers:
                buffer.fetch(home)
        self.is_parked = False


def _moved_to(home: torch.device, stays: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    """Return a function that moves tensors to a device, all but those that stay."""
    return lambda x: x if any(x is tail for tail in stays) else to_device(x, home)
