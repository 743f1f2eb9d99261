//! What `bench decode` measured, as tables and as JSON.

use anyhow::Result;
use serde::Serialize;

use super::super::super::check::Distance;
use super::super::super::common::print;
use super::super::machine::{Machine, Peak, TICK_S};
use super::{MOST_F32_BITS, MOST_INT8_BITS};

#[derive(Serialize)]
pub struct Report {
    pub machine: Machine,
    pub version: &'static str,
    pub seconds: f64,
    pub rounds: u16,
    pub models: Vec<ModelReport>,
}

#[derive(Serialize)]
pub struct ModelReport {
    pub name: String,
    /// Multiply-adds per sample of the wave transformer's matrices.
    pub multiply_adds: f64,
    pub plan_parameters: usize,
    pub wave_parameters: usize,
    pub cases: Vec<CaseReport>,
}

#[derive(Serialize)]
pub struct CaseReport {
    pub engine: &'static str,
    pub isa: Option<&'static str>,
    pub batch: usize,
    /// Median over the rounds, all streams together; with the least and the most.
    pub samples_per_s: f64,
    pub samples_per_s_range: [f64; 2],
    pub x_real_time: f64,
    /// Processor time of all rounds, in ticks of 10 ms.
    pub core_s: Option<f64>,
    /// Samples per second of it, as multiples of real time.
    pub x_core: Option<f64>,
    /// The same against the reference engine's; of the clock's time where there is no other.
    pub x_reference: Option<f64>,
    pub step_us: Option<Quantiles>,
    pub gmac_s: f64,
    /// Part of the machine's peak.
    pub of_peak: Option<f64>,
    pub memory_mb: Option<f64>,
    pub prepare_ms: f64,
    /// Reading [`PROMPT_S`] of prompt.
    pub prefill_ms: f64,
    /// Tokens as the scalar engine's, stream by stream.
    pub tokens_as_scalar: Option<bool>,
    /// Against the reference engine.
    pub distance: Option<Distance>,
    pub passed: bool,
}

/// Microseconds per step.
#[derive(Serialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub most: f64,
}

impl Quantiles {
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
        (!values.is_empty()).then(|| Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), most: at(1.0) })
    }
}

impl Report {
    pub fn print(&self) -> Result<()> {
        let Machine { cpu, cores, load, bandwidth_gb_s, peaks } = &self.machine;
        let load = load.map_or(String::new(), |load| format!(", load {load:.1}"));
        print(&format!("{cpu}, {cores} cores{load}; one core reads {bandwidth_gb_s:.1} GB/s"))?;
        for Peak { isa, int8_gmac_s, f32_gmac_s } in peaks {
            print(&format!(
                "  {isa:<11} at most {int8_gmac_s:6.1} GMAC/s in int8, {f32_gmac_s:6.1} in f32 (weights in L2)"
            ))?;
        }
        for model in &self.models {
            model.print(self.rounds)?;
        }
        print("")?;
        let core_s = self.models.iter().flat_map(|model| &model.cases).filter_map(|case| case.core_s);
        print(
            "x core: per second of processor time, and so are x ref and GMAC/s (the wave transformer's matrices only): other work",
        )?;
        print(&format!(
            "takes caches and clock, but not that. It is counted over all rounds in ticks of {:.0} ms, at most {:.1} % of a case's.",
            1e3 * TICK_S,
            100.0 * TICK_S / core_s.fold(f64::INFINITY, f64::min)
        ))?;
        print(
            "A check fails where tokens are not the scalar engine's, or the distributions lie further from the reference's",
        )?;
        print(&format!("than {MOST_INT8_BITS} (int8) or {MOST_F32_BITS} (f32) bits."))?;
        Ok(())
    }
}

impl ModelReport {
    fn print(&self, rounds: u16) -> Result<()> {
        print("")?;
        print(&format!(
            "{}: {:.2} M multiply-adds a sample; plan {:.1} M and wave {:.1} M parameters; medians of {rounds}",
            self.name,
            self.multiply_adds / 1e6,
            self.plan_parameters as f64 / 1e6,
            self.wave_parameters as f64 / 1e6
        ))?;
        print(&format!(
            "{:<9} {:<11} {:>5} {:>10} {:>7} {:>7} {:>6} {:>6} {:>7} {:>7} {:>7} {:>5} {:>6} {:>8} {:>7}  check",
            "engine",
            "isa",
            "batch",
            "samples/s",
            "x real",
            "x core",
            "x ref",
            "p50 us",
            "p99 us",
            "p99.9",
            "GMAC/s",
            "peak",
            "MB",
            "prefill",
            "d bits"
        ))?;
        for case in &self.cases {
            let optional = |value: Option<f64>, digits: usize| {
                value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
            };
            let step = |of: fn(&Quantiles) -> f64| optional(case.step_us.as_ref().map(of), 1);
            print(&format!(
                "{:<9} {:<11} {:>5} {:>10.0} {:>7.2} {:>7} {:>6} {:>6} {:>7} {:>7} {:>7.1} {:>5} {:>6} {:>5.0} ms {:>7}  {}",
                case.engine,
                case.isa.unwrap_or("-"),
                case.batch,
                case.samples_per_s,
                case.x_real_time,
                optional(case.x_core, 2),
                optional(case.x_reference, 1),
                step(|q| q.p50),
                step(|q| q.p99),
                step(|q| q.p999),
                case.gmac_s,
                case.of_peak.map_or_else(|| "-".to_owned(), |part| format!("{:.0} %", 100.0 * part)),
                optional(case.memory_mb, 0),
                case.prefill_ms,
                optional(case.distance.map(|distance| distance.mean_abs_bits), 4),
                if case.passed { "ok" } else { "FAILED" }
            ))?;
        }
        Ok(())
    }
}
