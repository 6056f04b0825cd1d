"""Generation by a vLLM server over HTTP: policy and anchor are two LoRA adapters of one server, drawn in one batch.

(Whole models: `bondlm.engines.vllm.whole`.)

After every optimizer step `sync` writes both adapters to new folders and reloads them under their names. A reload that
silently did nothing would train on stale samples, so each is checked: the server scores a probe text, and must agree
with the trainer's own weights and have moved as they have.

A new folder and a cache salt for each version: vLLM does not drop prefix-cache blocks that an adapter's old weights
computed when it reloads the adapter in place. The salt is also each run's own, since versions are counted from 1 again
by a run that goes on with the same server.

Shapes: P prompts, T tokens.
"""

import copy
import math
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from bondlm.engines.base import Completion, Role
from bondlm.engines.vllm.http import VLLMClient
from bondlm.engines.vllm.server import LocalServer
from bondlm.errors import ConfigError, DataError, EngineError, NonFiniteError
from bondlm.models.facts import vocabulary_size

ADAPTERS: dict[Role, str] = {role: f"bondlm-{role}" for role in ("policy", "anchor", "reference")}
MOVING: tuple[Role, ...] = ("policy", "anchor")
GAP_LIMIT = 0.5  # nats a token (fault N7): beyond rounding, the server holds other weights
STALE_RATIO = 0.25  # a fresh reload moves the probe about as far as the trainer's weights do (1), a stale one not (0)
MAX_REQUESTS = 256  # at a time; the server queues what it cannot run yet


