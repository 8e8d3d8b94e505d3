"""The report page in a real browser: nothing fails, videos play, together, and curves follow the choices above them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltd.tracking.report import write_report
from ltd.tracking.run_record import read_run
from tests.tracking.browser import BROWSER, Browser
from tests.tracking.made_runs import PROMPT, add_samples, make_run

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = [make_run(folder / "a", media=True), make_run(folder / "b", media=True, lr=2e-3)]
    for run, frames in zip(runs, (9, 13), strict=True):
        for step in (10, 20):
            add_samples(run, step, num_frames=frames)
    write_report([read_run(run) for run in runs], folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def browser(page: Path, tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        wait(browser, "document.documentElement.dataset.videosReady === '10/10'")
        yield browser
        assert browser.run("document.documentElement.dataset.errors") == "0"
        assert browser.messages == [], "nothing is written to the console"


def wait(browser: Browser, condition: str, *, seconds: float = 20.0) -> None:
    """Wait until an expression is true in the page."""
    end = time.monotonic() + seconds
    while not browser.run(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def test_everything_is_there(browser: Browser) -> None:
    assert browser.run("document.documentElement.dataset.script") == "done"
    assert browser.run("document.querySelectorAll('figure[data-chart]').length") == 7, "5 metrics, 2 counts"
    drawn = (
        "[...document.querySelectorAll('figure[data-chart] path.line')].filter(p => p.getTotalLength() > 100).length"
    )
    assert browser.run(drawn) == 2 * 8, "each metric of each run"
    assert browser.run("[...document.querySelectorAll('#metrics tbody tr')].length") == 1
    assert browser.run("[...document.querySelectorAll('header tbody tr')].length") == 2
    assert browser.run("[...document.querySelectorAll('#configuration table tbody tr')].map(r => r.innerText)") == [
        "optim.lr\t0.001\t0.002"
    ]
    assert browser.run("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    assert browser.run("document.querySelectorAll('#samples b, #samples script').length") == 0, "prompts are text"


def test_each_row_holds_one_prompt(browser: Browser) -> None:
    script = "[...document.querySelectorAll('.sample-row')].map(r => [r.querySelector('h3').innerText,"
    script += "[...r.querySelectorAll('.cell')].map(c => [c.innerText, c.querySelectorAll('video').length])])"
    rows = dict(browser.run(script))
    steps = [f"{run}\nstep {step}" for step in (10, 20) for run in ("a", "b")]
    made = [[step, 1] for step in steps]
    assert rows[f"{PROMPT} seed 3"] == [["not made", 0]] * 4 + [["a\n24 heun steps", 1], ["b\n24 heun steps", 1]]
    own = {f"{PROMPT} 9x32x48 · seed 5": "a", f"{PROMPT} 2 9x32x48 · seed 5": "a", f"{PROMPT} 13x32x48 · seed 5": "b"}
    for heading, run in own.items():
        expected = [cell if cell[0][0] == run else ["not made", 0] for cell in made]
        assert rows[heading] == [*expected, ["not made", 0], ["not made", 0]], "sizes differ: rows of their own"


def test_videos_play_together_and_again(browser: Browser) -> None:
    durations = browser.run("videos.map(v => v.duration)")
    assert sorted({round(duration, 2) for duration in durations}) == [1.12, 1.62, 2.12]
    assert browser.run("videos.every(v => v.currentTime === 0 && v.paused)")
    browser.run("document.getElementById('play-all').click()")
    assert browser.run("document.getElementById('play-all').textContent") == "Pause"
    wait(browser, "videos.every(v => v.currentTime > 0.3)")
    times = browser.run("videos.map(v => v.currentTime)")
    assert max(times) - min(times) < 0.2, "in step"
    wait(browser, "videos.filter(v => v.ended).length === 8")
    assert browser.run("videos.every(v => !v.loop)"), "the short ones wait for the longest"
    wait(browser, "videos.every(v => !v.paused && v.currentTime < 1)")
    browser.run("document.getElementById('play-all').click()")
    assert browser.run("videos.every(v => v.paused && v.loop)")
    browser.run("document.querySelector('.play-row').click()")
    wait(browser, "videos.filter(v => v.currentTime > 0 && !v.paused).length >= 1")
    assert browser.run(
        "videos.filter(v => !v.paused).every(v => v.closest('.sample-row').querySelector('.play-row')"
        ".textContent === 'Pause')"
    )


POINT = """(() => {
  const svg = document.querySelector("figure[data-chart] svg");
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width, clientY: box.top + 5 }));
  return document.querySelector(".tip").innerText;
})()"""
CHOOSE = """((id, value) => {{
  const choice = document.getElementById(id);
  choice.value = value;
  choice.dispatchEvent(new Event("change"));
}})("{}", "{}")"""
FIRST = "charts[0].figure"


def test_curves_follow_the_pointer_and_the_choices(browser: Browser) -> None:
    lines = browser.run(POINT).splitlines()
    assert lines == [
        "a at 70: 0.028571",
        "b at 70: 0.028571",
        "a: eval/denoise at 70: 0.042857",
        "b: eval/denoise at 70: 0.042857",
    ], "the last step's values"
    plot = f"{FIRST}.querySelector('.plot').innerHTML"
    kind = f"{FIRST}.querySelector('.kind').textContent"
    made = browser.run(plot)
    assert browser.run(kind) == "(logarithmic)", "2 to 0.0286 spans a factor of 70"
    # What the script draws with Python's choice is what Python drew: each line within a tenth of a unit.
    browser.run("choices.scale = 'logarithmic', redraw(charts[0])")
    places = "d => d.slice(1).split('L').map(p => p.split(' ').map(Number))"
    paths = f"[...{FIRST}.querySelectorAll('path.line')].map(p => p.getAttribute('d')).map({places})"
    again = browser.run(paths)
    browser.run("choices.scale = 'auto', redraw(charts[0])")
    assert browser.run(plot) == made
    for ours, theirs in zip(browser.run(paths), again, strict=True):
        assert len(ours) == len(theirs)
        assert all(p == pytest.approx(q, abs=0.11) for p, q in zip(ours, theirs, strict=True))
    browser.run(CHOOSE.format("scale", "linear"))
    assert browser.run(kind) == ""
    ticks = browser.run(f"[...{FIRST}.querySelectorAll('text[text-anchor=end]')].map(t => t.textContent)")
    assert ticks == ["0", "0.5", "1", "1.5", "2"]
    browser.run(CHOOSE.format("smoothing", "12"))
    assert browser.run(f"{FIRST}.querySelectorAll('path.faint').length") == 0, "a falling curve has nothing to smooth"
    # One run less: its lines, its values and its share of the axis go.
    browser.run(
        "(b => { b.checked = false; b.dispatchEvent(new Event('change')); })(document.querySelector('.run-shown'))"
    )
    assert browser.run(f"{FIRST}.querySelectorAll('path.c0').length") == 0
    assert browser.run(f"{FIRST}.querySelectorAll('path.c1').length") == 2
    assert browser.run(POINT).splitlines()[0] == "b at 70: 0.028571"
    assert browser.run(f"[...{FIRST}.querySelectorAll('.key.off')].map(k => k.innerText[0])") == ["a", "a"]


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_scrolls_only_inside_tables_and_rows(dark: bool, page: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "narrow", size=(375, 800), dark=dark) as browser:
        browser.open(page)
        width, shown = browser.run("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert width == shown <= 375
        assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") == dark
        colors = browser.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
        light = [int(color.split("(")[1].split(",")[0]) > 128 for color in colors]
        assert light == [dark, not dark], "text and page are of opposite brightness"
