//! Rows of small counters, added whole.

use crate::trace::ExpertId;

/// Tokens after which an 8-bit counter may be full: ids of a token differ, so a pair occurs at most once in it.
const NARROW: usize = u8::MAX as usize;

/// Counters of a table row that are added at once; a table of 256 rows of them stays in the first-level cache.
const PANEL: usize = 128;

/// Adds the pairs of up to 65535 tokens to `counts` `[size, size]`.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
pub(super) fn count_pairs<I: ExpertId>(
    left: &[I],
    right: &[I],
    top_k: usize,
    size: usize,
    counts: &mut [u64],
) {
    match top_k {
        2 => count_with(left, right, 2, size, counts),
        4 => count_with(left, right, 4, size, counts),
        6 => count_with(left, right, 6, size, counts),
        8 => count_with(left, right, 8, size, counts),
        _ => count_with(left, right, top_k, size, counts),
    }
}

#[inline(always)]
fn count_with<I: ExpertId>(left: &[I], right: &[I], top_k: usize, size: usize, counts: &mut [u64]) {
    assert!(left.len() == right.len() && left.len() <= usize::from(u16::MAX) * top_k);
    let panels = size.div_ceil(PANEL);
    let mut narrow = vec![[0u8; PANEL]; size];
    let mut middle = vec![[0u16; PANEL]; panels * size];
    let mut ones = vec![[0u8; PANEL]; NARROW * panels];
    for (left, right) in left.chunks(NARROW * top_k).zip(right.chunks(NARROW * top_k)) {
        // All rows first, then all additions: a row read right after it was written byte by byte would stall.
        for (row, right) in right.chunks_exact(top_k).enumerate() {
            for b in right {
                ones[b.index() / PANEL * NARROW + row][b.index() % PANEL] = 1;
            }
        }
        for (ones, middle) in ones.chunks_exact(NARROW).zip(middle.chunks_exact_mut(size)) {
            for (one, left) in ones.iter().zip(left.chunks_exact(top_k)) {
                for a in left {
                    for (counter, one) in narrow[a.index()].iter_mut().zip(one) {
                        *counter += one;
                    }
                }
            }
            for (middle, narrow) in middle.as_flattened_mut().iter_mut().zip(narrow.as_flattened_mut()) {
                *middle += u16::from(std::mem::take(narrow));
            }
        }
        for (row, right) in right.chunks_exact(top_k).enumerate() {
            for b in right {
                ones[b.index() / PANEL * NARROW + row][b.index() % PANEL] = 0;
            }
        }
    }
    for (panel, middle) in middle.chunks_exact(size).enumerate() {
        for (counts, middle) in counts.chunks_exact_mut(size).zip(middle) {
            for (count, &add) in counts[panel * PANEL..].iter_mut().zip(middle) {
                *count += u64::from(add);
            }
        }
    }
}
