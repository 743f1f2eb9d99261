//! Turns plan frames into a few tokens each and back: a residual vector quantiser, learned by k-means.

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::{DB_PER_UNIT, MAX_ENTRIES, PlanConfig, PlanError, neighbourhoods};
use crate::rng::Rng;
use crate::simd::Kernels;
use crate::simd::panels::PanelsF32;

/// Frames that codebooks are fitted to at most; of more, a random choice.
const MAX_FIT_FRAMES: usize = 60_000;

/// A frame is the mean plus one entry of each codebook, each the nearest to what the ones before it left over.
#[derive(Clone, Debug, PartialEq)]
pub struct ResidualQuantizer {
    /// Mean frame, `[n_bands]`.
    pub mean: Array1<f32>,
    /// Entries, `[n_codebooks, n_entries, n_bands]`.
    pub books: Array3<f32>,
    /// The same to be searched.
    entries: Vec<Entries>,
    /// What a band decodes to at most, `[n_bands]`.
    ceiling: Array1<f32>,
    /// What a frame may lose by each token that it keeps of the frame before ([`PlanConfig::hysteresis`](super::PlanConfig)).
    hysteresis: f32,
    /// What must not rise for that, in plan units: infinite where it may ([`PlanConfig::attack_db`](super::PlanConfig)).
    attack: f32,
}

/// A band decodes to at most the loudest that the first codebook holds for it and this much, in plan units (4 dB): drawn
/// one after the other, entries of the later codebooks would add up to what no frame ever was.
const HEADROOM: f32 = 4.0 / super::DB_PER_UNIT;

impl ResidualQuantizer {
    /// A quantiser as read from a checkpoint: mean `[n_bands]`, books `[n_codebooks, n_entries, n_bands]`.
    ///
    /// # Errors
    /// When the shapes do not go together, or a book is empty or has more entries than a u16 can name.
    pub fn new(mean: Array1<f32>, books: Array3<f32>) -> Result<Self, PlanError> {
        let (n_codebooks, n_entries, n_bands) = books.dim();
        if n_bands == 0 || n_bands != mean.len() {
            return Err(PlanError::BookShape { n_bands: mean.len(), got: books.shape().to_vec() });
        }
        if n_codebooks == 0 || n_entries == 0 || n_entries > MAX_ENTRIES {
            return Err(PlanError::Codebooks { n_codebooks, n_entries });
        }
        let entries = books.outer_iter().map(Entries::new).collect();
        let loudest = books.index_axis(Axis(0), 0).fold_axis(Axis(0), f32::NEG_INFINITY, |top, &x| top.max(x));
        let ceiling = &mean + &loudest + HEADROOM;
        Ok(Self { mean, books, entries, ceiling, hysteresis: 0.0, attack: f32::INFINITY })
    }

    /// These codebooks, whose tokens stay where they are by as much as a plan says, and as long.
    pub fn with_hysteresis(self, &PlanConfig { hysteresis, attack_db, .. }: &PlanConfig) -> Self {
        let attack = if attack_db > 0.0 { attack_db / DB_PER_UNIT } else { f32::INFINITY };
        Self { hysteresis, attack, ..self }
    }

    /// Learns codebooks from frames `[n_frames, n_bands]`: k-means with `rounds` rounds on what the codebooks
    /// before left over. At most 60,000 frames are used, chosen at random; frames that are not finite are left
    /// out. The result is a function of the arguments, whatever the number of threads.
    ///
    /// # Errors
    /// When there is no finite frame, or no codebook or entry is asked for.
    pub fn fit(
        frames: ArrayView2<f32>,
        n_codebooks: usize,
        n_entries: usize,
        rounds: usize,
        seed: u64,
    ) -> Result<Self, PlanError> {
        let mut rng = Rng::new(seed);
        let frames = to_fit(frames, &mut rng);
        let mean = frames.mean_axis(Axis(0)).ok_or(PlanError::NoFrames)?;
        let first = Self::new(mean, Array3::zeros((n_codebooks, n_entries, frames.ncols())))?;
        first.fitted((0, 0), frames, rounds, rng)
    }

