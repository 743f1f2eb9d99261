//! Stores a model in another precision, or two parts that were trained apart as one model:
//! `cargo run --release --example store -- wave.safetensors out.safetensors int8 plan.safetensors`.
//! `built-in` for the model inside the program; `f32`, `f16` or `int8`; with a fourth name the codebooks and the plan transformer come from there,
//! with `wave-alone` the file has only the wave transformer, as that of the small model inside the program; after `mean` every weight is the mean of both models'
//! (what a model learned on other data and what it knew before, in one: Wortsman et al., 2022).

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use safetensors::SafeTensors;
use wavegen::checkpoint::{Checkpoint, Precision, safetensors_in_order};
use wavegen::plan::PlanConfig;

const USAGE: &str = "usage: store built-in|IN.safetensors OUT.safetensors f32|f16|int8 [PLAN.safetensors|wave-alone|mean OTHER.safetensors]";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [input, output, name, plan @ ..] = &args[..] else { bail!(USAGE) };
    let all = [Precision::F32, Precision::F16, Precision::Int8];
    let precision = all.into_iter().find(|p| p.name() == name).context(USAGE)?;
    let load = |name: &str| Checkpoint::named(Path::new(name));
    let mut checkpoint = load(input)?;
    if let [mean, name] = plan
        && mean == "mean"
    {
        let other = load(name)?;
        ensure!(other.config == checkpoint.config, "{name}: is of other sizes or settings than {input}");
        for (name, weight) in &mut checkpoint.weights {
            let theirs = other.weights.get(name).with_context(|| format!("{name} is missing"))?;
            weight.change(|ours| *ours = (&*ours + &*theirs.floats()) / 2.0);
        }
    }
    let alone = matches!(plan, [name] if name == "wave-alone");
    if let [name] = plan
        && !alone
    {
        let other = load(name)?;
        let PlanConfig { n_codebooks, n_entries, hysteresis, attack_db, .. } = other.config.plan;
        ensure!(
            other.config.plan == PlanConfig { n_codebooks, n_entries, hysteresis, attack_db, ..checkpoint.config.plan }
                && other.config.codec == checkpoint.config.codec,
            "{name}: has another codec or other plan frames than {input}; train one with --init the other"
        );
        // The wave transformer reads bands, not plan tokens.
        checkpoint.config.plan = other.config.plan;
        checkpoint.quantizer = other.quantizer;
        checkpoint.config.plan_transformer = other.config.plan_transformer;
        checkpoint.weights.retain(|name, _| !name.starts_with("plan."));
        checkpoint.weights.extend(other.weights.into_iter().filter(|(name, _)| name.starts_with("plan.")));
    }
    checkpoint.save(Path::new(output), precision)?;
    if alone {
        let bytes = std::fs::read(output)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let whole = SafeTensors::deserialize(&bytes)?;
        let part = whole.iter().filter(|(name, _)| name.starts_with("wave."));
        let metadata = header.metadata().clone().unwrap_or_default();
        let bytes = safetensors_in_order(part, metadata)?;
        std::fs::write(output, bytes)?;
    }
    Ok(())
}
