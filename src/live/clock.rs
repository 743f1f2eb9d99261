//! Turns time into a device that nobody hears: for machines without sound, recordings, tests and soaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Pull, Running};

/// Seconds between two calls.
const PERIOD_S: f64 = 0.01;

/// Takes frames as true time passes.
pub struct RealClock {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl RealClock {
    /// Takes frames from now on.
    pub fn start(mut pull: Pull, sample_rate: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (begun, mut due) = (Instant::now(), 0.0);
            let period = (PERIOD_S * f64::from(sample_rate)) as usize;
            let mut out = vec![0.0; period * pull.channels()];
            while !stopped.load(Relaxed) {
                pull.fill(&mut out);
                due += period as f64 / f64::from(sample_rate);
                std::thread::sleep(Duration::from_secs_f64(due).saturating_sub(begun.elapsed()));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Running for RealClock {
    fn latency_ms(&self) -> f64 {
        0.0
    }
}

impl Drop for RealClock {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // It only ends.
            let _ = thread.join();
        }
    }
}

/// Takes frames as simulated time passes: what the engine works counts as it is, and waiting takes no time at all.
pub struct SimulatedClock {
    pull: Pull,
    sample_rate: u32,
    out: Vec<f32>,
    /// Seconds that have passed, and that were played.
    now_s: f64,
    played_s: f64,
    /// Seconds that a second of work counts as: above 1 for a slower machine.
    slowness: f64,
}

impl SimulatedClock {
    /// A clock at the beginning; a second of work counts as `slowness` seconds.
    pub fn new(pull: Pull, sample_rate: u32, slowness: f64) -> Self {
        let out = vec![0.0; (PERIOD_S * f64::from(sample_rate)) as usize * pull.channels()];
        Self { pull, sample_rate, out, now_s: 0.0, played_s: 0.0, slowness }
    }

    /// So long was worked.
    pub fn work(&mut self, seconds: f64) {
        self.now_s += self.slowness * seconds;
        self.catch_up();
    }

    /// Waits until the device wants something.
    pub fn wait(&mut self) {
        self.now_s = self.now_s.max(self.played_s);
        self.catch_up();
    }

    fn catch_up(&mut self) {
        while self.played_s <= self.now_s {
            self.pull.fill(&mut self.out);
            self.played_s += (self.out.len() / self.pull.channels()) as f64 / f64::from(self.sample_rate);
        }
    }
}