    /// These codebooks in other sizes, without anything new in them: more entries, which are the first once more, so that none
    /// is ever the nearest, and more codebooks after them, which add nothing.
    ///
    /// # Errors
    /// When there are more codebooks or entries than that.
    pub fn padded(&self, n_codebooks: usize, n_entries: usize) -> Result<Self, PlanError> {
        let (known, known_entries, n_bands) = self.books.dim();
        if n_codebooks < known || n_entries < known_entries {
            return Err(PlanError::Codebooks { n_codebooks, n_entries });
        }
        let mut books = Array3::zeros((n_codebooks, n_entries, n_bands));
        for (mut to, from) in books.outer_iter_mut().zip(self.books.outer_iter()) {
            to.assign(&from.row(0));
            to.slice_mut(s![..known_entries, ..]).assign(&from);
        }
        Self::new(self.mean.clone(), books)
    }

    /// These codebooks with more entries, and more codebooks after them: the new ones are [fitted](Self::fit) to what these leave of
    /// frames `[n_frames, n_bands]`. What there is stays, so tokens go on to mean what they meant.
    ///
    /// # Errors
    /// When the frames are of other bands or none is finite, or fewer codebooks or entries are asked for than there are.
    pub fn refined(
        &self,
        frames: ArrayView2<f32>,
        (n_codebooks, n_entries): (usize, usize),
        rounds: usize,
        seed: u64,
    ) -> Result<Self, PlanError> {
        if frames.ncols() != self.n_bands() {
            return Err(PlanError::BandCount { expected: self.n_bands(), got: frames.ncols() });
        }
        let mut rng = Rng::new(seed);
        let frames = to_fit(frames, &mut rng);
        if frames.is_empty() {
            return Err(PlanError::NoFrames);
        }
        let (known, known_entries, _) = self.books.dim();
        self.padded(n_codebooks, n_entries)?.fitted((known, known_entries), frames, rounds, rng)
    }

    /// For each codebook, of each entry after the first `n_entries` the nearest of these.
    pub fn parents(&self, n_entries: usize) -> impl Iterator<Item = Vec<usize>> {
        let books = self.books.outer_iter();
        books.map(move |book| {
            let (older, younger) = book.split_at(Axis(0), n_entries);
            Entries::new(older).nearest_to(younger)
        })
    }

    /// All but the first `known` codebooks' first `known_entries`, fitted to what those before them leave of `frames`.
    fn fitted(
        self,
        (known, known_entries): (usize, usize),
        frames: Array2<f32>,
        rounds: usize,
        mut rng: Rng,
    ) -> Result<Self, PlanError> {
        let Self { mean, mut books, .. } = self;
        let mut left = frames - &mean;
        for (q, mut book) in books.outer_iter_mut().enumerate() {
            let kept = if q < known { known_entries } else { 0 };
            k_means(left.view(), book.view_mut(), kept, rounds, &mut rng);
            let nearest = Entries::new(book.view()).nearest_to(left.view());
            take_away(&mut left, book.view(), &nearest);
        }
        Self::new(mean, books)
    }

    /// These codebooks for frames that are analysed otherwise: `was` and `is`, each `[n_frames, n_bands]`, are the same sound, and
    /// each entry becomes what those frames have in common that it was chosen for. So tokens go on to mean what they meant. An
    /// entry that was not chosen stays.
    ///
    /// # Errors
    /// When the frames are not the same in number, or of other bands.
    pub fn translated(&self, was: ArrayView2<f32>, is: ArrayView2<f32>) -> Result<Self, PlanError> {
        if is.nrows() != was.nrows() {
            return Err(PlanError::FrameCount { expected: was.nrows(), got: is.nrows() });
        }
        if is.ncols() != self.n_bands() {
            return Err(PlanError::BandCount { expected: self.n_bands(), got: is.ncols() });
        }
        let tokens = self.encode_all(was)?;
        let mut books = self.books.clone();
        let mut left = &is - &self.mean;
        for (mut book, tokens) in books.outer_iter_mut().zip(tokens.columns()) {
            let chosen: Vec<usize> = tokens.iter().map(|&token| token.into()).collect();
            move_to_means(book.view_mut(), 0, left.view(), &chosen);
            take_away(&mut left, book.view(), &chosen);
        }
        Self::new(self.mean.clone(), books)
    }

    /// Bands per frame.
    pub fn n_bands(&self) -> usize {
        self.mean.len()
    }

    /// What a band decodes to at most, `[n_bands]`.
    pub fn ceiling(&self) -> &Array1<f32> {
        &self.ceiling
    }

