"""A model that answers messages through compressed caches."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.presets import CacheConfig, preset_name
from nexusquant_cache.releases import CACHE
from nexusquant_cache.serving.answer_text import AnswerText
from nexusquant_cache.serving.conversation import Conversation, Place
from nexusquant_cache.serving.errors import ServingError, TemplateError

Message = Mapping[str, str]
"""``role`` and ``content``, as chat templates take them."""

_COLDEST = 1e-4  # below this temperature the most likely token wins, and numbers would overflow
_PIECE = 512  # tokens read at once; between two pieces one may stop


@dataclass(frozen=True)
class Wish:
    """How an answer shall be.

    Attributes:
        tokens: The most tokens.
        temperature: 0 takes the most likely token each time.
        top_p: Tokens that are less likely than those which together have this probability are left out.
        seed: The same seed, conversation and wish give the same answer; None: another one each time.
        stop: Texts at which it ends.
    """

    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What has become of a prompt.

    Attributes:
        known_tokens: Tokens of the prompt that the cache knew.
        tokens: Tokens generated, with the one that ends the answer.
        ended: ``"stop"`` if the model or a stop string has ended it, ``"length"`` if it took all tokens it might,
            ``"left"`` if it was stopped from outside.
    """

    known_tokens: int
    tokens: int
    ended: str


class Listener:
    """What follows an answer; this one lets everything pass."""

    def read(self, done: int, total: int) -> None:
        """Hear how many of the prompt's unknown tokens have been read."""

    def say(self, text: str) -> None:
        """Hear the next piece of the answer."""

    @property
    def wants_no_more(self) -> bool:
        """Whether to stop."""
        return False


