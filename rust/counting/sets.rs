//! Sets of experts that tokens chose: the distinct sets of a layer, and the number of tokens of each.
//!
//! The number of devices that a token visits depends on its whole set, not on pairs. Counts of sets add up like all others.
//!
//! A set is a key: its ids in rising order, as many to a word as fit, so that keys are in the order of ids. Keys of tokens
//! wait until they are about as many as the sets that are known. Then they are sorted, digit by digit, and merged with
//! these: a hash table would wait for memory at every token.

use crate::trace::ExpertId;

/// Keys that wait at least, so that what begins a sort is little beside it.
const FEWEST: usize = 1 << 14;
/// Rows whose ids are sorted side by side.
const LANES: usize = 32;
/// Bits of a digit at most: as many counters as stay in the first-level cache.
const DIGIT: u32 = 11;

/// Distinct sets of `top_k` experts with counts. Memory depends on their number, not on that of tokens.
#[derive(Debug, Clone)]
pub struct Sets {
    layout: Layout,
    known: Counts,
    /// Keys of tokens that are not counted yet, in their order `[N, words]`.
    waiting: Vec<u64>,
    /// Key of the token that was added last.
    last: Vec<u64>,
    /// Tokens that each of those that wait stands for.
    every: u64,
}

impl Sets {
    /// Builds an empty table of sets of `top_k` of so many experts; each token that is added stands for `every`.
    #[must_use]
    pub fn new(experts: usize, top_k: usize, every: u64) -> Self {
        let layout = Layout::new(experts, top_k);
        Self { layout, known: Counts::default(), waiting: Vec::new(), last: Vec::new(), every }
    }

    /// Counts the sets of tokens, their experts in any order.
    pub(super) fn add<'a, I: ExpertId>(&mut self, rows: impl Iterator<Item = &'a [I]>) {
        if self.waiting.len() >= self.known.keys.len().max(FEWEST * self.layout.words) {
            self.count();
        }
        self.layout.write_keys(rows, &mut self.waiting);
        if let Some(at) = self.waiting.len().checked_sub(self.layout.words) {
            self.last.clear();
            self.last.extend_from_slice(&self.waiting[at..]);
        }
    }

    /// Counts the keys that wait.
    fn count(&mut self) {
        let Self { layout, known, waiting, every, .. } = self;
        sort(waiting, *layout);
        let counted = Counts::of_sorted(waiting, layout.words, *every);
        waiting.clear();
        *known = merge(known, &counted, layout.words);
    }

    /// Returns ids `[N, K]` and counts `[N]`, in the order of the ids, which does not depend on the order of tokens. The
    /// last token stands for so many `fewer` tokens than others.
    #[must_use]
    pub fn finish(mut self, fewer: u64) -> (Vec<u16>, Vec<u64>) {
        self.count();
        if !self.last.is_empty() {
            self.known.take_back(&self.last, fewer);
        }
        (self.layout.ids(&self.known.keys), self.known.counts)
    }
}

/// Returns the sets of a table `[N, K]`, each once and in the order of its ids, with the sums of their counts `[N]`.
#[must_use]
pub fn merge_rows(ids: &[u16], counts: &[u64], top_k: usize) -> (Vec<u16>, Vec<u64>) {
    let experts = ids.iter().max().map_or(1, |&id| usize::from(id) + 1);
    let layout = Layout::new(experts, top_k);
    let words = layout.words;
    let mut keys = Vec::new();
    layout.write_keys(ids.chunks_exact(top_k), &mut keys);
    // Rows that rise are merged with the next that do: most tables are a few such runs.
    let mut runs: Vec<Counts> = Vec::new();
    for (key, &count) in keys.chunks_exact(words).zip(counts) {
        let rises = |run: &Counts| run.keys[run.keys.len() - words..] < *key;
        if !runs.last().is_some_and(rises) {
            runs.push(Counts::default());
        }
        if let Some(run) = runs.last_mut() {
            run.keys.extend_from_slice(key);
            run.counts.push(count);
        }
    }
    while runs.len() > 1 {
        let join = |pair: &[Counts]| match pair {
            [one, other] => merge(one, other, words),
            _ => pair[0].clone(),
        };
        runs = runs.chunks(2).map(join).collect();
    }
    let merged = runs.pop().unwrap_or_default();
    (layout.ids(&merged.keys), merged.counts)
}

