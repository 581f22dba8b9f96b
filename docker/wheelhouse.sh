#!/usr/bin/env bash
# Builds a folder with the wheels of efficient_dl and of all that it needs, for this machine's Python and processor:
#
#   docker/wheelhouse.sh wheelhouse            # or with extras: docker/wheelhouse.sh wheelhouse bytes,data,mpi
#
# Needs pip's index, or what PIP_FIND_LINKS and PIP_NO_INDEX say, a C++ compiler and python3-venv. On a machine without
# network, of the same kind: pip install --no-index --find-links wheelhouse 'efficient_dl[bytes,data]'.
# PYTHON=python3.12 chooses the interpreter. Versions are those of constraints.txt, build tools included.
set -euo pipefail

if (($# < 1 || $# > 2)); then
    echo "usage: $0 FOLDER [EXTRAS]" >&2
    exit 2
fi
wheels=$(realpath -m -- "$1")
extras=${2-bytes,data}
if [[ -d $wheels && -n $(ls -A -- "$wheels") ]]; then
    echo "$wheels is not empty: wheels of another version would be mixed in; remove it or name another folder" >&2
    exit 2
fi
# Relative, and from the root: pip splits the variables below at spaces.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
# pip reads the first for what it builds with up to 25.2, the second from then on.
export PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
# Into a folder beside it, renamed at the end: half a wheelhouse looks like a whole one.
mkdir -p -- "$(dirname "$wheels")"
unfinished=$wheels.unfinished
rm -rf -- "$unfinished"
"$scratch/venv/bin/python" -m pip wheel --wheel-dir "$unfinished" ".${extras:+[$extras]}"
(cd "$unfinished" && sha256sum -- *.whl >SHA256SUMS)
[[ ! -d $wheels ]] || rmdir -- "$wheels"
mv -- "$unfinished" "$wheels"
echo "$(find "$wheels" -name '*.whl' | wc -l) wheels, $(du -sh -- "$wheels" | cut -f 1), for $("$scratch/venv/bin/python" -V)"
