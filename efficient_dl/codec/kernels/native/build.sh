#!/bin/sh
# Builds libedl_codec.so beside this script: what a checkout runs on without installing. Takes the compiler from
# CXX and extra flags from CXXFLAGS; the output's path may be given as the only argument.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
output=${1:-$here/libedl_codec.so}
compiler=${CXX:-c++}
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

# No contraction and no reassociation: the same bytes on every processor. The other two let loops vectorize.
flags="-O3 -std=c++20 -pthread -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
flags="$flags -Wall -Wextra ${CXXFLAGS:-}"
# The compiler says what it builds for: it may be another processor than this one.
# shellcheck disable=SC2086  # lists of flags
case $("$compiler" ${CXXFLAGS:-} -dumpmachine) in
x86_64* | amd64*)
    # PREFETCHW (-mprfchw) is not asked for at run time: processors without it take it for a NOP.
    # GCC 12 takes its own "undefined" intrinsics for uninitialized variables.
    avx512="-Wno-uninitialized -Wno-maybe-uninitialized -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 -mbmi -mbmi2 -mpopcnt -mprfchw -mprefer-vector-width=512"
    avx2="-mavx2 -mbmi -mbmi2 -mpopcnt -mprfchw -mf16c"
    ;;
*) avx512='' avx2='' ;;
esac

for source in "$here"/*.cpp; do
    name=$(basename "$source" .cpp)
    extra=
    case $name in
    *_avx512) extra=$avx512 ;;
    *_avx2) extra=$avx2 ;;
    esac
    # shellcheck disable=SC2086
    "$compiler" $flags $extra -c "$source" -o "$objects/$name.o"
done
# Into place by rename, so that a process that has the old library mapped keeps it.
# shellcheck disable=SC2086
"$compiler" -shared -pthread ${CXXFLAGS:-} -o "$objects/library.so" "$objects"/*.o
mv "$objects/library.so" "$output"
