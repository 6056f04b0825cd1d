"""Full fine-tuning over vLLM servers, whose weights are replaced before each role draws.

A server gets the policy's weights and draws its samples, then the anchor's weights and its samples. Two servers would
need twice the memory and draw no faster on the device that they share. The weights go through a folder:
`reload_weights(weights_path=...)`, called by vLLM's route `/collective_rpc`, works without a GPU that both sides can
reach, unlike vLLM's routes for NCCL and CUDA IPC, and was found to work as documented (docs/vllm.md). Each reload is
checked by the log-probabilities of the probe text, as for an adapter.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from bondlm.engines.base import Completion, Role
from bondlm.engines.together import together
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.engines.vllm.served import Served
from bondlm.errors import ConfigError
from bondlm.models.facts import hidden_size, vocabulary_size

DIGEST_WORDS = 2**20  # at a time
ROOM = 1.1  # for weights in fp32 that are not of linear layers, and the files' other parts
ONE_FILE = "100TB"  # vLLM would not read another file next to a sharded checkpoint with an index


class WholeModelEngine(VLLMEngine):
    """Samples from servers that hold the weights of one role at a time, the one that draws.

    No process continues with the next role while another process still draws.
    """

    sends = "weights"

    def _start(self) -> None:
        """The first reload must work; until then servers started as recommended hold random weights."""
        self._held: tuple[int, ...] | None = None  # digest of the weights on the servers
        self._hold("policy")
        for server in self._kept:
            server.take_first_gap()

    def sync(self) -> None:
        """Do nothing yet: a server holds one role's weights at a time, and gets them when the role draws."""

    def _give_again(self, roles: Iterable[Role]) -> None:
        """Do nothing: `_hold` probes the role that is about to draw."""

    def _hold(self, role: Role) -> None:
        """Make the servers hold the role's weights; nothing is sent if all of them already do.

        Raises:
            EngineError: after two tries a server still scores the probe text differently from the trainer.
            ConfigError: a server cannot take them.
            ResourceError: a server no longer answers, or the disk is full.
        """
        with self._use(role) as model:  # only once, because the weights of a sharded model are gathered for it
            ours, digest = self._own_logprobs(model), weights_digest(model)
            if not self._must_send(role, digest, ours):
                return
            self._held = None
            self._version += 1
            path = self._written(role, model)
        self._give(role, path, ours)
        self._held = digest

    def _must_send(self, role: Role, digest: tuple[int, ...], ours: np.ndarray) -> bool:
        """Whether a server holds other weights than these, judged by what it was given and by its scores."""
        must = digest != self._held
        with together(self._processes):
            for server in () if must else self._kept:  # has something else changed them?
                is_alike = server.scores_as_before(*self._names(role, server), ours)
                must = must or not (is_alike and server.gap <= server.gap_limit)
                self._note_gap(role)
        return any(self._processes.gather_objects([must]))

    def _write(self, role: Role, model: Any, path: Path) -> None:
        write_weights(model, path)

    def _load(self, role: Role, server: Served, path: Path) -> None:
        # A server that was started without weights would not look for any; it may be another one since the last step.
        server.client.rpc("update_config", args=[{"load_config": {"load_format": "auto"}}])
        try:
            server.client.rpc("reload_weights", kwargs={"weights_path": str(path.resolve())})
        except ConfigError as error:
            raise ConfigError(
                f"{error}. The server did not take the {role}'s weights from {str(path.resolve())!r}: it must see that "
                "folder under the same path (vLLM takes one that is missing for a 'repo id'), and must have been "
                f"started with this architecture, --model {self._model.config._name_or_path!r}. The failed reload "
                "has lost the server's weights: restart it"
            ) from error

    def _keep_only(self, role: Role, path: Path) -> None:
        """Keep none: the servers have read the files, and they are large."""
        for old in self._folder.glob("*-*-*"):
            shutil.rmtree(old, ignore_errors=True)

    def _names(self, role: Role, server: Served) -> tuple[str, str]:
        return server.base, f"{self._run}-{self._version}"

    def _drawn(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Mapping[Role, tuple[int, Sequence[int]]],
        max_new_tokens: int,
        temperature: float,
    ) -> dict[Role, list[list[Completion]]]:
        """Draw role by role."""
        drawn: dict[Role, list[list[Completion]]] = {}
        for role, ask in wanted.items():
            self._hold(role)
            drawn |= super()._drawn(prompts, {role: ask}, max_new_tokens, temperature)
        return drawn


@torch.no_grad()
def weights_digest(model: nn.Module) -> tuple[int, ...]:
    """Numbers that depend on each parameter's bits and their order, whatever has changed them.

    Each is a sum of 64-bit words, each word times its own odd number, modulo 2**64: a change of one word always changes
    the sum.
    """
    digest: list[int] = []
    for parameter in model.parameters():
        raw = parameter.detach().contiguous().view(-1).view(torch.uint8)
        if raw.storage_offset() % 8:  # a part of a larger tensor that is not aligned to words
            raw = raw.clone()
        whole = len(raw) // 8 * 8
        odd = 2 * torch.arange(min(whole // 8, DIGEST_WORDS), device=raw.device) + 1
        words = raw[:whole].view(torch.int64).split(DIGEST_WORDS)
        sums = [(part * odd[: len(part)]).sum() for part in words]
        digest += torch.stack([*sums, torch.tensor(0, device=raw.device)]).tolist() + raw[whole:].tolist()
    return tuple(digest)


def write_weights(model: Any, path: Path) -> None:
    """Write the weights as a checkpoint, with a tied head also under its own name.

    On a CPU, vLLM computes with a packed copy of the head, and repacks it only when it has read a head. The embedding
    is written in the head's dtype, which is the server's: under autocast it is a tensor of its own, in fp32.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = embedding.weight
    # By values: autocast has replaced the head's weight, and configs of models that see images say it in several ways.
    is_tied = head.weight.shape == weight.shape and torch.equal(head.weight, weight.to(head.weight.dtype))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        cast = nn.Parameter(weight.detach().to(head.weight.dtype), requires_grad=False)
        embedding.weight = head.weight if is_tied else cast
        model.save_pretrained(path, max_shard_size=ONE_FILE)
        if is_tied:
            name = next(name for name, module in model.named_modules() if module is head)
            save_file({f"{name}.weight": head.weight.detach().cpu().clone()}, path / "head.safetensors")
    finally:
        embedding.weight = weight
        if bars:
            logging.enable_progress_bar()


def written_bytes(model: Any, dtype: torch.dtype) -> int:
    """About what `write_weights` writes in `dtype`."""
    count = model.num_parameters()
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        count += vocabulary_size(model.config) * hidden_size(model.config)
    return int(ROOM * count * dtype.itemsize)
