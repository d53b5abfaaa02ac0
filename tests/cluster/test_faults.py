"""Faults: each ends in a clear error or a clean resume, in bounded time, and leaves no half-written file."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch.distributed import checkpoint

from lightning_mask.app import errors
from lightning_mask.app.lock import kept_to_this_job
from lightning_mask.app.newest import name_and_step, newest_checkpoint
from lightning_mask.app.train import train
from tests.app.conftest import REPO, TINY, command
from tests.distributed.forks import clean_environment, free_port

Config = Callable[..., DictConfig]
HERE = Path(__file__).parent
SHORT = [*TINY, "test=false", "logger=none", "scheduler=none", "trainer.max_steps=4"]


def can(*words: str) -> bool:
    """Whether the kernel lets this user do something; root of a container may not have the capability for it."""
    return shutil.which(words[0]) is not None and not subprocess.run(words, check=False, capture_output=True).returncode


# Only a real file system fills up, and only the kernel can cut a link between two hosts; where a user may not ask for
# either, there is nothing that could be tested instead. .ci/run, as root of a machine of its own, runs them all.
MAY_MOUNT = can("unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir())
needs_mounts = pytest.mark.skipif(not MAY_MOUNT, reason="may not mount a file system")
needs_hosts = pytest.mark.skipif(
    not (can("unshare", "--net", "true") and can("ip", "netns", "list")),
    reason="may not make network namespaces, or no iproute2",
)


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def filled_to_the_last_byte(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


@needs_mounts
def test_a_full_disk_is_named_and_the_checkpoint_before_stays_usable(config: Config, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "size=1m") as disk:
        words = [*SHORT, f"paths.output_dir={disk / 'run'}", "report=null", "callbacks.best=null"]
        train(config(*words))
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 60_000))
        with pytest.raises(OSError, match="No space left on device") as caught:
            train(config(*words, "trainer.max_steps=8", "ckpt_path=auto"))
        said = errors.explain(caught.value)
        checkpoints = disk / "run/checkpoints"
        assert caught.value.errno == errno.ENOSPC
        assert str(checkpoints) in said
        assert "what was there before is as it was" in said
        assert "\n" not in said
        assert newest_checkpoint(checkpoints) == checkpoints / "last.ckpt"
        assert step_of(checkpoints / "last.ckpt") == 4
        assert not [file for file in checkpoints.iterdir() if file.name.startswith(".")]
        filled_to_the_last_byte(disk / "more")
        with pytest.raises(OSError, match="No space left on device"), kept_to_this_job(disk / "run"):
            pass
        assert not (disk / "run/.lock").exists(), "an empty one would keep the next try out"
        (disk / "ballast").unlink()
        (disk / "more").unlink()
        train(config(*words, "trainer.max_steps=8", "ckpt_path=auto"))
        assert step_of(checkpoints / "last.ckpt") == 8


@pytest.mark.skipif(os.geteuid() == 0 and not MAY_MOUNT, reason="root writes everywhere, and may not mount here")
def test_a_folder_that_cannot_be_written_to_is_refused_before_training(config: Config, tmp_path: Path) -> None:
    cfg = config(*SHORT, f"paths.output_dir={tmp_path / 'frozen/run'}", "data.batch_size=0")  # refused later, else
    if os.geteuid() == 0:
        with tmpfs(tmp_path / "frozen", "ro,size=1m"), pytest.raises(OSError, match="Read-only") as caught:
            train(cfg)
    else:
        (tmp_path / "frozen").mkdir(mode=0o500)
        with pytest.raises(OSError, match="Permission denied") as caught:
            train(cfg)
    assert str(tmp_path / "frozen/run") in errors.explain(caught.value)


@contextmanager
def another_job(folder: Path) -> Iterator[int]:
    """A process that is at work in a folder."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with kept_to_this_job(folder):
            os.write(told, b"x")
            signal.pause()
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_job_in_a_folder_is_refused_and_one_after_a_job_that_died_is_not(
    config: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with another_job(run) as pid:
        with pytest.raises(FileExistsError) as caught:
            train(config(*SHORT))
        assert f"process {pid} on {socket.gethostname()}" in errors.explain(caught.value)
        assert "hydra.run.dir=" in errors.explain(caught.value)
        done = command(sys.executable, str(REPO / "scripts/train.py"), *SHORT, f"hydra.run.dir={run}", cwd=tmp_path)
        assert done.returncode == 2
        assert [file.name for file in run.iterdir()] == [".lock"], "no word of another command"
    assert (run / ".lock").exists(), "it was killed"
    train(config(*SHORT))
    assert step_of(run / "checkpoints/last.ckpt") == 4
    assert not (run / ".lock").exists()


def test_a_lock_of_another_machine_counts_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(
        json.dumps({"host": "elsewhere", "pid": 1, "born": "1", "job": "7", "restarts": "0 0", "token": "t"})
    )
    said = r"process 1 on elsewhere \(job 7\), last seen \d+ s ago; .*delete"
    with pytest.raises(FileExistsError, match=said), kept_to_this_job(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(FileExistsError), kept_to_this_job(tmp_path):
        pass
    left = lock.read_text()
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # another step of the same job, at work on another machine
    with pytest.raises(FileExistsError), kept_to_this_job(tmp_path):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job, requeued
    with kept_to_this_job(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    monkeypatch.delenv("SLURM_JOB_ID")
    lock.write_text(left)
    os.utime(lock, (time.time() - 400, time.time() - 400))
    with kept_to_this_job(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    lock.write_text("")  # another one is just being taken
    with pytest.raises(FileExistsError, match="only just begun"), kept_to_this_job(tmp_path):
        pass


def flip(content: bytes) -> bytes:
    """Change one byte of a tensor: half-way, where the weights are."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def without_loops(content: bytes, scratch: Path) -> bytes:
    scratch.write_bytes(content)
    state = torch.load(scratch, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "loops"}, scratch)
    return scratch.read_bytes()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(config: Config, tmp_path: Path) -> None:
    words = [*SHORT, "callbacks.best=null", "callbacks.last.every_n_steps=1", "trainer.val_check_interval=100"]
    train(config(*words))
    folder = tmp_path / "run/checkpoints"
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    assert (step_of(last), step_of(previous)) == (4, 3)
    whole = torch.load(last, weights_only=True)["state_dict"]
    good = last.read_bytes()
    assert newest_checkpoint(folder) == last
    for damaged in (good[: len(good) // 2], good[:-1], b"", b"some words", flip(good)):
        last.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"last\.ckpt cannot be gone on from and is passed over"):
            assert newest_checkpoint(folder) == previous
    last.write_bytes(without_loops(good, tmp_path / "scratch"))  # weights alone are no state of training, but no damage
    assert newest_checkpoint(folder) == previous
    last.write_bytes(flip(good))
    with pytest.warns(UserWarning, match=r"last\.ckpt"):
        train(config(*words, "ckpt_path=auto"))
    again = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert step_of(previous) == 3, "the damaged one did not take its place"
    last.write_bytes(b"")
    previous.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"previous\.ckpt"):
        assert newest_checkpoint(folder) is None


def test_a_damaged_folder_of_shards_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    """As FSDP2's strategy writes it: torch's distributed checkpoint, and beside it what is not dealt out."""
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for step, folder in ((3, previous), (4, last)):
        weights = {f"weight{i}": torch.randn(500 + i) for i in range(3)}
        checkpoint.save({"model": weights, "step": step}, checkpoint_id=folder, no_dist=True)
        torch.save({"loops": {}, "global_step": step}, folder / "meta.pt")
    assert newest_checkpoint(tmp_path) == last
    assert name_and_step(last) == "last.ckpt of step 4"
    (shard,) = last.glob("*.distcp")
    good = {file: file.read_bytes() for file in (shard, last / "meta.pt", last / ".metadata")}
    places = [(good[shard].index(weight.numpy().tobytes()) + 7, 255) for weight in weights.values()]
    places.append((good[shard].rindex(b"PK\1\2") + 8, 1))  # the flag that says that a part is encrypted
    for file, content in good.items():
        at_places = places if file == shard else []
        bad = [content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :] for at, bits in at_places]
        for damaged in (*bad, content[: len(content) // 2], content[:-1], content[7:], b""):
            file.write_bytes(damaged)
            with pytest.warns(UserWarning, match=r"last\.ckpt cannot be gone on from and is passed over"):
                assert newest_checkpoint(tmp_path) == previous, (file.name, len(damaged))
        file.write_bytes(content)
        assert newest_checkpoint(tmp_path) == last


def test_a_run_that_starts_anew_in_a_used_folder_goes_on_from_its_own_checkpoints(
    config: Config, tmp_path: Path
) -> None:
    words = [*SHORT, "callbacks.last.every_n_steps=1", "trainer.val_check_interval=100"]
    train(config(*words, "callbacks.best.filename=old"))
    folder = tmp_path / "run/checkpoints"
    assert {file.name for file in folder.iterdir()} == {"last.ckpt", "previous.ckpt", "old.ckpt"}
    train(config(*words, "trainer.max_steps=1"))
    assert step_of(folder / "old.ckpt") == 4
    assert not (folder / "previous.ckpt").exists(), "it is the other run's"
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert step_of(newest) == 1
    train(config(*words, "trainer.max_steps=3"))
    for file in ("last.ckpt", "previous.ckpt"):  # as a copy in another order may leave them
        os.utime(folder / file)
    assert newest_checkpoint(folder) == folder / "last.ckpt"
    assert step_of(folder / "last.ckpt") == 3


@contextmanager
def launched(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """Two ranks of the application under torchrun, for as long as the block lasts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with subprocess.Popen(
        [*command, str(REPO / "scripts/train.py"), *words],
        env=clean_environment() | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        try:
            yield job
        finally:
            job.terminate()  # and torchrun its ranks


def second_rank(agent: int) -> int:
    """The process that torchrun started last."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return max(map(int, children))


def wait_for(file: Path, than: int = -1) -> None:
    until = time.monotonic() + 150
    while True:
        with suppress(FileNotFoundError):  # between two names it is away
            if step_of(file) > than:
                return
        assert time.monotonic() < until, f"{file} did not come"
        time.sleep(0.2)


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_ends_the_job_and_a_signal_to_one_rank_saves_it(tmp_path: Path) -> None:
    words = [*TINY, "trainer=ddp_cpu", "test=false", "logger=none", "scheduler=none", "ckpt_path=auto", "report=null"]
    words += [f"hydra.run.dir={tmp_path / 'run'}", "trainer.max_steps=100000", "callbacks.last.every_n_steps=5"]
    words += ["trainer.val_check_interval=100000"]
    last = tmp_path / "run/checkpoints/last.ckpt"
    with launched(*words) as job:
        wait_for(last)
        os.kill(second_rank(job.pid), signal.SIGKILL)
        output, _ = job.communicate()
    assert job.returncode != 0, output
    before = step_of(last)

    with launched(*words) as job:
        wait_for(last, before)
        os.kill(second_rank(job.pid), signal.SIGUSR1)
        output, _ = job.communicate()
    assert job.returncode != 0, output
    assert f"going on from {last}" in output
    assert "stopped by" in output
    assert "exitcode  : 75" in output
    assert step_of(last) > before
    assert not [file for file in last.parent.iterdir() if file.name.startswith(".")]


@needs_hosts
@pytest.mark.slow
def test_when_a_host_is_cut_off_both_sides_end_within_the_time_limit_and_the_run_goes_on(tmp_path: Path) -> None:
    name = f"lm{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    environment = clean_environment() | {
        "PYTHONPATH": str(HERE.parent / "distributed"),
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
    }
    script = [sys.executable, str(HERE / "host_case.py"), str(tmp_path)]
    hosts = []
    try:
        for space in ("a", "b"):
            ip("netns", "add", f"{name}{space}")
        ip("link", "add", "v0", "netns", f"{name}a", "type", "veth", "peer", "name", "v1", "netns", f"{name}b")
        for rank, host in enumerate("ab"):
            space = f"{name}{host}"
            ip("-n", space, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", f"v{rank}")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", f"v{rank}", "up")
            more = {"NODE_RANK": str(rank), "RANK": str(rank), "GLOO_SOCKET_IFNAME": f"v{rank}"}
            log = (tmp_path / f"{rank}.log").open("w")
            command = ["ip", "netns", "exec", space, *script]
            hosts.append(subprocess.Popen(command, env=environment | more, stdout=log, stderr=subprocess.STDOUT))
        wait_for(tmp_path / "last.ckpt", 10)
        ip("-n", f"{name}b", "link", "set", "v1", "down")
        codes = [host.wait(timeout=100) for host in hosts]  # twelve seconds are the limit of each wait
        assert 0 not in codes
    finally:
        for host in hosts:
            host.kill()
        for space in ("a", "b"):
            subprocess.run(["ip", "netns", "del", f"{name}{space}"], check=False)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert "Error" in (tmp_path / "0.log").read_text()
    steps = step_of(newest) + 3
    done = subprocess.run(
        [*script, str(steps)],
        env=clean_environment() | {"PYTHONPATH": str(HERE.parent / "distributed")},
        check=False,
    )
    assert done.returncode == 0
    assert step_of(tmp_path / "last.ckpt") == steps