/// How the ids of a set lie in the words of its key.
#[derive(Debug, Clone, Copy)]
struct Layout {
    top_k: usize,
    /// Bits of an id.
    bits: u32,
    /// Ids of a word; the last word of a key may have fewer.
    ids: usize,
    /// Words of a key.
    words: usize,
}

impl Layout {
    fn new(experts: usize, top_k: usize) -> Self {
        let bits = experts.next_power_of_two().ilog2().max(1);
        let ids = (u64::BITS / bits) as usize;
        Self { top_k, bits, ids, words: top_k.div_ceil(ids) }
    }

    /// Writes the keys of rows `[K]` behind others.
    fn write_keys<'a, I: ExpertId>(&self, rows: impl Iterator<Item = &'a [I]>, keys: &mut Vec<u64>) {
        let mut columns = vec![[0u16; LANES]; self.top_k];
        let mut rows = rows.peekable();
        while rows.peek().is_some() {
            let mut number = 0;
            for (lane, row) in rows.by_ref().take(LANES).enumerate() {
                for (column, id) in columns.iter_mut().zip(row) {
                    column[lane] = id.index() as u16;
                }
                number += 1;
            }
            sort_lanes(&mut columns);
            let first = keys.len();
            keys.resize(first + number * self.words, 0);
            for (word, columns) in columns.chunks(self.ids).enumerate() {
                let packed = pack(columns, self.bits);
                for (key, packed) in keys[first..].chunks_exact_mut(self.words).zip(packed) {
                    key[word] = packed;
                }
            }
        }
    }

    /// Returns the ids of keys `[N, K]`.
    fn ids(&self, keys: &[u64]) -> Vec<u16> {
        let mask = (1 << self.bits) - 1;
        let mut ids = Vec::with_capacity(keys.len() / self.words * self.top_k);
        for key in keys.chunks_exact(self.words) {
            for (word, key) in key.iter().enumerate() {
                let number = self.ids.min(self.top_k - word * self.ids);
                ids.extend((0..number as u32).rev().map(|at| (key >> (at * self.bits) & mask) as u16));
            }
        }
        ids
    }

    /// Returns the bits of a word that ids take.
    fn used_bits(&self, word: usize) -> u32 {
        self.ids.min(self.top_k - word * self.ids) as u32 * self.bits
    }
}

/// Sorts the ids of every lane.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx2", "x86_64+avx2"))]
fn sort_lanes(columns: &mut [[u16; LANES]]) {
    for end in (1..columns.len()).rev() {
        for at in 0..end {
            let (left, right) = (columns[at], columns[at + 1]);
            for lane in 0..LANES {
                columns[at][lane] = left[lane].min(right[lane]);
                columns[at + 1][lane] = left[lane].max(right[lane]);
            }
        }
    }
}

/// Returns the ids of every lane as a word, the first of them highest.
#[multiversion::multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx2", "x86_64+avx2"))]
fn pack(columns: &[[u16; LANES]], bits: u32) -> [u64; LANES] {
    let mut packed = [0; LANES];
    for column in columns {
        for lane in 0..LANES {
            packed[lane] = packed[lane] << (bits % u64::BITS) | u64::from(column[lane]);
        }
    }
    packed
}

/// Sorts keys.
fn sort(keys: &mut Vec<u64>, layout: Layout) {
    match layout.words {
        1 => sort_with(keys, 1, layout),
        2 => sort_with(keys, 2, layout),
        words => sort_with(keys, words, layout),
    }
}

