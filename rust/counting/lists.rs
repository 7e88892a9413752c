//! Lists of tokens by id, and sets of ids by token, for tables too wide for rows of bits.
//!
//! The counts of id a on the left with each id on the right are the sum of the sets of a's tokens, column by column. The
//! sums of all columns are kept as planes of bits, and 32 sets at a time go through carry-save adders: a handful of
//! instructions for each set, whatever its columns.

use std::ops::Range;

use super::transpose::Number;
use crate::trace::ExpertId;

/// Largest number of ids.
pub(super) const IDS: usize = 512;

/// Words of a set, a bit per id: as many as a vector has, or half of them where ids are few.
const WIDE: usize = IDS / 64;
const NARROW: usize = WIDE / 2;

/// A bit per id.
type Set<const N: usize> = [u64; N];

/// Tokens whose sets stay in a cache while lists are read: lists of fewer tokens would be short, and mostly filled up.
const CHUNK: usize = 4096;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Sets added at a time: two groups where there are as many.
const GROUP: usize = 16;

/// Tokens of an id that lie side by side; where more follow is noted. So ids need not be counted before they are sorted.
const SEGMENT: usize = 64;

/// Places for the tokens of a chunk: 16 bits number them.
const PLACES: usize = 1 << 16;

/// Returns the number of tokens of a chunk: as many as have places, whichever ids they have.
fn chunk_tokens(top_k: usize) -> usize {
    CHUNK.min((PLACES - IDS * SEGMENT) / top_k)
}

/// Bits of a sum: enough for the tokens of a block, and for lists as long as they usually are.
const PLANES: usize = 16;
const FEW_PLANES: usize = 12;

/// Tokens of a window at the least, for its ids to be counted on the way.
const SHORT_WINDOW: usize = 64;

/// Places among the tokens of a block at which windows begin.
#[derive(Debug, Clone, Copy)]
pub struct Cuts {
    /// Place of the first window that begins behind the block's first token.
    first: usize,
    /// Tokens of a window.
    length: usize,
}

impl Cuts {
    /// A single window.
    pub const NONE: Self = Self { first: usize::MAX, length: usize::MAX };

    /// Builds the cuts between windows of so many tokens, for a block that begins with token `begin` of the trace.
    #[must_use]
    pub fn new(length: Option<u64>, begin: u64) -> Self {
        length.map_or(Self::NONE, |length| {
            let first = usize::try_from(length - begin % length).unwrap_or(usize::MAX);
            Self { first, length: usize::try_from(length).unwrap_or(usize::MAX) }
        })
    }

    /// Returns the number of the window that a token is in, from 0 for the block's first.
    fn window(self, token: usize) -> usize {
        token.checked_sub(self.first).map_or(0, |behind| 1 + behind / self.length)
    }
}

/// The ids of a block of tokens, as lists.
#[derive(Debug, Default)]
pub(super) struct Lists {
    chunks: Vec<Chunk>,
    /// Chunks in use.
    used: usize,
    /// Windows, and how often each id occurs in the part of each that lies in the block.
    cuts: Option<Cuts>,
    parts: Vec<[u16; IDS]>,
}

/// Memory for counting, used again and again.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// The set of each token of a chunk, and the empty one; behind what lies before the next cache line.
    sets: Vec<u64>,
    /// Sums of all columns, for every id on the left: of a neighbour, and of the ids themselves.
    sums: [Vec<u64>; 2],
}

/// The tokens of each id, counted from the chunk's first, in whole groups: filled up with a token that has no ids.
#[derive(Debug)]
struct Chunk {
    /// Segments; those of the numbers of ids are the ids' first. Their number is constant, so that indices of 16 bits need no check.
    tokens: Box<[u16; PLACES]>,
    /// Number of the segment that follows each one.
    follows: [u16; PLACES / SEGMENT],
    /// Number of tokens of each id.
    lengths: [u16; IDS],
}

