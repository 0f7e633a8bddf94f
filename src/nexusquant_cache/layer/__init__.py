"""One layer of the cache: what it holds, and when and how that is compressed."""
