//! Launches of kernels/decode_persistent.cu: argument structs, and how a model lies in a block's shared memory.

use half::bf16;

use super::tones::tones_room;
use super::{Element, Launch, LaunchError, PlanGrid, SHARED_BYTES, WARP, shared, within};
use crate::codec::N_CODES;

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

/// Plain numbers as the bytes of device memory.
pub trait Words {
    fn put(&self, out: &mut Vec<u8>);

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.put(&mut out);
        out
    }
}

macro_rules! words {
    ($($number:ty),*) => {
        $(impl Words for $number {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }
        })*
    };
}
words!(u8, i16, u16, i32, i64, f32, f64);

impl<T: Words> Words for [T] {
    fn put(&self, out: &mut Vec<u8>) {
        self.iter().for_each(|word| word.put(out));
    }
}

impl<T: Words, const N: usize> Words for [T; N] {
    fn put(&self, out: &mut Vec<u8>) {
        self.as_slice().put(out);
    }
}

/// A struct of kernels/args.cuh, of this many bytes.
macro_rules! mirrored {
    ($(#[$about:meta])* $name:ident, $bytes:literal, { $($(#[$of:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        pub struct $name { $($(#[$of])* pub $field: $type,)* }
        // As many bytes as its fields: nothing lies between them.
        const _: () = assert!(size_of::<$name>() == $bytes && 0 $(+ size_of::<$type>())* == $bytes);
        impl Words for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }
        }
    };
}

mirrored!(
    /// A linear map; fields as in kernels/args.cuh.
    DecodeLinear, 40, {
        weights: i64,
        bias: i64,
        n_in: i32,
        n_out: i32,
        pieces: i32,
        whole: i32,
        resident: i32,
        reserved: i32,
    }
);
mirrored!(
    /// A map as a step of a stack has it, a block's share of its tiles.
    DecodeMap, 48, {
        weights: i64,
        tile_bytes: i32,
        count: u16,
        before: u16,
        bias: i32,
        inputs: u16,
        odd_inputs: u16,
        n_in: u16,
        n_out: u16,
        output: u16,
        k: i16,
        what: u8,
        of: u8,
        normalized: u8,
        resident: u8,
        reserved: [i32; 3],
    }
);
/// The `k` of what ends a step's maps.
const NO_MAP: i16 = i16::MAX;
/// The `k` of the map that leads into a tier, that of one that adds to it, and maps of a block, the first one's number 0.
const INTO: i16 = -2;
const OF_A_BLOCK: usize = 4;
/// Features of a map and layers of a stack, at most.
const MAX_FEATURES: usize = u16::MAX as usize;
const MAX_LAYERS: usize = 4096;

mirrored!(
    /// A stack of transformer blocks.
    DecodeStack, 56, {
        cache: i64,
        dim: i32,
        n_layers: i32,
        n_heads: i32,
        window: i32,
        linears: i32,
        angles: i32,
        frequencies: i32,
        block_cache: i32,
        head_dim: i32,
        vectors: i32,
        sharers: i32,
        over_vectors: i32,
    }
);
mirrored!(
    /// A tier of the wave transformer.
    DecodeTier, 88, {
        stack: DecodeStack,
        hop: i32,
        seen: i32,
        input: i32,
        plan_in: i32,
        down: i32,
        planned: i32,
        handed: i32,
        first_map: i32,
    }
);
mirrored!(
    /// Sizes of a model and where its parts lie.
    DecodeModel, 664, {
        plan: DecodeStack,
        tiers: [DecodeTier; MAX_TIERS],
        n_tiers: i32,
        n_linears: i32,
        n_bands: i32,
        n_bins: i32,
        plan_hop: i32,
        n_codebooks: i32,
        n_entries: i32,
        order: i32,
        past_window: i32,
        past_hop: i32,
        plan_window_len: i32,
        planned_order: i32,
        deconvolution: i32,
        token_width: i32,
        pcm: i32,
        fine_residual: i32,
        n_components: i32,
        slices: i32,
        own_scale: f32,
        bands: i32,
        heads: i32,
        plan_mlp: i32,
        planned_scales: i32,
        feature_in: i32,
        head: i32,
        shortcut: i32,
        embeddings: i32,
        given: i32,
        plan_gain: i32,
        book_mean: i32,
        book_ceiling: i32,
        books: i32,
        code_vectors: i32,
        past_code_in: i32,
        residual_code_in: i32,
        centres: i32,
        edges: i32,
        window: i32,
        grid_numbers: i32,
        lag_window: i32,
        plan_window: i32,
        lobe: i32,
        samples: i32,
        n_samples: i32,
        heard: i32,
        n_heard: i32,
        left: i32,
        n_left: i32,
        tones: i32,
        rest: i32,
        plan_frames: i32,
        hidden: i32,
        drive: i32,
        memory_stride: i32,
        n_tokens: i32,
        n_recent: i32,
        frame_coefficients: i32,
        frame_lines: i32,
        frame_scales: i32,
        frame_stride: i32,
        angle_width: i32,
        refine: i32,
        cache_stride: i64,
    }
);

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

