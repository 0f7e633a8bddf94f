"""The cache: the only part of the package, besides `evaluation`, that touches transformers."""
