"""Several processes, one job: sweeps under DDP, ranks that disagree, torchrun."""

import json
import os
import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from hydra import compose, initialize_config_module

from lightning_mask.app.agreement import digests
from lightning_mask.app.launch import job_command
from tests.app.conftest import TINY, command, train_command

TWO = [*TINY, "trainer=ddp_cpu", "logger=none", "test=false"]
# A sweeper as an unseeded search is: whoever runs it draws other values.
SWEEPER = dedent(
    """
    import random
    from hydra.core.plugins import Plugins
    from hydra.core.config_store import ConfigStore
    from hydra.plugins.sweeper import Sweeper


    class Unseeded(Sweeper):
        def setup(self, *, hydra_context, task_function, config):
            self.config = config
            self.launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config
            )

        def sweep(self, arguments):
            for job in range(2):
                rate = random.SystemRandom().uniform(1e-4, 1e-2)
                results = self.launcher.launch([[*arguments, f"optimizer.lr={rate}"]], initial_job_idx=job)
                results[0].return_value


    ConfigStore.instance().store(
        group="hydra/sweeper", name="unseeded", node={"_target_": "hydra_plugins.unseeded.Unseeded"}, provider="unseeded"
    )
    """
)


@pytest.fixture
def sweeper(tmp_path: Path) -> str:
    """A folder for PYTHONPATH with the plugin."""
    folder = tmp_path / "plugins" / "hydra_plugins"
    folder.mkdir(parents=True)
    (folder / "unseeded.py").write_text(SWEEPER)
    return str(folder.parent)


def test_the_command_of_one_job_of_a_sweep() -> None:
    argv = ["train.py", "-m", "mask=head,bitfit", "-cd", "mine", "hydra.verbose=true", "hydra.sweep.dir=x"]
    made = job_command(
        argv, "train", ["mask=head"], ["hydra.verbose=true", "hydra.sweep.dir=x", "hydra/sweeper=unseeded"]
    )
    assert made == [
        "train.py",
        "--config-name=train",
        "--config-dir=mine",
        "mask=head",
        "hydra.verbose=true",
        "hydra.mode=RUN",
    ]
    assert job_command(["lightning-mask", "train", *argv[1:]], "train", [], [])[:2] == ["lightning-mask", "train"]


def test_the_digest_is_of_the_job_and_not_of_the_paths() -> None:
    with initialize_config_module("lightning_mask.conf", version_base="1.3"):
        plain, moved, other = (
            digests(compose("train", overrides=o)) for o in ([], ["paths.log_dir=/elsewhere"], ["seed=1"])
        )
    assert plain == moved
    assert [name for name in plain if plain[name] != other[name]] == ["seed"]


@pytest.mark.slow
def test_in_a_sweep_all_ranks_run_the_same_job(sweeper: str, tmp_path: Path) -> None:
    done = train_command("-m", *TWO, "hydra/sweeper=unseeded", cwd=tmp_path, PYTHONPATH=sweeper)
    assert done.returncode == 0, done.stdout
    (sweep,) = (tmp_path / "logs/smoke/sweeps").iterdir()
    assert not (tmp_path / "logs/smoke/runs").exists()
    rates = set()
    for job in ("0", "1"):
        summary = json.loads((sweep / job / "summary.json").read_text())
        assert summary["world_size"] == 2
        assert summary["mask"]["held_changed"] == 0
        rates |= {o for o in summary["overrides"] if o.startswith("optimizer.lr=")}
    assert len(rates) == 2
    assert done.stdout.count("The run") == 2, "each job is reported once, by rank 0"


