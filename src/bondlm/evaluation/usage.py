"""Python code for the model card that loads a run folder and asks the model a question."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bondlm.runs.prompting import read_prompting

CHAT = """messages = [{{"role": "user", "content": "What is rain?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{variables}
)
"""
PLAIN = """inputs = tokenizer("What is rain?", return_tensors="pt")
"""


def usage(folder: Path, config: Mapping[str, Any]) -> str:
    """A Markdown code block; the folder has its hub name if the run is on the hub, otherwise its path if relative."""
    place = str(config.get("hub_model_id") or (folder if not folder.is_absolute() else folder.name))
    kind, answer = "ForCausalLM", 'output[0, inputs["input_ids"].shape[1] :]'
    if _is_encoder_decoder(folder):  # its output does not include the prompt
        kind, answer = "ForSeq2SeqLM", "output[0]"
    if (folder / "adapter_config.json").is_file():
        # transformers' own loader drops the magnitudes of DoRA, and generate() the fields that this file leaves empty.
        imports = f"from peft import AutoPeftModel{kind}\nfrom transformers import AutoTokenizer, GenerationConfig"
        load = f"""model = AutoPeftModel{kind}.from_pretrained(place)
model.get_base_model().generation_config = GenerationConfig.from_pretrained(place)"""
    else:
        imports = f"from transformers import AutoModel{kind}, AutoTokenizer"
        load = f"model = AutoModel{kind}.from_pretrained(place)"
    return f"""```python
{imports}

place = "{place}"
{load}
tokenizer = AutoTokenizer.from_pretrained(place)
{_inputs(folder)}output = model.generate(**inputs)
print(tokenizer.decode({answer}, skip_special_tokens=True))
```
"""


def _inputs(folder: Path) -> str:
    prompting = read_prompting(folder) or {"prompt_format": "auto", "chat_template_kwargs": {}}
    has_template = (folder / "chat_template.jinja").is_file() or "chat_template" in _json(
        folder / "tokenizer_config.json"
    )
    if not has_template or prompting["prompt_format"] in ("plain", "rendered"):
        return PLAIN
    variables = "".join(f", {name}={value!r}" for name, value in prompting["chat_template_kwargs"].items())
    return CHAT.format(variables=variables)


def _is_encoder_decoder(folder: Path) -> bool:
    start = _json(folder / "generation_config.json").get("decoder_start_token_id")
    return start is not None or bool(_json(folder / "config.json").get("is_encoder_decoder"))


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