/// Sorts keys by one digit after the other, the lowest first; keys with the same digit keep their order. It is inlined for
/// constant `words`.
#[inline(always)]
fn sort_with(keys: &mut Vec<u64>, words: usize, layout: Layout) {
    let number = keys.len() / words;
    if number < 2 {
        return;
    }
    let largest = number.ilog2().clamp(4, DIGIT);
    let mut sorted = vec![0; keys.len()];
    for word in (0..words).rev() {
        let used = layout.used_bits(word);
        let digit = used.div_ceil(used.div_ceil(largest));
        for shift in (0..used).step_by(digit as usize) {
            let digit_of = |key: &[u64]| (key[word] >> shift) as usize & ((1 << digit) - 1);
            let mut next = vec![0; 1 << digit];
            for key in keys.chunks_exact(words) {
                next[digit_of(key)] += 1;
            }
            let mut first = 0;
            for next in &mut next {
                first += std::mem::replace(next, first);
            }
            for key in keys.chunks_exact(words) {
                let place = &mut next[digit_of(key)];
                sorted[*place * words..][..words].copy_from_slice(key);
                *place += 1;
            }
            std::mem::swap(keys, &mut sorted);
        }
    }
}

/// Distinct keys in their order `[N, words]`, and tokens of each `[N]`.
#[derive(Debug, Clone, Default)]
struct Counts {
    keys: Vec<u64>,
    counts: Vec<u64>,
}

impl Counts {
    /// Counts sorted keys, each of which stands for `every` tokens.
    fn of_sorted(keys: &[u64], words: usize, every: u64) -> Self {
        match words {
            1 => Self::of_sorted_with(keys, 1, every),
            words => Self::of_sorted_with(keys, words, every),
        }
    }

    /// Does the work of [`Counts::of_sorted`]. No branch depends on the keys: it would be foretold badly.
    #[inline(always)]
    fn of_sorted_with(keys: &[u64], words: usize, every: u64) -> Self {
        let mut counted = Self { keys: vec![0; keys.len()], counts: vec![0; keys.len() / words] };
        let Some(first) = keys.get(..words) else { return counted };
        counted.keys[..words].copy_from_slice(first);
        let (mut before, mut at) = (first, 0);
        for key in keys.chunks_exact(words) {
            at += usize::from(key != before);
            counted.keys[at * words..][..words].copy_from_slice(key);
            counted.counts[at] += every;
            before = key;
        }
        counted.keys.truncate((at + 1) * words);
        counted.counts.truncate(at + 1);
        counted
    }

    /// Takes so many tokens back of a key.
    fn take_back(&mut self, key: &[u64], tokens: u64) {
        let below = |at: usize| self.keys[at * key.len()..][..key.len()] < *key;
        let (mut from, mut to) = (0, self.counts.len());
        while from < to {
            let middle = from.midpoint(to);
            if below(middle) { from = middle + 1 } else { to = middle }
        }
        self.counts[from] -= tokens;
    }
}

/// Returns the keys of both, with the sums of their counts.
fn merge(one: &Counts, other: &Counts, words: usize) -> Counts {
    match words {
        1 => merge_with(one, other, 1),
        words => merge_with(one, other, words),
    }
}

