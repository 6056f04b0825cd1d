"""Choose the engine that a run's settings ask for."""

import logging
import platform
import shutil
import sys
import uuid
import weakref
from pathlib import Path
from typing import Any

import torch

from bondlm.config import BONDConfig, objective_of
from bondlm.config.model_kwargs import unserved_kwargs
from bondlm.data.prompt_encoder import PromptEncoder
from bondlm.engines.base import Engine
from bondlm.engines.local.batch_size import host_memory
from bondlm.engines.local.engine import TransformersEngine
from bondlm.engines.local.probe import find_decoding
from bondlm.engines.together import Processes, together
from bondlm.engines.vllm.handover import shared_folder
from bondlm.engines.vllm.http import LORA_OPTIONS, OWN_DISTRIBUTION, WHOLE_OPTIONS, WHOLE_PROMPTS, VLLMClient
from bondlm.engines.vllm.lora import VLLMEngine
from bondlm.engines.vllm.memory import (
    Growth,
    activation_bytes,
    growth,
    optimizer_bytes,
    server_needs,
    share_card,
)
from bondlm.engines.vllm.server import LocalServer
from bondlm.engines.vllm.whole import WholeModelEngine, written_bytes
from bondlm.errors import ConfigError, DataError
from bondlm.models.adapters import edits_base
from bondlm.models.deepspeed import zero_stage
from bondlm.models.facts import decoder_config
from bondlm.models.load import loaded_revision
from bondlm.models.roles import Roles
from bondlm.models.row_adapters import can_join
from bondlm.models.sharding import shards_weights, uses_fsdp

_LOGGER = logging.getLogger(__name__)
PROBE_TEXT = "The quick brown fox jumps over the lazy dog. How would you explain to a child why the sky is blue?"
PROBE_ANSWER = """Sunlight looks white, but it is made of all the colours of the rainbow. When it meets the air, blue
light is scattered far more than red light. In 1871 Lord Rayleigh showed that it grows with the fourth power of the
frequency: (700 / 450) ** 4 = 5.86."""
PROBE_TOKENS = 128
OWN_SIZES = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")  # a user who gives one has sized the memory
# Options with which the run could no longer reach or recognise its server.
OUR_OPTIONS = ("--host", "--port", "--uds", "--root-path", "--model", "--api-key")
HOST_SHARE = 0.25  # of main memory; a container's limit may be lower than what /dev/shm reports
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank accepts


def engine_choice(args: BONDConfig) -> str:
    """The engine that samples, and why, in one line."""
    if args.engine == "vllm":
        where = args.vllm_base_url if isinstance(args.vllm_base_url, list) else []
        several = f"{len(where)} servers" if len(where) > 1 else "the server"
        own = f"a server of this run, which {'sleeps while it learns' if sleeps(args) else 'never sleeps'}"
        return f"engine: vllm, {own if args.vllm_server == 'auto' else several + ' at vllm_base_url'}"
    if args.engine == "transformers":
        return "engine: transformers"
    times = {"cpu": "3 to 16 times slower on CPUs", "cuda": "9 to 11 times slower on an H200"}
    seen = times.get(args.device.type, f"compared only on CPUs and CUDA, not on {args.device.type}")
    why = f"transformers' continuous batching was {seen} (docs/speed.md)"
    return f"engine: transformers (auto), with bondlm's own decoding loop: {why}. vLLM must be asked for: engine=vllm"


