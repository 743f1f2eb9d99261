//! Launches of kernels/attention_window.cu.

use super::{Element, Launch, LaunchError, MAX_GRID_YZ, within};

/// Head sizes that the attention kernels are compiled for.
pub const HEAD_DIMS: [usize; 5] = [32, 48, 64, 96, 128];

/// Arguments of kernels/attention_window.cu, as in kernels/args.cuh; addresses in device memory, 0 until set.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttentionArgs {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub o: u64,
    pub lse: u64,
    pub d_o: u64,
    pub delta: u64,
    pub dq: u64,
    pub dk: u64,
    pub dv: u64,
    pub n_heads: i32,
    pub n_kv_heads: i32,
    pub len: i32,
    pub window: i32,
    pub scale: f32,
    pub joined: i32,
}
const _: () = assert!(size_of::<AttentionArgs>() == 104);

/// Sizes of one windowed attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub batch: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub len: usize,
    pub head_dim: usize,
    /// Keys that a query sees, its own included; more than `len` means all.
    pub window: usize,
    /// Outputs and their gradients lie `[batch, len, n_heads, head_dim]`, not `[batch, n_heads, len, head_dim]`.
    pub joined: bool,
}

/// Rows of a tile, as in attention_window.cu; a row of probabilities is padded by 4, one of head_dim as well.
const TILE: usize = 32;
const PADDING: usize = 4;

impl AttentionShape {
    /// Arguments without addresses; scores are divided by the root of `head_dim`.
    pub fn args(&self) -> Result<AttentionArgs, LaunchError> {
        let Self { batch, n_heads, n_kv_heads, len, head_dim, window, joined } = *self;
        if !HEAD_DIMS.contains(&head_dim) {
            return Err(LaunchError::HeadDim(head_dim));
        }
        within("batch", batch, MAX_GRID_YZ)?;
        let args = AttentionArgs {
            n_heads: within("number of heads", n_heads, MAX_GRID_YZ)?,
            n_kv_heads: within("number of key heads", n_kv_heads, MAX_GRID_YZ)?,
            len: within("length", len, i32::MAX as usize - TILE)?,
            window: within("window", window.min(len), len)?,
            scale: (head_dim as f32).sqrt().recip(),
            joined: joined.into(),
            ..AttentionArgs::default()
        };
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(LaunchError::Heads { n_heads, n_kv_heads });
        }
        Ok(args)
    }

    fn launch(&self, what: &str, element: Element, heads: usize, floats: usize) -> Launch {
        Launch {
            kernel: format!("attention_window_{what}_{}_{}", element.name(), self.head_dim),
            grid: [self.len.div_ceil(TILE) as u32, heads as u32, self.batch as u32],
            threads: 128,
            shared_bytes: (floats * size_of::<f32>()) as u32,
            cluster: 0,
        }
    }

    /// Values of a tile of rows of `head_dim`, and of a tile of probabilities.
    fn tiles(&self) -> (usize, usize) {
        (TILE * (self.head_dim + PADDING), TILE * (TILE + PADDING))
    }

    /// q, k, v -> o, lse.
    pub fn forward(&self, element: Element) -> Launch {
        let (rows, weights) = self.tiles();
        self.launch("forward", element, self.n_heads, 3 * rows + weights)
    }

    /// q, k, v, o, lse, d_o -> delta, dq.
    pub fn backward_queries(&self, element: Element) -> Launch {
        let (rows, weights) = self.tiles();
        self.launch("backward_queries", element, self.n_heads, 4 * rows + weights + 2 * TILE)
    }

    /// q, k, v, lse, d_o, delta -> dk, dv.
    pub fn backward_keys(&self, element: Element) -> Launch {
        let (rows, weights) = self.tiles();
        self.launch("backward_keys", element, self.n_kv_heads, 4 * rows + 2 * weights + 2 * TILE)
    }
}
