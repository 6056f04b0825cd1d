"""What the package declares: every import has its requirement, and the places that name the version agree."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import yaml

import bondlm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"pyyaml": "yaml", "huggingface_hub": "huggingface_hub"}  # where the name of the module is another
# They come with jinja2 and with datasets.
BROUGHT = {"markupsafe", "pyarrow"}


def names(requirements: list[str]) -> set[str]:
    found = {re.split(r"[\[<>=!~ ]", requirement)[0].lower() for requirement in requirements}
    return {MODULES.get(name, name) for name in found}


def test_every_import_is_required_by_the_package_or_by_an_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = names(PROJECT["dependencies"]) | names(
        [each for name in ("report", "deepspeed") for each in extras[name]]
    )
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for module in {name.split(".")[0] for name in modules}:
                known = {"bondlm", *sys.stdlib_module_names, *declared, *BROUGHT}
                assert module in known, f"{path.relative_to(ROOT)} imports {module}"


def test_the_oldest_versions_are_those_of_the_ranges() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["report"]]:
        name, least = requirement.split(">=")
        assert f"{oldest[name]}.".startswith(f"{least}."), requirement


def test_the_version_is_one() -> None:
    assert bondlm.__version__ == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
