"""The installed package alone: run by the interpreter of an environment that has the wheel (`make test-package`).

Everything happens in a scratch folder, as for somebody who has no checkout; of the checkout only the recipe of a tiny
model and its prompts is read (tests/cli/helpers.py).
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def bondlm(folder: Path, *arguments: str) -> str:
    """Run the console script there; what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(Path(sys.prefix) / "bin" / "bondlm"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def require(holds: bool, what: str) -> None:
    """End with `what` if it does not hold."""
    if not holds:
        raise SystemExit(f"the installed package: {what}")


def check_requirements() -> None:
    """What the wheel asks for, without extras, is there in a version that it takes."""
    for text in requires("bondlm") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = version(requirement.name)
            require(requirement.specifier.contains(found, prereleases=True), f"asks for {text}, and {found} is there")


def main() -> None:
    """The first quarter of an hour of a user, with a tiny model."""
    import bondlm as package

    home = Path(package.__file__).resolve().parent
    require(home.is_relative_to(Path(sys.prefix).resolve()), f"bondlm is imported from {home}, not from the wheel")
    check_requirements()
    require((home / "py.typed").is_file(), "py.typed is missing")
    sys.path.append(str(ROOT / "tests"))
    from cli.helpers import write_job

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = str(write_job(folder, max_steps=2))
        require(bondlm(folder, "--version").split() == ["bondlm", version("bondlm")], "its version is another")
        require("check passed" in bondlm(folder, "check", "--config", config), "check did not pass")
        out = bondlm(folder, "train", "--config", config)
        require("reached: one sample = Best-of-" in out, f"train ended otherwise:\n{out}")
        bondlm(folder, "report", "run", "--output", "page.html")
        require((folder / "page.html").stat().st_size > 50_000, "report wrote no page")
    sys.stdout.write(f"bondlm {version('bondlm')} works from {home}\n")


if __name__ == "__main__":
    main()
