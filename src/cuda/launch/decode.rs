//! Launches of kernels/decode_persistent.cu: how blocks share the work, and how a model lies in a block's shared memory.

mod args;
mod maps;

use half::bf16;

use super::tones::tones_room;
use super::{Element, Launch, LaunchError, PlanGrid, SHARED_BYTES, WARP, shared};
use crate::codec::N_CODES;

pub use args::{DecodeArgs, DecodeLinear, DecodeMap, DecodeModel, DecodeStack, DecodeTier, N_POINTERS, Words};
use maps::{share, tile_bytes};

/// Tiers that a model may have.
pub const MAX_TIERS: usize = 4;
/// Most threads of a block.
pub const MAX_THREADS: usize = 256;
/// Streams that a group of blocks plays side by side, if there are several.
pub const SET: usize = 8;
/// Blocks that may share a stream's work, by size of cluster.
pub const GROUP_SIZES: [usize; 4] = [1, 2, 4, 8];
/// Flags of a set of streams.
pub const N_FLAGS: usize = 4;
/// Features of the forecasts.
const N_FEATURES: usize = 12;
/// Bytes of `Row` and `Block` in kernels/decode_step.cuh.
const ROW_BYTES: usize = 152;
const BLOCK_BYTES: usize = 40;
/// Outputs of a tile of weights, inputs of a step of one, and bytes of a piece of these: 16 for each lane.
const TILE: usize = 16;
const STEP: usize = 16;
const STEP_BYTES: usize = 16 * WARP;
/// Of `prediction::Window`.
const QUAD: usize = 4;
const PARTS: usize = 4;

/// Regions of a block's shared memory, in the order of `DecodeRegion` in kernels/args.cuh: where maps have their inputs, and the last two.
const FEATURES: usize = 8;
const HIDDEN: [usize; 2] = [10, 11];
const STREAM: usize = 18;
const POWER: usize = 19;
const WIDE: usize = 20;
const ATTENDED: usize = 21;
const SCRATCH: usize = 22;
const RESIDENT: usize = 23;
const N_REGIONS: usize = 24;

/// A map's weights `[n_in, n_out]` as its tiles have them, as sums of `pieces` numbers in bf16; `weight(k, j)` is that of input k for
/// output j. Lane l of a warp holds, of outputs l / 4 * 2 and the next, the pairs of inputs l % 4 and l % 4 + 4, in the order of the
/// fragments of `mma.sync`.
pub fn tiled(n_in: usize, n_out: usize, pieces: usize, weight: impl Fn(usize, usize) -> f32) -> Vec<bf16> {
    const VALUES: usize = 8;
    let steps = n_in.div_ceil(STEP);
    let mut out = Vec::with_capacity(n_out.div_ceil(TILE) * steps * pieces * WARP * VALUES);
    for (tile, step) in (0..n_out.div_ceil(TILE)).flat_map(|tile| (0..steps).map(move |step| (tile, step))) {
        let mut left: Vec<f32> = (0..WARP * VALUES)
            .map(|place| {
                let (lane, at) = (place / VALUES, place % VALUES);
                let j = tile * TILE + lane / 4 * 2 + at / 2 % 2;
                let k = step * STEP + lane % 4 * 2 + at / 4 * 8 + at % 2;
                if k < n_in && j < n_out { weight(k, j) } else { 0.0 }
            })
            .collect();
        for _ in 0..pieces {
            out.extend(left.iter_mut().map(|left| {
                let piece = bf16::from_f32(*left);
                *left -= piece.to_f32();
                piece
            }));
        }
    }
    out
}

/// How blocks share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeGeometry {
    /// Streams of a set: 1 or [`SET`].
    pub rows: usize,
    /// Groups of blocks; each plays every so manyth set.
    pub groups: usize,
    /// Blocks of a group, one of [`GROUP_SIZES`].
    pub group_size: usize,
    /// Plan and forecast from the past have blocks of their own.
    pub overlapped: bool,
    /// Threads of a block, a multiple of 32.
    pub threads: usize,
}

/// What a launch needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeLimits {
    pub multiprocessors: usize,
    /// Shared memory of a block, bytes.
    pub shared_bytes: usize,
    /// Whether blocks can see each other's shared memory (sm_90).
    pub clusters: bool,
}

/// Multiprocessors of the largest part of the chip that a cluster can lie in (GH100's graphics processing clusters).
const PART: usize = 18;

impl DecodeLimits {
    /// How many groups of `size` blocks, of which a multiprocessor holds one, certainly run at once: some of every part stay unused,
    /// and how large the parts of a chip are it does not tell.
    pub fn groups_at_once(&self, size: usize) -> usize {
        match size {
            1 => self.multiprocessors,
            _ if !self.clusters => 0,
            _ => self.multiprocessors / PART * (PART / size) + self.multiprocessors % PART / size,
        }
    }
}

