"""What users and documents rely on does not change by accident, and the house keeps its shape.

A change here is a change of the contract: it needs a line in the CHANGELOG.
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import prompt_rows, tiny_causal, tiny_tokenizer
from transformers import TrainingArguments

import bondlm
import bondlm.bestofn
from bondlm import BONDConfig, BONDTrainer

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bondlm"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 80

# -- names

CONFIG_FIELDS = {
    "alpha",
    "anchor",
    "anchor_update_every",
    "beta",
    "beta_rl",
    "correction",
    "disable_dropout",
    "dtype",
    "engine",
    "eta",
    "eval_num_reference_samples",
    "eval_num_samples",
    "gamma",
    "kl_budget",
    "log_quantile",
    "max_completion_length",
    "max_prompt_length",
    "cuda_graphs",
    "max_rows",
    "max_skipped_frac",
    "max_skipped_steps",
    "missing_eos",
    "reward_outage_s",
    "reward_timeout_s",
    "model_init_kwargs",
    "n",
    "num_anchor_samples",
    "num_logged_samples",
    "num_samples",
    "objective",
    "offload_anchor",
    "on_bad_row",
    "quantile",
    "quantile_learning_rate",
    "reward_weights",
    "strict",
    "target_n",
    "truncate_prompt",
    "vllm_base_url",
    "vllm_python",
    "vllm_server",
    "vllm_server_args",
    "vllm_start_timeout",
    "vllm_timeout",
}
BESTOFN = {
    "EffectiveN",
    "Estimate",
    "LogQuantileMethod",
    "backward_kl",
    "backward_kl_gradient",
    "best_and_worst_probs",
    "best_of_n_kl",
    "best_of_n_logprob",
    "best_of_n_probs",
    "best_of_n_win_rates",
    "bonbon_fixed_point",
    "bonbon_gradient",
    "bond_fixed_point",
    "bond_gradient",
    "bootstrap_mean",
    "effective_n",
    "expected_best_of_n",
    "forward_kl",
    "forward_kl_gradient",
    "iterated_best_of_n",
    "jbond_backward_target",
    "jbond_fixed_point",
    "jbond_gradient",
    "jeffreys_gradient",
    "kl_bound",
    "kl_divergence",
    "kl_k1",
    "kl_k3",
    "kl_reward_gradient",
    "kl_reward_optimum",
    "log_collision_correction",
    "log_quantile",
    "mean_signal",
    "mean_two_level_reward",
    "quantile",
    "regression_fixed_point",
    "regression_gradient",
    "two_level_penalty",
    "win_rate",
    "win_rates",
}
TRAINER_ARGUMENTS = [
    "model",
    "reward_funcs",
    "args",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "reward_processing_classes",
    "callbacks",
    "optimizers",
    "peft_config",
]
TRAIN_METRICS = {
    "anchor/distance",
    "anchor/gap_closed",
    "anchor/kl",
    "anchor/reward",
    "bond/advantage",
    "bond/forward_loss",
    "bond/frac_dropped",
    "bond/frac_tied",
    "bond/penalty_rate",
    "completions/clipped_ratio",
    "completions/frac_empty",
    "completions/max_length",
    "completions/mean_length",
    "completions/min_length",
    "entropy",
    "kl",
    "loss",
    "num_tokens",
    "num_tokens/compared",
    "num_tokens/learned",
    "reward",
    "reward_std",
    "rewards/<name>/mean",
    "sampling/sampling_logp_difference/mean",
    "skipped_steps",
    "step_time",
    "time/anchor",
    "time/generate",
    "time/learn",
    "time/optimizer",
    "time/other",
    "time/reference",
    "time/reward",
}
OTHER_OBJECTIVES_METRICS = {
    "bond/margin_error",
    "bond/quantile_loss",
    "bond/quantile_mean",
    "bond/regression_error",
    "bond/regression_loss",
    "bond/signal",
    "time/quantile",
}
EVAL_ESTIMATES = {"eval_effective_n", "eval_kl", "eval_reference_reward", "eval_reward", "eval_win_rate"}
EVAL_METRICS = (
    EVAL_ESTIMATES
    | {f"{name}_{end}" for name in EVAL_ESTIMATES for end in ("low", "high")}
    | {
        f"eval_completions/{name}"
        for name in ("clipped_ratio", "frac_empty", "max_length", "mean_length", "min_length")
    }
    | {"eval_entropy", "eval_runtime"}
)
FROM_TRANSFORMERS = {"epoch", "grad_norm", "learning_rate"}


def test_public_names() -> None:
    assert set(bondlm.__all__) == {"BONDConfig", "BONDTrainer", "__version__"}
    assert set(bondlm.bestofn.__all__) == BESTOFN
    for module in (bondlm, bondlm.bestofn):
        for name in module.__all__:
            assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'BONDtrainer'"):
        _ = bondlm.BONDtrainer


def test_config_fields() -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field for field in dataclasses.fields(BONDConfig) if field.name not in inherited]
    assert {field.name for field in own} == CONFIG_FIELDS
    assert all(field.metadata.get("help") for field in own)


def test_constructor_arguments_are_trls() -> None:
    assert list(inspect.signature(BONDTrainer).parameters) == TRAINER_ARGUMENTS


def length(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two steps with an evaluation log."""
    tokenizer = tiny_tokenizer()
    args = BONDConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        max_completion_length=4,
        warmup_steps=0,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = prompt_rows(6)
    trainer = BONDTrainer(
        tiny_causal(tokenizer), length, args, train_dataset=rows[:4], eval_dataset=rows[4:], processing_class=tokenizer
    )
    trainer.train()
    history: list[dict[str, Any]] = trainer.state.log_history
    return history


