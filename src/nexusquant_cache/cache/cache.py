"""`NexusQuantCache`: a transformers cache that keeps packed E8 codes in place of keys and values."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from nexusquant_cache.cache.layer import NexusQuantLayer, Side
from nexusquant_cache.cache.report import DENSE_BYTES_PER_CHANNEL, LayerReport, MemoryReport, storage_bytes
from nexusquant_cache.cache.rotary import rotary_phase
from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.errors import OptionError, UnsupportedError
from nexusquant_cache.layout import CodeLayout
from nexusquant_cache.policy import EvictionPolicy, KeyKeyPolicy
from nexusquant_cache.presets import CacheConfig, resolve_preset
from nexusquant_cache.reference.rope import RotaryPhase

_LOGGER = logging.getLogger(__name__)


class NexusQuantCache(DynamicCache):
    """A KV cache that compresses itself after the prompt and stays compressed while it generates.

    Pass it to ``model.generate(**inputs, past_key_values=NexusQuantCache(preset="balanced"))``; nothing else
    changes.  With ``config=model.config`` keys are coded without their rotary phase, and layers that are
    not full attention (sliding windows, linear attention) get transformers' own layer classes.

    One cache serves one conversation: for another prompt call `reset` or make a new one.  transformers does not
    show a cache the token ids, so a cache reused for another, longer prompt cannot be told from a
    conversation that goes on.

    Subclass it and override `make_policy` or `make_codec` for policies and codecs of your own.

    Args:
        preset: Name of a preset (`PRESETS`) or a `CacheConfig`.
        config: The model's config.
        policy: Which tokens to keep; `KeyKeyPolicy` by default.
        **overrides: Fields of `CacheConfig` that replace those of the preset.

    Raises:
        OptionError: If the preset or an option does not exist, or a value is outside its range.
        UnsupportedError: If the model caches latent vectors in place of keys and values.
    """

    def __init__(
        self,
        preset: str | CacheConfig = "balanced",
        *,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        **overrides: Any,  # noqa: ANN401 - checked against the fields of CacheConfig
    ) -> None:
        """Make an empty cache."""
        self.cache_config = resolve_preset(preset).override(overrides)
        self.preset = preset if isinstance(preset, str) and not overrides else "custom"
        given: object = policy  # whatever the annotation says
        if given is not None and not isinstance(given, EvictionPolicy):
            msg = f"policy must be an EvictionPolicy instance, got {given!r}; write KeyKeyPolicy(), not KeyKeyPolicy"
            raise OptionError(msg)
        self.policy = policy
        self.model_config = None if config is None else config.get_text_config(decoder=True)
        self.may_evict = True
        self._phases: list[RotaryPhase] = []
        self._peak_bytes = 0
        # Cache's constructor in place of DynamicCache's, which would make layers of its own.
        Cache.__init__(self, layers=self._make_layers())

    def _make_layers(self) -> list[Any]:
        """Return the layers that the config asks for; none without a config, they are then made on demand."""
        if self.model_config is None:
            return []
        if getattr(self.model_config, "kv_lora_rank", None):
            msg = (
                f"{self.model_config.model_type} caches latent vectors (multi-head latent attention) in place of keys "
                "and values. They are compressed already, and this version cannot code them: use DynamicCache."
            )
            raise UnsupportedError(msg)
        # transformers decides which layer is of which kind; only its plain full-attention layers are replaced.
        return [
            NexusQuantLayer(self, index) if type(layer) is DynamicLayer else layer
            for index, layer in enumerate(DynamicCache(config=self.model_config).layers)
        ]

    # What a subclass may override

    def make_policy(self, layer_idx: int) -> EvictionPolicy:
        """Return the policy of a layer."""
        del layer_idx
        return self.policy or KeyKeyPolicy()

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer.

        Raises:
            ShapeError: If ``head_dim`` is not a multiple of 8.
        """
        del layer_idx
        settings = self.cache_config
        keys = side == "keys"
        return E8Codec(
            CodeLayout.uniform(head_dim, settings.key_bits if keys else settings.value_bits),
            gain=settings.key_gain if keys else settings.value_gain,
            candidates=settings.scale_candidates,
            center=keys and settings.center_keys,
        )

    def make_phase(self, layer_idx: int, seen_tokens: int) -> RotaryPhase | None:
        """Return the rotary phase to take off a layer's keys, or None to code them as they are.

        Layers with the same rotation get the same object and share its tables.
        """
        if not self.cache_config.remove_rope:
            return None
        if self.model_config is None:
            if layer_idx == 0:
                _LOGGER.info("keys are coded with their rotary phase; config=model.config lets the cache remove it")
            return None
        phase = rotary_phase(self.model_config, layer_idx, seen_tokens)
        if phase is None:
            return None
        for known in self._phases:
            if known.matches(phase):
                return known
        self._phases.append(phase)
        return phase

    # The interface of transformers

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ANN401 - passed on to layers of transformers
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens of a layer and return everything it keeps, decoded, for attention.

        An error leaves the cache as it was before this forward: layers that have already taken the new tokens
        give them back (layers of transformers' own classes, as for sliding windows, cannot).
        """
        while self.model_config is None and len(self.layers) <= layer_idx:
            self.layers.append(NexusQuantLayer(self, len(self.layers)))
        layer = self.layers[layer_idx]
        if not isinstance(layer, NexusQuantLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        before = layer.seen, self.may_evict
        try:
            if layer is next(self._compressed_layers()):
                self._observe(layer, key_states)
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:
            self._roll_back(*before)
            raise

    def _compressed_layers(self) -> Iterator[NexusQuantLayer]:
        return (layer for layer in self.layers if isinstance(layer, NexusQuantLayer))

    def _observe(self, layer: NexusQuantLayer, key_states: Tensor) -> None:
        """Look at what a forward brings before any layer has changed."""
        if key_states.ndim != 4:  # noqa: PLR2004 - the layer will refuse it
            return
        if key_states.shape[2] > 1 and layer.seen == 0 and looks_padded(key_states):
            self.may_evict = False
            if self.cache_config.keep_ratio < 1:
                warnings.warn(
                    "this batch looks left-padded (equal leading keys). Evicting from a padded batch is not supported "
                    "yet, so all its tokens are kept and only quantized.",
                    stacklevel=2,
                )
        if layer.pending and key_states.shape[2] == 1:
            self._note_peak()

    def _roll_back(self, seen: int, may_evict: bool) -> None:
        """Take the tokens of an unfinished forward out of the layers that already have them."""
        self.may_evict = may_evict
        for layer in self._compressed_layers():
            layer.take_back(layer.seen - seen)

    def compress(self) -> None:
        """Compress now, instead of at the first generation step.

        The exact copies of all evicted and coded tokens are freed.  Without new prompt tokens since the last
        compression, or with too few, this does nothing.
        """
        self._note_peak()
        for layer in self._compressed_layers():
            layer.compress()

    def reset(self) -> None:
        """Forget everything seen, so that the cache can serve another prompt."""
        # transformers' own layers are made anew: those of 5.17 keep zeros where tokens were.
        fresh = self._make_layers() or self.layers
        self.layers = [
            old if isinstance(old, NexusQuantLayer) else new for old, new in zip(self.layers, fresh, strict=True)
        ]
        for layer in self._compressed_layers():
            layer.reset()
        self.may_evict = True
        self._phases = []
        self._peak_bytes = 0

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Yield decoded keys, decoded values and the sliding window of each layer."""
        for layer in self.layers:
            yield (
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
                getattr(layer, "_sliding_window_tensor", None),
            )

    # Accounting

    def _shared(self) -> list[RotaryPhase | None]:
        return [*self._phases, *(layer.phase for layer in self._compressed_layers())]

    def _note_peak(self) -> None:
        self._peak_bytes = max(
            self._peak_bytes, storage_bytes(*(_content(layer) for layer in self.layers), self._shared())
        )

    def memory_report(self) -> MemoryReport:
        """Return the bytes held, layer by layer, against a plain 16-bit cache; ``print`` shows a table."""
        self._note_peak()
        return MemoryReport(
            layers=tuple(_layer_report(index, layer) for index, layer in enumerate(self.layers)),
            shared_bytes=storage_bytes(self._shared()),
            peak_bytes=self._peak_bytes,
            preset=self.preset,
        )


def looks_padded(keys: Tensor) -> bool:
    """Tell whether any row of these first keys begins with two equal ones in every head.

    Pads share one token and one position; equal real tokens at consecutive positions differ by a rotary
    step (``cache_contract``: a single pad cannot be seen).
    """
    return bool((keys[:, :, 0] == keys[:, :, 1]).all(-1).all(-1).any())


def _content(layer: object) -> object:
    """Return what a layer stores, without its owner and the tables it shares with other layers."""
    if isinstance(layer, NexusQuantLayer):
        return layer.sinks, layer.tail, layer.body
    return vars(layer)


def _layer_report(index: int, layer: object) -> LayerReport:
    if not isinstance(layer, NexusQuantLayer):
        held = storage_bytes(_content(layer))
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        dense = sum(x.numel() * DENSE_BYTES_PER_CHANNEL for x in (keys, values) if x is not None)
        kept = 0 if keys is None or keys.ndim < 3 else keys.shape[-2]  # noqa: PLR2004 - no token axis
        seen = getattr(layer, "get_seq_length", lambda: 0)()
        return LayerReport(index, type(layer).__name__, seen, kept, held, 0, 0, dense or held)
    if layer.tail is None:
        return LayerReport(index, "compressed", 0, 0, 0, 0, 0, 0)
    keys, values = layer.tail
    channels = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
    body = layer.body
    codes = () if body is None else (body.keys.words, body.keys.scales, body.values.words, body.values.scales)
    other = () if body is None else (body.keys.transform, body.values.transform, body.positions)
    return LayerReport(
        layer_idx=index,
        kind="compressed",
        seen_tokens=layer.seen,
        kept_tokens=layer.kept,
        exact_bytes=storage_bytes(layer.sinks, layer.tail),
        code_bytes=storage_bytes(codes),
        other_bytes=storage_bytes(other),
        dense_bytes=layer.seen * channels * DENSE_BYTES_PER_CHANNEL,
    )
