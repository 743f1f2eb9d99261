//! A stack of transformer blocks as one operation, for training.
//!
//! candle begins the gradient of every intermediate tensor with zeros and adds to them. In a stack each has one reader, but for the
//! residual stream, so here they are handed from one operation to the one before it, and added to where there are two.
//!
//! An operation of candle has three inputs at most. The weights' gradients therefore leave by another way: the stack's second input
//! is a chain of operations, each on two weights and the one before it, which compute nothing and whose backward passes hand out
//! what the stack's has left for them.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, InplaceOp2, Layout, Result, Shape, Storage,
    Tensor, bail,
};

use super::attention::Attention;
use super::linear::AddLinear;
use super::norm::NormLinear;
use super::swiglu::AddSwigluLinear;
use super::values;
use crate::simd::wide_loop;

/// What has been computed, in no graph yet.
pub(crate) struct Fresh {
    pub storage: Storage,
    pub shape: Shape,
}

impl Fresh {
    fn tensor(self) -> Tensor {
        Tensor::from_storage(self.storage, self.shape, BackpropOp::none(), false)
    }
}

/// Gradients of an operation's inputs by that of its result.
pub(crate) type Backward<const N: usize> = Box<dyn Fn(&Tensor) -> Result<[Tensor; N]> + Send + Sync>;

/// A result, and its way back.
pub(crate) type Step<const N: usize> = (Fresh, Backward<N>);

/// The operations of a block step by step; each as in [`super::Ops`], on tensors without a graph.
pub struct Steps {
    pub(crate) project: fn([&Tensor; 3]) -> Result<Step<3>>,
    pub(crate) attention: fn(&Tensor, usize, usize) -> Result<Step<1>>,
    pub(crate) add_linear: fn([&Tensor; 3]) -> Result<Step<3>>,
    pub(crate) add_swiglu_linear: fn([&Tensor; 3]) -> Result<Step<3>>,
    /// The sum of two tensors, in place of the first, which nobody else has.
    pub(crate) add: fn(Tensor, &Tensor) -> Result<Tensor>,
}

/// The weights of a block, `[attention gain, qkv, out, feed-forward gain, up, down]`.
pub struct Layer<'a> {
    pub weights: [&'a Tensor; 6],
    pub n_heads: usize,
    pub window: usize,
}

/// x `[batch, len, dim]` through all layers -> same.
pub fn stack(steps: &'static Steps, x: &Tensor, layers: &[Layer]) -> Result<Tensor> {
    let mut result = None;
    let mut ways_back = Vec::with_capacity(layers.len());
    for layer in layers {
        let input = result.take().map_or_else(|| x.detach().contiguous(), |fresh: Fresh| Ok(fresh.tensor()))?;
        let (fresh, back) = block(steps, &input, layer)?;
        result = Some(fresh);
        ways_back.push(back);
    }
    let Some(result) = result else { return Ok(x.clone()) };
    let gradients = Arc::new(Mutex::new(Vec::new()));
    let weights: Vec<&Tensor> = layers.iter().flat_map(|layer| layer.weights).collect();
    let mut chain = Tensor::zeros(1, DType::F32, x.device())?;
    for (i, pair) in weights.chunks_exact(2).enumerate() {
        let link = Link { first: 2 * i, gradients: gradients.clone() };
        chain = pair[0].apply_op3(pair[1], &chain, link)?;
    }
    x.apply_op2(&chain, Stack { result: Mutex::new(Some(result)), ways_back, gradients })
}

/// Gradients of a block's input and of its weights.
type BlockBackward = Box<dyn Fn(&Tensor) -> Result<(Tensor, [Tensor; 6])> + Send + Sync>;

fn block(steps: &'static Steps, x: &Tensor, layer: &Layer) -> Result<(Fresh, BlockBackward)> {
    let [attention_gain, qkv, out, feed_forward_gain, up, down] = layer.weights.map(Tensor::detach);
    let (qkv, of_qkv) = (steps.project)([x, &attention_gain, &qkv])?;
    let (attended, of_attended) = (steps.attention)(&qkv.tensor(), layer.n_heads, layer.window)?;
    let (middle, of_middle) = (steps.add_linear)([x, &attended.tensor(), &out])?;
    let middle = middle.tensor();
    let (up, of_up) = (steps.project)([&middle, &feed_forward_gain, &up])?;
    let (y, of_y) = (steps.add_swiglu_linear)([&middle, &up.tensor(), &down])?;
    let back = move |d: &Tensor| {
        let [d, d_up, d_down] = of_y(d)?;
        let [d_middle, d_feed_forward_gain, d_up] = of_up(&d_up)?;
        let d_middle = (steps.add)(d_middle, &d)?;
        let [d, d_attended, d_out] = of_middle(&d_middle)?;
        let [d_qkv] = of_attended(&d_attended)?;
        let [d_x, d_attention_gain, d_qkv] = of_qkv(&d_qkv)?;
        Ok(((steps.add)(d_x, &d)?, [d_attention_gain, d_qkv, d_out, d_feed_forward_gain, d_up, d_down]))
    };
    Ok((y, Box::new(back)))
}

struct Stack {
    result: Mutex<Option<Fresh>>,
    ways_back: Vec<BlockBackward>,
    gradients: Arc<Mutex<Vec<Option<Tensor>>>>,
}

impl Stack {
    fn take(&self) -> Result<Fresh> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        result.map_or_else(|| bail!("a stack's result is taken once"), Ok)
    }
}

