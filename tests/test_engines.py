"""Work on a local cluster of Ray or Dask: the same results, by other processes."""

import os
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from lineage.engines import in_parallel
from lineage.errors import LineageError
from lineage.fingerprint import fingerprints

CLUSTERS = pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("dask", "distributed")])


def test_unknown_engines_are_named():
    with pytest.raises(LineageError, match="ray, dask"):
        in_parallel(str, [1], engine="spark")


@pytest.mark.slow
@CLUSTERS
def test_a_local_cluster_gives_the_same_fingerprints(tmp_path, engine, package):
    pytest.importorskip(package)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        save_file({"weight": torch.randn(40, 30, generator=torch.Generator().manual_seed(i))}, path)
    here, _ = fingerprints(paths, cache=tmp_path / "here")
    there, failed = fingerprints(paths, cache=tmp_path / "there", engine=engine)
    assert not failed
    assert {p: f.tensors for p, f in there.items()} == {p: f.tensors for p, f in here.items()}


@pytest.mark.slow
@CLUSTERS
def test_a_cluster_works_in_processes_of_its_own(engine, package):
    pytest.importorskip(package)
    assert os.getpid() not in in_parallel(lambda _: os.getpid(), range(4), engine=engine)


@pytest.mark.slow
def test_ray_gives_every_job_a_gpu_of_its_own(monkeypatch):
    ray = pytest.importorskip("ray")
    start = ray.init

    def told(_: int) -> tuple[int, str]:
        return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setattr(ray, "init", partial(start, num_cpus=2, num_gpus=2))  # said to be there
    seen = set(in_parallel(told, range(8), engine="ray", gpu=True))
    assert len({process for process, _ in seen}) == 2
    assert sorted(gpu for _, gpu in seen) == ["0", "1"]
    monkeypatch.setattr(ray, "init", partial(start, num_cpus=2, num_gpus=0))
    with pytest.raises(LineageError, match="no GPU"):
        in_parallel(told, range(2), engine="ray", gpu=True)