    /// The tokens of a frame, one per codebook.
    ///
    /// # Errors
    /// When `bands` is not `n_bands` long.
    pub fn encode(&self, bands: &[f32]) -> Result<Vec<u16>, PlanError> {
        Ok(self.encode_all(ArrayView1::from(bands).insert_axis(Axis(0)))?.into_iter().collect())
    }

    /// The tokens of a plan `[n_frames, n_bands]`, `[n_frames, n_codebooks]`, on all threads: those nearest to each frame, but for those that it
    /// keeps of the frame before.
    ///
    /// # Errors
    /// As `encode`.
    pub fn encode_all(&self, plan: ArrayView2<f32>) -> Result<Array2<u16>, PlanError> {
        self.encode_after(None, plan)
    }

    /// [`encode_all`](Self::encode_all) where `before`, the tokens of a frame and its bands as they were, comes before the first row.
    ///
    /// # Errors
    /// As `encode`, and when `before` is no frame of these codebooks.
    pub fn encode_after(
        &self,
        before: Option<(ArrayView1<u16>, ArrayView1<f32>)>,
        plan: ArrayView2<f32>,
    ) -> Result<Array2<u16>, PlanError> {
        let n_bands = before.map(|(_, bands)| bands.len()).into_iter().chain([plan.ncols()]);
        if let Some(got) = n_bands.into_iter().find(|n| *n != self.n_bands()) {
            return Err(PlanError::BandCount { expected: self.n_bands(), got });
        }
        let before = before.map(|(tokens, bands)| (tokens.to_vec(), bands));
        before.iter().try_for_each(|(tokens, _)| self.check(tokens))?;
        let mut left = &plan - &self.mean;
        let mut tokens = Array2::zeros((plan.nrows(), self.entries.len()));
        for ((book, entries), mut tokens) in self.books.outer_iter().zip(&self.entries).zip(tokens.columns_mut()) {
            let nearest = entries.nearest_to(left.view());
            tokens.iter_mut().zip(&nearest).for_each(|(token, &nearest)| *token = nearest as u16);
            take_away(&mut left, book, &nearest);
        }
        if self.hysteresis > 0.0 {
            self.keep(before, plan, left.view(), &mut tokens);
        }
        Ok(tokens)
    }

    /// Lets frames keep tokens of the one before: the first j for the largest j that leaves no more than `1 + hysteresis j` times the power
    /// `left` over by the nearest, if there is no attack.
    fn keep(
        &self,
        before: Option<(Vec<u16>, ArrayView1<f32>)>,
        plan: ArrayView2<f32>,
        left: ArrayView2<f32>,
        tokens: &mut Array2<u16>,
    ) {
        let power = |rest: &[f32]| rest.iter().map(|x| x * x).sum::<f32>();
        let mut before = before;
        for ((bands, left), mut tokens) in plan.outer_iter().zip(left.outer_iter()).zip(tokens.rows_mut()) {
            let before_it = before.take().filter(|(_, earlier)| !self.begins(*earlier, bands));
            let last = before_it.map(|(tokens, _)| tokens).unwrap_or_default();
            let (greedy, frame) = (left.pow2().sum(), (&bands - &self.mean).to_vec());
            let n_same = last.iter().zip(&tokens).take_while(|(last, token)| last == token).count();
            // What the first j tokens of the frame before leave over.
            let rests = last.iter().zip(self.books.outer_iter()).scan(frame, |rest, (&token, book)| {
                take_one(rest, book, token);
                Some(rest.clone())
            });
            let rests: Vec<_> = rests.collect();
            for (kept, mut rest) in rests.into_iter().enumerate().skip(n_same).rev() {
                let later = self.books.outer_iter().zip(&self.entries).skip(kept + 1).map(|(book, entries)| {
                    let token = entries.nearest(&rest)[0] as u16;
                    take_one(&mut rest, book, token);
                    token
                });
                let later: Vec<_> = later.collect();
                if power(&rest) <= greedy * (1.0 + self.hysteresis * (kept + 1) as f32) {
                    let kept = last.iter().take(kept + 1);
                    tokens.iter_mut().zip(kept.chain(&later)).for_each(|(token, &x)| *token = x);
                    break;
                }
            }
            before = Some((tokens.to_vec(), bands));
        }
    }

    /// Whether something begins between a frame and the next.
    fn begins(&self, bands: ArrayView1<f32>, next: ArrayView1<f32>) -> bool {
        self.attack.is_finite() && neighbourhoods(&(&next - &bands).to_vec()).any(|rise| rise >= self.attack)
    }

