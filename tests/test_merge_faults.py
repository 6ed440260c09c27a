"""What goes wrong while merging loses nothing and is said clearly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_merging import save, tiny

import lineage
from lineage.errors import LineageError
from lineage.recipe import parse

pytestmark = pytest.mark.usefixtures("no_sync")
RECIPE = parse("x = a + b, 0.5, safetensors")


@pytest.fixture
def models(tmp_path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for i, name in enumerate("ab"):
        save(tiny(i), folder / f"{name}.safetensors")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


KILLS = 200
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import safetensors.torch, torch
import lineage
from lineage.recipe import parse
import lineage.merge_run

os.fsync = lambda handle: None  # a kill is no power failure
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
recipe = parse("x = a + b, 0.5, safetensors")
merge = lambda: lineage.merge(recipe, folder / "out", models=folder, force=True)
began = time.monotonic()
merge()
length = time.monotonic() - began
new = (folder / "out" / "x.safetensors").read_bytes()
old = (folder / "old.safetensors").read_bytes()
random.seed(0)
outcomes = set()
for _ in range(rounds):
    (folder / "out" / "x.safetensors").write_bytes(old)
    child = os.fork()
    if not child:
        merge()
        os._exit(0)
    time.sleep(random.uniform(0, 1.5 * length))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = (folder / "out" / "x.safetensors").read_bytes()
    assert found in (old, new), "a partial file"
    outcomes.add(found == new)
merge()
print(sorted(outcomes), sorted(os.listdir(folder / "out")))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to kill 200 runs in a few seconds")
def test_killed_at_any_moment_leaves_the_old_file_or_the_new(models):
    save({"model.x": torch.zeros(5)}, models / "old.safetensors")
    command = [sys.executable, "-c", KILLED, str(models), str(KILLS)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[False, True] ['x.safetensors']"


def test_disk_too_small_is_refused_first(models, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(LineageError, match="GB are free"):
        lineage.merge(RECIPE, tmp_path / "out", models=models)
    assert files(tmp_path / "out") == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file size there")
@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
def test_disk_that_fills_up_leaves_nothing_and_keeps_the_old_file(models, tmp_path, container):
    import resource

    out = tmp_path / "out"
    out.mkdir()
    (out / f"x.{container}").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(LineageError, match="cannot be written"):
            lineage.merge(RECIPE, out, models=models, force=True, container=container)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(out) == [f"x.{container}"]
    assert (out / f"x.{container}").read_bytes() == b"old"


def test_folder_that_cannot_be_written(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LineageError, match="cannot be written"):
        lineage.merge(RECIPE, tmp_path / "file" / "out", models=models)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only for root")
def test_read_only_folder(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    with pytest.raises(LineageError, match="cannot be written"):
        lineage.merge(RECIPE, out, models=models)


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [_touch, _cut, Path.unlink])
def test_input_that_changes_while_it_is_read(models, tmp_path, change):
    out = tmp_path / "out"
    seen = []

    def progress(done: int, total: int, label: str) -> None:
        if not seen:
            change(models / "b.safetensors")
        seen.append(done)

    with pytest.raises(LineageError, match=r"b\.safetensors"):
        lineage.merge(RECIPE, out, models=models, progress=progress)
    assert files(out) == []


def test_an_input_is_never_replaced(models):
    before = (models / "a.safetensors").read_bytes()
    with pytest.raises(LineageError, match="is an input"):
        lineage.merge(parse("a = a + b, 0.5, safetensors"), models, models=models, force=True)
    assert (models / "a.safetensors").read_bytes() == before


def test_an_existing_file_stays_without_force(models, tmp_path):
    lineage.merge(RECIPE, tmp_path / "out", models=models)
    with pytest.raises(LineageError, match="--force"):
        lineage.merge(RECIPE, tmp_path / "out", models=models)
    lineage.merge(RECIPE, tmp_path / "out", models=models, force=True)


def test_a_failing_run_leaves_nothing(models, tmp_path):
    def progress(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lineage.merge(RECIPE, tmp_path / "out", models=models, progress=progress)
    assert files(tmp_path / "out") == []


def test_litter_of_a_living_process_stays(models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = out / f".y.safetensors.{gone.pid}-00000000.lineage-part"
    alive = out / f".y.safetensors.{os.getpid()}-00000000.lineage-part"
    for path in (dead, alive):
        path.write_bytes(b"half a file")
    lineage.merge(RECIPE, out, models=models)
    assert files(out) == [alive.name, "x.safetensors"]


def test_the_same_merge_gives_the_same_file(models, tmp_path):
    for name in ("one", "two"):
        lineage.merge(RECIPE, tmp_path / name, models=models)
    one, two = ((tmp_path / name / "x.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


NAMES = {
    "x = a + bb, 0.5": r"1:9: no model is named 'bb'.*\n.*\n +\^\^\nDid you mean b\?",
    "x = a + __SD15__, 0.5": "--set SD15=FILE",
    "x = a + twice, 0.5": r"may be twice\.ckpt, twice\.safetensors",
}


@pytest.mark.parametrize("line", NAMES)
def test_names_are_resolved_exactly_or_refused(models, line):
    for ending in ("ckpt", "safetensors"):
        save(tiny(3), models / f"twice.{ending}")
    with pytest.raises(LineageError, match=NAMES[line]):
        lineage.merge(parse(line), models=models, dry_run=True)


def test_names_may_be_stems_files_hashes_paths_or_bound(models, tmp_path):
    digest = lineage.merge(RECIPE, models=models, dry_run=True).inputs  # hashes are not computed in a dry run
    assert [i.sha256 for i in digest] == [None, None]
    from lineage.hashing import sha256

    full = sha256(models / "b.safetensors")
    expected = None
    for name in ("b", "b.safetensors", str(models / "b.safetensors"), full, full[:10], "__B__"):
        bound = {"B": models / "b.safetensors"} if name == "__B__" else {}
        lineage.merge(parse(f"x = a + {name}, 0.5"), tmp_path, models=models, bound=bound, force=True)
        tensors = torch.load(tmp_path / "x.ckpt", weights_only=True)["model.diffusion_model.out.2.bias"]
        expected = tensors if expected is None else expected
        assert torch.equal(tensors, expected)
    with pytest.raises(LineageError, match="no such variable"):
        lineage.merge(RECIPE, models=models, bound={"C": models / "b.safetensors"}, dry_run=True)


def test_planning_reads_no_tensor(models, monkeypatch):
    from lineage import merge_run

    monkeypatch.setattr(merge_run, "stream", None)
    result = lineage.merge(RECIPE, models=models, dry_run=True)
    assert result.dry_run
    assert result.outputs[0].file is None
    lengths = {p.stat().st_size for p in models.iterdir()}
    assert abs(result.outputs[0].bytes - max(lengths)) < 4096


def test_planned_size_is_the_files_size(models, tmp_path):
    planned = lineage.merge(RECIPE, models=models, dry_run=True).outputs[0].bytes
    assert lineage.merge(RECIPE, tmp_path, models=models).outputs[0].bytes == planned
    assert len(safetensors.torch.load_file(tmp_path / "x.safetensors")) == len(tiny(0))
