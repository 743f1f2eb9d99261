#!/usr/bin/env bash
# run.sh [OUTPUT]: all that a GPU is needed for, from the folder that bundle.sh made: tests on the GPU, the same under
# compute-sanitizer, benches, peers, many takes, ten minutes of audio. Every step has a time limit, a log in OUTPUT (default: the folder's `out`) and a
# line at the end. PART=tests, sanitize, time, train, peers or play runs one of them, in ten minutes at most.
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
    "$1/wavegen" generate --engine cuda --choices 1 --seconds 600 --force -o long.wav &
    local player=$!
    while kill -0 "$player" 2>/dev/null; do
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits >>memory.txt
        sleep 1
    done
    rm -f long.wav
    wait "$player" && awk 'NR == 5 { first = $1 } NR > 5 && $1 > most { most = $1 }
        END { print "MiB in use: " first ", at most " most; exit most > first + 64 }' memory.txt
}

# Takes of a recording, all of them in each launch: what choosing and the governor cost beside playing.
many_takes() {
    local takes option
    for takes in 2 64 512; do
        for option in "--choices 1 --governor off" "--governor off" ""; do
            mkdir -p takes
            # shellcheck disable=SC2086
            "$1/wavegen" continue "$1/prompt.wav" --engine cuda --takes "$takes" --seconds 4 $option -o takes/take.wav 2>takes.txt || return
            rm -r takes
            echo "takes $option: $(grep 'takes: ' takes.txt)"
        done
    done
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
        step "sanitizer-$tool" 95 compute-sanitizer --tool "$tool" --error-exitcode 1 "$here/kernels-test" "${native[@]}" \
            --skip decode --skip presets
        step "sanitizer-$tool-decode" 95 compute-sanitizer --tool "$tool" --error-exitcode 1 "$here/kernels-test" "${native[@]}" \
            states_go_to_other_engines
    done
fi
if [[ $part == all || $part == time ]]; then
    step bench-kernels 120 "$here/wavegen" bench kernels --json
    step bench-decode 300 "$here/wavegen" bench decode --engine cuda --rounds 5 --json
fi
# Steps alone, as many excerpts as peers/train.py has, and then whole trainings, which also draw them.
training_rates() {
    local option
    [[ -d synth ]] || "$1/render_synth" synth --files 40 --seed 1 >/dev/null || return
    for option in "" --bf16; do
        rm -rf rate.*
        "$1/wavegen" train synth -o rate.safetensors --device cuda --part wave --wave-batch 16 --minutes 0.7 --seed 1 \
            --no-calibration --no-pictures --store f16 --verbose $option 2>rate.txt || return
        echo "train $option: $(grep -o '[0-9]* samples/s' rate.txt | tail -n 1)"
    done
}
if [[ $part == all || $part == train ]]; then
    for batch in 16 32; do
        for option in "" --bf16; do
            step "bench-train-$batch$option" 60 "$here/wavegen" bench train --device cuda --wave-batch "$batch" --plan-batch 32 \
                --rounds 20 --json $option
        done
    done
    step train 180 bash -c "$(declare -f training_rates); training_rates '$here'"
fi
if [[ $part == all || $part == peers ]]; then
    step peer-train 150 python3 "$here/train.py" --device cuda --batch 16 --rounds 20
    step peer-attention 150 python3 "$here/attention.py"
    step peer-decode 250 python3 "$here/decode.py"
fi
if [[ $part == all || $part == play ]]; then
    step takes 240 bash -c "$(declare -f many_takes); many_takes '$here'"
    step long-play 300 bash -c "$(declare -f long_play); long_play '$here'"
fi
cat ./*.log | grep -E "^test .*FAILED|samples/s|"median"|TFLOP|us|^train|^takes" | tail -n 80
printf '%s\n' "commit $(cat "$here/commit")" "${summary[@]}"
exit "$failed"
