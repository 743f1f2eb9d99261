# What CI runs, and the shortcuts of daily work. One build profile serves all: release.
.PHONY: check format lint test examples docs opus live mpi cuda nccl cross neon

check: format lint test examples docs

format:
	cargo fmt --check

lint:
	cargo clippy --release --all-targets -- -D warnings

test:
	cargo test --release

examples:
	cargo run --release --example tokens
	cargo run --release --example plan
	cargo run --release --example continuation

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --release

# Recordings in Opus; needs cmake.
opus:
	cargo clippy --release --lib --bins --test decode_formats --features opus -- -D warnings
	cargo test --release --features opus --test decode_formats

# Sound through ALSA; needs its headers on Linux.
live:
	cargo clippy --release --lib --bins --test speakers --features live -- -D warnings
	cargo test --release --features live --test speakers alsa

# Training by several processes; needs an MPI library with headers, mpirun and libclang.
mpi:
	cargo clippy --release --lib --bins --test mpi --features mpi -- -D warnings
	cargo test --release --features mpi --test mpi

# Whether it compiles for the systems that cannot be tested here.
cross:
	rustup target add x86_64-pc-windows-gnu aarch64-apple-darwin
	cargo check --release --target x86_64-pc-windows-gnu --lib --bins
	cargo check --release --target aarch64-apple-darwin --lib --bins

# The kernels of 64-bit ARM, in an emulator; on Debian after `apt-get install qemu-user g++-aarch64-linux-gnu`. Some ten minutes.
neon: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER = aarch64-linux-gnu-gcc
neon: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER = qemu-aarch64 -L /usr/aarch64-linux-gnu
neon:
	rustup target add aarch64-unknown-linux-gnu
	cargo test --release --target aarch64-unknown-linux-gnu --lib

# With the settings of `eval "$(scripts/cuda/get-toolkit.sh)"`; no GPU needed.
cuda:
	cargo clippy --release --lib --bins --test kernels --features cuda -- -D warnings

# The same with all that several GPUs need: what `mpi` and `cuda` want.
nccl:
	cargo clippy --release --lib --bins --test kernels --features nccl -- -D warnings
