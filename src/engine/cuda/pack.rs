//! Turns a checkpoint into the blobs that kernels/decode_persistent.cu reads: weights, tables, and where everything lies.

use half::bf16;

use crate::checkpoint::{Checkpoint, Weight};
use crate::codec::{Codec, N_CODES, Quantizer, Token};
use crate::cuda::launch::{
    DecodeLinear, DecodeModel, DecodeStack, DecodeTier, Element, MAX_TIERS, PlanGrid, ToneTables, WARP, Words, tiled,
};
use crate::engine::EngineError;
use crate::forecast::PastForecast;
use crate::model::config::N_FORECASTS;
use crate::model::features::N_TOKEN_VALUES;
use crate::model::wave_transformer::PLAN_FRAMES;

const ROPE_BASE: f64 = 10_000.0;
/// Positions whose angles are kept; `ANGLES` of kernels/decode_step.cuh.
const ANGLES: usize = 64;
/// The kernel gives each component of the mixture a lane.
const MAX_COMPONENTS: usize = 32;
/// And 16 bytes of a head's values.
const MAX_HEAD_DIM: usize = 128;

/// A model as device memory holds it.
pub struct Packed {
    pub model: DecodeModel,
    pub linears: Vec<DecodeLinear>,
    pub element: Element,
    /// Matrices, in tiles of bf16.
    pub weights: Vec<u8>,
    /// What is always f32.
    pub exact: Vec<u8>,
    /// f64: windows, weights, frequencies.
    pub doubles: Vec<u8>,
    /// i32, of the [`PlanGrid`].
    pub places: Vec<u8>,
}

struct Packer<'a> {
    checkpoint: &'a Checkpoint,
    element: Element,
    linears: Vec<DecodeLinear>,
    weights: Vec<bf16>,
    exact: Vec<f32>,
    doubles: Vec<f64>,
    /// Values of a stream's caches so far.
    caches: i64,
}

/// What becomes of a linear map.
#[derive(Clone, Copy, Default)]
struct Kind<'a> {
    /// As exact as activations, whatever the element.
    exact: bool,
    /// Every block of a group computes all of it.
    whole: bool,
    /// Name of a norm whose gain goes into the rows.
    gain: Option<&'a str>,
    /// The first and second half of the outputs take turns.
    alternate: bool,
}

const DIVIDED: Kind = Kind { exact: false, whole: false, gain: None, alternate: false };
const EXACT: Kind = Kind { exact: true, whole: true, gain: None, alternate: false };

