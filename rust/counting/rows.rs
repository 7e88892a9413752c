//! Rows of small counters, added whole.

use crate::trace::ExpertId;

/// Values on cache lines of their own: vectors that straddle two lines take twice as long.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line<T, const N: usize>([T; N]);

/// Columns of the table that are counted together: with 256 rows they stay in the first-level cache.
const PANEL: usize = 128;

/// Tokens after which an 8-bit counter may be full: ids of a token differ, so a pair occurs at most once in it.
const NARROW: usize = u8::MAX as usize;

/// Tokens whose rows are written, then added, while they are in the first-level cache.
const BATCH: usize = 51;

/// Adds the pairs of up to 65535 tokens to `counts` `[size, size]`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx2+bmi2", "x86_64+avx2+bmi2"))]
pub(super) fn count_pairs<I: ExpertId>(
    left: &[I],
    right: &[I],
    top_k: usize,
    size: usize,
    counts: &mut [u64],
) {
    match top_k {
        6 => count_with(left, right, 6, size, counts),
        8 => count_with(left, right, 8, size, counts),
        _ => count_with(left, right, top_k, size, counts),
    }
}

/// Does the work of [`count_pairs`]. It is inlined for constant `top_k`, so that the loop over a token's ids unrolls.
#[inline(always)]
fn count_with<I: ExpertId>(left: &[I], right: &[I], top_k: usize, size: usize, counts: &mut [u64]) {
    assert!(left.len() == right.len() && left.len() <= usize::from(u16::MAX) * top_k);
    let mut small = vec![Line([0u8; PANEL]); size];
    let mut middle = vec![Line([0u16; PANEL]); size];
    for first in (0..size).step_by(PANEL) {
        for (left, right) in left.chunks(NARROW * top_k).zip(right.chunks(NARROW * top_k)) {
            for (left, right) in left.chunks(BATCH * top_k).zip(right.chunks(BATCH * top_k)) {
                // All rows first, then all additions: a row read right after it was written would stall.
                let mut ones = [Line([0u8; PANEL]); BATCH];
                for (ones, right) in ones.iter_mut().zip(right.chunks_exact(top_k)) {
                    for b in right {
                        let b = b.index().wrapping_sub(first);
                        if b < PANEL {
                            ones.0[b] = 1;
                        }
                    }
                }
                for (ones, left) in ones.iter().zip(left.chunks_exact(top_k)) {
                    // A copy, so that it stays in registers while the table's rows change.
                    let ones = *ones;
                    for a in left {
                        let counters = &mut small[a.index()];
                        for i in 0..PANEL {
                            counters.0[i] += ones.0[i];
                        }
                    }
                }
            }
            for (middle, small) in middle.iter_mut().zip(&mut small) {
                for i in 0..PANEL {
                    middle.0[i] += u16::from(small.0[i]);
                }
                *small = Line([0; PANEL]);
            }
        }
        for (counts, middle) in counts.chunks_exact_mut(size).zip(&mut middle) {
            for (count, add) in counts[first..].iter_mut().zip(&mut middle.0) {
                *count += u64::from(std::mem::take(add));
            }
        }
    }
}
