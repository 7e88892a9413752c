//! Lists of tokens by id, and sets of ids by token, for tables too wide for rows of bits.
//!
//! How often id a on the left meets each id on the right is the sum of the sets of a's tokens, column by column. The
//! sums of all columns are kept as planes of bits, and 16 sets at a time go through carry-save adders: a handful of
//! instructions for each set, whatever its columns.

use std::ops::Range;

use crate::trace::ExpertId;

/// Ids at the most.
pub(super) const IDS: usize = 256;

/// A bit per id.
type Set = [u64; IDS / 64];

/// Tokens whose sets stay near while the lists go by: lists of fewer tokens would be short, and filled up in vain.
const CHUNK: usize = 4096;

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
    /// For every chunk the set of each token, and behind them the empty one.
    sets: Vec<Set>,
}

impl Lists {
    /// Takes the ids of other tokens, as many of each as before.
    pub(super) fn fill<I: ExpertId>(&mut self, ids: &[I], top_k: usize) {
        let chunks = ids.len().div_ceil(CHUNK * top_k);
        self.room = CHUNK * top_k + IDS * GROUP;
        self.tokens.resize(chunks * self.room, 0);
        self.lengths.resize(chunks, [0; IDS]);
        self.sets.resize(chunks * (CHUNK + 1), [0; IDS / 64]);
        for (chunk, ids) in ids.chunks(CHUNK * top_k).enumerate() {
            sets_of(ids, top_k, &mut self.sets[chunk * (CHUNK + 1)..]);
            let tokens = &mut self.tokens[chunk * self.room..][..self.room];
            self.lengths[chunk] = match top_k {
                6 => sort(ids, 6, tokens),
                8 => sort(ids, 8, tokens),
                _ => sort(ids, top_k, tokens),
            };
        }
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

/// The set of each id alone.
static SINGLE: [Set; IDS] = {
    let mut single = [[0; IDS / 64]; IDS];
    let mut id = 0;
    while id < IDS {
        single[id][id / 64] = 1 << (id % 64);
        id += 1;
    }
    single
};

/// Never inlined, so compiled without vector gathers: one look-up after the other is faster.
#[inline(never)]
fn sets_of<I: ExpertId>(ids: &[I], top_k: usize, sets: &mut [Set]) {
    match top_k {
        8 => sets_with(ids, 8, sets),
        _ => sets_with(ids, top_k, sets),
    }
}

/// Inlined for constant `top_k`, so that the loop over a token's ids unrolls.
#[inline(always)]
fn sets_with<I: ExpertId>(ids: &[I], top_k: usize, sets: &mut [Set]) {
    for (set, ids) in sets.iter_mut().zip(ids.chunks_exact(top_k)) {
        let mut bits = [0u64; IDS / 64];
        for id in ids {
            let single = &SINGLE[id.index() % IDS];
            for i in 0..IDS / 64 {
                bits[i] |= single[i];
            }
        }
        *set = bits;
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
    if most < 1 << FEW_PLANES {
        count_with::<FEW_PLANES>(left, right, size, counts);
    } else {
        count_with::<PLANES>(left, right, size, counts);
    }
}

#[inline(always)]
fn count_with<const P: usize>(left: &Lists, right: &Lists, size: usize, counts: &mut [u64]) {
    let mut sums = vec![[[0u64; IDS / 64]; P]; size];
    let lists = left.lengths.iter().zip(left.tokens.chunks_exact(left.room.max(1)));
    for ((lengths, tokens), sets) in lists.zip(right.sets.chunks_exact(CHUNK + 1)) {
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
            if planes.iter().any(|plane| *plane != [0; IDS / 64]) {
                add_columns(planes, 8 * part, counts);
            }
        }
    }
}

/// Adds the sums of all columns that up to eight planes hold, the lowest of which counts `1 << shift`.
#[inline(always)]
fn add_columns(planes: &[Set], shift: usize, counts: &mut [u64]) {
    // For every eight columns a square of bits: a byte per plane.
    let mut squares = [0u64; IDS / 8];
    for (plane, set) in planes.iter().enumerate() {
        for (squares, word) in squares.as_chunks_mut::<8>().0.iter_mut().zip(set) {
            for (i, square) in squares.iter_mut().enumerate() {
                *square |= ((word >> (8 * i)) & 0xFF) << (8 * plane);
            }
        }
    }
    for (x, counts) in squares.iter_mut().zip(counts.chunks_mut(8)) {
        // Transposed, a byte per column (Warren, Hacker's Delight, 7-3).
        let mut swap = |by: u32, mask: u64| {
            let t = (*x ^ (*x >> by)) & mask;
            *x ^= t ^ (t << by);
        };
        swap(7, 0x00AA_00AA_00AA_00AA);
        swap(14, 0x0000_CCCC_0000_CCCC);
        swap(28, 0x0000_0000_F0F0_F0F0);
        for (i, count) in counts.iter_mut().enumerate() {
            *count += ((*x >> (8 * i)) & 0xFF) << shift;
        }
    }
}

/// Adds 16 sets to the sums of all columns (Harley and Seal's tree of carry-save adders).
#[inline(always)]
fn add<const P: usize>(sets: [&Set; GROUP], planes: &mut [Set; P]) {
    /// Adds b and c to a; gives the carries.
    #[inline(always)]
    fn carries(a: &mut u64, b: u64, c: u64) -> u64 {
        let carry = (*a & b) | (*a & c) | (b & c);
        *a ^= b ^ c;
        carry
    }
    for i in 0..IDS / 64 {
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
