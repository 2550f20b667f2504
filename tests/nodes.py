"""Two nodes on one machine: launchers and SLURM's scripts run, where other programs are doubles."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.starts import environment, free_port

HOSTS = "node0 slots=1\nnode1 slots=1\n"
_LIMIT_SECONDS = 300

# As the real ones do it: the highest exit code of all tasks is theirs.
_WAIT = """\
for task in $tasks; do wait $task; found=$?; [ $found -gt $code ] && code=$found; done
exit $code"""
DOUBLES = {
    "fastclr": f'exec {sys.executable} -m fastclr "$@"',
    "scontrol": 'case $1 in show) echo 127.0.0.1;; *) echo "$@" >> scontrol.txt;; esac',
    # A task's own variables.
    "srun": f"""\
while case $1 in --*) true;; *) false;; esac; do shift; done
tasks= code=0
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NNODES=2 "$@" & tasks="$tasks $!"
done
{_WAIT}""",
    "ssh": "echo 127.0.0.1",  # is asked for a host's name and address
    # The words as one line for a shell on each host, %n its number.
    "pdsh": f"""\
while [ "$1" != -w ]; do shift; done
hosts=$(echo "$2" | tr , " "); shift 2
tasks= code=0 node=0
for host in $hosts; do
  sh -c "$(echo "$*" | sed "s/%n/$node/g")" & tasks="$tasks $!"; node=$((node + 1))
done
{_WAIT}""",
}


def run_batch(script: str, folder: Path, code: int = 0) -> None:
    """Run a batch script in a folder; ``code`` is to be its exit code."""
    (folder / "job.sh").write_text(script)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]"}
    _run([["bash", "job.sh"]], folder, slurm | {"FREE_PORT": str(free_port())}, code)


def launch(line: str, folder: Path, flags: list[str]) -> int:
    """Run a launcher's command with flags behind it, on two ranks, or on one where it says 4.

    One that is to be given on each node, with its number, is given twice.

    Returns:
        The number of ranks.
    """
    (folder / "hosts.txt").write_text(HOSTS)
    launcher, port = line.split()[0], free_port()
    line = re.sub(r" --master.port \d+", "", line)
    line = re.sub(r"(--master.addr) node0", r"\1 127.0.0.1", line)
    on_each = 1 if "--nnodes" in line else 2
    line = re.sub(r"(--num_accelerators|--nproc-per-node) 8", rf"\1 {on_each}", line)
    num_ranks = 1 if "--nproc-per-node 4" in line else 2
    line = line.replace("--nproc-per-node 4", "--nproc-per-node 1")
    flag = "--master_port" if launcher == "deepspeed" else "--master-port"
    line = line.replace(launcher, f"{launcher} {flag} {port}", 1)
    lines = {re.sub(r"(--node.rank) 0", rf"\1 {node}", line) for node in range(2)}
    _run([[*shlex.split(each), *flags] for each in sorted(lines)], folder)
    return num_ranks


def _run(
    commands: list[list[str]], folder: Path, variables: Mapping[str, str] = {}, code: int = 0
) -> None:
    """Run commands beside one another; ``code`` is to be the exit code of each."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in DOUBLES.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environ = {**environment(), **variables}
    environ["PATH"] = f"{programs}:{environ['PATH']}"
    starts = []
    for number, command in enumerate(commands):
        with (folder / f"log-{number}.txt").open("w") as log:
            start = subprocess.Popen(
                command, cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT
            )
        starts.append(start)
    try:
        codes = [start.wait(_LIMIT_SECONDS) for start in starts]
    finally:
        for start in starts:
            start.kill()
    logs = [(folder / f"log-{number}.txt").read_text()[-3000:] for number in range(len(starts))]
    assert codes == [code] * len(codes), "\n".join([str(commands), *logs])
