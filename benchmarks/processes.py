"""Do several processes give the results of one, also when some of them are killed or stopped?

    python -m benchmarks.processes --out DIR [--only equal kills hang nodes samples speed]
        [--docs docs/distributed.md]

Every experiment runs the command as torchrun starts it, on this machine with Gloo, and compares
files. The figures are written to DIR/processes.json. ``--docs`` writes what this file says between
the markers of a page; with ``--only`` and no names, nothing is run again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.result_file import machine, write_json
from benchmarks.tables import about, fill, number
from fastlangevin.learn.checkpoint import checksum, list_checkpoints, read_checkpoint

TRAIN = {
    "data": "digits", "width": 4, "steps": 5, "batch-size": 13, "parts": 6, "buffer-size": 50,
    "reinit": 0.1, "ema": 0.9, "flip": True, "log-every": 20, "save-every": 25,
    "sample-every": 1000, "samples": 4, "device": "cpu",
}  # fmt: skip
FASTLANGEVIN = [sys.executable, "-m", "fastlangevin"]


def options(settings: Mapping[str, Any]) -> list[str]:
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()
    ]


def command(processes: int, *arguments: Any, restarts: int = 0) -> list[str]:
    """The command line of some processes; one process is the plain command."""
    words = [str(argument) for argument in arguments]
    if processes == 1 and not restarts:
        return [*FASTLANGEVIN, *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(processes)]
    return [*launcher, "--max-restarts", str(restarts), "-m", "--", "fastlangevin", *words]


def start(line: list[str], log: Path, threads: int = 1) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with log.open("ab") as file:
        return subprocess.Popen(line, stdout=file, stderr=file, env=environment)


def finish(line: list[str], log: Path, threads: int = 1) -> None:
    if start(line, log, threads).wait() != 0:
        raise RuntimeError(f"{' '.join(line)} failed, see {log}")


def workers(job: subprocess.Popen[bytes]) -> list[int]:
    """The processes with a RANK that a launcher has started, in the order of their ranks.

    There are none while it starts or restarts them.
    """
    ranks = {}
    for pid in read(f"/proc/{job.pid}/task/{job.pid}/children").split():
        for variable in read(f"/proc/{pid.decode()}/environ").split(b"\0"):
            if variable.startswith(b"RANK="):
                ranks[int(variable[5:])] = int(pid)
    return [ranks[rank] for rank in sorted(ranks)]


def read(path: str) -> bytes:
    """A file of /proc; nothing if its process has just ended."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def send(job: subprocess.Popen[bytes], choose: Callable[[list[int]], int], number: int) -> bool:
    """Send a signal to one of a job's workers; return False if the job ends before it has any."""
    while job.poll() is None:
        if ranks := workers(job):
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(choose(ranks), number)
                return True
        time.sleep(0.05)
    return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def weights(run: Path) -> str:
    """A checksum of everything in the last checkpoint of a run."""
    return checksum("", read_checkpoint(run)[0])


def digest(folder: Path) -> str:
    """A digest of all images in a folder of samples."""
    images = hashlib.sha256()
    for path in sorted(folder.glob("*.npy")):
        images.update(np.load(path).tobytes())
    return images.hexdigest()[:16]


def equal(out: Path) -> dict[str, Any]:
    """Training, sampling and evaluating with 1 to 4 processes."""
    digests: dict[str, Any] = {"weights": {}, "samples": {}, "figures": {}}
    for n in (1, 2, 3, 4):
        run, samples, figures = (out / f"{name}-{n}" for name in ("run", "samples", "figures"))
        settings = options(TRAIN | {"iterations": 100})
        finish(command(n, "train", "--out", run, *settings), out / "log")
        digests["weights"][n] = weights(run)
        sampling = ("--n", 500, "--per-file", 64, "--device", "cpu", "--out", samples)
        finish(command(n, "sample", out / "run-1", *sampling), out / "log")
        digests["samples"][n] = digest(samples)
        evaluating = ("--features", "classifier", "--reference", 500, "--n", 400, "--device", "cpu")
        finish(command(n, "evaluate", out / "run-1", *evaluating, "--out", figures), out / "log")
        digests["figures"][n] = hashlib.sha256(figures.read_bytes()).hexdigest()[:16]
    return {name: {"equal": len(set(f.values())) == 1, **f} for name, f in digests.items()}


