//! Compiles kernels/*.cu into one fat binary: machine code for sm_90a, PTX of compute_80 for other GPUs. Does nothing without the
//! feature `cuda`. There is no host code in it: the driver loads it at run time.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = compile() {
        eprintln!("error: {message}");
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let root = env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?;
    let kernels = Path::new(&root).join("kernels");
    let entries = fs::read_dir(&kernels).map_err(|e| format!("reading {}: {e}", kernels.display()))?;
    let mut sources: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    // nvcc makes a fat binary of one source.
    let mut all = String::new();
    for source in &sources {
        writeln!(all, "#include \"{}\"", source.display()).map_err(|e| e.to_string())?;
    }
    let source = out.join("kernels.cu");
    fs::write(&source, all).map_err(|e| format!("writing {}: {e}", source.display()))?;
    let nvcc = env::var_os("NVCC")
        .map(PathBuf::from)
        .or_else(|| env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc")))
        .unwrap_or_else(|| "nvcc".into());
    let status = Command::new(&nvcc)
        .args(["-std=c++17", "-O3", "-lineinfo", "-fatbin"])
        .args(["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"])
        .arg("-o")
        .arg(out.join("kernels.fatbin"))
        .arg(&source)
        .status()
        .map_err(|e| {
            format!(
                "the feature `cuda` needs NVIDIA's compiler, and {} does not start: {e}\n\
                 Set NVCC or CUDA_HOME, or fetch it: eval \"$(scripts/cuda/get-toolkit.sh)\"",
                nvcc.display()
            )
        })?;
    if status.success() { Ok(()) } else { Err(format!("{} failed on kernels/*.cu ({status})", nvcc.display())) }
}