@pytest.mark.slow
def test_a_failing_job_ends_the_sweep(tmp_path: Path) -> None:
    done = train_command("-m", *TWO, "mask.train=[net.nope],[net.classifier]", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1
    assert "net.nope" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list(tmp_path.rglob("summary.json"))


FAILS = dedent(
    """
    import os
    from pathlib import Path
    from lightning.pytorch import Callback


    class Fails(Callback):
        def __init__(self, folder, ranks):
            self.folder, self.ranks = folder, ranks

        def on_train_batch_start(self, trainer, *_):
            Path(self.folder, str(os.getpid())).touch()
            if trainer.global_step == 1 and trainer.global_rank in self.ranks:
                raise RuntimeError("out of luck")
    """
)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["[0]", "[1]"])
def test_an_error_in_training_ends_the_sweep_and_every_rank(ranks: str, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    (tmp_path / "pids").mkdir()
    bad = [
        "+callbacks.bad._target_=fails.Fails",
        f"+callbacks.bad.folder={tmp_path}/pids",
        f"+callbacks.bad.ranks={ranks}",
    ]
    done = train_command("-m", *TWO, "mask=head", *bad, "seed=0,1", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "RuntimeError: out of luck" in done.stdout
    (sweep,) = (tmp_path / "logs/smoke/sweeps").iterdir()
    assert [job.name for job in sweep.iterdir() if job.is_dir()] == ["0"]
    pids = [int(file.name) for file in (tmp_path / "pids").iterdir()]
    assert len(pids) == 2
    assert not any(map(runs, pids))


@pytest.mark.slow
def test_ranks_that_composed_different_configs_are_refused(tmp_path: Path) -> None:
    overrides = " ".join(f"'{o}'" for o in TWO)
    script = Path(__file__).resolve().parents[2] / "scripts/train.py"
    each = f"exec {sys.executable} {script} {overrides} seed=$RANK"
    done = command(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "bash", "-c", each,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(
        r"Ranks 1 on \S+ differ from rank 0 on \S+ in seed\. A sweep was started once per rank", done.stdout
    )
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.slow
def test_under_torchrun_all_ranks_share_one_folder(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = command(*launcher, "-m", "lightning_mask.app.train", *TWO, "test=true", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (run,) = (tmp_path / "logs/smoke/runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert sum(map(sum, summary["confusion_matrix"]["rows_true"])) == 500


@pytest.mark.slow
def test_two_processes_switch_phase(tmp_path: Path) -> None:
    phases = [o for o in TWO if o != "test=false"] + ["mask=mask_then_lift", "mask.phases.0.batches=1"]
    done = train_command(*phases, "hydra.run.dir=one", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("The run") == 1
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    assert summary["mask"]["active"] == summary["mask"]["total"]
    assert summary["mask"]["held_changed"] == 0
    assert [phase["step"] for phase in summary["mask"]["phases"]] == [0, 2]


@pytest.mark.slow
def test_a_model_dealt_out_over_two_processes_trains_goes_on_and_is_tested(tmp_path: Path) -> None:
    sharded = [*TINY, "trainer=fsdp_cpu", "trainer.strategy.save_distributed_checkpoint=true", "logger=none"]
    sharded += ["mask.scope=[net.layers]", "paths.output_dir=run"]  # conv weights of which some entries train
    first = train_command(*sharded, "test=false", cwd=tmp_path)
    assert first.returncode == 0, first.stdout
    assert (tmp_path / "run/checkpoints/last.ckpt").is_dir()
    again = train_command(*sharded, "ckpt_path=last", "trainer.max_steps=8", "test=true", cwd=tmp_path)
    assert again.returncode == 0, again.stdout
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["mask"]["steps"] == 8
    assert summary["mask"]["held_checked"] > 1000
    assert summary["mask"]["held_changed"] == 0
    assert {row["held_by"] for row in summary["mask"]["tensors"]} >= {"compact", "requires_grad"}
    assert 0 <= summary["metrics"]["test/accuracy"] <= 1


@pytest.mark.slow
def test_optuna_searches_rate_and_density_by_the_validation_loss(tmp_path: Path) -> None:
    words = [*TINY, "sweep=optuna", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=search", "test=false", "logger=none"]
    done = train_command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    losses = [json.loads((tmp_path / f"search/{i}/summary.json").read_text())["metrics"]["val/loss"] for i in (0, 1)]
    best = yaml.safe_load((tmp_path / "search/optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(min(losses))
    assert 1e-4 <= best["best_params"]["lr"] <= 1e-2
    assert 1e-3 <= best["best_params"]["mask.density"] <= 1e-1
