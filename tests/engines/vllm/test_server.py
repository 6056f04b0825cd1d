"""A server of our own: how it starts, what it says when it does not, and that it never outlives its run."""

import gc
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bondlm.engines.vllm.http import VLLMClient
from bondlm.engines.vllm.server import LocalServer
from bondlm.errors import ConfigError, ResourceError


def script(folder: Path, code: str) -> str:
    """An 'interpreter' that ignores its arguments and runs `code`."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def start(python: str, folder: Path, limit: float = 30) -> LocalServer:
    return LocalServer(python, "m", ["--enable-lora"], log=folder / "server.log", start_timeout=limit, on_cpu=True)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise RuntimeError('no KV cache')", "no KV cache"),
        (  # another program has taken the port meanwhile
            "import socket,sys; a=socket.socket(); a.bind(('127.0.0.1',0)); socket.socket().bind(a.getsockname())",
            "OSError.*Address already in use",
        ),
    ],
    ids=["cache", "port"],
)
def test_a_server_that_ends_at_its_start_says_why(code: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"code 1.*{why}.*--enable-lora"):
        start(script(tmp_path, code), tmp_path)


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/nowhere"):
        start(str(tmp_path / "nowhere"), tmp_path)


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os,time; open({str(pid)!r},'w').write(str(os.getpid())); time.sleep(100)"
    with pytest.raises(ConfigError, match="vllm_start_timeout=3"):
        start(script(tmp_path, code), tmp_path, 3)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


SERVES = (
    "import http.server as h,os,subprocess,sys;"
    "c=subprocess.Popen([sys.executable,'-c','import time; time.sleep(100)']); print(c.pid,flush=True);"
    "H=type('H',(h.BaseHTTPRequestHandler,),{'do_GET':lambda s:(s.send_response(200),s.end_headers())});"
    "h.HTTPServer(('127.0.0.1',int(os.environ['STUB_PORT'])),H).serve_forever()"
)


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether the process ends (one that nobody has waited for yet has ended)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.fixture
def server_python(tmp_path: Path) -> str:
    """An interpreter that serves /health, on the port of its arguments as vLLM does, and has a worker."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\nwhile [ "$1" != --port ]; do shift; done\n'
        f"STUB_PORT=$2 exec {shlex.quote(sys.executable)} -u -c {shlex.quote(SERVES)}\n"
    )
    path.chmod(0o755)
    return str(path)


def test_stop_ends_the_server_and_its_workers(server_python: str, tmp_path: Path) -> None:
    server = start(server_python, tmp_path)
    worker = int((tmp_path / "server.log").read_text().split()[0])
    server.stop()
    server.stop()
    assert gone(worker)
    assert gone(server.pid)


def test_a_server_that_has_ended_says_how_and_its_log_is_kept(server_python: str, tmp_path: Path) -> None:
    server = start(server_python, tmp_path)
    client = VLLMClient(server.url, timeout=5, max_wait=0.02, how_it_ended=server.how_it_ended)
    assert server.how_it_ended() == ""
    worker = int((tmp_path / "server.log").read_text().split()[0])
    with (tmp_path / "server.log").open("a") as log:
        log.write("OutOfMemoryError: no KV cache\n")
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    for child in map(int, children):  # the server and its guard, but not the shell around them
        if b"STUB_PORT" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(child, signal.SIGKILL)
    with pytest.raises(ResourceError, match=r"has ended \(code 137, killed.*server\.log.*no KV cache"):
        client.is_asleep()
    server.stop()
    assert gone(worker)
    again = start(server_python, tmp_path)
    again.stop()
    assert "no KV cache" in (tmp_path / "server.log.1").read_text()
    assert "no KV cache" not in (tmp_path / "server.log").read_text()


def test_a_server_ends_with_what_holds_it(server_python: str, tmp_path: Path) -> None:
    """A loop over seeds in a notebook used to leave one server per trainer."""
    holder = [start(server_python, tmp_path)]
    pid, worker = holder[0].pid, int((tmp_path / "server.log").read_text().split()[0])
    holder.append(holder)  # type: ignore[arg-type]  # a cycle, as in a trainer
    del holder
    gc.collect()
    assert gone(worker)
    assert gone(pid)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_no_server_outlives_its_run(server_python: str, tmp_path: Path, end: signal.Signals | None) -> None:
    """However the run ends: killed, terminated, or by an exception."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bondlm.engines.vllm.server import LocalServer\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"server = LocalServer({server_python!r}, 'm', [], log=folder / 'server.log', start_timeout=30, on_cpu=True)\n"
        "print('up', flush=True)\n" + ("time.sleep(100)" if end else "raise RuntimeError('a bug')")
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    if end is not None:
        run.send_signal(end)
    run.wait(30)
    assert gone(int((tmp_path / "server.log").read_text().split()[0]))
