//! Counting pairs: how often id `a` on the left meets id `b` on the right in one token.
//!
//! The inner loop of everything that moetuner measures. A token with K ids on each side makes K*K pairs, so a trace
//! of a million tokens makes billions. Four kernels, chosen by size:
//!
//! * *bits* (up to 64 ids): every id has a row of bits, one per token; the count of a pair is the number of ones in the
//!   AND of two rows.
//! * *lists* (129 to 512 ids, some per token): every id on the left has the list of its tokens, every token on the
//!   right its set of ids; carry-save adders sum the sets of a list, all columns at once.
//! * *rows*: the right side of a token is written once as a row of one small counter per id, and that row is added to
//!   the table row of each left id. K vector additions count K*K pairs.
//! * *cells*: one increment per pair, for tables so wide that adding whole rows costs more.
//!
//! Small counters overflow, so they are added to wider ones before they can.

pub use bits::{IDS as MOST_UNITS, NONE as NO_UNIT, Units};

use std::ops::Range;

pub use super::lists::Cuts;
use super::lists::{self, Lists, Scratch};
use super::{bits, rows};
use crate::trace::ExpertId;

/// Tokens of one block where tables are small: the nearer the cache that a block's ids come from, the better.
pub const SHORT_BLOCK: usize = 4096;

/// Returns the tokens to count at a time for pairs of `size` ids, a multiple of [`SHORT_BLOCK`]. They are so few that the
/// ids of some layers stay in a cache, and so many that wide tables, which do not, are added to seldom. The kernels' sums
/// are of up to 65535.
#[must_use]
pub fn block(size: usize, top_k: usize) -> usize {
    match Kernel::choose(size, top_k) {
        Kernel::Bits => SHORT_BLOCK,
        Kernel::Lists => 8 * SHORT_BLOCK,
        Kernel::Rows | Kernel::Cells => 4 * SHORT_BLOCK,
    }
}

/// Kernels that count the pairs of `size` ids, `top_k` of them per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Bits,
    Lists,
    Rows,
    Cells,
}

impl Kernel {
    fn choose(size: usize, top_k: usize) -> Self {
        // Per token: bits costs (size / 8)^2 / 64 vector operations; lists some per left id, whatever the size, and for
        // each list what it takes to begin one; rows one addition per left id and 64 counters, and the flush
        // of the table every 255 tokens; cells one increment per pair (measured: docs/experiments.md).
        let rows = size.div_ceil(64) * (top_k + 1) * 3 + size * size / 4096;
        match size {
            0..=64 => Self::Bits,
            129..=lists::IDS if top_k >= 4 => Self::Lists,
            _ if rows < top_k * top_k * 4 => Self::Rows,
            _ => Self::Cells,
        }
    }
}

/// The ids of one layer in a block of tokens, in the form that its kernel wants.
#[derive(Debug)]
pub struct Side<I> {
    ids: Vec<I>,
    bits: Vec<u64>,
    /// True if rows are of the bits of sums, not of ids.
    sums: bool,
    lists: Lists,
    scratch: Scratch,
    /// Number of tokens.
    pub tokens: usize,
    /// Ids per token.
    pub top_k: usize,
    size: usize,
    kernel: Kernel,
}

impl<I: ExpertId> Side<I> {
    /// Builds a side without tokens, which will have `top_k` ids each, all below `size`.
    #[must_use]
    pub fn new(top_k: usize, size: usize) -> Self {
        Self::with(Kernel::choose(size, top_k), top_k, size)
    }

    fn with(kernel: Kernel, top_k: usize, size: usize) -> Self {
        let (ids, bits, lists) = (Vec::new(), Vec::new(), Lists::default());
        let scratch = Scratch::default();
        Self { ids, bits, sums: false, lists, scratch, tokens: 0, top_k, size, kernel }
    }

