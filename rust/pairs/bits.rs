//! Rows of bits: for every id the tokens it occurs in, 64 to a word.

use std::ops::Range;

use crate::trace::ExpertId;

/// Tokens in a word.
const WORD: usize = 64;

/// Ids that can have units, at the most.
pub const IDS: usize = 1024;

/// Rows come in eights, so that whole vectors can be loaded.
fn padded(size: usize) -> usize {
    size.next_multiple_of(8)
}

/// Bit t of `[t / 64, id]` says that token t has the id; `size` is at most 64.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
pub(super) fn rows_of<I: ExpertId>(ids: &[I], top_k: usize, size: usize) -> Vec<u64> {
    match top_k {
        1 => rows_with(ids, 1, size, |_, ids, sets| sets_of::<I, 1>(ids, sets)),
        2 => rows_with(ids, 2, size, |_, ids, sets| sets_of::<I, 2>(ids, sets)),
        4 => rows_with(ids, 4, size, |_, ids, sets| sets_of::<I, 4>(ids, sets)),
        6 => rows_with(ids, 6, size, |_, ids, sets| sets_of::<I, 6>(ids, sets)),
        8 => rows_with(ids, 8, size, |_, ids, sets| sets_of::<I, 8>(ids, sets)),
        k => rows_with(ids, k, size, |_, ids, sets| {
            for (set, ids) in sets.iter_mut().zip(ids.chunks_exact(k)) {
                *set = ids.iter().fold(0, |set, id| set | 1 << (id.index() & 63));
            }
        }),
    }
}

#[inline(always)]
fn sets_of<I: ExpertId, const K: usize>(ids: &[I], sets: &mut [u64; WORD]) {
    for (set, ids) in sets.iter_mut().zip(ids.as_chunks::<K>().0) {
        *set = ids.iter().fold(0, |set, id| set | 1 << (id.index() & 63));
    }
}

/// Bit t of `[t / 64, row]` is bit `row` of the sum of token t's `units`, `[words, ids]`: a number per id, 64 rows to
/// a word. Sums must not carry from one word into the next.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
pub(super) fn rows_of_sums<I: ExpertId>(ids: &[I], top_k: usize, size: usize, units: &[u64]) -> Vec<u64> {
    // Of constant size: an index below it needs no check.
    let mut of_word = vec![[0; IDS]; size.div_ceil(WORD)];
    for (table, units) in of_word.iter_mut().zip(units.chunks_exact(units.len() / size.div_ceil(WORD))) {
        table[..units.len()].copy_from_slice(units);
    }
    rows_with(ids, top_k, size, |word, ids, sums| match top_k {
        1 => sums_of::<I, 1>(ids, &of_word[word], sums),
        2 => sums_of::<I, 2>(ids, &of_word[word], sums),
        4 => sums_of::<I, 4>(ids, &of_word[word], sums),
        6 => sums_of::<I, 6>(ids, &of_word[word], sums),
        8 => sums_of::<I, 8>(ids, &of_word[word], sums),
        k => {
            for (sum, ids) in sums.iter_mut().zip(ids.chunks_exact(k)) {
                *sum = ids.iter().map(|id| of_word[word][id.index() % IDS]).sum();
            }
        }
    })
}

/// Never inlined, so compiled without vector gathers: one look-up after the other is faster.
#[inline(never)]
fn sums_of<I: ExpertId, const K: usize>(ids: &[I], units: &[u64; IDS], sums: &mut [u64; WORD]) {
    for (sum, ids) in sums.iter_mut().zip(ids.as_chunks::<K>().0) {
        *sum = ids.iter().map(|id| units[id.index() % IDS]).sum();
    }
}

/// Transposes what `fill` says of 64 tokens: a number for each, given the word (64 rows) and the tokens' ids.
#[inline(always)]
fn rows_with<I: ExpertId>(
    ids: &[I],
    top_k: usize,
    size: usize,
    fill: impl Fn(usize, &[I], &mut [u64; WORD]),
) -> Vec<u64> {
    let width = padded(size);
    let mut rows = vec![0; ids.len().div_ceil(WORD * top_k) * width];
    for (ids, rows) in ids.chunks(WORD * top_k).zip(rows.chunks_exact_mut(width)) {
        for (word, rows) in rows.chunks_mut(WORD).enumerate() {
            let mut numbers = [0u64; WORD];
            fill(word, ids, &mut numbers);
            for (plane, rows) in rows.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let mut tokens = [0u64; 8];
                for (group, tokens) in tokens.iter_mut().enumerate() {
                    let byte = |i: usize| (numbers[8 * group + i] >> (8 * plane)) as u8;
                    *tokens = u64::from_le_bytes(std::array::from_fn(byte));
                }
                *rows = transpose(tokens);
            }
        }
    }
    rows
}

