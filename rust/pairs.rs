//! Counting pairs: how often id `a` on the left meets id `b` on the right in one token.
//!
//! The inner loop of everything that moetuner measures. A token with K ids on each side makes K*K
//! pairs, so a trace of a million tokens makes billions. Two kernels, chosen by size:
//!
//! * *rows*: the right side of a token is written once as a row of one small counter per id, and that row
//!   is added to the table row of each left id. K vector additions count K*K pairs.
//! * *cells*: one increment per pair, for tables so wide that adding whole rows costs more.
//!
//! Small counters overflow, so they are flushed into wider ones before they can.

/// Tokens in one call of [`Pairs::count`] at the most: bounds the 16-bit middle counters.
pub const BLOCK: usize = 4096;

/// Counts pairs of one table, keeping its scratch memory between calls.
#[derive(Debug, Default)]
pub struct Pairs {
    narrow: Vec<u8>,
    middle: Vec<u16>,
    rows: Vec<u8>,
}

/// Tokens after which an 8-bit counter may be full. Ids of a token differ, so a pair occurs once in a token.
const NARROW: usize = u8::MAX as usize;

impl Pairs {
    /// Adds the pairs of a block of tokens to `counts`, `[experts, experts]`.
    ///
    /// `left` and `right` hold `top_k` ids per token; the ids of one token must differ and be below `experts`.
    ///
    /// # Panics
    /// When an id is not below `experts` or the block is longer than [`BLOCK`].
    pub fn count(
        &mut self,
        left: &[u16],
        right: &[u16],
        top_k: usize,
        experts: usize,
        counts: &mut [u64],
    ) {
        assert!(left.len() == right.len() && left.len() <= BLOCK * top_k);
        assert_eq!(counts.len(), experts * experts);
        let width = match experts {
            0..=8 => 8,
            9..=16 => 16,
            17..=32 => 32,
            33..=64 => 64,
            _ => experts.next_multiple_of(64),
        };
        // Vector operations of 64 bytes against increments, per token (measured: see bench/RESULTS.md).
        let by_rows = width.div_ceil(64) * (top_k + 1) + width * experts / 4096;
        if by_rows > top_k * top_k * 2 {
            count_cells(left, right, top_k, experts, counts);
            return;
        }
        self.narrow.clear();
        self.narrow.resize(experts * width, 0);
        self.middle.clear();
        self.middle.resize(experts * width, 0);
        self.rows.clear();
        self.rows.resize(NARROW * width, 0);
        count_rows(left, right, top_k, width, &mut self.narrow, &mut self.middle, &mut self.rows);
        for (counts, middle) in counts.chunks_exact_mut(experts).zip(self.middle.chunks_exact(width)) {
            for (count, &add) in counts.iter_mut().zip(middle) {
                *count += u64::from(add);
            }
        }
    }
}

fn count_cells(left: &[u16], right: &[u16], top_k: usize, experts: usize, counts: &mut [u64]) {
    for (left, right) in left.chunks_exact(top_k).zip(right.chunks_exact(top_k)) {
        for &a in left {
            let row = &mut counts[usize::from(a) * experts..][..experts];
            for &b in right {
                row[usize::from(b)] += 1;
            }
        }
    }
}

#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512vl+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
fn count_rows(
    left: &[u16],
    right: &[u16],
    top_k: usize,
    width: usize,
    narrow: &mut [u8],
    middle: &mut [u16],
    rows: &mut [u8],
) {
    match width {
        8 => count_rows_of::<8>(left, right, top_k, 1, narrow, middle, rows),
        16 => count_rows_of::<16>(left, right, top_k, 1, narrow, middle, rows),
        32 => count_rows_of::<32>(left, right, top_k, 1, narrow, middle, rows),
        64 => count_rows_of::<64>(left, right, top_k, 1, narrow, middle, rows),
        128 => count_rows_of::<128>(left, right, top_k, 1, narrow, middle, rows),
        256 => count_rows_of::<256>(left, right, top_k, 1, narrow, middle, rows),
        _ => count_rows_of::<64>(left, right, top_k, width / 64, narrow, middle, rows),
    }
}

/// A table row is `n` pieces of `W` counters.
#[inline(always)]
fn count_rows_of<const W: usize>(
    left: &[u16],
    right: &[u16],
    top_k: usize,
    n: usize,
    narrow: &mut [u8],
    middle: &mut [u16],
    rows: &mut [u8],
) {
    for (left, right) in left.chunks(NARROW * top_k).zip(right.chunks(NARROW * top_k)) {
        // All rows first, then all additions: a row read right after it was written byte by byte would stall.
        for (row, right) in rows.chunks_exact_mut(n * W).zip(right.chunks_exact(top_k)) {
            for &b in right {
                row[usize::from(b)] = 1;
            }
        }
        {
            let (table, _) = narrow.as_chunks_mut::<W>();
            let (rows, _) = rows.as_chunks::<W>();
            for (row, left) in rows.chunks_exact(n).zip(left.chunks_exact(top_k)) {
                for &a in left {
                    for (counter, add) in table[usize::from(a) * n..][..n].iter_mut().zip(row) {
                        for i in 0..W {
                            counter[i] += add[i];
                        }
                    }
                }
            }
        }
        for (row, right) in rows.chunks_exact_mut(n * W).zip(right.chunks_exact(top_k)) {
            for &b in right {
                row[usize::from(b)] = 0;
            }
        }
        for (middle, narrow) in middle.iter_mut().zip(narrow.iter_mut()) {
            *middle += u16::from(*narrow);
            *narrow = 0;
        }
    }
}
