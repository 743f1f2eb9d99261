//! Turns a model and a geometry into the table of maps that a step goes through, each with a block's share of its tiles.

use half::bf16;

use super::super::{LaunchError, WARP, within};
use super::args::{DecodeLinear, DecodeMap, DecodeModel};
use super::{
    ATTENDED, DecodeGeometry, FEATURES, HIDDEN, N_REGIONS, POWER, RESIDENT, STEP, STEP_BYTES, STREAM, TILE, WIDE,
};

/// The `k` of what ends a step's maps.
const NO_MAP: i16 = i16::MAX;
/// The `k` of the map that leads into a tier, that of one that adds to it, and maps of a block, the first one's number 0.
const INTO: i16 = -2;
const OF_A_BLOCK: usize = 4;
/// Features of a map and layers of a stack, at most.
const MAX_FEATURES: usize = u16::MAX as usize;
const MAX_LAYERS: usize = 4096;

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

impl DecodeModel {
    /// What has steps: the plan and the tiers.
    fn steps(&self) -> impl Iterator<Item = Option<usize>> + use<> {
        std::iter::once(None).chain((0..self.n_tiers as usize).map(Some))
    }

    /// Maps of all steps, with what ends each.
    pub fn n_maps(&self) -> usize {
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
pub fn share(linear: &DecodeLinear, rank: usize, size: usize) -> (usize, usize) {
    let tiles = (linear.n_out as usize).div_ceil(TILE);
    if linear.whole == 1 {
        return (0, tiles);
    }
    let share = tiles.div_ceil(size);
    let first = (rank * share).min(tiles);
    (first, share.min(tiles - first))
}

pub fn tile_bytes(linear: &DecodeLinear) -> usize {
    (linear.n_in as usize).div_ceil(STEP) * linear.pieces as usize * STEP_BYTES
}

impl DecodeGeometry {
    /// The maps of all stacks' steps, for each block of a group.
    pub fn maps(
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