def make_engine(
    args: BONDConfig,
    model: Any,
    roles: Roles,
    encoder: PromptEncoder,
    processes: Processes,
    *,
    longest_prompt: int = 0,
) -> Engine:
    """The engine that `args` names; `roles` lend the models, `model` is the policy with its adapters.

    A server must have room for the `longest_prompt` (tokens) and a completion. Every process must call this.

    Raises:
        ConfigError: vLLM cannot serve this run, or that server cannot.
    """
    if args.engine != "vllm":
        _LOGGER.info(engine_choice(args))
        with roles.use("policy") as policy:
            find_decoding(policy)
        return TransformersEngine(
            roles.use,
            eos_ids=encoder.eos_ids,
            pad_id=encoder.pad_id,
            max_rows=args.max_rows,
            use_together=roles.use_together,
            cuda_graphs=args.cuda_graphs,
        )
    check_vllm_can(args, model)
    folder, is_lora = Path(str(args.output_dir)) / "vllm", roles.is_peft
    server = None
    try:
        with together(processes):
            server = start_server(args, model, roles, folder, longest_prompt + args.max_completion_length)
        urls = addresses(args, processes, server)
        how: dict[str, Any] = {"timeout": args.vllm_timeout}
        on_cpu = (WHOLE_PROMPTS,) if args.device.type == "cpu" else ()
        how["start_options"] = (*(LORA_OPTIONS if is_lora else WHOLE_OPTIONS), *on_cpu)
        ours = {} if server is None else {server.url: server.how_it_ended}
        engine = (VLLMEngine if is_lora else WholeModelEngine)(
            *(
                [VLLMClient(url, how_it_ended=ours.get(url), **how) for url in urls],
                model,
                roles.adapter_roles,
                roles.use,
            ),
            processes=processes,
            eos_ids=encoder.eos_ids,
            probe_ids=probe_ids(encoder),
            folder=weights_folder(args, roles, processes) or folder,
            server=server,
            sleeps=sleeps(args),
        )
        if longest_prompt + args.max_completion_length > engine.max_model_len:
            raise ConfigError(
                f"the context of the vLLM server at {engine.shortest}, {engine.max_model_len} tokens, is too short "
                f"for the longest prompt ({longest_prompt} tokens) and max_completion_length="
                f"{args.max_completion_length}: start it with a larger --max-model-len, or set max_prompt_length to "
                "find the prompt"
            )
        return engine
    except BaseException:
        if server is not None:
            server.stop()
        raise


def probe_ids(encoder: PromptEncoder) -> list[int]:
    """A question in the format of the run's prompts, and an answer: this is where two models differ most."""
    tokenizer, prompt = encoder.tokenizer, PROBE_TEXT
    if encoder.rendering.kind_of(PROBE_TEXT, tokenizer) == "chat":
        prompt = [{"role": "user", "content": PROBE_TEXT}]  # type: ignore[assignment]
    try:
        (question,) = encoder.limited_to(max_prompt_length=None, max_completion_length=1).encode([prompt])
    except (ConfigError, DataError):  # a template that needs more than a question
        question = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id in (None, *question[:1]) else [tokenizer.bos_token_id]
    return [*begin, *question, *tokenizer(PROBE_ANSWER, add_special_tokens=False)["input_ids"]][:PROBE_TOKENS]


def sleeps(args: BONDConfig) -> bool:
    """Whether the run's servers release their memory while the run learns; vLLM on a CPU cannot."""
    return args.vllm_server == "auto" and args.vllm_sleep == "auto" and args.device.type == "cuda"


def start_server(args: BONDConfig, model: Any, roles: Roles, folder: Path, longest: int) -> LocalServer | None:
    """The server that this process starts, if any: one on each training GPU, or one per machine on the CPU.

    `longest` is the maximum number of tokens of a prompt with its completion.

    Raises:
        ConfigError: it does not start, or does not fit into memory with the trainer.
    """
    on_cpu, is_alone = args.device.type == "cpu", args.world_size == 1
    if args.vllm_server != "auto" or (on_cpu and args.local_process_index > 0):
        return None
    options = (
        server_options(served_dtype(roles), max_rank(model), args)
        if roles.is_peft
        else whole_model_options(roles, args)
    )
    if (revision := loaded_revision(model, args)) is not None:
        options = ["--revision", revision, *options]
    if not on_cpu:
        options = card_options(args, model, roles, longest) + options  # of equal options the last counts
    return LocalServer(
        args.vllm_python or sys.executable,
        model.config._name_or_path,
        options,
        log=folder / ("server.log" if args.process_index == 0 else f"server-{args.process_index}.log"),
        start_timeout=args.vllm_start_timeout,
        on_cpu=on_cpu,
        gpu=None if on_cpu or is_alone else args.device.index,
    )


