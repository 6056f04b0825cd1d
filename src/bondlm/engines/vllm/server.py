"""A vLLM server of our own: started for a run, watched until it answers, and ended with the run."""

import os
import shutil
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import httpx

from bondlm.engines.vllm.http import how_to_start
from bondlm.errors import ConfigError

# The server, and a guard that kills it when our end of the pipe closes: after `kill -9` of a run no server is left.
GUARDED = """
trap : TERM
exec 3<&0
"$@" 3<&- </dev/null & server=$!
(read -r _ <&3; kill -KILL 0) & guard=$!
wait $server; code=$?
kill -0 $server 2>/dev/null && wait $server  # a signal has interrupted the first wait
kill -KILL $guard 2>/dev/null
exit $code
"""
# Not passed on: variables of our Python, and of a launcher, by which the server would seem a process of the run.
LAUNCHERS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS_START = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
STOP_GRACE = 10.0  # seconds between asking a server to end and killing it
END_GRACE = 2.0  # seconds until a server that refuses connections has an exit code
KILLED = (137, -9)


class LocalServer:
    """A running vLLM server on this machine's loopback interface.

    `stop` ends it, and so does the end of Python, or of this object: a trainer that is deleted leaves no server.
    """

    def __init__(
        self,
        python: str,
        model: str,
        options: Sequence[str],
        *,
        log: Path,
        start_timeout: float,
        on_cpu: bool,
        gpu: int | None = None,
    ) -> None:
        """Start the server and wait until it is healthy.

        Args:
            python: interpreter of the environment that vLLM is installed in.
            model: folder or hub name of the base model.
            options: arguments of vLLM's api_server.
            log: file for the server's output.
            start_timeout: seconds within which it must answer.
            on_cpu: whether it computes on the CPU.
            gpu: number of the GPU that it uses, alone or together with the trainer; None: all GPUs that this process
                sees.

        Raises:
            ConfigError: it exited or did not answer in time.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._by_hand = how_to_start("http://127.0.0.1:8000", model, options)
        self._log = log
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(port), *options]
        log.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which(python) is None:
            raise ConfigError(f"vllm_python={python!r} cannot be run: there is no such program. {self._by_hand}")
        if log.is_file():  # the last server's: it may say why that one ended
            log.replace(log.with_name(f"{log.name}.1"))
        with log.open("w", encoding="utf-8") as out:
            self._process = subprocess.Popen(  # noqa: S603 - the user's own interpreter
                ["/bin/sh", "-c", GUARDED, "bondlm", *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(on_cpu, gpu, options),
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._wait(start_timeout)
        except BaseException:
            self.stop()
            raise

    def _wait(self, limit: float) -> None:
        deadline = time.monotonic() + limit
        with httpx.Client(base_url=self.url, timeout=5.0, trust_env=False) as http:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise ConfigError(
                        f"the vLLM server ended at its start with code {self._process.returncode}; the last lines of "
                        f"{str(self._log)!r}: {self._last_lines()}. {self._by_hand}"
                    )
                try:
                    if http.get("/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # not yet
                time.sleep(0.25)
        raise ConfigError(
            f"the vLLM server did not answer within vllm_start_timeout={limit:g} s; the last lines of "
            f"{str(self._log)!r}: {self._last_lines()}. {self._by_hand}"
        )

    def how_it_ended(self) -> str:
        """The exit code and the last lines of the log; empty while the server runs."""
        try:
            code = self._process.wait(END_GRACE)
        except subprocess.TimeoutExpired:
            return ""
        why = ", killed, as a system does that is out of memory" if code in KILLED else ""
        return (
            f"the run's own vLLM server has ended (code {code}{why}); the last lines of {str(self._log)!r}: "
            f"{self._last_lines()}"
        )

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line]
        return " | ".join(line.strip() for line in (errors or lines)[-3:])[-1500:] or "(empty)"

    @property
    def pid(self) -> int:
        """The server's process id; the process leads its own process group."""
        return self._process.pid

    def stop(self) -> None:
        """End the server and its workers; safe to call twice."""
        self._end()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group: by request, then by force."""
    for number, patience in ((signal.SIGTERM, STOP_GRACE), (signal.SIGKILL, STOP_GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def _environment(on_cpu: bool, gpu: int | None, options: Sequence[str]) -> dict[str, str]:
    """Our environment without the variables of a multi-process launcher, plus what a server with these options needs.

    No usage statistics leave the machine. The routes for whole models' weights and for sleep exist only in development
    mode. That mode also lets any client run the methods of the server's workers, so the server listens on the loopback
    interface.
    """
    ours = {k: v for k, v in os.environ.items() if k not in LAUNCHERS and not k.startswith(LAUNCHERS_START)}
    needed = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    for_lora, sleeps = "--enable-lora" in options, "--enable-sleep-mode" in options
    needed |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if for_lora else {}
    needed |= {"VLLM_SERVER_DEV_MODE": "1"} if sleeps or not for_lora else {}
    if sleeps:  # its allocator cannot sleep with expandable segments
        ours = {k: v for k, v in ours.items() if "expandable_segments" not in v}
    if gpu is not None:
        visible = [name for name in ours.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        needed["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    space = {"VLLM_CPU_KVCACHE_SPACE": "1"} if on_cpu else {}  # GiB
    return space | ours | needed
