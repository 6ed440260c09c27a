"""What all tests share: no network, no thread storm, GPU tests only where there is one."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The user's cache folder is not touched; subprocesses inherit this."""
    os.environ["LINEAGE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def call(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    import cli

    def run(*args) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture
def no_sync(monkeypatch):
    """For tests that write much and are not about power failures: syncing a busy disk is slow."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
