"""The report's samples: videos and pictures embedded, those of one caption side by side."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from ltd.tracking.markup import section
from ltd.tracking.run_record import Sample

MIME = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}


def samples_section(runs: Sequence[tuple[str, Sequence[Sample]]], limit_mb: float) -> tuple[str, list[str]]:
    """Embed the samples of all runs.

    Args:
        runs: Each run's name and samples.
        limit_mb: Megabytes embedded at most, before encoding.

    Returns:
        The section, empty without samples, and what was left out of it, one line each.
    """
    named = [(name if len(runs) > 1 else "", sample) for name, samples in runs for sample in samples]
    shown, left_out = _within_limit(named, limit_mb)
    if not shown and not left_out:
        return "", []
    common = _common_details(sample for _, sample in shown if sample.details)
    groups: dict[str, list[tuple[Sample, str]]] = {}
    overviews = []
    for name, sample in shown:
        note = " · ".join(part for part in (name, *sample.details) if part and part not in common)
        if "grid" in sample.path.stem:
            overviews.append(_card(sample, sample.caption, note, is_wide=True))
        else:
            groups.setdefault(sample.caption, []).append((sample, note))
    body = "".join(overviews) + _lay_out(groups)
    notes = [f"All of these: {', '.join(common)}."] if common else []
    notes += [f"{len(left_out)} files left out, past {limit_mb:g} MB in all."] if left_out else []
    has_video = any(_kind(sample).startswith("video/") for _, sample in shown)
    controls = '<p class="controls"><button type="button" id="play-all">Play all</button></p>' if has_video else ""
    text = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return section("Samples", text + controls + body, "samples"), left_out


def _within_limit(named: Sequence[tuple[str, Sample]], limit_mb: float) -> tuple[list[tuple[str, Sample]], list[str]]:
    """Take files until the limit is reached; the others are named."""
    budget = limit_mb * 1e6
    shown, left_out = [], []
    for name, sample in named:
        size = sample.path.stat().st_size
        if size <= budget:
            budget -= size
            shown.append((name, sample))
        else:
            left_out.append(f"{sample.path}: {size / 1e6:.1f} MB past the limit of {limit_mb:g} MB in all")
    return shown, left_out


def _common_details(samples: Iterable[Sample]) -> list[str]:
    """Details that every sample shares, where there is more than one."""
    details = [sample.details for sample in samples]
    return [part for part in details[0] if all(part in other for other in details)] if len(details) > 1 else []


def _lay_out(groups: Mapping[str, Sequence[tuple[Sample, str]]]) -> str:
    """One row under each caption, or one grid of captioned cards where every caption has a single one."""
    if all(len(group) == 1 for group in groups.values()):
        cards = "".join(_card(sample, caption, note) for caption, [(sample, note)] in groups.items())
        return f'<div class="samples">{cards}</div>'
    rows = [(caption, "".join(_card(sample, "", note) for sample, note in group)) for caption, group in groups.items()]
    return "".join(f'<h3>{escape(caption)}</h3><div class="samples">{cards}</div>' for caption, cards in rows)


def _kind(sample: Sample) -> str:
    return MIME.get(sample.path.suffix, "image/jpeg")


def _card(sample: Sample, caption: str, note: str, *, is_wide: bool = False) -> str:
    """One file with what is said about it."""
    source = f"data:{_kind(sample)};base64,{base64.b64encode(sample.path.read_bytes()).decode()}"
    if _kind(sample).startswith("video/"):
        media = f'<video controls loop muted playsinline preload="auto" src="{source}"></video>'
    else:
        media = f'<img alt="{escape(sample.caption, quote=True)}" src="{source}">'
    lines = [escape(caption)] if caption else []
    lines += [f'<span class="note">{escape(note)}</span>'] if note else []
    text = f"<figcaption>{'<br>'.join(lines)}</figcaption>" if lines else ""
    return f'<figure class="card{" wide" if is_wide else ""}">{media}{text}</figure>'