impl Default for DecodeLimits {
    /// An H100 or H200.
    fn default() -> Self {
        Self { multiprocessors: 132, shared_bytes: SHARED_BYTES, clusters: true }
    }
}

/// A launch's place in shared memory.
#[derive(Clone, Debug, PartialEq)]
pub struct DecodeLayout {
    pub launch: Launch,
    at: [i32; N_REGIONS],
    /// The model's maps, each with its place in shared memory.
    pub linears: Vec<DecodeLinear>,
    /// What a step of each stack does with them, the plan's and then the tiers', `[group_size, n_maps]`.
    pub maps: Vec<DecodeMap>,
    /// Multiply-adds' weights that stay in shared memory, of those of the wave transformer's tiers.
    pub resident: f64,
}

impl DecodeModel {
    fn stacks(&self) -> impl Iterator<Item = &DecodeStack> {
        std::iter::once(&self.plan).chain(self.tiers[..self.n_tiers as usize].iter().map(|t| &t.stack))
    }

    /// Maps of the wave transformer's steps, those of the last tier first.
    fn played(&self) -> Vec<i32> {
        let mut all = vec![self.feature_in, self.head, self.shortcut, self.shortcut + 1, self.shortcut + 2];
        for tier in self.tiers[..self.n_tiers as usize].iter().rev() {
            all.push(tier.input);
            all.extend(tier.stack.linears..tier.stack.linears + 4 * tier.stack.n_layers);
            all.extend((tier.down >= 0).then_some(tier.down));
        }
        all
    }
}

impl DecodeGeometry {
    /// How many streams are played on a machine by default.
    pub fn of(
        streams: usize,
        model: &DecodeModel,
        linears: &[DecodeLinear],
        element: Element,
        limits: &DecodeLimits,
    ) -> Self {
        let rows = if streams == 1 { 1 } else { SET };
        let geometry = Self::of_sets(rows, streams, model, linears, element, limits);
        // Streams one by one take less room.
        match geometry.layout(model, linears, element, limits) {
            Err(_) if rows > 1 => Self::of_sets(1, streams, model, linears, element, limits),
            _ => geometry,
        }
    }

    fn of_sets(
        rows: usize,
        streams: usize,
        model: &DecodeModel,
        linears: &[DecodeLinear],
        element: Element,
        limits: &DecodeLimits,
    ) -> Self {
        let sets = streams.div_ceil(rows);
        let threads = MAX_THREADS;
        let overlapped = 3 * sets <= limits.multiprocessors;
        if !overlapped {
            return Self { rows, groups: sets.min(limits.multiprocessors), group_size: 1, overlapped, threads };
        }
        // As few blocks as hold the last tier's weights, more only wait for each other; where none hold them, as many as there may be.
        let fitting = GROUP_SIZES
            .into_iter()
            .filter(|&size| 3 * sets <= limits.groups_at_once(size))
            .map(|group_size| Self { rows, groups: sets, group_size, overlapped, threads });
        let mut best = Self { rows, groups: sets, group_size: 1, overlapped, threads };
        for geometry in fitting {
            best = geometry;
            let last = model.tiers[model.n_tiers as usize - 1].stack;
            let layout = geometry.layout(model, linears, element, limits);
            let holds = |layout: DecodeLayout| {
                (last.linears..last.linears + 4 * last.n_layers).all(|id| layout.linears[id as usize].resident >= 0)
            };
            if layout.is_ok_and(holds) {
                break;
            }
        }
        best
    }

