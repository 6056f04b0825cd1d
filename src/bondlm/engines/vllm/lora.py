"""Generation by vLLM servers over HTTP: policy, anchor and reference are LoRA adapters of a server, drawn in one batch.

(Whole models: `bondlm.engines.vllm.whole`.)

After every optimizer step `sync` writes both adapters to new folders, and each server reloads them under their names,
which are the run's own, so that runs can share a server; a probe text verifies the reload
(`bondlm.engines.vllm.served`).

A reference that is the base model is also served as an adapter, of zeros: on a CPU, vLLM 0.32 gives a row without an
adapter the adapter of its last slot if another row of the batch has an adapter.

Each version has its own folder and cache salt, because prefix-cache blocks computed with an adapter's old weights must
not be used with the new ones. The salt is also different for each run, since a run that continues with the same server
counts versions from 1 again.

With several processes, the main one writes. The first process that draws from a server gives it the weights and probes
it; all processes know the result before any of them continues (`bondlm.engines.together`).

Shapes: P prompts, T tokens.
"""

import math
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file

from bondlm.engines.base import Completion, Role
from bondlm.engines.together import Processes, together
from bondlm.engines.vllm.http import VLLMClient, of_answer
from bondlm.engines.vllm.served import GAP_LIMIT, Served
from bondlm.engines.vllm.server import LocalServer
from bondlm.errors import ConfigError, DataError, EngineError, NonFiniteError, ResourceError
from bondlm.models.adapters import plain_lora
from bondlm.models.facts import vocabulary_size

MOVING: tuple[Role, ...] = ("policy", "anchor")
UP = ".lora_B.weight"
MAX_REQUESTS = 256  # at a time; the server queues those that it cannot run yet


