#!/usr/bin/env bash
# bundle.sh [FOLDER]: builds what a machine with a GPU but without Rust needs, into FOLDER (default: gpu-bundle, which git ignores):
# the program and the kernels' tests with the feature `cuda`, `render_synth`, stripped and packed, the scripts of benches/peers, a recording, and run.sh.
# Then, there:
#
#     FOLDER/run.sh [OUTPUT]        everything; correctness first, then times. Without a GPU it says so and ends with 0.
#
# Needs nvcc: eval "$(scripts/cuda/get-toolkit.sh)".
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-gpu-bundle}

cargo build --release --features cuda --bins --example render_synth
tests=$(cargo test --release --features cuda --test kernels --no-run --message-format=json |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "kernels": print(message["executable"])')
program=$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release/wavegen
rm -rf "$folder"
mkdir -p "$folder"
strip -o "$folder/wavegen" "$program"
strip -o "$folder/render_synth" "$(dirname "$program")/examples/render_synth"
strip -o "$folder/kernels-test" "$tests"
cp benches/peers/*.py scripts/gpu/run.sh examples/prompt.wav "$folder"
# Both hold the built-in model: a dictionary that reaches from one to the other halves the archive.
tar -C "$folder" -c wavegen kernels-test render_synth | xz -T0 --lzma2=preset=3,dict=256MiB >"$folder/programs.tar.xz"
rm "$folder"/{wavegen,kernels-test,render_synth}
git rev-parse HEAD >"$folder/commit"
du -sh "$folder"
