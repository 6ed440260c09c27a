"""Results on disk: strict JSON, whole or not at all, refused early."""

import dataclasses
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lineage import results
from lineage.errors import FileError
from lineage.results import check_target, load_json, to_json, write_files

FILES = {"result.json": "new", "report.html": b"page"}


@dataclasses.dataclass(frozen=True)
class Record:
    value: object
    kind: str = "record"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not_become_null(number):
    assert to_json(Record({"a": [number, (1.5, number)]}))["value"] == {"a": [None, [1.5, None]]}


def test_json_is_strict_and_returns_what_was_saved(tmp_path):
    record = Record({"name": "日本 <b>\x1b[31m", "interval": results.Interval(0.1, 1 / 3, 0.5), "none": None})
    write_files(tmp_path / "out", {"result.json": results.dumps(record)})
    back = load_json(tmp_path / "out" / "result.json")
    assert back == to_json(record)
    assert back["value"]["interval"]["value"] == 1 / 3


def test_a_name_that_is_no_utf8_survives(tmp_path):
    name = os.fsdecode(b"model\xff.safetensors") if sys.platform != "win32" else "model\udcff.safetensors"
    write_files(tmp_path / "out", {"result.json": results.dumps(Record(name))})
    assert load_json(tmp_path / "out" / "result.json")["value"] == name


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", "null", '{"schema": 1, "kind": "svd"}', '{"schema": "1.0.0"}', "[" * 100_000, "\0", '"\\ud800"'],
)
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FileError, match=r"r\.json.*result\.json that a verb wrote"):
        load_json(tmp_path / "r.json")


def test_only_the_same_major_schema_is_read(tmp_path):
    major, minor, patch = map(int, results.SCHEMA.split("."))
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"schema": f"{major}.{minor + 1}.{patch}", "kind": "svd"}))
    assert load_json(path)["kind"] == "svd"
    path.write_text(json.dumps({"schema": f"{major + 1}.0.0", "kind": "svd"}))
    with pytest.raises(FileError, match="has schema"):
        load_json(path)


@pytest.mark.parametrize("folder", ["new", "new/deeper", "there", "."])
def test_all_files_appear_and_nothing_else(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    write_files(folder, FILES)
    assert contents(Path(folder)) == {"result.json": b"new", "report.html": b"page"}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_obey_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_files(tmp_path / "out", FILES)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "out" / "result.json").stat().st_mode) == 0o666 & ~umask


def test_an_existing_result_is_kept_unless_forced(tmp_path):
    write_files(tmp_path, {"result.json": "old"})
    for refuse in (lambda: check_target(tmp_path, list(FILES), False), lambda: write_files(tmp_path, FILES)):
        with pytest.raises(FileError, match=r"already holds result\.json.*--force"):
            refuse()
    assert contents(tmp_path) == {"result.json": b"old"}
    write_files(tmp_path, FILES, force=True)
    assert contents(tmp_path) == {"result.json": b"new", "report.html": b"page"}


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_files(tmp_path, FILES)
    assert contents(tmp_path)["notes.txt"] == b"mine"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("a file")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(FileError, match=r"file|writable"):
            check_target(folder, ["result.json"], force=True)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs an ordinary POSIX user")
def test_a_folder_that_may_not_be_written_is_refused_early(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FileError, match="writable"):
            check_target(tmp_path / "out", [], False)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("failing", range(len(FILES)))
@pytest.mark.parametrize("old", [{"result.json": "old", "report.html": "old page"}, {"report.html": "old page"}])
def test_a_locked_target_leaves_the_old_result(tmp_path, monkeypatch, failing, old):
    """Windows refuses to replace a file that is open elsewhere: whichever it is, all is as it was."""
    write_files(tmp_path / "out", old)
    before = contents(tmp_path)
    real, calls = os.replace, iter(range(100))

    def locked(source, target):
        if next(calls) == failing:
            raise PermissionError(13, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", locked)
    with pytest.raises(FileError, match=r"Access is denied.*open"):
        write_files(tmp_path / "out", FILES, force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, there):
    if there:
        write_files(tmp_path / "out", {"result.json": "old"})
    before = contents(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        write_files(tmp_path / "out", FILES, force=True)
    assert contents(tmp_path) == before
    assert (tmp_path / "out").exists() == there


KILLED_AT = """
import os, sys
from lineage.results import write_files
count = int(sys.argv[2])
def hook(event, args):
    global count
    if event in ("open", "os.rename", "os.mkdir") and str(args[0]).startswith(sys.argv[1]):
        count -= 1
        if count < 0:
            os._exit(9)
sys.addaudithook(hook)
write_files(sys.argv[1] + "/out", {"result.json": "new" * 1000, "report.html": "page" * 1000}, force=True)
"""


@pytest.mark.parametrize("there", [False, True])
def test_killed_at_any_step_every_file_is_whole_and_the_next_run_sweeps(tmp_path, there):
    whole = {b"old", b"new" * 1000, b"page" * 1000}
    for step in range(100):
        if there:
            write_files(tmp_path / "out", {"result.json": "old", "report.html": "old"}, force=True)
        ended = subprocess.run([sys.executable, "-c", KILLED_AT, str(tmp_path), str(step)]).returncode
        out = contents(tmp_path / "out") if (tmp_path / "out").exists() else {}
        results_there = {name: text for name, text in out.items() if not name.startswith(".")}
        assert set(results_there.values()) <= whole
        assert set(results_there) == set(FILES) if there else set(results_there) in (set(), set(FILES))
        if ended == 0:
            break
    assert step > 3
    write_files(tmp_path / "out", FILES, force=True)
    assert contents(tmp_path) == {
        os.path.join("out", k): v for k, v in [("result.json", b"new"), ("report.html", b"page")]
    }