class VLLMEngine:
    """Samples from vLLM servers that serve `use`'s base model and take adapters at run time.

    Every process of a run must make the same calls in the same order.
    """

    exact = False  # another program's kernels, often in another precision
    sends = "adapter"

    def __init__(
        self,
        clients: Sequence[VLLMClient],
        model: Any,
        adapters: Collection[str],
        use: Callable[[Role], AbstractContextManager[Any]],
        *,
        processes: Processes,
        eos_ids: Sequence[int],
        probe_ids: Sequence[int],
        folder: Path,
        server: LocalServer | None = None,
        sleeps: bool = False,
    ) -> None:
        """Check that the servers serve this model, and give them the adapters.

        Args:
            clients: connections to the servers that this process draws from; other processes may use the same servers.
            model: the PEFT model.
            adapters: the roles that are adapters; a reference that is not among them is the base model.
            use: lends the model of a role in eval mode.
            processes: of the run.
            eos_ids: end a completion.
            probe_ids: a short text; its log-probabilities on server and trainer are compared.
            folder: where adapters are written; every server must see the folder under the same path.
            server: the server process that `close` ends, if it is ours.
            sleeps: the servers share a GPU with the trainer, and release their memory while nothing is drawn.

        Raises:
            ConfigError: a server cannot be reached, serves another model or cannot take the adapters.
        """
        self._model, self._adapters, self._use, self._processes = model, adapters, use, processes
        self._eos_ids, self._probe_ids, self._folder, self._server = list(eos_ids), list(probe_ids), folder, server
        self._vocab_size = vocabulary_size(model.config)
        self._sleeps, self._is_asleep = sleeps, False
        self._version, self._run = 0, processes.gather_objects([secrets.token_hex(4)])[0]
        self.probe_gap: dict[Role, float] = {}  # largest mean gap of the servers probed here, nats per token
        self.on_prompts_done: Callable[[int], object] | None = None  # called with the number of newly finished prompts
        with together(processes):
            self._servers = [Served(client, self._probe_ids) for client in clients]
        drawing = processes.gather_objects([(s.client.url, processes.rank) for s in self._servers])
        first = {url: rank for url, rank in reversed(drawing)}
        self._kept = [s for s in self._servers if first[s.client.url] == processes.rank]  # those we give weights to
        contexts = processes.gather_objects([(s.max_model_len, s.client.url) for s in self._servers])
        self.max_model_len, self.shortest = min(contexts)
        del self._probe_ids[self.max_model_len - 1 :]  # the servers hold the same list; one more token is drawn
        for served in self._servers if getattr(model.config, "quantization_config", None) else ():
            served.gap_limit = GAP_LIMIT  # no server rounds its base as the trainer does
        self._start()
        self._sleep()

    def _start(self) -> None:
        """The first probe of each role: a mismatch now means a wrong server, not a stale one."""
        if "reference" not in self._adapters:
            with self._use("reference") as model:
                ours = self._own_logprobs(model)
            with together(self._processes):
                for server in self._kept:
                    server.require_model(ours, f"{self._run}-base", self._model.config._name_or_path)
        self._reload("reference")
        for server in self._kept:
            server.take_first_gap()
        self.sync()

    def sync(self) -> None:
        """Give the servers the current weights of policy and anchor.

        Raises:
            EngineError: after two tries a server still scores the probe text differently from the trainer.
            ResourceError: a server no longer answers, or the disk is full.
        """
        self._wake()
        self._version += 1
        for role in MOVING:
            self._reload(role)

    def _wake(self) -> None:
        """Wake the servers, if they sleep; before that the trainer releases the memory that it only caches."""
        if not self._is_asleep:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        with together(self._processes):
            _at_once(lambda server: server.client.wake_up(), self._kept)
        self._is_asleep = False

    def _sleep(self) -> None:
        """Make the servers release their memory until they are woken."""
        if not self._sleeps:
            return
        self._is_asleep = True
        with together(self._processes):
            _at_once(lambda server: server.client.sleep(), self._kept)

    def _give_again(self, roles: Iterable[Role]) -> None:
        """Reload what the servers may have lost while asleep, with a probe of each role."""
        for role in roles:
            self._reload(role)

    def _reload(self, role: Role) -> None:
        with self._use(role) as model:
            ours = self._own_logprobs(model)
            path = self._written(role, model)
        self._give(role, path, ours)

    def _written(self, role: Role, model: Any) -> Path:
        """The folder with the role's weights from `model`, written by the main process."""
        path = self._folder / f"{role}-{self._version:06d}-1"
        with together(self._processes):
            if self._processes.rank == 0:
                try:
                    self._write(role, model, path)
                except (OSError, SafetensorError) as error:
                    raise ResourceError(
                        f"cannot write the {role}'s {self.sends} for the vLLM server into {str(path)!r}: {error}"
                    ) from error
        return path

    def _give(self, role: Role, path: Path, ours: np.ndarray) -> None:
        """Make every server load the folder, and check that it scores the probe text as the trainer does (`ours`)."""
        left = self._kept
        for attempt in (1, 2):
            if attempt == 2:  # under a new name, so that nothing cached for the old one can be used
                path = self._renamed(path)
            with together(self._processes):
                found = self._reloaded(left, role, path, ours)
            self._note_gap(role)
            left = [server for server, _ in found]
            problems = self._processes.gather_objects([f"{server.client.url}: {why}" for server, why in found])
            if not problems:
                if self._processes.rank == 0:
                    self._keep_only(role, path)
                return
        failure = EngineError(
            f"{role} {self.sends}, reload {self._version}: {problems[0]}. It was reloaded twice from {str(path)!r}. "
            "Restart the server and resume from the last checkpoint; does another run use the same server?"
        )
        failure.known_to_all = True
        raise failure

    def _note_gap(self, role: Role) -> None:
        self.probe_gap[role] = max([server.gap for server in self._kept], default=0.0)

    def _reloaded(
        self, servers: Sequence[Served], role: Role, path: Path, ours: np.ndarray
    ) -> list[tuple[Served, str]]:
        """The servers that do not hold the role's weights although they have loaded the folder, and why."""

        def reload(server: Served) -> tuple[Served, str]:
            self._load(role, server, path)
            return server, server.mismatch(*self._names(role, server), ours)

        return [(server, why) for server, why in _at_once(reload, servers) if why]

    def _renamed(self, path: Path) -> Path:
        again = path.with_name(f"{path.name[:-1]}2")
        with together(self._processes):
            if self._processes.rank == 0:
                shutil.rmtree(again, ignore_errors=True)  # left by a run that failed here
                try:
                    path.rename(again)
                except OSError as error:
                    raise ResourceError(f"{str(path)!r} is gone while a vLLM server reads it: {error}") from error
        return again

    @torch.no_grad()
    def _own_logprobs(self, model: Any) -> np.ndarray:
        """Log-probabilities (T - 1) of the probe text under a role's model."""
        ids = torch.tensor([self._probe_ids], device=model.device)
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
        return logprobs.gather(1, ids[0, 1:, None]).squeeze(1).double().cpu().numpy()

    def _write(self, role: Role, model: Any, path: Path) -> None:
        """Write the role's adapter in PEFT's format, with the weights of `model`; zeros if the role is the base.

        Each layer's scaling goes into its weights, since not every server has one per layer: vLLM 0.22 drops
        `alpha_pattern` and `rank_pattern` without a word.
        """
        path.mkdir(parents=True, exist_ok=True)
        name = self._model.active_adapter
        weights = {f"base_model.model.{n}": p.detach() for n, p in model.named_parameters()}
        state = get_peft_model_state_dict(self._model, weights, name, save_embedding_layers=False)
        scaling = {n: m.scaling[name] for n, m in self._model.named_modules() if isinstance(m, LoraLayer)}
        for up in [key for key in state if key.endswith(UP)]:
            state[up] = state[up] * (scaling[up.removesuffix(UP)] if role in self._adapters else 0.0)
        rank = max(state[up].shape[1] for up in state if up.endswith(UP))
        plain_lora(self._model.peft_config[name], rank).save_pretrained(str(path))
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, path / "adapter_model.safetensors")

    def _load(self, role: Role, server: Served, path: Path) -> None:
        server.client.load_adapter(self._names(role, server)[0], path)

    def _keep_only(self, role: Role, path: Path) -> None:
        for old in self._folder.glob(f"{role}-*"):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

    def _names(self, role: Role, server: Served) -> tuple[str, str]:
        """The name of the role's model on the server, and its cache salt."""
        return f"bondlm-{self._run}-{role}", f"{self._run}-{role}-{self._version if role in MOVING else 0}"

    # -- drawing

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        *,
        role: Role,
        max_new_tokens: int,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> list[list[Completion]]:
        """`generate_roles` for one role."""
        drawn = self.generate_roles(
            prompts, {role: (num_samples, seeds)}, max_new_tokens=max_new_tokens, temperature=temperature
        )
        return drawn[role]

    def generate_roles(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Mapping[Role, tuple[int, Sequence[int]]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> dict[Role, list[list[Completion]]]:
        """Draw for several roles at once: role -> (samples per prompt, a seed for each prompt); then sleep.

        All requests are sent together, so that the server decodes both adapters' rows in one batch. A sample's numbers
        are repeatable up to the rounding of such a batch.

        Raises:
            DataError: a prompt does not fit into the server's context.
            ResourceError: the server does not answer in time, after retries.
            EngineError: the answer does not fit the request.
            NonFiniteError: a log-probability that is not finite.
        """
        if self._is_asleep:
            self._wake()
            self._give_again(wanted)
        try:
            drawn = self._drawn(prompts, wanted, max_new_tokens, temperature)
        except ConfigError as error:  # on all processes
            if "HTTP 404" not in str(error):
                raise
            self._give_again(wanted)  # a server that was started anew: each step sends only what moves
            drawn = self._drawn(prompts, wanted, max_new_tokens, temperature)
        self._sleep()
        return drawn

    def _drawn(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Mapping[Role, tuple[int, Sequence[int]]],
        max_new_tokens: int,
        temperature: float,
    ) -> dict[Role, list[list[Completion]]]:
        drawn: dict[Role, list[list[Completion]]] = {role: [[] for _ in prompts] for role in wanted}

        def run(job: tuple[Role, int]) -> None:
            role, i = job
            count, seeds = wanted[role]
            server = self._servers[i % len(self._servers)]
            body = self._request(*self._names(role, server), prompts[i], count, seeds[i], max_new_tokens, temperature)
            choices = server.client.complete(body)
            drawn[role][i] = self._completions(server.client.url, choices, prompts[i], count, max_new_tokens)
            if self.on_prompts_done is not None:
                self.on_prompts_done(1)

        with together(self._processes):
            self._check_lengths(prompts, max_new_tokens)
            _at_once(run, [(role, i) for role, (count, _) in wanted.items() if count for i in range(len(prompts))])
        return drawn

    def _check_lengths(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        for i, prompt in enumerate(prompts):
            if len(prompt) + max_new_tokens > self.max_model_len:
                raise DataError(
                    f"prompt {i} has {len(prompt)} tokens; with max_completion_length={max_new_tokens} it is longer "
                    f"than the context of {self.max_model_len} tokens of the vLLM server at {self.shortest}: shorten "
                    "it, or start the server with a larger --max-model-len"
                )

    def _request(
        self,
        name: str,
        salt: str,
        prompt: Sequence[int],
        count: int,
        seed: int,
        max_new_tokens: int,
        temperature: float,
    ) -> dict[str, Any]:
        """Request the model's own distribution: all options that could come from generation_config.json are set off."""
        return {
            "model": name,
            "prompt": list(prompt),
            "n": count,
            "seed": int(seed) >> 2,  # the server adds a sample's number to it, in 63 bits
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "watermarking": False,
            "ignore_eos": True,  # that is the server's own list; ours follows
            "stop_token_ids": self._eos_ids,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "cache_salt": salt,
        }

    def _completions(
        self, url: str, choices: list[Any], prompt: Sequence[int], count: int, max_new_tokens: int
    ) -> list[Completion]:
        """The samples of the answer in order, each checked, since a wrong sample must not be learned from."""
        where = f"the vLLM server at {url}"
        places = [of_answer(c, "index") for c in choices]
        if not all(type(place) is int for place in places) or sorted(places) != list(range(count)):
            raise EngineError(f"{where} sent samples {places}, {count} were asked for")
        completions = []
        for choice in sorted(choices, key=lambda c: c["index"]):
            ids, logprobs = of_answer(choice, "token_ids"), of_answer(choice.get("logprobs"), "token_logprobs")
            if of_answer(choice, "prompt_token_ids") != list(prompt):
                raise EngineError(f"{where} answered another prompt than it was sent (it re-tokenised or cut it)")
            if not isinstance(ids, list) or not isinstance(logprobs, list):
                raise EngineError(f"{where} sent token_ids={ids!r}, token_logprobs={logprobs!r}: these are no lists")
            if not ids or len(ids) != len(logprobs) or len(ids) > max_new_tokens:
                raise EngineError(f"{where} sent {len(ids)} tokens with {len(logprobs)} log-probabilities")
            if not all(type(t) is int and 0 <= t < self._vocab_size for t in ids):
                raise EngineError(f"{where} sent token ids outside the vocabulary of {self._vocab_size}")
            if any(t in self._eos_ids for t in ids[:-1]):
                raise EngineError(f"{where} went on after an end-of-sequence token ({self._eos_ids})")
            if not all(isinstance(x, int | float) and math.isfinite(x) and -9000 < x <= 1e-3 for x in logprobs):
                raise NonFiniteError(f"{where} sent a log-probability that is not one: {logprobs[:8]}")
            finished = ids[-1] in self._eos_ids
            if not finished and len(ids) < max_new_tokens:
                raise EngineError(
                    f"{where} stopped a sample after {len(ids)} of {max_new_tokens} tokens without an end-of-sequence "
                    f"token (finish_reason={choice.get('finish_reason')!r})"
                )
            completions.append(Completion(ids, [float(x) for x in logprobs], finished))
        return completions

    def close(self) -> None:
        """End the connections, and the server if it is ours."""
        for server in self._servers:
            server.client.close()
        if self._server is not None:
            self._server.stop()


def _at_once(work: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    """The results of `work` for all jobs, run at the same time, in any order.

    It uses daemon threads: after an error nothing waits for the other answers, not even the interpreter at exit (which
    would wait up to `vllm_timeout` for an executor's threads).
    """
    pool = ThreadPool(max(1, min(MAX_REQUESTS, len(jobs))))
    try:
        return list(pool.imap_unordered(work, jobs))  # in order of completion, so that the first error ends it
    finally:
        pool.terminate()
