"""Commands and settings on the pages: each block says which test runs it, options are known, and pages run as written.

Run as written means: the commands of the page in order, in a folder where the names that it uses (a model of a hub, a
reward model, `prompts.jsonl`, ..) are tiny local stand-ins, with small numbers put behind the page's own.
"""

import json
import re
import shlex
import shutil
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import pytest
import yaml
from rewards.small_models import llama_classifier, saved
from tiny import CHATS, prompt_rows, tiny_causal, tiny_tokenizer

import bondlm
from bondlm import BONDConfig
from bondlm.cli import main
from bondlm.cli.options import COMMANDS, TRAIN, known_options, parse
from bondlm.config import SETTINGS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    ROOT / "recipes/README.md",
]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*) -->\n\s*)?^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)
MARK = re.compile(r"run by (tests/\S+\.py)|not run: .{10,}")
HERE = "run by tests/test_pages.py"
# Names that are not bondlm's: of accelerate, DeepSpeed, vLLM and others, of eval sets and functions on the pages.
FOREIGN = {
    *("config_file", "fsdp_state_dict_type", "machine_rank", "main_process_ip", "mixed_precision", "num_machines"),
    *("enable_thinking", "nccl_m2n", "rms_norm_eps", "sharded_rdt", "sparse_nccl", "tie_word_embeddings"),
    "zero3_init_flag",
    *("eval_chat_effective_n", "eval_math_kl", "eval_math_win_rate"),
    *("buffer_size", "num_decay_steps", "warmup_stable_decay", "my_rewards", "not_repetitive", "prefer_short"),
    "accuracy_reward",
}
WORDS = {word for path in (ROOT / "src").rglob("*.py") for word in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
OPTIONS = {name for _, names in COMMANDS.values() for name in names} | set(SETTINGS) | {"config", "judge"}


class Block(NamedTuple):
    page: Path
    mark: str
    kind: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, match["mark"] or "", match["kind"], match["text"]) for match in found]


def commands(text: str) -> list[list[str]]:
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def name_of(value: Any) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else " ".join(value)


CODE = [block for page in PAGES for block in blocks(page) if block.kind in ("bash", "sh", "python", "")]
WRITTEN = [block for page in PAGES for block in blocks(page) if block.kind == "yaml"]
LINES = [
    words[1:] for block in CODE for words in commands(block.text) if words[0] == "bondlm" and block.kind != "python"
]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_code_says_which_test_runs_it(page: Path) -> None:
    for block in blocks(page):
        if block.kind in ("yaml", "json", "text", "bibtex"):
            continue
        match = MARK.fullmatch(block.mark)
        assert match is not None, f"no `<!-- run by tests/... -->` or `<!-- not run: why -->` before: {block.text}"
        assert match[1] is None or (ROOT / match[1]).is_file(), match[1]


