//! What stands between the strings and the file: a small room, a noise floor, the level.
use crate::random::Random;

const N_LINES: usize = 8;
/// Lengths of the delay lines in a room of size 1, in seconds: no small common factors.
const DELAYS_S: [f64; N_LINES] = [0.0113, 0.0137, 0.0159, 0.0187, 0.0213, 0.0251, 0.0279, 0.0313];

/// A small room.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Room {
    /// Factor on the delays.
    pub size: f64,
    /// Time in which the reverberation falls by 60 dB, in seconds.
    pub decay_s: f64,
    /// Level of the reverberation against the direct sound, for low tones (high ones are absorbed).
    pub wet_db: f64,
}

impl Room {
    /// Adds the room's answer: a feedback delay network (Jot and Chaigne, AES 1991) with a Householder matrix.
    pub fn add_to(&self, samples: &mut [f32], sample_rate: u32) {
        let rate = f64::from(sample_rate);
        let lengths = DELAYS_S.map(|delay_s| ((delay_s * self.size * rate).round() as usize).max(1));
        let gains = lengths.map(|n| 10f64.powf(-3.0 * n as f64 / rate / self.decay_s) as f32);
        // Walls swallow the treble: one pole per line, 3 dB down at 3 kHz.
        let pole = (-std::f64::consts::TAU * 3000.0 / rate).exp() as f32;
        let loop_power = gains.iter().map(|gain| f64::from(*gain).powi(2)).sum::<f64>() / N_LINES as f64;
        let wet = (10f64.powf(self.wet_db / 20.0) * (1.0 - loop_power).max(1e-6).sqrt()) as f32;
        let mut lines = lengths.map(|n| vec![0.0f32; n]);
        let mut at = [0usize; N_LINES];
        let mut smooth = [0.0f32; N_LINES];
        for sample in samples {
            let mut out = [0.0f32; N_LINES];
            for i in 0..N_LINES {
                smooth[i] = gains[i] * (1.0 - pole) * lines[i][at[i]] + pole * smooth[i];
                out[i] = smooth[i];
            }
            let mean = out.iter().sum::<f32>() * (2.0 / N_LINES as f32);
            let answer: f32 = out.iter().enumerate().map(|(i, x)| if i % 2 == 0 { *x } else { -x }).sum();
            for i in 0..N_LINES {
                lines[i][at[i]] = out[i] - mean + *sample / (N_LINES as f32).sqrt();
                at[i] = if at[i] + 1 == lengths[i] { 0 } else { at[i] + 1 };
            }
            *sample += wet * answer;
        }
    }
}

/// Adds steady noise of this level (root mean square, dB of full scale), darker than white, as a quiet room sounds.
pub fn add_noise(samples: &mut [f32], level_db: f64, random: &mut Random) {
    const POLE: f64 = 0.6;
    // The jitter's variance is 1/6; the pole divides it by 1 - POLE^2.
    let gain = 10f64.powf(level_db / 20.0) * (6.0 * (1.0 - POLE * POLE)).sqrt();
    let mut smooth = 0.0;
    for sample in samples {
        smooth = gain * random.jitter() + POLE * smooth;
        *sample += smooth as f32;
    }
}

/// Scales to a peak of `peak_db` below full scale; silence stays silence.
pub fn normalise_peak(samples: &mut [f32], peak_db: f64) {
    let peak = samples.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
    if peak > 0.0 {
        let gain = 10f32.powf(peak_db as f32 / 20.0) / peak;
        samples.iter_mut().for_each(|x| *x *= gain);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn power_db(samples: &[f32]) -> f64 {
        10.0 * (samples.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / samples.len() as f64).log10()
    }

    #[test]
    fn the_room_decays_as_told_and_keeps_its_level() {
        let room = Room { size: 1.0, decay_s: 0.5, wet_db: -12.0 };
        let mut answer = vec![0.0f32; 16_000];
        answer[0] = 1.0;
        room.add_to(&mut answer, 16_000);
        let energy_db = 10.0 * answer[1..].iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().log10();
        assert!((-22.0..-11.0).contains(&energy_db), "{energy_db}");
        let fall_db = power_db(&answer[1600..3200]) - power_db(&answer[4800..6400]);
        assert!((20.0..60.0).contains(&fall_db), "60 dB in 0.5 s or sooner: {fall_db} dB in 0.2 s");
    }

    #[test]
    fn noise_has_the_level_asked_for() {
        let mut samples = vec![0.0f32; 100_000];
        add_noise(&mut samples, -60.0, &mut Random::new(1, "noise"));
        assert!((power_db(&samples) + 60.0).abs() < 0.3, "{}", power_db(&samples));
    }

    #[test]
    fn peaks_come_to_the_level_and_silence_stays() {
        let mut samples = vec![0.1, -0.2];
        normalise_peak(&mut samples, -6.0206);
        assert!((samples[1] + 0.5).abs() < 1e-4);
        let mut silence = vec![0.0; 3];
        normalise_peak(&mut silence, -3.0);
        assert_eq!(silence, [0.0; 3]);
    }
}
