"""Size of the code and the rules of its structure: lines, longest function and file, who may import what."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.proofs.table import Proof, markdown_table

NAME = "code"
ROOT = Path(__file__).resolve().parents[2]

#: Aims of docs/design.md's conventions, and the limits past which a proof (and a test) fails.
AIM_FUNCTION, AIM_FILE = 60, 400
MAX_FUNCTION, MAX_FILE = 80, 450

#: Third-party module -> the only modules or packages of ltd that may import it.
OWNERS: dict[str, tuple[str, ...]] = {
    "torch.distributed": ("ltd.parallel",),
    "deepspeed": ("ltd.parallel.engine",),
    "wandb": ("ltd.tracking.wandb_run",),
    "decord": ("ltd.data.decode",),
    "av": ("ltd.data",),
    "webdataset": ("ltd.data",),
    "flash_attn": ("ltd.nn.attention",),
    "transformers": ("ltd.encoders",),
}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
VAGUE_NAMES = {"base", "common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}


@dataclass(frozen=True)
class Source:
    """One parsed file and the dotted name of its module."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        """Lines, all of them."""
        return self.text.count("\n")


@dataclass(frozen=True)
class Function:
    """One function: where it stands and how many lines it has, docstring included."""

    name: str
    where: str
    num_lines: int


def read_sources(*folders: str) -> list[Source]:
    """Parse the Python files of folders or files of the repository, in order of path."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    paths += [ROOT / name for name in folders if name.endswith(".py") and (ROOT / name).is_file()]
    sources = []
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(Source(path, module, text, ast.parse(text, str(path))))
    return sources


