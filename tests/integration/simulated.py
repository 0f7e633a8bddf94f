"""Other devices than the one there is: tensors that say they live elsewhere, and ways to generate with them."""

import copy
import functools
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from integration.tiny import generate, prompt, reachable_tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LlamaForCausalLM

import nexusquant_cache
from nexusquant_cache import NexusQuantCache
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.states import tensors
from nexusquant_cache.states.metadata import METADATA
from nexusquant_cache.states.tensors import ExactStates, States

CPU = torch.device("cpu")


class Placed(Tensor):
    """A tensor on the CPU that says it lives on ``place``."""

    place: torch.device

    @classmethod
    def of(cls, data: Tensor, place: torch.device) -> Tensor:
        """Return a tensor that shares memory with ``data``; a plain one for the CPU."""
        data = data.as_subclass(Tensor)
        if place == CPU:
            return data
        placed = data.as_subclass(cls)
        placed.place = place
        return placed

    @property
    def device(self) -> torch.device:
        return self.place

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return Placed.of(copy.deepcopy(self.as_subclass(Tensor), memo), self.place)


def tensors_in(x: object) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from tensors_in(item)
    elif isinstance(x, dict):
        yield from tensors_in(list(x.values()))


def replaced(x: Any, change: Any) -> Any:
    """Return ``x`` with every tensor in it replaced by ``change(tensor)``; named tuples of torch become tuples."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, (list, tuple)):
        items = [replaced(item, change) for item in x]
        return items if type(x) is list else type(x)(items)
    return {key: replaced(value, change) for key, value in x.items()} if isinstance(x, dict) else x


class SimulatedDevices(TorchFunctionMode):
    """Run every torch function on the CPU, and let its result live where an accelerator would put it.

    As there, tensors of one operation share a device, but for a number (no axis) on the CPU.  Only `to` and
    `cpu` move a tensor; `copy_` and assignment into another device are refused too: real ones would copy and wait.

    Attributes:
        used: Where something was computed.
        fetched: Bytes moved from the CPU to another device.
        sent: Bytes moved back.
    """

    moves = (Tensor.to, Tensor.cpu)

    def __init__(self) -> None:
        super().__init__()
        self.used: set[torch.device] = set()
        self.fetched = self.sent = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        del types
        given = [x for x in tensors_in([args, kwargs or {}]) if isinstance(x, States)]
        if given:
            return self._attend(place_of(given[0]), func, args, kwargs or {})
        if func.__name__ == "__get__":  # attributes, by far the most calls
            result = func(args[0].as_subclass(Tensor))
            return Placed.of(result, args[0].device) if isinstance(result, Tensor) else result
        kwargs = dict(kwargs or {})
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):  # as another one is
            args = (args[0], args[1].device, args[1].dtype)
        given = list(tensors_in([args, kwargs]))
        places = {x.device for x in given if x.device != CPU or x.ndim > 0}
        place = next(iter(places), CPU)
        if len(places) > 1:
            msg = f"{getattr(func, '__name__', func)}: tensors on {sorted(map(str, places))}"
            raise RuntimeError(msg)
        if func in self.moves:
            found = [torch.device(x) for x in (*args[1:], *kwargs.values()) if isinstance(x, (torch.device, str))]
            place = CPU if func is Tensor.cpu else next(iter(found), place)
            args = tuple(CPU if isinstance(x, (torch.device, str)) else x for x in args)
            kwargs = {key: CPU if isinstance(x, (torch.device, str)) else x for key, x in kwargs.items()}
            if place != args[0].device:
                nbytes = args[0].numel() * args[0].element_size()
                self.fetched, self.sent = self.fetched + nbytes * (place != CPU), self.sent + nbytes * (place == CPU)
        elif kwargs.get("device") is not None:
            place, kwargs["device"] = torch.device(kwargs["device"]), CPU
        plain = [replaced(x, lambda tensor: tensor.as_subclass(Tensor)) for x in (args, kwargs)]
        result = func(*plain[0], **plain[1])
        self.used.add(place)
        return replaced(result, lambda tensor: Placed.of(tensor, place))

    def _attend(self, place: torch.device, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let states compute where their layer is; the model, which is spared the simulation, gets what comes out."""
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = (
            replaced(x, lambda tensor: tensor if isinstance(tensor, States) else Placed.of(tensor, place))
            for x in (args, kwargs)
        )
        with self:
            result = tensors._compute(func, args, kwargs)
        return replaced(result, lambda x: x if isinstance(x, States) else x.as_subclass(Tensor))


