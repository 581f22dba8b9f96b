#!/usr/bin/env bash
# Searches for inputs that break the decoders, with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: tests/fuzz/fuzz.sh [SECONDS] [libFuzzer's options...]. New inputs go to runs/fuzz/found, or to the folder FOUND,
# where the next search starts. A crash is written to runs/fuzz/crash-* and ends the search with an error: mend it, then
# add the file to tests/fuzz/corpus. LIBRARY may name the library under test, built before with the flags below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds=${1:-60}
compiler=${CLANGXX:-clang++}
command -v "$compiler" >/dev/null || { echo "libFuzzer needs clang: apt-get install clang, or set CLANGXX" >&2; exit 1; }
native=efficient_dl/codec/kernels/native
found=${FOUND:-runs/fuzz/found}
mkdir -p runs/fuzz "$found"
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
library=${LIBRARY:-$objects/libedl_codec.so}
# The library's own build script knows which file takes which flags; the target is linked against what it builds.
[[ -n ${LIBRARY:-} ]] ||
    CXX=$compiler CXXFLAGS="-g1 -O1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all" \
        sh "$native/build.sh" "$library"
"$compiler" -std=c++20 -g1 -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -pthread \
    tests/fuzz/decode_fuzzer.cpp "$library" -Wl,-rpath,"$(dirname "$library")" -o "$objects/fuzzer"
"$objects/fuzzer" -max_total_time="$seconds" -artifact_prefix=runs/fuzz/ -max_len=65536 -timeout=20 -print_final_stats=1 \
    "${@:2}" "$found" tests/fuzz/corpus
