"""Talking to a model through compressed caches: in a terminal, on a page, and by a server (docs/chat_and_serve.md)."""
