//! Turns the argument structs of kernels/args.cuh into the bytes of device memory.

use super::{MAX_TIERS, N_REGIONS};

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

mirrored!(
    /// Arguments of `decode_persistent_*`; the pointers come first.
    DecodeArgs, 344, {
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
        who: u64,
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
        capacity: i32,
        reserved: i32,
    }
);
words!(u64);

/// Pointers that [`DecodeArgs`] begins with.
pub const N_POINTERS: usize = 22;

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
            who,
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
            who,
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
