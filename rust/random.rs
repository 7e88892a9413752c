//! Pseudo-random numbers that are the same on every machine and for any number of threads.

/// xoshiro256++ (Blackman and Vigna, 2019), one independent stream per (seed, stream).
#[derive(Debug, Clone)]
pub struct Random([u64; 4]);

impl Random {
    /// Builds the generator of stream number `stream` of `seed`.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut state = seed ^ stream.wrapping_mul(0xA076_1D64_78BD_642F);
        // Splitmix64 spreads any two neighbouring seeds over the whole state, and never gives four zeros.
        Self(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }))
    }

    /// Returns 64 random bits.
    #[inline]
    pub fn bits(&mut self) -> u64 {
        let [a, b, c, d] = self.0;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (c, d) = (c ^ a, d ^ b);
        self.0 = [a ^ d, b ^ c, c ^ (b << 17), d.rotate_left(45)];
        result
    }

    /// Returns a random number below `n`, which must not be zero; the bias of at most n / 2^32 does not matter here.
    #[inline]
    pub fn below(&mut self, n: usize) -> usize {
        scale(self.bits() >> 32, n)
    }

    /// Puts a slice into random order.
    #[cfg(test)]
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Returns a hash of 32 bits of which every bit depends on all bits of the input: the last step of `MurmurHash3`.
#[inline]
#[must_use]
pub fn hash(mut bits: u32) -> u32 {
    bits = (bits ^ (bits >> 16)).wrapping_mul(0x85EB_CA6B);
    bits = (bits ^ (bits >> 13)).wrapping_mul(0xC2B2_AE35);
    bits ^ (bits >> 16)
}

/// Returns which of so many copies of an expert serves a token, by the token's [`hash`]; all experts have the same rule.
#[inline]
#[must_use]
pub fn choose_copy(hash: usize, copies: usize) -> usize {
    hash % copies
}

/// Maps 32 random bits evenly to a number below `n`.
#[inline]
#[must_use]
pub fn scale(bits: u64, n: usize) -> usize {
    ((bits * n as u64) >> 32) as usize
}