def _plain(states: ExactStates, plain: Any = ExactStates.plain) -> Tensor:
    return Placed.of(plain(states), place_of(states))


# The class says where a tensor lives, and `as_subclass`, which changes it, is no torch function.
ExactStates.plain = _plain  # type: ignore[method-assign]


def _formed(states: ExactStates, form: Any, function: Any, args: Any, kwargs: Any) -> ExactStates:
    return ExactStates.of(function(states.plain(), *args, **kwargs), states.source, states.side, form)


ExactStates.formed = _formed  # type: ignore[method-assign]


def place_of(states: Any) -> torch.device:
    """Return where the layer of states is, or a tensor."""
    return states.source.held.tail[0].device if isinstance(states, States) else states.device


def forget_tables() -> None:
    """Empty every `lru_cache` of the package, so that its tables are computed anew."""
    for thing in gc.get_objects():
        if type(thing) is functools._lru_cache_wrapper and thing.__module__.startswith(nexusquant_cache.__name__):
            thing.cache_clear()


class SpreadCache(NexusQuantCache):
    """A cache for a model with each layer on a device of its own; the model itself is spared the simulation."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        place = torch.device("xpu", layer_idx)
        given = Placed.of(key_states, place), Placed.of(value_states, place)
        returned = super().update(*given, layer_idx, *args, **kwargs)
        assert [place_of(x) for x in returned] == [place, place]
        return tuple(x if isinstance(x, States) else x.as_subclass(Tensor) for x in returned)


def stored(layer: NexusQuantLayer) -> list[Tensor]:
    """Return the tensors that a layer holds for itself.

    What layers share and the tables of the phase, which has some for each device, are not its own.  How many tokens
    each head has stays on the CPU.
    """
    found = reachable_tensors({name: value for name, value in vars(layer.state).items() if name != "phase"})
    holders = [*layer.state.buffers, *([] if layer.state.body is None else [layer.state.body.positions])]
    counts = [id(getattr(holder, "counts", None)) for holder in holders]
    return [x for x in found if id(x) not in counts]


def pads() -> Tensor:
    """Return the mask of two rows of sixty tokens, one of them with seven pads."""
    return (torch.arange(60) >= torch.tensor([[0], [7]])).long()


def greedy(model: LlamaForCausalLM, cache: NexusQuantCache) -> Tensor:
    text = generate(model, prompt(60), cache, 10)
    return generate(model, torch.cat([text, prompt(30, seed=1)], -1), cache, 4)


def beams(model: LlamaForCausalLM, cache: NexusQuantCache) -> Tensor:
    return generate(model, prompt(60), cache, 10, num_beams=3)


def several(model: LlamaForCausalLM, cache: NexusQuantCache) -> Tensor:
    return generate(model, prompt(60), cache, 10, do_sample=True, num_return_sequences=2)


def lookup(model: LlamaForCausalLM, cache: NexusQuantCache) -> Tensor:
    return generate(model, prompt(60), cache, 10, prompt_lookup_num_tokens=3)


def padded(model: LlamaForCausalLM, cache: NexusQuantCache) -> Tensor:
    return generate(model, prompt(60, 2) * pads(), cache, 10, attention_mask=pads())


def cropped(model: LlamaForCausalLM, cache: NexusQuantCache) -> Tensor:
    """Go back into the packed tokens, to where some were evicted, and from there on again."""
    generate(model, prompt(60), cache, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prompt was cut where tokens had been evicted")
        cache.crop(-30)
    return generate(model, prompt(60), cache, 6)


MODES = [greedy, beams, several, lookup, padded, cropped]
