"""The command line: instant, quiet in a pipe, honest exit codes, nothing overwritten unasked, documented."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file

import cli
import lineage
from lineage import results
from lineage.errors import LineageError

ROOT = Path(__file__).parent.parent
SCRIPT = Path(sys.executable).with_name("lineage.exe" if os.name == "nt" else "lineage")
COMMANDS = sorted(cli.cli.commands)
HEAVY = ("torch", "numpy", "plotly", "networkx", "scipy", "rich", "diffusers", "transformers", "sklearn")


@pytest.fixture
def pair(tmp_path):
    """Paths of a base of two matrices and a vector, and of a fine-tune of rank 3."""
    g = torch.Generator().manual_seed(0)
    base = {f"blocks.{i}.fc.weight": torch.randn(96, 128, generator=g) for i in range(2)}
    base["blocks.0.norm.bias"] = torch.randn(96, generator=g)
    tuned = {
        name: w + (torch.randn(96, 3, generator=g) @ torch.randn(3, 128, generator=g) if w.ndim == 2 else 0.1)
        for name, w in base.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


@pytest.fixture
def fake_svd(monkeypatch):
    def put(function):
        monkeypatch.setitem(vars(lineage), "svd", function)

    return put


def script(*args, **options) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *map(str, args)], capture_output=True, text=True, encoding="utf-8", **options)


# --- instant and documented


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(args):
    at_exit = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    code = f"{at_exit}; import cli; cli.main({args!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {m.split(".")[0] for m in run.stderr.split()} & set(HEAVY)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_explains_itself(name):
    command = cli.cli.commands[name]
    assert command.help
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert all(o.help for o in options), [o.name for o in options if not o.help]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name):
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    section = re.search(rf"^## `lineage {name}\b.*?(?=^## |\Z)", page, re.M | re.S)
    assert section, f"docs/commands.md has no section on `lineage {name}`"
    own = [o for o in cli.cli.commands[name].params if isinstance(o, click.Option)]
    missing = [o.opts[-1] for o in own if o.opts[-1] not in section[0] and o.opts[-1] not in page.split("\n## ")[0]]
    assert not missing, f"`lineage {name}`: not documented: {missing}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(call, shell):
    code, out, _ = call("completion", shell)
    assert code == 0
    assert "_LINEAGE_COMPLETE" in out


def test_completion_completes():
    env = {**os.environ, "_LINEAGE_COMPLETE": "bash_complete", "COMP_WORDS": "lineage sv", "COMP_CWORD": "1"}
    assert "plain,svd" in script(env=env).stdout


# --- exit codes


@pytest.mark.parametrize(
    "args", [["nonsense"], ["svd"], ["svd", "missing.safetensors"], ["svd", "--rank", "0"], ["report", "missing.json"]]
)
def test_wrong_usage_is_2(call, args):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert "Error" in err
    assert "Traceback" not in err


def test_three_models_are_refused(call, pair):
    assert call("svd", *pair, pair[0])[0] == 2


def test_a_user_error_is_2_with_its_message(call, pair, fake_svd):
    def refuse(*_, **__):
        raise LineageError("model \x1b[31m[bold]x[/bold] is torn")

    fake_svd(refuse)
    code, out, err = call("svd", *pair)
    assert (code, out) == (2, "")
    assert err == "Error: model \\x1b[31m[bold]x[/bold] is torn\n"


@pytest.mark.parametrize("bug", [ZeroDivisionError, EOFError, ModuleNotFoundError("x", name="lineage.nowhere")])
def test_a_bug_keeps_its_traceback(pair, fake_svd, bug):
    def fail(*_, **__):
        raise bug

    fake_svd(fail)
    with pytest.raises(bug if isinstance(bug, type) else type(bug)):
        cli.main(["svd", *map(str, pair)])


def test_a_bug_is_1():
    code = "import cli; cli.cli.callback = lambda: 1 / 0; cli.main(['completion', 'bash'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ZeroDivisionError" in run.stderr


def test_a_missing_extra_gives_the_pip_line(call, tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] in {"train", "diffusers"}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, _, err = call("demo", "-o", tmp_path / "demo")
    assert code == 2
    assert "pip install 'model-lineage[train]'" in err


INTERRUPTED = """
import signal, sys, time, lineage, cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a script starts in the background ignore it
def slow(*a, **k):
    print("started", flush=True)
    time.sleep(60)
