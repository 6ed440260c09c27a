"""What is shipped: the wheel in a clean environment of the core alone, the pins, and the papers."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").split())
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
PROGRAMS = "Scripts" if os.name == "nt" else "bin"


def canonical(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def run(*args, **options) -> str:
    ended = subprocess.run(list(map(str, args)), capture_output=True, text=True, **options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what is in the tree, so that no build folder is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / name, copy)
    for package in ("lineage", "train", "reports", "tests"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, copy)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "lineage",
        "train",
        "reports",
        "cli.py",
    }
    assert {f"{package}/py.typed" for package in ("lineage", "train", "reports")} <= set(names)
    source = {p.relative_to(ROOT).as_posix() for d in ("lineage", "train", "reports") for p in (ROOT / d).rglob("*.*")}
    assert {name for name in source if "__pycache__" not in name} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_names_itself(wheel):
    with zipfile.ZipFile(wheel) as packed:
        metadata = packed.read(next(n for n in packed.namelist() if n.endswith("/METADATA"))).decode()
        scripts = packed.read(next(n for n in packed.namelist() if n.endswith("/entry_points.txt"))).decode()
    assert "\nName: model-lineage\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "lineage = cli:main" in scripts


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The programs' folder of a new environment with the wheel and its core dependencies alone."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / PROGRAMS / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    return folder / PROGRAMS


@pytest.fixture
def working_folder(tmp_path) -> Path:
    """A user's folder whose own files are called like our packages."""
    for name in ("train", "cli", "reports", "lineage", "results", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user’s own file was imported')", "utf-8")
    g = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        save_file({"a.weight": torch.randn(70, 70, generator=g)}, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.slow
def test_the_core_alone_runs_among_a_users_own_files(clean, working_folder):
    def lineage(*args) -> str:
        return run(clean / "lineage", *args, cwd=working_folder, env=ENVIRONMENT)

    assert "svd" in lineage("--help")
    assert PROJECT["project"]["version"] in lineage("--version")
    assert "a.weight" in lineage("svd", "base.safetensors", "tuned.safetensors", "-o", "out")
    assert lineage("inspect", "base.safetensors")
    assert sorted(p.name for p in (working_folder / "out").iterdir()) == ["report.html", "result.json"]
    lineage("report", "out", "-o", "again.html")


@pytest.mark.slow
def test_without_the_extra_the_demo_says_the_pip_line(clean, working_folder):
    ended = subprocess.run(
        [clean / "lineage", "demo"], capture_output=True, text=True, cwd=working_folder, env=ENVIRONMENT
    )
    assert ended.returncode == 2
    assert "pip install 'model-lineage[train]'" in ended.stderr


def test_the_core_imports_only_what_it_declares():
    """Of lineage, reports and the command line; train has its extra, and so have the engines of other machines."""
    sources = [ROOT / "cli.py", *(ROOT / "lineage").rglob("*.py"), *(ROOT / "reports").rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["engines"]]
    declared = {canonical(d).replace("scikit-learn", "sklearn") for d in wanted}
    assert roots <= declared | {"lineage", "reports", "train"}


def test_every_dependency_is_pinned():
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {canonical(d) for d in [*PROJECT["project"]["dependencies"], *(d for extra in extras for d in extra)]}
    assert wanted <= {canonical(name) for name in PINS}


def test_pre_commit_runs_the_pinned_tools():
    text = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    revisions = dict(re.findall(r"repo: \S+/(\S+)\n\s+rev: v(\S+)", text))
    assert revisions == {"ruff-pre-commit": PINS["ruff"], "pyright-python": PINS["pyright"]}


def test_the_version_is_one():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (\S+)$", citation, re.M) == [PROJECT["project"]["version"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    local = [t for t in targets if not t.startswith(("http:", "https:"))]
    assert not [t for t in local if not (page.parent / t).is_file()]


def test_the_readme_opens_with_what_a_newcomer_needs():
    first_screen = "\n".join((ROOT / "README.md").read_text("utf-8").splitlines()[:30])
    for wanted in ("pip install model-lineage", "lineage svd", "lineage inspect", "](docs/pictures/", "genetics"):
        assert wanted in first_screen
    assert "make test" in (ROOT / "README.md").read_text("utf-8")


def test_the_schema_page_is_of_this_schema():
    from lineage import cluster_result
    from lineage.results import SCHEMA, LayerSpectrum, SvdResult

    text = (ROOT / "docs" / "schema.md").read_text("utf-8")
    assert f"`{SCHEMA}`" in text
    fields = [*LayerSpectrum.__dataclass_fields__, *SvdResult.__dataclass_fields__]
    assert not [name for name in fields if f"`{name}`" not in text]
    cluster = text[text.index("## kind `cluster`") :]
    records = [r for r in vars(cluster_result).values() if getattr(r, "__module__", "") == cluster_result.__name__]
    fields = {name for record in records for name in record.__dataclass_fields__} - {"provenance"}
    assert not [name for name in fields if not re.search(rf"\b{name}\b", cluster)]