impl Chunk {
    fn new() -> Self {
        let tokens = vec![0; PLACES].try_into().expect("as many places");
        Self { tokens, follows: [0; PLACES / SEGMENT], lengths: [0; IDS] }
    }
}

impl Lists {
    /// Takes the ids of other tokens, as many of each as before, all below `size`.
    pub(super) fn fill<I: ExpertId>(&mut self, ids: &[I], top_k: usize, cuts: Cuts) {
        let step = chunk_tokens(top_k);
        self.used = ids.len().div_ceil(step * top_k);
        if self.chunks.len() < self.used {
            self.chunks.resize_with(self.used, Chunk::new);
        }
        self.cuts = (cuts.length >= SHORT_WINDOW).then_some(cuts);
        self.parts.clear();
        for (number, (chunk, ids)) in self.chunks.iter_mut().zip(ids.chunks(step * top_k)).enumerate() {
            let cuts = self.cuts.unwrap_or(Cuts::NONE);
            sort(ids, top_k, chunk, cuts, number * step, &mut self.parts);
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
        if let Some(cuts) = self.cuts {
            let window = cuts.window(tokens.start);
            let begins = tokens.start == 0 || cuts.window(tokens.start - 1) < window;
            let ends = tokens.end == ids.len() / top_k || cuts.window(tokens.end) > window;
            if begins && ends && !tokens.is_empty() && cuts.window(tokens.end - 1) == window {
                for (count, &length) in counts.iter_mut().zip(&self.parts[window]) {
                    *count += u64::from(length);
                }
                return;
            }
        }
        for id in &ids[tokens.start * top_k..tokens.end * top_k] {
            counts[id.index()] += 1;
        }
    }

    /// Returns how many planes hold the sums of any column.
    fn planes(&self, size: usize) -> usize {
        let mut tokens = [0usize; IDS];
        for chunk in &self.chunks[..self.used] {
            for id in 0..IDS {
                tokens[id] += usize::from(chunk.lengths[id]);
            }
        }
        let largest = tokens[..size].iter().max().copied().unwrap_or(0);
        if largest < 1 << FEW_PLANES { FEW_PLANES } else { PLANES }
    }
}

/// Places of the next token of every id.
struct Ends {
    next: [u16; IDS],
    /// Place of an id's first token: `next - base` of its tokens were written.
    base: [u16; IDS],
}

/// Writes the tokens of every id, and counts those of every window's part; the chunk begins with token `begin` of its block.
fn sort<I: ExpertId>(
    ids: &[I],
    top_k: usize,
    chunk: &mut Chunk,
    cuts: Cuts,
    begin: usize,
    parts: &mut Vec<[u16; IDS]>,
) {
    let mut ends = Ends { next: [0; IDS], base: [0; IDS] };
    for id in 0..IDS {
        ends.next[id] = (id * SEGMENT) as u16;
    }
    ends.base = ends.next;
    let mut last = [0u16; IDS];
    let mut used = IDS;
    let tokens = ids.len() / top_k;
    let mut from = 0;
    while from < tokens {
        let window = cuts.window(begin + from);
        let cut = cuts.first.saturating_add(window.saturating_mul(cuts.length)).saturating_sub(begin);
        let to = tokens.min(cut);
        let run = &ids[from * top_k..to * top_k];
        match top_k {
            4 => add_tokens(run, 4, from, chunk, &mut ends, &mut used),
            6 => add_tokens(run, 6, from, chunk, &mut ends, &mut used),
            8 => add_tokens(run, 8, from, chunk, &mut ends, &mut used),
            10 => add_tokens(run, 10, from, chunk, &mut ends, &mut used),
            _ => add_tokens(run, top_k, from, chunk, &mut ends, &mut used),
        }
        if parts.len() == window {
            parts.push([0; IDS]);
        }
        let counts = &mut parts[window];
        for id in 0..IDS {
            let now = ends.next[id].wrapping_sub(ends.base[id]);
            counts[id] += now - last[id];
            last[id] = now;
        }
        from = to;
    }
    chunk.lengths = last;
    for id in 0..IDS {
        let end = usize::from(ends.next[id]);
        chunk.tokens[end..end.next_multiple_of(GROUP)].fill(CHUNK as u16);
    }
}

/// Adds tokens to the lists of their ids. It is inlined for constant `top_k`, so that the loop over a token's ids unrolls.
#[inline(always)]
fn add_tokens<I: ExpertId>(
    ids: &[I],
    top_k: usize,
    from: usize,
    chunk: &mut Chunk,
    ends: &mut Ends,
    used: &mut usize,
) {
    let Chunk { tokens, follows, .. } = chunk;
    for (token, ids) in (from as u16..).zip(ids.chunks_exact(top_k)) {
        for id in ids {
            let id = id.index() % IDS;
            let at = ends.next[id];
            tokens[usize::from(at)] = token;
            let next = at.wrapping_add(1);
            ends.next[id] = next;
            if usize::from(next) % SEGMENT == 0 {
                // Full: another segment goes on.
                let place = (*used * SEGMENT) as u16;
                follows[usize::from(at) / SEGMENT] = *used as u16;
                ends.base[id] = ends.base[id].wrapping_add(place.wrapping_sub(next));
                ends.next[id] = place;
                *used += 1;
            }
        }
    }
}

/// Writes the set of every token.
///
/// It is compiled without the widest vectors: for these the compiler gathers a word of many sets, which is slower.
#[multiversion::multiversion(targets("x86_64+avx2+bmi2"))]
fn sets_of<I: ExpertId, const N: usize>(ids: &[I], top_k: usize, single: &Single<N>, sets: &mut [Set<N>]) {
    match top_k {
        4 => sets_with(ids, 4, single, sets),
        6 => sets_with(ids, 6, single, sets),
        8 => sets_with(ids, 8, single, sets),
        10 => sets_with(ids, 10, single, sets),
        _ => sets_with(ids, top_k, single, sets),
    }
}

/// Writes the set of every token. It is inlined for constant `top_k`, so that the loop over a token's ids unrolls.
#[inline(always)]
fn sets_with<I: ExpertId, const N: usize>(ids: &[I], top_k: usize, single: &Single<N>, sets: &mut [Set<N>]) {
    for (set, ids) in sets.iter_mut().zip(ids.chunks_exact(top_k)) {
        let mut bits = [0u64; N];
        for id in ids {
            let single = &single.0[id.index() % IDS];
            for i in 0..N {
                bits[i] |= single[i];
            }
        }
        *set = bits;
    }
}

/// The set of each id alone.
#[repr(align(64))]
struct Single<const N: usize>([Set<N>; IDS]);

/// Returns the set of each id. Bits lie so that the sums of columns come out in the order of ids, see [`columns`].
const fn single<const N: usize>() -> Single<N> {
    let mut single = [[0; N]; IDS];
    let mut id = 0;
    while id < 64 * N {
        single[id][id / 8 % N] = 1 << (id / (8 * N) * 8 + id % 8);
        id += 1;
    }
    Single(single)
}

static OF_WIDE: Single<WIDE> = single();
static OF_NARROW: Single<NARROW> = single();

/// Adds the pairs of up to 65535 tokens to the tables of `left` `[size, size]`, or writes them there where `new`: of each
/// of these lists with the ids on the right.
pub(super) fn count_pairs<I: ExpertId>(
    left: &mut [(&Lists, &mut [u64])],
    right: &[I],
    top_k: usize,
    size: usize,
    new: bool,
    scratch: &mut Scratch,
) {
    if size > 64 * NARROW {
        count_with(left, right, top_k, size, &OF_WIDE, new, scratch);
    } else {
        count_with(left, right, top_k, size, &OF_NARROW, new, scratch);
    }
}

fn count_with<I: ExpertId, const N: usize>(
    left: &mut [(&Lists, &mut [u64])],
    right: &[I],
    top_k: usize,
    size: usize,
    single: &Single<N>,
    new: bool,
    scratch: &mut Scratch,
) {
    let Scratch { sets, sums } = scratch;
    sets.resize((CHUNK + 1) * N + LINE / 8, 0);
    // A set that straddles two cache lines takes twice as long.
    let before = sets.as_ptr().align_offset(LINE).min(LINE / 8);
    let sets = &mut sets[before..].as_chunks_mut::<N>().0[..=CHUNK];
    sets[CHUNK] = [0; N];
    let planes: Vec<usize> = left.iter().map(|(lists, _)| lists.planes(size)).collect();
    for (sums, planes) in sums.iter_mut().zip(&planes) {
        // Its numbers are not read.
        sums.resize(size * planes * N, 0);
    }
    for (number, ids) in right.chunks(chunk_tokens(top_k) * top_k).enumerate() {
        sets_of(ids, top_k, single, sets);
        for (((lists, _), sums), &planes) in left.iter().zip(&mut *sums).zip(&planes) {
            let chunk = &lists.chunks[number];
            if planes == PLANES {
                add_sets::<N, PLANES>(chunk, sets, number == 0, sums);
            } else {
                add_sets::<N, FEW_PLANES>(chunk, sets, number == 0, sums);
            }
        }
    }
    for (((_, counts), sums), &planes) in left.iter_mut().zip(&*sums).zip(&planes) {
        if planes == PLANES {
            write::<N, PLANES>(sums, size, new, counts);
        } else {
            write::<N, FEW_PLANES>(sums, size, new, counts);
        }
    }
}

/// Adds the sets of the tokens of every id to its sums, for each id P planes, which are zero before the first chunk.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
fn add_sets<const N: usize, const P: usize>(chunk: &Chunk, sets: &[Set<N>], first: bool, sums: &mut [u64]) {
    let sums = sums.as_chunks_mut::<N>().0.as_chunks_mut::<P>().0;
    // Ids beyond those that have sums occur in no token: their lists are empty.
    for (id, sums) in sums.iter_mut().enumerate() {
        let mut length = usize::from(chunk.lengths[id]);
        let mut segment = id;
        // A copy: the compiler then knows that no set changes with the sums.
        let mut planes = if first { [[0; N]; P] } else { *sums };
        loop {
            let tokens = &chunk.tokens[segment * SEGMENT..][..length.min(SEGMENT).next_multiple_of(GROUP)];
            let (pairs, rest) = tokens.as_chunks::<{ 2 * GROUP }>();
            for tokens in pairs {
                let sets = tokens.map(|token| &sets[usize::from(token)]);
                add_32(&sets, &mut planes);
            }
            for tokens in rest.as_chunks::<GROUP>().0 {
                let sets = tokens.map(|token| &sets[usize::from(token)]);
                add_16(&sets, &mut planes);
            }
            if length <= SEGMENT {
                break;
            }
            length -= SEGMENT;
            segment = usize::from(chunk.follows[segment]);
        }
        *sums = planes;
    }
}

/// Writes the sums of all ids to `counts` `[size, size]`, or adds them unless `new`.
#[multiversion::multiversion(targets(
    "x86_64+avx512f+avx512bw+avx512dq+avx512vl+avx2+bmi2",
    "x86_64+avx2+bmi2"
))]
fn write<const N: usize, const P: usize>(sums: &[u64], size: usize, new: bool, counts: &mut [u64]) {
    let sums = sums.as_chunks::<N>().0.as_chunks::<P>().0;
    for (planes, counts) in sums.iter().zip(counts.chunks_exact_mut(size)) {
        if new {
            write_columns::<N, P, false>(planes, counts);
        } else {
            write_columns::<N, P, true>(planes, counts);
        }
    }
}

