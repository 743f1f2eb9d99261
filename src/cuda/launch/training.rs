//! Launches of kernels/training.cu.

use super::{Element, Launch, LaunchError, WARP, shared, within};

const THREADS: usize = 128;
const WARPS: usize = THREADS / WARP;
const SUM_ROWS: usize = 8;
/// Rows that one block sums the gain's gradient over.
const ROWS_PER_PART: usize = 256;
/// Parts, one per block in the grid's second dimension.
const MAX_PARTS: usize = 4096;
/// Features of a head that a warp splits off.
const MAX_HEAD_DIM: usize = 128;
const MAX_ROWS: usize = i32::MAX as usize / 2;

/// Arguments of `training_rms_norm_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RmsNormArgs {
    pub x: u64,
    pub gain: u64,
    pub y: u64,
    pub inverse_rms: u64,
    pub d_y: u64,
    pub d_x: u64,
    pub d_gain_parts: u64,
    pub rows: i32,
    pub dim: i32,
    pub rows_per_part: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<RmsNormArgs>() == 72);

/// Arguments of `training_column_sums`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ColumnSumsArgs {
    pub parts: u64,
    pub sums: u64,
    pub rows: i32,
    pub dim: i32,
}
const _: () = assert!(size_of::<ColumnSumsArgs>() == 24);

/// Arguments of `training_swiglu_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SwigluArgs {
    pub up: u64,
    pub y: u64,
    pub d_y: u64,
    pub d_up: u64,
    pub rows: i32,
    pub hidden: i32,
}
const _: () = assert!(size_of::<SwigluArgs>() == 40);

/// Arguments of `training_silu_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SiluArgs {
    pub z: u64,
    pub bias: u64,
    pub y: u64,
    pub d_y: u64,
    pub d_z: u64,
    pub d_bias_parts: u64,
    pub rows: i32,
    pub dim: i32,
    pub rows_per_part: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<SiluArgs>() == 64);

/// Arguments of `training_cross_entropy_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropyArgs {
    pub logits: u64,
    pub targets: u64,
    pub nll: u64,
    pub lse: u64,
    pub d_nll: u64,
    pub d_logits: u64,
    pub rows: i32,
    pub classes: i32,
}
const _: () = assert!(size_of::<CrossEntropyArgs>() == 56);

/// Arguments of `training_mixture_nll_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MixtureNllArgs {
    pub head: u64,
    pub forecasts: u64,
    pub units: u64,
    pub low: u64,
    pub high: u64,
    pub nll: u64,
    pub d_nll: u64,
    pub d_head: u64,
    pub n: i32,
    pub components: i32,
}
const _: () = assert!(size_of::<MixtureNllArgs>() == 72);

/// Arguments of `training_split_heads_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SplitHeadsArgs {
    pub qkv: u64,
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub d_q: u64,
    pub d_k: u64,
    pub d_v: u64,
    pub d_qkv: u64,
    pub turns: u64,
    pub rows: i32,
    pub len: i32,
    pub n_heads: i32,
    pub head_dim: i32,
}
const _: () = assert!(size_of::<SplitHeadsArgs>() == 88);

/// Arguments of `training_gather_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GatherArgs {
    pub x: u64,
    pub table: u64,
    pub codes: u64,
    pub y: u64,
    pub d_y: u64,
    pub d_table_parts: u64,
    pub rows: i32,
    pub dim: i32,
    pub n_tables: i32,
    pub entries: i32,
    pub rows_per_part: i32,
    pub reserved: i32,
}
const _: () = assert!(size_of::<GatherArgs>() == 72);

/// Arguments of `training_add_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AddArgs {
    pub x: u64,
    pub z: u64,
    pub y: u64,
    pub n: i64,
}
const _: () = assert!(size_of::<AddArgs>() == 32);

/// Arguments of `training_adamw`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AdamwArgs {
    pub weights: u64,
    pub gradients: u64,
    pub means: u64,
    pub squares: u64,
    pub averages: u64,
    pub n: i32,
    pub gradient: f32,
    pub rate: f32,
    pub square: f32,
    pub decay: f32,
    pub average: f32,
}
const _: () = assert!(size_of::<AdamwArgs>() == 64);

