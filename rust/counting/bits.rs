//! Rows of bits: for every id the tokens it occurs in, 64 to a word.
//!
//! A token's ids are first a number, a bit per id. The numbers of 512 tokens, side by side in as many vector lanes as
//! there is room for, are transposed as squares of bits, all lanes at once. Token t of a block
//! of 512 tokens is then bit `t / lanes` of lane `t % lanes`.

use std::ops::Range;

use super::transpose::{BLOCK, Number, WORD, WORDS, transpose};
use crate::trace::ExpertId;

/// Ids that can have units, at the most.
pub const IDS: usize = 1024;

/// Row of a bit that has no row.
pub const NONE: usize = usize::MAX;

/// Returns the rows of a table, a multiple of eight, so that whole vectors can be loaded.
fn padded(size: usize) -> usize {
    size.next_multiple_of(8)
}

/// Returns which bits of a block's word are of the tokens `within`, which are counted from the block's first.
#[inline(always)]
fn bits_of(word: usize, bits: usize, within: Range<usize>) -> u64 {
    let lanes = BLOCK / bits;
    let mut all = 0;
    for i in 0..WORD / bits {
        let lane = word * (WORD / bits) + i;
        let before = |end: usize| {
            let bits = end.saturating_sub(lane).div_ceil(lanes);
            (1u64 << (bits / 2) << (bits - bits / 2)).wrapping_sub(1)
        };
        all |= (before(within.end) & !before(within.start)) << (i * bits);
    }
    all
}

/// Writes for every 512 tokens the rows of all ids, at most 64, with a bit per token; `rows` may hold others of this size.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
pub(super) fn rows_of<I: ExpertId>(ids: &[I], top_k: usize, size: usize, rows: &mut Vec<u64>) {
    let columns: Vec<usize> = (0..size).collect();
    match size {
        0..=8 => rows_with(ids, top_k, size, &columns, rows, |_, ids, sets: &mut [u8; BLOCK]| {
            sets_of(ids, top_k, sets);
        }),
        9..=32 => rows_with(ids, top_k, size, &columns, rows, |_, ids, sets: &mut [u32; BLOCK]| {
            sets_of(ids, top_k, sets);
        }),
        _ => rows_with(ids, top_k, size, &columns, rows, |_, ids, sets: &mut [u64; BLOCK]| {
            sets_of(ids, top_k, sets);
        }),
    }
}

/// Writes the set of every token's ids.
#[inline(always)]
fn sets_of<I: ExpertId, N: Number>(ids: &[I], top_k: usize, sets: &mut [N; BLOCK]) {
    add_ids(ids, top_k, sets, N::with);
}

/// Writes what `add` makes of every token's ids, from zero on. It is inlined for constant K, so that the loop over a token's
/// ids unrolls.
#[inline(always)]
fn add_ids<I: ExpertId, N: Number>(
    ids: &[I],
    top_k: usize,
    to: &mut [N; BLOCK],
    add: impl Fn(N, usize) -> N,
) {
    #[inline(always)]
    fn fill<I: ExpertId, N: Number, const K: usize>(
        ids: &[I],
        to: &mut [N; BLOCK],
        add: impl Fn(N, usize) -> N,
    ) {
        for (to, ids) in to.iter_mut().zip(ids.as_chunks::<K>().0) {
            *to = N::ZERO;
            for id in ids {
                *to = add(*to, id.index());
            }
        }
    }
    match top_k {
        1 => fill::<I, N, 1>(ids, to, add),
        2 => fill::<I, N, 2>(ids, to, add),
        4 => fill::<I, N, 4>(ids, to, add),
        6 => fill::<I, N, 6>(ids, to, add),
        8 => fill::<I, N, 8>(ids, to, add),
        k => {
            for (to, ids) in to.iter_mut().zip(ids.chunks_exact(k)) {
                *to = ids.iter().fold(N::ZERO, |sum, id| add(sum, id.index()));
            }
        }
    }
}

/// Numbers of ids, whose sums by token become rows.
#[derive(Debug)]
pub struct Units {
    tables: UnitTable,
    /// Which row a bit is, [`NONE`] for a bit that is unused.
    columns: Vec<usize>,
}

/// A number per id, as wide as the rows need. The size is constant, so that an index below it needs no check.
#[derive(Debug)]
enum UnitTable {
    Of8(Box<[u8; IDS]>),
    Of32(Box<[u32; IDS]>),
    Of64(Vec<[u64; IDS]>),
}