impl Packer<'_> {
    fn tensor(&self, name: &str) -> Result<&Weight, EngineError> {
        self.checkpoint.weights.get(name).ok_or_else(|| EngineError::State(format!("the model has no '{name}'")))
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, EngineError> {
        Ok(self.tensor(name)?.values().into_owned())
    }

    /// Appends f32 values, 16-byte aligned; gives where they begin.
    fn table(&mut self, values: impl IntoIterator<Item = f32>) -> i32 {
        self.exact.resize(self.exact.len().next_multiple_of(4), 0.0);
        let at = self.exact.len();
        self.exact.extend(values);
        at as i32
    }

    /// Appends f64 values, 16-byte aligned; gives where they begin.
    fn doubles(&mut self, values: impl IntoIterator<Item = f64>) -> i32 {
        self.doubles.resize(self.doubles.len().next_multiple_of(2), 0.0);
        let at = self.doubles.len();
        self.doubles.extend(values);
        at as i32
    }

    /// Appends a map; gives its number.
    fn linear(&mut self, name: &str, kind: Kind) -> Result<i32, EngineError> {
        let full = format!("{name}.weight");
        let shape = self.tensor(&full)?.shape();
        let &[n_in, n_out] = &shape[..] else { return Err(EngineError::State(format!("'{full}' is no matrix"))) };
        let mut matrix = self.values(&full)?;
        if let Some(gain) = kind.gain {
            for (row, gain) in matrix.chunks_exact_mut(n_out).zip(self.values(gain)?) {
                row.iter_mut().for_each(|w| *w *= gain);
            }
        }
        let bias = format!("{name}.bias");
        let bias = if self.checkpoint.weights.contains_key(&bias) { Some(self.values(&bias)?) } else { None };
        let column = |row: &[f32], j: usize| {
            let from = if kind.alternate { j / 2 + j % 2 * (n_out / 2) } else { j };
            row.get(from).copied().unwrap_or(0.0)
        };
        let pieces = if self.element == Element::Bf16 && !kind.exact { 1 } else { self.element.pieces() };
        let laid = tiled(n_in, n_out, pieces, |k, j| column(&matrix[k * n_out..][..n_out], j));
        let bias = match bias {
            Some(bias) => i64::from(self.table((0..n_out.next_multiple_of(2)).map(|j| column(&bias, j)))),
            None => -1,
        };
        let weights = self.weights.len() as i64;
        self.weights.extend(laid);
        self.linears.push(DecodeLinear {
            weights,
            bias,
            n_in: n_in as i32,
            n_out: n_out as i32,
            pieces: pieces as i32,
            whole: kind.whole.into(),
            resident: -1,
            reserved: 0,
        });
        Ok(self.linears.len() as i32 - 1)
    }

    /// A stack whose blocks are `name.blocks.0`, ...; its caches come after those of the stacks before it.
    fn stack(&mut self, name: &str, [dim, n_layers, n_heads, window]: [usize; 4]) -> Result<DecodeStack, EngineError> {
        let head_dim = dim / n_heads;
        if head_dim > MAX_HEAD_DIM {
            return Err(EngineError::State(format!(
                "'{name}' has heads of {head_dim} values, the CUDA engine takes at most {MAX_HEAD_DIM}"
            )));
        }
        let (cache, block_cache) =
            (self.caches, 2 * n_heads * window * head_dim.next_multiple_of(self.element.vector()));
        let vectors = head_dim.div_ceil(self.element.vector());
        self.caches += (n_layers * block_cache) as i64;
        let frequencies: Vec<f64> =
            (0..head_dim / 2).map(|i| ROPE_BASE.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let angles = self.table((0..ANGLES).flat_map(|pos| {
            let angles = frequencies.iter().map(move |f| pos as f64 * f);
            angles.clone().map(f64::cos).chain(angles.map(f64::sin)).map(|x| x as f32)
        }));
        let frequencies = self.doubles(frequencies.iter().map(|f| f / std::f64::consts::PI));
        let linears = self.linears.len() as i32;
        for block in 0..n_layers {
            let name = format!("{name}.blocks.{block}");
            let (attention, feed_forward) = (format!("{name}.attention_norm"), format!("{name}.feed_forward_norm"));
            self.linear(&format!("{name}.qkv"), Kind { gain: Some(&attention), ..DIVIDED })?;
            self.linear(&format!("{name}.out"), DIVIDED)?;
            self.linear(&format!("{name}.up"), Kind { gain: Some(&feed_forward), alternate: true, ..DIVIDED })?;
            self.linear(&format!("{name}.down"), DIVIDED)?;
        }
        Ok(DecodeStack {
            cache,
            dim: dim as i32,
            n_layers: n_layers as i32,
            n_heads: n_heads as i32,
            window: window as i32,
            linears,
            angles,
            frequencies,
            block_cache: block_cache as i32,
            head_dim: head_dim as i32,
            vectors: vectors as i32,
            // A head has at most as many vectors as a warp has lanes.
            sharers: 1 << (WARP / vectors).ilog2(),
            over_vectors: 1024_usize.div_ceil(vectors) as i32,
        })
    }
}

impl Packed {
    /// # Errors
    /// When the kernel cannot play this model.
    pub fn new(checkpoint: &Checkpoint, element: Element) -> Result<Self, EngineError> {
        let config = &checkpoint.config;
        let (wave, plan, forecast) = (&config.wave_transformer, &config.plan_transformer, &config.forecast);
        let (n_tiers, n_components) = (wave.tiers.len(), wave.n_components());
        for (what, got, most) in
            [("tiers", n_tiers, MAX_TIERS), ("components of the mixture", n_components, MAX_COMPONENTS)]
        {
            if got > most {
                return Err(EngineError::State(format!("{got} {what}, the CUDA engine takes at most {most}")));
            }
        }
        let spectrum = checkpoint.spectrum()?;
        let grid = PlanGrid::new(&spectrum, forecast.deconvolution)?;
        let mut p = Packer {
            checkpoint,
            element,
            linears: Vec::new(),
            weights: Vec::new(),
            exact: Vec::new(),
            doubles: Vec::new(),
            caches: 0,
        };
        let mut m = DecodeModel {
            n_tiers: n_tiers as i32,
            n_bands: grid.n_bands as i32,
            n_bins: grid.n_bins as i32,
            plan_hop: config.plan.hop as i32,
            n_codebooks: config.plan.n_codebooks as i32,
            n_entries: config.plan.n_entries as i32,
            order: forecast.order as i32,
            past_window: forecast.past_window as i32,
            past_hop: forecast.past_hop as i32,
            plan_window_len: config.plan.window as i32,
            planned_order: forecast.planned_order as i32,
            deconvolution: forecast.deconvolution as i32,
            token_width: (wave.token_dim + N_TOKEN_VALUES) as i32,
            pcm: (config.codec.quantizer == Quantizer::Pcm16).into(),
            fine_residual: forecast.fine_residual.into(),
            n_components: n_components as i32,
            slices: wave.slices as i32,
            own_scale: wave.own_scale,
            ..DecodeModel::default()
        };
        const _: () = assert!(N_FORECASTS == 2 && PLAN_FRAMES == 3, "kernels/decode_wave.cuh counts on it");

        m.plan = p.stack("plan", [plan.dim, plan.n_layers, plan.n_heads, plan.window])?;
        m.bands = p.linear("plan.bands", EXACT)?;
        m.heads = p.linears.len() as i32;
        for q in 0..config.plan.n_codebooks {
            p.linear(&format!("plan.{q}.head_in"), EXACT)?;
            p.linear(&format!("plan.{q}.head_out"), EXACT)?;
        }
        m.refine = if plan.refine { p.linear("plan.refine", EXACT)? } else { -1 };
        let tables = |p: &Packer, n: usize, name: &str| -> Result<Vec<f32>, EngineError> {
            (0..n).map(|q| p.values(&format!("plan.{q}.{name}"))).collect::<Result<Vec<_>, _>>().map(|all| all.concat())
        };
        let (embeddings, given) =
            (tables(&p, config.plan.n_codebooks, "embedding")?, tables(&p, config.plan.n_codebooks - 1, "given")?);
        m.embeddings = p.table(embeddings);
        m.given = p.table(given);
        let gain = p.values("plan.norm")?;
        m.plan_gain = p.table(gain);
        let quantizer = &checkpoint.quantizer;
        m.book_mean = p.table(quantizer.mean.iter().copied());
        m.book_ceiling = p.table(quantizer.ceiling().iter().copied());
        m.books = p.table(quantizer.books.iter().copied());

        m.frame_coefficients = 3;
        m.frame_scales = m.frame_coefficients + m.planned_order;
        m.frame_lines = m.frame_scales + (wave.slices * n_components) as i32;
        // Every other bin is a line at most.
        let mut planned = m.frame_lines + if forecast.tones { m.n_bins } else { 0 };
        let ring = |n: usize| n.next_power_of_two() as i32;
        (m.n_samples, m.n_left) = (ring(forecast.past_window + forecast.past_hop), ring(forecast.planned_order));
        m.n_heard = if forecast.tones { ring(forecast.past_window) } else { 0 };
        let of_tones = if forecast.tones { m.plan_hop } else { 0 };
        (m.n_tokens, m.n_recent) = (ring(wave.history()), ring(forecast.order));
        m.heard = m.n_samples;
        m.left = m.heard + m.n_heard;
        m.tones = m.left + m.n_left;
        m.rest = m.tones + of_tones;
        m.plan_frames = m.rest + of_tones;
        m.hidden = m.plan_frames + PLAN_FRAMES as i32 * m.n_bands;
        m.drive = m.hidden + plan.dim as i32;
        m.memory_stride = m.drive + 1;
        m.plan_mlp = p.linear("wave.plan_mlp.0", EXACT)?;
        p.linear("wave.plan_mlp.1", EXACT)?;
        m.planned_scales = p.linear("wave.planned_scales.0", EXACT)?;
        p.linear("wave.planned_scales.1", EXACT)?;
        for (i, tier) in wave.tiers.iter().enumerate() {
            let name = format!("wave.tiers.{i}");
            let input = p.linear(&format!("{name}.input"), DIVIDED)?;
            let plan_in = p.linear(&format!("{name}.plan_in"), EXACT)?;
            let stack = p.stack(&name, [tier.dim, tier.n_layers, tier.n_heads, tier.window])?;
            let down = if i + 1 < n_tiers { p.linear(&format!("{name}.down"), DIVIDED)? } else { -1 };
            m.tiers[i] = DecodeTier {
                stack,
                hop: tier.hop as i32,
                seen: if tier.hop > 1 { tier.hop } else { wave.taps } as i32,
                input,
                plan_in,
                down,
                planned,
                handed: m.memory_stride,
                first_map: 0,
            };
            planned += tier.dim as i32;
            if down >= 0 {
                m.memory_stride += p.linears[down as usize].n_out;
            }
        }
        m.memory_stride = (m.memory_stride as usize).next_multiple_of(4) as i32;
        m.frame_stride = (planned as usize).next_multiple_of(4) as i32;
        m.cache_stride = p.caches;
        m.feature_in = p.linear("wave.feature_in", Kind { exact: true, ..DIVIDED })?;
        m.head = p.linear("wave.head", Kind { gain: Some("wave.norm"), ..EXACT })?;
        m.shortcut = p.linear("wave.shortcut.0", EXACT)?;
        p.linear("wave.shortcut.1", Kind { whole: true, ..DIVIDED })?;
        p.linear("wave.shortcut.2", EXACT)?;

        let vectors = p.values("wave.token_embedding")?;
        m.code_vectors = p.table(vectors);
        let (past_code, residual_code) = (p.values("wave.past_code_in")?, p.values("wave.residual_code_in")?);
        m.past_code_in = p.table(past_code);
        m.residual_code_in = p.table(residual_code);
        let mulaw = Codec { quantizer: Quantizer::Mulaw8, ..config.codec.clone() };
        m.centres = p.table((0..N_CODES as Token).map(|token| mulaw.decode(token)));
        m.edges = p.table((1..N_CODES).map(|edge| mulaw.edge(edge)));

        m.window = p.doubles(PastForecast::window(forecast.past_window));
        m.grid_numbers = p.doubles(grid.numbers);
        m.lag_window = p.doubles(spectrum.lag_window(forecast.planned_order, forecast.lag_window_hz));
        if forecast.tones {
            let tables = ToneTables::new(&spectrum, grid.n_bins);
            m.plan_window = p.doubles(tables.window);
            m.lobe = p.doubles(tables.lobe);
        }
        m.n_linears = p.linears.len() as i32;
        for tier in 0..n_tiers {
            m.tiers[tier].first_map = m.first_map(tier) as i32;
        }
        let stacks = std::iter::once(m.plan).chain(m.tiers[..n_tiers].iter().map(|tier| tier.stack));
        m.angle_width = stacks.map(|s| s.dim / s.n_heads).max().unwrap_or(0);
        Ok(Self {
            model: m,
            element,
            weights: p.weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
            exact: p.exact.to_bytes(),
            doubles: p.doubles.to_bytes(),
            places: grid.places.to_bytes(),
            linears: p.linears,
        })
    }
}