/// Launch with `blocks` blocks of 128 threads.
fn simple(kernel: String, blocks: usize) -> Launch {
    Launch { kernel, grid: [blocks as u32, 1, 1], threads: THREADS as u32, shared_bytes: 0, cluster: 0 }
}

/// Launch that sums columns: 32 columns a block.
fn sums(kernel: String, dim: usize, parts: usize) -> Launch {
    let threads = SUM_ROWS * WARP;
    let grid = [dim.div_ceil(WARP) as u32, parts as u32, 1];
    Launch { kernel, grid, threads: threads as u32, shared_bytes: (size_of::<f32>() * threads) as u32, cluster: 0 }
}

/// Rows that one block sums, where sums over all are made in parts.
fn rows_per_part(rows: usize) -> usize {
    ROWS_PER_PART.max(rows.div_ceil(MAX_PARTS))
}

/// Parts, `[parts, dim]`, -> their sums.
fn sum_of(parts: usize, dim: usize) -> (Launch, ColumnSumsArgs) {
    let args = ColumnSumsArgs { rows: parts as i32, dim: dim as i32, ..ColumnSumsArgs::default() };
    (sums("training_column_sums".to_string(), dim, 1), args)
}

/// RMSNorm of `rows` vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormShape {
    pub rows: usize,
    pub dim: usize,
}

impl NormShape {
    pub fn args(&self) -> Result<RmsNormArgs, LaunchError> {
        Ok(RmsNormArgs {
            rows: within("rows", self.rows, MAX_ROWS)?,
            dim: within("dim", self.dim, MAX_ROWS)?,
            rows_per_part: rows_per_part(self.rows) as i32,
            ..RmsNormArgs::default()
        })
    }

    /// Parts that the gain's gradient is summed in.
    pub fn parts(&self) -> usize {
        self.rows.div_ceil(rows_per_part(self.rows))
    }

    /// x, gain -> y, inverse_rms.
    pub fn forward(&self, element: Element) -> Launch {
        simple(format!("training_rms_norm_forward_{}", element.name()), self.rows.div_ceil(WARPS))
    }

    /// x, gain, inverse_rms, d_y -> d_x.
    pub fn backward(&self, element: Element) -> Launch {
        simple(format!("training_rms_norm_backward_{}", element.name()), self.rows.div_ceil(WARPS))
    }

    /// x, inverse_rms, d_y -> d_gain_parts, `[parts, dim]`.
    pub fn backward_gain(&self, element: Element) -> Launch {
        sums(format!("training_rms_norm_backward_gain_{}", element.name()), self.dim, self.parts())
    }

    /// d_gain_parts -> d_gain, `[dim]`.
    pub fn sum_parts(&self) -> (Launch, ColumnSumsArgs) {
        sum_of(self.parts(), self.dim)
    }
}

/// SiLU of `rows` vectors with a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiluShape {
    pub rows: usize,
    pub dim: usize,
}

impl SiluShape {
    pub fn args(&self) -> Result<SiluArgs, LaunchError> {
        within("number of outputs", self.rows.saturating_mul(self.dim), THREADS * MAX_ROWS)?;
        let (rows, dim) = (within("rows", self.rows, MAX_ROWS)?, within("dim", self.dim, MAX_ROWS)?);
        Ok(SiluArgs { rows, dim, rows_per_part: rows_per_part(self.rows) as i32, ..SiluArgs::default() })
    }

    /// Parts that the bias's gradient is summed in.
    pub fn parts(&self) -> usize {
        self.rows.div_ceil(rows_per_part(self.rows))
    }

    /// z, bias -> y.
    pub fn forward(&self) -> Launch {
        simple("training_silu_forward".to_string(), (self.rows * self.dim).div_ceil(THREADS))
    }

    /// z, bias, d_y -> d_z.
    pub fn backward(&self) -> Launch {
        simple("training_silu_backward".to_string(), (self.rows * self.dim).div_ceil(THREADS))
    }

    /// d_z -> d_bias_parts, `[parts, dim]`.
    pub fn backward_bias(&self) -> Launch {
        sums("training_silu_backward_bias".to_string(), self.dim, self.parts())
    }

