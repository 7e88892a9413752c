//! Rows of small counters, added whole.

use crate::trace::ExpertId;

/// Tokens after which an 8-bit counter may be full: ids of a token differ, so a pair occurs at most once in it.
const NARROW: usize = u8::MAX as usize;

/// Adds the pairs of up to 65535 tokens to `counts` `[size, size]`.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx2+bmi2", "x86_64+avx2+bmi2"))]
pub(super) fn count_pairs<I: ExpertId>(
    left: &[I],
    right: &[I],
    top_k: usize,
    size: usize,
    counts: &mut [u64],
) {
    // Panels: columns of the table that are counted together.
    match (top_k, size) {
        (6, 0..=128) => count_with::<I, 128>(left, right, 6, size, counts),
        (6, _) => count_with::<I, 256>(left, right, 6, size, counts),
        (8, 0..=128) => count_with::<I, 128>(left, right, 8, size, counts),
        (8, _) => count_with::<I, 256>(left, right, 8, size, counts),
        (_, 0..=128) => count_with::<I, 128>(left, right, top_k, size, counts),
        _ => count_with::<I, 256>(left, right, top_k, size, counts),
    }
}

/// A part of a table row, on cache lines of its own: vectors that straddle two lines take twice as long.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Row<T, const N: usize>([T; N]);

/// Inlined for constant `top_k`, so that the loop over a token's ids unrolls.
#[inline(always)]
fn count_with<I: ExpertId, const PANEL: usize>(
    left: &[I],
    right: &[I],
    top_k: usize,
    size: usize,
    counts: &mut [u64],
) {
    assert!(left.len() == right.len() && left.len() <= usize::from(u16::MAX) * top_k);
    let panels = size.div_ceil(PANEL);
    let mut narrow = vec![Row([0u8; PANEL]); size];
    let mut middle = vec![Row([0u16; PANEL]); panels * size];
    let mut ones = vec![Row([0u8; PANEL]); NARROW * panels];
    for (left, right) in left.chunks(NARROW * top_k).zip(right.chunks(NARROW * top_k)) {
        // All rows first, then all additions: a row read right after it was written byte by byte would stall.
        ones.fill(Row([0; PANEL]));
        for (ones, right) in ones.chunks_exact_mut(panels).zip(right.chunks_exact(top_k)) {
            for b in right {
                ones[b.index() / PANEL].0[b.index() % PANEL] = 1;
            }
        }
        for (panel, middle) in middle.chunks_exact_mut(size).enumerate() {
            for (ones, left) in ones.chunks_exact(panels).zip(left.chunks_exact(top_k)) {
                // A copy, so that it stays in registers while the table's rows change.
                let ones = ones[panel];
                for a in left {
                    let counters = &mut narrow[a.index()];
                    for i in 0..PANEL {
                        counters.0[i] += ones.0[i];
                    }
                }
            }
            for (middle, narrow) in middle.iter_mut().zip(&mut narrow) {
                for i in 0..PANEL {
                    middle.0[i] += u16::from(narrow.0[i]);
                }
                *narrow = Row([0; PANEL]);
            }
        }
    }
    for (panel, middle) in middle.chunks_exact(size).enumerate() {
        for (counts, middle) in counts.chunks_exact_mut(size).zip(middle) {
            for (count, &add) in counts[panel * PANEL..].iter_mut().zip(&middle.0) {
                *count += u64::from(add);
            }
        }
    }
}
