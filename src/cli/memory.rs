//! Turns what the system knows of this process into the memory that it needs and has needed.

/// Most bytes that this process has held in memory at a time; `None` where the system does not tell.
pub fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Bytes that this process holds in memory; `None` where the system does not tell.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// proc_pid_status(5): "VmHWM:     1234 kB".
fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| 1024 * kib)
}

/// Bytes for people.
pub fn text(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes < 1e9 => format!("{:.0} MB", bytes / 1e6),
        bytes => format!("{:.2} GB", bytes / 1e9),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn the_peak_holds_what_was_allocated() {
        let before = super::peak().unwrap();
        let held = std::hint::black_box(vec![1u8; 100_000_000]);
        assert!(super::peak().unwrap() >= (held.len() as u64).max(before));
    }
}
