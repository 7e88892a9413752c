//! Lists of tokens by id, and sets of ids by token, for tables too wide for rows of bits.
//!
//! How often id a on the left meets each id on the right is the sum of the sets of a's tokens, column by column. The
//! sums of all columns are kept as planes of bits, and 16 sets at a time go through carry-save adders: a handful of
//! instructions for each set, whatever its columns.

use std::ops::Range;

use super::transpose::Number;
use crate::trace::ExpertId;

/// Ids at the most.
pub(super) const IDS: usize = 512;

/// Words of a set, a bit per id: as many as a vector has, or half of them where ids are few.
const WIDE: usize = IDS / 64;
const NARROW: usize = WIDE / 2;

/// A bit per id.
type Set<const N: usize> = [u64; N];

/// Tokens whose sets stay near while the lists go by: lists of fewer tokens would be short, and filled up in vain.
const CHUNK: usize = 4096;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Sets added at a time.
const GROUP: usize = 16;

/// Bits of a sum: enough for the tokens of a block, and for lists as long as they usually are.
const PLANES: usize = 16;
const FEW_PLANES: usize = 12;

/// The ids of a block of tokens.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// For every chunk, `room` apart, the tokens of each id, counted from the chunk's first, in whole groups: filled up
    /// with a token that has no ids.
    tokens: Vec<u16>,
    room: usize,
    /// How often each id occurs, for every chunk.
    lengths: Vec<[u16; IDS]>,
    /// For every chunk the set of each token, `width` words, and behind them the empty one.
    sets: Vec<u64>,
    width: usize,
    /// Words before the first set, which begins a cache line: a set that straddles two takes twice as long.
    before: usize,
}

impl Lists {
    /// Takes the ids of other tokens, as many of each as before, all below `size`.
    pub(super) fn fill<I: ExpertId>(&mut self, ids: &[I], top_k: usize, size: usize) {
        let chunks = ids.len().div_ceil(CHUNK * top_k);
        self.room = CHUNK * top_k + IDS * GROUP;
        self.width = if size > 64 * NARROW { WIDE } else { NARROW };
        self.tokens.resize(chunks * self.room, 0);
        self.lengths.resize(chunks, [0; IDS]);
        let before = |sets: &[u64]| sets.as_ptr().align_offset(LINE).min(LINE / 8);
        let length = chunks * (CHUNK + 1) * self.width + LINE / 8;
        if self.sets.len() < length || self.before != before(&self.sets) {
            // Empty ones must be where they are looked for.
            self.sets.clear();
            self.sets.resize(length, 0);
            self.before = before(&self.sets);
        }
        let sets = &mut self.sets[self.before..];
        for (chunk, ids) in ids.chunks(CHUNK * top_k).enumerate() {
            let sets = &mut sets[chunk * (CHUNK + 1) * self.width..];
            if self.width == WIDE {
                sets_of::<I, WIDE>(ids, top_k, sets);
            } else {
                sets_of::<I, NARROW>(ids, top_k, sets);
            }
            let tokens = &mut self.tokens[chunk * self.room..][..self.room];
            self.lengths[chunk] = match top_k {
                4 => sort(ids, 4, tokens),
                6 => sort(ids, 6, tokens),
                8 => sort(ids, 8, tokens),
                _ => sort(ids, top_k, tokens),
            };
        }
    }

    /// For every chunk the set of each token, and the empty one.
    fn sets<const N: usize>(&self) -> impl Iterator<Item = &[Set<N>]> {
        self.sets[self.before..].chunks_exact((CHUNK + 1) * N).map(|sets| sets.as_chunks::<N>().0)
    }

    /// Adds how often each id occurs in some of the tokens to `counts`.
    pub(super) fn count<I: ExpertId>(
        &self,
        ids: &[I],
        top_k: usize,
        tokens: Range<usize>,
        counts: &mut [u64],
    ) {
        let all = ids.len() / top_k;
        let mut from = tokens.start;
        while from < tokens.end {
            let to = tokens.end.min((from / CHUNK + 1) * CHUNK);
            // A whole chunk has been counted already.
            if from.is_multiple_of(CHUNK) && to == all.min(from + CHUNK) {
                for (count, &length) in counts.iter_mut().zip(&self.lengths[from / CHUNK]) {
                    *count += u64::from(length);
                }
            } else {
                for id in &ids[from * top_k..to * top_k] {
                    counts[id.index()] += 1;
                }
            }
            from = to;
        }
    }
}