mirrored!(
    /// Arguments of `decode_persistent_*`; the pointers come first.
    DecodeArgs, 328, {
        model: u64,
        linears: u64,
        maps: u64,
        weights: u64,
        exact: u64,
        doubles: u64,
        places: u64,
        counters: u64,
        ring_tokens: u64,
        memory: u64,
        caches: u64,
        frames: u64,
        past: u64,
        flags: u64,
        plan_uniforms: u64,
        wave_uniforms: u64,
        plan_tokens: u64,
        bands: u64,
        tokens: u64,
        nll: u64,
        plan_draws: u64,
        streams: i32,
        n_frames: i32,
        groups: i32,
        group_size: i32,
        overlapped: i32,
        make_plan: i32,
        make_wave: i32,
        top_k: i32,
        temperature: f32,
        top_p: f32,
        min_p: f32,
        grain: f32,
        past_weight: f32,
        offset: f32,
        level: f32,
        at: [i32; N_REGIONS],
        n_maps: i32,
    }
);
words!(u64);

/// Pointers that [`DecodeArgs`] begins with.
pub const N_POINTERS: usize = 21;

impl DecodeArgs {
    /// The same with these pointers, in the order of the fields.
    pub fn with_pointers(&self, pointers: [u64; N_POINTERS]) -> Self {
        let [model, linears, maps, weights, exact, doubles, places, counters, ring_tokens, memory, ..] = pointers;
        let [
            ..,
            caches,
            frames,
            past,
            flags,
            plan_uniforms,
            wave_uniforms,
            plan_tokens,
            bands,
            tokens,
            nll,
            plan_draws,
        ] = pointers;
        Self {
            model,
            linears,
            maps,
            weights,
            exact,
            doubles,
            places,
            counters,
            ring_tokens,
            memory,
            caches,
            frames,
            past,
            flags,
            plan_uniforms,
            wave_uniforms,
            plan_tokens,
            bands,
            tokens,
            nll,
            plan_draws,
            ..*self
        }
    }
}

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

/// What becomes of a map's outputs: `What` of kernels/decode_step.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum What {
    Beginning,
    Begun,
    Added,
    Heads,
    Gates,
    After,
    First,
    Second,
    Direct,
}

/// A map as a stack's step has it.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    k: i16,
    id: i32,
    what: What,
    /// Region of its inputs.
    inputs: usize,
    /// These are the residual stream, which is normalised first.
    normalized: bool,
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

    /// What has steps: the plan and the tiers.
    fn steps(&self) -> impl Iterator<Item = Option<usize>> + use<> {
        std::iter::once(None).chain((0..self.n_tiers as usize).map(Some))
    }

    /// Maps of all steps, with what ends each.
    fn n_maps(&self) -> usize {
        self.steps().map(|step| self.maps(step).len() + 1).sum()
    }

    /// The number of the first map of a tier.
    pub fn first_map(&self, tier: usize) -> usize {
        self.steps().take(1 + tier).map(|step| self.maps(step).len() + 1).sum()
    }

    /// The maps of a step of a tier, or of the plan, in order; what runs beside another has its number.
    fn maps(&self, tier: Option<usize>) -> Vec<Mapped> {
        let tiers = &self.tiers[..self.n_tiers as usize];
        let (last, tier) = (tier.is_some_and(|tier| tier + 1 == tiers.len()), tier.map(|tier| &tiers[tier]));
        let map = |k, id, what, inputs| Mapped { k, id, what, inputs, normalized: false };
        let mut all = Vec::new();
        if let Some(tier) = tier {
            all.push(map(INTO, tier.input, if last { What::Beginning } else { What::Begun }, WIDE));
        }
        if last {
            all.push(map(INTO + 1, self.feature_in, What::Added, FEATURES));
            all.push(map(INTO + 1, self.shortcut, What::First, FEATURES));
        }
        let stack = tier.map_or(&self.plan, |tier| &tier.stack);
        for id in 0..OF_A_BLOCK as i32 * stack.n_layers {
            let (what, inputs, normalized) = match id as usize % OF_A_BLOCK {
                0 => (What::Heads, STREAM, true),
                1 => (What::Added, ATTENDED, false),
                2 => (What::Gates, STREAM, true),
                _ => (What::Added, WIDE, false),
            };
            all.push(Mapped { normalized, ..map(id as i16, stack.linears + id, what, inputs) });
            if last && id < 2 {
                let what = if id == 0 { What::Second } else { What::Direct };
                all.push(map(id as i16, self.shortcut + 1 + id, what, HIDDEN[id as usize]));
            }
        }
        let after = OF_A_BLOCK as i16 * stack.n_layers as i16;
        if last {
            all.push(Mapped { normalized: true, ..map(after, self.head, What::After, STREAM) });
        } else if let Some(tier) = tier {
            all.push(map(after, tier.down, What::After, STREAM));
        }
        all
    }
}

