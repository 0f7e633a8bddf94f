"""`NexusQuantCache`: a transformers cache that keeps packed E8 codes in place of keys and values."""

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from nexusquant_cache.cache.report import DENSE_BYTES_PER_CHANNEL, LayerReport, MemoryReport, storage_bytes
from nexusquant_cache.cache.rotary import counts_kept_tokens, rotary_phase
from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.held import Side
from nexusquant_cache.codec.layout import MAX_BITS, CodeLayout
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.errors import CacheStateError, OptionError, UnsupportedError, suggest
from nexusquant_cache.files.checks import settings_of
from nexusquant_cache.files.fingerprint import TokenIds
from nexusquant_cache.files.packing import check_level
from nexusquant_cache.files.reader import check_dtype, read_file
from nexusquant_cache.files.saving import check_config, check_tokens, export_cache, import_cache
from nexusquant_cache.files.writer import AtRest, Progress, check_threads, measure, write_file
from nexusquant_cache.layer.host import HOST, to_device, to_host
from nexusquant_cache.layer.layer import NexusQuantLayer, When
from nexusquant_cache.layer.padding import BatchPadding, leading_pads
from nexusquant_cache.layer.tokens import LayerTransforms
from nexusquant_cache.policy import DEFAULT_POLICY, EvictionPolicy
from nexusquant_cache.presets import CacheConfig, resolve_preset
from nexusquant_cache.releases import compile_inside_wrappers
from nexusquant_cache.uncompiled import uncompiled

_LOGGER = logging.getLogger(__name__)
# Bits per channel at equal error: the upper end of what `benchmarks/transforms.py` finds; no prompt is to be worse off.
_AXES_SAVE: dict[Side, float] = {"keys": 0.95, "values": 0.4}


