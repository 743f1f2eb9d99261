//! The plan transformer: a causal language model over plan frames; the tokens of a frame come one after the other.

use candle_core::{D, DType, Device, Result, Tensor};

use super::block::{Block, KvCache, Linear, RmsNorm};
use super::config::{ModelConfig, PlanTransformerConfig};
use super::params::{Init, Params, ParamsError};

/// Input: the sum of a frame's token embeddings and a map of its decoded bands. Output: logits per codebook.
pub struct PlanTransformer {
    embeddings: Vec<Tensor>, // per codebook (n_entries, dim)
    bands: Linear,           // n_bands -> dim
    blocks: Vec<Block>,
    norm: RmsNorm,
    given: Vec<Tensor>, // per codebook but the last (n_entries, dim)
    heads: Vec<(Linear, Linear)>,
}

impl PlanTransformer {
    pub fn new(params: &mut Params, config: &ModelConfig, n_bands: usize) -> std::result::Result<Self, ParamsError> {
        let PlanTransformerConfig { dim, n_layers, n_heads, window, hidden_multiple, .. } = config.plan_transformer;
        let (n_codebooks, n_entries) = (config.plan.n_codebooks, config.plan.n_entries);
        let table = |params: &mut Params, name: &str| params.get(name, &[n_entries, dim], Init::Normal(1.0));
        let biased = |params: &mut Params, name: &str, inputs, outputs| {
            Linear::with_bias(params, name, inputs, outputs, Init::Linear, Init::Zeros)
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
        })
    }

    /// Tokens `[batch, frames, n_codebooks]` (u32) and centred decoded bands `[batch, frames, n_bands]` -> `[batch,
    /// frames, dim]`.
    fn embed(&self, tokens: &Tensor, bands: &Tensor) -> Result<Tensor> {
        let (batch, frames, _) = tokens.dims3()?;
        let mut sum = self.bands.forward(bands)?;
        for (q, table) in self.embeddings.iter().enumerate() {
            let codes = tokens.narrow(2, q, 1)?.flatten_all()?;
            sum = (sum + (table.index_select(&codes, 0)?.reshape((batch, frames, ()))? * 0.5)?)?;
        }
        Ok(sum)
    }

    /// Hidden states after each frame, ready for [`PlanTransformer::logits`]. `dropout` multiplies the input.
    pub fn forward(&self, tokens: &Tensor, bands: &Tensor, dropout: Option<&Tensor>) -> Result<Tensor> {
        let mut x = self.embed(tokens, bands)?;
        if let Some(mask) = dropout {
            x = (x * mask)?;
        }
        for block in &self.blocks {
            x = block.forward(&x, None)?;
        }
        self.norm.forward(&x)
    }

    /// Logits of codebook `q` of the next frame, `[..., n_entries]`, from hidden states `[..., dim]` and that frame's
    /// tokens of the codebooks before `q`, each `[...]` (u32).
    pub fn logits(&self, hidden: &Tensor, given: &[Tensor], q: usize) -> Result<Tensor> {
        let mut h = hidden.clone();
        for (table, codes) in self.given.iter().zip(given).take(q) {
            h = (h + table.index_select(&codes.flatten_all()?, 0)?.reshape(hidden.shape())?)?;
        }
        let (first, second) = &self.heads[q];
        second.forward(&first.forward(&h)?.silu()?)
    }

    /// -ln P of frames 1.. given those before, `[batch, frames - 1]`, in nats per frame.
    pub fn nll(&self, tokens: &Tensor, bands: &Tensor, dropout: Option<&Tensor>) -> Result<Tensor> {
        let (batch, frames, n_codebooks) = tokens.dims3()?;
        let hidden = self.forward(
            &tokens.narrow(1, 0, frames - 1)?.contiguous()?,
            &bands.narrow(1, 0, frames - 1)?.contiguous()?,
            dropout,
        )?;
        let targets: Vec<Tensor> = (0..n_codebooks)
            .map(|q| tokens.narrow(1, 1, frames - 1)?.narrow(2, q, 1)?.squeeze(2)?.contiguous())
            .collect::<Result<_>>()?;
        let mut total = Tensor::zeros((batch, frames - 1), DType::F32, &Device::Cpu)?;
        for q in 0..n_codebooks {
            let logits = self.logits(&hidden, &targets, q)?;
            let log_prob = (logits.gather(&targets[q].unsqueeze(D::Minus1)?, D::Minus1)?.squeeze(D::Minus1)?
                - logits.log_sum_exp(D::Minus1)?)?;
            total = (total - log_prob)?;
        }
        Ok(total)
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