    /// # Errors
    /// When a block's shared memory cannot hold what it needs.
    pub fn layout(
        &self,
        model: &DecodeModel,
        linears: &[DecodeLinear],
        element: Element,
        limits: &DecodeLimits,
    ) -> Result<DecodeLayout, LaunchError> {
        const F32: usize = size_of::<f32>();
        const F64: usize = size_of::<f64>();
        let (m, rows) = (model, self.rows);
        let n = |x: i32| x as usize;
        let even = |x: i32| n(x).next_multiple_of(2);
        let widest = |of: &dyn Fn(&DecodeStack) -> usize| m.stacks().map(of).max().unwrap_or(0);
        let outputs = |id: i32| even(linears[n(id)].n_out);
        let dim = widest(&|s| n(s.dim)).max(outputs(m.plan_mlp)).max(outputs(m.planned_scales));
        let seen = m.tiers[..n(m.n_tiers)].iter().map(|t| n(t.seen * m.token_width)).max().unwrap_or(0);
        let wide = widest(&|s| 3 * n(s.dim)).max(even(m.n_entries));
        let inputs = widest(&|s| n(linears[n(s.linears) + 3].n_in))
            .max(seen)
            .max(3 * n(m.n_bands))
            .max(n(m.n_bands) + n(m.plan.dim));
        // Bytes of features of every row that maps read, in whole steps of pairs.
        let features = |n: usize| n.next_multiple_of(STEP) / 2 * rows * F32 * element.pieces();
        let wide = (rows * wide * F32).max(features(inputs));
        // Query and value for each warp.
        let played = 2 * self.threads / WARP * n(m.angle_width).next_multiple_of(Element::Bf16.vector()) * F32;
        let activations = rows * (dim + 2 * dim.div_ceil(TILE)) * F32 + 3 * features(dim) + wide;
        let (quads, lag_quads) = (n(m.past_window).div_ceil(QUAD), n(m.order) / QUAD + 1);
        // Autocorrelations lie after what they are made in, which coefficients take later.
        let solved = |order: i32, room: usize| room.max(rows * n(order)) + rows * (n(order) + 1);
        let past = solved(m.order, QUAD * (quads + lag_quads + 1) + PARTS * lag_quads * QUAD);
        let planned = solved(m.planned_order, PlanGrid::room(n(m.n_bins), n(m.n_bands)));
        let tones = if m.n_heard > 0 { tones_room(n(m.n_bins), n(m.plan_hop)) } else { 0 };
        let helped = played
            .max(n(m.n_entries) * (F64 + F32))
            .max((F64 * past.max(planned)).max(tones).saturating_sub(activations));

        let sizes: [usize; N_REGIONS - 1] = [
            size_of::<DecodeArgs>() + size_of::<DecodeModel>() + BLOCK_BYTES,
            m.n_maps() * size_of::<DecodeMap>(),
            rows * ROW_BYTES,
            rows * n(m.n_recent) * F32,
            rows * n(m.n_left) * F32,
            rows * n(m.n_tokens) * F32,
            rows * n(m.order) * F32,
            rows * n(m.planned_order) * F32,
            features(N_FEATURES),
            2 * rows * 3 * n(m.n_components) * F32,
            features(outputs(m.shortcut)),
            features(outputs(m.shortcut + 1)),
            if m.n_heard > 0 { rows * n(m.past_hop) * F32 } else { 0 },
            rows * n(m.slices) * n(m.n_components) * F32,
            rows * (n(m.n_tiers) + 1) * n(m.angle_width) * F32,
            rows * n(m.angle_width) * F32,
            2 * N_CODES * F32,
            rows * dim * F32,
            2 * features(dim),
            2 * dim.div_ceil(TILE) * rows * F32,
            wide,
            features(dim),
            // The blocks that play hold weights where their helpers have more scratch.
            if self.overlapped { played } else { helped },
        ];
        let mut at = [0; N_REGIONS];
        let mut end = 0;
        for (place, size) in at.iter_mut().zip(sizes) {
            *place = end as i32;
            end = (end + size).next_multiple_of(16);
        }
        at[RESIDENT] = end as i32;
        let least = end.max(at[SCRATCH] as usize + helped).next_multiple_of(16);
        if least > limits.shared_bytes {
            return Err(LaunchError::Shared { what: "generation", bytes: least, limit: limits.shared_bytes });
        }
        let mut placed = linears.to_vec();
        let (mut resident, mut all) = (0, 0);
        let first = end;
        for id in m.played() {
            let linear = &mut placed[n(id)];
            let bytes = share(linear, 0, self.group_size).1 * tile_bytes(linear);
            all += n(linear.n_in) * n(linear.n_out);
            linear.resident = -1;
            if end + bytes <= limits.shared_bytes {
                linear.resident = (end - first) as i32;
                resident += n(linear.n_in) * n(linear.n_out);
                end += bytes;
            }
        }
        let roles = if self.overlapped { 3 } else { 1 };
        let launch = Launch {
            kernel: format!("decode_persistent_{}_{rows}", element.name()),
            grid: [(self.groups * self.group_size * roles) as u32, 1, 1],
            threads: self.threads.next_multiple_of(WARP) as u32,
            shared_bytes: shared("generation", end.max(least))?,
            cluster: self.group_size as u32,
        };
        let maps = self.maps(model, &placed, &at)?;
        Ok(DecodeLayout { launch, at, linears: placed, maps, resident: resident as f64 / all.max(1) as f64 })
    }

    /// Everything of the arguments but pointers, counts and settings.
    pub fn args(&self, layout: &DecodeLayout) -> DecodeArgs {
        DecodeArgs {
            groups: self.groups as i32,
            group_size: self.group_size as i32,
            overlapped: self.overlapped.into(),
            at: layout.at,
            n_maps: (layout.maps.len() / self.group_size) as i32,
            ..DecodeArgs::default()
        }
    }
}