class NexusQuantCache(DynamicCache):
    """A KV cache that compresses itself after the prompt and stays compressed while it generates.

    Pass it to ``model.generate(**inputs, cache=NexusQuantCache(preset="balanced"))``; nothing else changes.  (Before
    5.24, transformers calls the argument ``past_key_values``.)  With ``config=model.config`` keys are coded without
    their rotary phase, and layers that are not full attention (sliding windows, linear attention) get transformers' own
    layer classes.

    One cache serves one conversation: for another prompt call `reset` or make a new one.  transformers does not
    show a cache the token ids, so a cache reused for another, longer prompt cannot be told from a
    conversation that goes on.

    In a left-padded batch every row is treated as if it began at its first real token.  transformers does not show
    a cache the attention mask either: give it as ``attention_mask``, or else padding is recognised where two
    leading keys of a row are equal.  A batch in which it cannot be told is coded and nothing is evicted from
    it, with a warning.

    Subclass it and override `make_policy` or `make_codec` for policies and codecs of your own.

    Args:
        preset: Name of a preset (`PRESETS`) or a `CacheConfig`.
        config: The model's config.
        policy: Which tokens to keep; `DEFAULT_POLICY` by default.
        attention_mask: The mask of the prompt, ``[batch, tokens]``, 1 for text and 0 for padding on the left.
        transforms: The `transforms` of an earlier cache of the same model, preset and config, to be used in place of
            fitting new ones to this prompt: encoding is faster, and a prompt too short to pay for its own has some.
        when: ``"post_prefill"`` compresses at the first generation step, so that the whole prompt attends to itself
            exactly; ``"during_prefill"`` compresses each layer as soon as the next one is reached, so that about
            one layer at a time is held in full precision.  A prompt in one piece still attends to itself exactly;
            with ``prefill_chunk_size`` each chunk attends to what is left of the ones before.
        offloading: Keep the codes, and a prompt that waits for its compression, in host memory.  A layer's codes are
            copied to the device while the layer before it computes, and let go of when its own attention is over.
        offload_only_non_sliding: Leave sliding-window layers on the device.
        **overrides: Fields of `CacheConfig` that replace those of the preset.

    Raises:
        OptionError: If the preset or an option does not exist, or a value is outside its range.
        UnsupportedError: If tokens are to be evicted and the model tells their distance by counting the kept ones.
    """

    def __init__(  # noqa: PLR0913 - all have defaults
        self,
        preset: str | CacheConfig = "balanced",
        *,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        attention_mask: Shaped[Tensor, "rows n"] | None = None,
        transforms: Sequence[LayerTransforms | None] | None = None,
        when: When = "post_prefill",
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **overrides: Any,  # noqa: ANN401 - checked against the fields of CacheConfig
    ) -> None:
        """Make an empty cache."""
        self.cache_config = resolve_preset(preset).override(overrides)
        self.preset = preset if isinstance(preset, str) and not overrides else "custom"
        given: object = policy  # whatever the annotation says
        if given is not None and not isinstance(given, EvictionPolicy):
            msg = f"policy must be an EvictionPolicy instance, got {given!r}; write KeyKeyPolicy(), not KeyKeyPolicy"
            raise OptionError(msg)
        if when not in get_args(When):
            msg = f"unknown schedule when={when!r}. {suggest(str(when), get_args(When))}"
            raise OptionError(msg)
        self.policy = policy
        self._given_transforms = _checked_transforms(transforms)
        self.when: When = when
        self.model_config = None if config is None else config.get_text_config(decoder=True)
        self.padding = BatchPadding(None if attention_mask is None else leading_pads(attention_mask))
        self._forget()
        # Cache's constructor in place of DynamicCache's, which would make layers of its own.  Nor is it told of
        # offloading: its own way would send every layer out and in whole, at each step, and needs CUDA.
        Cache.__init__(self, layers=[])
        self.offloading, self.only_non_sliding = offloading, offload_only_non_sliding
        self.layers = self._make_layers()
        if self.layers and self._given_transforms and len(self._given_transforms) != len(self.layers):
            msg = f"transforms are for {len(self._given_transforms)} layers, this model has {len(self.layers)}"
            raise OptionError(msg)

    def _forget(self) -> None:
        """Start a new prompt, as far as the cache itself remembers anything."""
        self._padding_before = copy.copy(self.padding)
        self._phases: list[RotaryPhase] = []
        self._peak_bytes = 0
        self._has_warned = False
        self._is_broken = False
        # Whether past recording was asked for before there were layers to tell.
        self._records_from_start = False

    def _make_layers(self) -> list[Any]:
        """Return the layers that the config asks for; none without a config, they are then made on demand."""
        if self.model_config is None:
            if self.cache_config.protect_boundary:
                msg = "protect_boundary counts layers from the model's end and needs config=model.config"
                raise OptionError(msg)
            return []
        counts = counts_kept_tokens(self.model_config)
        if counts is not None and self.cache_config.keep_ratio < 1:
            msg = (
                f"{self.model_config.model_type} {counts} and counts in kept tokens, so evicting would move others: "
                "use the preset 'quant', or keep_ratio=1.0, which only quantize."
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
        return self.policy or DEFAULT_POLICY

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer.

        Raises:
            ShapeError: If ``head_dim`` is not a multiple of 8.
        """
        settings = self.cache_config
        keys = side == "keys"
        bits = settings.key_bits if keys else settings.value_bits
        return E8Codec(
            CodeLayout.flat(head_dim, MAX_BITS if self._is_protected(layer_idx) else bits),
            transform=settings.transform,
            axes_save=_AXES_SAVE[side],
            gain=settings.key_gain if keys else settings.value_gain,
            candidates=settings.scale_candidates,
            center=keys and settings.center_keys,
            impl=settings.impl,
        )

    def _is_protected(self, layer_idx: int) -> bool:
        """Tell whether a layer is so near the beginning or the end of the model that it gets all bits."""
        count = self.cache_config.protect_boundary
        return count > 0 and not count <= layer_idx < len(self.layers) - count

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

    @uncompiled
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        compile_inside_wrappers()
        return super().get_seq_length(layer_idx)

    @uncompiled
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (kept + new tokens, evicted tokens) of a layer, as they will be after the next update."""
        return super().get_mask_sizes(query_length, layer_idx)

    @uncompiled
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

        Raises:
            CacheStateError: If an earlier forward failed when part of the layers had already been compressed, which
                only ``when="during_prefill"`` can bring about.
        """
        if self._is_broken:
            msg = "an earlier forward failed half-way through a compression: call cache.reset() or use a new cache"
            raise CacheStateError(msg)
        while self.model_config is None and len(self.layers) <= layer_idx:
            self._add_layer()
        layer: Any = self.layers[layer_idx]
        is_ours = isinstance(layer, NexusQuantLayer)
        before = layer.seen if is_ours else 0
        try:
            if layer_idx == self._first_attention_layer():
                self._observe(layer, key_states, value_states)
            if is_ours:
                self._before_update(layer, key_states)
            held = self._update_layer(layer_idx, key_states, value_states, *args, **kwargs)
        except Exception:
            if is_ours:
                self._roll_back(before)
            raise
        if self.when == "during_prefill" and key_states.shape[-2] > 1:
            self._note_peak()
        return held

    def _update_layer(
        self,
        layer_idx: int,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401 - passed on to layers of transformers
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Update a layer when it is on its device, with the next one on the way there."""
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, NexusQuantLayer) and _may_leave(layer):
            _fetch_stock(layer)  # also without offloading: `offload` may have been called
        if not self.offloading:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        try:
            self._prefetch_after(layer_idx)
            held: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        finally:
            if self._is_offloading(layer):
                _release(layer)
        return held

    def _prefetch_after(self, layer_idx: int) -> None:
        """Start to fetch the next layer of ours, after the last one the first."""
        order = (*self.layers[layer_idx + 1 :], *self.layers[:layer_idx])
        following = next((layer for layer in order if isinstance(layer, NexusQuantLayer)), None)
        if following is not None:
            following.prefetch_beside()

    def _is_offloading(self, layer: object) -> bool:
        """Tell whether a layer is kept in host memory between its updates."""
        is_spared = self.only_non_sliding and getattr(layer, "is_sliding", False)
        return self.offloading and _may_leave(layer) and not is_spared

    def observe_queries(self, queries: Float[Tensor, "b q w d"], layer_idx: int) -> None:
        """Show a layer the queries of the tokens that it was given last, or of the last of them.

        `nexusquant_cache.attention.enable` makes the model do this.  Up to 64 queries are kept until the prompt is
        compressed, if the policy wants them; otherwise, and by layers of transformers' own classes, they are ignored.

        Args:
            queries: With their rotary phase, scaled so that ``queries @ keys.mT / head_dim**0.5`` are the logits.
            layer_idx: Index of the layer.

        Raises:
            ShapeError: If they do not fit the keys of the layer.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, NexusQuantLayer):
            layer.observe_queries(queries)

    def _add_layer(self) -> None:
        layer = NexusQuantLayer(self, len(self.layers))
        if self._records_from_start:
            layer.activate_past_recording()
        self.layers.append(layer)

    def activate_past_recording(self) -> None:
        """Expect a `crop` after each forward from now on, as assisted decoding gives; encode only then."""
        for layer in self._compressed_layers():
            layer.compress_early()  # the last one may still wait, and would now wait longer than the others
        self._records_from_start = not self.layers
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    def _compressed_layers(self) -> Iterator[NexusQuantLayer]:
        return (layer for layer in self.layers if isinstance(layer, NexusQuantLayer))

    def _first_attention_layer(self) -> int:
        return next((index for index, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)), 0)

    def _observe(self, layer: Any, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ANN401 - any attention layer
        """Look at what a forward brings before any layer has changed."""
        self._padding_before = copy.copy(self.padding)
        if key_states.ndim != 4 or key_states.shape[:3] != value_states.shape[:3] or key_states.shape[2] == 0:  # noqa: PLR2004
            return  # the layer will refuse it
        if not key_states.is_floating_point() or not value_states.is_floating_point():
            return
        seen = layer.get_seq_length()
        if self.padding.settled_at is None:
            self.padding.observe(key_states, value_states, seen, self._position_shows())
        elif key_states.shape[2] > 1 and self.padding.is_settled(seen) and self._position_shows_in_turns():
            evicted = max((each.seen - each.kept for each in self._compressed_layers()), default=0)
            self.padding.observe_turn(key_states, value_states, evicted)

    def _position_shows(self) -> bool:
        """Tell whether equal tokens at different positions differ at the first attention layer.

        Without a config they are taken to, as in all rotary models.
        """
        if self.model_config is None or getattr(self.model_config, "kv_lora_rank", None):
            return True
        return rotary_phase(self.model_config, self._first_attention_layer(), 0) is not None

    def _position_shows_in_turns(self) -> bool:
        """Tell the same of tokens inside a text, where images may stand: like patches side by side look alike."""
        parameters = getattr(self.model_config, "rope_parameters", None) or {}
        return parameters.get("mrope_section") is None and self._position_shows()

    def _before_update(self, layer: NexusQuantLayer, key_states: Tensor) -> None:
        """Make what has to happen outside a layer before it takes new tokens."""
        tokens = key_states.shape[-2] if key_states.ndim > 1 else 0
        if self.when == "during_prefill" and tokens > 1:
            # Layers before have had the tokens of this forward; the last one may still wait from the forward before.
            for other in self._compressed_layers():
                if other is not layer:
                    other.compress_early()
        if layer.pending and layer.is_due(tokens) and layer is next(self._compressed_layers()):
            self._note_peak()

    @property
    def transforms(self) -> tuple[LayerTransforms | None, ...]:
        """What each layer has fitted to the prompt, for ``transforms=`` of another cache; None where nothing was."""
        return tuple(layer.transforms if isinstance(layer, NexusQuantLayer) else None for layer in self.layers)

    def given_transforms(self, layer_idx: int) -> LayerTransforms | None:
        """Return the transforms that a layer shall use in place of fitting its own, if there are any."""
        return self._given_transforms[layer_idx] if layer_idx < len(self._given_transforms) else None

    def warn_code_error(self, layer_idx: int, error: float) -> None:
        """Say that coding a layer changes what attention reads beyond what is allowed."""
        warnings.warn(
            f"coding the prompt moves the attention output of layer {layer_idx} by {100 * error:.0f} % of its length, "
            f"also at the most bits its codec has; {100 * self.cache_config.most_code_error:.0f} % are allowed "
            "(most_code_error). Check the answers against a plain cache, or leave this model uncompressed.",
            stacklevel=2,
        )

    def warn_kept_whole(self) -> None:
        """Say, once for each prompt, that tokens are kept since it is not known which of them are padding."""
        if self._has_warned or self.padding.stated is not None:  # a stated row may be all padding so far
            return
        self._has_warned = True
        warnings.warn(
            "it cannot be told which tokens of this batch are padding, so all of them are kept and only quantized. "
            "Give the cache the mask: NexusQuantCache(..., attention_mask=inputs['attention_mask']).",
            stacklevel=2,
        )

    def _roll_back(self, seen: int) -> None:
        """Take the tokens of an unfinished forward out of the layers that already have them."""
        self.padding = self._padding_before
        for layer in self._compressed_layers():
            count = layer.seen - seen
            if seen == 0:
                is_recording = layer.record_past
                layer.reset()
                if is_recording:
                    layer.activate_past_recording()
            elif count > layer.tail_tokens:
                self._is_broken = True  # compressed early, together with tokens that were there before
            else:
                layer.take_back(count)

    def set_attention_mask(self, attention_mask: Shaped[Tensor, "rows n"]) -> None:
        """State the padding of the batch; the same as the constructor's ``attention_mask``.

        Raises:
            OptionError: If a row is not zeros, then ones.
            ShapeError: If the mask does not fit the batch.
            CacheStateError: If tokens have been compressed already and the mask says otherwise than was known.
        """
        pads = leading_pads(attention_mask)
        first = next((layer for layer in self._compressed_layers() if layer.is_initialized), None)
        if first is None or first.tail is None:
            self.padding.take_stated(pads, None)
            return
        new = BatchPadding()
        new.take_stated(pads, first.tail[0].shape[0])
        if any(layer.body is not None for layer in self._compressed_layers()):
            known = self.padding.pads
            # None stands for no padding in both.
            if (None if known is None else known.tolist()) != (None if new.pads is None else new.pads.tolist()):
                msg = (
                    "the mask says otherwise than was known when tokens were compressed. Give it before the first "
                    "generation step, or call cache.reset()."
                )
                raise CacheStateError(msg)
            return
        self.padding = new

    @property
    def may_evict(self) -> bool:
        """Whether the padding of the batch is known, so that tokens may be evicted."""
        return self.padding.certain

    def compress(self) -> None:
        """Compress now, instead of at the first generation step.

        The exact copies of all evicted and coded tokens are freed.  Without new prompt tokens since the last
        compression, or with too few, this does nothing.
        """
        self._note_peak()
        for layer in self._compressed_layers():
            layer.compress()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the ``abs(tokens_to_remove)`` newest tokens from all layers.

        Exact tokens are cut off; of packed tokens the codes are dropped.  Where tokens had been evicted, heads may have
        kept different numbers of those that remain; transformers' mask wants equal ones, so each head then
        keeps as many of its newest as the head with the fewest has, and a warning says so.

        Args:
            tokens_to_remove: 0 or a negative number.

        Raises:
            ShapeError: If the number is positive.
            UnsupportedError: If the batch is padded and the removal reaches the first tokens of a row.
            RuntimeError: From transformers' own layers, if they cannot go back so far.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts in tensors
        ours = list(self._compressed_layers())
        count = min(-tokens_to_remove, ours[0].seen) if ours else -tokens_to_remove
        for layer in ours:
            layer.check_crop(count)
        others: list[Any] = [layer for layer in self.layers if not isinstance(layer, NexusQuantLayer)]
        is_empty = bool(ours) and ours[0].seen == 0
        for other in () if is_empty else others:  # transformers' own may refuse, so they come first
            other.crop(-count)  # also by 0, which lets them drop what they had recorded
        if len({layer.pending for layer in ours}) > 1:
            for layer in ours:
                layer.compress_early()  # the last one still waits: all alike, before tokens go
        counts = [kept for layer in ours if (kept := layer.kept_before(count)) is not None]
        least = min((int(kept.min()) for kept in counts), default=None)
        most = max((int(kept.max()) for kept in counts), default=None)
        if ours and count > 0:
            self.padding.crop(ours[0].seen - count)
        for layer in ours:
            layer.crop(tokens_to_remove, least)
        if least != most:
            warnings.warn(
                "the prompt was cut where tokens had been evicted: to leave equally many, heads keep their newest "
                f"{least} packed tokens and lose up to {(most or 0) - (least or 0)} others.",
                stacklevel=2,
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows of the batch in another order, as beam search does."""
        self._map_padding(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # any index will do

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._map_padding(lambda x: x.repeat_interleave(repeats, dim=0))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._map_padding(lambda x: x[indices.to(x.device), ...])
        super().batch_select_indices(indices)

    def _map_padding(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length() > 0:
            self.padding.map(function)

    def reset(self) -> None:
        """Forget everything seen, the attention mask too, so that the cache can serve another prompt."""
        # transformers' own layers are made anew: those of 5.17 keep zeros where tokens were.
        fresh = self._make_layers() or self.layers
        self.layers = [
            old if isinstance(old, NexusQuantLayer) else new for old, new in zip(self.layers, fresh, strict=True)
        ]
        for layer in self._compressed_layers():
            layer.reset()
        self.padding = BatchPadding()
        self._forget()

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Yield decoded keys, decoded values and the sliding window of each layer."""
        for layer in self.layers:
            yield (
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
                getattr(layer, "_sliding_window_tensor", None),
            )

    # Host memory

    def offload(
        self, layer_idx: int | None = None, only_non_sliding: bool = False, *, level: int | None = None
    ) -> None:
        """Send the cache, or one layer, to host memory, packed as it is; the device has nothing of it then.

        Each layer comes back by itself at its next update, or when something else needs it on the device; `prefetch`
        fetches them all.  Linear-attention and indexer layers of transformers stay where they are.

        Args:
            layer_idx: The layer; all by default.
            only_non_sliding: Leave sliding-window layers on the device.
            level: Also compress tokens and codes, as in a file, with this level of zstd, 1 (fast) to 22 (small).

        Raises:
            OptionError: If there is no such level.
        """
        check_level(level)
        leaving = self._which_may_leave(layer_idx, only_non_sliding=only_non_sliding)
        ours = [layer for layer in leaving if isinstance(layer, NexusQuantLayer)]
        for layer in leaving:
            if not isinstance(layer, NexusQuantLayer):
                _send_stock(layer)
            elif level is None or layer.frozen is None:
                layer.offload()
        if level is not None:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                list(pool.map(lambda layer: layer.freeze(level), ours))

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = False) -> None:
        """Bring the cache back to the device, or one layer.

        On CUDA devices the copies may still be under way, in the order of the current stream.

        Args:
            layer_idx: The layer; by default all, of which an offloading cache leaves codes and a waiting prompt in host
                memory.
            only_non_sliding: Leave sliding-window layers where they are.
        """
        for layer in self._which_may_leave(layer_idx, only_non_sliding=only_non_sliding):
            if not isinstance(layer, NexusQuantLayer):
                _fetch_stock(layer)
            elif layer_idx is None:
                layer.unpark()
            else:
                layer.prefetch()

    def _which_may_leave(self, layer_idx: int | None, *, only_non_sliding: bool) -> list[Any]:
        chosen: list[Any] = self.layers if layer_idx is None else [self.layers[layer_idx]]
        return [layer for layer in chosen if _may_leave(layer) and not (only_non_sliding and layer.is_sliding)]

    # At rest

    def save(  # noqa: PLR0913 - all but the path have defaults
        self,
        path: str | os.PathLike[str],
        *,
        level: int | None = 3,
        token_ids: TokenIds | None = None,
        metadata: Mapping[str, str] | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> AtRest:
        """Write the cache to a file, from which `load` makes one that goes on bit for bit where this one stands.

        The file is written beside ``path`` and takes its name when it is complete and on the disk: whatever happens
        before that leaves an older file as it was.  The cache is not changed; it must not be used meanwhile.

        Args:
            path: Where to; an older file is replaced, and its permissions are kept.  Of a symbolic link, what it points
                to is replaced.
            level: Of zstd, 1 (fast) to 22 (small); None stores all tensors as they are, for any reader of safetensors.
            token_ids: The ids of the tokens seen, of which the file keeps a hash, so that `load` can tell prompts
                apart.
            metadata: Texts of your own to keep in the file, for instance the tokenizer's name.
            threads: Threads to compress with; by default as many as there are processors, up to eight.
            progress: Called after each tensor with the bytes done and the bytes in all.

        Returns:
            What each tensor takes in the file.

        Raises:
            OptionError: If the level or the number of threads is none, the token ids are not ``[batch, tokens]``, or
                the metadata are no texts or too long.
            UnsupportedError: If something in the cache cannot be saved: codecs of classes that are not registered
                (`nexusquant_cache.files.register_codec`), rotations and layers of other classes, layers that
                have seen different numbers of tokens, or anything else that `load` would refuse.
            CacheStateError: If an earlier forward failed half-way through a compression.
            NonFiniteError: If an exact token, or a layer of transformers' own, holds NaN or infinity.
            OSError: If the file cannot be written, or something else than a file has its name.
        """
        check_level(level)
        check_threads(threads)
        meta, tensors = export_cache(self, token_ids=token_ids, metadata=metadata)
        return write_file(Path(path), meta, tensors, level=level, threads=threads, progress=progress)

    @classmethod
    def load(  # noqa: PLR0913 - all but the path have defaults
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        dtype: torch.dtype | None = None,
        token_ids: TokenIds | None = None,
        offloading: bool = False,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> "NexusQuantCache":
        """Return the cache that a file holds.

        Everything in the file is checked before it is believed, and no more memory is taken than the file can fill.

        Args:
            path: The file.
            device: Where the cache shall be; the CPU by default.
            config: The model's config, with which it is checked that the file belongs to the model.  It is needed if
                the model has layers that are not compressed, or if the prompt was not compressed yet.
            policy: The policy of the cache that was saved, if it was given one and can still evict tokens.
            dtype: What tokens in full precision are cast to, for a model that runs in another dtype: ``torch.float16``,
                ``bfloat16``, ``float32`` or ``float64``.
            token_ids: The ids of the tokens that the cache is to have seen, as given to `save`.
            offloading: Keep the codes in host memory, as for the constructor.
            threads: Threads to read with; by default as many as there are processors, up to eight.
            progress: Called after each tensor with the bytes done and the bytes in all.

        Raises:
            FormatError: If the file is damaged, of another model, of a later version, of another prompt, or anything
                but a saved cache.
            OptionError: If the config or the policy is needed and not given, the dtype is not one for tokens, or the
                number of threads is none.
            OSError: If the file cannot be read.
        """
        check_dtype(dtype)
        promise, tensors = read_file(Path(path), threads=threads, progress=progress)
        check_tokens(promise.meta.tokens_hash, token_ids)
        settings = settings_of(promise.meta)
        when = cast("When", promise.meta.when)
        check_config(promise.meta, config)
        cache = cls(settings, config=config, policy=policy, when=when)
        cache.offloading |= offloading
        home = torch.empty(0, device=device or "cpu").device  # "cuda" gets an index
        import_cache(cache, promise.meta, tensors, home, dtype)
        return cache

    def layer_for_file(self, index: int) -> object:
        """Return the empty layer that takes the place ``index`` of a file, made now if there is no config."""
        while self.model_config is None and len(self.layers) <= index:
            self._add_layer()
        return self.layers[index]

    # Accounting

    def _shared(self) -> list[object]:
        return [
            self.padding,
            self._padding_before,
            *self._phases,
            *(layer.phase for layer in self._compressed_layers()),
        ]

    def _note_peak(self) -> None:
        self._peak_bytes = max(
            self._peak_bytes, storage_bytes(*(_content(layer) for layer in self.layers), self._shared())
        )

    def memory_report(self, *, at_rest: bool = False) -> MemoryReport:
        """Return the bytes held, layer by layer, against a plain 16-bit cache; ``print`` shows a table.

        Args:
            at_rest: Also what `save` would write, by kind of tensor.  It is compressed for that, which takes as long.

        Raises:
            UnsupportedError: If that is wanted, and something in the cache cannot be saved.
        """
        self._note_peak()
        return MemoryReport(
            layers=tuple(_layer_report(index, layer) for index, layer in enumerate(self.layers)),
            shared_bytes=storage_bytes(self._shared()),
            peak_bytes=self._peak_bytes,
            preset=self.preset,
            at_rest=measure(*export_cache(self)) if at_rest else None,
        )


def _checked_transforms(transforms: object) -> tuple[LayerTransforms | None, ...]:
    """Return the transforms given, one for each layer.

    Raises:
        OptionError: If they are anything else.
    """
    if transforms is None:
        return ()
    if not isinstance(transforms, Sequence) or not all(isinstance(x, LayerTransforms | None) for x in transforms):
        msg = f"transforms must be the transforms of another cache, cache.transforms; got {type(transforms).__name__}"
        raise OptionError(msg)
    return tuple(transforms)


def _may_leave(layer: object) -> bool:
    """Tell whether a layer may be in host memory between its updates.

    Others of transformers have states that are used without an update, and would not come back in time.
    """
    if isinstance(layer, NexusQuantLayer):
        return True
    waits = isinstance(layer, LinearAttentionCacheLayerMixin) or hasattr(layer, "update_indexer")
    return isinstance(layer, DynamicLayer) and not waits


def _release(layer: Any) -> None:  # noqa: ANN401 - any layer that may leave
    """Keep in host memory what an offloading cache keeps there."""
    if isinstance(layer, NexusQuantLayer):
        layer.release()
    else:
        _send_stock(layer)


def _send_stock(layer: DynamicLayer) -> None:
    """Move a layer of transformers to host memory, where it is complete when this returns."""
    if layer.is_initialized and layer.keys is not None and layer.values is not None:
        layer.keys, layer.values = to_host(layer.keys), to_host(layer.values)


def _fetch_stock(layer: DynamicLayer) -> None:
    """Move a layer of transformers back to its device."""
    if layer.is_initialized and layer.keys is not None and layer.values is not None:
        layer.keys, layer.values = to_device(layer.keys, layer.device), to_device(layer.values, layer.device)


def _content(layer: object) -> object:
    """Return what a layer stores, without its owner and the tables it shares with other layers."""
    if isinstance(layer, NexusQuantLayer):
        return layer.sinks, layer.tail, layer.body, layer.sink_place, layer.observed, layer.frozen
    return vars(layer)


def _layer_report(index: int, layer: object) -> LayerReport:
    if not isinstance(layer, NexusQuantLayer):
        held = storage_bytes(_content(layer))
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        dense = sum(x.numel() * DENSE_BYTES_PER_CHANNEL for x in (keys, values) if x is not None)
        kept = 0 if keys is None or keys.ndim < 3 else keys.shape[-2]  # noqa: PLR2004 - no token axis
        seen = getattr(layer, "get_seq_length", lambda: 0)()
        host = 0 if getattr(layer, "device", HOST) == HOST else storage_bytes(keys, values, only=HOST)
        return LayerReport(index, type(layer).__name__, seen, kept, held, 0, 0, dense or held, host_bytes=host)
    if layer.tail is None:
        return LayerReport(index, "compressed", 0, 0, 0, 0, 0, 0)
    keys, values = layer.tail
    channels = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
    body, (frozen_exact, frozen_codes) = layer.body, layer.frozen or ((), ())
    exact = layer.sinks, layer.tail, layer.observed, frozen_exact
    codes = () if body is None else body.buffers, frozen_codes
    other = () if body is None else (body.keys.transform, body.values.transform, body.positions, layer.sink_place)
    host = storage_bytes(frozen_exact, frozen_codes)
    if layer.device != HOST:
        # Without what is always there: plans and the places of sinks.
        reference = () if body is None else (body.keys.transform.reference,)
        host = storage_bytes(exact, codes, only=HOST)
        host += storage_bytes(other) if storage_bytes(reference, only=HOST) else 0
    return LayerReport(
        layer_idx=index,
        kind="compressed",
        seen_tokens=layer.seen,
        kept_tokens=layer.kept,
        exact_bytes=storage_bytes(exact),
        code_bytes=storage_bytes(codes),
        other_bytes=storage_bytes(other),
        dense_bytes=layer.seen * channels * DENSE_BYTES_PER_CHANNEL,
        code_error=layer.code_error,
        host_bytes=host,
    )
