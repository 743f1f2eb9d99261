//! Once a stream plays, neither a sample nor a plan frame allocates, nor does a sound card's callback.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use wavegen::checkpoint::Checkpoint;
use wavegen::engine::cpu::{CpuEngine, CpuOptions, Precision};
use wavegen::engine::{Engine, UNIFORMS_PER_SAMPLE};
use wavegen::forecast::ForecastConfig;
use wavegen::live::ring::ring;
use wavegen::model::config::ModelConfig;
use wavegen::plan::PlanFrame;
use wavegen::simd::Isa;

struct Counting;

thread_local! {
    /// Of this thread: tests run beside each other.
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_callback_never_allocates_be_there_sound_or_not() {
    let (mut feed, mut pull) = ring(1000, 2, 48_000);
    let mut out = [0.0; 2 * 128];
    let before = COUNT.get();
    for i in 0..100 {
        if i % 3 == 0 {
            feed.push(&[0.5; 2 * 200]);
        }
        pull.fill(&mut out);
    }
    feed.end();
    pull.fill(&mut out);
    assert_eq!(COUNT.get() - before, 0);
    assert!(feed.counters().underruns() > 3, "both ways are counted");
}

#[test]
fn neither_samples_nor_plan_frames_allocate() {
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.forecast = ForecastConfig { deconvolution: 2, tones: true, past_window: 2048, ..config.forecast };
    let checkpoint = Checkpoint::untrained(config, 1).unwrap();
    for precision in [Precision::Int8, Precision::F32] {
        for isa in Isa::available() {
            let mut engine = CpuEngine::new(&checkpoint, &CpuOptions { isa, precision }).unwrap();
            engine.prefill(&[130; 3000]).unwrap();
            let draws = vec![0.4; UNIFORMS_PER_SAMPLE * 512];
            let (mut plan, mut out) = (PlanFrame::default(), vec![0; 512]);
            let mut frame = |engine: &mut CpuEngine| {
                engine.next_plan(&[0.5, 0.6], &mut plan).unwrap();
                engine.render(&plan, &draws, &mut out).unwrap();
            };
            // The first frame finds the sizes of the buffers.
            frame(&mut engine);
            let before = COUNT.get();
            (0..3).for_each(|_| frame(&mut engine));
            assert_eq!(COUNT.get() - before, 0, "{precision:?} on {isa:?}");
        }
    }
}
