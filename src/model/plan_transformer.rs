//! The plan transformer: a causal language model over plan frames; the tokens of a frame come one after the other.

use candle_core::{D, Device, Result, Tensor};

use super::block::{Block, KvCache, Linear, RmsNorm};
use super::config::{ModelConfig, PlanTransformerConfig};
use super::ops::Ops;
use super::params::{Init, Params, ParamsError};

/// Name of the map that is fitted after training, which no gradient reaches.
pub const REFINE: &str = "refine";

/// Whether the tensor `name` (such as `plan.refine.weight`) is fitted and not trained.
pub fn is_fitted(name: &str) -> bool {
    name.split('.').nth(1) == Some(REFINE)
}

/// Input: the sum of a frame's token embeddings and a map of its decoded bands. Output: logits per codebook.
pub struct PlanTransformer {
    embeddings: Vec<Tensor>, // per codebook (n_entries, dim)
    bands: Linear,           // n_bands -> dim
    blocks: Vec<Block>,
    norm: RmsNorm,
    given: Vec<Tensor>, // per codebook but the last (n_entries, dim)
    heads: Vec<(Linear, Linear)>,
    refine: Option<Linear>, // n_bands + dim -> n_bands
    n_entries: usize,
    ops: &'static Ops,
}

impl PlanTransformer {
    pub fn new(params: &mut Params, config: &ModelConfig, n_bands: usize) -> std::result::Result<Self, ParamsError> {
        let PlanTransformerConfig { dim, n_layers, n_heads, window, hidden_multiple, .. } = config.plan_transformer;
        let (n_codebooks, n_entries) = (config.plan.n_codebooks, config.plan.n_entries);
        let table = |params: &mut Params, name: &str| params.get(name, &[n_entries, dim], Init::Normal(1.0));
        let biased = |params: &mut Params, name: &str, inputs, outputs| {
            Linear::new(params, name, inputs, outputs, Init::Linear, Init::Zeros)
        };
        Ok(Self {
            embeddings: (0..n_codebooks)
                .map(|q| params.under(q, |p| table(p, "embedding")))
                .collect::<std::result::Result<_, _>>()?,
            bands: biased(params, "bands", n_bands, dim)?,
            blocks: (0..n_layers)
                .map(|i| {
                    params.under("blocks", |p| p.under(i, |p| Block::new(p, dim, n_heads, window, hidden_multiple)))
                })
                .collect::<std::result::Result<_, _>>()?,
            norm: RmsNorm::new(params, "norm", dim)?,
            given: (1..n_codebooks)
                .map(|q| params.under(q - 1, |p| table(p, "given")))
                .collect::<std::result::Result<_, _>>()?,
            heads: (0..n_codebooks)
                .map(|q| {
                    params.under(q, |p| Ok((biased(p, "head_in", dim, dim)?, biased(p, "head_out", dim, n_entries)?)))
                })
                .collect::<std::result::Result<_, ParamsError>>()?,
            refine: match config.plan_transformer.refine {
                true => Some(Linear::new(params, REFINE, n_bands + dim, n_bands, Init::Zeros, Init::Zeros)?),
                false => None,
            },
            n_entries,
            ops: params.ops(),
        })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.norm.gain.device()
    }

    /// Tokens `[batch, frames, n_codebooks]` (u32, on the CPU) and centred decoded bands `[batch, frames, n_bands]` -> `[batch,
    /// frames, dim]`.
    fn embed(&self, tokens: &Tensor, bands: &Tensor) -> Result<Tensor> {
        let table = (Tensor::cat(&self.embeddings, 0)? * 0.5)?;
        let codes = self.rows(&tokens.flatten_all()?.to_vec1::<u32>()?, self.embeddings.len());
        (self.ops.gather_add)(&self.bands.forward(bands)?, &table, &codes)
    }

    /// Tokens of `n` codebooks side by side -> rows of these codebooks' tables, one after the other.
    fn rows(&self, tokens: &[u32], n: usize) -> Vec<u32> {
        tokens.iter().enumerate().map(|(i, token)| (i % n * self.n_entries) as u32 + token).collect()
    }

    /// Hidden states after each frame, ready for [`PlanTransformer::logits`]. `dropout` multiplies the input.
    pub fn forward(&self, tokens: &Tensor, bands: &Tensor, dropout: Option<&Tensor>) -> Result<Tensor> {
        let mut x = self.embed(tokens, bands)?;
        if let Some(mask) = dropout {
            x = (x * mask)?;
        }
        self.norm.forward(&Block::forward_all(&self.blocks, &x)?)
    }

