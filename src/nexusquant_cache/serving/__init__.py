"""Talking to a model through compressed caches: a chat in the terminal, and a server (docs/chat_and_serve.md)."""
