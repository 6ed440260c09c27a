"""Laws of the transfer experiment: predictions first, cells by themselves, the same end after any interruption."""

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_world import TINY

import cli
from lineage import prediction
from lineage.adapters import open_adapter
from lineage.errors import LineageError
from lineage.results import load_json
from train import cells, judge, measures, topology, transfer
from train.experiment import Experiment, Lessons, Measures, Worlds
from train.fit import Plan
from train.loop import Diverged
from train.models import open_base
from train.setups import Way

SMALL = Experiment(
    Worlds(characters=1),
    Lessons(steps=2, pictures=4, batch=2, seeds=(0, 1), at=(1,)),
    measures=Measures(held_out=2, draws=1, drawn=2, steps=2),
)

QUICK = Plan(steps=3, lr=1e-3, batch=4)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topology, "draw", lambda size, seed: TINY)
        patch.setattr(judge, "PLAN", QUICK)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer") / "out"
    transfer.transfer_test(SMALL, folder)
    return folder


def measured(folder: Path) -> dict[str, list]:
    """Of every file of cells: what it says, but for the seconds that it took."""
    files = sorted((folder / "cells").rglob("*.json"))
    return {str(f.relative_to(folder)): json.loads(f.read_text("utf-8"))["cells"] for f in files}


def found(folder: Path) -> list:
    return [cell for cells in measured(folder).values() for cell in cells]


def test_every_pair_is_measured_and_every_model_has_its_own_adapter(done: Path):
    names = {m.name for m in TINY.models}
    for target in ("personas", "hina"):
        of = [c for c in found(done) if c["target"] == target]
        assert {
            (c["base"], c["model"], c["seed"])
            for c in of
            if c["weight"] == 0.65 and c["network"] == "loha" and c["base"] != c["model"]
        } == {(x, y, s) for x in names for y in names for s in (0, 1) if x != y}
        own = {(c["model"], c["seed"], c["step"]) for c in of if c["base"] == c["model"] and c["weight"] == 1}
        assert own == {(name, s, step) for name in names for s in (0, 1) for step in (1, 2)}
        assert {c["model"] for c in of if c["network"] == "none"} == names
        assert {c["model"] for c in of if c["network"] == "random"} == names - {"base"}


def test_what_is_missing_is_done_again_to_the_same_numbers(done: Path, tmp_path: Path):
    again = shutil.copytree(done, tmp_path / "out")
    lost = [
        again / "cells" / "quick-0" / "hina" / "tuned-1.json",
        again / "cells" / "quick-0" / "personas" / "untouched.json",
    ]
    for file in lost:
        file.unlink()
    shutil.rmtree(again / "adapters" / "quick-0" / "hina" / "tuned-1")
    result = transfer.transfer_test(SMALL, again)
    assert measured(again) == measured(done)
    assert len(result.cells) == len(found(done))