    /// d_bias_parts -> d_bias.
    pub fn sum_parts(&self) -> (Launch, ColumnSumsArgs) {
        sum_of(self.parts(), self.dim)
    }
}

/// SwiGLU of `rows` vectors of twice `hidden`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwigluShape {
    pub rows: usize,
    pub hidden: usize,
}

impl SwigluShape {
    pub fn args(&self) -> Result<SwigluArgs, LaunchError> {
        within("number of outputs", self.rows.saturating_mul(self.hidden), THREADS * MAX_ROWS)?;
        let (rows, hidden) = (within("rows", self.rows, MAX_ROWS)?, within("hidden width", self.hidden, MAX_ROWS)?);
        Ok(SwigluArgs { rows, hidden, ..SwigluArgs::default() })
    }

    fn launch(&self, what: &str, element: Element) -> Launch {
        let kernel = format!("training_swiglu_{what}_{}", element.name());
        simple(kernel, (self.rows * self.hidden).div_ceil(THREADS))
    }

    /// up -> y.
    pub fn forward(&self, element: Element) -> Launch {
        self.launch("forward", element)
    }

    /// up, d_y -> d_up.
    pub fn backward(&self, element: Element) -> Launch {
        self.launch("backward", element)
    }
}

/// Cross-entropy of `rows` choices among `classes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrossEntropyShape {
    pub rows: usize,
    pub classes: usize,
}

impl CrossEntropyShape {
    pub fn args(&self) -> Result<CrossEntropyArgs, LaunchError> {
        let (rows, classes) = (within("rows", self.rows, MAX_ROWS)?, within("classes", self.classes, MAX_ROWS)?);
        Ok(CrossEntropyArgs { rows, classes, ..CrossEntropyArgs::default() })
    }

    fn launch(&self, what: &str, element: Element) -> Launch {
        simple(format!("training_cross_entropy_{what}_{}", element.name()), self.rows.div_ceil(WARPS))
    }

    /// logits, targets -> nll, lse.
    pub fn forward(&self, element: Element) -> Launch {
        self.launch("forward", element)
    }

    /// logits, targets, lse, d_nll -> d_logits.
    pub fn backward(&self, element: Element) -> Launch {
        self.launch("backward", element)
    }
}

/// Likelihood of `n` samples by mixtures of `components` logistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixtureShape {
    pub n: usize,
    pub components: usize,
}

impl MixtureShape {
    pub fn args(&self) -> Result<MixtureNllArgs, LaunchError> {
        if self.components == 0 || !self.components.is_multiple_of(2) {
            return Err(LaunchError::Components(self.components));
        }
        let n = within("number of samples", self.n, MAX_ROWS)?;
        Ok(MixtureNllArgs { n, components: self.components as i32, ..MixtureNllArgs::default() })
    }

    fn launch(&self, what: &str) -> Result<Launch, LaunchError> {
        let bytes = size_of::<f32>() * THREADS * ((3 * self.components) | 1);
        let launch = simple(format!("training_mixture_nll_{what}"), self.n.div_ceil(THREADS));
        Ok(Launch { shared_bytes: shared("mixture likelihood", bytes)?, ..launch })
    }

    /// head, forecasts, units, low, high -> nll.
    pub fn forward(&self) -> Result<Launch, LaunchError> {
        self.launch("forward")
    }

    /// The same and d_nll -> d_head.
    pub fn backward(&self) -> Result<Launch, LaunchError> {
        self.launch("backward")
    }
}

/// What attention reads of `batch` sequences of `len` positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadsShape {
    pub batch: usize,
    pub len: usize,
    pub n_heads: usize,
    pub head_dim: usize,
}

impl HeadsShape {
    fn items(&self) -> usize {
        self.batch.saturating_mul(self.len).saturating_mul(self.n_heads)
    }