def weights_folder(args: BONDConfig, roles: Roles, processes: Processes) -> Path | None:
    """A folder in shared memory for whole weights, if all servers are ours and local; every process must call this.

    None means the run folder: an adapter is small, and a server that we did not start may not see this machine's
    memory.
    """
    machines = set(processes.gather_objects([(platform.node(), uuid.getnode())]))
    if roles.is_peft or args.vllm_server != "auto" or len(machines) > 1:
        return None
    size = written_bytes(roles.core, served_dtype(roles))
    has_room = processes.rank == 0 and size <= HOST_SHARE * host_memory()
    mine = shared_folder(size) if has_room else None
    if mine is not None:
        weakref.finalize(roles, shutil.rmtree, mine, ignore_errors=True)  # it goes with the trainer
    return processes.gather_objects([mine])[0]


def card_options(args: BONDConfig, model: Any, roles: Roles, longest: int) -> list[str]:
    """Options of a server that shares a GPU with this process: its share of the memory, and sleep mode.

    Raises:
        ConfigError: server and trainer do not fit into memory together.
    """
    asleep = ["--enable-sleep-mode"] if sleeps(args) else []
    if any(word.replace("_", "-").startswith(OWN_SIZES) for word in args.vllm_server_args or []):
        return asleep
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(args.device)
    size = served_dtype(roles).itemsize
    share = share_card(
        total=total,
        free=free,
        growth=trainer_growth(args, model, roles, longest),
        least=server_needs(decoder_config(model), roles.core.num_parameters(), size, longest),
        sleeps=bool(asleep),
    )
    if args.process_index == 0:
        _LOGGER.warning("%s", share)
    return [*asleep, f"--gpu-memory-utilization={share.utilization:.3f}", "--max-model-len=-1"]  # as long as fits


def trainer_growth(args: BONDConfig, model: Any, roles: Roles, longest: int) -> Growth:
    """The GPU memory that this process will need for training, beyond what it uses before its first step."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_weights, size = roles.core.num_parameters(), (roles.autocast or model.dtype).itemsize
    per_trained = optimizer_bytes(str(getattr(args.optim, "value", args.optim))) + (4 if args.average_weights else 0)
    per_trained += 4 if zero_stage(args) else 0  # DeepSpeed's own fp32 copy
    shards, visiting, placed = 1, 0, 0
    if shards_weights(args):  # anchor and reference are created when the policy is sharded
        shards, placed = args.world_size, num_weights * model.dtype.itemsize // args.world_size
        per_trained += 4 * (len(roles.adapter_roles) - 1 if roles.is_peft else 2)
        visiting = num_weights * (size if uses_fsdp(args) else model.dtype.itemsize)
    elif not roles.is_peft and args.anchor != "fixed":
        visiting = num_weights * model.dtype.itemsize  # the reference stays on the CPU
    cuts = args.world_size == 1 and not zero_stage(args)  # micro-batches, if memory is too small for them
    per_prompt = objective_of(args).plan.learn * longest
    tokens = args.per_device_train_batch_size * per_prompt
    if args.max_tokens_per_micro_batch is not None:
        tokens = min(tokens, max(args.max_tokens_per_micro_batch, longest if cuts else per_prompt))
    how: dict[str, Any] = {"checkpointing": bool(args.gradient_checkpointing)}
    return growth(
        staying=placed + trained * per_trained // shards,
        gradients=(4 if args.world_size == 1 else 8) * trained // shards,  # with several processes, also in buckets
        activations=activation_bytes(model.config, tokens, size, **how),
        least_activations=activation_bytes(model.config, longest if cuts else tokens, size, **how),
        visiting=visiting,
    )


def addresses(args: BONDConfig, processes: Processes, server: LocalServer | None) -> list[str]:
    """The servers that this process draws from; every process must call this."""
    if args.vllm_server != "auto":
        return share_of(args.vllm_base_url, processes.rank, processes.size)
    started = processes.gather_objects([None if server is None else server.url])
    # The ranks of a machine are consecutive, and the first of them has started a server.
    return [url for url in started[: processes.rank + 1] if url is not None][-1:]


def share_of(urls: str | list[str] | None, rank: int, size: int) -> list[str]:
    """The servers of process `rank` among `size`: several if there are more servers than processes, otherwise one."""
    urls = urls if isinstance(urls, list) else [str(urls)]
    return urls[rank::size] or [urls[rank % len(urls)]]


def check_vllm_can(args: BONDConfig, model: Any) -> None:
    """Refuse models that vLLM cannot sample from, before anything is started.

    Raises:
        ConfigError: vLLM cannot sample from the model; says what to use instead.
    """
    instead = "use engine='transformers'"
    if model.config.is_encoder_decoder:
        raise ConfigError(f"engine=vllm: vLLM serves no encoder-decoder models such as this one, {instead}")
    if hasattr(model, "peft_config"):
        kind = str(model.peft_config[model.active_adapter].peft_type).rsplit(".", 1)[-1]
        if kind != "LORA":
            raise ConfigError(f"engine=vllm serves LoRA adapters, not {kind}: {instead}")
        if not can_join(model):
            raise ConfigError(
                "engine=vllm serves plain LoRA on linear layers, without DoRA, embeddings, trained tokens or "
                f"modules_to_save: {instead}"
            )
        if edits_base(model):
            raise ConfigError(
                "engine=vllm serves the base as it is on file, but this adapter (init_lora_weights, layer_replication) "
                f"has changed it: {instead}"
            )
    _refuse_our_options(args)
    if args.vllm_server == "auto" and not model.config._name_or_path:
        raise ConfigError("vllm_server=auto needs a model that was loaded from a folder or by hub name")
    if args.vllm_server == "auto" and (names := unserved_kwargs(args.model_init_kwargs)):
        raise ConfigError(
            f"vllm_server=auto: model_init_kwargs.{names[0]} changes "
            f"{model.config._name_or_path!r}, but the server would load it unchanged: {instead}, or save the "
            "changed model to a folder and train that"
        )


def _refuse_our_options(args: BONDConfig) -> None:
    for name in (word.partition("=")[0].replace("_", "-") for word in args.vllm_server_args or []):
        if name in OUR_OPTIONS or name.startswith("--ssl-"):
            todo = "set VLLM_API_KEY to the key" if name == "--api-key" else "remove it"
            raise ConfigError(
                f"vllm_server_args: {name} is for a server that you start yourself (vllm_base_url); the run would not "
                f"reach its own with it: {todo}"
            )


def max_rank(model: Any) -> int:
    """The largest rank of the policy's adapter."""
    config = model.peft_config[model.active_adapter]
    return int(max([config.r, *(config.rank_pattern or {}).values()]))


