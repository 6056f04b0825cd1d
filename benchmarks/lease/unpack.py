"""Models from what travels: the T5 of the summarization task from its package's int8 weights.

python benchmarks/lease/unpack.py t5-int8.safetensors t5-rest models/flan-t5-small-title
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main(weights: str, rest: str, target: str) -> None:
    """Each tensor is (q - zero) * scale, as in examples/summarization/prepare.py; `rest` holds the other files."""
    packed = load_file(weights)
    names = [name for name in packed if "|" not in name]
    whole = {
        name: (packed[name].float() - packed[f"{name}|z"].float()) * packed[f"{name}|s"]
        if f"{name}|s" in packed
        else packed[name]
        for name in names
    }
    temporary = Path(f"{target}.tmp")
    shutil.copytree(rest, temporary)
    save_file(whole, temporary / "model.safetensors", metadata={"format": "pt"})
    temporary.rename(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