/// Does the work of [`merge`]. No branch depends on the order of keys: it would be foretold badly.
#[inline(always)]
fn merge_with(one: &Counts, other: &Counts, words: usize) -> Counts {
    let number = one.counts.len() + other.counts.len();
    let mut merged = Counts { keys: vec![0; number * words], counts: vec![0; number] };
    let (mut i, mut j, mut at) = (0, 0, 0);
    while i < one.counts.len() && j < other.counts.len() {
        let (key, its) = (&one.keys[i * words..][..words], &other.keys[j * words..][..words]);
        let (is_of_one, is_of_other) = (key <= its, its <= key);
        merged.keys[at * words..][..words].copy_from_slice(if is_of_one { key } else { its });
        merged.counts[at] = one.counts[i] * u64::from(is_of_one) + other.counts[j] * u64::from(is_of_other);
        i += usize::from(is_of_one);
        j += usize::from(is_of_other);
        at += 1;
    }
    merged.keys.truncate(at * words);
    merged.counts.truncate(at);
    for (rest, from) in [(one, i), (other, j)] {
        merged.keys.extend_from_slice(&rest.keys[from * words..]);
        merged.counts.extend_from_slice(&rest.counts[from..]);
    }
    merged
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::random::Random;

    /// Draws rows of different ids, of which the nearest 16 are drawn often.
    fn draw_rows(random: &mut Random, experts: usize, top_k: usize, tokens: usize) -> Vec<Vec<u16>> {
        let mut ids: Vec<u16> = (0..experts as u16).collect();
        let draw = |_| {
            for at in 0..top_k {
                let drawn_of = if random.below(3) > 0 { 16 } else { experts };
                ids.swap(at, at + random.below(drawn_of.min(experts - at)));
            }
            ids[..top_k].to_vec()
        };
        (0..tokens).map(draw).collect()
    }

    fn flatten(sets: &BTreeMap<Vec<u16>, u64>) -> (Vec<u16>, Vec<u64>) {
        (sets.keys().flatten().copied().collect(), sets.values().copied().collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Keys of one word, of two and of many; one digit and several; blocks that make known sets wait, and none.
        #[test]
        fn sets_are_counted_as_a_map_does(
            seed: u64,
            (experts, top_k) in prop::sample::select(vec![
                (1, 1), (2, 1), (2, 2), (8, 2), (32, 4), (64, 6), (128, 8), (256, 8), (512, 10), (300, 33), (1000, 5), (70, 70),
            ]),
            tokens in 0..800usize,
            block in prop::sample::select(vec![1, 100, 800]),
            every in 1..4u64,
        ) {
            let mut random = Random::new(seed, 0);
            let rows = draw_rows(&mut random, experts, top_k, tokens);
            let mut sets = Sets::new(experts, top_k, every);
            for block in rows.chunks(block) {
                sets.add(block.iter().map(Vec::as_slice));
                if random.below(2) == 0 {
                    sets.count();
                }
            }
            let mut expected: BTreeMap<Vec<u16>, u64> = BTreeMap::new();
            let sorted = |row: &Vec<u16>| {
                let mut row = row.clone();
                row.sort_unstable();
                row
            };
            for row in &rows {
                *expected.entry(sorted(row)).or_default() += every;
            }
            if let Some(last) = rows.last() {
                *expected.entry(sorted(last)).or_default() -= every - 1;
            }
            let (ids, counts) = sets.finish(every - 1);
            prop_assert_eq!((ids, counts), flatten(&expected));
        }

        /// Tables in any order, with sets that occur several times.
        #[test]
        fn rows_are_merged_as_a_map_does(seed: u64, top_k in 1..12usize, rows in 0..300usize, is_sorted: bool) {
            let mut random = Random::new(seed, 0);
            let mut rows = draw_rows(&mut random, 40, top_k, rows);
            if is_sorted {
                rows.sort_unstable();
            }
            let counts: Vec<u64> = rows.iter().map(|_| random.below(9) as u64).collect();
            let mut expected: BTreeMap<Vec<u16>, u64> = BTreeMap::new();
            for (row, &count) in rows.iter().zip(&counts) {
                let mut row = row.clone();
                row.sort_unstable();
                *expected.entry(row).or_default() += count;
            }
            prop_assert_eq!(merge_rows(&rows.concat(), &counts, top_k), flatten(&expected));
        }
    }

    /// More tokens than wait at least.
    #[test]
    fn sets_that_are_known_are_merged_with_those_that_wait() {
        let mut random = Random::new(0, 0);
        let rows = draw_rows(&mut random, 16, 2, 5 * FEWEST);
        let mut sets = Sets::new(16, 2, 1);
        for block in rows.chunks(FEWEST / 3) {
            sets.add(block.iter().map(Vec::as_slice));
        }
        assert!(!sets.known.counts.is_empty() && sets.waiting.len() < 2 * FEWEST);
        let (ids, counts) = sets.finish(0);
        assert_eq!((ids.len(), counts.iter().sum::<u64>()), (counts.len() * 2, rows.len() as u64));
        assert_eq!(counts.len(), 120);
    }
}
