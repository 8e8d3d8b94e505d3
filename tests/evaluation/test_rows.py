import json
import math

import pytest

from ltd.evaluation.rows import MetricRow, format_table, rows_from_json, rows_to_json

ROW = MetricRow(part="samples", name="frechet_clips", value=1.25, unit="", network="net", n=64, floor=0.5, note="why")


def test_rows_survive_json_infinity_included():
    rows = [ROW, MetricRow(part="autoencoder", name="psnr", value=math.inf, unit="dB", n=3)]
    text = rows_to_json(rows)
    assert rows_from_json(text) == rows
    assert json.loads(text)[1]["value"] == "inf"
    with pytest.raises(ValueError, match="not a list of metric rows"):
        rows_from_json('[{"nam": 1}]')


def test_table_names_network_floor_and_notes_once():
    lines = format_table([ROW, ROW]).splitlines()
    assert lines[1].split() == ["samples/frechet_clips", "1.25", "0.5", "64", "net", "[1]"]
    assert lines[3:] == ["[1] why"]