@pytest.mark.parametrize("words", LINES, ids=name_of)
def test_a_command_knows_its_options(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for i, word in enumerate(words):
        if word == "--config" and not Path(words[i + 1]).exists():
            assert words[i + 1] in ("run.yaml",), words[i + 1]
            words = words[:i] + words[i + 2 :]
            break
    parse(words[0], words[1:])


@pytest.mark.parametrize("block", WRITTEN, ids=lambda block: f"{name_of(block.page)}: {block.text[:30]!r}")
def test_a_file_on_a_page_is_a_valid_config(block: Block, tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(block.text, encoding="utf-8")
    options = parse("train", ["--config", str(tmp_path / "page.yaml")])
    settings = {name: value for name, value in options.items() if name not in {*TRAIN, "bf16"}}
    BONDConfig(**settings | {"output_dir": str(tmp_path)})


def sentences(page: Path) -> str:
    """A page without its blocks of code, TRL's names and the names of model families."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"<!-- names -->.*<!-- end of names -->", "", text, flags=re.S)
    return text.split("## The table")[0] if page.name == "models.md" else text


def settings_in(text: str) -> set[str]:
    """What is written `name: value`."""
    return set(re.findall(r"(?<!`)`([a-z]\w*): [^`]+`(?!`)", text))


def unknown_names(text: str) -> set[str]:
    """What is written in code like a setting, with an underscore, and is no word of the source (without `eval_`)."""
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    found = re.findall(r"(?<![\w/.|<-])(?:--)?([a-z][a-z0-9]*(?:_[a-z0-9]+)+)(?![\w/(.-])", code)
    names = {name for name in found if not name.startswith("test_")} - OPTIONS - FOREIGN - WORDS
    return {name for name in names if name.removeprefix("eval_") not in WORDS}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_in_a_sentence_are_known(page: Path) -> None:
    text = sentences(page)
    assert settings_in(text) - OPTIONS - FOREIGN == set()
    assert unknown_names(text) == set()


def test_the_check_of_settings_sees_them() -> None:
    with pytest.raises(Exception, match="'etta'"):
        known_options("train", {"etta": 1})
    text = "Set `etta: 0.1`, or `beta_rll` and `--missing_eoss drop`; see `eval_kl_budgett`, `eval_kl`."
    assert settings_in(text) - OPTIONS == {"etta"}
    assert unknown_names(text) == {"beta_rll", "missing_eoss", "eval_kl_budgett"}


# -- pages that are run as they are written

FEW = {"max_steps": 1, "max_completion_length": 8, "use_cpu": True, "per_device_train_batch_size": 4}
FEW |= {"gradient_accumulation_steps": 1, "eval_strategy": "no", "eval_steps": None, "target_n": None}
FEW |= {"eval_num_samples": 2, "eval_num_reference_samples": 4, "logging_steps": 1, "warmup_steps": 0}
MORE = {
    **dict.fromkeys(("train", "check"), FEW),
    "sample": {"max_completion_length": 8},
    "score": {"max_completion_length": 8, "num_samples": 8},
    "eval": {"max_completion_length": 8, "num_samples": 2, "num_reference_samples": 4},
    "reward-model": {"max_steps": 1, "use_cpu": True},
}
# Runs that a page takes to be there.
RUNS_OF = {
    "report.md": ("runs/jbond", "runs/bond", "runs/sft"),
    "evaluation.md": ("my-adapter", "runs/qwen"),
    "using.md": ("runs/qwen", "runs/whole"),
}
RUN_PAGES = [page for page in PAGES if any(block.mark == HERE for block in blocks(page))]


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_line(words: list[str]) -> None:
    more = MORE.get(words[0], {}).items()
    if words[0] == "merge" and "--curve" in words:
        more = MORE["eval"].items()
    arguments = [
        *words,
        *(word for name, value in more for word in (f"--{name}", yaml.safe_dump(value).split("\n")[0])),
    ]
    assert main(arguments) == 0, arguments


def ask_rewards(names: dict[str, Any]) -> None:
    """Call the reward functions that a page has defined, with one conversation."""
    for made in list(names.values()):
        if isinstance(made, FunctionType) and [*signature(made).parameters][1:2] == ["completions"]:
            assert len(made([CHATS[0]], [[{"role": "assistant", "content": "yes, please"}]])) == 1


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny things under the names that the pages use, and a run."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    saved(tmp_path / "Qwen/Qwen3-0.6B", tiny_causal(tokenizer), tokenizer)
    saved(tmp_path / "org/rival", tiny_causal(tokenizer, seed=3), tokenizer)
    for name in ("reward-model", "reward", "other-reward"):
        saved(tmp_path / "org" / name, llama_classifier(tokenizer, pad_token_id=0), tokenizer)
    write_rows("prompts.jsonl", prompt_rows(16, chat=True))
    write_rows("heldout.jsonl", [row | {"summary": "rain"} for row in prompt_rows(6, chat=True)])
    write_rows("preferences.jsonl", [{"prompt": chat, "chosen": "good", "rejected": "bad"} for chat in CHATS])
    quickstart = next(block.text for block in WRITTEN if block.page.name == "quickstart.md")
    Path("run.yaml").write_text(yaml.safe_dump(yaml.safe_load(quickstart) | FEW), encoding="utf-8")
    run_line(["train", "--config", "run.yaml", "--output_dir", "runs/everyday"])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=name_of)
def test_a_page_runs_as_it_is_written(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bondlm, "BONDConfig", lambda **settings: BONDConfig(**settings | FEW))
    for name in RUNS_OF.get(page.name, ()):
        if name == "runs/whole":  # any whole model with its tokenizer
            shutil.copytree("Qwen/Qwen3-0.6B", name)
            continue
        shutil.copytree("runs/everyday", name)
        if name == "my-adapter":  # of another program
            (Path(name) / "config.yaml").unlink()
    for block in blocks(page):
        if block.mark != HERE:
            continue
        if block.kind == "python":
            names = {"policy_rewards": [[3.0, 6.0]] * 4, "reference_rewards": [[*range(8)]] * 4}
            exec(block.text, names)
            ask_rewards(names)
            continue
        for words in commands(block.text):
            assert words[0] == "bondlm", words
            run_line(words[1:])
