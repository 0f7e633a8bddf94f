"""``python -m nexusquant_cache``: the command line."""

from nexusquant_cache.cli import main

if __name__ == "__main__":
    main()
