//! Ranks that are threads of one process, for tests of what groups do; and those tests.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::Group;

/// What all ranks handed in, by rank.
type Deposits = Arc<Vec<Vec<u8>>>;

struct Threads {
    rank: usize,
    meeting: Arc<Meeting>,
}

struct Meeting {
    table: Mutex<Table>,
    changed: Condvar,
}

struct Table {
    /// What was handed in so far, by rank.
    deposits: Vec<Option<Vec<u8>>>,
    /// What all handed in the last time, and how often that was.
    last: Deposits,
    rounds: usize,
    /// Some rank has left; no more rounds will be complete.
    left: bool,
}

/// Runs one closure as every rank of a group, each on its own thread; gives the results by rank.
pub(super) fn together<R: Send>(size: usize, run: impl Fn(&dyn Group) -> R + Sync) -> Vec<R> {
    let table = Table { deposits: vec![None; size], last: Deposits::default(), rounds: 0, left: false };
    let meeting = Arc::new(Meeting { table: Mutex::new(table), changed: Condvar::new() });
    std::thread::scope(|scope| {
        let run = &run;
        let ranks: Vec<_> = (0..size)
            .map(|rank| Threads { rank, meeting: Arc::clone(&meeting) })
            .map(|group| scope.spawn(move || run(&group)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

impl Threads {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.meeting.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Hands something in and waits for what all ranks hand in.
    fn exchange(&self, bytes: Vec<u8>) -> Deposits {
        let mut table = self.table();
        table.deposits[self.rank] = Some(bytes);
        if table.deposits.iter().all(Option::is_some) {
            table.last = Arc::new(table.deposits.iter_mut().filter_map(Option::take).collect());
            table.rounds += 1;
            self.meeting.changed.notify_all();
        } else {
            let round = table.rounds;
            let waiting = |table: &mut Table| table.rounds == round && !table.left;
            table = self.meeting.changed.wait_while(table, waiting).unwrap();
            assert!(table.rounds > round, "rank {} waits for one that has left", self.rank);
        }
        Arc::clone(&table.last)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.table().left = true;
        self.meeting.changed.notify_all();
    }
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.table().deposits.len()
    }

    fn sum_f32(&self, values: &mut [f32]) {
        let all = self.exchange(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        values.fill(0.0);
        for deposit in all.iter() {
            let terms = deposit.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            values.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        }
    }

    fn sum_f64(&self, values: &mut [f64]) {
        let all = self.exchange(values.iter().flat_map(|v| v.to_le_bytes()).collect());
        values.fill(0.0);
        for deposit in all.iter() {
            let terms = deposit.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()));
            values.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        }
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let all = self.exchange(std::mem::take(bytes));
        bytes.clone_from(&all[0]);
    }

    fn abort(&self, code: i32) -> ! {
        panic!("rank {} aborts with code {code}", self.rank)
    }
}

mod tests {
    use std::collections::BTreeMap;
    use std::ops::ControlFlow;
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use candle_core::{Device, Tensor, Var};

    use super::super::{Alone, Group};
    use super::together;
    use crate::checkpoint::{Checkpoint, Precision};
    use crate::model::config::ModelConfig;
    use crate::model::ops::Inner;
    use crate::rng::Rng;
    use crate::train::optimizer::AdamW;
    use crate::train::resume::{AUDIO, StateFolder};
    use crate::train::schedule::{Budget, Schedule};
    use crate::train::{Part, Start, TrainError, TrainEvent, TrainSettings, train_in};

    #[test]
    fn gradients_of_all_ranks_make_the_step_of_their_mean() {
        let goals = [[1.0f32, 0.0], [0.0, 3.0], [-2.0, 1.0], [0.5, 0.5]];
        let teach = |group: &dyn Group| {
            let x = Var::from_tensor(&Tensor::new(&[0.2f32, 0.1], &Device::Cpu).unwrap()).unwrap();
            let mut optimizer = AdamW::new([("x".to_owned(), x.clone())].into()).unwrap();
            let mut norms = Vec::new();
            for _ in 0..3 {
                // Of four items three ranks get two, one and one, and six ranks some none.
                for item in group.mine(0..goals.len()) {
                    let goal = Tensor::new(&goals[item], &Device::Cpu).unwrap();
                    let loss = (x.as_tensor() - &goal).unwrap().sqr().unwrap().sum_all().unwrap();
                    optimizer.add(&loss.backward().unwrap(), 1).unwrap();
                }
                optimizer.all_sum(group).unwrap();
                norms.push(optimizer.step(0.1, true).unwrap() as f32);
            }
            (norms, x.as_tensor().to_vec1::<f32>().unwrap())
        };
        let (norms, weights) = teach(&Alone);
        for size in [2, 3, 6] {
            let ranks = together(size, teach);
            assert!(ranks.iter().all(|rank| *rank == ranks[0]), "the ranks of {size} differ: {ranks:?}");
            let pairs = norms.iter().chain(&weights).zip(ranks[0].0.iter().chain(&ranks[0].1));
            pairs.for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{size} ranks: {ranks:?}, one: {weights:?}"));
        }
    }

    fn write_melody(path: &Path, seed: u64) {
        let spec = hound::WavSpec {
            channels: 1,
            sample_rate: 16_000,
            bits_per_sample: 16,
            sample_format: hound::SampleFormat::Int,
        };
        let mut writer = hound::WavWriter::create(path, spec).unwrap();
        let (mut rng, mut phase, mut hz) = (Rng::new(seed), 0.0f32, 300.0);
        for i in 0..3 * 16_000 {
            if i % 4000 == 0 {
                hz = 200.0 + 400.0 * rng.uniform();
            }
            phase = (phase + hz / 16_000.0).fract();
            let sample = 0.2 * (std::f32::consts::TAU * phase).sin() + 0.01 * rng.normal();
            writer.write_sample((sample * 32767.0) as i16).unwrap();
        }
        writer.finalize().unwrap();
    }

    /// Three files, and settings for a few steps on them.
    fn settings(folder: &Path, output: &str, steps: usize) -> TrainSettings {
        let files: Vec<PathBuf> = (0..3).map(|i| folder.join(format!("{i}.wav"))).collect();
        files.iter().zip(0..).filter(|(path, _)| !path.exists()).for_each(|(path, i)| write_melody(path, i));
        let mut config = ModelConfig::preset("tiny").unwrap();
        config.plan_transformer.refine = true;
        TrainSettings {
            start: Start::New(config.into()),
            parts: vec![Part::Plan, Part::Wave],
            files,
            output: folder.join(output),
            afresh: false,
            precision: Precision::F32,
            budget: Budget::Steps(steps),
            seed: 1,
            device: Device::Cpu,
            inner: Inner::F32,
            threads: 1,
            plan_batch: 3,
            wave_batch: 3,
            plan_learning_rate: 1e-3,
            wave_learning_rate: 2e-3,
            schedule: Schedule::default(),
            validation_share: 0.3,
            speed_variation: 0.0,
            plan_noise_db: 0.0,
            validate_every: Some(2),
            save_every: Duration::ZERO,
            patience: None,
            calibrate: false,
            pictures: true,
            most_pieces: None,
            notes: BTreeMap::new(),
        }
    }

    /// The bits of every step and validation that a rank was told.
    type Told = Vec<(&'static str, Part, usize, f64)>;

    /// Trains as one rank; `stop` says after which steps.
    fn trained(
        group: &dyn Group,
        settings: &TrainSettings,
        stop: impl Fn(Part, usize) -> bool,
    ) -> Result<(Told, Checkpoint), TrainError> {
        let mut told = Vec::new();
        let checkpoint = train_in(group, settings, &mut |event| {
            match event {
                TrainEvent::Step { part, step, bits, .. } => {
                    told.push(("step", part, step, bits));
                    if stop(part, step) {
                        return ControlFlow::Break(());
                    }
                }
                TrainEvent::Validation { part, step, bits, .. } => told.push(("validation", part, step, bits)),
                _ => {}
            }
            ControlFlow::Continue(())
        })?;
        Ok((told, checkpoint))
    }

    fn assert_told_alike(a: &Told, b: &Told) {
        assert_eq!(a.len(), b.len(), "{a:?} {b:?}");
        for (a, b) in a.iter().zip(b) {
            assert!((a.0, a.1, a.2) == (b.0, b.1, b.2) && (a.3 - b.3).abs() < 1e-4 * a.3, "{a:?} {b:?}");
        }
    }

    #[test]
    fn two_ranks_have_the_losses_of_one_process() {
        let folder = tempfile::tempdir().unwrap();
        let (told, alone) = trained(&Alone, &settings(folder.path(), "one.safetensors", 4), |_, _| false).unwrap();
        let two = settings(folder.path(), "two.safetensors", 4);
        let ranks = together(2, |group| trained(group, &two, |_, _| false).unwrap());
        assert_eq!(told.len(), 2 * (4 + 2));
        assert_told_alike(&ranks[0].0, &told);
        assert_eq!(ranks[0].0, ranks[1].0);
        assert_eq!(ranks[0].1.weights, ranks[1].1.weights);
        for (name, weights) in &alone.weights {
            let far =
                (&*weights.floats() - &*ranks[0].1.weights[name].floats()).fold(0.0f32, |far, d| far.max(d.abs()));
            // AdamW moves a weight by its learning rate, however small its gradient: a sum's rounding may turn its sign.
            assert!(far < 1e-3, "{name} differs by {far}");
        }
        assert_eq!(Checkpoint::load(&two.output).unwrap().weights, ranks[0].1.weights);
    }

    #[test]
    fn an_interrupted_group_is_taken_up_by_a_group_of_another_size() {
        let folder = tempfile::tempdir().unwrap();
        let (told, _) = trained(&Alone, &settings(folder.path(), "one.safetensors", 4), |_, _| false).unwrap();
        let two = settings(folder.path(), "two.safetensors", 4);
        let mut heard = Told::new();
        // Any rank may end it, and then all do.
        let ranks = together(2, |group| {
            let stop = |part, step| group.rank() == 1 && (part, step) == (Part::Wave, 2);
            trained(group, &two, stop).unwrap().0
        });
        assert_eq!(ranks[0], ranks[1]);
        heard.extend(&ranks[0]);
        assert!(StateFolder::beside(&two.output).exists());
        let ranks = together(3, |group| trained(group, &two, |_, _| false).unwrap().0);
        assert_eq!(ranks[0], ranks[2]);
        heard.extend(&ranks[0]);
        assert_told_alike(&heard, &told);
        assert!(!StateFolder::beside(&two.output).exists());
    }

    #[test]
    fn the_clock_of_the_first_rank_ends_a_part_on_all_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let budget = Budget::Time(Duration::from_millis(300));
        let timed = TrainSettings { budget, ..settings(folder.path(), "timed.safetensors", 0) };
        // A rank that went on alone would panic, for the other has left.
        let ranks = together(2, |group| {
            trained(group, &timed, |_, _| {
                std::thread::sleep(Duration::from_millis(40 * group.rank() as u64));
                false
            })
            .unwrap()
            .0
        });
        assert_eq!(ranks[0], ranks[1]);
    }

    #[test]
    fn a_rank_with_other_data_or_options_is_refused_by_the_name_of_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let base = settings(folder.path(), "model.safetensors", 2);
        let errors = together(2, |group| {
            let mut own = base.clone();
            own.files.truncate(3 - group.rank());
            own.wave_batch += group.rank();
            own.patience = Some(1 + group.rank());
            trained(group, &own, |_, _| false).err().map(|error| error.to_string())
        });
        for error in errors {
            let error = error.unwrap();
            assert!(error.contains("data, patience, wave batch"), "{error}");
        }
        // The first rank had read its files, and no run was begun.
        let left = std::fs::read_dir(StateFolder::beside(&base.output)).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(left.collect::<Vec<_>>(), [StateFolder::beside(&base.output).join(AUDIO)]);
    }

    #[test]
    fn plain_files_are_decoded_by_the_first_rank_alone_and_its_interrupt_meanwhile_ends_all_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path(), "model.safetensors", 2);
        let read = |group: &dyn Group, stop: bool| {
            let mut decoded = 0;
            let trained = train_in(group, &settings, &mut |event| {
                decoded += usize::from(matches!(event, TrainEvent::Reading { .. }));
                let stops = stop || matches!(event, TrainEvent::Step { .. });
                if stops { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            (decoded, trained.map(drop))
        };
        // Both observers would break, but only the first rank reads.
        let ranks = together(2, |group| read(group, true));
        assert!(ranks.iter().all(|(_, ended)| matches!(ended, Err(TrainError::Interrupted))), "{ranks:?}");
        assert_eq!(ranks.iter().map(|(decoded, _)| *decoded).collect::<Vec<_>>(), [1, 0]);
        let ranks = together(3, |group| read(group, false));
        assert!(ranks.iter().all(|(_, ended)| ended.is_ok()), "{ranks:?}");
        assert_eq!(ranks.iter().map(|(decoded, _)| *decoded).collect::<Vec<_>>(), [2, 0, 0]);
    }
}