/// Writes the sums of all columns to `counts`, or adds them.
#[inline(always)]
fn write_columns<const N: usize, const P: usize, const ADD: bool>(planes: &[Set<N>; P], counts: &mut [u64]) {
    let (low, high) = (columns(&planes[..8]), columns(&planes[8..]));
    let mut sums = [[[0u16; 8]; N]; 8];
    let bytes = low.as_flattened().as_flattened().iter().zip(high.as_flattened().as_flattened());
    for (sum, (&low, &high)) in sums.as_flattened_mut().as_flattened_mut().iter_mut().zip(bytes) {
        *sum = u16::from(low) | u16::from(high) << 8;
    }
    let sums = sums.as_flattened().as_flattened();
    // Vectors begin at a cache line: those that straddle two take twice as long.
    let head = counts.as_ptr().align_offset(LINE).min(counts.len());
    let (head, lines) = counts.split_at_mut(head);
    for (count, &sum) in head.iter_mut().zip(sums) {
        *count = if ADD { *count + u64::from(sum) } else { u64::from(sum) };
    }
    for (count, &sum) in lines.iter_mut().zip(&sums[head.len()..]) {
        *count = if ADD { *count + u64::from(sum) } else { u64::from(sum) };
    }
}

/// Returns the sums of all columns that up to eight planes hold.
#[inline(always)]
fn columns<const N: usize>(planes: &[Set<N>]) -> [[[u8; 8]; N]; 8] {
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
    rows.map(|words| words.map(u64::to_le_bytes))
}