    /// Takes the ids of a block in place of those it had, which it leaves in the vector; a token's ids must differ.
    pub fn fill(&mut self, ids: &mut Vec<I>, cuts: Cuts) {
        std::mem::swap(&mut self.ids, ids);
        self.tokens = self.ids.len() / self.top_k;
        match self.kernel {
            Kernel::Bits => bits::rows_of(&self.ids, self.top_k, self.size, &mut self.bits),
            Kernel::Lists => self.lists.fill(&self.ids, self.top_k, cuts),
            Kernel::Rows | Kernel::Cells => {}
        }
    }

    /// Returns the ids of every token; none where they were summed.
    pub(crate) fn rows(&self) -> std::slice::ChunksExact<'_, I> {
        self.ids.chunks_exact(self.top_k)
    }

    /// Takes instead of ids the bits of the sums of their units: a row for each.
    pub fn fill_sums<J: ExpertId>(&mut self, ids: &[J], units: &Units) {
        self.kernel = Kernel::Bits;
        self.sums = true;
        self.tokens = ids.len() / self.top_k;
        bits::rows_of_sums(ids, self.top_k, self.size, units, &mut self.bits);
    }

    /// Iterates over the bits of all ids for 64 tokens at a time, one id after the other, and which of the 64 tokens
    /// are in `tokens`; nothing where the kernel needs no bits.
    pub fn words(&self, tokens: Range<usize>) -> impl Iterator<Item = (&[u64], u64)> {
        bits::words(&self.bits, self.size, tokens)
    }

    /// Adds how often each id occurs in some of the tokens to `counts` `[size]`.
    pub fn count(&self, tokens: Range<usize>, counts: &mut [u64]) {
        if self.kernel == Kernel::Bits {
            bits::count(&self.bits, self.size, tokens, counts);
            return;
        }
        if self.kernel == Kernel::Lists {
            self.lists.count(&self.ids, self.top_k, tokens, counts);
            return;
        }
        for id in &self.ids[tokens.start * self.top_k..tokens.end * self.top_k] {
            counts[id.index()] += 1;
        }
    }

    /// Adds pairs to tables `[size, size]`, or writes them there where `new`: of the ids of another side, on the left, with
    /// this one's (`left`), and of this one's with each other and each with itself (`inside`).
    ///
    /// # Panics
    /// When the two sides are not of the same tokens.
    pub fn count_pairs(&mut self, left: Option<(&Self, &mut [u64])>, inside: Option<&mut [u64]>, new: bool) {
        let (size, top_k) = (self.size, self.top_k);
        if self.kernel == Kernel::Lists {
            let mut tables = Vec::new();
            if let Some((left, counts)) = left {
                assert!(left.tokens == self.tokens && counts.len() == size * size);
                tables.push((&left.lists, counts));
            }
            if let Some(counts) = inside {
                tables.push((&self.lists, counts));
            }
            lists::count_pairs(&mut tables, &self.ids, top_k, size, new, &mut self.scratch);
            return;
        }
        if let Some((left, counts)) = left {
            assert!(left.tokens == self.tokens);
            left.add_pairs(self, counts, new);
        }
        if let Some(counts) = inside {
            self.add_pairs(self, counts, new);
        }
    }

    fn add_pairs(&self, right: &Self, counts: &mut [u64], new: bool) {
        let (size, top_k) = (self.size, self.top_k);
        let is_same = std::ptr::eq(self, right);
        assert!(counts.len() == size * size);
        if new {
            counts.fill(0);
        }
        match self.kernel {
            Kernel::Bits => bits::count_pairs(&self.bits, &right.bits, size, is_same, self.sums, counts),
            Kernel::Rows => rows::count_pairs(&self.ids, &right.ids, top_k, size, counts),
            Kernel::Cells => {
                let (left, right) = (self.ids.chunks_exact(top_k), right.ids.chunks_exact(top_k));
                for (left, right) in left.zip(right) {
                    for a in left {
                        let row = &mut counts[a.index() * size..][..size];
                        for b in right {
                            row[b.index()] += 1;
                        }
                    }
                }
            }
            Kernel::Lists => unreachable!("lists are counted for both at once"),
        }
    }
}