def kills(out: Path, per_run: int = 5) -> dict[str, Any]:
    """SIGKILL of a random worker at random moments of one job, which torchrun restarts.

    The first one may hit the start. The others come after a new checkpoint.
    """
    draw = random.Random(0)
    settings = options(TRAIN | {"iterations": 1200})
    finish(command(1, "train", "--out", out / "whole", *settings), out / "log")
    whole_weights, jobs = weights(out / "whole"), []
    for n in (1, 2, 3, 4):
        run, killed_at = out / f"killed-{n}", []
        last_checkpoint: list[Path] = []
        job = start(command(n, "train", "--out", run, *settings, restarts=50), out / "log")
        for i in range(per_run):
            while i > 0 and job.poll() is None and list_checkpoints(run)[-1:] == last_checkpoint:
                time.sleep(0.05)
            began, wait = time.monotonic(), draw.uniform(0, 3 if i else 10)
            while job.poll() is None and time.monotonic() - began < wait:
                time.sleep(0.05)
            if not send(job, draw.choice, signal.SIGKILL):
                break
            last_checkpoint = list_checkpoints(run)[-1:]
            killed_at.append(int(last_checkpoint[0].stem) if last_checkpoint else 0)
        jobs.append({
            "processes": n, "last_checkpoint_at_kill": killed_at, "exit_status": job.wait(),
            "weights_equal": weights(run) == whole_weights,
        })  # fmt: skip
    return {"jobs": jobs, "kills": sum(len(job["last_checkpoint_at_kill"]) for job in jobs)}


def hang(out: Path, limit: float = 15) -> dict[str, Any]:
    """SIGSTOP of one rank: the others end within the time limit, and name it."""
    settings = options(TRAIN | {"iterations": 10**6, "save-every": 10**6})
    line = command(3, "train", "--out", out / "run", "--timeout", limit, *settings)
    job = start(line, out / "log")
    while job.poll() is None and not (out / "run" / "series.jsonl").exists():
        time.sleep(0.1)
    time.sleep(3)
    since = time.monotonic()
    send(job, lambda ranks: ranks[-1], signal.SIGSTOP)
    status = job.wait()
    lines = [text for text in (out / "log").read_text().splitlines() if "no answer from" in text]
    return {"limit_s": limit, "ended_after_s": time.monotonic() - since, "exit_status": status,
            "errors": lines[:2]}  # fmt: skip


def nodes(out: Path) -> dict[str, Any]:
    """Two launchers that meet on loopback, as two machines would, with two processes each."""
    settings = options(TRAIN | {"iterations": 100})
    finish(command(1, "train", "--out", out / "alone", *settings), out / "log")
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    line += ["-m", "--", "fastlangevin", "train", "--out", str(out / "run"), *settings]
    jobs = [start(line, out / "log") for _ in range(2)]
    status = [job.wait() for job in jobs]
    return {"exit_status": status, "weights_equal": weights(out / "run") == weights(out / "alone")}


