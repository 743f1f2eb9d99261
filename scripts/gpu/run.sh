#!/usr/bin/env bash
# run.sh [OUTPUT]: all that a GPU is needed for, from the folder that bundle.sh made: tests on the GPU, the same under
# compute-sanitizer, benches, peers. Every step has a time limit, a log in OUTPUT (default: the folder's `out`) and a line at the end.
# PART=tests, PART=sanitize or PART=time runs one of the three.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$here/out}
part=${PART:-all}
mkdir -p "$out"
cd "$out" || exit 1
# By Python, which has what torch needs; xz may be missing.
[[ -x $here/wavegen ]] || python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' \
    "$here/programs.tar.xz" "$here" || exit 1
# Where torch keeps CUDA's libraries, if it has any.
WAVEGEN_CUDA_LIBS=${WAVEGEN_CUDA_LIBS:-$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0] + "/cu13/lib")' 2>/dev/null)}
export WAVEGEN_CUDA_LIBS

if ! nvidia-smi >nvidia-smi.log 2>&1; then
    echo "no CUDA device: nothing was run"
    exit 0
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
summary=()
failed=0

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 begun=$SECONDS
    shift 2
    if timeout "$limit" "$@" >"$name.log" 2>"$name.err"; then
        summary+=("ok      $name ($((SECONDS - begun)) s)")
    else
        summary+=("FAILED  $name (status $?, $((SECONDS - begun)) s)")
        failed=1
        tail -n 20 "$name.log" "$name.err"
    fi
}

# Ten minutes of audio; the GPU's memory may not grow after the first seconds.
long_play() {
    rm -f memory.txt
    "$1/wavegen" generate --engine cuda --seconds 600 --force -o long.wav &
    local player=$!
    while kill -0 "$player" 2>/dev/null; do
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits >>memory.txt
        sleep 1
    done
    rm -f long.wav
    wait "$player" && awk 'NR == 5 { first = $1 } NR > 5 && $1 > most { most = $1 }
        END { print "MiB in use: " first ", at most " most; exit most > first + 64 }' memory.txt
}

export WAVEGEN_REQUIRE_CUDA=1 RUST_BACKTRACE=0
# Errors are planted in the emulator only, which wants the sources and a compiler.
native=(--test-threads 1 --skip left_out --skip shared_memory_is_noticed --skip every_schedule)
if [[ $part == all || $part == tests ]]; then
    step info 30 "$here/wavegen" info
    step tests-training 120 "$here/kernels-test" "${native[@]}" --skip decode
    step tests-decode 240 "$here/kernels-test" "${native[@]}" decode
fi
if [[ $part == all || $part == sanitize ]]; then
    for tool in memcheck racecheck synccheck; do
        step "sanitizer-$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 1 "$here/kernels-test" "${native[@]}" \
            --skip decode --skip presets
        step "sanitizer-$tool-decode" 150 compute-sanitizer --tool "$tool" --error-exitcode 1 "$here/kernels-test" "${native[@]}" \
            states_go_to_other_engines
    done
fi
if [[ $part == all || $part == time ]]; then
    step bench-kernels 120 "$here/wavegen" bench kernels --json
    step bench-decode 300 "$here/wavegen" bench decode --engine cuda --rounds 5 --json
    step peer-train 200 python3 "$here/train.py" --device cuda --batch 16 --rounds 20
    step peer-attention 200 python3 "$here/attention.py"
    step peer-decode 300 python3 "$here/decode.py"
    step long-play 240 bash -c "$(declare -f long_play); long_play '$here'"
fi
cat ./*.log | grep -E "^test .*FAILED|samples/s|TFLOP|us" | tail -n 80
printf '%s\n' "commit $(cat "$here/commit")" "${summary[@]}"
exit "$failed"
