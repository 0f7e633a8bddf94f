"""Token ids as a text in the metadata of a file: base64 of a zstd frame of little-endian 32-bit integers."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.errors import FormatError, OptionError
from nexusquant_cache.files.fingerprint import TokenIds

TOKEN_IDS = "nexusquant_cache.token_ids"  # noqa: S105 - no password
"""Name of the text."""

_BYTES = 4
_MOST_TEXT = 1_000_000  # what is left of the 1 MiB that a file has for texts, for other texts and marks


def check_name(metadata: Mapping[str, str] | None) -> None:
    """Raise OptionError if a text has the name under which token ids are kept."""
    if metadata is not None and TOKEN_IDS in metadata:
        msg = f"metadata[{TOKEN_IDS!r}] is where keep_token_ids=True keeps the ids: choose another name"
        raise OptionError(msg)


def with_token_ids(metadata: Mapping[str, str] | None, token_ids: TokenIds | None) -> dict[str, str]:
    """Return metadata that hold the token ids, too.

    Raises:
        OptionError: If there are no token ids, or more than a file can hold.
    """
    if token_ids is None:
        msg = "keep_token_ids=True keeps the token_ids that save is given: give them, too"
        raise OptionError(msg)
    text = packed_ids(torch.as_tensor(token_ids))
    if len(text) > _MOST_TEXT:
        msg = (
            f"the token ids would take {len(text):,} bytes, and a file holds {_MOST_TEXT:,} of them at most: leave "
            "keep_token_ids out, and give them to write_page"
        )
        raise OptionError(msg)
    return {**(metadata or {}), TOKEN_IDS: text}


def packed_ids(ids: Tensor) -> str:
    """Return ids as a text."""
    data = ids.detach().to("cpu", torch.int32).numpy().astype("<i4").tobytes()
    return base64.b64encode(_zstandard().compress(data)).decode()


def unpacked_ids(text: str, tokens: int, *, rows: int = 1) -> Int[Tensor, "rows tokens"]:
    """Return the ids in a text; no more memory is taken than so many need, whatever the text says.

    Args:
        text: What `packed_ids` returned.
        tokens: Tokens of each row.
        rows: Rows.

    Raises:
        FormatError: If the text holds anything but so many ids.
    """
    codec = _zstandard()
    try:
        packed = base64.b64decode(text, validate=True)
        size = codec.frame_content_size(packed)
        data = codec.ZstdDecompressor().decompress(packed) if size == _BYTES * rows * tokens else b""
    except (ValueError, codec.ZstdError) as error:  # base64's own error is a ValueError
        msg = f"the token ids in the file cannot be read: {error}"
        raise FormatError(msg) from error
    if len(data) != _BYTES * rows * tokens:
        msg = f"the token ids in the file are not those of {rows} rows of {tokens:,} tokens"
        raise FormatError(msg)
    return torch.from_numpy(np.frombuffer(data, "<i4").astype(np.int64)).view(rows, tokens)


def _zstandard() -> Any:  # noqa: ANN401 - a module
    """Return the package, which importing nexusquant_cache does not load."""
    import zstandard  # noqa: PLC0415 - see above

    return zstandard