def imported_modules(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Find what a file imports, also inside functions, by ``import_module("...")``, and as ``torch.distributed.x``.

    Args:
        tree: A parsed file.

    Yields:
        Dotted module name and line.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, node.lineno
        elif isinstance(node, ast.Attribute) and node.attr == "distributed" and _dotted(node) == "torch.distributed":
            yield "torch.distributed", node.lineno


def foreign_imports(sources: Sequence[Source]) -> list[str]:
    """List imports of a module by others than its owners.

    Args:
        sources: Files of ltd.

    Returns:
        One line per import that breaks the rule.
    """
    found: list[str] = []
    for source in sources:
        for name, line in imported_modules(source.tree):
            for guarded, owners in OWNERS.items():
                if within(name, guarded) and not any(within(source.module, owner) for owner in owners):
                    found.append(f"{source.module}:{line} imports {guarded}, which is left to {', '.join(owners)}")
    return sorted(set(found))


def forbidden_calls(sources: Sequence[Source]) -> list[str]:
    """List calls that ltd does not make: ``print``, ``.cuda()``, unpickling, reading the launcher's environment.

    Args:
        sources: Files of ltd.

    Returns:
        One line per call.
    """
    found: list[str] = []
    for source in sources:
        for node in ast.walk(source.tree):
            at = f"{source.module}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = _called(node)
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                safe = keywords.get("weights_only")
                if name == "print":
                    found.append(f"{at} prints; ltd logs")
                elif name.endswith(".cuda"):
                    found.append(f"{at} calls .cuda(); devices come from inputs")
                elif name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
                    found.append(f"{at} calls torch.load without weights_only=True")
            elif isinstance(node, ast.Constant) and node.value in LAUNCHER and source.module != "ltd.parallel.layout":
                found.append(f"{at} reads {node.value}; only ltd.parallel.layout does")
        if any(name.partition(".")[0] in ("pickle", "dill", "joblib") for name, _ in imported_modules(source.tree)):
            found.append(f"{source.module} imports an unpickler")
    return found


def vague_modules(sources: Sequence[Source]) -> list[str]:
    """List modules whose name says nothing."""
    return [source.module for source in sources if VAGUE_NAMES & set(source.module.split("."))]


def functions(sources: Sequence[Source]) -> list[Function]:
    """List every function and method, decorators left out, docstrings counted."""
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append(Function(node.name, f"{source.path.relative_to(ROOT)}:{node.lineno}", length))
    return found


def count_code(source: Source) -> int:
    """Count the lines that hold code: no blank lines, comments or docstrings."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in skip and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(source.tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def too_long(sources: Sequence[Source], *, max_function: int = MAX_FUNCTION, max_file: int = MAX_FILE) -> list[str]:
    """List functions and files past their limits, the longest first.

    Args:
        sources: Files.
        max_function: Lines of a function at most.
        max_file: Lines of a file at most.

    Returns:
        One line per place.
    """
    rows = [(one.num_lines, f"{one.where} {one.name}") for one in functions(sources) if one.num_lines > max_function]
    rows += [(s.num_lines, str(s.path.relative_to(ROOT))) for s in sources if s.num_lines > max_file]
    return [f"{name}: {length} lines" for length, name in sorted(rows, reverse=True)]


def check_layers() -> str:
    """Run the import-linter contract of pyproject.toml; the empty string when it holds, its report otherwise."""
    code = "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run(['--no-cache']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def measure() -> Proof:
    """Count lines per package and check every rule of the structure."""
    ltd = read_sources("ltd")
    groups = {"ltd (top modules)": [source for source in ltd if source.module.count(".") < 2 and _is_module(source)]}
    for folder in sorted(path.name for path in (ROOT / "ltd").iterdir() if (path / "__init__.py").is_file()):
        groups[f"ltd/{folder}"] = [source for source in ltd if within(source.module, f"ltd.{folder}")]
    groups["ltd in all"] = ltd
    groups["tools, train.py, sample.py"] = read_sources("tools", "train.py", "sample.py")
    groups["tests"] = read_sources("tests")
    rows = [_row(name, sources) for name, sources in groups.items() if sources]
    shipped = [*ltd, *groups["tools, train.py, sample.py"]]
    layers = check_layers()
    rules = (
        ("packages import downward only, rows independent (import-linter, docs/design.md)", [layers] if layers else []),
        *_owner_rules(ltd),
        ("no print, no .cuda(), no unpickling, launcher environment read once", forbidden_calls(ltd)),
        (f"no module named {', '.join(sorted(VAGUE_NAMES))}", vague_modules(shipped)),
        (f"no function over {MAX_FUNCTION} lines, no file over {MAX_FILE}", too_long(shipped)),
    )
    return Proof(
        title="Lines of code and import rules",
        columns=(
            "where",
            "files",
            "lines",
            "code lines",
            "functions",
            "95th percentile",
            "longest function",
            "longest file",
        ),
        rows=rows,
        misses=[f"{rule}: {broken}" for rule, found in rules for broken in found],
        notes=_notes(rules, too_long(shipped, max_function=AIM_FUNCTION, max_file=AIM_FILE)),
    )


def _owner_rules(sources: Sequence[Source]) -> Iterator[tuple[str, list[str]]]:
    """Each guarded module's rule, and the lines that break it."""
    foreign = foreign_imports(sources)
    for name, owners in OWNERS.items():
        rule = f"only {', '.join(owners)} import{'' if len(owners) > 1 else 's'} {name}"
        yield rule, [line for line in foreign if f" imports {name}," in line]


def _notes(rules: Sequence[tuple[str, Sequence[str]]], past_aim: Sequence[str]) -> str:
    table = markdown_table(("rule", "broken"), [(rule, len(found)) for rule, found in rules])
    aim = f"Past the aim of {AIM_FUNCTION} lines a function and {AIM_FILE} a file:"
    places = "\n".join(f"- {place}" for place in past_aim) or "- nothing"
    return (
        "Code lines leave out blank lines, comments and docstrings; lengths of functions and files count them.\n\n"
        f"{table}\n\nThe rules are tests too (tests/test_architecture.py).\n\n{aim}\n\n{places}"
    )


def _row(name: str, sources: Sequence[Source]) -> tuple[str | int, ...]:
    found = sorted(functions(sources), key=lambda function: function.num_lines)
    longest = found[-1] if found else None
    percentile = found[int(0.95 * (len(found) - 1))].num_lines if found else 0
    file = max(sources, key=lambda source: source.num_lines)
    return (
        name,
        len(sources),
        sum(source.num_lines for source in sources),
        sum(count_code(source) for source in sources),
        len(found),
        percentile,
        f"{longest.num_lines} ({longest.name})" if longest else "-",
        f"{file.num_lines} ({file.path.name})",
    )


def _is_module(source: Source) -> bool:
    """Whether a file stands directly in ``ltd/``."""
    return source.path.parent == ROOT / "ltd"


def within(module: str, package: str) -> bool:
    """Tell whether a module is a package or lies in it."""
    return module == package or module.startswith(package + ".")


def _dotted(node: ast.expr) -> str:
    """Write a chain of names and attributes with dots; the parts that are neither stand empty."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _called(node: ast.Call) -> str:
    return _dotted(node.func)
