"""The page of `bondlm prefer` in a real headless Chromium, by its keys alone."""

import json
import shutil
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bondlm.stages.prefer.choices import Choices
from bondlm.stages.prefer.pairs import read_pairs
from bondlm.stages.prefer.server import PreferServer
from stages.helpers import write

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")]
HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>"


def test_five_pairs_by_keys(tmp_path: Path) -> None:
    """Left, right, tie, skip, a reload in between, and the end; no script of an answer runs, nothing else is asked."""
    samples = [{"prompt": f"p{i} {HOSTILE}", "completion": t + HOSTILE} for i in range(6) for t in "ab"]
    path = Path(write(tmp_path / "s.jsonl", samples))
    made = PreferServer(Choices(tmp_path / "p.jsonl"), read_pairs(path, 1, seed=0))
    thread = Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    shown: list[dict[str, Any]] = []
    with made, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(made.url)
        for count, key in enumerate(("ArrowLeft", "ArrowRight", "T", "s")):
            page.get_by_text(f"{count} of 6 decided").wait_for()
            shown.append({name: page.locator(f"#{name}").text_content() for name in ("prompt", "left", "right")})
            page.keyboard.press("Control+ArrowLeft")  # the browser's own
            page.keyboard.press(key)
        page.get_by_text("4 of 6 decided").wait_for()
        page.reload()
        page.get_by_text("4 of 6 decided").wait_for()
        page.locator("#right").click()
        page.get_by_text("5 of 6 decided").wait_for()
        page.keyboard.press("q")
        page.get_by_text("Ended:").wait_for()
        assert page.title() == "bondlm prefer"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    thread.join(10)
    assert not thread.is_alive()
    assert said == []
    assert all(url.startswith((made.url, "data:")) for url in asked)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["left", "right", "tie", "skip", "right"]
    assert [row["prompt"] for row in rows[:4]] == [seen["prompt"] for seen in shown]
    assert (rows[0]["chosen"], rows[0]["rejected"]) == (shown[0]["left"], shown[0]["right"])
    assert (rows[1]["chosen"], rows[1]["rejected"]) == (shown[1]["right"], shown[1]["left"])
