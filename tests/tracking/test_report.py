"""The report page: its numbers against what was logged, and the page itself in a real browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltd import config
from ltd.data.write import write_video
from ltd.tracking import Tracker, TrackingConfig
from ltd.tracking.charts import Chart, Scale, Series, draw, is_noisy, number, smooth, thin, value_scale
from ltd.tracking.media_section import samples_section
from ltd.tracking.report import build_page, collect_charts, config_differences, write_report
from ltd.tracking.run_record import Sample, read_run

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = 'a rabbit & a "butterfly" </script><b>bold</b>'


def make_run(run_dir: Path, *, lr: float = 1e-3, media: bool = False) -> Path:
    """Write a run directory the way training and ``sample.py`` do."""
    settings = {"model": {"kind": "dit"}, "steps": 70, "optim": {"lr": lr, "betas": [0.9, 0.99]}}
    config.save(settings, run_dir / "config.yaml")
    track = Tracker(run_dir, TrackingConfig(), is_main=True, run_config=settings)
    for step in range(1, 71):
        values = {"loss/denoise": 2.0 / step, "optim/lr": lr, "time/step_s": 0.5, "time/data_s": 0.05, "other/x": step}
        if step == 7:
            values["loss/denoise"] = math.nan
        if step % 35 == 0:
            values["eval/denoise"] = 3.0 / step
        if step == 9:
            record = {"key": "k9", "shard": "a.tar", "cause": "truncated", "message": "<i>short</i>"}
            track.quarantine(step, [record])
        track.log(step, values)
    track.finish()
    if media:
        samples = run_dir / "samples"
        samples.mkdir()
        ramp = np.arange(17, dtype=np.uint8)[:, None, None, None] * 10
        write_video(samples / "0000.mp4", np.broadcast_to(ramp, (17, 32, 48, 3)).copy(), fps=8)
        Image.new("RGB", (48, 32), "red").save(samples / "grid.png")
        rows = [{"file": "0000.mp4", "prompt": PROMPT, "seed": 3, "steps": 24, "solver": "heun"}]
        (samples / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {
        "name": "psnr",
        "value": 24.5,
        "unit": "dB",
        "network": None,
        "n": 12,
        "floor": None,
        "note": "<u>held out</u>",
    }
    (run_dir / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    return run_dir


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (1e-4, 3e-4, [1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4]),
    ],
)
def test_linear_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert Scale(low, high).ticks() == pytest.approx(ticks)


def test_log_scale_places_equal_ratios_at_equal_distances() -> None:
    scale = value_scale([0.01, 100.0])
    assert scale.log
    places = [scale.place(value) for value in (0.01, 0.1, 1, 10, 100)]
    assert np.diff(places) == pytest.approx([places[1] - places[0]] * 4)
    assert 0 < places[0] < places[-1] < 1
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks())
    assert not value_scale([-1.0, 100.0]).log
    assert value_scale([5.0]).place(5.0) > 0, "one value has a scale"


def test_thinning_keeps_spikes_and_order() -> None:
    points = [(float(step), math.sin(step / 300)) for step in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[4567] = (4567.0, -50.0)
    kept = thin(points, 200)
    assert len(kept) <= 200
    assert {points[4321], points[4567]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:150], 200) == points[:150]


def test_smoothing_keeps_a_constant_and_is_pulled_to_no_zero() -> None:
    assert [y for _, y in smooth([(step, 3.0) for step in range(500)])] == pytest.approx([3.0] * 500)
    noise = np.random.default_rng(0).normal(1.0, 1.0, 5000)
    smoothed = [y for _, y in smooth(list(enumerate(noise)))]
    assert np.std(smoothed[1000:]) == pytest.approx(1 / math.sqrt(2 * 100 - 1), rel=0.5)
    assert is_noisy(list(enumerate(noise)))
    assert not is_noisy([(step, math.cos(step / 1000)) for step in range(3000)]), "a schedule is drawn as it is"


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0.000123456, 12.3456, 24310.2, 1e9)] == [
        "0.0001235",
        "12.35",
        "24,310",
        "1e+09",
    ]


def test_a_curve_is_drawn_where_its_values_are() -> None:
    drawing = draw(Chart("x", [Series("x", [(0, 0.0), (1, 1.0), (2, math.nan), (4, 2.0)])]))
    path = re.search(r'<path[^>]*d="M([^"]*)"', drawing)
    assert path
    xs, ys = zip(*(map(float, pair.split()) for pair in path[1].split("L")), strict=True)
    assert np.diff(xs) == pytest.approx([488 / 4, 488 * 3 / 4], abs=0.1), "steps, not row numbers, give the place"
    assert ys[0] > ys[1] > ys[2], "larger values are higher up"
    assert np.diff(ys)[0] == pytest.approx(np.diff(ys)[1], abs=0.11)
    assert "1 not finite" in drawing


def test_held_out_loss_shares_the_training_loss_chart(tmp_path: Path) -> None:
    charts = collect_charts([read_run(make_run(tmp_path / "a"))])
    assert [chart.title for chart in charts][:2] == ["loss/denoise", "optim/lr"]
    train, held_out = charts[0].series
    assert (train.label, train.dashed) == ("loss/denoise", False)
    assert (held_out.label, held_out.dashed, held_out.points) == (
        "eval/denoise",
        True,
        [(35.0, 3 / 35), (70.0, 3 / 70)],
    )
    assert math.isnan(train.points[6][1])
    two = collect_charts([read_run(tmp_path / "a"), read_run(make_run(tmp_path / "b"))])
    assert {series.color for series in two[0].series} == {0, 1}


def test_differences_name_the_fields_that_differ(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a")), read_run(make_run(tmp_path / "b", lr=2e-3))]
    assert config_differences(runs) == [("optim.lr", [1e-3, 2e-3])]
    assert config_differences([runs[0], runs[0]]) == []


class PageParser(HTMLParser):
    """Collect tags, addresses and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_everything_escaped_and_asks_for_nothing(tmp_path: Path) -> None:
    page, left_out = build_page([read_run(make_run(tmp_path / "a", media=True))])
    parsed = PageParser(page)
    assert left_out == []
    assert parsed.addresses
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert "@import" not in page
    assert "url(" not in page
    assert not any(markup in page for markup in ("<b>bold", "<u>held", "<i>short"))
    for text in (
        PROMPT,
        "<u>held out</u>",
        "<i>short</i>",
        "24.5",
        "dB",
        "70 of 70",
        "10.0 %",
        "truncated",
        "lr: 0.001",
    ):
        assert text in parsed.text, text
    assert parsed.tags.count("video") == 1
    assert parsed.tags.count("img") == 1, "the grid"


