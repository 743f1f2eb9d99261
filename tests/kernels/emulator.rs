//! Runs launches: on the GPU where the feature `cuda` and the machine have one, else in kernels/emulator, for which a kernel
//! file is compiled for the CPU; each launch there is a process of its own.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock};

use half::bf16;
use wavegen::rng::Rng;

use crate::launch::{Element, Launch};

/// What a kernel takes.
#[cfg(not(feature = "cuda"))]
pub trait Args: Copy {}
#[cfg(not(feature = "cuda"))]
impl<A: Copy> Args for A {}
#[cfg(feature = "cuda")]
pub use crate::gpu::Args;

/// A kernel file as something that runs here.
pub struct Emulator {
    source: PathBuf,
    program: Option<PathBuf>,
}

/// In which order threads run, and what is done wrong on purpose.
#[derive(Clone, Copy, Default)]
pub struct Schedule {
    /// 0: in the order of their numbers.
    pub seed: u64,
    /// Barrier that is left out, one of [`Emulator::barriers`]; 0 for none.
    pub left_out: u32,
    /// Bytes of shared memory that the launch forgets to ask for.
    pub short_by: u32,
}

impl Schedule {
    pub fn seeded(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }
}

impl Emulator {
    /// Runs kernels/`file` on a GPU or as a program; says so and gives `None` where neither can be.
    pub fn of(file: &str) -> Option<Self> {
        #[cfg(feature = "cuda")]
        if crate::gpu::is_there() {
            return Some(Self { source: PathBuf::from(file), program: None });
        }
        Self::program(file)
    }

    /// Runs kernels/`file` as a program, which errors can be planted in.
    pub fn program(file: &str) -> Option<Self> {
        static HAS_COMPILER: OnceLock<bool> = OnceLock::new();
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
        if !*HAS_COMPILER.get_or_init(|| Command::new(&compiler).arg("--version").output().is_ok()) {
            println!("skipped: no C++ compiler '{compiler}' to run kernels/{file} without a GPU");
            return None;
        }
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let source = kernels.join(file);
        let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulated_{file}"));
        // One compilation per file, whichever test comes first.
        static COMPILED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
        let mut compiled = COMPILED.lock().unwrap();
        if !compiled.contains(&source) {
            let output = Command::new(&compiler)
                .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"])
                // What the emulator leaves unused, and what a fused multiply-add would hide.
                .args(["-Wno-unused-parameter", "-ffp-contract=off"])
                .arg(format!("-DSOURCE=\"../{file}\""))
                .arg(kernels.join("emulator/run.cpp"))
                .arg("-o")
                .arg(&program)
                .output()
                .unwrap();
            assert!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
            compiled.push(source.clone());
        }
        Some(Self { source, program: Some(program) })
    }

    /// Lines of the file, and of the headers of its own, that hold a barrier or wait for a flag: numbers that stand for them. Without
    /// those marked `unseen`, where the source says why.
    pub fn barriers(&self) -> Vec<u32> {
        let mut files = vec![self.source.clone()];
        let mut places = Vec::new();
        while let Some(file) = files.pop() {
            let source = std::fs::read_to_string(&file).unwrap();
            for (n, line) in (1..).zip(source.lines()) {
                let is_barrier =
                    ["__syncthreads()", "__syncwarp()", "GROUP_BARRIER(", "WAIT_FOR("].iter().any(|b| line.contains(b));
                if is_barrier && !line.ends_with("// unseen") {
                    places.push(place(&file, n));
                }
                let header = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
                if let Some(header) = header.filter(|header| !["common.cuh", "args.cuh"].contains(header)) {
                    let header = file.with_file_name(header);
                    if !files.contains(&header) {
                        files.push(header);
                    }
                }
            }
        }
        places.sort_unstable();
        places.dedup();
        places
    }

