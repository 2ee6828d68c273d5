#!/usr/bin/env bash
# Builds the kernels' test for another processor, as one static file, and runs it under an emulator.
#
#   tests/native/run_elsewhere.sh arm64 --rounds 20
#   RUN="sde64 -skx --" tests/native/run_elsewhere.sh x86-64 --isa avx512 --rounds 20
#
# The first argument names the processor, the others go to the test. RUN is what runs a program and
# its arguments: for ARM64 it is qemu's user mode unless set, for x86-64 it is this machine's
# processor. On Debian and Ubuntu, ARM64 needs: apt install g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/../.."
case "${1:-}" in
  arm64) compiler=${CXX:-aarch64-linux-gnu-g++} sets=(base) run=${RUN:-qemu-aarch64} ;;
  x86-64) compiler=${CXX:-g++} sets=(base avx2 avx512) run=${RUN:-} ;;
  *)
    echo "run_elsewhere.sh: name the processor, arm64 or x86-64" >&2
    exit 2
    ;;
esac
shift
for need in "${compiler%% *}" ${run%% *}; do
  command -v "$need" >/dev/null || { echo "run_elsewhere.sh: $need was not found" >&2; exit 2; }
done
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
avx2=(-mavx2 -mfma -mf16c)
flags=(-O3 -std=c++20 -ffp-contract=fast -fno-math-errno -pthread)
objects=()
for set in "${sets[@]}"; do
  options=()
  [ "$set" != avx2 ] || options=("${avx2[@]}")
  [ "$set" != avx512 ] || options=(-mavx512f -mavx512bw -mavx512dq -mavx512vl "${avx2[@]}")
  [ "$set" = base ] || flags+=("-DM7_HAS_${set^^}")
  $compiler "${flags[@]}" "${options[@]}" "-DM7_ISA=$set" -c m7mlx/cpu/kernels/kernels.cpp -o "$build/$set.o"
  objects+=("$build/$set.o")
done
# Objects for the oldest processors come first: of an inline function that several bring, the linker
# takes the first.
$compiler "${flags[@]}" -static tests/native/kernels_test.cpp m7mlx/cpu/kernels/{isa,threads}.cpp \
  "${objects[@]}" -o "$build/kernels_test"
$run "$build/kernels_test" "$@"