impl Units {
    /// Takes `[words, ids]`, 64 bits to a word, and for every bit its row, a number below `size`. Sums must not carry from
    /// one word into the next.
    #[must_use]
    pub fn new(units: &[u64], columns: Vec<usize>, size: usize) -> Self {
        let ids = units.len() / columns.len().div_ceil(64);
        let mut words = units.chunks_exact(ids).map(|units| {
            let mut table = [0; IDS];
            table[..ids].copy_from_slice(units);
            table
        });
        let mut only = || words.next().expect("a size above zero has a word");
        let tables = match size {
            0..=8 => UnitTable::Of8(Box::new(only().map(|unit| unit as u8))),
            9..=32 => UnitTable::Of32(Box::new(only().map(|unit| unit as u32))),
            _ => UnitTable::Of64(words.collect()),
        };
        Self { tables, columns }
    }
}

/// The rows of the bits of the sums of every token's units.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vbmi+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
pub(super) fn rows_of_sums<I: ExpertId>(
    ids: &[I],
    top_k: usize,
    size: usize,
    units: &Units,
    rows: &mut Vec<u64>,
) {
    let columns = &units.columns;
    match &units.tables {
        UnitTable::Of8(table) => {
            rows_with(ids, top_k, size, columns, rows, |_, ids, sums: &mut [u8; BLOCK]| {
                sums_of(ids, top_k, table, sums);
            });
        }
        UnitTable::Of32(table) => {
            rows_with(ids, top_k, size, columns, rows, |_, ids, sums: &mut [u32; BLOCK]| {
                sums_of(ids, top_k, table, sums);
            });
        }
        UnitTable::Of64(tables) => {
            rows_with(ids, top_k, size, columns, rows, |word, ids, sums: &mut [u64; BLOCK]| {
                sums_of(ids, top_k, &tables[word], sums);
            });
        }
    }
}

/// Sums the units of every token's ids. It is never inlined, so that it has no vector gathers: single look-ups are faster.
#[inline(never)]
fn sums_of<I: ExpertId, N: Number>(ids: &[I], top_k: usize, units: &[N; IDS], sums: &mut [N; BLOCK]) {
    add_ids(ids, top_k, sums, |sum, id| sum.plus(units[id % IDS]));
}

/// Transposes what `fill` says of 512 tokens: a number for each, given the word (`N::BITS` rows) and the tokens' ids.
#[inline(always)]
fn rows_with<I: ExpertId, N: Number>(
    ids: &[I],
    top_k: usize,
    size: usize,
    columns: &[usize],
    rows: &mut Vec<u64>,
    fill: impl Fn(usize, &[I], &mut [N; BLOCK]),
) {
    let width = padded(size);
    let lanes = BLOCK / N::BITS;
    // Every row is written; those that fill up the width are zero, and were before.
    rows.resize(ids.len().div_ceil(BLOCK * top_k) * WORDS * width, 0);
    let mut numbers = [N::ZERO; BLOCK];
    for (ids, rows) in ids.chunks(BLOCK * top_k).zip(rows.chunks_exact_mut(WORDS * width)) {
        for (word, columns) in columns.chunks(N::BITS).enumerate() {
            if ids.len() < BLOCK * top_k {
                numbers.fill(N::ZERO);
            }
            fill(word, ids, &mut numbers);
            transpose(&mut numbers);
            for (&column, lanes) in columns.iter().zip(numbers.chunks_exact(lanes)) {
                if column < size {
                    for (i, word) in N::words(lanes).into_iter().enumerate() {
                        rows[i * width + column] = word;
                    }
                }
            }
        }
    }
}