    /// Whether `tokens` are those of a frame.
    fn check(&self, tokens: &[u16]) -> Result<(), PlanError> {
        let (n_codebooks, n_entries, _) = self.books.dim();
        if tokens.len() != n_codebooks {
            return Err(PlanError::TokenCount { expected: n_codebooks, got: tokens.len() });
        }
        match tokens.iter().enumerate().find(|(_, token)| usize::from(**token) >= n_entries) {
            Some((codebook, &token)) => Err(PlanError::Token { token, codebook, n_entries }),
            None => Ok(()),
        }
    }

    /// The bands that a frame's tokens stand for, `[n_bands]`.
    ///
    /// # Errors
    /// When there is not one token per codebook, or a token has no entry.
    pub fn decode(&self, tokens: &[u16]) -> Result<Vec<f32>, PlanError> {
        let mut bands = Vec::new();
        self.decode_into(tokens, &mut bands)?;
        Ok(bands)
    }

    /// [`decode`](Self::decode) into a vector that is there already.
    ///
    /// # Errors
    /// As `decode`.
    pub fn decode_into(&self, tokens: &[u16], bands: &mut Vec<f32>) -> Result<(), PlanError> {
        self.check(tokens)?;
        bands.clear();
        bands.extend(&self.mean);
        for (&token, entries) in tokens.iter().zip(self.books.outer_iter()) {
            bands.iter_mut().zip(entries.row(token.into())).for_each(|(x, entry)| *x += entry);
        }
        bands.iter_mut().zip(&self.ceiling).for_each(|(x, &most)| *x = x.min(most));
        Ok(())
    }

    /// [`decode`](Self::decode) for each row of tokens `[n_frames, n_codebooks]`: a plan `[n_frames, n_bands]`.
    ///
    /// # Errors
    /// As `decode`.
    pub fn decode_all(&self, tokens: ArrayView2<u16>) -> Result<Array2<f32>, PlanError> {
        let mut plan = Array2::zeros((tokens.nrows(), self.n_bands()));
        for (mut bands, tokens) in plan.rows_mut().into_iter().zip(tokens.outer_iter()) {
            bands.assign(&Array1::from(self.decode(&tokens.to_vec())?));
        }
        Ok(plan)
    }
}

/// Of frames those that are finite, at most [`MAX_FIT_FRAMES`], chosen at random.
fn to_fit(frames: ArrayView2<f32>, rng: &mut Rng) -> Array2<f32> {
    let finite = (0..frames.nrows()).filter(|&i| frames.row(i).iter().all(|x| x.is_finite())).collect();
    frames.select(Axis(0), &choose(finite, MAX_FIT_FRAMES, rng))
}

/// Lloyd's algorithm from random frames; a centre that no frame is nearest to starts again at a random frame. The first `kept`
/// centres stay where they are, and the others begin at frames that are far from them (drawn by the squared distance; Arthur and Vassilvitskii, 2007).
fn k_means(frames: ArrayView2<f32>, mut centres: ArrayViewMut2<f32>, kept: usize, rounds: usize, rng: &mut Rng) {
    let n_new = centres.nrows() - kept;
    if n_new == 0 {
        return;
    }
    let mut first = match kept {
        0 => choose((0..frames.nrows()).collect(), n_new, rng),
        _ => draw_far(frames, centres.slice(s![..kept, ..]), n_new, rng),
    };
    first.extend((first.len()..n_new).map(|_| rng.below(frames.nrows())));
    centres.slice_mut(s![kept.., ..]).assign(&frames.select(Axis(0), &first));
    for _ in 0..rounds {
        let nearest = Entries::new(centres.view()).nearest_to(frames);
        for alone in move_to_means(centres.view_mut(), kept, frames, &nearest) {
            centres.row_mut(alone).assign(&frames.row(rng.below(frames.nrows())));
        }
    }
}

/// `n` frames, each drawn by its squared distance from the nearest centre.
fn draw_far(frames: ArrayView2<f32>, centres: ArrayView2<f32>, n: usize, rng: &mut Rng) -> Vec<usize> {
    let mut left = frames.to_owned();
    take_away(&mut left, centres, &Entries::new(centres).nearest_to(frames));
    let sums: Vec<f64> = left
        .outer_iter()
        .scan(0.0, |sum, left| {
            *sum += f64::from(left.dot(&left));
            Some(*sum)
        })
        .collect();
    let draw = |_| {
        let place = f64::from(rng.uniform()) * sums.last().copied().unwrap_or(0.0);
        sums.partition_point(|sum| *sum <= place).min(frames.nrows() - 1)
    };
    (0..n).map(draw).collect()
}

