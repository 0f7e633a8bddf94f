"""Vectors to packed words and back."""
