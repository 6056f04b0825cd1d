import asyncio
import gc
import threading
import time
import traceback
import warnings
from functools import partial

import pytest
import torch

from bondlm.errors import ConfigError, ResourceError, RewardError, RewardOutageError
from bondlm.rewards import NamedReward, RankReward, by_pairs, load_rewards, score
from bondlm.rewards.calls import call_all

COLUMNS = {"solution": ["4", "5"], "completion_ids": [[1, 2], [3]], "truncated": [False, True]}


def run(*functions, columns=COLUMNS):
    rewards = [NamedReward(f"r{number}", function) for number, function in enumerate(functions)]
    return score(rewards, ["p", "q"], ["c", "dd"], columns)


def test_each_function_gets_the_arguments_that_it_accepts():
    seen = {}

    def only_completions(completions):
        seen["completions"] = completions
        return [0.0, 0.0]

    def one_column(prompts, completions, *, solution, missing="default"):
        seen["one"] = (prompts, completions, solution, missing)
        return [0.0, 0.0]

    def trl_style(completions, solution, **kwargs):
        seen["all"] = sorted(kwargs)
        return [0.0, 0.0]

    class Judge:
        def __call__(self, truncated, completion_ids, **columns):
            seen["object"] = (truncated, completion_ids)
            return [0.0, 0.0]

    def bound(completions, bonus, solution):
        seen["partial"] = (bonus, solution)
        return [0.0, 0.0]

    run(only_completions, one_column, trl_style, Judge(), partial(bound, bonus=3))
    assert seen == {
        "completions": ["c", "dd"],
        "one": (["p", "q"], ["c", "dd"], ["4", "5"], "default"),
        "all": ["completion_ids", "log_extra", "log_metric", "prompts", "trainer_state", "truncated"],
        "object": ([False, True], [[1, 2], [3]]),
        "partial": (3, ["4", "5"]),
    }


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, reference: [], "'reference'.*solution"),
        (lambda p, c: [], "'p'.*prompts, completions"),
    ],
)
def test_an_argument_that_is_not_there_is_a_config_error(function, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(function)
    assert "reward 'r0'" in str(caught.value)


def test_a_function_cannot_spoil_the_arguments_of_the_next():
    def destructive(completions):
        completions.clear()
        return [1.0, 1.0]

    assert run(destructive, lambda completions: [len(text) for text in completions]).total.tolist() == [2.0, 3.0]


async def fails_later(completions):
    await asyncio.sleep(0)
    raise KeyError("answer")


def fails_at_once(completions):
    raise KeyError("answer")


def fails_while_read(completions):
    for text in completions:
        yield text["score"]


async def fails_while_read_later(completions):
    return (text["score"] for text in completions)


@pytest.mark.parametrize(
    "function",
    [
        fails_while_read,
        fails_while_read_later,
        lambda completions: map(lambda text: text["score"], completions),
        RankReward(fails_while_read),
        RankReward(fails_while_read_later),
        by_pairs(lambda first, second: fails_while_read(first)),
    ],
)
def test_what_an_iterator_raises_is_the_functions_error(function):
    """It left as it was, without the reward's name, or was taken for a bad ranking."""
    for allow_bad_rows in (False, True):
        with pytest.raises(RewardError, match=r"reward 'r' raised TypeError: string indices"):
            score([NamedReward("r", function)], ["p"] * 2, ["a", "b"], groups=[0, 0], allow_bad_rows=allow_bad_rows)


def test_an_iterator_is_an_answer():
    assert run(lambda completions: (len(text) for text in completions)).total.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("function", [fails_at_once, fails_later])
def test_a_raise_keeps_the_users_traceback(function):
    with pytest.raises(RewardError, match=r"'r0'.*KeyError: 'answer'") as caught:
        run(function)
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError)
    assert traceback.extract_tb(cause.__traceback__)[-1].name == function.__name__


def out_of_memory(completions):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def own_error(completions):
    raise ConfigError("no column")


@pytest.mark.parametrize(
    ("function", "error", "code"), [(out_of_memory, ResourceError, 7), (own_error, ConfigError, 2)]
)
def test_memory_and_own_errors_keep_their_exit_code(function, error, code):
    with pytest.raises(error, match="reward 'r0'") as caught:
        run(function)
    assert caught.value.exit_code == code


def test_ctrl_c_is_not_turned_into_a_reward_error():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)


@pytest.mark.parametrize("code", [0, "go away"])
def test_sys_exit_in_a_reward_is_its_error(code):
    def leaves(completions):
        raise SystemExit(code)

    with pytest.raises(RewardError, match=f"SystemExit.*{code}"):
        run(leaves)