def test_metric_names(logged: list[dict[str, Any]]) -> None:
    first, second, evaluation = logged[:3]
    train = {name.replace("rewards/length/", "rewards/<name>/") for name in first}
    assert train == {name.replace("rewards/length/", "rewards/<name>/") for name in second}
    assert train - FROM_TRANSFORMERS - {"step"} == TRAIN_METRICS
    assert set(evaluation) - FROM_TRANSFORMERS - {"step"} == EVAL_METRICS


def test_step_time_is_the_sum_of_the_phases(logged: list[dict[str, Any]]) -> None:
    """Whether that is the time that passed, a wall clock says (trainer/test_time_and_tokens.py)."""
    for row in logged[:2]:
        phases = [value for name, value in row.items() if name.startswith("time/")]
        assert all(value >= 0 for value in phases)
        assert row["step_time"] == pytest.approx(sum(phases), rel=1e-6)
    assert sum(row["step_time"] for row in logged[:2]) <= logged[-1]["train_runtime"] + 0.01


def documented_metrics() -> set[str]:
    """Names in the first column of the tables of docs/metrics.md; `a/b`, `/c` is short for `a/b`, `a/c`."""
    names: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        found = re.findall(r"`([^`]+)`", cells[1]) if line.startswith("|") else []
        for name in found:
            names.add(found[0].rsplit("/", 1)[0] + name if name.startswith("/") else name)
    return names


def test_every_metric_is_documented_and_no_other() -> None:
    names = documented_metrics()
    logged_names = (
        TRAIN_METRICS
        | OTHER_OBJECTIVES_METRICS
        | {name.removesuffix("_low").removesuffix("_high") for name in EVAL_METRICS}
    )
    assert {name for name in logged_names if not any(fnmatch(name, pattern) for pattern in names)} == set()
    assert {pattern for pattern in names if not any(fnmatch(name, pattern) for name in logged_names)} == set()


# -- the house

HOMES = {"BONDConfig": "config", "BONDTrainer": "trainer"}  # names of the package itself
FLAT = {"__init__", "__main__", "config", "errors", "trainer"}  # the modules that lie beside the packages


