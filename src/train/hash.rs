//! Turns contents into 64 bits that tell them apart (FNV-1a); for noticing changes, not for security.

/// Fowler, Noll and Vo's FNV-1a over words of any width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hash(u64);

impl Hash {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Takes in words, one multiplication each.
    pub(crate) fn words(self, words: impl IntoIterator<Item = u64>) -> Self {
        Self(words.into_iter().fold(self.0, |hash, word| (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3)))
    }

    pub(crate) fn bytes(self, bytes: &[u8]) -> Self {
        self.words(bytes.iter().map(|&byte| byte.into()))
    }

    pub(crate) fn value(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::Hash;

    #[test]
    fn hashes_are_the_published_ones() {
        assert_eq!(Hash::new().value(), 0xcbf2_9ce4_8422_2325);
        assert_eq!(Hash::new().bytes(b"foobar").value(), 0x8594_4171_f739_67e8);
    }
}
