"""One finished run with three checkpoints, shared by all fault tests; who spoils it takes a copy."""

import shutil
from pathlib import Path

import pytest

from faults.children import job, train


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that nothing has disturbed."""
    config = job(tmp_path_factory.mktemp("fault") / "straight", save_total_limit=3)
    assert train(config) == 0, (config.parent / "out.txt").read_text()
    return config


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    """The config of a copy of it that may be spoiled."""
    folder = tmp_path / "copy"
    shutil.copytree(straight.parent, folder)
    for path in (folder / "run.yaml", folder / "run" / "config.yaml"):
        path.write_text(path.read_text().replace(str(straight.parent), str(folder)))
    return folder / "run.yaml"