def test_samples_of_one_prompt_stand_under_it_with_what_they_share_said_once(tmp_path: Path) -> None:
    shared = ("guidance 3", "ema weights")
    samples = []
    for name, seed in (("a", 0), ("b", 1)):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        samples.append(Sample(tmp_path / f"{name}.png", PROMPT, (f"seed {seed}", *shared)))
    text, left_out = samples_section([("run", samples)], 1.0)
    assert left_out == []
    shown = PageParser(text)
    assert shown.tags.count("h3") == 1
    assert [shown.text.count(part) for part in (PROMPT, *shared, "seed 0", "seed 1")] == [1] * 5
    two = PageParser(samples_section([("first", samples[:1]), ("second", samples[1:])], 1.0)[0])
    assert two.text.index("first · seed 0") < two.text.index("second · seed 1"), "runs side by side under the prompt"
    assert two.tags.count("h3") == 1


def test_videos_are_of_the_kind_that_every_browser_plays(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    make_run(tmp_path / "a", media=True)
    with av.open(str(tmp_path / "a/samples/0000.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")


def test_media_past_the_limit_are_named(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", media=True))
    limit = ((tmp_path / "a/samples/0000.mp4").stat().st_size + 10) / 1e6
    left_out = write_report([run], tmp_path / "r.html", media_limit_mb=limit)
    assert [line.split(":")[0] for line in left_out] == [str(tmp_path / "a/samples/grid.png")]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", r"no run here: needs metrics\.jsonl"),
        ("metrics.jsonl", "{]\n", r"metrics\.jsonl, line 1: needs a JSON object"),
        ("evaluation.json", '{"rows": [{"value": 1}]}', r"evaluation\.json: needs a list of objects with a 'name'"),
    ],
)
def test_command_names_what_is_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str | None, content: str, message: str
) -> None:
    if file:
        (tmp_path / file).write_text(content)
    done = subprocess.run([sys.executable, ROOT / "tools/report.py", tmp_path], check=False)
    error = capfd.readouterr().err
    assert done.returncode == 2
    assert re.search(message, error)
    assert "Traceback" not in error


# Written into the page under test: moves the pointer over the first chart, plays, and waits for the videos.
PROBE = """<script>
const svg = document.querySelector("figure[data-chart] svg");
const box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width, clientY: box.top + 5 }));
page.dataset.tip = document.querySelector(".tip").textContent;
document.getElementById("play-all").click();
page.dataset.button = document.getElementById("play-all").textContent;
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_page_works_in_a_browser(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / "a", media=True)), read_run(make_run(tmp_path / "b", media=True, lr=2e-3))]
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "probe.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom --enable-logging=stderr"
    command = [str(BROWSER), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/probe.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root, done.stderr
    found = {name: html.unescape(value) for name, value in re.findall(r'data-([a-z-]+)="([^"]*)"', root[0])}
    assert found["script"] == "done"
    assert found["errors"] == "0"
    assert "CONSOLE" not in done.stderr, done.stderr
    assert found["charts"] == "7", "five metrics and two counts of bad samples"
    assert found["videos-ready"] == "2/2"
    durations = re.findall(r'<video[^>]*data-duration="([^"]*)"', done.stdout)
    assert [float(value) for value in durations] == pytest.approx([17 / 8] * 2, abs=0.01)
    assert found["tip"].startswith("a: loss/denoise at 70: 0.02857"), "the last step's value follows the pointer"
    assert found["button"] == "Pause all"


def test_the_page_shows_where_a_fork_is_from(tmp_path: Path) -> None:
    trunk, child = make_run(tmp_path / "trunk"), make_run(tmp_path / "child")
    changes = {"optim.schedule": ["constant", "<wsd>"]}
    entry = {"run": "runs/trunk", "step": 4000, "fingerprint": "0123456789abcdef", "overrides": changes}
    (child / "lineage.json").write_text(json.dumps({"ancestors": [{**entry, "overrides": {}, "step": 7}, entry]}))
    page, _ = build_page([read_run(trunk), read_run(child)])
    part = re.search('<section id="lineage">.*?</section>', page, re.S)
    assert part is not None
    cells = [re.sub("<[^>]*>", "", html.unescape(cell)) for cell in re.findall("<td.*?</td>", part[0], re.S)]
    first = ["child", "runs/trunk", "7", "0123456789ab", "nothing"]
    assert cells[:5] == first and cells[5:9] == ["child", "runs/trunk", "4,000", "0123456789ab"]
    assert "optim.schedule</code>: constant → &lt;wsd&gt;" in part[0]
    assert 'id="lineage"' not in build_page([read_run(trunk)])[0]
    (child / "lineage.json").write_text("[]")
    with pytest.raises(ValueError, match="lineage.json: needs a list of ancestors"):
        read_run(child)