impl CustomOp2 for Stack {
    fn name(&self) -> &'static str {
        "stack"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Fresh { storage: Storage::Cpu(storage), shape } => Ok((storage, shape)),
            Fresh { shape, .. } => bail!("a stack's result {shape:?} is not on the CPU"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Fresh { storage: Storage::Cuda(storage), shape } => Ok((storage, shape)),
            Fresh { shape, .. } => bail!("a stack's result {shape:?} is not on the GPU"),
        }
    }

    fn bwd(&self, _: &Tensor, chain: &Tensor, _: &Tensor, d: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut d = d.contiguous()?;
        let mut gradients = Vec::with_capacity(6 * self.ways_back.len());
        for back in self.ways_back.iter().rev() {
            let (d_x, of_weights) = back(&d)?;
            d = d_x;
            gradients.extend(of_weights.into_iter().rev().map(Some));
        }
        gradients.reverse();
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = gradients;
        Ok((Some(d), Some(chain.zeros_like()?)))
    }
}

/// Hands out the gradients of two weights once the stack has left them.
struct Link {
    first: usize,
    gradients: Arc<Mutex<Vec<Option<Tensor>>>>,
}

impl CustomOp3 for Link {
    fn name(&self) -> &'static str {
        "stack_weights"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        before: &CpuStorage,
        layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((before.try_clone(layout)?, layout.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        before: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((before.try_clone(layout)?, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        let mut take = |i: usize| gradients.get_mut(i).and_then(Option::take);
        Ok((take(self.first), take(self.first + 1), Some(d.clone())))
    }
}

/// On the CPU.
pub(super) static STEPS: Steps = Steps {
    project: |inputs| of_three(NormLinear, inputs),
    attention: |qkv, n_heads, window| of_one(Attention { n_heads, window }, qkv),
    add_linear: |inputs| of_three(AddLinear { d_x: true }, inputs),
    add_swiglu_linear: |inputs| of_three(AddSwigluLinear, inputs),
    add: |sum, x| {
        sum.inplace_op2(x, &Add)?;
        Ok(sum)
    },
};

fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("a step on the CPU is given a tensor that is elsewhere"),
    }
}

/// An operation whose gradients do not want its result.
fn of_one<O: CustomOp1 + Send + Sync + 'static>(op: O, x: &Tensor) -> Result<Step<1>> {
    let x = x.contiguous()?;
    let (storage, shape) = {
        let (storage, layout) = x.storage_and_layout();
        op.cpu_fwd(cpu(&storage)?, layout)?
    };
    let back = move |d: &Tensor| match op.bwd(&x, d, d)? {
        Some(d_x) => Ok([d_x]),
        None => bail!("{}: no gradient", op.name()),
    };
    Ok((Fresh { storage: Storage::Cpu(storage), shape }, Box::new(back)))
}

/// Likewise.
fn of_three<O: CustomOp3 + Send + Sync + 'static>(op: O, inputs: [&Tensor; 3]) -> Result<Step<3>> {
    let [a, b, c] = [inputs[0].contiguous()?, inputs[1].contiguous()?, inputs[2].contiguous()?];
    let (storage, shape) = {
        let ((a, la), (b, lb), (c, lc)) = (a.storage_and_layout(), b.storage_and_layout(), c.storage_and_layout());
        op.cpu_fwd(cpu(&a)?, la, cpu(&b)?, lb, cpu(&c)?, lc)?
    };
    let back = move |d: &Tensor| match op.bwd(&a, &b, &c, d, d)? {
        (Some(d_a), Some(d_b), Some(d_c)) => Ok([d_a, d_b, d_c]),
        _ => bail!("{}: a gradient is missing", op.name()),
    };
    Ok((Fresh { storage: Storage::Cpu(storage), shape }, Box::new(back)))
}

wide_loop! {
    /// `sum += x`
    fn add(sum: &'a mut [f32], x: &'a [f32]) {
        sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
    }
}

struct Add;

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, ls: &Layout, x: &CpuStorage, lx: &Layout) -> Result<()> {
        let (CpuStorage::F32(sum), Some((0, n))) = (sum, ls.contiguous_offsets()) else {
            bail!("a new f32 tensor expected")
        };
        let x = values(x, lx)?;
        if x.len() != n || sum.len() != n {
            bail!("{:?} added to {:?}", lx.shape(), ls.shape());
        }
        add(sum, x);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use crate::model::block::Block;
    use crate::model::params::Params;
    use crate::rng::Rng;

    #[test]
    fn a_stacks_gradients_are_the_bits_of_its_operations_one_by_one() {
        let (dim, n_heads, window, batch, len) = (16, 2, 7, 2, 40);
        let mut params = Params::new(3);
        let blocks: Vec<Block> =
            (0..3).map(|i| params.under(i, |params| Block::new(params, dim, n_heads, window, 3)).unwrap()).collect();
        let vars = params.into_vars();
        let mut rng = Rng::new(4);
        let mut random = || {
            let values: Vec<f32> = (0..batch * len * dim).map(|_| rng.normal()).collect();
            Tensor::from_vec(values, (batch, len, dim), &Device::Cpu).unwrap()
        };
        let (input, other) = (Var::from_tensor(&random()).unwrap(), random());
        let bits = |y: &Tensor| {
            let gradients = (y * &other).unwrap().sum_all().unwrap().backward().unwrap();
            let of = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let all = vars.values().chain([&input]).map(|var| of(gradients.get(var).unwrap()));
            all.chain([of(y)]).map(|values| values.into_iter().map(f32::to_bits).collect()).collect::<Vec<Vec<u32>>>()
        };
        let x = (input.as_tensor() * 2.0).unwrap();
        let expected = bits(&blocks.iter().fold(x.clone(), |x, block| block.forward(&x, None).unwrap()));
        assert!(expected.iter().all(|values| values.iter().any(|&bits| bits != 0)));
        assert!(bits(&Block::forward_all(&blocks, &x).unwrap()) == expected);
    }
}
