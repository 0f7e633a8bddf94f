"""A tiny model with a tokenizer of one token per byte, a text, and caches that show what was done to them."""

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nexusquant_cache.evaluation import LoadedModel

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
PROSE = " ".join(f"Sentence number {index} says little." for index in range(400))


def build_tokenizer(chat_template=CHAT_TEMPLATE):
    """One token per byte, so that lengths can be computed by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, eos_token=alphabet[0])


def build_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # sharper attention and predictions than at initialisation
        for weight in model.parameters():
            weight.mul_(3)
    return model


@functools.cache
def tiny():
    """Return the same model each time: nothing here changes it."""
    return LoadedModel("tiny", build_model(), build_tokenizer())


class KeepAll(DynamicCache):
    """Counts its compressions and keeps everything."""

    def __init__(self):
        super().__init__()
        self.compressed_at = []

    def compress(self):
        self.compressed_at.append(self.get_seq_length())


class Forgetful(DynamicCache):
    """Returns values that are too large, which moves every prediction."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, 1.5 * values
