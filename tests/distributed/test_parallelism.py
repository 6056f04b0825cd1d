"""What is refused before any work: engines that the anchor could not follow."""

from types import SimpleNamespace
from typing import Any

import pytest

from bondlm.errors import ConfigError
from bondlm.sharding import check_parallelism


def arguments(**given: Any) -> Any:
    return SimpleNamespace(**{"fsdp": "", "fsdp_plugin_args": None, "deepspeed_plugin": None} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": "full_shard", "fsdp_plugin_args": {"fsdp_version": 1}}, "fsdp_version=1"),
        ({"fsdp": "full_shard", "fsdp_plugin_args": {}}, "fsdp_version=1"),
        ({"fsdp": "full_shard", "fsdp_plugin_args": {"fsdp_version": 2, "cpu_offload": True}}, "offloaded to the CPU"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, "DeepSpeed steps its optimizer"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "DeepSpeed steps its optimizer"),
    ],
)
def test_what_the_settings_ask_for(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallelism(arguments(**given))


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"FSDP_VERSION": "1"}, "fsdp_version=1"), ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "offloaded")],
)
def test_what_the_launcher_asks_for(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_parallelism(arguments())


def test_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    check_parallelism(arguments())
    check_parallelism(arguments(fsdp="full_shard", fsdp_plugin_args={"fsdp_version": 2, "cpu_offload": False}))
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), ("FSDP_OFFLOAD_PARAMS", "false")):
        monkeypatch.setenv(name, value)
    check_parallelism(arguments())
