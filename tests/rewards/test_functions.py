import math

import pytest

from bondlm.errors import ConfigError
from bondlm.rewards import load_function

SOURCE = """
from dataclasses import dataclass
calls = []
limit = 3
def short(completions, **kwargs):
    calls.append(len(completions))
    return [-float(len(text)) for text in completions]
def seen(completions, **kwargs):
    return [float(len(calls))] * len(completions)
@dataclass
class Judge:
    level: int = 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    return tmp_path


def test_a_module_is_imported():
    assert load_function("math:sqrt") is math.sqrt


@pytest.mark.parametrize("form", ["my_rewards.py:short", "./my_rewards.py:short", "{folder}/my_rewards.py:short"])
def test_a_file_is_relative_to_the_working_directory(folder, form):
    assert load_function(form.format(folder=folder))(["abc"]) == [-3.0]


def test_functions_of_one_file_share_its_state(folder):
    load_function("my_rewards.py:short")(["a"])
    assert load_function("./my_rewards.py:seen")(["a"]) == [1.0]


def test_an_edited_file_is_read_again(folder):
    """In a notebook the old function went on scoring, while the run recorded the hash of the new file."""
    before = load_function("my_rewards.py:short")
    (folder / "my_rewards.py").write_text(SOURCE.replace("-float", "+float"))  # of the same size, in the same second
    assert load_function("my_rewards.py:short")(["abc"]) == [3.0]
    assert load_function("my_rewards.py:seen")(["a"]) == [1.0]  # the edited file's own state
    assert before(["abc"]) == [-3.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_rewards.py", "module:function"),
        ("my_rewards.py:", "module:function"),
        (":short", "module:function"),
        ("my_rewards.py:not a name", "module:function"),
        ("absent.py:short", r"/absent\.py"),
        (
            "my_rewards.py:short,my_rewards.py:seen",
            r"a list is written '\[my_rewards\.py:short, my_rewards\.py:seen\]'",
        ),
        ("my_rewards.py:absent", "'absent'.*Judge, dataclass, seen, short"),
        ("my_rewards.py:limit", "a number called 'limit'"),
        ("no_such_module:short", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_rewards:short", r"'my_rewards\.py:short'"),
    ],
)
def test_refusals_say_what_was_tried(folder, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_function(spec)


def test_a_file_that_fails_keeps_its_traceback_and_can_be_mended(folder):
    file = folder / "broken.py"
    file.write_text("import nothing_of_that_name\ndef f(completions): return [1.0]\n")
    with pytest.raises(ConfigError, match="ModuleNotFoundError: No module named 'nothing_of_that_name'") as caught:
        load_function("broken.py:f")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    file.write_text("def f(completions): return [1.0, 2.0]\n# longer than before\n")
    assert load_function("broken.py:f")([]) == [1.0, 2.0]
