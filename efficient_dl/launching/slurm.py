"""A batch script for Slurm: torchrun on every node, requeued on failure, before the time limit and on pre-emption."""

from __future__ import annotations

import shlex

from efficient_dl.launching.ends import FINAL_CODES
from efficient_dl.launching.job import Job, without_out
from efficient_dl.launching.script import Submission, head, lines, program_words, quoted, torchrun

_TITLE = """\
Trains on {nodes} nodes with {workers} workers each: sbatch slurm.sbatch
If a node or a worker fails, the job is requeued, up to {restarts} times; it goes on from its last checkpoint, perhaps
on other nodes. An error that would come again, as a wrong setting, ends it instead. {lead} s before the time limit, or
before pre-emption where Slurm is told to announce it (preempt_send_user_signal), all ranks write a checkpoint, and the
job is requeued, however often it happens.
The folder, the data and the runs lie on a file system that all nodes share."""

_BODY = """
# The rendezvous is on the first node of this allocation: a requeued job has another one.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\\n'*}
port=$((15000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 15000))

# Ranks leave their exit codes in this folder, which all nodes see; torchrun's own is always 1.
export EDL_ENDS="$PWD/.edl-ends-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
rm -rf "$PWD/.edl-ends-$SLURM_JOB_ID-"*
mkdir "$EDL_ENDS" || true # without it every failed job is requeued

step='' announced='' cancelled=''
trap 'announced=1; [[ -z $step ]] || kill -USR1 "$step" || true' USR1
trap 'cancelled=1; [[ -z $step ]] || kill -TERM "$step" || true' TERM # scancel; after pre-emption Slurm requeues itself
"""

_END = """\
step=$!

code=0
while :; do # a signal interrupts wait
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null || break
done
step='' final=''
for end in FINAL; do [[ ! -e $EDL_ENDS/$end ]] || final=$end; done
rm -rf "$EDL_ENDS"
echo "srun ended with $code${announced:+, after the announcement of the end}${cancelled:+, after SIGTERM}"
if [[ $code != 0 && -n $final ]]; then
    echo "a rank ended with $final, as it would again: mend what it says, and submit the job again"
    exit "$final"
fi
if [[ $code != 0 && -z $cancelled ]] && { [[ -n $announced ]] || ((${SLURM_RESTART_COUNT:-0} < RESTARTS)); }; then
    scontrol requeue "$SLURM_JOB_ID"
    waited=0
    while [[ -z $cancelled ]] && ((waited++ < 300)); do sleep 1; done # Slurm ends this script meanwhile
fi
exit "$code"
"""


def slurm(job: Job) -> Submission:
    """The script, for sbatch's standard input."""
    title = _TITLE.format(nodes=job.nodes, workers=job.workers, restarts=job.restarts, lead=job.lead_seconds)
    srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={job.workers * job.cpus}"]
    body = _BODY
    if job.image:
        srun += [f"--container-image={shlex.quote(job.image)}", '--container-mounts="$PWD:$PWD"']
        srun += ['--container-workdir="$PWD"']
    program = _program(job)
    if job.sweep:
        body += _sweep(job)
    options = [
        f'--nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={job.workers} --max-restarts=0',
        '--rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID"',
    ]
    run = lines([" ".join(srun), torchrun(job, options, program, job.lead_seconds)])
    end = _END.replace("RESTARTS", str(job.restarts)).replace("FINAL", " ".join(map(str, FINAL_CODES)))
    text = f"{head(job, title, _directives(job))}{body}\n{run} &\n{end}"
    return Submission(text, (("sbatch",),), reads_text=True)


def _directives(job: Job) -> list[str]:
    given = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",  # torchrun, which starts the workers
        "cpus-per-task": str(job.workers * job.cpus),
        "gpus-per-node": str(job.gpus) if job.gpus else "",
        "mem": job.memory,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "array": f"0-{len(job.sweep) - 1}" if job.sweep else "",
        "output": "%x-%A_%a.log" if job.sweep else "%x-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{job.lead_seconds}",
    }
    lines_ = [f"#SBATCH --{name}={value}" for name, value in given.items() if value]
    return [*lines_, "#SBATCH --requeue", *(f"#SBATCH {shlex.quote(one)}" for one in job.options)]


def _program(job: Job) -> list[str]:
    """The command, going on from what a job before it has left, and with this job's setting of the sweep."""
    if not job.runs_train:
        return [*quoted(program_words(job, restarts=False)), *(['"${setting[@]}"'] if job.sweep else [])]
    words = quoted(program_words(without_out(job), restarts=False))
    if not job.sweep:
        return [*words, "--resume-or-start", "--out", shlex.quote(job.out)]
    out = f'{shlex.quote(job.out)}/"$SLURM_ARRAY_TASK_ID"'
    return [*words, '"${setting[@]}"', "--resume-or-start", "--out", out]


def _sweep(job: Job) -> str:
    cases = [f"    {index}) setting=({shlex.join(words)}) ;;" for index, words in enumerate(job.settings)]
    last = '    *) echo "no setting $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;'
    return "\n".join(["", 'case "$SLURM_ARRAY_TASK_ID" in', *cases, last, "esac", ""])
