"""Jobs on this machine, and torchrun's agents over hosts: by ssh, or by hand on each of them."""

from __future__ import annotations

import dataclasses
import os
import shlex

from efficient_dl.launching.job import OWN_COMMANDS, Job
from efficient_dl.launching.script import Submission, head, program_words, quoted, torchrun

_BY_HAND = """\
Trains on {nodes} hosts with {workers} workers each. On every host, in the same folder of a shared file system:
    HEAD=first-host bash torchrun.sh
HEAD names the host that holds the rendezvous, the same one everywhere. If a worker or a host fails, torchrun starts
all workers again, up to {restarts} times, and edl train goes on from its last checkpoint."""


def local(job: Job) -> Submission:
    """Workers on this machine: edl starts its own, torchrun those of other programs."""
    title = f"Runs {job.workers} workers on this machine."
    if job.command[0] in OWN_COMMANDS:
        words = ["-m", "efficient_dl.cli", job.command[0], "--workers", str(job.workers), *job.command[1:]]
        run = shlex.join([job.python, *words])
    else:
        options = ["--standalone", f"--nproc-per-node={job.workers}", *quoted(job.options)]
        run = torchrun(job, options, quoted(program_words(job, restarts=False)))
    text = f"{head(job, title)}\nexec {run}\n"
    return Submission(text, (("bash", "-c", text),), reads_text=False)


def hosts(job: Job) -> Submission:
    """The script for every host; without a list of hosts the user starts it."""
    if job.hosts and not job.folder:
        job = dataclasses.replace(job, folder=os.getcwd())  # ssh begins in the home folder
    title = _BY_HAND.format(nodes=job.nodes, workers=job.workers, restarts=job.restarts)
    options = [
        f"--nnodes={job.nodes} --nproc-per-node={job.workers} --max-restarts={job.restarts}",
        f'--rdzv-backend=c10d --rdzv-endpoint="$HEAD:{job.port}" --rdzv-id={job.name}',
        " ".join(quoted(job.options)),
    ]
    run = torchrun(job, options, quoted(program_words(job, restarts=job.restarts > 0)))
    first = job.hosts[0].rpartition("@")[2] if job.hosts else ""
    need = f"HEAD={first}" if first else ': "${HEAD:?name the first host: HEAD=first-host bash torchrun.sh}"'
    if job.nodes == 1 and not first:
        need = 'HEAD="${HEAD:-localhost}"'
    text = f"{head(job, title)}\n{need}\nexec {run}\n"
    remote = shlex.join(["bash", "-c", text])
    # -tt: a terminal, whose end is a SIGHUP for torchrun, should the connection be lost.
    commands = tuple(("ssh", "-tt", "-o", "BatchMode=yes", host, remote) for host in job.hosts)
    if job.nodes == 1 and not job.hosts:
        commands = (("bash", "-c", text),)
    return Submission(text, commands, reads_text=False)
