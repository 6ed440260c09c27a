"""The house's rules, read from the source: imports go only downwards, and library code runs on any system."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["lineage", "train", "reports", "cli"]
BANNED = {
    "lineage": {"click", "rich", "plotly", "diffusers", "transformers"},
    "train": {"click", "rich", "plotly"},
    "reports": {"torch", "safetensors", "diffusers", "transformers", "click"},
    "cli": set(),
}
HEAVY = {"torch", "numpy", "scipy", "networkx", "sklearn", "plotly", "diffusers", "transformers", "rich", "joblib"}
ONE_SYSTEM_ONLY = {
    "fcntl",
    "grp",
    "pwd",
    "resource",
    "termios",
    "tty",
    "pty",
    "syslog",
    "posix",
    "posixpath",
    "winreg",
    "msvcrt",
}
ONE_SYSTEM_CALLS = {
    "fork", "forkpty", "mkfifo", "mknod", "getuid", "geteuid", "getpgid", "setsid", "sched_getaffinity", "sendfile",
    "posix_fadvise", "posix_fallocate", "copy_file_range", "sysconf", "getloadavg", "O_DIRECT", "SIGKILL", "SIGHUP",
}  # fmt: skip
SYSTEM_FOLDERS = ("/proc", "/dev/", "/sys/", "/tmp", "/etc", "/var", "/usr", "/home", "/root", "C:\\")
TEXT_IO = {"open", "read_text", "write_text"}

Tree = ast.Module


def sources(floor: str) -> list[Path]:
    found = [ROOT / "cli.py"] if floor == "cli" else sorted((ROOT / floor).rglob("*.py"))
    assert found
    return found


def imported(tree: Tree) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, inside functions too; relative ones keep their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno


def floor_faults(tree: Tree, floor: str) -> list[str]:
    upstairs = set(FLOORS[FLOORS.index(floor) + 1 :]) | {"tests", "benchmarks"}
    roots = [(name.split(".")[0], line) for name, line in imported(tree)]
    return [
        f"{line}: {root or 'relative import'}" for root, line in roots if not root or root in BANNED[floor] | upstairs
    ]


def portability_faults(tree: Tree) -> list[str]:
    faults = [f"{line}: {name}" for name, line in imported(tree) if name.split(".")[0] in ONE_SYSTEM_ONLY]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ONE_SYSTEM_CALLS:
            faults.append(f"{node.lineno}: {node.attr}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(SYSTEM_FOLDERS):
            faults.append(f"{node.lineno}: {node.value!r}")
        if isinstance(node, ast.Call):
            faults += call_faults(node)
    return faults


def call_faults(call: ast.Call) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in TEXT_IO and not is_binary(call) and not any(k.arg == "encoding" for k in call.keywords):
        yield f"{call.lineno}: {name} without an encoding"
    if name in {"open", "Path"} and any(has_slash(argument) for argument in call.args):
        yield f"{call.lineno}: a path joined by hand"


def is_binary(call: ast.Call) -> bool:
    """open(..., "rb"), or an `open` that is no text file's: mmap, zip members, os.open, Image.open, our own openers."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    pathlike = isinstance(owner, ast.Call) or (isinstance(owner, ast.Name) and owner.id in {"path", "file"})
    foreign = owner is not None and not pathlike and getattr(call.func, "attr", "") == "open"
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return foreign or any("b" in mode for mode in modes)


def has_slash(node: ast.expr) -> bool:
    """A "/" glued into text with + or in an f-string; Path / "name" is a division, and fine."""
    joined = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add))
    constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return joined and any("/" in c or "\\" in c for c in constants)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_only_downwards(floor):
    faults = {str(p.name): floor_faults(ast.parse(p.read_text("utf-8")), floor) for p in sources(floor)}
    assert not {name: found for name, found in faults.items() if found}


@pytest.mark.parametrize("floor", FLOORS)
def test_library_code_runs_on_any_system(floor):
    faults = {str(p.name): portability_faults(ast.parse(p.read_text("utf-8"))) for p in sources(floor)}
    assert not {name: found for name, found in faults.items() if found}


def test_the_command_line_imports_nothing_heavy_up_front():
    tree = ast.parse((ROOT / "cli.py").read_text("utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {name.split(".")[0] for name, _ in imported(top)} & (HEAVY | {"train", "reports"})


@pytest.mark.parametrize(
    ("floor", "text"),
    [
        ("lineage", "import click"),
        ("lineage", "def f():\n    from rich.table import Table"),
        ("lineage", "import train.loop"),
        ("lineage", "from .keys import match"),
        ("train", "from reports import build"),
        ("reports", "import torch.nn as nn"),
        ("reports", "import cli"),
    ],
)
def test_the_floor_rule_sees(floor, text):
    assert floor_faults(ast.parse(text), floor)


@pytest.mark.parametrize(
    "text",
    [
        "import fcntl",
        "def f():\n    from pwd import getpwnam",
        "import os\nos.fork()",
        "x = '/proc/meminfo'",
        "open(folder + '/name', 'rb')",
        "Path(f'{folder}/{name}')",
        "path.read_text()",
        "open(path)",
        "path.open('w')",
        "Path(name).open()",
    ],
)
def test_the_portability_rule_sees(text):
    assert portability_faults(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "open(path, 'rb')",
        "path.read_text('utf-8', encoding=e)",
        "folder / 'name'",
        "self.zip.open(name)",
        "os.replace(a, b)",
    ],
)
def test_the_portability_rule_lets_pass(text):
    assert not portability_faults(ast.parse(text))


@pytest.mark.slow
@pytest.mark.parametrize("floor", ["lineage", "reports"])
def test_a_floor_loads_without_what_is_above_it(floor):
    """The source may hide an import in a string; what is loaded cannot."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sources(floor) if p.stem != "__init__"]
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    upstairs = set(FLOORS[FLOORS.index(floor) + 1 :]) | BANNED[floor]
    assert set(run.stdout.split()) & upstairs == set()