/// A block's share of the tiles of a map: the first, and how many.
fn share(linear: &DecodeLinear, rank: usize, size: usize) -> (usize, usize) {
    let tiles = (linear.n_out as usize).div_ceil(TILE);
    if linear.whole == 1 {
        return (0, tiles);
    }
    let share = tiles.div_ceil(size);
    let first = (rank * share).min(tiles);
    (first, share.min(tiles - first))
}

fn tile_bytes(linear: &DecodeLinear) -> usize {
    (linear.n_in as usize).div_ceil(STEP) * linear.pieces as usize * STEP_BYTES
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
        let sets = streams.div_ceil(rows);
        let threads = MAX_THREADS;
        let overlapped = 3 * sets <= limits.multiprocessors;
        if !overlapped {
            return Self { rows, groups: sets.min(limits.multiprocessors), group_size: 1, overlapped, threads };
        }
        // As few blocks as hold the last tier's weights; more only wait for each other.
        let sizes = GROUP_SIZES.into_iter().filter(|&size| size == 1 || limits.clusters);
        let fitting = sizes.filter(|size| 3 * sets * size <= limits.multiprocessors).map(|group_size| Self {
            rows,
            groups: sets,
            group_size,
            overlapped,
            threads,
        });
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
            return Err(LaunchError::Shared { what: "generation", bytes: least });
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

    /// The maps of all stacks' steps, for each block of a group.
    fn maps(
        &self,
        model: &DecodeModel,
        linears: &[DecodeLinear],
        at: &[i32; N_REGIONS],
    ) -> Result<Vec<DecodeMap>, LaunchError> {
        for features in linears.iter().flat_map(|linear| [linear.n_in, linear.n_out]) {
            within("a map's features", features as usize, MAX_FEATURES)?;
        }
        for stack in model.stacks() {
            within("a stack's layers", stack.n_layers as usize, MAX_LAYERS)?;
        }
        let warps = self.threads.div_ceil(WARP);
        let mut all = Vec::new();
        for (rank, tier) in (0..self.group_size).flat_map(|rank| model.steps().map(move |tier| (rank, tier))) {
            // A plan is one block's work.
            let (rank, size) = if tier.is_none() { (0, 1) } else { (rank, self.group_size) };
            let (mut k, mut before) = (NO_MAP, 0);
            for mapped in model.maps(tier) {
                if mapped.k != k {
                    (k, before) = (mapped.k, 0);
                }
                let linear = &linears[mapped.id as usize];
                let (first, count) = share(linear, rank, size);
                let map = map_of(&mapped, linear, first, at);
                all.push(DecodeMap { count: count as u16, before: (before % warps) as u16, ..map });
                before += count;
            }
            all.push(DecodeMap { k: NO_MAP, ..DecodeMap::default() });
        }
        Ok(all)
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

/// A map, of which a block has the tiles from `first` on.
fn map_of(mapped: &Mapped, linear: &DecodeLinear, first: usize, at: &[i32; N_REGIONS]) -> DecodeMap {
    let bytes = tile_bytes(linear);
    let resident = linear.resident >= 0;
    let weights = if resident {
        at[RESIDENT] as usize + linear.resident as usize
    } else {
        linear.weights as usize * size_of::<bf16>() + first * bytes
    };
    let inputs = at[mapped.inputs];
    let moves = if mapped.inputs == STREAM { (at[POWER] - at[STREAM]) / 2 } else { 0 };
    DecodeMap {
        weights: weights as i64,
        tile_bytes: bytes as i32,
        bias: linear.bias as i32,
        inputs: (inputs / 16) as u16,
        odd_inputs: ((inputs + moves) / 16) as u16,
        n_in: linear.n_in as u16,
        n_out: linear.n_out as u16,
        output: (first * TILE) as u16,
        k: mapped.k,
        what: mapped.what as u8,
        of: linear.pieces as u8,
        normalized: mapped.normalized.into(),
        resident: resident.into(),
        ..DecodeMap::default()
    }
}
