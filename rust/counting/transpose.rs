//! Squares of bits, transposed in as many vector lanes as there is room for.

/// Tokens that are transposed together.
pub(super) const BLOCK: usize = 512;

/// Tokens in a word.
pub(super) const WORD: usize = 64;

/// Words of a block.
pub(super) const WORDS: usize = BLOCK / WORD;

/// A number whose bits become rows; `BLOCK / BITS` of them share a vector.
pub(super) trait Number: Copy + 'static {
    const BITS: usize;
    const ZERO: Self;
    fn with(self, bit: usize) -> Self;
    fn plus(self, unit: Self) -> Self;
    /// Exchanges the upper `by` bits in every `2 * by` of `low` with the lower ones of `high`.
    fn swap(low: &mut Self, high: &mut Self, by: usize);
    fn words(lanes: &[Self]) -> [u64; WORDS];
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Number for $type {
            const BITS: usize = <$type>::BITS as usize;
            const ZERO: Self = 0;

            #[inline(always)]
            fn with(self, bit: usize) -> Self {
                self | 1 << (bit % <Self as Number>::BITS)
            }

            #[inline(always)]
            fn plus(self, unit: Self) -> Self {
                self.wrapping_add(unit)
            }

            #[inline(always)]
            fn swap(low: &mut Self, high: &mut Self, by: usize) {
                let mask = Self::MAX / ((1 << by) + 1);
                let changed = ((*low >> by) ^ *high) & mask;
                *high ^= changed;
                *low ^= changed << by;
            }

            #[inline(always)]
            fn words(lanes: &[Self]) -> [u64; WORDS] {
                const LANES: usize = 8 / size_of::<$type>();
                let mut words = [0; WORDS];
                for (word, lanes) in words.iter_mut().zip(lanes.as_chunks::<LANES>().0) {
                    for (i, lane) in lanes.iter().enumerate() {
                        *word |= u64::from(*lane) << (i * <Self as Number>::BITS);
                    }
                }
                words
            }
        }
    )*};
}

number!(u8, u32, u64);

/// Transposes the squares that the lanes hold: afterwards lanes `i * lanes..` hold bit i of all tokens.
#[inline(always)]
pub(super) fn transpose<N: Number>(numbers: &mut [N; BLOCK]) {
    let lanes = BLOCK / N::BITS;
    let mut by = N::BITS / 2;
    // Two steps at a time, so that numbers are loaded and stored half as often.
    while by > 1 {
        let half = by / 2;
        for square in numbers.chunks_exact_mut(2 * by * lanes) {
            let (low, high) = square.split_at_mut(by * lanes);
            let ((a, b), (c, d)) = (low.split_at_mut(half * lanes), high.split_at_mut(half * lanes));
            for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                N::swap(a, c, by);
                N::swap(b, d, by);
                N::swap(a, b, half);
                N::swap(c, d, half);
            }
        }
        by = half / 2;
    }
    if by == 1 {
        for square in numbers.chunks_exact_mut(2 * lanes) {
            let (low, high) = square.split_at_mut(lanes);
            for (low, high) in low.iter_mut().zip(high) {
                N::swap(low, high, 1);
            }
        }
    }
}