def test_sys_exit_in_an_async_reward_does_not_leave_the_caller_waiting():
    async def leaves(completions):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="SystemExit"):
        run(leaves)
    assert run(slow(0.0, 1.0)).total.tolist() == [1.0, 1.0]  # and the loop still runs


def slow(seconds, value):
    async def reward(completions):
        await asyncio.sleep(seconds)
        return [value] * len(completions)

    return reward


def test_async_rewards_keep_their_places_whichever_is_first():
    scores = run(slow(0.1, 1.0), lambda completions: [2.0, 2.0], slow(0.0, 3.0))
    assert [values.tolist() for values in scores.by_name.values()] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_two_async_rewards_meet():
    """Neither can finish unless the other runs: no clock needed."""
    meeting: dict[str, asyncio.Event] = {}

    def reward(mine, other):
        async def wait(completions):
            meeting.setdefault(mine, asyncio.Event()).set()
            await asyncio.wait_for(meeting.setdefault(other, asyncio.Event()).wait(), timeout=5)
            return [1.0, 1.0]

        return wait

    assert run(reward("a", "b"), reward("b", "a")).total.tolist() == [2.0, 2.0]


def test_works_inside_a_running_event_loop():
    async def notebook_cell():
        return run(slow(0.0, 2.0)).total.tolist()

    assert asyncio.run(notebook_cell()) == [2.0, 2.0]


def test_all_calls_share_one_loop_so_that_a_kept_client_stays_usable():
    loops = []

    async def client(completions):
        loops.append((asyncio.get_running_loop(), threading.current_thread()))
        return [0.0, 0.0]

    run(client)
    run(client)
    assert loops[0] == loops[1]
    assert loops[0][1].daemon


def test_a_failure_cancels_the_others():
    cancelled = threading.Event()

    async def patient(completions):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    start = time.perf_counter()
    with pytest.raises(RewardError, match="KeyError"):
        run(patient, fails_later)
    assert cancelled.wait(timeout=5)
    assert time.perf_counter() - start < 10


def test_a_failing_plain_function_leaves_no_unawaited_coroutine():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(RewardError, match=r"'r1'.*KeyError") as caught:
            run(slow(0.0, 1.0), fails_at_once)
        del caught  # its traceback holds the coroutine
        gc.collect()
    assert [str(warning.message) for warning in seen if "never awaited" in str(warning.message)] == []


def test_async_values_pass_the_same_checks():
    with pytest.raises(RewardError, match=r"'r0'.*nan.*row 0"):
        run(slow(0.0, float("nan")))


def test_an_asynchronous_function_has_a_limit() -> None:
    async def sleeps(completions: list[str]) -> list[float]:
        await asyncio.sleep(30)
        return [0.0] * len(completions)

    async def fails(completions: list[str]) -> list[float]:
        raise TimeoutError("my own")

    offered = {"prompts": ["p"], "completions": ["c"]}
    began = time.monotonic()
    with pytest.raises(RewardOutageError, match=r"'sleeps'.*0\.2 s.*reward_timeout_s"):
        call_all([("sleeps", sleeps)], offered, {"sleeps": 0.2})
    assert time.monotonic() - began < 10
    with pytest.raises(RewardError, match="TimeoutError: my own"):
        call_all([("fails", fails)], offered, {"fails": 5.0})
    (loaded,) = load_rewards(sleeps, timeout=0.2)
    with pytest.raises(RewardOutageError):
        score([loaded], ["p"], ["c"])


@pytest.mark.parametrize("ranks", [False, True])
def test_what_a_reward_does_to_its_arguments_stays_with_it(ranks):
    """Messages, columns, and rows that share an object: the next reward and the caller see them as they were."""
    message = [{"role": "user", "content": "hello"}]
    prompts, completions = [message, message], [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    columns = {"answers": [["x"], ["y"]], "meta": [{"keys": [1]}, {"keys": [2]}]}
    before, seen = repr((prompts, completions, columns)), []

    def vandal(completions, answers, meta, prompts=(), prompt=None):
        for row in [prompt] if ranks else prompts:
            row[-1]["content"] += "!"
            seen.append(row[-1]["content"])
        for row in completions:
            row[0]["content"] = "spoilt"
            row.clear()
        for row, each in [(answers, meta)] if ranks else zip(answers, meta, strict=True):
            row.append("z")
            each["keys"].append(3)
        return [1.0] * len(completions)

    def witness(prompts, completions, answers, meta):
        assert repr((prompts, completions, {"answers": answers, "meta": meta})) == before
        return [2.0] * len(prompts)

    first = NamedReward("vandal", RankReward(vandal) if ranks else vandal)
    score([first, NamedReward("witness", witness)], prompts, completions, columns, groups=[0, 1])
    assert seen == ["hello!"] * 2
    assert repr((prompts, completions, columns)) == before
