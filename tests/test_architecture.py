"""The structure of docs/design.md, held by tests: layers, owners of heavy packages, names, lengths, extras."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest

from tests.isolation import OPTIONAL, run_without
from tools.proofs import code
from tools.proofs.code import Source

LTD = code.read_sources("ltd")
SHIPPED = [*LTD, *code.read_sources("tools", "train.py", "sample.py")]


def source(module: str, text: str) -> Source:
    return Source(Path("x.py"), module, text, ast.parse(text))


def test_imports_point_downward() -> None:
    pytest.importorskip("importlinter")
    assert code.check_layers() == ""


def test_heavy_packages_have_their_owners() -> None:
    assert code.foreign_imports(LTD) == []
    for name, owners in code.OWNERS.items():
        users = {s.module for s in LTD if name.partition(".")[0] in s.text}
        unused = [owner for owner in owners if not any(code.within(user, owner) for user in users)]
        assert not unused, f"{unused} no longer use {name}: tell OWNERS in tools/proofs/code.py"


@pytest.mark.parametrize(
    "text",
    [
        "import deepspeed.comm",
        "def f():\n    from deepspeed import initialize",
        "import importlib\nimportlib.import_module('deepspeed.comm')",
        "import torch\ntorch.distributed.barrier()",
        "from torch import distributed",
        "import torch.distributed as dist",
    ],
)
def test_the_owner_rule_sees_every_way_to_import(text: str) -> None:
    assert len(code.foreign_imports([source("ltd.nn.norm", text)])) == 1
    owner = "ltd.parallel.engine"
    assert code.foreign_imports([source(owner, text)]) == []


def test_no_forbidden_calls() -> None:
    assert code.forbidden_calls(LTD) == []


@pytest.mark.parametrize(
    "text",
    [
        "print(1)",
        "x.to(0).cuda()",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "import os\nos.environ['RANK']",
    ]
    + ["import pickle", "from pickle import loads"],
)
def test_the_rule_of_forbidden_calls_sees_them(text: str) -> None:
    assert len(code.forbidden_calls([source("ltd.nn.norm", text)])) == 1


def test_allowed_calls_are_not_reported() -> None:
    assert code.forbidden_calls([source("ltd.x", "torch.load('x', weights_only=True)\nprogress.print()")]) == []
    assert code.forbidden_calls([source("ltd.parallel.layout", "environ['RANK']")]) == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert code.vague_modules(SHIPPED) == []
    assert code.vague_modules([source("ltd.data.utils", "")]) == ["ltd.data.utils"]


def test_functions_and_files_stay_short() -> None:
    past_aim = code.too_long(SHIPPED, max_function=code.AIM_FUNCTION, max_file=code.AIM_FILE)
    if past_aim:
        warnings.warn("past the aim, not the limit:\n" + "\n".join(past_aim), stacklevel=1)
    assert code.too_long(SHIPPED) == []


def test_code_lines_leave_out_comments_blank_lines_and_docstrings() -> None:
    # The constant counts three lines, def one, the return statement three.
    text = '"""Doc\nstring."""\n\n# comment\nx = """a\n\nb"""\n\n\ndef f():\n    """Doc."""\n'
    text += "    return (\n        x  # why\n    )\n"
    found = Source(code.ROOT / "x.py", "x", text, ast.parse(text))
    assert code.count_code(found) == 7
    assert [(function.where, function.num_lines) for function in code.functions([found])] == [("x.py:10", 5)]


def test_every_module_imports_without_the_extras() -> None:
    imports = "\n".join(f"import {s.module}" for s in LTD if not s.module.endswith("__main__"))
    report = f"\nfound = [name for name in {OPTIONAL!r} if name in sys.modules]\nassert not found, found"
    done = run_without(OPTIONAL, imports + report)
    assert done.returncode == 0, done.stderr


def test_the_lowest_row_needs_no_torch() -> None:
    done = run_without((*OPTIONAL, "torch"), "import ltd.config, ltd.shapes, ltd.progress, ltd.doctor")
    assert done.returncode == 0, done.stderr