/// Moves each centre but the first `kept` to the mean of its frames, `of` saying whose each frame is; gives those that have none, which
/// stay.
fn move_to_means(mut centres: ArrayViewMut2<f32>, kept: usize, frames: ArrayView2<f32>, of: &[usize]) -> Vec<usize> {
    let mut sums = Array2::<f64>::zeros(centres.raw_dim());
    let mut counts = vec![0usize; centres.nrows()];
    for (frame, &centre) in frames.outer_iter().zip(of) {
        sums.row_mut(centre).zip_mut_with(&frame, |sum, &x| *sum += f64::from(x));
        counts[centre] += 1;
    }
    for ((mut centre, sum), &count) in centres.rows_mut().into_iter().zip(sums.outer_iter()).zip(&counts).skip(kept) {
        if count > 0 {
            centre.zip_mut_with(&sum, |x, sum| *x = (sum / count as f64) as f32);
        }
    }
    (kept..counts.len()).filter(|&centre| counts[centre] == 0).collect()
}

/// What is left of frames without their centres.
fn take_away(frames: &mut Array2<f32>, centres: ArrayView2<f32>, of: &[usize]) {
    for (mut frame, &centre) in frames.rows_mut().into_iter().zip(of) {
        frame -= &centres.row(centre);
    }
}

/// What is left of a frame without the entry `token` of a codebook.
fn take_one(frame: &mut [f32], book: ArrayView2<f32>, token: u16) {
    frame.iter_mut().zip(book.row(token.into())).for_each(|(x, entry)| *x -= entry);
}

/// Frames that are compared with a codebook at a time.
const ROWS: usize = 64;

/// A codebook laid out to be compared with many frames at once.
#[derive(Clone, Debug, PartialEq)]
struct Entries {
    /// `[n_bands, n_entries]`
    weights: PanelsF32,
    /// `|entry|^2 / 2`
    half_powers: Vec<f32>,
}

impl Entries {
    /// From entries `[n_entries, n_bands]`.
    fn new(entries: ArrayView2<f32>) -> Self {
        let weights: Vec<f32> = entries.t().iter().copied().collect();
        let half_power = |entry: ArrayView1<f32>| 0.5 * entry.iter().map(|x| x * x).sum::<f32>();
        Self {
            weights: PanelsF32::pack(&weights, entries.nrows()),
            half_powers: entries.outer_iter().map(half_power).collect(),
        }
    }

    /// For each frame `[n_frames, n_bands]` the entry nearest to it, by `|entry|^2 / 2 - x . entry`; of equals the first. In parallel,
    /// each frame on its own.
    fn nearest_to(&self, frames: ArrayView2<f32>) -> Vec<usize> {
        let frames: Vec<f32> = frames.iter().copied().collect();
        let some = frames.par_chunks(ROWS * self.weights.n_in);
        some.flat_map_iter(|frames| self.nearest(frames)).collect()
    }

    /// The same for few frames, flat, on this thread.
    fn nearest(&self, frames: &[f32]) -> Vec<usize> {
        let n = frames.len() / self.weights.n_in;
        let mut dots = vec![0.0; n * self.half_powers.len()];
        (Kernels::chosen().gemm_f32)(&self.weights, frames, &vec![1.0; n], &mut dots);
        let nearest = |dots: &[f32]| {
            let distances = self.half_powers.iter().zip(dots).map(|(half_power, dot)| half_power - dot);
            distances.enumerate().fold((0, f32::INFINITY), |best, x| if x.1 < best.1 { x } else { best }).0
        };
        dots.chunks_exact(self.half_powers.len()).map(nearest).collect()
    }
}