lineage.svd = slow
cli.main(["svd", *sys.argv[1:]])
"""


@pytest.mark.skipif(os.name == "nt", reason="a console event there, not a signal")
def test_ctrl_c_is_clean(pair, tmp_path):
    args = [sys.executable, "-c", INTERRUPTED, *map(str, pair), "-o", str(tmp_path / "out")]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout
        run.stdout.readline()
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=30)
    assert run.returncode == 130
    assert err.strip() == "Interrupted."
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_early_is_no_bug(pair, options):
    with subprocess.Popen([SCRIPT, "svd", *pair, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout
        assert run.stderr
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == cli.BROKEN_PIPE


# --- results


def test_svd_saves_what_it_prints(call, pair, tmp_path):
    code, printed, _ = call("svd", *pair, "-o", tmp_path / "out", "--json")
    assert code == 0
    saved = results.load_json(tmp_path / "out" / "result.json")
    assert json.loads(printed) == saved
    assert saved["kind"] == "svd"
    assert {layer["signal_rank"] for layer in saved["layers"]} == {3}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "result.json"]


def test_svd_prints_the_answer_and_the_layers(call, pair):
    code, out, err = call("svd", *pair)
    assert (code, err) == (0, "")
    assert "blocks.1.fc.weight" in out
    assert "\x1b" not in out


def test_quiet_prints_nothing_and_verbose_more(call, pair, tmp_path):
    assert call("svd", *pair, "-q", "-o", tmp_path / "out") == (0, "", "")
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    assert call("svd", *pair, "-v")[0] == 0


def test_an_existing_result_stops_it_before_the_work(call, pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(lineage), "svd", lambda *_, **__: pytest.fail("worked"))
        code, _, err = call("svd", *pair, "-o", tmp_path / "out")
    assert code == 2
    assert "--force" in err
    assert call("svd", *pair, "-o", tmp_path / "out", "--force")[0] == 0
    assert results.load_json(tmp_path / "out" / "result.json")["kind"] == "svd"


def test_report_rebuilds_the_same_page(call, pair, tmp_path):
    call("svd", *pair, "-o", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_bytes()
    assert call("report", tmp_path / "out")[0] == 2
    assert call("report", tmp_path / "out" / "result.json", "-o", tmp_path / "again.html")[0] == 0
    assert (tmp_path / "again.html").read_bytes() == page
    (tmp_path / "out" / "report.html").unlink()
    assert call("report", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == page


def test_inspect_prints_and_gives_json(call, pair):
    code, out, _ = call("inspect", pair[0])
    assert code == 0
    assert "float32" in out
    assert "schema" not in out
    code, out, _ = call("inspect", pair[0], "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_names_cannot_steer_the_terminal(call, tmp_path):
    name = "a\x1b[31m[red]\x9b\u202e.weight"
    for stem, seed in (("base", 0), ("tuned", 1)):
        w = torch.randn(80, 80, generator=torch.Generator().manual_seed(seed))
        save_file({name: w}, tmp_path / f"{stem}.safetensors", {"\x1b]0;title\x07": "[link=x]y"})
    for args in (
        ["svd", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"],
        ["inspect", tmp_path / "base.safetensors"],
    ):
        for options in ([], ["--json"]):
            code, out, err = call(*args, *options)
            assert code == 0, err
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", out)


def test_long_metadata_is_cut_unless_asked_for(call, tmp_path):
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors", {"note": "x" * 5000})
    short, full = (call("inspect", tmp_path / "m.safetensors", *options)[1] for options in ([], ["-v"]))
    assert short.count("x") < 1000
    assert "5000 characters" in short
    assert full.count("x") >= 5000


def test_what_is_piped_is_not_truncated(call, tmp_path):
    name = "a" * 300 + ".weight"
    for stem, seed in (("base", 0), ("tuned", 1)):
        w = torch.randn(80, 80, generator=torch.Generator().manual_seed(seed))
        save_file({name: w}, tmp_path / f"{stem}.safetensors")
    out = call("svd", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")[1]
    assert out.count("a") > 300


# --- progress


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("quiet", [False, True])
def test_progress_shows_on_a_terminal_only(pair, quiet):
    import pty

    primary, secondary = pty.openpty()
    args = [SCRIPT, "svd", *pair, *(["-q"] if quiet else [])]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=secondary) as run:
        os.close(secondary)
        seen = b""
        while chunk := read_terminal(primary):
            seen += chunk
        assert run.stdout
        out = run.stdout.read()
    os.close(primary)
    assert run.returncode == 0
    assert (b"\x1b" in seen) is not quiet
    assert b"\x1b" not in out


def read_terminal(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except OSError:  # Linux's way of saying that the other end is closed
        return b""