def samples(out: Path, n: int = 50_000) -> dict[str, Any]:
    """CIFAR-shaped samples by two ranks, killed half way and continued, against one process."""
    np.save(out / "images.npy", np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), "uint8"))
    changes = {"data": out / "images.npy", "width": 1, "steps": 1, "iterations": 1, "flip": True}
    settings = options({"batch-size": 2, "samples": 1, "device": "cpu"} | changes)
    finish(command(1, "train", "--out", out / "run", *settings), out / "log")
    line = ("sample", out / "run", "--n", n, "--device", "cpu", "--out")
    finish(command(1, *line, out / "one"), out / "log")
    job = start(command(2, *line, out / "two"), out / "log")
    while job.poll() is None and len(list((out / "two").glob("*.npy"))) < n / 512 / 2:
        time.sleep(0.05)
    for pid in (*workers(job), job.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.wait()
    files_at_kill = len(list((out / "two").glob("*.npy")))
    finish(command(2, *line, out / "two"), out / "log")
    figures = {
        "n": n, "files_at_kill": files_at_kill, "files": len(list((out / "two").glob("*.npy"))),
        "equal": digest(out / "one") == digest(out / "two"),
    }  # fmt: skip
    for folder in ("one", "two"):
        shutil.rmtree(out / folder)
    return figures


def speed(out: Path, rounds: int = 3) -> dict[str, Any]:
    """Two processes of one thread against one process of two threads, by turns."""
    forms = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}
    learning: dict[str, list[float]] = {form: [] for form in forms}
    sampling: dict[str, list[float]] = {form: [] for form in forms}
    for i in range(rounds):
        for form, (n, threads) in forms.items():
            run, folder = out / f"run-{n}-{i}", out / f"samples-{n}-{i}"
            settings = options({"iterations": 60, "log-every": 1, "device": "cpu"})
            finish(command(n, "train", "--out", run, *settings), out / "log", threads)
            lines = (run / "metrics.jsonl").read_text().splitlines()[10:]
            learning[form].append(statistics.median(json.loads(x)["seconds"] for x in lines))
            sampling_options = ("--n", 4096, "--per-file", 256, "--device", "cpu", "--out", folder)
            finish(command(n, "sample", "digits", *sampling_options), out / "log", threads)
            times = sorted(path.stat().st_mtime for path in folder.glob("*.npy"))
            # The first file of each process also has its start in it.
            sampling[form].append((times[-1] - times[n - 1]) / (len(times) - n) / 256)
    return {
        "seconds_per_iteration": {f: statistics.median(v) for f, v in learning.items()},
        "seconds_per_sample": {f: statistics.median(v) for f, v in sampling.items()},
        "rounds": rounds,
    }


EXPERIMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "equal": equal, "kills": kills, "hang": hang, "nodes": nodes, "samples": samples,
    "speed": speed,
}  # fmt: skip


def shown(results: Mapping[str, Any]) -> str:
    """What the results say, as a list."""
    words = {True: "equal", False: "DIFFERENT"}
    lines = []
    if equal := results.get("equal"):
        each = ", ".join(f"{name} {words[of['equal']]}" for name, of in equal.items())
        lines.append(f"1, 2, 3 and 4 processes: {each}.")
    if kills := results.get("kills"):
        before_checkpoint = sum(job["last_checkpoint_at_kill"].count(0) for job in kills["jobs"])
        equal_jobs = sum(job["weights_equal"] and job["exit_status"] == 0 for job in kills["jobs"])
        lines.append(
            f"{kills['kills']} kills of a random process, {before_checkpoint} of them before the "
            f"first checkpoint: {equal_jobs} of {len(kills['jobs'])} jobs ended with the weights "
            "of an uninterrupted one."
        )
    if hang := results.get("hang"):
        lines.append(
            f"A stopped process (SIGSTOP): {'' if hang['errors'] else 'NOT '}named. With a limit "
            f"of {hang['limit_s']} s, the job ended {hang['ended_after_s']:.0f} s after the "
            "signal, because torchrun waits 30 s for the stopped process."
        )
    if nodes := results.get("nodes"):
        lines.append(f"Two launchers on one machine: weights {words[nodes['weights_equal']]}.")
    if samples := results.get("samples"):
        lines.append(
            f"{samples['n']:,} samples, stopped at {samples['files_at_kill']} of "
            f"{samples['files']} files and continued: {words[samples['equal']]}."
        )
    for name, times in results.get("speed", {}).items():
        if isinstance(times, dict):
            each = ", ".join(f"{number(1e3 * s)} with {form}" for form, s in times.items())
            lines.append(f"{name.replace('_', ' ').replace('seconds', 'Milliseconds')}: {each}.")
    content = {"device": "cpu", "benchmark": "processes", "machine": results["machine"]}
    return "\n".join([about(content), "", *(f"- {line}" for line in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--docs", type=Path, help="write the results between a page's markers")
    chosen = parser.parse_args()
    file = chosen.out / "processes.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in chosen.only:
        folder = chosen.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        results[name] = EXPERIMENTS[name](folder)
        write_json(file, results | {"machine": machine()})
        print(name, json.dumps(results[name], indent=1))
    if chosen.docs:
        fill(chosen.docs, "processes", shown(results))


if __name__ == "__main__":
    main()
