//! Turns shapes into kernel launches: names, grids, shared memory and argument structs. Plain data, no driver, so that the
//! emulated tests launch exactly what the GPU is given.

mod attention;
mod decode;
mod forecast;
mod plan_grid;
mod tones;
mod training;

use half::bf16;

pub use attention::{AttentionArgs, AttentionShape, HEAD_DIMS};
pub use decode::{
    DecodeArgs, DecodeGeometry, DecodeLayout, DecodeLimits, DecodeLinear, DecodeMap, DecodeModel, DecodeStack,
    DecodeTier, GROUP_SIZES, MAX_TIERS, N_FLAGS, N_POINTERS, SET, Words, tiled,
};
pub use forecast::{
    ForecastShape, LeftArgs, LevinsonArgs, PastAutocorrelationArgs, PlannedAutocorrelationArgs, PredictArgs, TonesArgs,
};
pub use plan_grid::PlanGrid;
pub use tones::ToneTables;
pub use training::{
    AdamwArgs, AddArgs, ColumnSumsArgs, CrossEntropyArgs, CrossEntropyShape, GatherArgs, GatherShape, HeadsShape,
    MixtureNllArgs, MixtureShape, NormShape, RmsNormArgs, SiluArgs, SiluShape, SplitHeadsArgs, SwigluArgs, SwigluShape,
    adamw, add,
};

/// What the elements of a kernel's tensors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    F32,
    Bf16,
}

impl Element {
    fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::Bf16 => "bf16",
        }
    }

    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }

    /// Numbers in bf16 whose sum one is, or nearly: an activation of a model with such weights.
    pub fn pieces(self) -> usize {
        match self {
            Element::F32 => 3,
            Element::Bf16 => 2,
        }
    }

    /// How many 16 bytes hold.
    pub fn vector(self) -> usize {
        16 / self.size()
    }

    /// Values as these, little-endian.
    pub fn to_bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Element::F32 => Words::to_bytes(values),
            Element::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }

    /// The values of [`Self::to_bytes`].
    pub fn values(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Element::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Element::Bf16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        }
    }
}

/// One launch of an entry point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads per block, in one dimension.
    pub threads: u32,
    /// Dynamic shared memory per block.
    pub shared_bytes: u32,
    /// Blocks per cluster of a cooperative launch, whose blocks all run at once; 0: an ordinary launch.
    pub cluster: u32,
}

/// Why a kernel cannot run on these tensors.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    #[error("windowed attention: head_dim {0}, expected one of {HEAD_DIMS:?}")]
    HeadDim(usize),
    #[error("windowed attention: {n_heads} heads do not share {n_kv_heads} key heads evenly")]
    Heads { n_heads: usize, n_kv_heads: usize },
    #[error("{what} is {got}, expected 1 to {limit}")]
    Size { what: &'static str, got: usize, limit: usize },
    #[error("mixture of {0} components: expected a multiple of 2, at least 2")]
    Components(usize),
    #[error("{what} takes {bytes} bytes of shared memory per block, more than the {limit} of the GPU")]
    Shared { what: &'static str, bytes: usize, limit: usize },
    #[error("a plan window of {0} samples: the kernels transform products of twos and threes only")]
    Window(usize),
}

/// Shared memory that a block may have (sm_90).
const SHARED_BYTES: usize = 232_448;
/// The most blocks in the second and third dimension of a grid.
const MAX_GRID_YZ: usize = 65_535;
/// Lanes of a warp.
pub const WARP: usize = 32;

fn within(what: &'static str, got: usize, limit: usize) -> Result<i32, LaunchError> {
    let size = i32::try_from(got).ok().filter(|_| (1..=limit).contains(&got));
    size.ok_or(LaunchError::Size { what, got, limit })
}

fn shared(what: &'static str, bytes: usize) -> Result<u32, LaunchError> {
    if bytes > SHARED_BYTES { Err(LaunchError::Shared { what, bytes, limit: SHARED_BYTES }) } else { Ok(bytes as u32) }
}