/// Writes the tokens of every id, one id after the other, in whole groups; gives how many each has.
///
/// Inlined for constant `top_k`, so that the loop over a token's ids unrolls.
#[inline(always)]
fn sort<I: ExpertId>(ids: &[I], top_k: usize, tokens: &mut [u16]) -> [u16; IDS] {
    let mut lengths = [0u16; IDS];
    for id in ids {
        lengths[id.index() % IDS] += 1;
    }
    let mut next = [0u32; IDS];
    let mut begin = 0;
    for (next, &length) in next.iter_mut().zip(&lengths) {
        *next = begin as u32;
        let whole = usize::from(length) / GROUP * GROUP;
        // The end of the last group; behind a full one this is where the next id's begins, who writes later.
        tokens[begin + whole..][..GROUP].fill(CHUNK as u16);
        begin += usize::from(length).next_multiple_of(GROUP);
    }
    for (token, ids) in (0..).zip(ids.chunks_exact(top_k)) {
        for id in ids {
            let next = &mut next[id.index() % IDS];
            tokens[*next as usize] = token;
            *next += 1;
        }
    }
    lengths
}

/// Never inlined, so compiled without vector gathers: one look-up after the other is faster.
#[inline(never)]
fn sets_of<I: ExpertId, const N: usize>(ids: &[I], top_k: usize, sets: &mut [u64]) {
    match top_k {
        4 => sets_with::<I, N>(ids, 4, sets),
        8 => sets_with::<I, N>(ids, 8, sets),
        _ => sets_with::<I, N>(ids, top_k, sets),
    }
}

/// Inlined for constant `top_k`, so that the loop over a token's ids unrolls.
#[inline(always)]
fn sets_with<I: ExpertId, const N: usize>(ids: &[I], top_k: usize, sets: &mut [u64]) {
    /// The set of each id alone, among the ids of a half.
    static SINGLE: [Set<NARROW>; 64 * NARROW] = {
        let mut single = [[0; NARROW]; 64 * NARROW];
        let mut id = 0;
        while id < 64 * NARROW {
            single[id][id / 64] = 1 << (id % 64);
            id += 1;
        }
        single
    };
    for (set, ids) in sets.as_chunks_mut::<N>().0.iter_mut().zip(ids.chunks_exact(top_k)) {
        if N == NARROW {
            let mut bits = [0u64; N];
            for id in ids {
                let single = &SINGLE[id.index() % (64 * NARROW)];
                for i in 0..N {
                    bits[i] |= single[i];
                }
            }
            *set = bits;
        } else {
            // Where it is: words that have just been written cannot be read as a vector without waiting.
            *set = [0; N];
            for id in ids {
                set[id.index() / 64 % N] |= 1 << (id.index() % 64);
            }
        }
    }
}

/// Adds the pairs of up to 65535 tokens to `counts` `[size, size]`.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
pub(super) fn count_pairs(left: &Lists, right: &Lists, size: usize, counts: &mut [u64]) {
    let mut most = 0;
    for id in 0..size {
        let mut tokens = 0;
        for lengths in &left.lengths {
            tokens += usize::from(lengths[id]);
        }
        most = tokens.max(most);
    }
    let few = most < 1 << FEW_PLANES;
    match (right.width, few) {
        (WIDE, true) => count_with::<WIDE, FEW_PLANES>(left, right, size, counts),
        (WIDE, false) => count_with::<WIDE, PLANES>(left, right, size, counts),
        (_, true) => count_with::<NARROW, FEW_PLANES>(left, right, size, counts),
        (_, false) => count_with::<NARROW, PLANES>(left, right, size, counts),
    }
}

