//! Which matrices may be rounded to whole numbers of 8 bits, a scale per output: what the CPU engine computes with and a
//! checkpoint can store.
//!
//! These are the maps inside and between blocks, of embedded tokens, and those that end in logits of plan tokens. The head and the
//! maps of features and plan frames stay as they are: they are small, and what they say is heard at once.

/// Last part of the names of maps that are rounded; so is `shortcut.1`.
const ROUNDED: [&str; 7] = ["input", "qkv", "out", "up", "down", "head_in", "head_out"];

/// Whether the tensor `name` (such as `plan.blocks.0.qkv.weight`) may be rounded.
pub fn is_rounded(name: &str) -> bool {
    let Some(map) = name.strip_suffix(".weight") else { return false };
    map.ends_with(".shortcut.1") || map.rsplit('.').next().is_some_and(|last| ROUNDED.contains(&last))
}

/// The gain that multiplies the inputs of the matrix `name` and can as well multiply its rows; always done before rounding.
pub fn gain_of(name: &str) -> Option<String> {
    let (parent, map) = name.strip_suffix(".weight")?.rsplit_once('.')?;
    let norm = match map {
        "qkv" => "attention_norm",
        "up" => "feed_forward_norm",
        "head" => "norm",
        _ => return None,
    };
    Some(format!("{parent}.{norm}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::model::config::ModelConfig;

    #[test]
    fn most_weights_of_a_model_are_rounded_and_every_gain_is_there() {
        let model = Checkpoint::untrained(ModelConfig::preset("small").unwrap(), 1).unwrap();
        let rounded = model.weights.iter().filter(|(name, _)| is_rounded(name));
        let n: usize = rounded.clone().map(|(_, matrix)| matrix.n_weights()).sum();
        assert!(n > 3 * model.n_weights("") / 4, "{n} of {}", model.n_weights(""));
        assert!(rounded.clone().all(|(_, matrix)| matrix.shape().len() == 2));
        let gains: Vec<String> = model.weights.keys().filter_map(|name| gain_of(name)).collect();
        assert!(gains.iter().all(|gain| model.weights.contains_key(gain)), "{gains:?}");
        assert!(!is_rounded("wave.head.weight") && gain_of("wave.head.weight").as_deref() == Some("wave.norm"));
    }
}