    pub fn args(&self) -> Result<SplitHeadsArgs, LaunchError> {
        within("rows of all heads", self.items(), MAX_ROWS)?;
        let Self { batch, len, n_heads, head_dim } = *self;
        if !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
            return Err(LaunchError::HeadDim(head_dim));
        }
        let (n_heads, head_dim) = (within("heads", n_heads, MAX_ROWS)?, within("head_dim", head_dim, MAX_ROWS)?);
        Ok(SplitHeadsArgs {
            rows: (batch * len) as i32,
            len: len as i32,
            n_heads,
            head_dim,
            ..SplitHeadsArgs::default()
        })
    }

    /// qkv -> q, k, v.
    pub fn forward(&self, element: Element) -> Launch {
        simple(format!("training_split_heads_forward_{}", element.name()), self.items().div_ceil(WARPS))
    }

    /// qkv, d_q, d_k, d_v -> d_qkv.
    pub fn backward(&self, element: Element) -> Launch {
        simple(format!("training_split_heads_backward_{}", element.name()), self.items().div_ceil(WARPS))
    }
}

/// Rows of `n_tables` tables added to each of `rows` vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatherShape {
    pub rows: usize,
    pub dim: usize,
    pub n_tables: usize,
    /// Rows of each table.
    pub entries: usize,
}

const GATHER_COLUMNS: usize = 64;
const GATHER_ENTRIES: usize = 64;
/// Rows that one block sums a table's gradient over, at least, and how many blocks keep a GPU busy.
const GATHER_ROWS: usize = 512;
const GATHER_BLOCKS: usize = 4096;

impl GatherShape {
    fn rows_per_part(&self) -> usize {
        GATHER_ROWS.max(self.rows.div_ceil(GATHER_BLOCKS.div_ceil(self.blocks())))
    }

    /// Blocks of a part.
    fn blocks(&self) -> usize {
        (self.dim.div_ceil(GATHER_COLUMNS) * self.n_tables * self.entries.div_ceil(GATHER_ENTRIES)).max(1)
    }

    /// Parts that the tables' gradient is summed in.
    pub fn parts(&self) -> usize {
        self.rows.div_ceil(self.rows_per_part())
    }

    /// Values of all tables.
    pub fn table_len(&self) -> usize {
        self.n_tables * self.entries * self.dim
    }

    pub fn args(&self) -> Result<GatherArgs, LaunchError> {
        within("number of outputs", self.rows.saturating_mul(self.dim), THREADS * MAX_ROWS)?;
        within("tables' values", self.n_tables.saturating_mul(self.entries).saturating_mul(self.dim), MAX_ROWS)?;
        let (rows, dim) = (within("rows", self.rows, MAX_ROWS)?, within("dim", self.dim, MAX_ROWS)?);
        let (n_tables, entries) = (self.n_tables as i32, self.entries as i32);
        let rows_per_part = self.rows_per_part() as i32;
        Ok(GatherArgs { rows, dim, n_tables, entries, rows_per_part, ..GatherArgs::default() })
    }

    /// x, table, codes -> y.
    pub fn forward(&self) -> Launch {
        simple("training_gather_forward".to_string(), (self.rows * self.dim).div_ceil(THREADS))
    }

    /// codes, d_y -> d_table_parts, `[parts, tables' values]`.
    pub fn backward(&self) -> Launch {
        Launch {
            kernel: "training_gather_backward".to_string(),
            grid: [self.blocks() as u32, self.parts() as u32, 1],
            threads: GATHER_COLUMNS as u32,
            shared_bytes: (size_of::<f32>() * GATHER_COLUMNS * self.entries.min(GATHER_ENTRIES)) as u32,
            cluster: 0,
        }
    }

    /// d_table_parts -> d_table.
    pub fn sum_parts(&self) -> (Launch, ColumnSumsArgs) {
        sum_of(self.parts(), self.table_len())
    }
}

/// `n` values added to as many others.
pub fn add(n: usize, element: Element) -> Result<(Launch, AddArgs), LaunchError> {
    within("number of values", n.div_ceil(THREADS), MAX_ROWS)?;
    let args = AddArgs { n: n as i64, ..AddArgs::default() };
    Ok((simple(format!("training_add_{}", element.name()), n.div_ceil(THREADS)), args))
}

/// One step of the optimizer on `n` weights.
pub fn adamw(n: usize) -> Result<(Launch, AdamwArgs), LaunchError> {
    let args = AdamwArgs { n: within("number of weights", n, MAX_ROWS)?, ..AdamwArgs::default() };
    Ok((simple("training_adamw".to_string(), n.div_ceil(THREADS)), args))
}