#[inline(always)]
fn count_with<const N: usize, const P: usize>(left: &Lists, right: &Lists, size: usize, counts: &mut [u64]) {
    let mut sums = vec![[[0u64; N]; P]; size];
    let lists = left.lengths.iter().zip(left.tokens.chunks_exact(left.room.max(1)));
    for ((lengths, tokens), sets) in lists.zip(right.sets::<N>()) {
        let mut from = 0;
        // Ids beyond `size` occur in no token: their lists are empty.
        for (sums, &length) in sums.iter_mut().zip(lengths) {
            let to = from + usize::from(length).next_multiple_of(GROUP);
            // A copy: the compiler then knows that no set changes with the sums.
            let mut planes = *sums;
            for tokens in tokens[from..to].as_chunks::<GROUP>().0 {
                let sets = tokens.map(|token| &sets[usize::from(token)]);
                add(sets, &mut planes);
            }
            *sums = planes;
            from = to;
        }
    }
    for (planes, counts) in sums.iter().zip(counts.chunks_exact_mut(size)) {
        for (part, planes) in planes.chunks(8).enumerate() {
            if planes.iter().any(|plane| *plane != [0; N]) {
                add_columns(planes, 8 * part, counts);
            }
        }
    }
}

/// Adds the sums of all columns that up to eight planes hold, the lowest of which counts `1 << shift`.
#[inline(always)]
fn add_columns<const N: usize>(planes: &[Set<N>], shift: usize, counts: &mut [u64]) {
    let mut rows = [[0u64; N]; 8];
    rows[..planes.len()].copy_from_slice(planes);
    // A byte of every plane to a word: a row for each byte.
    for by in [4, 2, 1] {
        for row in (0..8).filter(|row| row & by == 0) {
            let [low, high] = rows.get_disjoint_mut([row, row + by]).expect("two rows");
            for (low, high) in low.iter_mut().zip(high) {
                Number::swap(low, high, 8 * by);
            }
        }
    }
    // A bit of every plane to a byte (Warren, Hacker's Delight, 7-3): the sums of eight columns to a word.
    for (by, mask) in [(7, 0x00AA_00AA_00AA_00AA), (14, 0x0000_CCCC_0000_CCCC), (28, 0x0000_0000_F0F0_F0F0)] {
        for word in rows.as_flattened_mut() {
            let t = (*word ^ (*word >> by)) & mask;
            *word ^= t ^ (t << by);
        }
    }
    let mut sums = [[[0u8; 8]; 8]; N];
    for (row, words) in rows.iter().enumerate() {
        for (sums, word) in sums.iter_mut().zip(words) {
            sums[row] = word.to_le_bytes();
        }
    }
    for (count, &sum) in counts.iter_mut().zip(sums.as_flattened().as_flattened()) {
        *count += u64::from(sum) << shift;
    }
}

/// Adds 16 sets to the sums of all columns (Harley and Seal's tree of carry-save adders).
#[inline(always)]
fn add<const N: usize, const P: usize>(sets: [&Set<N>; GROUP], planes: &mut [Set<N>; P]) {
    /// Adds b and c to a; gives the carries.
    #[inline(always)]
    fn carries(a: &mut u64, b: u64, c: u64) -> u64 {
        let carry = (*a & b) | (*a & c) | (b & c);
        *a ^= b ^ c;
        carry
    }
    for i in 0..N {
        let [mut ones, mut twos, mut fours, mut eights] = [0, 1, 2, 3].map(|plane: usize| planes[plane][i]);
        let mut of_two = [0; 2];
        let mut of_four = [0; 2];
        let mut of_eight = [0; 2];
        for half in 0..2 {
            for quarter in 0..2 {
                for pair in 0..2 {
                    let at = 8 * half + 4 * quarter + 2 * pair;
                    of_two[pair] = carries(&mut ones, sets[at][i], sets[at + 1][i]);
                }
                of_four[quarter] = carries(&mut twos, of_two[0], of_two[1]);
            }
            of_eight[half] = carries(&mut fours, of_four[0], of_four[1]);
        }
        let mut carry = carries(&mut eights, of_eight[0], of_eight[1]);
        planes[0][i] = ones;
        planes[1][i] = twos;
        planes[2][i] = fours;
        planes[3][i] = eights;
        for plane in 4..P {
            let sum = planes[plane][i];
            planes[plane][i] = sum ^ carry;
            carry &= sum;
        }
    }
}
