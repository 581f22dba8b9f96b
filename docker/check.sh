#!/usr/bin/env bash
# Builds cpu.Dockerfile and uses the image: its health check, `edl doctor`, a short training with two workers, and the
# two services of compose.yaml. As root on Debian, with apt's buildah and mmdebstrap and no container engine:
#
#   sudo docker/check.sh            # some minutes; this machine's pip downloads the wheels, apt the packages
#
# Its base is a stand-in: the Debian that has this machine's Python (3.11 or 3.13; PYTHON=python3.11 chooses), under the
# name of the base that the Dockerfile gives. So it needs no registry, and says nothing about that base itself.
# ROOTFS=FILE.tar keeps the stand-in for the next time.
# Nothing is left: storage, temporary files and mounts lie in one folder, which goes at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
lacking=()
for program in buildah mmdebstrap "$python" timeout; do
    command -v "$program" >/dev/null || lacking+=("$program")
done
[[ $(id -u) == 0 ]] || lacking+=("root's rights")
if ((${#lacking[@]})); then
    echo "this machine lacks: ${lacking[*]} (Debian: apt-get install --no-install-recommends buildah mmdebstrap)" >&2
    exit 3
fi

case $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') in
    3.11) suite=bookworm ;;
    3.13) suite=trixie ;;
    *)
        echo "no Debian has $("$python" -V), so its wheels would not fit: PYTHON=python3.11 docker/check.sh" >&2
        exit 3
        ;;
esac

scratch=$(mktemp -d "${TMPDIR:-/tmp}/edl-images.XXXXXX")
export TMPDIR=$scratch/tmp XDG_RUNTIME_DIR=$scratch/runtime
mkdir -p "$TMPDIR" "$XDG_RUNTIME_DIR" "$scratch/wheels" "$scratch/runs"
buildah=(buildah --root "$scratch/storage" --runroot "$scratch/run" --storage-driver overlay)
clean_up() {
    local status=$?
    trap - EXIT INT TERM
    for job in $(jobs -p); do
        pkill -TERM -P "$job" || true # of a service, `timeout`, which ends what it started
        kill "$job" 2>/dev/null || true
    done
    wait || true
    # What an interrupted build has mounted must go before the folder does.
    awk -v at="$scratch/" 'index($2, at) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r umount --lazy
    rm -rf --one-file-system -- "$scratch"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() { echo "== $* ($SECONDS s)"; }
# SECONDS COMMAND...: in the background, so that signals reach this script at once.
within() { timeout --kill-after=10 "$@" & wait "$!"; }

base=$(sed -n 's/^ARG BASE=//p' docker/cpu.Dockerfile)
image=localhost/efficient-dl:cpu

step "wheels that the build will find, downloaded by this machine's pip"
"$python" -m venv "$scratch/venv"
within 900 "$scratch/venv/bin/python" -m pip download --quiet --disable-pip-version-check --dest "$scratch/wheels" \
    --constraint constraints.txt '.[bytes,data]' scikit-build-core cmake ninja

step "a stand-in for $base"
rootfs=${ROOTFS:-$scratch/rootfs.tar}
if [[ ! -f $rootfs ]]; then
    within 900 mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$rootfs"
fi
container=$("${buildah[@]}" from scratch)
"${buildah[@]}" add --quiet "$container" "$rootfs" / >/dev/null
"${buildah[@]}" commit --quiet --rm "$container" "$base" >/dev/null

step "the image, with no package index"
# Docker's format, because OCI's has no health check.
within 1800 "${buildah[@]}" bud --quiet --format docker --isolation chroot --network host --pull-never \
    --volume "$scratch/wheels:/wheels:ro" --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels \
    --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
    --tag "$image" --file docker/cpu.Dockerfile . >/dev/null

# In a container of its own, as the image's user; the image's entry point is only for what starts containers.
inside() { # seconds, an environment (NAME=VALUE,...), the command
    local seconds=$1 variable options=() name status=0
    for variable in ${2//,/ }; do options+=(--env "$variable"); done
    name=$("${buildah[@]}" from --quiet --pull-never --add-host worker0:127.0.0.1 "$image")
    within "$seconds" "${buildah[@]}" run --isolation chroot --network host "${options[@]}" \
        --volume "$scratch/runs:/work/runs" "$name" -- "${@:3}" || status=$?
    "${buildah[@]}" rm "$name" >/dev/null
    return "$status"
}
chmod 1777 "$scratch/runs" # as the image's own folder there

step "what the image says of itself"
"${buildah[@]}" images "$image"
"${buildah[@]}" inspect --type image "$image" >"$scratch/image.json"
"$python" - "$scratch/image.json" <<'PYTHON'
import json, sys

config = json.load(open(sys.argv[1]))["Docker"]["config"]
expected = {"Entrypoint": ["edl"], "User": "10001:10001", "WorkingDir": "/work"}
found = {key: config.get(key) for key in expected}
assert found == expected, f"expected {expected}, found {found}"
assert config["Healthcheck"]["Test"] == ["CMD", "edl-health"], config["Healthcheck"]
print(*sorted(config["Labels"].items()), sep="\n")
PYTHON

step "its health check, doctor and user; no compiler and no threads set"
inside 300 '' edl-health
inside 300 '' edl doctor
# shellcheck disable=SC2016 # for the shell in the container
inside 60 '' bash -c '
    set -euo pipefail
    [[ $(id -u) == 10001 && -z ${OMP_NUM_THREADS+set} ]]
    touch "$HOME/.cache-test" runs/.test && rm "$HOME/.cache-test" runs/.test
    ! command -v cc gcc g++ c++ clang make cmake ninja'

step "a training with two workers"
inside 300 OMP_NUM_THREADS=1 edl train --model mlp-nano --data digits --bits 2.0 --workers 2 --steps 4 --out runs/two
[[ -s $scratch/runs/two/summary.json ]]

step "the services of compose.yaml, as two containers on this machine's loopback"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pyyaml
"$scratch/venv/bin/python" - >"$scratch/services" <<'PYTHON'
import yaml

for service in yaml.safe_load(open("docker/compose.yaml"))["services"].values():
    print(",".join(f"{key}={value}" for key, value in service["environment"].items()), *service["command"])
PYTHON
services=()
while read -r environment words; do
    read -ra words <<<"$words"
    inside 300 "$environment,OMP_NUM_THREADS=1,GLOO_SOCKET_IFNAME=lo" edl "${words[@]}" --steps 4 &
    services+=($!)
done <"$scratch/services"
[[ ${#services[@]} == 2 ]]
for service in "${services[@]}"; do wait "$service"; done
[[ -s $scratch/runs/compose/summary.json ]]

step "all done"
