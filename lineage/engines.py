"""Where joblib's work runs: processes of this machine, or a cluster of Ray or Dask, by their own joblib backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from joblib import Parallel, delayed, parallel_config

from lineage.errors import LineageError, MissingExtra

ENGINES = ("ray", "dask")
Progress = Callable[[int, int, str], None]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_parallel(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    jobs: int = 1,
    engine: str | None = None,
    address: str | None = None,
    gpu: bool = False,
    progress: Progress | None = None,
) -> list[_Result]:
    """[function(item) for item in items], by `jobs` processes, or by a cluster: engine "ray" or "dask" at `address`
    (None: a new one on this machine). A cluster's machines must see the files under the same paths. gpu: Ray gives
    every item a GPU of its own, which is the only one that it sees.

    LineageError for an engine that is unknown, not installed or not there, and for a Ray cluster without that GPU."""
    tasks = (delayed(function)(item) for item in items)
    if engine:
        with _cluster(engine, address, gpu):
            return _listed(Parallel()(tasks), items, progress)
    parallel: Any = Parallel(jobs, return_as="generator")
    return _listed(parallel(tasks), items, progress)


def _listed(results: Any, items: Sequence[_Item], progress: Progress | None) -> list[Any]:
    found = []
    for i, (item, result) in enumerate(zip(items, results, strict=True), 1):
        found.append(result)
        if progress:
            progress(i, len(items), str(item))
    return found


@contextmanager
def _cluster(engine: str, address: str | None, gpu: bool) -> Iterator[None]:
    if engine not in ENGINES:
        raise LineageError(f"engine {engine!r}: choose one of {', '.join(ENGINES)}.")
    with _ray(address, gpu) if engine == "ray" else _dask(address):
        yield


@contextmanager
def _ray(address: str | None, gpu: bool) -> Iterator[None]:
    try:
        import ray  # type: ignore[reportMissingImports]
        from ray.util.joblib import register_ray  # type: ignore[reportMissingImports]
    except ImportError as e:
        raise MissingExtra("cluster", "engines", "ray") from e
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise _not_there("ray", address, e) from e
    register_ray()
    try:
        kind = "GPU" if gpu else "CPU"
        count = int(ray.cluster_resources().get(kind, 0))
        if not count:
            raise LineageError(f"--engine ray: the cluster has no {kind}. Start one that has, or choose --device cpu.")
        with parallel_config("ray", n_jobs=count, ray_remote_args={"num_gpus": int(gpu)}):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _dask(address: str | None) -> Iterator[None]:
    try:
        from distributed import Client  # type: ignore[reportMissingImports]
    except ImportError as e:
        raise MissingExtra("cluster", "engines", "dask.distributed") from e
    try:
        client = Client(address) if address else Client(dashboard_address=None)
    except (OSError, ValueError) as e:
        raise _not_there("dask", address, e) from e
    with client, parallel_config("dask"):
        yield


def _not_there(engine: str, address: str | None, error: Exception) -> LineageError:
    return LineageError(f"--engine {engine} --address {address or 'none'}: no cluster there ({str(error)[:200]}).")