/// Adds b and c to a; gives the carries.
#[inline(always)]
fn carries(a: &mut u64, b: u64, c: u64) -> u64 {
    let carry = (*a & b) | (*a & c) | (b & c);
    *a ^= b ^ c;
    carry
}

/// Adds word i of 16 sets to the sums of its columns below 16; gives the carries (Harley and Seal's tree of carry-save adders).
#[inline(always)]
fn add_word<const N: usize>(sets: &[&Set<N>], i: usize, low: &mut [u64; 4]) -> u64 {
    let [ones, twos, fours, eights] = low;
    let mut of_two = [0; 2];
    let mut of_four = [0; 2];
    let mut of_eight = [0; 2];
    for half in 0..2 {
        for quarter in 0..2 {
            for pair in 0..2 {
                let at = 8 * half + 4 * quarter + 2 * pair;
                of_two[pair] = carries(ones, sets[at][i], sets[at + 1][i]);
            }
            of_four[quarter] = carries(twos, of_two[0], of_two[1]);
        }
        of_eight[half] = carries(fours, of_four[0], of_four[1]);
    }
    carries(eights, of_eight[0], of_eight[1])
}

/// Adds 16 sets to the sums of all columns.
#[inline(always)]
fn add_16<const N: usize, const P: usize>(sets: &[&Set<N>; GROUP], planes: &mut [Set<N>; P]) {
    for i in 0..N {
        let mut low = [0, 1, 2, 3].map(|plane: usize| planes[plane][i]);
        let carry = add_word(sets, i, &mut low);
        for plane in 0..4 {
            planes[plane][i] = low[plane];
        }
        add_carry(planes, i, 4, carry);
    }
}

/// Adds 32 sets to the sums of all columns.
#[inline(always)]
fn add_32<const N: usize, const P: usize>(sets: &[&Set<N>; 2 * GROUP], planes: &mut [Set<N>; P]) {
    for i in 0..N {
        let mut low = [0, 1, 2, 3].map(|plane: usize| planes[plane][i]);
        let first = add_word(&sets[..GROUP], i, &mut low);
        let second = add_word(&sets[GROUP..], i, &mut low);
        for plane in 0..4 {
            planes[plane][i] = low[plane];
        }
        let carry = carries(&mut planes[4][i], first, second);
        add_carry(planes, i, 5, carry);
    }
}

#[inline(always)]
fn add_carry<const N: usize, const P: usize>(
    planes: &mut [Set<N>; P],
    i: usize,
    from: usize,
    mut carry: u64,
) {
    for plane in from..P {
        let sum = planes[plane][i];
        planes[plane][i] = sum ^ carry;
        carry &= sum;
    }
}
