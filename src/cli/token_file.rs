//! Turns tokens into a safetensors file and back.
//!
//! One tensor `tokens`, U16 [n], and metadata: `format` = "wavegen-tokens", `version` = "1", `codec` (JSON: sample rate
//! and quantizer), `gain` (factor from the recording's level to the tokens').

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use wavegen::checkpoint::safetensors_in_order;
use wavegen::codec::{Codec, Token};

const FORMAT: &str = "wavegen-tokens";
const VERSION: &str = "1";

/// A token file's content.
pub struct TokenFile {
    pub codec: Codec,
    /// Factor from the recording's level to the tokens'.
    pub gain: f32,
    pub tokens: Vec<Token>,
}

impl TokenFile {
    /// The file's bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let data: Vec<u8> = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::U16, vec![self.tokens.len()], &data)?;
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("version".to_owned(), VERSION.to_owned()),
            ("codec".to_owned(), serde_json::to_string(&self.codec)?),
            ("gain".to_owned(), self.gain.to_string()),
        ]);
        Ok(safetensors_in_order([("tokens", view)], metadata)?)
    }

    /// Reads a file's bytes; `path` is what messages call them.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        Self::parse(bytes)
            .with_context(|| format!("{}: not a token file; token files are made by wavegen tokenize", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| metadata.get(name).ok_or_else(|| anyhow!("its metadata has no {name}"));
        if field("format")? != FORMAT {
            bail!("its format is '{}'", field("format")?);
        }
        if field("version")? != VERSION {
            bail!("its version is {}, expected {VERSION}", field("version")?);
        }
        let codec: Codec = serde_json::from_str(field("codec")?).context("its codec")?;
        let gain: f32 = field("gain")?.parse().context("its gain")?;
        if !(gain.is_finite() && gain > 0.0) {
            bail!("its gain is {gain}");
        }
        let tensors = SafeTensors::deserialize(bytes)?;
        let view = tensors.tensor("tokens")?;
        if view.dtype() != Dtype::U16 {
            bail!("its tokens are {:?}, expected U16", view.dtype());
        }
        let tokens: Vec<Token> = view.data().chunks_exact(2).map(|b| Token::from_le_bytes([b[0], b[1]])).collect();
        if let Some(token) = tokens.iter().find(|&&token| usize::from(token) >= codec.levels()) {
            bail!("token {token} is outside the {} levels of its codec", codec.levels());
        }
        Ok(Self { codec, gain, tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> TokenFile {
        TokenFile { codec: Codec::default(), gain: 2.5, tokens: vec![0, 128, 255] }
    }

    #[test]
    fn a_token_file_comes_back_as_it_was() {
        let back = TokenFile::from_bytes(&file().to_bytes().unwrap(), Path::new("x")).unwrap();
        assert_eq!((back.codec, back.gain, back.tokens), (file().codec, 2.5, file().tokens));
    }

    #[test]
    fn damaged_and_foreign_files_are_refused_by_name() {
        let whole = file().to_bytes().unwrap();
        let beyond = TokenFile { tokens: vec![300], ..file() }.to_bytes().unwrap();
        for bytes in [&b""[..], b"RIFF", &whole[..whole.len() - 1], &beyond] {
            let error = TokenFile::from_bytes(bytes, Path::new("some.file")).err().unwrap();
            assert!(error.to_string().contains("some.file"), "{error:#}");
        }
    }
}