class ChatModel:
    """A model with its tokenizer, and a preset for the caches that it answers through.

    One thread at a time may use it, except for `tokenize`.

    Args:
        loaded: The model.
        preset: As for `NexusQuantCache`.

    Raises:
        ServingError: If the model has no chat template.
        OptionError: If there is no such preset.
    """

    def __init__(self, loaded: LoadedModel, preset: str | CacheConfig = "balanced") -> None:
        """Check that the model can chat."""
        if not loaded.tokenizer.chat_template:
            msg = f"{loaded.name} has no chat template: take a model that was trained to follow instructions"
            raise ServingError(msg)
        self.name, self.model, self.tokenizer = loaded.name, loaded.model, loaded.tokenizer
        self.preset = preset if isinstance(preset, CacheConfig) else preset_name(preset)

    @property
    def most_tokens(self) -> int | None:
        """How many tokens the model was made for, as its config says; None if it does not."""
        most = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else None

    def new_conversation(self) -> Conversation:
        """Return an empty one."""
        # Read in pieces, a prompt attends to exact tokens, and a reader who leaves can be taken back without a trace.
        return Conversation(NexusQuantCache(self.preset, config=self.model.config, when="post_prefill"))

    def tokenize(self, messages: Sequence[Message], *, asks: bool = True) -> Int[Tensor, " n"]:
        """Return the ids of messages in the model's chat template.

        Args:
            messages: Of all turns.
            asks: Whether an answer is to follow.

        Raises:
            TemplateError: If the template refuses them: not every one takes every order of roles.
        """
        turns = [dict(message) for message in messages]
        render: Any = self.tokenizer.apply_chat_template
        try:
            ids = render(turns, add_generation_prompt=asks, tokenize=True, return_dict=False)
        except jinja2.TemplateError as error:
            msg = f"the chat template of {self.name} refuses these messages: {error}"
            raise TemplateError(msg) from error
        return torch.tensor(ids, dtype=torch.long)

    def answer(self, conversation: Conversation, prompt: Int[Tensor, " n"], wish: Wish, listener: Listener) -> Answer:
        """Answer a prompt, which goes on with a conversation or begins it anew.

        Whatever happens, the conversation fits its cache afterwards.  If the answer was stopped while the prompt was
        being read, or fails, the conversation ends with what the prompt shares with it; if that is impossible, it is
        empty.

        Args:
            conversation: Where the cache is.
            prompt: Ids of all turns so far.
            wish: How the answer shall be.
            listener: Who hears it.
        """
        place = conversation.begin(prompt)
        try:
            if not self._read(conversation, prompt, listener):
                _go_back(conversation, place)
                return Answer(place.tokens, 0, "left")
            hearing = _Hearing(AnswerText(self.tokenizer, wish.stop), listener)
            tokens = self._generate(conversation.cache, prompt, wish, hearing)
            conversation.cache.compress()  # after an answer of one token the prompt would wait as it is
            conversation.settle(tokens, len(prompt))
        except BaseException:
            _go_back(conversation, place)
            raise
        generated = len(tokens) - len(prompt)
        return Answer(place.tokens, generated, self._ended(int(tokens[-1]), hearing))

    def read(self, conversation: Conversation, ids: Int[Tensor, " n"], listener: Listener) -> bool:
        """Read what a later prompt begins with, and compress it; tell whether all was read."""
        place = conversation.begin(ids)
        try:
            if not self._read(conversation, ids, listener, leave=0):
                _go_back(conversation, place)
                return False
            conversation.cache.compress()
            conversation.settle(ids, len(ids))
        except BaseException:
            _go_back(conversation, place)
            raise
        return True

    def _read(
        self, conversation: Conversation, prompt: Int[Tensor, " n"], listener: Listener, leave: int = _PIECE
    ) -> bool:
        """Read a prompt, but for what `generate` reads with one piece; tell whether nobody has stopped it."""
        start, total = len(conversation.ids), len(prompt)
        forward: Any = self.model
        while total - start > leave:
            listener.read(start - len(conversation.ids), total - len(conversation.ids))
            if listener.wants_no_more:
                return False
            piece = prompt[None, start : start + _PIECE].to(self.model.device)
            with torch.no_grad():
                forward(input_ids=piece, **{CACHE: conversation.cache}, use_cache=True, logits_to_keep=1)
            start += piece.shape[1]
        return not listener.wants_no_more

    def _generate(
        self, cache: NexusQuantCache, prompt: Int[Tensor, " n"], wish: Wish, hearing: "_Hearing"
    ) -> Int[Tensor, " m"]:
        """Return the prompt with its answer."""
        ids = prompt[None].to(self.model.device)
        generate: Any = self.model.generate
        devices = [ids.device] if ids.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=wish.seed is not None):
            if wish.seed is not None:
                torch.manual_seed(wish.seed)
            output = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **{CACHE: cache},
                generation_config=self._settings(wish),
                stopping_criteria=StoppingCriteriaList([hearing]),
            )
        hearing.end()
        tokens: Tensor = output[0].cpu()
        return tokens

    def _settings(self, wish: Wish) -> GenerationConfig:
        """Return the model's own settings, with what the wish says in place of theirs."""
        settings = copy.deepcopy(self.model.generation_config)
        samples = wish.temperature > _COLDEST
        pad = settings.pad_token_id if settings.pad_token_id is not None else self.tokenizer.pad_token_id
        settings.update(
            max_new_tokens=wish.tokens,
            do_sample=samples,
            temperature=wish.temperature if samples else None,
            top_p=wish.top_p if samples else None,
            top_k=0 if samples else None,  # by default transformers takes 50
            num_beams=1,
            pad_token_id=self._ends()[0] if pad is None and self._ends() else pad,
            eos_token_id=self._ends() or None,
            # These would have a say about length and cache.
            max_length=None,
            min_length=None,
            cache_implementation=None,
            prefill_chunk_size=None,
            return_dict_in_generate=False,
        )
        return settings

    def _ends(self) -> list[int]:
        """Return the tokens that end an answer."""
        configured: Any = getattr(self.model.generation_config, "eos_token_id", None)
        ends = configured if isinstance(configured, list) else [configured]
        return [int(end) for end in dict.fromkeys([*ends, self.tokenizer.eos_token_id]) if end is not None]

    def _ended(self, last: int, hearing: "_Hearing") -> str:
        if hearing.text.is_stopped or last in self._ends():
            return "stop"
        return "left" if hearing.listener.wants_no_more else "length"


class _Hearing(StoppingCriteria):
    """Hands an answer to a listener, and ends it at a stop string or if the listener wants no more."""

    def __init__(self, text: AnswerText, listener: Listener) -> None:
        self.text, self.listener = text, listener

    def __call__(
        self,
        input_ids: Int[Tensor, "1 n"],
        scores: Any,  # noqa: ANN401 - not looked at
        **kwargs: Any,  # noqa: ANN401
    ) -> Bool[Tensor, "1"]:
        """Take the newest token."""
        del scores, kwargs
        self._say(self.text.add(int(input_ids[0, -1])))
        stops = self.text.is_stopped or self.listener.wants_no_more
        return torch.tensor([stops], device=input_ids.device)

    def end(self) -> None:
        """Say what was held back."""
        self._say(self.text.end())

    def _say(self, text: str) -> None:
        if text:
            self.listener.say(text)


def _go_back(conversation: Conversation, place: Place) -> None:
    """Bring a conversation back to where it stood, or empty it."""
    if not conversation.go_back(place):
        conversation.reset()
