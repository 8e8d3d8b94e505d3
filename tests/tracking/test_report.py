"""The report page: its numbers against what was logged, and the page itself in a real browser."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ltd import config
from ltd.tracking.charts import Chart, Scale, Series, draw, is_noisy, number, smooth, thin, value_scale
from ltd.tracking.media_section import samples_section
from ltd.tracking.report import build_page, collect_charts, config_differences, evaluation_section, write_report
from ltd.tracking.run_record import RunRecord, Sample, read_run
from tests.tracking.made_runs import PROMPT, add_samples, make_run

ROOT = Path(__file__).resolve().parents[2]


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
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
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


def picture(folder: Path, name: str, caption: str = PROMPT, **what: Any) -> Sample:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    return Sample(folder / f"{name}.png", caption, **what)


def laid_out(text: str) -> list[tuple[str, list[str]]]:
    """Headings of the rows, each with the texts of its cells."""
    rows = [re.split("<h3>|</h3>", part)[1:] for part in text.split('<div class="sample-row">')[1:]]
    return [
        (
            PageParser(head).text,
            [PageParser(cell.partition(">")[2]).text for cell in rest.split('<div class="cell')[1:]],
        )
        for head, rest in rows
    ]


def test_one_row_for_each_prompt_and_seed_with_the_same_columns(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        samples = [
            picture(tmp_path / name, f"{step}-{seed}-{len(word)}", word, asked=(f"seed {seed}",), step=step)
            for step in (20, 10)
            for word in (PROMPT, "other")
            for seed in ((0, 1) if name == "first" else (1,))
        ]
        after = picture(tmp_path / name, "after", PROMPT, asked=("seed 1",), details=("ema weights",))
        runs.append((name, [*samples, after]))
    text, left_out = samples_section(runs, 1.0)
    assert left_out == []
    columns = ["firststep 10", "secondstep 10", "firststep 20", "secondstep 20"]
    found = laid_out(text)
    assert [head for head, _ in found] == [f"{PROMPT} seed 0", f"{PROMPT} seed 1", "other seed 0", "other seed 1"]
    assert found[1][1] == [*columns, "firstema weights", "secondema weights"]
    assert found[3][1] == [*columns, "not made", "not made"]
    gone = ["not made" if "second" in column else column for column in columns]
    assert found[0][1] == [*gone, "not made", "not made"]


def test_what_all_samples_share_is_said_once(tmp_path: Path) -> None:
    shared = ("guidance 3", "ema weights")
    samples = [picture(tmp_path, name, details=(*shared,), asked=("9x32x32", f"seed {name}")) for name in ("1", "2")]
    shown = PageParser(samples_section([("run", samples)], 1.0)[0])
    assert [shown.text.count(part) for part in (*shared, "9x32x32", "seed 1", "seed 2")] == [1] * 5
    assert shown.tags.count("figure") == 2, "one column: a grid of cards"


def test_of_many_steps_the_first_the_last_and_some_between_are_shown(tmp_path: Path) -> None:
    samples = [picture(tmp_path, f"{step}", step=step) for step in range(1, 101)]
    (tmp_path / "g").mkdir()
    samples += [dataclasses.replace(picture(tmp_path / f"g{step}", "grid"), step=step) for step in (99, 100)]
    text, left_out = samples_section([("run", samples)], 1.0)
    steps = [int(step) for step in re.findall(r"step (\d+)<", text)]
    assert (len(steps), steps[0], steps[11], steps[12]) == (13, 1, 100, 100) and steps[:12] == sorted(steps[:12])
    assert max(np.diff(steps[:12])) == 9 and "12 of 100 steps" in text and not left_out
    assert "Overviews (1)" in text
    five = [(f"run{number}", samples) for number in range(5)]
    assert len(re.findall(r"<figure", samples_section(five, 1.0)[0])) == 5 * 2 + 5
    size = samples[0].path.stat().st_size
    few, left_out = samples_section([("run", samples[:100])], 2.5 * size / 1e6)
    assert re.findall(r"step (\d+)<", few) == ["91", "100"] and len(left_out) == 10, "what was made last first"


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
        (None, "", r"no run here: needs metrics\.jsonl or config\.yaml"),
        ("config.yaml", "a: [1\n", r"config\.yaml: cannot be read as a configuration"),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "pages"], r"error: pages: is a folder, needed an HTML file to write, such as pages/report\.html"),
        (["--media-mb", "-1"], r"--media-mb: must be at least 0, got -1\.0"),
        (["--media-mb", "nan"], r"--media-mb: must be at least 0, got nan"),
    ],
)
def test_command_refuses_what_it_cannot_write_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "pages").mkdir()
    done = subprocess.run([sys.executable, ROOT / "tools/report.py", "run", *options], cwd=tmp_path, check=False)
    error = capfd.readouterr().err
    assert done.returncode == 2
    assert re.search(message, error)
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == {"run", "pages"}


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


def staged(run: RunRecord) -> RunRecord:
    stages = [
        {"from_step": 20, "set": {"optim": {"lr": 5e-4}}},
        {"from_step": 40, "set": {"optim": {"lr": 1e-4}, "data": {"new": "<x>"}}},
    ]
    return dataclasses.replace(run, config={**run.config, "stages": stages})


def test_runs_share_a_line_of_metrics_only_where_all_beside_the_value_is_equal(tmp_path: Path) -> None:
    same = {"name": "psnr", "unit": "dB", "n": 64, "floor": 40.5}
    fid = {"name": "fid", "network": "inception"}
    rows = {
        "a": [{**same, "value": 30.5}, {**fid, "value": 8.5, "n": 64, "floor": 2.5, "guidance": 4.0}],
        "b": [{**same, "value": 31.5}, {**fid, "value": 5.5, "n": 512, "floor": 1.5, "guidance": 6.0}],
    }
    for name, measured in rows.items():
        (make_run(tmp_path / name) / "evaluation.json").write_text(json.dumps({"rows": measured}))
    section = evaluation_section([read_run(tmp_path / name) for name in rows])
    body = section.partition("<tbody>")[2].partition("</tbody>")[0]
    lines = [re.findall(r"<td[^>]*>(?:<span[^>]*>)?([^<]*)", line) for line in body.split("</tr>") if line]
    assert lines == [
        ["psnr", "30.5", "31.5", "dB", "40.5", "64", "-", "-", "-"],
        ["fid", "8.5", "-", "-", "2.5", "64", "inception", "guidance 4.0", "-"],
        ["fid", "-", "5.5", "-", "1.5", "512", "inception", "guidance 6.0", "-"],
    ]


def test_stages_are_listed_and_marked_in_the_curves(tmp_path: Path) -> None:
    plain = read_run(make_run(tmp_path / "a"))
    page, _ = build_page([staged(plain)])
    part = re.search('<section id="stages">.*?</section>', page, re.S)
    assert part is not None
    cells = [PageParser(cell).text for cell in re.findall("<td.*?</td>", part[0], re.S)]
    assert cells == ["a", "20", "optim.lr: 0.001 → 0.0005", "a", "40", "optim.lr: 0.0005 → 0.0001data.new: None → <x>"]
    chart = draw(collect_charts([staged(plain)])[0])
    places = [float(x) for x in re.findall(r'class="mark" x1="([\d.]+)"', chart)]
    assert places == pytest.approx([58 + 488 * (step - 1) / 69 for step in (20, 40)], abs=0.1)
    assert 'class="mark"' not in build_page([plain])[0] and 'id="stages"' not in build_page([plain])[0]


def test_accounting_stands_beside_each_other(tmp_path: Path) -> None:
    values = {"perf/tokens_per_s": [100, 300, 200], "perf/mfu": [0.1, 0.3, "nan"], "perf/memory_peak_gb": [1, 3, 2]}
    rows = [{"step": step, **{name: series[step] for name, series in values.items()}} for step in range(3)]
    rows[0]["perf/bucket/9x32x32/tokens_per_s"], rows[1]["perf/bucket/17x8x8/mfu"] = 7.0, 0.5
    first = RunRecord("a", tmp_path, rows=rows, hardware={"device": "NVIDIA <X>"})
    second = RunRecord("b", tmp_path, rows=[{"step": 0, "perf/mfu": 0.5}])
    page, _ = build_page([first, second])
    part = re.search('<section id="accounting">.*?</section>', page, re.S)
    assert part is not None
    table, sizes = (
        [
            [PageParser(cell).text for cell in re.findall("<t[dh].*?</t[dh]>", row, re.S)]
            for row in re.findall("<tr>.*?</tr>", one, re.S)
        ]
        for one in re.findall("<table>.*?</table>", part[0], re.S)
    )
    assert table[1:] == [
        ["device", "NVIDIA <X>", "-"],
        ["tokens/s", "200", "-"],
        ["MFU", "20 %", "50 %"],
        ["most memory, GB", "3", "-"],
    ]
    assert sizes == [["run", "size", "tokens/s", "MFU"], ["a", "9x32x32", "7", "-"], ["a", "17x8x8", "-", "50 %"]]
    assert 'id="accounting"' not in build_page([RunRecord("c", tmp_path, rows=[{"step": 1, "loss/x": 1.0}])])[0]


def test_a_run_still_being_written_does_not_break_the_page(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "a", media=True)
    add_samples(run_dir, 20)
    add_samples(run_dir, 40)
    for name in ("metrics.jsonl", "quarantine.jsonl", "media.jsonl", "samples/step-00000040/samples.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write('{"step": 71, "loss/den')
    (run_dir / "ledger.jsonl").write_text('{"step": 5, "fro')
    (run_dir / "samples/step-00000040/0000.mp4").write_bytes(b"")
    run = read_run(run_dir)
    assert run.rows[-1]["step"] == 70 and not run.ledger.cells
    assert (
        sum(sample.step == 40 for sample in run.samples) == 2 and sum(sample.step == 20 for sample in run.samples) == 3
    )
    (tmp_path / "begun").mkdir()
    config.save({"model": {"kind": "dit"}}, tmp_path / "begun" / "config.yaml")
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    page, left_out = build_page([run, read_run(tmp_path / "begun")])
    assert not left_out and "begun" in page
    (tmp_path / "begun" / "metrics.jsonl").unlink()
    assert "Resolved configuration" in build_page([read_run(tmp_path / "begun")])[0]


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    rows = [{"step": step, "loss/x": math.sin(step / 1000) + step % 7, "optim/lr": 1e-3} for step in range(100_000)]
    rows[54_321]["loss/x"] = 99.0
    page, _ = build_page([RunRecord("long", tmp_path, rows=rows)])
    assert len(page) < 150_000
    data = json.loads(html.unescape(re.findall('data-chart="([^"]*)"', page)[0]))
    (series,) = data["series"]
    assert len(series["points"]) <= 600 and [54_321, 99.0] in series["points"] and len(series["means"]) == 300
    mean = sum(row["loss/x"] for row in rows) / len(rows)
    assert sum(y for _, y in series["means"]) / 300 == pytest.approx(mean, rel=1e-3)