/// Iterates over the rows of every 64 tokens, with the bits that are of tokens within `tokens`.
#[inline(always)]
pub(super) fn words(rows: &[u64], size: usize, tokens: Range<usize>) -> impl Iterator<Item = (&[u64], u64)> {
    let Range { start, end } = tokens;
    let blocks = if start < end { start / BLOCK..end.div_ceil(BLOCK) } else { 0..0 };
    let width = padded(size);
    let bits = match size {
        0..=8 => 8,
        9..=32 => 32,
        _ => 64,
    };
    (blocks.start * WORDS..blocks.end * WORDS).map(move |word| {
        let first = word / WORDS * BLOCK;
        let within = start.saturating_sub(first)..(end - first).min(BLOCK);
        let within = if within == (0..BLOCK) { u64::MAX } else { bits_of(word % WORDS, bits, within) };
        (&rows[word * width..][..size], within)
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

/// Adds the ones of the AND of every left with every right row to `counts` `[size, size]`. Where both are the same rows
/// (`is_same`), the table is symmetric. Rows of `sums` are mostly empty in their upper bits.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx512vpopcntdq+avx2+bmi2+popcnt",
    "x86_64+avx2+bmi2+popcnt"
))]
pub(super) fn count_pairs(
    left: &[u64],
    right: &[u64],
    size: usize,
    is_same: bool,
    sums: bool,
    counts: &mut [u64],
) {
    const LEFT: usize = 4;
    const RIGHT: usize = 8;
    // Words whose rows, left and right, stay in the first-level cache.
    const TOGETHER: usize = 32;
    let width = padded(size);
    let (mut in_left, mut in_right) = (Occupied::default(), Occupied::default());
    let mut all = Vec::new();
    for (left, right) in left.chunks(TOGETHER * width).zip(right.chunks(TOGETHER * width)) {
        if sums {
            in_left.find::<LEFT>(left, width);
            in_right.find::<RIGHT>(right, width);
        } else {
            // Few words are empty: to look for them would not pay.
            all.resize(left.len() / width, 0);
            all.iter_mut().zip(0..).for_each(|(place, word)| *place = word);
        }
        let (left, right) = (left.as_chunks::<LEFT>().0, right.as_chunks::<RIGHT>().0);
        // A tile of the table at a time: its sums stay in registers while the words go by.
        for e in 0..width / LEFT {
            for f in 0..width / RIGHT {
                let below = is_same && (f + 1) * RIGHT <= e * LEFT;
                let words = if sums { shorter(in_left.of(e), in_right.of(f)) } else { &all };
                if below || words.is_empty() {
                    continue;
                }
                let mut sums = [[0u64; RIGHT]; LEFT];
                for &word in words {
                    let left = &left[word * (width / LEFT) + e];
                    let right = &right[word * (width / RIGHT) + f];
                    for (sums, l) in sums.iter_mut().zip(left) {
                        for (sum, r) in sums.iter_mut().zip(right) {
                            *sum += u64::from((l & r).count_ones());
                        }
                    }
                }
                if !is_same && (f + 1) * RIGHT <= size {
                    for (counts, sums) in counts.chunks_exact_mut(size).skip(e * LEFT).zip(&sums) {
                        let counts = counts[f * RIGHT..].first_chunk_mut::<RIGHT>().expect("a whole tile");
                        for (count, sum) in counts.iter_mut().zip(sums) {
                            *count += sum;
                        }
                    }
                    continue;
                }
                for (e, sums) in (e * LEFT..size).zip(&sums) {
                    for (f, sum) in (f * RIGHT..size).zip(sums) {
                        if !is_same || e <= f {
                            counts[e * size + f] += sum;
                        }
                        if is_same && e < f {
                            counts[f * size + e] += sum;
                        }
                    }
                }
            }
        }
    }
}

fn shorter<'a>(one: &'a [usize], other: &'a [usize]) -> &'a [usize] {
    if one.len() < other.len() { one } else { other }
}

/// Words in which any of a few neighbouring rows has a token, by those rows: the upper bits of counts have few.
#[derive(Default)]
struct Occupied {
    words: Vec<usize>,
    /// End of the words of every group of rows; they begin at the end of the group before.
    ends: Vec<usize>,
}

impl Occupied {
    /// Takes N rows at a time of `width`.
    #[inline(always)]
    fn find<const N: usize>(&mut self, rows: &[u64], width: usize) {
        let rows = rows.as_chunks::<N>().0;
        self.words.resize(rows.len() + 1, 0);
        self.ends.clear();
        let mut end = 0;
        for group in 0..width / N {
            for (word, rows) in rows[group..].iter().step_by(width / N).enumerate() {
                // Written in any case and then kept or not: whether is hard to foretell.
                self.words[end] = word;
                end += usize::from(rows.iter().fold(0, |any, row| any | row) != 0);
            }
            self.ends.push(end);
        }
    }

    fn of(&self, group: usize) -> &[usize] {
        &self.words[group.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[group]]
    }
}
