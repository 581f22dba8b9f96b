"""A JobSet for Kubernetes: one indexed job whose pods are torchrun's hosts."""

from __future__ import annotations

import json
from collections.abc import Sequence

from efficient_dl.errors import ConfigError
from efficient_dl.launching.job import Job
from efficient_dl.launching.script import SHUTDOWN_SECONDS, SIGNALS, Submission, program_words

DEFAULT_IMAGE = "efficient-dl:latest"
_FOLDER = "/work"

# Strings that come from the description are JSON, which YAML reads.
_MANIFEST = """\
# Trains in {nodes} pods with {workers} workers each: kubectl create -f jobset.yaml
# Needs JobSet (https://jobset.sigs.k8s.io), an image with efficient_dl, and the claim {claim} of a volume that all pods
# may write (ReadWriteMany), where runs lie. If a pod fails, all are made anew, up to {restarts} times, and edl train
# goes on from its last checkpoint.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  network:
    enableDNSHostnames: true  # the first pod, {head}, holds the rendezvous
  failurePolicy:
    maxRestarts: {restarts}
  replicatedJobs:
    - name: nodes
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: {nodes}
          parallelism: {nodes}
          backoffLimit: 0  # a failed pod fails the job, and JobSet makes all of them anew
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: {grace}  # for a checkpoint after SIGTERM
              securityContext:
                fsGroup: 10001  # of the image's user, who writes to the claim
              containers:
                - name: torchrun
                  image: {image}
                  workingDir: {folder}
                  command:
{command}
{environment}                  resources:
                    requests:
                      cpu: {cpus}
{limits}                  volumeMounts:
                    - name: runs
                      mountPath: {folder}
                    - name: memory
                      mountPath: /dev/shm
              volumes:
                - name: runs
                  persistentVolumeClaim:
                    claimName: {claim}
                - name: memory
                  emptyDir:
                    medium: Memory
"""


def kubernetes(job: Job) -> Submission:
    """The manifest, for kubectl's standard input. Raises ConfigError without a claim."""
    if not job.claim:
        raise ConfigError(
            "a JobSet's pods share a volume for the run's folder",
            expected="--claim NAME, of a PersistentVolumeClaim",
        )
    head = f"{job.name}-nodes-0-0.{job.name}"
    words = [
        *(job.python, "-m", "torch.distributed.run"),
        *(f"--nnodes={job.nodes}", f"--nproc-per-node={job.workers}", "--max-restarts=0"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={head}:{job.port}", f"--rdzv-id={job.name}"),
        *(f"--signals-to-handle={SIGNALS}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"),
        *job.options,
        *program_words(job, restarts=True),
    ]
    text = _MANIFEST.format(
        name=job.name,
        nodes=job.nodes,
        workers=job.workers,
        restarts=job.restarts,
        claim=job.claim,
        head=head,
        grace=SHUTDOWN_SECONDS + 30,
        image=_yaml(job.image or DEFAULT_IMAGE),
        folder=_yaml(job.folder or _FOLDER),
        command=_list(words, 20),
        environment=_environment(job),
        cpus=job.workers * job.cpus,
        limits=_limits(job),
    )
    return Submission(text, (("kubectl", "create", "-f", "-"),), reads_text=True)


def _list(words: Sequence[str], indent: int) -> str:
    return "\n".join(f"{' ' * indent}- {_text(word)}" for word in words)


def _environment(job: Job) -> str:
    pairs = [
        f"{' ' * 20}- name: {name}\n{' ' * 20}  value: {_text(value)}\n"
        for name, value in job.environment.items()
    ]
    return f"{' ' * 18}env:\n{''.join(pairs)}" if pairs else ""


def _limits(job: Job) -> str:
    found = {"nvidia.com/gpu": str(job.gpus)} if job.gpus else {}
    if job.memory:  # Slurm's megabytes, or its letter: 64G is 64Gi
        found["memory"] = f"{job.memory}i" if job.memory[-1].isalpha() else f"{job.memory}Mi"
    rows = [f"{' ' * 22}{name}: {value}\n" for name, value in found.items()]
    return f"{' ' * 20}limits:\n{''.join(rows)}" if rows else ""


def _text(word: str) -> str:
    """A YAML string in which Kubernetes finds no variable: it replaces $(NAME), and two dollars by one."""
    return _yaml(word.replace("$", "$$"))


def _yaml(word: str) -> str:
    escaped = json.dumps(word, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in escaped)