def test_predictions_and_cells_are_all_that_another_machine_needs(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    again = tmp_path / "out"
    for name in ("predictions", "cells"):
        shutil.copytree(done / name, again / name)
    shutil.copy(done / "experiment.json", again)

    def refused(*_):
        raise AssertionError("a finished world is made again")

    monkeypatch.setattr(transfer.world, "build", refused)
    result, first = transfer.transfer_test(SMALL, again), transfer.transfer_test(SMALL, done)
    assert replace(result, provenance=first.provenance) == first
    (again / "cells" / "quick-0" / "hina" / "tuned-1.json").unlink()
    with pytest.raises(AssertionError, match="made again"):
        transfer.transfer_test(SMALL, again)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_transfer
with test_transfer.pytest.MonkeyPatch.context() as patch:
    test_transfer.torch.set_num_threads({threads})
    patch.setattr(test_transfer.topology, "draw", lambda size, seed: test_transfer.TINY)
    patch.setattr(test_transfer.judge, "PLAN", test_transfer.QUICK)
    patch.setattr(test_transfer.transfer, "jobs", test_transfer.few)
    test_transfer.transfer.transfer_test(test_transfer.SMALL, Path({folder!r}))
"""


def few(*told) -> list[cells.Job]:
    return [job for job in cells.jobs(*told) if job.target == "hina" and job.base in (None, "tuned", "mixed")]


@pytest.mark.parametrize("moment", ["worlds/*/models/*.safetensors", "worlds/*/truth.json", "cells/*/*/*.json"])
def test_killed_at_any_moment_it_ends_with_the_same_cells(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """While models are made, before the predictions stand, and between cells: a while after the first such file."""
    again = tmp_path / "out"
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(again), threads=torch.get_num_threads())
    running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not list(again.glob(moment)):
        time.sleep(0.01)
    time.sleep(random.random() / 4)
    running.kill()
    assert running.wait() != 0, "it was done before it could be killed"
    monkeypatch.setattr(transfer, "jobs", few)
    monkeypatch.setattr(transfer, "statistics", lambda *_: None)
    monkeypatch.setattr(transfer, "hypotheses", lambda *_: ())
    transfer.transfer_test(SMALL, again)
    assert measured(again).items() <= measured(done).items()
    assert len(measured(again)) == 5
    name = "predictions/quick-0.json"
    assert (again / name).read_text("utf-8") == (done / name).read_text("utf-8")


def test_finished_worlds_alone_can_be_looked_at(done: Path, tmp_path: Path):
    again = shutil.copytree(done, tmp_path / "out")
    two = replace(SMALL, worlds=replace(SMALL.worlds, seeds=(0, 1)))
    (again / "experiment.json").write_text(json.dumps(two.to_json()), encoding="utf-8")
    file = again / "predictions" / "quick-0.json"
    told = json.loads(file.read_text("utf-8"))
    told["made_of"]["experiment"] = two.hash
    file.write_text(json.dumps(told), encoding="utf-8")
    assert [w.name for w in transfer.transfer_test(two, again, finished_only=True).worlds] == ["quick-0"]
    file.unlink()
    for folder in (again, tmp_path / "other"):
        with pytest.raises(LineageError, match="no world is finished"):
            transfer.transfer_test(two, folder, finished_only=True)


def test_a_training_that_diverges_is_a_result_and_the_rest_goes_on(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = shutil.copytree(done, tmp_path / "out")
    gone = folder / "cells" / next(folder.glob("cells/*")).name / "hina" / "base-1.json"
    gone.unlink()

    def diverging(config, **options):
        raise Diverged("The loss of step 2 is nan.")

    monkeypatch.setattr(cells, "train", diverging)
    for _ in range(2):  # measured, and read again
        result = transfer.transfer_test(SMALL, folder)
        (lost,) = result.failed
        assert (lost.target, lost.base, lost.way, lost.seed) == ("hina", "base", "loha", 1)
        assert lost.reason == "The loss of step 2 is nan."
        assert len(result.cells) == len(found(done)) - len(measured(done)[str(gone.relative_to(folder))])


def test_confirmatory_worlds_follow_from_predictor_and_settings_alone(monkeypatch: pytest.MonkeyPatch):
    asked = replace(SMALL, worlds=replace(SMALL.worlds, confirmatory=10))
    assert len(set(asked.seeds)) == 10
    assert replace(asked, worlds=replace(asked.worlds, confirmatory=3, seeds=(5,))).seeds == asked.seeds[:3]
    other = replace(asked, training=replace(asked.training, steps=3))
    assert not {*other.seeds} & {*asked.seeds}
    before = asked.seeds
    monkeypatch.setattr(prediction, "code_hash", lambda: "0" * 64)
    assert not {*asked.seeds} & {*before}


def test_a_folder_may_be_named_from_where_one_stands(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("worlds", "predictions"):
        shutil.copytree(done / name, Path("out") / name)
    shutil.copy(done / "experiment.json", "out")
    monkeypatch.setattr(transfer, "jobs", few)
    monkeypatch.setattr(transfer, "statistics", lambda *_: None)
    monkeypatch.setattr(transfer, "hypotheses", lambda *_: ())
    first = transfer.transfer_test(SMALL, "out").cells
    Path("out/cells/quick-0/hina/tuned-1.json").unlink()
    assert transfer.transfer_test(SMALL, "out").cells == first


def test_cells_older_than_the_predictions_are_refused(done: Path, tmp_path: Path):
    again = shutil.copytree(done, tmp_path / "out")
    file = again / "predictions" / "quick-0.json"
    told = json.loads(file.read_text("utf-8"))
    told["predictions"][0]["strength"] += 0.5
    file.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(LineageError, match="under other predictions"):
        transfer.transfer_test(SMALL, again)
    told["made_of"]["code"] = "0" * 64
    file.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(LineageError, match="another predictor"):
        transfer.transfer_test(SMALL, again)
    with pytest.raises(LineageError, match="holds another experiment"):
        transfer.transfer_test(replace(SMALL, measures=Measures(held_out=3)), done)


def test_predictions_are_older_than_every_cell_and_come_from_weights_alone(done: Path):
    file = done / "predictions" / "quick-0.json"
    written = file.stat().st_mtime_ns
    assert all(f.stat().st_mtime_ns > written for f in (done / "cells").rglob("*.json"))
    told = json.loads(file.read_text("utf-8"))["predictions"]
    assert {(p["base"], p["model"]) for p in told} == {
        (x.name, y.name) for x in TINY.models for y in TINY.models if x.name != y.name
    }


def test_no_two_adapters_share_initialisation_or_order(done: Path):
    seeds = [f.read_text("utf-8") for f in sorted((done / "adapters").rglob("*.toml"))]
    lines = [line for text in seeds for line in text.splitlines() if line.startswith("seed = ")]
    assert len(lines) == len(set(lines)) == 16


def test_an_untouched_cell_is_the_model_and_common_numbers_are_common(done: Path):
    plain = {(c["target"], c["model"]): c for c in found(done) if c["network"] == "none"}
    permuted, source = plain["personas", "shuffled"], plain["personas", "tuned"]
    assert permuted["losses"] == pytest.approx(source["losses"], rel=1e-3)
    assert all(c["retention_judges"] == {} for c in plain.values())
    assert len({tuple(c["losses"]) for c in plain.values()}) > 2


def test_a_random_adapter_has_the_norms_of_the_trained_one_and_nothing_else(done: Path):
    trained = open_adapter(next((done / "adapters").rglob("adapter.safetensors")))
    control = measures.random_like(trained, 3)
    assert control.modules.keys() == trained.modules.keys()
    for name, factors in trained.modules.items():
        a, b = factors.delta().flatten(), control.modules[name].delta().flatten()
        assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-4)
        if a.norm() > 0:
            assert abs(float(torch.nn.functional.cosine_similarity(a, b, 0))) < 0.5


def test_a_loss_does_not_depend_on_the_pictures_beside_it(done: Path, monkeypatch: pytest.MonkeyPatch):
    [site] = transfer.sites(done, SMALL)
    base, shown = open_base(site.model("tuned")), site.held_out("personas")
    together = measures.losses(base, shown, 3, 1)
    monkeypatch.setattr(measures, "AT_ONCE", 1)
    assert measures.losses(base, shown, 3, 1) == pytest.approx(together, rel=1e-5)
    assert measures.losses(base, shown[:1], 3, 1) == pytest.approx(together[:1], rel=1e-5)
    assert len({*together}) == len(shown)


def test_one_cell_alone_is_the_one_of_the_full_run(done: Path, tmp_path: Path):
    alone = tmp_path / "out"
    shutil.copytree(done / "worlds", alone / "worlds")
    stamp = json.loads((done / "cells" / "quick-0" / "hina" / "mixed-1.json").read_text("utf-8"))["predictions"]
    [site] = transfer.sites(alone, SMALL)
    job = cells.Job(alone, SMALL, site, "hina", "mixed", 1, Way("loha"), stamp)
    cells.run(job)
    name = "cells/quick-0/hina/mixed-1.json"
    assert measured(alone) == {name: measured(done)[name]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[world]\nsize = 'small'", r"unknown table \[world\]. Did you mean"),
        ("[training]\nstep = 3", "unknown key training.step"),
        ("[worlds]\nsize = 'huge'", "'huge' is not known"),
        ("[worlds]\nseeds = []", "name at least one"),
        ("[measures]\ndraws = 'two'", "measures.draws: 'two'"),
        ("[measures]\nheld_out = 1", "measures.held_out: 1 is too small"),
        ("[measures]\nweight = 0.0", "weight and reference_weight must be more than 0"),
        ("[training]\nnetwork = 'lokr'", "training.network: 'lokr' is not known"),
        ("[worlds]\nstyles = 0", "there is no target"),
        ("worlds = 3", r"must be a table"),
    ],
)
def test_settings_that_are_not_understood_are_named(tmp_path: Path, text: str, said: str):
    file = tmp_path / "experiment.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(LineageError, match=said):
        Experiment.read(file)


def test_command_forecasts_and_writes_result_and_page(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    again = shutil.copytree(done, tmp_path / "out")
    file = tmp_path / "x.toml"
    file.write_text(
        "[worlds]\ncharacters = 1\n[training]\nsteps = 2\npictures = 4\nbatch = 2\nseeds = [0, 1]\nat = [1]\n"
        "[measures]\nheld_out = 2\ndraws = 1\ndrawn = 2\nsteps = 2\n",
        encoding="utf-8",
    )
    assert cli._exit_code(["transfer-test", str(file), "-o", str(again), "--dry-run"]) == 0
    assert "16  adapters" in capsys.readouterr().out
    assert cli._exit_code(["transfer-test", str(file), "-o", str(again), "-q"]) == 0
    result = load_json(again / "result.json")
    assert len(result["cells"]) == len(found(done))
    assert "</html>" in (again / "report.html").read_text("utf-8")
    assert (again / "cells.csv").exists()