/// `n` of the indices (or all there are), chosen at random, in random order.
fn choose(mut indices: Vec<usize>, n: usize, rng: &mut Rng) -> Vec<usize> {
    let n = n.min(indices.len());
    for i in 0..n {
        let other = i + rng.below(indices.len() - i);
        indices.swap(i, other);
    }
    indices.truncate(n);
    indices
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames around a few centres, `[n, 24]`.
    fn frames(n: usize, seed: u64) -> Array2<f32> {
        let mut rng = Rng::new(seed);
        let centres = Array2::from_shape_fn((9, 24), |_| 2.0 * rng.normal());
        Array2::from_shape_fn((n, 24), |(i, band)| centres[[i % 9, band]] + 0.5 * rng.normal())
    }

    fn rms_error(quantizer: &ResidualQuantizer, plan: &Array2<f32>) -> f32 {
        let heard = quantizer.decode_all(quantizer.encode_all(plan.view()).unwrap().view()).unwrap();
        (heard - plan).mapv(|x| x * x).mean().unwrap().sqrt()
    }

    #[test]
    fn tokens_mean_the_same_for_frames_that_are_analysed_otherwise() {
        let was = frames(3000, 3);
        let old = ResidualQuantizer::fit(was.view(), 2, 32, 12, 5).unwrap();
        let is = was.mapv(|x| 0.8 * x + 0.3);
        let new = old.translated(was.view(), is.view()).unwrap();
        assert_eq!(new.mean, old.mean);
        let tokens = old.encode_all(was.view()).unwrap();
        let now = new.encode_all(is.view()).unwrap();
        let same = now.column(0).iter().zip(tokens.column(0)).filter(|(a, b)| a == b).count();
        assert!(same > 2950, "{same} of 3000 frames have the first token that they had");
        let [before, after] = [&old, &new].map(|q| rms_error(q, &is));
        assert!(after < 0.7 * before && after < rms_error(&old, &was), "{before} to {after}");
        let unmoved = old.translated(was.view(), was.view()).unwrap();
        assert!(rms_error(&unmoved, &was) <= rms_error(&old, &was));
        let fewer = old.translated(was.view(), frames(3, 1).view());
        assert_eq!(fewer, Err(PlanError::FrameCount { expected: 3000, got: 3 }));
    }

    #[test]
    fn each_codebook_brings_the_frames_nearer() {
        let plan = frames(2000, 1);
        let errors: Vec<f32> =
            (1..=4).map(|n| rms_error(&ResidualQuantizer::fit(plan.view(), n, 16, 12, 5).unwrap(), &plan)).collect();
        assert!(errors.windows(2).all(|pair| pair[1] < 0.97 * pair[0]), "{errors:?}");
        assert!(errors[0] < 0.6, "{errors:?}");
    }

    #[test]
    fn more_codebooks_bring_frames_nearer_and_leave_the_first_tokens_alone() {
        let plan = frames(2000, 6);
        let coarse = ResidualQuantizer::fit(plan.view(), 2, 16, 12, 5).unwrap();
        let fine = coarse.refined(plan.view(), (4, 16), 12, 7).unwrap();
        assert_eq!(fine.books.slice(s![..2, .., ..]), coarse.books);
        let [first, all] = [&coarse, &fine].map(|q| q.encode_all(plan.view()).unwrap());
        assert_eq!(all.slice(s![.., ..2]), first);
        let [before, after] = [&coarse, &fine].map(|q| rms_error(q, &plan));
        assert!(after < 0.93 * before, "{before} to {after}");
        assert!(matches!(
            coarse.refined(plan.view(), (1, 16), 12, 7),
            Err(PlanError::Codebooks { n_codebooks: 1, .. })
        ));
        let other = coarse.refined(plan.slice(s![.., ..20]), (3, 16), 12, 7);
        assert_eq!(other, Err(PlanError::BandCount { expected: 24, got: 20 }));
        let not_finite = Array2::from_elem((5, 24), f32::NAN);
        assert_eq!(coarse.refined(not_finite.view(), (3, 16), 12, 7), Err(PlanError::NoFrames));
    }

    #[test]
    fn more_entries_bring_other_frames_nearer_and_leave_the_ones_there_are() {
        let (known, other) = (frames(2000, 6), frames(600, 8));
        let old = ResidualQuantizer::fit(known.view(), 3, 16, 12, 5).unwrap();
        let both = ndarray::concatenate![Axis(0), known, other];
        let new = old.refined(both.view(), (3, 24), 12, 7).unwrap();
        assert_eq!(new.books.slice(s![.., ..16, ..]), old.books);
        let [before, after] = [&old, &new].map(|q| [rms_error(q, &known), rms_error(q, &other)]);
        assert!(after[0] < 1.02 * before[0] && after[1] < 0.7 * before[1], "{before:?} to {after:?}");
        let padded = old.padded(3, 24).unwrap();
        assert_eq!(padded.encode_all(both.view()).unwrap(), old.encode_all(both.view()).unwrap());
        assert!(matches!(old.refined(both.view(), (3, 8), 12, 7), Err(PlanError::Codebooks { n_entries: 8, .. })));
    }

    #[test]
    fn no_choice_of_tokens_is_louder_than_the_first_codebook_and_its_headroom() {
        let plan = frames(2000, 4);
        let quantizer = ResidualQuantizer::fit(plan.view(), 4, 16, 12, 5).unwrap();
        let loudest = plan.fold_axis(Axis(0), f32::NEG_INFINITY, |top, &x| top.max(x));
        let mut rng = Rng::new(6);
        for _ in 0..500 {
            let tokens: Vec<u16> = (0..4).map(|_| rng.below(16) as u16).collect();
            for (band, (x, most)) in quantizer.decode(&tokens).unwrap().iter().zip(&loudest).enumerate() {
                assert!(*x <= most + HEADROOM, "{tokens:?}, band {band}: {x} where the frames reach {most}");
            }
        }
    }

    #[test]
    fn the_fit_is_the_same_on_any_number_of_threads() {
        let plan = frames(1500, 2);
        let fit_on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| ResidualQuantizer::fit(plan.view(), 2, 32, 6, 9).unwrap())
        };
        let one = fit_on(1);
        assert_eq!(one, fit_on(3));
        assert_ne!(one, ResidualQuantizer::fit(plan.view(), 2, 32, 6, 10).unwrap());
    }

    #[test]
    fn frames_fewer_than_entries_are_kept_exactly() {
        let plan = frames(10, 3);
        let quantizer = ResidualQuantizer::fit(plan.view(), 1, 64, 12, 0).unwrap();
        assert!(rms_error(&quantizer, &plan) < 1e-6);
    }

    #[test]
    fn tokens_name_the_nearest_entries_and_one_frame_is_coded_like_many() {
        let plan = frames(300, 4);
        let quantizer = ResidualQuantizer::fit(plan.view(), 3, 16, 4, 0).unwrap();
        let tokens = quantizer.encode_all(plan.view()).unwrap();
        for (bands, tokens) in plan.outer_iter().zip(tokens.outer_iter()) {
            assert_eq!(quantizer.encode(&bands.to_vec()).unwrap(), tokens.to_vec());
            let mut left = &bands - &quantizer.mean;
            for (book, &token) in quantizer.books.outer_iter().zip(tokens) {
                let distance = |entry: ArrayView1<f32>| (&left - &entry).mapv(|x| x * x).sum();
                let least = book.outer_iter().map(distance).fold(f32::INFINITY, f32::min);
                assert!(distance(book.row(token.into())) <= least + 1e-4);
                left -= &book.row(token.into());
            }
        }
    }

    /// By the definition: candidates that keep ever fewer of the last tokens, until one is good enough.
    fn encode_by_definition(quantizer: &ResidualQuantizer, config: &PlanConfig, plan: &Array2<f32>) -> Array2<u16> {
        let n = quantizer.books.dim().0;
        let mut tokens = Array2::<u16>::zeros((plan.nrows(), n));
        for t in 0..plan.nrows() {
            let with_kept = |kept: usize| {
                let mut rest: Vec<f64> =
                    plan.row(t).iter().zip(&quantizer.mean).map(|(&x, &m)| (x - m).into()).collect();
                let mut chosen = Vec::new();
                for (q, book) in quantizer.books.outer_iter().enumerate() {
                    let power = |i: usize| -> f64 {
                        rest.iter().zip(book.row(i)).map(|(x, &entry)| (x - f64::from(entry)).powi(2)).sum()
                    };
                    let nearest = || (0..book.nrows()).min_by(|&a, &b| power(a).total_cmp(&power(b))).unwrap();
                    let token = if q < kept { tokens[[t - 1, q]].into() } else { nearest() };
                    rest.iter_mut().zip(book.row(token)).for_each(|(x, &entry)| *x -= f64::from(entry));
                    chosen.push(token as u16);
                }
                (chosen, rest.iter().map(|x| x * x).sum::<f64>())
            };
            let rise = |band: usize| {
                let around = band.saturating_sub(8)..(band + 9).min(plan.ncols());
                (plan.slice(s![t, around.clone()]).mean().unwrap() - plan.slice(s![t - 1, around]).mean().unwrap())
                    * DB_PER_UNIT
            };
            let (nearest, least) = with_kept(0);
            let enough = |&(kept, _, power): &(usize, Vec<u16>, f64)| {
                power <= least * (1.0 + f64::from(config.hysteresis) * kept as f64)
            };
            let begins = || config.attack_db > 0.0 && (0..plan.ncols()).any(|band| rise(band) >= config.attack_db);
            let most = if t > 0 && !begins() { n } else { 0 };
            let candidates = (1..=most).rev().map(|kept| (kept, with_kept(kept)));
            let kept = candidates.map(|(kept, (tokens, power))| (kept, tokens, power)).find(enough);
            let chosen = kept.map_or(nearest, |(_, tokens, _)| tokens);
            tokens.row_mut(t).assign(&Array1::from(chosen));
        }
        tokens
    }

    #[test]
    fn tokens_with_hysteresis_are_those_of_the_definition_and_change_less() {
        // Sound that hardly changes for some frames, then does.
        let (steps, mut rng) = (frames(40, 9), Rng::new(10));
        let plan = Array2::from_shape_fn((320, 24), |(t, band)| steps[[t / 8, band]] + 0.15 * rng.normal());
        let greedy = ResidualQuantizer::fit(plan.view(), 4, 16, 6, 0).unwrap();
        let changes =
            |tokens: &Array2<u16>| tokens.axis_windows(Axis(0), 2).into_iter().filter(|w| w.row(0) != w.row(1)).count();
        let mut before = changes(&greedy.encode_all(plan.view()).unwrap());
        for (hysteresis, attack_db) in [(0.05, 0.0), (0.3, 0.0), (1.0, 0.0), (1.0, 2.0), (1.0, 1.0)] {
            let config = PlanConfig { hysteresis, attack_db, ..PlanConfig::default() };
            let quantizer = greedy.clone().with_hysteresis(&config);
            let tokens = quantizer.encode_all(plan.view()).unwrap();
            assert_eq!(tokens, encode_by_definition(&quantizer, &config, &plan), "{config:?}");
            let now = changes(&tokens);
            let as_said = if attack_db > 0.0 { now > before } else { now < before };
            assert!(as_said, "{now} and {before} of 319 frames change, {config:?}");
            before = now;
            let (first, rest) = plan.view().split_at(Axis(0), 96);
            let mut parts = quantizer.encode_all(first).unwrap();
            let last = parts.outer_iter().last().zip(first.outer_iter().last());
            let rest = quantizer.encode_after(last, rest).unwrap();
            parts.append(Axis(0), rest.view()).unwrap();
            assert_eq!(parts, tokens, "{config:?}");
            let other = Array1::from(vec![0, 0, 16, 0]);
            let refused = quantizer.encode_after(Some((other.view(), plan.row(0))), plan.view());
            assert_eq!(refused, Err(PlanError::Token { token: 16, codebook: 2, n_entries: 16 }));
            let refused = quantizer.encode_after(Some((tokens.row(0), plan.slice(s![0, 1..]))), plan.view());
            assert_eq!(refused, Err(PlanError::BandCount { expected: 24, got: 23 }));
        }
        let plain = greedy.clone().with_hysteresis(&PlanConfig::default());
        assert_eq!(plain.encode_all(plan.view()), greedy.encode_all(plan.view()));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_values() {
        let plan = frames(50, 5);
        let quantizer = ResidualQuantizer::fit(plan.view(), 2, 8, 1, 0).unwrap();
        assert_eq!(quantizer.encode(&[0.0; 23]), Err(PlanError::BandCount { expected: 24, got: 23 }));
        assert_eq!(quantizer.decode(&[0]), Err(PlanError::TokenCount { expected: 2, got: 1 }));
        assert_eq!(quantizer.decode(&[7, 8]), Err(PlanError::Token { token: 8, codebook: 1, n_entries: 8 }));
        let shapes = ResidualQuantizer::new(Array1::zeros(4), Array3::zeros((2, 8, 5)));
        assert!(matches!(shapes, Err(PlanError::BookShape { n_bands: 4, .. })));
        let not_finite = Array2::from_elem((5, 24), f32::NAN);
        assert_eq!(ResidualQuantizer::fit(not_finite.view(), 2, 8, 1, 0), Err(PlanError::NoFrames));
        assert!(ResidualQuantizer::fit(plan.view(), 0, 8, 1, 0).is_err());
        assert!(ResidualQuantizer::fit(plan.view(), 2, 0, 1, 0).is_err());
    }
}
