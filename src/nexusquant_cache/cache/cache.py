"""`NexusQuantCache`: a transformers cache that keeps packed E8 codes in place of keys and values."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from nexusquant_cache.attention.reconstruction import reconstruct
from nexusquant_cache.cache.forward import Forward
from nexusquant_cache.cache.leaving import left_by
from nexusquant_cache.cache.report import MemoryReport, layer_report, storage_bytes
from nexusquant_cache.cache.rotary import bias_by_distance, is_self_attention, rotary_phase
from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.held import Side
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.registry import new_codec
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.errors import CacheStateError, OptionError, ShapeError, UnsupportedError, suggest
from nexusquant_cache.files.checks import settings_of
from nexusquant_cache.files.fingerprint import Besides, TokenIds, first_placeholder
from nexusquant_cache.files.ids import check_name, with_token_ids
from nexusquant_cache.files.packing import check_level
from nexusquant_cache.files.reader import check_dtype, read_file
from nexusquant_cache.files.saving import WholeCache, check_config, check_prompt, export_cache, import_cache
from nexusquant_cache.files.state import Source
from nexusquant_cache.files.writer import AtRest, Progress, check_threads, measure, write_file
from nexusquant_cache.layer.budget import compress_together, crop_together
from nexusquant_cache.layer.crop import check_sign
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.parts import Part, compressed, part_of
from nexusquant_cache.layer.shared import Shared, When
from nexusquant_cache.layer.tokens import LayerTransforms
from nexusquant_cache.policy import DEFAULT_BESIDE_WINDOWS, DEFAULT_POLICY, EvictionPolicy
from nexusquant_cache.presets import CacheConfig, preset_name, resolve_preset
from nexusquant_cache.releases import compile_inside_wrappers
from nexusquant_cache.uncompiled import pass_over_wrappers, uncompiled

_LOGGER = logging.getLogger(__name__)
_NOT_READ_AGAIN = (
    "nothing is read again: the policy of this cache does not look at a second reading (wants_reconstruction). Nor "
    "does the default policy beside layers with a sliding window, where it made answers worse (docs/decisions.md, 54)"
)
_ASKED_ONCE = frozenset({"policy", "make_policy", "make_codec", "make_phase"})
_PLACEHOLDER = re.compile(r"(image|video|vision|audio|speech)\w*_token_(id|index)$")


class NexusQuantCache(DynamicCache):
    """A KV cache that compresses itself after the prompt and stays compressed while it generates.

    Pass it to ``model.generate(**inputs, cache=NexusQuantCache(preset="balanced"))``; nothing else changes.  (Before
    5.24, transformers calls the argument ``past_key_values``.)  With ``config=model.config`` keys are coded without
    their rotary phase, and layers that are not full attention (sliding windows, linear attention) get transformers' own
    layer classes.

    One cache serves one conversation: for another prompt call `reset` or make a new one.  transformers does not
    show a cache the token ids, so a cache reused for another, longer prompt cannot be told from a
    conversation that goes on.

    What `update` returns knows its layer: the cache sees the queries, the scale and the mask of the model's attention,
    and answers it from the codes.  So any mask is obeyed, and padding is never scored.  Where attention cannot be seen
    (flash, flex, kernels of other libraries), call `nexusquant_cache.attention.enable` on the model; without it all
    tokens are kept, and a warning says so.

    Subclass it and override `make_policy` or `make_codec` for policies and codecs of your own.

    Args:
        preset: Name or alias of a preset (`PRESETS`, `ALIASES`) or a `CacheConfig`.
        config: The model's config.
        policy: Which tokens to keep; by default `DEFAULT_POLICY`, or `DEFAULT_BESIDE_WINDOWS` where other layers have
            a sliding window.
        attention_mask: Not needed: the cache sees the model's own mask.  Given the mask of the prompt, ``[batch,
            tokens]``, the prompt must have its shape.
        transforms: The `transforms` of an earlier cache of the same model, preset and config, used in place of fitting
            new ones to this prompt.  That is faster, and gives principal axes to a prompt too short for its own.
        when: ``"during_prefill"`` encodes each layer as soon as the next one is reached, so that about one layer at a
            time is in full precision; which tokens are kept is decided at the first generation step.  A prompt in one
            piece attends to itself exactly; in chunks, to the codes of the chunks before.  ``"post_prefill"`` encodes
            at the first generation step: chunks, too, attend to exact tokens, which takes the memory of a plain cache.
        offloading: Keep the codes, and exact tokens of a prompt that waits, in host memory.  A layer's codes are
            copied to the device while the layer before it computes, and let go of when its own attention is over.
        offload_only_non_sliding: Leave sliding-window layers on the device.
        **overrides: Fields of `CacheConfig` that replace those of the preset.

    Raises:
        OptionError: If the preset or an option does not exist, or a value is outside its range.
        UnsupportedError: If tokens are to be evicted and the model's attention has a bias by distance, as with ALiBi.
    """

    def __init__(  # noqa: PLR0913 - all have defaults
        self,
        preset: str | CacheConfig = "balanced",
        *,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        attention_mask: Shaped[Tensor, "rows n"] | None = None,
        transforms: Sequence[LayerTransforms | None] | None = None,
        when: When = "during_prefill",
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **overrides: Any,  # noqa: ANN401 - checked against the fields of CacheConfig
    ) -> None:
        """Make an empty cache."""
        pass_over_wrappers()
        settings = resolve_preset(preset).override(overrides)
        self.preset = "custom" if overrides else preset_name(preset)
        if when not in get_args(When):
            msg = f"unknown schedule when={when!r}. {suggest(str(when), get_args(When))}"
            raise OptionError(msg)
        self.policy = policy
        self.model_config = text_config(config)
        self.placeholder_ids = placeholder_ids(config)
        self.shared = Shared(
            settings=settings,
            when=when,
            offloading=offloading,
            make_policy=self.make_policy,
            make_codec=self.make_codec,
            make_phase=self.make_phase,
            compress_waiting=self._compress_waiting,
            given_transforms=_checked_transforms(transforms),
            mask_shape=_shape_of(attention_mask),
        )
        self._forward = Forward(self.shared, self.model_config, spares_sliding=offload_only_non_sliding)
        self._was_left = False  # said that generation goes on without it
        self._parts: list[Part] = []
        # Whether past recording was asked for before there were layers to tell.
        self._records_from_start = False
        # Cache's constructor in place of DynamicCache's, which would make layers of its own.  Nor is it told of
        # offloading: its own way would send every layer out and in whole, at each step, and needs CUDA.
        Cache.__init__(self, layers=[])
        self.offloading, self.only_non_sliding = offloading, offload_only_non_sliding
        self.layers = self._make_layers()
        if self.layers and self.shared.given_transforms and len(self.shared.given_transforms) != len(self.layers):
            msg = f"transforms are for {len(self.shared.given_transforms)} layers, this model has {len(self.layers)}"
            raise OptionError(msg)

    def _make_layers(self) -> list[Any]:
        """Return the layers that the config asks for; none without a config, they are then made on demand."""
        if self.model_config is None:
            return []
        bias = bias_by_distance(self.model_config)
        if bias is not None and self.cache_config.keep_ratio < 1:
            msg = (
                f"{self.model_config.model_type} {bias}, which no scores of tokens take into account: use the preset "
                "'quant', or keep_ratio=1.0, which only quantize."
            )
            raise UnsupportedError(msg)
        # transformers decides which layer is of which kind; only its plain full-attention layers are replaced.
        return [
            NexusQuantLayer(self.shared, index)
            if type(layer) is DynamicLayer and is_self_attention(self.model_config, index)
            else layer
            for index, layer in enumerate(DynamicCache(config=self.model_config).layers)
        ]

    def parts(self) -> list[Part]:
        """Return the layers behind one face."""
        if [id(part.layer) for part in self._parts] != list(map(id, self.layers)):
            self._parts = [part_of(layer, index) for index, layer in enumerate(self.layers)]
        return self._parts

    def reach_layer(self, layer_idx: int) -> None:
        """Make the layers up to this one, if there is no config to say how many there are.

        Raises:
            OptionError: If there is a config, and it says otherwise.
        """
        if self.model_config is not None and layer_idx >= len(self.layers):
            msg = (
                f"the config that the cache was given has {len(self.layers)} layers, and the model updates layer "
                f"{layer_idx}: give the config of this very model, config=model.config"
            )
            raise OptionError(msg)
        while self.model_config is None and len(self.layers) <= layer_idx:
            layer = NexusQuantLayer(self.shared, len(self.layers))
            if self._records_from_start:
                layer.activate_past_recording()
            self.layers.append(layer)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - any attribute
        """Let methods for policies and codecs be set on a cache, as long as nothing has been asked of them.

        Raises:
            CacheStateError: If it is too late.
            OptionError: If the policy is none.
        """
        if name == "policy" and value is not None and not isinstance(value, EvictionPolicy):
            msg = f"policy must be an EvictionPolicy instance, got {value!r}; write KeyKeyPolicy(), not KeyKeyPolicy"
            raise OptionError(msg)
        if name in _ASKED_ONCE and "_parts" in vars(self):
            if any(part.layer.is_initialized for part in compressed(self.parts())):
                msg = (
                    f"{name} is asked for at the first update, and there was one: set it before, or after cache.reset()"
                )
                raise CacheStateError(msg)
            if name != "policy":
                setattr(self.shared, name, value)
        super().__setattr__(name, value)

    @property
    def cache_config(self) -> CacheConfig:
        """How the cache spends its bytes."""
        return self.shared.settings

    # What a subclass may override

    def make_policy(self, layer_idx: int) -> EvictionPolicy:
        """Return the policy of a layer."""
        del layer_idx
        return self.policy or (DEFAULT_BESIDE_WINDOWS if any(self.is_sliding) else DEFAULT_POLICY)

    def make_codec(self, side: Side, head_dim: int, layer_idx: int) -> VectorCodec:
        """Return the codec of the keys or the values of a layer.

        Raises:
            ShapeError: If ``head_dim`` is not a multiple of 8.
        """
        del layer_idx
        settings = self.cache_config
        if settings.codec != "e8":
            return new_codec(settings.codec, head_dim)
        keys = side == "keys"
        transform = settings.transform
        if not keys and transform == "auto":
            transform = "hadamard"  # attention averages errors of values away, but not what a block without bits lacks
        return E8Codec(
            CodeLayout.flat(head_dim, settings.key_bits if keys else settings.value_bits),
            transform=transform,
            candidates=settings.scale_candidates,
            center=keys and settings.center_keys,
            impl=settings.impl,
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
        for known in self.shared.phases:
            if known.matches(phase):
                return known
        self.shared.phases.append(phase)
        return phase

    # The interface of transformers

    @uncompiled
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        compile_inside_wrappers()
        pass_over_wrappers()
        seen = super().get_seq_length(layer_idx)
        if not self._was_left:
            self._note_leaving(seen)
        return seen

    def _note_leaving(self, seen: int) -> None:
        """Warn, once, if `generate` is about to go on without this cache: the rope of Phi-3 changes with the length."""
        model = left_by(sys._getframe(2), seen)  # noqa: SLF001 - there is no other way to see who asks
        if model is None:
            return
        self._was_left = True
        limit = model.config.original_max_position_embeddings
        warnings.warn(
            f"{type(model).__name__} goes on without this cache: beyond {limit} tokens "
            "(original_max_position_embeddings) its rope changes, so it reads the text again, into a plain cache. "
            "Inside nexusquant_cache.compressed_generation(model) that one is compressed too.",
            stacklevel=2,
        )

    @uncompiled
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (seen + new tokens, 0) of a layer: the mask has a column for every token, kept or not."""
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
        """Store the new tokens of a layer and return everything it keeps, for attention.

        What is returned is answered from the codes by `scaled_dot_product_attention`, or by two products around a
        softmax; see `nexusquant_cache.states`.

        An error, or an interrupt, leaves the cache as it was before this forward: layers that have already taken the
        new tokens give them back.  Layers of transformers' own classes, as for sliding windows, cannot; then the cache
        has to be `reset`.

        Raises:
            CacheStateError: If an error in an earlier forward could not be undone, or that forward was not finished.
            UnsupportedError: If gradients are to flow to tokens that the cache holds already.
            OptionError: If the config that the cache was given is not that of the model.
        """
        try:
            self.reach_layer(layer_idx)
        except OptionError:
            self._forward.take_back(self.parts())
            raise
        given = (key_states, value_states)
        layer: Any = self.layers[layer_idx]

        def store() -> tuple[Tensor, Tensor]:
            if not layer.is_initialized:
                self._check_rope(layer_idx, key_states)
            states: tuple[Tensor, Tensor] = layer.update(*given, *args, **kwargs)
            return states

        return self._forward.update(self.parts(), layer_idx, given, store)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Store a state of a layer with linear attention."""
        self._enter_linear(layer_idx, f"convolution {args} {kwargs.get('state_idx')}")
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Store a state of a layer with linear attention."""
        self._enter_linear(layer_idx, f"recurrence {args} {kwargs.get('state_idx')}")
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def _enter_linear(self, layer_idx: int, kind: str) -> None:
        if not torch.compiler.is_compiling():
            self._forward.check()
            self._forward.enter(self.parts(), layer_idx, kind)

    def _check_rope(self, layer_idx: int, key_states: Tensor) -> None:
        """Refuse keys that are no keys of the model that the config describes.

        Raises:
            OptionError: If its rotary embedding turns more channels than they have.
        """
        config, is_ours = self.model_config, type(self).make_phase is NexusQuantCache.make_phase
        if config is None or not is_ours or not self.cache_config.remove_rope:
            return
        phase = rotary_phase(config, layer_idx, 0)
        if phase is not None and phase.rotary_dim > key_states.shape[-1]:
            msg = (
                f"the config that the cache was given ({config.model_type}) turns {phase.rotary_dim} channels of each "
                f"key, and the keys have {key_states.shape[-1]}: give the config of this very model, "
                "config=model.config"
            )
            raise OptionError(msg)

    def observe_queries(self, queries: Float[Tensor, "b q w d"], layer_idx: int) -> None:
        """Show a layer the queries of the tokens that it was given last, or of the last of them.

        Where attention is seen this happens by itself.  Some of the last queries are kept until the prompt is
        compressed, if the policy wants them; otherwise, and by layers of transformers' own classes, they are ignored.

        Args:
            queries: With their rotary phase, scaled so that ``queries @ keys.mT / head_dim**0.5`` are the logits.
            layer_idx: Index of the layer.

        Raises:
            ShapeError: If they do not fit the keys of the layer.
        """
        self.parts()[layer_idx].observe(queries)

    def activate_past_recording(self) -> None:
        """Expect a `crop` after each forward from now on, as assisted decoding gives; encode only then."""
        for part in compressed(self.parts()):
            part.encode_early(part.seen)  # the last one may still wait, and would now wait longer than the others
        self._records_from_start = not self.layers
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    @property
    def transforms(self) -> tuple[LayerTransforms | None, ...]:
        """What each layer has fitted to the prompt, for ``transforms=`` of another cache; None where nothing was."""
        return tuple(part.transforms for part in self.parts())

    def compress(self) -> None:
        """Compress now, instead of at the first generation step.

        The exact copies of all evicted and coded tokens are freed.  Without new prompt tokens since the last
        compression, or with too few, this does nothing.
        """
        self._forward.note_peak(self.parts())
        compress_together([part.layer for part in compressed(self.parts()) if part.is_pending])

    def read_again(
        self,
        model: nn.Module,
        input_ids: Int[Tensor, "b n"],
        *,
        chunk: int = 2048,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Let the model read the prompt a second time, to keep what questions still to come will need.

        For a text that many questions will be asked about.  It costs about as much as the first reading, once, and is
        done between the first reading and the first generation step::

            with torch.no_grad():
                model(text_ids, cache=cache)
            cache.read_again(model, text_ids)

        The default policy makes use of it; of your own, those do that look at `ScoreInputs.reconstruction` and say so
        (`EvictionPolicy.wants_reconstruction`).  A cache that evicts nothing has no use for it, and nothing is read.
        Nor is anything for a policy that does not look at it, such as the default beside layers with a sliding window
        (`DEFAULT_BESIDE_WINDOWS`); then a warning says so.

        Args:
            model: The model that has read the prompt.
            input_ids: The tokens of the prompt: all that the cache has seen.
            chunk: Tokens that are read at once.
            progress: Called after every chunk with the tokens read and how many there are.

        Raises:
            OptionError: If ``chunk`` is below 1, the tokens are no integers, or another model has read them.
            ShapeError: If the tokens are not as many as the cache has seen.
            CacheStateError: If the cache is empty, compressed already, or records a past, as in assisted decoding.
            UnsupportedError: If the queries of the model cannot be seen.
        """
        if not self.shared.evicts:
            return
        policies = [part.layer.state.policy for part in compressed(self.parts())]
        if not policies or any(policy is None or policy.wants_reconstruction for policy in policies):
            reconstruct(model, self, input_ids, chunk=chunk, progress=progress)
        else:
            _LOGGER.warning(_NOT_READ_AGAIN)

    def _compress_waiting(self, tokens: int) -> None:
        """Compress all layers that wait and are due before an update of so many tokens."""
        waiting = [part for part in compressed(self.parts()) if part.is_pending and part.is_due(tokens)]
        compress_together([part.layer for part in waiting])

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the ``abs(tokens_to_remove)`` newest tokens from all layers.

        Exact tokens are cut off, and codes of packed tokens dropped.

        Args:
            tokens_to_remove: 0 or a negative number.

        Raises:
            ShapeError: If the number is positive.
            UnsupportedError: If the batch is padded and the removal reaches the first tokens of a row, or what a
                sliding window would hold then is gone.
            RuntimeError: From transformers' own layers, if they cannot go back so far.
            CacheStateError: If the forward before was not finished and only part of it is to be removed, or it cannot
                be taken back.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts in tensors
        ours = list(compressed(self.parts()))
        if ours:
            check_sign(tokens_to_remove)
        if any(part.awaits_crop for part in ours):
            self._forward.note_peak(self.parts())
        end = max((part.seen for part in ours), default=0) + tokens_to_remove
        self._forward.take_back_unfinished(self.parts(), end)
        seen = max((part.seen for part in ours), default=0)
        if ours:
            tokens_to_remove = min(end - seen, 0)
        count = min(-tokens_to_remove, seen) if ours else -tokens_to_remove
        for part in self.parts():
            part.check_crop(min(count, part.seen))
        is_empty = bool(ours) and not seen
        others = [] if is_empty else [part.layer for part in self.parts() if part.state is None]
        for other in others:  # transformers' own may refuse, so they come first
            other.crop(-count)  # also by 0, which lets them drop what they had recorded
        try:
            crop_together([part.layer for part in ours], -tokens_to_remove)
        except BaseException:
            self._forward.is_broken |= bool(others) and count > 0
            raise

    def reorder_cache(self, beam_idx: Tensor | Sequence[int]) -> None:
        """Put the rows of the batch in another order, as beam search does."""
        order = beam_idx if isinstance(beam_idx, Tensor) else torch.tensor(beam_idx, device="cpu")
        self._change_rows(lambda layer: layer.reorder_cache(order))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch.

        Raises:
            ShapeError: If no row would be left.
        """
        if repeats < 1:
            msg = f"batch_repeat_interleave must leave a row, got repeats={repeats}: to empty the cache, call reset()"
            raise ShapeError(msg)
        self._change_rows(lambda layer: layer.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep these rows of the batch.

        Raises:
            ShapeError: If these are none.
        """
        chosen = indices if isinstance(indices, Tensor) else torch.tensor(indices, device="cpu")
        if not len(chosen) or (chosen.dtype == torch.bool and not bool(chosen.any())):
            msg = "batch_select_indices must leave a row, got none: to empty the cache, call cache.reset()"
            raise ShapeError(msg)
        self._change_rows(lambda layer: layer.batch_select_indices(chosen))

    def _change_rows(self, change: Callable[[Any], None]) -> None:
        """Change the rows of all layers; half-way, rows of different layers would be in different places."""
        self._forward.check()
        done = 0
        try:
            for part in self.parts():
                change(part.layer)
                done += 1
        except BaseException as error:
            self._forward.is_broken |= done > 0 or not isinstance(error, Exception)
            raise

    def reset(self) -> None:
        """Forget everything, also the shape of an attention mask that was given: the cache can serve another prompt."""
        # transformers' own layers are made anew: those of 5.17 keep zeros where tokens were.
        fresh = self._make_layers() or self.layers
        for part in self.parts():
            if part.state is None:
                self.layers[part.index] = fresh[part.index]
            else:
                part.layer.reset()
        self.shared.phases, self.shared.has_warned, self.shared.mask_shape = [], False, None
        self._forward = Forward(self.shared, self.model_config, spares_sliding=self.only_non_sliding)
        self._records_from_start = self._was_left = False

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Yield decoded keys, decoded values and the sliding window of each layer, of which a plain cache can be made.

        Raises:
            UnsupportedError: If tokens have been evicted: a plain cache would take the others for the first ones.
        """
        for part in self.parts():
            if part.state is not None and not part.state.is_whole:
                msg = (
                    f"layer {part.index} has evicted tokens, and a plain cache of the others would count them from 0. "
                    "Go on with this cache, or a copy.deepcopy of it; cache.save() writes it to a file; the preset "
                    "'quant' evicts nothing. To look at what is kept: cache.layers[i].keys"
                )
                raise UnsupportedError(msg)
            yield (
                getattr(part.layer, "keys", None),
                getattr(part.layer, "values", None),
                getattr(part.layer, "_sliding_window_tensor", None),
            )

    def __repr__(self) -> str:
        """Say in one line what it holds, and where it stands."""
        return f"{type(self).__name__}({self.memory_report().line})"

    # Host memory

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = False, **removed: object) -> None:
        """Send the cache, or one layer, to host memory, packed as it is; nothing of it stays on the device.

        Each layer comes back by itself at its next update, or when something else needs it on the device; `prefetch`
        fetches them all.  Linear-attention and indexer layers of transformers stay where they are.

        Args:
            layer_idx: The layer; all by default.
            only_non_sliding: Leave sliding-window layers on the device.
            removed: Takes ``level``, which was removed, for the error that says so.

        Raises:
            OptionError: If ``level`` is given.
            TypeError: If anything else is given.
        """
        if "level" in removed:
            msg = "offload(level=...) was removed: use save() for compressed storage, or offload() without a level"
            raise OptionError(msg)
        if removed:
            msg = f"offload() got an unexpected keyword argument {min(removed)!r}"
            raise TypeError(msg)
        for part in _leaving(self.parts(), layer_idx, only_non_sliding=only_non_sliding):
            part.offload()

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = False) -> None:
        """Bring the cache back to the device, or one layer.

        On CUDA devices the copies may still be under way, in the order of the current stream.

        Args:
            layer_idx: The layer; all by default.  Of all, an offloading cache leaves the codes and a waiting prompt in
                host memory.
            only_non_sliding: Leave sliding-window layers where they are.
        """
        for part in _leaving(self.parts(), layer_idx, only_non_sliding=only_non_sliding):
            part.prefetch(whole=layer_idx is not None)

    # At rest

    def save(  # noqa: PLR0913 - all but the path have defaults
        self,
        path: str | os.PathLike[str],
        *,
        level: int | None = 3,
        token_ids: TokenIds | None = None,
        besides: Besides | None = None,
        metadata: Mapping[str, str] | None = None,
        keep_token_ids: bool = False,
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
            token_ids: The ids of all tokens seen, ``[batch, tokens]`` or, of one row, ``[tokens]``.  The file keeps a
                hash of them, so that `load` can tell prompts apart.
            besides: What the prompt is made of besides token ids, by name: pixel values, sounds, embeddings, the name
                of an adapter, as for `PrefixStore.put`.  Of these, too, the file keeps a hash.
            metadata: Texts of your own to keep in the file, for instance the tokenizer's name.
            keep_token_ids: Keep ``token_ids`` themselves in the file too, among the metadata, so that its page can show
                the prompt (`nexusquant_cache.files.write_page`).  Whoever has the file can then read the prompt.  There
                is room for some 290,000 tokens.
            threads: Threads to compress with; by default as many as there are processors, up to eight.
            progress: Called after each tensor with the bytes done and the bytes in all.

        Returns:
            What each tensor takes in the file.

        Raises:
            OptionError: If the level or the number of threads is out of its range, the token ids are not those of all
                tokens seen, ``[batch, tokens]``, or missing with ``keep_token_ids``, or the metadata are too long or
                anything but texts.
            UnsupportedError: If something in the cache cannot be saved: codecs of classes that are not registered
                (`nexusquant_cache.register_codec`), rotations and layers of other classes, layers that
                have seen different numbers of tokens, or anything else that `load` would refuse.
            CacheStateError: If an earlier forward failed half-way through a compression.
            NonFiniteError: If an exact token, or a layer of transformers' own, holds NaN or infinity.
            OSError: If the file cannot be written, or something else than a file has its name.
        """
        check_level(level)
        check_threads(threads)
        check_name(metadata)
        if keep_token_ids:
            metadata = with_token_ids(metadata, token_ids)
        meta, tensors = export_cache(self._whole(), token_ids=token_ids, besides=besides, metadata=metadata)
        if token_ids is not None and besides is None and first_placeholder(token_ids, self.placeholder_ids) is not None:
            warnings.warn(
                "the token ids hold places of images or sounds, and the file will not tell which: name them, "
                "save(..., besides={'pixel_values': pixel_values}), and likewise for load",
                stacklevel=2,
            )
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
        besides: Besides | None = None,
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
            besides: What the prompt is made of besides them, as given to `save`.
            offloading: Keep the codes in host memory, as for the constructor.
            threads: Threads to read with; by default as many as there are processors, up to eight.
            progress: Called after each tensor with the bytes done and the bytes in all.

        Raises:
            FormatError: If the file is damaged, of another model, of a later version, of another prompt, or anything
                but a saved cache.
            OptionError: If the config or the policy is needed and not given, or no config, the dtype is none of these,
                or the number of threads is out of its range.
            OSError: If the file cannot be read.
        """
        check_dtype(dtype)
        text_config(config)
        promise, tensors = read_file(Path(path), threads=threads, progress=progress)
        check_prompt(promise.meta.tokens_hash, token_ids, besides)
        settings = settings_of(promise.meta)
        when = cast("When", promise.meta.when)
        check_config(promise.meta, config)
        cache = cls(settings, config=config, policy=policy, when=when)
        cache.shared.offloading |= offloading
        cache.offloading = cache.shared.offloading
        home = torch.empty(0, device=device or "cpu").device  # "cuda" gets an index
        if config is None:
            cache.reach_layer(len(promise.meta.layers) - 1)
        cache.preset, cache._records_from_start = promise.meta.preset, promise.meta.records_from_start
        source = Source.of(promise.meta, tensors, home, dtype)
        import_cache(cache._whole(), promise.meta, source, has_policy=cache.policy is not None)
        return cache

    def _whole(self) -> WholeCache:
        """Return what a file says of the cache.

        Raises:
            CacheStateError: If an earlier forward failed half-way through a compression.
        """
        self._forward.check()
        self._forward.check_reached(self.parts())
        report = self.memory_report()
        names = ("held_bytes", "dense_bytes", "seen_tokens", "kept_tokens", "peak_bytes")
        statistics = {name: getattr(report, name) for name in names}
        whole = (self.parts(), self.shared, self.preset, self.model_config, self._records_from_start, statistics)
        return WholeCache(*whole)

    # Accounting

    def memory_report(self, *, at_rest: bool = False) -> MemoryReport:
        """Return the bytes held, layer by layer, against a plain 16-bit cache; ``print`` shows a table.

        Args:
            at_rest: Also what `save` would write, by kind of tensor.  It is compressed for that, which takes as long.

        Raises:
            UnsupportedError: With ``at_rest``, if something in the cache cannot be saved.
            CacheStateError: With ``at_rest``, if an earlier forward failed half-way through a compression.
            NonFiniteError: With ``at_rest``, if something that `save` would refuse holds NaN or infinity.
        """
        parts = self.parts()
        self._forward.note_peak(parts)
        return MemoryReport(
            layers=tuple(layer_report(part, self.shared) for part in parts),
            shared_bytes=storage_bytes(self._forward.shared_content(parts)),
            peak_bytes=self._forward.peak_bytes,
            preset=self.preset,
            at_rest=measure(*export_cache(self._whole())) if at_rest else None,
            trouble=self._forward.trouble(parts),
        )


def text_config(config: object) -> PretrainedConfig | None:
    """Return the config of the part that writes text.

    Raises:
        OptionError: If this is no config.
    """
    if config is None or isinstance(config, PretrainedConfig):
        return None if config is None else config.get_text_config(decoder=True)
    msg = f"config must be the config of a model, got {type(config).__name__}: write config=model.config"
    raise OptionError(msg)


def _shape_of(attention_mask: object) -> tuple[int, int] | None:
    """Return the shape of the prompt's mask.

    Raises:
        OptionError: If it is no mask of a prompt.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else None
    if shape is None or len(shape) != 2:  # noqa: PLR2004 - batch, tokens
        what = type(attention_mask).__name__ if shape is None else f"shape {shape}"
        msg = f"attention_mask must be a tensor [batch, tokens] of ones and zeros, got {what}; it may be left out"
        raise OptionError(msg)
    return shape[0], shape[1]


def placeholder_ids(config: PretrainedConfig | None) -> frozenset[int]:
    """Return the token ids that stand for images, sounds and the like, as far as a config names them.

    Raises:
        OptionError: If it is no config.
    """
    text_config(config)
    found: set[int] = set()
    waiting: list[Mapping[str, Any]] = [] if config is None else [config.to_dict()]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, int) and _PLACEHOLDER.search(str(name)):
                found.add(value)
    return frozenset(found)


def _leaving(parts: list[Part], layer_idx: int | None, *, only_non_sliding: bool) -> list[Part]:
    """Return the layers, or the one layer, that may be in host memory."""
    chosen = parts if layer_idx is None else [parts[layer_idx]]
    return [part for part in chosen if part.may_leave and not (only_non_sliding and part.layer.is_sliding)]


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