def server_options(dtype: torch.dtype, rank: int, args: BONDConfig) -> list[str]:
    """Options of a server that samples from the model's own distribution, at the trainer's precision."""
    fitting = [r for r in VLLM_RANKS if r >= rank]
    if not fitting:
        raise ConfigError(f"LoRA r={rank}: vLLM takes adapters up to rank {VLLM_RANKS[-1]}")
    if dtype == torch.float32 and args.device.type != "cpu":
        raise ConfigError(
            "engine='vllm' with LoRA on a base in float32: on a GPU, vLLM's LoRA kernels support only bfloat16 and "
            "float16. Set dtype: bfloat16, or bf16: true"
        )
    options = ["--dtype", _dtype_name(dtype), "--enable-lora", "--max-loras", "3"]  # policy, anchor, reference
    options += ["--max-lora-rank", str(fitting[0])]
    return options + _law_options(args)


def whole_model_options(roles: Roles, args: BONDConfig) -> list[str]:
    """Options of a server that receives whole models, at the trainer's compute precision."""
    options = ["--dtype", _dtype_name(served_dtype(roles)), "--load-format", "dummy"]  # it receives the weights later
    return options + _law_options(args)


def served_dtype(roles: Roles) -> torch.dtype:
    """The dtype that a server computes in, which is the trainer's."""
    return roles.autocast or roles.model.dtype  # type: ignore[no-any-return]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _law_options(args: BONDConfig) -> list[str]:
    options = [*OWN_DISTRIBUTION]
    if args.device.type == "cpu":
        options.append("--enforce-eager")  # compiling takes minutes and gains little on a CPU
        options.append(WHOLE_PROMPTS)
    return options + list(args.vllm_server_args or [])