    /// Whether frames are taken for more than their decoded bands once they have been read.
    pub fn refines(&self) -> bool {
        self.refine.is_some()
    }

    /// Adds what frames are taken for beyond their centred decoded bands `[.., n_bands]`, given the hidden states after them `[..,
    /// dim]`, to as many `bands`.
    pub fn add_refinement<'a>(
        &self,
        centred: &Tensor,
        hidden: &Tensor,
        bands: impl IntoIterator<Item = &'a mut f32>,
    ) -> Result<()> {
        let Some(refine) = &self.refine else { return Ok(()) };
        let more = refine.forward(&Tensor::cat(&[centred, hidden], D::Minus1)?)?.flatten_all()?.to_vec1::<f32>()?;
        bands.into_iter().zip(more).for_each(|(band, more)| *band += more);
        Ok(())
    }

    /// Refines the bands of a whole plan; tokens and centred bands as for [`PlanTransformer::forward`], on the CPU.
    pub fn refine<'a>(
        &self,
        tokens: &Tensor,
        centred: &Tensor,
        bands: impl IntoIterator<Item = &'a mut f32>,
    ) -> Result<()> {
        if !self.refines() {
            return Ok(());
        }
        self.add_refinement(centred, &self.forward(tokens, centred, None)?, bands)
    }

    /// Logits of codebook `q` of the next frame, `[..., n_entries]`, from hidden states `[..., dim]` and that frame's
    /// tokens of the codebooks before `q`, `[rows, q]`.
    pub fn logits(&self, hidden: &Tensor, given: &[u32], q: usize) -> Result<Tensor> {
        let (first, second) = &self.heads[q];
        if q == 0 {
            return second.forward(&first.forward_silu(hidden)?);
        }
        let table = Tensor::cat(&self.given[..q], 0)?;
        let h = (self.ops.gather_add)(hidden, &table, &self.rows(given, q))?;
        second.forward(&first.forward_silu(&h)?)
    }

    /// -ln P of frames 1.. given those before, `[batch, frames - 1]`, in nats per frame.
    pub fn nll(&self, tokens: &Tensor, bands: &Tensor, dropout: Option<&Tensor>) -> Result<Tensor> {
        self.nll_after(tokens, bands, tokens, dropout)
    }

    /// The same of `tokens` after other frames than those before them: `heard`, and its `bands`, in their places.
    pub fn nll_after(
        &self,
        heard: &Tensor,
        bands: &Tensor,
        tokens: &Tensor,
        dropout: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (batch, frames, n_codebooks) = tokens.dims3()?;
        let hidden = self.forward(
            &heard.narrow(1, 0, frames - 1)?.contiguous()?,
            &bands.narrow(1, 0, frames - 1)?.contiguous()?,
            dropout,
        )?;
        let next = tokens.narrow(1, 1, frames - 1)?.flatten_all()?.to_vec1::<u32>()?;
        let losses = (0..n_codebooks)
            .map(|q| {
                let given: Vec<u32> = next.chunks_exact(n_codebooks).flat_map(|frame| &frame[..q]).copied().collect();
                let targets: Vec<u32> = next.iter().skip(q).step_by(n_codebooks).copied().collect();
                (self.ops.cross_entropy)(&self.logits(&hidden, &given, q)?, &targets)
            })
            .collect::<Result<Vec<_>>>()?;
        Tensor::stack(&losses, 0)?.sum(0)?.reshape((batch, frames - 1))
    }

    /// One frame: tokens `[1, 1, n_codebooks]`, bands `[1, 1, n_bands]` -> hidden state `[1, 1, dim]`.
    pub fn step(&self, tokens: &Tensor, bands: &Tensor, caches: &mut [KvCache], pos: u64) -> Result<Tensor> {
        let mut x = self.embed(tokens, bands)?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            x = block.step(&x, cache, pos)?;
        }
        self.norm.forward(&x)
    }

    /// A whole context `[1, frames, ...]` at once; leaves the caches as as many steps would and returns the last
    /// hidden state `[1, 1, dim]`.
    pub fn prefill(&self, tokens: &Tensor, bands: &Tensor, caches: &mut [KvCache]) -> Result<Tensor> {
        let mut x = self.embed(tokens, bands)?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            x = block.forward(&x, Some(cache))?;
        }
        let last = x.dim(1)? - 1;
        self.norm.forward(&x.narrow(1, last, 1)?)
    }

    pub fn empty_caches(&self) -> Result<Vec<KvCache>> {
        self.blocks.iter().map(Block::empty_cache).collect()
    }
}
