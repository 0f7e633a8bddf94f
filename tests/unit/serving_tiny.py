"""A tiny model that answers in ASCII, so that its answers have the same tokens when they are read again."""

import functools

import torch
from unit.evaluation_tiny import build_model, build_tokenizer

from nexusquant_cache import CacheConfig
from nexusquant_cache.evaluation import LoadedModel
from nexusquant_cache.serving.chat_model import ChatModel, Listener

# Under these a few dozen tokens are compressed.
SMALL = CacheConfig(
    key_bits=1.75, value_bits=2.25, keep_ratio=0.5, sink_tokens=2, residual_length=8, flush_length=4, min_tokens=16
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@functools.cache
def ascii_tiny():
    """Return a model that says nothing but visible ASCII, always the same one."""
    model, tokenizer = build_model(), build_tokenizer(TEMPLATE)
    visible = [tokenizer.convert_tokens_to_ids(chr(code)) for code in range(ord("A"), ord("z") + 1)]
    with torch.no_grad():
        rows = torch.ones(model.config.vocab_size, dtype=torch.bool)
        rows[visible] = False
        model.lm_head.weight[rows] = 0
    return LoadedModel("tiny", model, tokenizer)


def small_chat(loaded=None):
    return ChatModel(loaded or ascii_tiny(), SMALL)


class Heard(Listener):
    """Keeps what was said, and stops after so many pieces."""

    def __init__(self, most=None, most_reads=None):
        self.pieces, self.reads = [], []
        self._most, self._most_reads = most, most_reads

    def read(self, done, total):
        self.reads.append((done, total))

    def say(self, text):
        self.pieces.append(text)

    @property
    def text(self):
        return "".join(self.pieces)

    @property
    def wants_no_more(self):
        if self._most_reads is not None and len(self.reads) > self._most_reads:
            return True
        return self._most is not None and len(self.pieces) >= self._most
