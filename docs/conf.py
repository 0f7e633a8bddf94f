"""Sphinx configuration; `nox -s docs` builds with warnings as errors and runs the examples."""

from importlib import metadata

project = "nexusquant_cache"
author = "The nexusquant_cache maintainers"
copyright = f"2026, {author}"
release = version = metadata.version("nexusquant-cache")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "nexusquant_cache"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False  # transformers' docstrings are neither ours nor valid here
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# No network while building, hence no inventories of other projects: their names cannot be resolved.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|jaxtyping|collections|numpy|pathlib|types|typing|rich)\..*"),
    # jaxtyping's annotations by their short names, and the axes inside them.
    ("py:class", r"(Tensor|Bool|Float|Int|Int32|Int64|Integer|Num|Shaped|UInt8|Array)"),
    ("py:class", r"'.*'|[\w*.+#=]+|\d+"),
]

# The examples run on a tiny random model: they show the calls, not the quality.
doctest_global_setup = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
).eval()
inputs = {"input_ids": torch.randint(3, 256, (1, 1200))}
inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
"""