    /// Runs a launch. `args` begins with `n_pointers` addresses: 0 for null, else 1 + the number of one of `buffers`.
    pub fn run<A: Args>(
        &self,
        launch: &Launch,
        args: &A,
        n_pointers: u32,
        buffers: &mut [Vec<u8>],
        schedule: Schedule,
    ) -> Result<(), String> {
        let Some(program) = &self.program else {
            #[cfg(feature = "cuda")]
            return crate::gpu::run(launch, args, n_pointers, buffers);
            #[cfg(not(feature = "cuda"))]
            return Err("no program".to_string());
        };
        // SAFETY: A is one of the structs of src/cuda/launch, plain numbers without padding (their sizes are asserted).
        let args = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(args).cast::<u8>(), size_of::<A>()) };
        let mut input = Vec::new();
        let word = |input: &mut Vec<u8>, x: u32| input.extend(x.to_le_bytes());
        word(&mut input, launch.kernel.len() as u32);
        input.extend(launch.kernel.as_bytes());
        for x in launch.grid.into_iter().chain([launch.threads, 1, 1, launch.shared_bytes - schedule.short_by]) {
            word(&mut input, x);
        }
        word(&mut input, schedule.left_out);
        word(&mut input, launch.cluster);
        input.extend(schedule.seed.to_le_bytes());
        word(&mut input, args.len() as u32);
        input.extend(args);
        word(&mut input, n_pointers);
        word(&mut input, buffers.len() as u32);
        for buffer in buffers.iter() {
            input.extend((buffer.len() as u64).to_le_bytes());
            input.extend(buffer);
        }
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        // All is read before anything is written. A program that stops early is told of below.
        let sent = child.stdin.take().unwrap().write_all(&input);
        let output = child.wait_with_output().map_err(|e| e.to_string())?;
        if !output.status.success() || sent.is_err() {
            return Err(format!("{}: {}{}", launch.kernel, String::from_utf8_lossy(&output.stderr), output.status));
        }
        let mut rest = output.stdout.as_slice();
        for buffer in buffers {
            let (mine, others) = rest.split_at(buffer.len());
            buffer.copy_from_slice(mine);
            rest = others;
        }
        Ok(())
    }
}

/// A line of a file as the emulator names it (`place` in kernels/emulator/emulator.h).
fn place(file: &Path, line: u32) -> u32 {
    let name = file.file_name().unwrap_or_default().as_encoded_bytes();
    name.iter().fold(0, |sum, &c| (sum * 31 + u32::from(c)) % 1009) * 100_000 + line
}

/// What [`place`] says, for people.
pub fn named(place: u32) -> String {
    format!("line {} (file {})", place % 100_000, place / 100_000)
}

/// Numbers as the bytes of device memory, and back.
pub fn to_bytes(values: &[f64], element: Element) -> Vec<u8> {
    match element {
        Element::F32 => values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect(),
        Element::Bf16 => values.iter().flat_map(|&x| bf16::from_f64(x).to_le_bytes()).collect(),
    }
}

pub fn from_bytes(bytes: &[u8], element: Element) -> Vec<f64> {
    match element {
        Element::F32 => bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        Element::Bf16 => bytes.as_chunks().0.iter().map(|&b| f64::from(bf16::from_le_bytes(b))).collect(),
    }
}

/// Memory for `n` values that nobody has written yet: all NaN.
pub fn unwritten(n: usize, element: Element) -> Vec<u8> {
    vec![0xff; n * if element == Element::F32 { 4 } else { 2 }]
}

/// Normal numbers that the element type represents exactly.
pub fn normal(n: usize, element: Element, rng: &mut Rng) -> Vec<f64> {
    from_bytes(&to_bytes(&(0..n).map(|_| f64::from(rng.normal())).collect::<Vec<_>>(), element), element)
}

/// An error that names the worst of `got` when it is further than `tolerance` from `expected`, in parts of the larger of 1 and
/// the greatest of `expected`.
pub fn close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{what}: {} values, expected {}", got.len(), expected.len()));
    }
    let unit = expected.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs();
        if error.is_nan() || error > tolerance * unit {
            return Err(format!("{what}[{i}]: {got}, expected {expected}"));
        }
    }
    Ok(())
}
