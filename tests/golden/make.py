"""Write the golden files of the present format version, once; see README.md beside this file."""

import json
import sys
from pathlib import Path

from files import MAKERS, file_bytes, take_apart
from golden_content import content_of, load_golden

from nexusquant_cache.files.container import VERSION

FOLDER = Path(__file__).parent / f"version-{VERSION}"


def main() -> None:
    if FOLDER.exists():
        sys.exit(f"{FOLDER} is there already, and golden files never change")
    FOLDER.mkdir()
    content = {}
    for name, level in [*((name, 19) for name in MAKERS), ("compressed", None)]:
        path = FOLDER / f"{name}-{level or 'raw'}.safetensors"
        path.write_bytes(file_bytes(name, level))
        if take_apart(path.read_bytes())[0]["version"] != str(VERSION):  # an older one can say the same
            path.unlink()
            continue
        content[path.name] = content_of(path, load_golden(path))
    (FOLDER / "content.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
