"""TRL's own tests of its RLOO and GRPO trainers on bondlm: names are swapped, data and models are local (docs/trl.md).

`PYTHONPATH=src:tests python -m migration.trl_tests TRL/tests [options of pytest]`, with a checkout of TRL. Nothing of
it is changed, and no package `trl` is needed. What does not apply is skipped with its reason.
"""

import json
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest

from bondlm import BONDConfig, BONDTrainer
from migration.trl_models import load_dataset, save_models

RENAMED = {
    "num_generations": "num_samples",
    "num_generations_eval": "eval_num_samples",
    "beta": "beta_rl",
    "ref_model_sync_steps": "anchor_update_every",
}
SWITCHES: dict[Any, dict[str, Any]] = {
    ("mask_truncated_completions", True): {"missing_eos": "drop"},
    ("shuffle_dataset", False): {"train_sampling_strategy": "sequential"},
    ("sync_ref_model", True): {"anchor": "periodic"},
}
SENTENCES = {"must match": "reward_processing_classes", "No reward source": "reward_funcs"}  # of errors: TRL's and ours
NOT_APPLICABLE = {  # by the names of tests
    r"VLM|vlm|multimodal": "images",
    r"tool|[Ee]nvironment|[Rr]ollout": "tools, environments",
    r"liger": "liger",
    r"vllm": "vLLM inside the process",
    r"HighEntropyMask|get_off_policy_mask|entropy_bonus_scale|TransformersContinuous|prepare_input": "methods of TRL",
    r"mask_truncated_completions$": "replaces generate of transformers",
}


def make_config(objective: str, **settings: Any) -> BONDConfig:
    """TRL's settings by bondlm's names."""
    own: dict[str, Any] = {}
    for name, value in settings.items():
        switch = SWITCHES.get((name, value)) if isinstance(value, bool) else None
        own |= {RENAMED.get(name, name): value} if switch is None else switch
    return BONDConfig(objective=objective, use_cpu=True, **own)


class Trainer(BONDTrainer):
    """What TRL's tests read of a trainer, by its name there."""

    aux_loss_enabled = False  # router_aux_loss_coef
    ref_model = property(lambda self: self.roles._copies["anchor"])
    reward_processing_classes = property(lambda self: [reward.function.tokenizer for reward in self.rewards])

    @property
    def _logs(self) -> dict[str, Any]:
        rows = map(json.loads, (Path(str(self.args.output_dir)) / "samples.jsonl").read_text().splitlines())
        return {"extra": {name for row in rows for name in row["policy"][0]["extra"]}}

    def train(self, *args: Any, **more: Any) -> Any:
        """The last step has a row of its own before the run's sums; TRL writes both into one."""
        output = super().train(*args, **more)
        step, sums = self.state.log_history[-2:]
        sums |= step | sums
        return output

    def evaluate(self, *args: Any, **more: Any) -> dict[str, float]:
        """An evaluation has no loss: its reward stands there."""
        logs = super().evaluate(*args, **more)
        return logs | {f"{n.removesuffix('reward')}loss": value for n, value in logs.items() if n.endswith("reward")}


class Plugin:
    """Of pytest, while TRL's tests run."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Skip what does not apply."""
        for item in items:
            test = item.nodeid.partition("::")[2]
            if why := next((why for names, why in NOT_APPLICABLE.items() if re.search(names, test)), None):
                item.add_marker(pytest.mark.skip(reason=f"does not apply: {why}"))

    @pytest.fixture(autouse=True)
    def _beside_the_models(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(FOLDER)


def stand_in_for_trl() -> None:
    """Put names where TRL's tests import them from."""
    raises = pytest.raises

    def with_our_sentence(error: Any, *args: Any, match: str = "", **more: Any) -> Any:
        return raises(
            error, *args, match=next((own for text, own in SENTENCES.items() if text in match), match), **more
        )

    trl, available = ModuleType("trl"), ModuleType("trl.import_utils")
    trl.__dict__.update({f"{name}Config": partial(make_config, name.lower()) for name in ("RLOO", "GRPO")})
    trl.__dict__.update(RLOOTrainer=Trainer, GRPOTrainer=Trainer)
    available.__dict__["__getattr__"] = lambda name: lambda **_: False  # `is_..._available`
    sys.modules |= {"trl": trl, "trl.import_utils": available}
    datasets.load_dataset, pytest.raises = load_dataset, with_our_sentence


FOLDER = Path(tempfile.gettempdir()) / "bondlm-trl-models"

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not FOLDER.exists():
        save_models(FOLDER / "trl-internal-testing")
    stand_in_for_trl()
    files = [str(Path(sys.argv[1]) / f"test_{name}_trainer.py") for name in ("rloo", "grpo")]
    sys.exit(pytest.main([*files, "--noconftest", "-p", "no:cacheprovider", *sys.argv[2:]], [Plugin()]))