def table_of_imports() -> dict[str, set[str]]:
    """Room -> the rooms that it may import, from the table in CONTRIBUTING.md; the order of its rows is the order of
    the house.
    """
    rooms: dict[str, set[str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        cells = [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and len(cells[0]) == 1:
            rooms[cells[0][0]] = set(cells[2])
    return rooms


IMPORTS = table_of_imports()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of bondlm, at the top or in a function body."""
    for node in ast.walk(tree):
        for name in imported_names(node, path):
            parts = name.split(".")
            if parts[0] == "bondlm" and len(parts) > 1:
                yield getattr(node, "lineno", 0), HOMES.get(parts[1], parts[1])


def imported_names(node: ast.AST, path: Path) -> list[str]:
    """Full names that a statement or a call of `import_module` imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: a relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant)]
    return []


def test_rooms_import_exactly_what_the_table_says() -> None:
    """No room imports another than its row names, and no row names one that is not imported any more."""
    seen: dict[str, set[str]] = {room_of(path): set() for path in FILES}
    for path in FILES:
        seen[room_of(path)] |= {room for _, room in imported_rooms(TREES[path], path)} - {room_of(path), "__version__"}
    del seen["__init__"]  # the package itself: it imports on first use
    assert seen == IMPORTS


def test_imports_run_one_way() -> None:
    """Each row of the table names rows above it alone, so that no two rooms can need each other."""
    order = list(IMPORTS)
    for room, others in IMPORTS.items():
        assert {other for other in others if order.index(other) >= order.index(room)} == set(), room


def test_few_modules_lie_flat_and_every_package_says_what_lives_there() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == FLAT
    for path in SOURCE.rglob("__init__.py"):
        assert len(ast.get_docstring(TREES[path]) or "") > 40, path


def test_the_check_of_dependencies_sees_every_kind_of_import() -> None:
    code = (
        "import bondlm.cli\n"
        "from bondlm.trainer import BONDTrainer\n"
        "from bondlm import BONDConfig, evaluation\n"
        "def f():\n    from bondlm.rollout.samples import draw\n    import_module('bondlm.report')\n"
    )
    rooms = [room for _, room in imported_rooms(ast.parse(code), Path("x"))]
    assert sorted(rooms) == ["cli", "config", "evaluation", "report", "rollout", "trainer"]


def attributes_of_self(node: ast.AST) -> Iterator[ast.Attribute]:
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name) and child.value.id == "self":
            yield child


def test_no_private_attribute_of_transformers_trainer_is_used() -> None:
    (owner,) = [
        node
        for node in ast.walk(TREES[SOURCE / "trainer.py"])
        if isinstance(node, ast.ClassDef) and node.name == "BONDTrainer"
    ]
    private = {a.attr for a in attributes_of_self(owner) if a.attr.startswith("_") and not a.attr.startswith("__")}
    stored = {a.attr for a in attributes_of_self(owner) if isinstance(a.ctx, ast.Store)}
    methods = {node.name for node in owner.body if isinstance(node, ast.FunctionDef)}
    assert private - stored - methods == set()
    # Nor is one replaced: our names are no names of theirs.
    theirs = set(re.findall(r"self\.(_\w+)", inspect.getsource(transformers.Trainer))) | set(dir(transformers.Trainer))
    ours = {name for name in stored | methods if name.startswith("_") and not name.startswith("__")}
    assert ours & theirs == set()
    assert len(ours) > 5  # the check sees something
    for call in ast.walk(owner):
        if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Call):
            assert getattr(call.value.func, "id", "") != "super" or not re.match(r"_[^_]", call.attr), call.attr


def test_nobody_else_uses_a_private_attribute_of_a_trainer() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
                holder = ast.unparse(node.value)
                assert not holder.endswith("trainer"), f"{path}:{node.lineno}: {holder}.{node.attr}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name}"


def problems(tree: ast.Module, *, may_print: bool = False) -> list[str]:
    """Calls that the house forbids, with their lines."""
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "print" and not may_print:
                found.append(f"{line}: print")
            runs_code = not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name in ("pickle.load", "pickle.loads", "eval", "exec") or (name == "torch.load" and runs_code):
                found.append(f"{line}: {name}")
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "trust_remote_code" and not (isinstance(value, ast.Constant) and not value.value):
                    found.append(f"{line}: trust_remote_code")
        elif isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            if caught in ("", "Exception", "BaseException") and not any(
                isinstance(child, ast.Raise) for child in ast.walk(node)
            ):
                found.append(f"{line}: except {caught}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_forbidden_call(path: Path) -> None:
    assert problems(TREES[path], may_print=room_of(path) == "cli") == []


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "pickle.loads(b'')",
        "load(trust_remote_code=True)",
        "load(trust_remote_code=flag)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_the_check_of_forbidden_calls_sees_them(code: str) -> None:
    assert len(problems(ast.parse(code))) == 1