/// Turns 64 bytes (one per token, a bit per id) into 8 words (one per id, a bit per token).
#[inline(always)]
fn transpose(mut bytes: [u64; 8]) -> [u64; 8] {
    // Within each word the 8 x 8 bits (Warren, Hacker's Delight, 7-3) ...
    for x in &mut bytes {
        let mut swap = |by: u32, mask: u64| {
            let t = (*x ^ (*x >> by)) & mask;
            *x ^= t ^ (t << by);
        };
        swap(7, 0x00AA_00AA_00AA_00AA);
        swap(14, 0x0000_CCCC_0000_CCCC);
        swap(28, 0x0000_0000_F0F0_F0F0);
    }
    // ... then the 8 x 8 bytes across the words.
    let mut words = [0u64; 8];
    for (group, x) in bytes.iter().enumerate() {
        for (id, word) in words.iter_mut().enumerate() {
            *word |= ((x >> (8 * id)) & 0xFF) << (8 * group);
        }
    }
    words
}

/// The rows of every 64 tokens, and which of the 64 are within `tokens`.
#[inline(always)]
pub(super) fn words(rows: &[u64], size: usize, tokens: Range<usize>) -> impl Iterator<Item = (&[u64], u64)> {
    let Range { start, end } = tokens;
    let within = if start < end { start / WORD..end.div_ceil(WORD) } else { 0..0 };
    let first = within.start;
    rows.chunks_exact(padded(size)).take(within.end).enumerate().skip(first).map(move |(word, rows)| {
        let after = u64::MAX << start.saturating_sub(word * WORD);
        let before = u64::MAX >> (WORD - (end - word * WORD).min(WORD));
        (&rows[..size], after & before)
    })
}

/// Adds the ones of every row within some of the tokens.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vpopcntdq+avx2+bmi2+popcnt",
    "x86_64+avx2+bmi2+popcnt"
))]
pub(super) fn count(rows: &[u64], size: usize, tokens: Range<usize>, counts: &mut [u64]) {
    for (rows, within) in words(rows, size, tokens) {
        for (count, row) in counts.iter_mut().zip(rows) {
            *count += u64::from((row & within).count_ones());
        }
    }
}

/// Adds the ones of the AND of every left with every right row to `counts` `[size, size]`.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vpopcntdq+avx2+bmi2+popcnt",
    "x86_64+avx2+bmi2+popcnt"
))]
pub(super) fn count_pairs(left: &[u64], right: &[u64], size: usize, counts: &mut [u64]) {
    const LEFT: usize = 4;
    const RIGHT: usize = 8;
    // Words whose rows, left and right, stay in the first-level cache.
    const WORDS: usize = 32;
    let width = padded(size);
    for (left, right) in left.chunks(WORDS * width).zip(right.chunks(WORDS * width)) {
        let (left, right) = (left.as_chunks::<LEFT>().0, right.as_chunks::<RIGHT>().0);
        // A tile of the table at a time: its sums stay in registers while all words go by.
        for e in 0..width / LEFT {
            for f in 0..width / RIGHT {
                let mut sums = [[0u64; RIGHT]; LEFT];
                let lefts = left[e..].iter().step_by(width / LEFT);
                let rights = right[f..].iter().step_by(width / RIGHT);
                for (left, right) in lefts.zip(rights) {
                    for (sums, l) in sums.iter_mut().zip(left) {
                        for (sum, r) in sums.iter_mut().zip(right) {
                            *sum += u64::from((l & r).count_ones());
                        }
                    }
                }
                for (e, sums) in (e * LEFT..size).zip(&sums) {
                    for (f, sum) in (f * RIGHT..size).zip(sums) {
                        counts[e * size + f] += sum;
                    }
                }
            }
        }
    }
}
