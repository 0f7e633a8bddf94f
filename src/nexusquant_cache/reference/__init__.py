"""Readable implementations in plain torch: the truth that faster ones are compared with."""
