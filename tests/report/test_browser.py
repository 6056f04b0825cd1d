"""The page in a real headless Chromium: `apt-get install chromium`, `pip install playwright`."""

import json
import shutil

import pytest

from bondlm.report import write_report
from report.helpers import sample_rows, write_jsonl, write_run

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")]
HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script> \x1b[31m $x^2$"
)
WIDTHS = [(1280, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("browser") / "run")
    rows = sample_rows(1000, words=120)
    rows[7]["policy"] = {"text": HOSTILE, "reward": -5.0}
    rows[8]["policy"]["reward"] = None
    write_jsonl(run / "eval_samples.jsonl", rows)
    write_report([run])
    return run


@pytest.fixture(params=WIDTHS, ids=lambda item: str(item[0]))
def page(request, browser, run):
    """The loaded page; the test fails if anything is said on the console or asked from the network."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run / "report.html").as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def gains(page):
    texts = page.locator(".gain").all_text_contents()
    return [float(text.removeprefix("gain ")) for text in texts if text.startswith("gain ")]


def expected_gains(run):
    rows = [json.loads(line) for line in (run / "eval_samples.jsonl").read_bytes().splitlines()]
    return sorted(
        row["policy"]["reward"] - row["reference"]["reward"] for row in rows if row["policy"]["reward"] is not None
    )


def test_it_opens_within_two_seconds_and_fits_the_width(page):
    times = page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
    assert 0 < times < 2000
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("figure svg").count() == 9
    assert page.locator(".sample").count() == 20
    assert page.locator("#range").text_content() == "1–20 of 1000"


def test_it_sorts_by_gain_both_ways(page, run):
    ordered = expected_gains(run)
    page.get_by_text("Worst losses first").click()
    assert gains(page) == pytest.approx(ordered[:20], rel=0.01)
    page.get_by_text("Largest gains first").click()
    assert gains(page) == pytest.approx(ordered[:-21:-1], rel=0.01)
    page.get_by_text("File order").click()
    assert page.locator(".prompt").first.text_content().startswith("Prompt 0:")


def test_a_missing_reward_comes_last_in_both_orders(page):
    for order in ("Worst losses first", "Largest gains first"):
        page.get_by_text(order).click()
        for _ in range(49):
            page.get_by_text("Next").click()
        assert page.locator("#range").text_content() == "981–1000 of 1000"
        assert page.locator(".prompt").last.text_content().startswith("Prompt 8:")
        assert page.locator("#next").is_disabled()


def test_it_searches_all_words_in_prompts_and_answers(page):
    page.locator("#search").fill("PROMPT 777:")
    assert page.locator("#range").text_content() == "1–1 of 1"
    page.locator("#search").fill("onerror")
    assert page.locator(".prompt").all_text_contents()[0].startswith("Prompt 7:")
    page.locator("#search").fill("no such words")
    assert page.locator("#range").text_content() == "no sample holds these words"
    page.locator("#search").fill("")
    assert page.locator("#range").text_content() == "1–20 of 1000"


def test_hostile_answers_are_shown_as_text(page):
    page.get_by_text("Worst losses first").click()
    shown = page.locator(".answer.policy .text").first.text_content()
    assert shown == HOSTILE.replace("\x1b", "\\x1b")
    assert page.locator("img").count() == 0
    assert page.title() == "bondlm: run"


def test_the_theme_follows_the_system(page):
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert paper == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert ink == ("rgb(163, 171, 180)" if dark else "rgb(91, 99, 108)")


def test_the_samples_of_each_run_can_be_chosen(browser, tmp_path):
    runs = [write_run(tmp_path / name, seed=seed, prompts=3 + seed) for seed, name in enumerate("ab")]
    page = browser.new_page()
    page.goto(write_report(runs).as_uri())
    assert page.locator("#range").text_content() == "1–3 of 3"
    page.locator("#run").select_option("b")
    assert page.locator("#range").text_content() == "1–4 of 4"
    page.close()


def test_answers_of_all_runs_to_one_prompt_stand_side_by_side(browser, tmp_path):
    runs = [write_run(tmp_path / name, seed=0, prompts=3) for name in "ab"]
    rows = [json.loads(line) for line in (runs[1] / "eval_samples.jsonl").read_bytes().splitlines()]
    rows[0]["policy"]["text"] = "The other run's answer."
    rows[1]["prompt"] = "A prompt that the first run does not have"
    write_jsonl(runs[1] / "eval_samples.jsonl", rows)
    page = browser.new_page()
    page.goto(write_report(runs).as_uri())
    first, second = page.locator(".sample").nth(0), page.locator(".sample").nth(1)
    assert first.locator(".answer.other .text").text_content() == "The other run's answer."
    assert second.locator(".answer.other").count() == 0
    page.close()