class VLLMEngine:
    """Samples from a vLLM server that serves `use`'s base model and takes adapters at run time."""

    exact = False  # another program's kernels, often in another precision
    sends = "adapter"

    def __init__(
        self,
        client: VLLMClient,
        model: Any,
        adapters: Collection[str],
        use: Callable[[Role], AbstractContextManager[Any]],
        *,
        eos_ids: Sequence[int],
        probe_ids: Sequence[int],
        folder: Path,
        server: LocalServer | None = None,
    ) -> None:
        """Check that the server serves this model, and give it the adapters.

        Args:
            client: the connection.
            model: the PEFT model.
            adapters: the roles that are adapters; another one is the base model.
            use: lends the model of a role in eval mode.
            eos_ids: end a completion.
            probe_ids: a short text whose log-probabilities server and trainer are compared by.
            folder: where adapters are written; the server must see it under the same path.
            server: the process to end with `close`, if it is ours.

        Raises:
            ConfigError: the server cannot be reached, serves another model or cannot take the adapters.
        """
        self._client, self._model, self._adapters, self._use = client, model, adapters, use
        self._eos_ids, self._probe_ids, self._folder, self._server = list(eos_ids), list(probe_ids), folder, server
        self._vocab_size = vocabulary_size(model.config)
        # Weights in 16 bits round a small step away: only a larger move of the probe says that the server must move.
        self._noise = 1e-5 if model.dtype == torch.float32 else 1e-2
        self._gap_limit = GAP_LIMIT
        self._version, self._run = 0, secrets.token_hex(4)
        self._moved: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # probe of trainer and server when last it moved
        self.probe_gap: dict[Role, float] = {}  # mean absolute gap of the last probe, nats a token
        self.on_prompts_done: Callable[[int], object] | None = None  # told how many more prompts are finished
        self._base, self.max_model_len = client.base_model()
        self._start()

    def _start(self) -> None:
        """The first probe of each role: a mismatch now is a wrong server, not a stale one."""
        if "reference" not in self._adapters:
            try:
                gap = self._probe("reference")[0]
            except EngineError as error:
                raise ConfigError(f"the vLLM server at {self._client.url} does not fit: {error}") from error
            if not gap <= GAP_LIMIT:
                raise ConfigError(
                    f"the vLLM server at {self._client.url} serves {self._base!r}, another model than the trainer's: "
                    f"their log-probabilities of a probe text differ by {gap:.3f} nats a token (limit {GAP_LIMIT}). "
                    f"Start it with --model {self._model.config._name_or_path!r}"
                )
        else:
            self._reload("reference")
        self.sync()

    def sync(self) -> None:
        """Give the server the weights of policy and anchor as they are now.

        Raises:
            EngineError: after two tries the server still scores the probe text otherwise than the trainer.
            ResourceError: the server does not answer any more.
        """
        self._version += 1
        for role in MOVING:
            self._reload(role)

    def _reload(self, role: Role) -> None:
        ours = self._own_logprobs(role)
        problem = ""
        for attempt in (1, 2):
            path = self._folder / f"{role}-{self._version:06d}-{attempt}"
            self._send(role, path)
            gap, theirs = self._probe(role, ours)
            problem = self._mismatch(self._name(role), gap, ours, theirs)
            if not problem:
                self._keep_only(role, path)
                return
        raise EngineError(
            f"{role} {self.sends}, reload {self._version}: {problem}. It was reloaded twice from {str(path)!r}. "
            "Restart the server and resume from the last checkpoint; does another run use the same server?"
        )

    def _mismatch(self, name: str, gap: float, ours: np.ndarray, theirs: np.ndarray) -> str:
        """Why the server cannot hold our weights under `name`; empty if it may."""
        if not gap <= self._gap_limit:
            limit = f"{self._gap_limit:.2g}"
            return f"server and trainer differ by {gap:.2g} nats a token on a probe text (limit {limit})"
        if name in self._moved:
            our_move, their_move = (
                float(np.abs(now - before).mean())
                for now, before in zip((ours, theirs), self._moved[name], strict=True)
            )
            if our_move <= self._noise:
                return ""  # compared with the same point next time, so that small moves add up
            if their_move < STALE_RATIO * our_move:
                return (
                    f"the reload did nothing: the probe text's log-probabilities moved by {our_move:.2e} nats a token "
                    f"in the trainer, by {their_move:.2e} on the server"
                )
        self._moved[name] = (ours, theirs)
        return ""

    @torch.no_grad()
    def _own_logprobs(self, role: Role) -> np.ndarray:
        """Log-probabilities (T - 1) of the probe text under the trainer's weights."""
        with self._use(role) as model:
            ids = torch.tensor([self._probe_ids], device=model.device)
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
            return logprobs.gather(1, ids[0, 1:, None]).squeeze(1).double().cpu().numpy()

    def _probe(self, role: Role, ours: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """Mean absolute gap between server and trainer on the probe text, and the server's log-probabilities."""
        ours = self._own_logprobs(role) if ours is None else ours
        theirs = np.asarray(self._client.prompt_logprobs(self._name(role), self._probe_ids, self._salt(role)))
        self.probe_gap[role] = float(np.abs(ours - theirs).mean())
        return self.probe_gap[role], theirs

    def _send(self, role: Role, path: Path) -> None:
        """Write the role's weights into the folder `path` and have the server load them."""
        path.mkdir(parents=True, exist_ok=True)
        name = self._model.active_adapter
        config: PeftConfig = copy.deepcopy(self._model.peft_config[name])
        config.inference_mode = True
        config.save_pretrained(str(path))
        with self._use(role):  # it has the role's values in the policy's place
            state = get_peft_model_state_dict(self._model, adapter_name=name)
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path / "adapter_model.safetensors")
        self._client.load_adapter(ADAPTERS[role], path)

    def _keep_only(self, role: Role, path: Path) -> None:
        for old in self._folder.glob(f"{role}-*"):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)

    def _name(self, role: Role) -> str:
        return ADAPTERS[role] if role in self._adapters else self._base

    def _salt(self, role: Role) -> str:
        return f"{self._run}-{role}-{self._version if role in MOVING else 0}"

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
        """Draw for several roles at once: role -> (samples of a prompt, a seed for each prompt).

        All requests are under way together, so that the server decodes both adapters' rows in one batch. A sample's
        numbers are repeatable up to the rounding of such a batch.

        Raises:
            DataError: a prompt does not fit into the server's context.
            ResourceError: the server does not answer in time, after retries.
            EngineError: an answer that is not one to the request.
            NonFiniteError: a log-probability that is not finite.
        """
        for i, prompt in enumerate(prompts):
            if len(prompt) + max_new_tokens > self.max_model_len:
                raise DataError(
                    f"prompt {i} has {len(prompt)} tokens; with max_completion_length={max_new_tokens} it is longer "
                    f"than the vLLM server's context of {self.max_model_len} tokens: shorten it, or start the server "
                    "with a larger --max-model-len"
                )
        jobs = [(role, i) for role, (count, _) in wanted.items() if count for i in range(len(prompts))]

        def run(job: tuple[Role, int]) -> None:
            role, i = job
            count, seeds = wanted[role]
            body = self._request(role, prompts[i], count, seeds[i], max_new_tokens, temperature)
            completions = self._completions(self._client.complete(body), prompts[i], count, max_new_tokens)
            drawn[role][i] = completions
            if self.on_prompts_done is not None:
                self.on_prompts_done(1)

        drawn: dict[Role, list[list[Completion]]] = {role: [[] for _ in prompts] for role in wanted}
        # Daemon threads: after an error nobody waits for the other answers, not even the interpreter at its exit (it
        # would for an executor's threads, up to `vllm_timeout`).
        pool = ThreadPool(max(1, min(MAX_REQUESTS, len(jobs))))
        try:
            for _ in pool.imap_unordered(run, jobs):  # whichever comes first, so that the first error ends it
                pass
        finally:
            pool.terminate()
        return drawn

    def _request(
        self, role: Role, prompt: Sequence[int], count: int, seed: int, max_new_tokens: int, temperature: float
    ) -> dict[str, Any]:
        """The model's own distribution: what a server may take from generation_config.json is set off, one by one."""
        return {
            "model": self._name(role),
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
            "ignore_eos": True,  # the server's own list; ours follows
            "stop_token_ids": self._eos_ids,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "cache_salt": self._salt(role),
        }

    def _completions(
        self, choices: list[Any], prompt: Sequence[int], count: int, max_new_tokens: int
    ) -> list[Completion]:
        """The answer's samples in their order, each checked: a wrong one must not be learned from."""
        where = f"the vLLM server at {self._client.url}"
        if sorted(_get(c, "index") for c in choices) != list(range(count)):
            raise EngineError(f"{where} sent {len(choices)} samples, {count} were asked for")
        completions = []
        for choice in sorted(choices, key=lambda c: int(c["index"])):
            ids, logprobs = _get(choice, "token_ids"), _get(choice.get("logprobs"), "token_logprobs")
            if _get(choice, "prompt_token_ids") != list(prompt):
                raise EngineError(f"{where} answered another prompt than it was sent (it re-tokenised or cut it)")
            if not ids or len(ids) != len(logprobs) or len(ids) > max_new_tokens:
                raise EngineError(f"{where} sent {len(ids)} tokens with {len(logprobs)} log-probabilities")
            if not all(isinstance(t, int) and 0 <= t < self._vocab_size for t in ids):
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
        """End the connection, and the server if it is ours."""
        self._client.close()
        if self._server is not None:
            self._server.stop()


def _get(answer: Any, key: str) -> Any:
    if not isinstance(answer, dict) or answer.get(key) is None:
        raise EngineError(f"the vLLM server's answer has no {key!r}: bondlm needs vLLM 0.22 or newer")
    return answer[key]
